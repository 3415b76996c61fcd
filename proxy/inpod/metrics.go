package inpod

import (
	"github.com/prometheus/client_golang/prometheus"
)

// Metrics tell of the pods of a node and of the connection to its agent
// (spec/identity-admin-inpod.md §7.10, and ours). Safe for concurrent use.
type Metrics struct {
	active, pending  prometheus.Gauge
	started, stopped prometheus.Counter
	pods             *prometheus.GaugeVec
	connected        prometheus.Gauge
	answers          prometheus.Histogram
	nacks            *prometheus.CounterVec
	panics           prometheus.Counter
}

// NewMetrics makes the families and registers them. It panics when r already has
// them, as prometheus.Registerer.MustRegister does. r may be nil.
func NewMetrics(r prometheus.Registerer) *Metrics {
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Name: "workload_manager_" + name, Help: help + " (unstable)"})
	}
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: "workload_manager_" + name + "_total", Help: help + " (unstable)"})
	}
	m := &Metrics{
		active:  gauge("active_proxy_count", "The number of pods whose proxy runs"),
		pending: gauge("pending_proxy_count", "The number of pods whose proxy has failed and is to be started again"),
		started: counter("proxies_started", "The total number of proxies of pods that were started"),
		stopped: counter("proxies_stopped", "The total number of proxies of pods that have ended"),
		pods: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "workload_manager_pods", Help: "The number of pods by the state that they are in (unstable)",
		}, []string{"state"}),
		connected: gauge("zds_connected", "Whether there is a connection to the node agent"),
		answers: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "workload_manager_zds_answer_duration_seconds", Help: "The time from a message of the node agent to the answer (unstable)",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1},
		}),
		nacks: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "workload_manager_zds_nacks_total", Help: "The total number of messages of the node agent that were refused, by what failed (unstable)",
		}, []string{"reason"}),
		panics: counter("panics", "The total number of panics that ended one start of a proxy or one connection to the node agent only"),
	}
	for _, s := range states {
		m.pods.WithLabelValues(string(s))
	}
	if r != nil {
		r.MustRegister(m.active, m.pending, m.started, m.stopped, m.pods, m.connected, m.answers, m.nacks, m.panics)
	}
	return m
}
