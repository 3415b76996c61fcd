package ca

import (
	"context"
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics count what certificate providers do, by provider; never by identity,
// of which there are too many. A nil *Metrics counts nothing. All methods are
// safe for concurrent use.
type Metrics struct {
	requests   *prometheus.CounterVec
	latency    *prometheus.HistogramVec
	renewals   *prometheus.CounterVec
	reconnects *prometheus.CounterVec
}

// The outcomes of a request to a provider's backend.
const (
	outcomeOK       = "ok"
	outcomeDenied   = "denied"   // ErrDenied
	outcomeConfig   = "config"   // ErrConfig
	outcomeRejected = "rejected" // ErrRejected
	outcomeTimeout  = "timeout"
	outcomeError    = "error"
)

// NewMetrics registers the families. It panics when r already has them, as
// prometheus.Registerer.MustRegister does.
func NewMetrics(r prometheus.Registerer) *Metrics {
	byProvider := []string{"provider"}
	m := &Metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "istio_ca_requests_total", Help: "The number of requests to the backend of a certificate provider, by outcome (unstable)",
		}, []string{"provider", "outcome"}),
		latency: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "istio_ca_request_duration_seconds", Help: "The time of a request to the backend of a certificate provider; of a stream, to its first message (unstable)",
			Buckets: []float64{.005, .025, .1, .25, .5, 1, 2.5, 5, 10, 30},
		}, byProvider),
		renewals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "istio_ca_renewals_total", Help: "The number of certificates that replaced an earlier one of the same workload (unstable)",
		}, byProvider),
		reconnects: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "istio_ca_stream_reconnects_total", Help: "The number of streams of a certificate provider that were opened anew (unstable)",
		}, byProvider),
	}
	r.MustRegister(m.requests, m.latency, m.renewals, m.reconnects)
	return m
}

// ProviderMetrics are the counters of one provider. A nil one counts nothing.
type ProviderMetrics struct {
	m    *Metrics
	name string
}

// Provider is the counters of the provider of that name. They exist from then
// on, with the value 0.
func (m *Metrics) Provider(name string) *ProviderMetrics {
	if m == nil {
		return nil
	}
	for _, o := range []string{outcomeOK, outcomeDenied, outcomeConfig, outcomeRejected, outcomeTimeout, outcomeError} {
		m.requests.WithLabelValues(name, o)
	}
	m.renewals.WithLabelValues(name)
	m.reconnects.WithLabelValues(name)
	return &ProviderMetrics{m, name}
}

// Request counts one finished request: err is nil for a success.
func (p *ProviderMetrics) Request(err error, took time.Duration) {
	if p == nil {
		return
	}
	p.m.requests.WithLabelValues(p.name, outcome(err)).Inc()
	p.m.latency.WithLabelValues(p.name).Observe(took.Seconds())
}

// Reconnected counts a stream that was opened anew after it broke.
func (p *ProviderMetrics) Reconnected() {
	if p != nil {
		p.m.reconnects.WithLabelValues(p.name).Inc()
	}
}

// renewed counts a certificate that replaced an earlier one.
func (m *Metrics) renewed(provider string) {
	if m != nil {
		m.renewals.WithLabelValues(provider).Inc()
	}
}

func outcome(err error) string {
	switch {
	case err == nil:
		return outcomeOK
	case errors.Is(err, ErrDenied):
		return outcomeDenied
	case errors.Is(err, ErrConfig):
		return outcomeConfig
	case errors.Is(err, ErrRejected):
		return outcomeRejected
	case errors.Is(err, context.DeadlineExceeded):
		return outcomeTimeout
	}
	return outcomeError
}

// The gauges that a [Manager] shows of the certificates that it holds.
var (
	certificatesDesc = prometheus.NewDesc("istio_ca_certificates",
		"The number of certificates that are held, by state; pending ones have no answer yet (unstable)", []string{"provider", "state"}, nil)
	expiryDesc = prometheus.NewDesc("istio_ca_soonest_expiry_timestamp_seconds",
		"When the first of the certificates that are held expires, in seconds since 1970 (unstable)", []string{"provider"}, nil)
)

// Describe implements prometheus.Collector.
func (m *Manager) Describe(ch chan<- *prometheus.Desc) {
	ch <- certificatesDesc
	ch <- expiryDesc
}

// Collect implements prometheus.Collector. It shows listed providers and those
// that still hold a certificate.
func (m *Manager) Collect(ch chan<- prometheus.Metric) {
	type held struct {
		states  [Withdrawn + 1]int
		soonest time.Time
	}
	byProvider := make(map[string]*held)
	m.mu.Lock()
	for p := range m.providers {
		byProvider[p.Name()] = new(held)
	}
	for _, h := range m.holds {
		name := h.key.key.Provider
		p := byProvider[name]
		if p == nil {
			p = new(held)
			byProvider[name] = p
		}
		p.states[h.all.view.state]++
		if svid := h.all.view.svid; svid != nil && (p.soonest.IsZero() || svid.NotAfter.Before(p.soonest)) {
			p.soonest = svid.NotAfter
		}
	}
	m.mu.Unlock()
	for name, p := range byProvider {
		for s, n := range p.states {
			ch <- prometheus.MustNewConstMetric(certificatesDesc, prometheus.GaugeValue, float64(n), name, stateLabel(State(s)))
		}
		if !p.soonest.IsZero() {
			ch <- prometheus.MustNewConstMetric(expiryDesc, prometheus.GaugeValue, float64(p.soonest.Unix()), name)
		}
	}
}

func stateLabel(s State) string {
	return [...]string{Pending: "pending", Available: "available", Unavailable: "unavailable", Withdrawn: "withdrawn"}[s]
}
