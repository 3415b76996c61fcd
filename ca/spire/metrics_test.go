package spire

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest/spireagent"
)

// TestOutcomes: a stream is one request, whose outcome is that of its first
// message; wherever in it something is wrong.
func TestOutcomes(t *testing.T) {
	for outcome, fail := range map[string]func(*spireagent.Agent){
		"ok": func(*spireagent.Agent) {},
		"rejected": func(a *spireagent.Agent) {
			a.SetTamper(spireagent.Tamper{SVIDs: func(m *svids) { m.X509Svids[0].X509SvidKey = []byte("no key") }})
		},
		"denied":  func(a *spireagent.Agent) { a.SetDelegate(spireagent.WithoutEntry) },
		"timeout": func(a *spireagent.Agent) { a.Hang(true) },
		"error":   func(a *spireagent.Agent) { a.SetDelegate(spireagent.AttestationOff) },
	} {
		t.Run(outcome, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				registry := prometheus.NewRegistry()
				agent := spireagent.New(t, spireagent.Config{})
				agent.AddEntry(webEntry)
				fail(agent)
				p, err := NewDelegated(DelegatedConfig{Common: Common{Dial: agent.Dial, Metrics: ca.NewMetrics(registry).Provider("p")}})
				if err != nil {
					t.Fatal(err)
				}
				// Without Run there is no stream of bundles, which would count, too.
				background(t, func(ctx context.Context) { _ = p.(*delegated).link.run(ctx) })
				watch(t, p, web)
				pass(11 * time.Second)
				for got, n := range requests(t, registry) {
					if (n > 0) != (got == outcome) {
						t.Errorf("%v requests are %s", n, got)
					}
				}
			})
		})
	}
}

// requests are those that were counted, by outcome.
func requests(t *testing.T, g prometheus.Gatherer) map[string]float64 {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	counts := make(map[string]float64)
	for _, f := range families {
		if f.GetName() != "istio_ca_requests_total" {
			continue
		}
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if l.GetName() == "outcome" {
					counts[l.GetValue()] = m.GetCounter().GetValue()
				}
			}
		}
	}
	if len(counts) == 0 {
		t.Fatal("nothing is counted")
	}
	return counts
}
