package ca_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
)

// samples is every sample of r, as name{label values} → value; histograms count
// their observations.
func samples(t *testing.T, r prometheus.Gatherer) map[string]float64 {
	t.Helper()
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := make(map[string]float64)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, l.GetValue())
			}
			out[fmt.Sprintf("%s{%s}", f.GetName(), strings.Join(labels, ","))] = value(m)
		}
	}
	return out
}

func value(m *dto.Metric) float64 {
	switch {
	case m.Counter != nil:
		return m.Counter.GetValue()
	case m.Gauge != nil:
		return m.Gauge.GetValue()
	}
	return float64(m.Histogram.GetSampleCount())
}

func TestRequestOutcomes(t *testing.T) {
	r := prometheus.NewRegistry()
	p := ca.NewMetrics(r).Provider("x")
	for _, err := range []error{
		nil,
		fmt.Errorf("sign: %w", ca.ErrDenied),
		fmt.Errorf("connect: %w", ca.ErrConfig),
		fmt.Errorf("no certificate: %w", context.DeadlineExceeded),
		errors.New("unreachable"),
	} {
		p.Request(err, time.Second)
	}
	p.Reconnected()
	got := samples(t, r)
	for name, want := range map[string]float64{
		"istio_ca_requests_total{ok,x}": 1, "istio_ca_requests_total{denied,x}": 1, "istio_ca_requests_total{config,x}": 1,
		"istio_ca_requests_total{timeout,x}": 1, "istio_ca_requests_total{error,x}": 1, "istio_ca_requests_total{rejected,x}": 0,
		"istio_ca_request_duration_seconds{x}": 5, "istio_ca_stream_reconnects_total{x}": 1, "istio_ca_renewals_total{x}": 0,
	} {
		if v, ok := got[name]; !ok || v != want {
			t.Errorf("%s = %v (present %v), want %v", name, v, ok, want)
		}
	}
	var none *ca.Metrics
	none.Provider("x").Request(nil, 0) // counts nothing, and does not panic
	none.Provider("x").Reconnected()
}

func TestManagerMetrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := prometheus.NewRegistry()
		p := catest.NewProvider("x")
		m := catest.RunManager(t, catest.Fixed{p}, ca.ManagerConfig{Metrics: ca.NewMetrics(r)})
		r.MustRegister(m)
		authority := catest.NewCA(t, "td.test")
		id := catest.ID(catest.GoodID)
		lease := m.Acquire(ca.WorkloadRef{ID: id, Namespace: "a", Pod: "b-0"})
		defer lease.Release()
		synctest.Wait()
		if got := samples(t, r); got["istio_ca_certificates{x,pending}"] != 1 {
			t.Errorf("before the answer: %v", got)
		}
		var until time.Time
		for range 3 {
			svid := authority.SVID(t, id)
			until = svid.NotAfter
			p.Set(p.Key(lease.Ref()), ca.Event{State: ca.Available, SVID: svid})
			synctest.Wait()
		}
		for _, sa := range []string{"more", "again"} { // of which none expires before
			later := m.Acquire(ca.WorkloadRef{ID: catest.ID("spiffe://td.test/ns/zz/sa/" + sa)})
			defer later.Release()
			p.Set(p.Key(later.Ref()), ca.Event{State: ca.Available, SVID: authority.SVID(t, later.Ref().ID, catest.Life(48*time.Hour))})
		}
		synctest.Wait()
		got := samples(t, r)
		for name, want := range map[string]float64{
			"istio_ca_certificates{x,pending}": 0, "istio_ca_certificates{x,available}": 3,
			"istio_ca_renewals_total{x}": 2, "istio_ca_soonest_expiry_timestamp_seconds{x}": float64(until.Unix()),
		} {
			if got[name] != want {
				t.Errorf("%s = %v, want %v", name, got[name], want)
			}
		}
		if pods := m.Snapshot()[0].Pods; len(pods) != 1 || pods[0] != "a/b-0" {
			t.Errorf("pods %q, want a/b-0", pods)
		}
	})
}
