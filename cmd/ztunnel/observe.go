package main

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/ztunnel-go/ztunnel/internal/zlog"
	"github.com/ztunnel-go/ztunnel/proxy/hbone"
)

// registerLog shows the lines that the log's output did not take.
func registerLog(registry *prometheus.Registry, log *zlog.Log) {
	registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name: "istio_log_lines_dropped_total", Help: "The number of log lines that could not be written (unstable)",
	}, func() float64 { return float64(log.Dropped()) }))
}

// countTolerated shows the certificates that only compatible mode accepts.
func countTolerated(registry *prometheus.Registry) func(rule string) {
	tolerated := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "istio_svid_compatible_accept_total", Help: "The number of peer certificates accepted although they break a SPIFFE rule (unstable)",
	}, []string{"rule"})
	registry.MustRegister(tolerated)
	return func(rule string) { tolerated.WithLabelValues(rule).Inc() }
}

// watchTunnels adds to the configuration of the tunnels what they share in this
// process: the budget, the counters and the log.
func (n *node) watchTunnels(c *hbone.Config, registry *prometheus.Registry) {
	c.Stats, c.Logger = new(hbone.Stats), n.slog.With("component", "proxy::hbone")
	if limit := queueLimit(n.cfg); limit > 0 {
		c.Budget = hbone.NewBudget(limit)
	}
	registerStats(registry, c.Stats, c.Budget)
}

// registerStats shows what the tunnels count.
func registerStats(registry *prometheus.Registry, s *hbone.Stats, b *hbone.Budget) {
	counter := func(name, help string, read func() uint64) {
		registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name + "_total", Help: help + " (unstable)"},
			func() float64 { return float64(read()) }))
	}
	counter("istio_hbone_panics", "The number of panics that ended one tunnel or stream only", s.Panics.Load)
	counter("istio_hbone_floods", "The number of tunnels ended because the peer exceeded a limit on abuse", s.Floods.Load)
	counter("istio_hbone_budget_resets", "The number of streams reset because the bytes queued for slow applications reached the limit", s.BudgetResets.Load)
	counter("istio_hbone_budget_refusals", "The number of requests refused because the bytes queued for slow applications came near the limit", s.BudgetRefused.Load)
	counter("istio_hbone_refused_streams", "The number of requests answered REFUSED_STREAM", s.Refused.Load)
	counter("istio_hbone_ping_timeouts", "The number of tunnels ended because the peer did not answer a ping", s.PingTimeouts.Load)
	registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "istio_hbone_queued_bytes", Help: "The bytes queued for slow applications (unstable)",
	}, func() float64 { return float64(b.Used()) }))
}
