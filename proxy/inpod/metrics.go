package inpod

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics tell of the pods of a node and of the connection to its agent
// (spec/identity-admin-inpod.md §7.10, and ours). They are those of one Manager.
// Safe for concurrent use.
type Metrics struct {
	started, stopped prometheus.Counter
	connected        prometheus.Gauge
	answers          prometheus.Histogram
	nacks            *prometheus.CounterVec
	panics           prometheus.Counter
	pods             *podGauges
}

// NewMetrics makes the families and registers them. It panics when r already has
// them, as prometheus.Registerer.MustRegister does. r may be nil.
func NewMetrics(r prometheus.Registerer) *Metrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: "workload_manager_" + name + "_total", Help: help + " (unstable)"})
	}
	m := &Metrics{
		started: counter("proxies_started", "The total number of proxies of pods that were started"),
		stopped: counter("proxies_stopped", "The total number of proxies of pods that have ended"),
		connected: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "workload_manager_zds_connected", Help: "Whether there is a connection to the node agent (unstable)",
		}),
		answers: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "workload_manager_zds_answer_duration_seconds", Help: "The time from a message of the node agent to the answer (unstable)",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1},
		}),
		nacks: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "workload_manager_zds_nacks_total", Help: "The total number of messages of the node agent that were refused, by what failed (unstable)",
		}, []string{"reason"}),
		panics: counter("panics", "The total number of panics that ended one start of a proxy or one connection to the node agent only"),
		pods:   newPodGauges(),
	}
	if r != nil {
		r.MustRegister(m.started, m.stopped, m.connected, m.answers, m.nacks, m.panics, m.pods)
	}
	return m
}

// podGauges counts the pods when somebody looks: they change oftener.
type podGauges struct {
	manager               atomic.Pointer[Manager] // nil: there are no pods
	active, pending, pods *prometheus.Desc
}

var _ prometheus.Collector = (*podGauges)(nil)

func newPodGauges() *podGauges {
	gauge := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("workload_manager_"+name, help+" (unstable)", labels, nil)
	}
	return &podGauges{
		active:  gauge("active_proxy_count", "The number of pods whose proxy runs"),
		pending: gauge("pending_proxy_count", "The number of pods whose proxy has failed and is to be started again"),
		pods:    gauge("pods", "The number of pods by the state that they are in", "state"),
	}
}

// Describe implements [prometheus.Collector].
func (g *podGauges) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{g.active, g.pending, g.pods} {
		ch <- d
	}
}

// Collect implements [prometheus.Collector].
func (g *podGauges) Collect(ch chan<- prometheus.Metric) {
	var c counts
	if m := g.manager.Load(); m != nil {
		c = m.count()
	}
	gauge := func(d *prometheus.Desc, n int, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(n), labels...)
	}
	gauge(g.active, c.active)
	gauge(g.pending, c.pending)
	for _, s := range states {
		gauge(g.pods, c.states[s], string(s))
	}
}

// counts are numbers of pods.
type counts struct {
	active, pending int // their proxy runs; it has failed
	states          map[State]int
}

func (m *Manager) count() counts {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := counts{states: map[State]int{}}
	for _, p := range m.pods {
		switch p.state {
		case Active:
			c.active++
		case Failed:
			c.pending++
		}
		c.states[p.status().State]++
	}
	for p := range m.ending {
		c.states[p.state]++
	}
	return c
}
