package xds

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics tell of the connection to the control plane and of what it sent. A nil
// *Metrics counts nothing. All methods are safe for concurrent use.
type Metrics struct {
	terminations *prometheus.CounterVec
	messages     *prometheus.CounterVec
	bytes        *prometheus.CounterVec
	demands      *prometheus.CounterVec
	connected    prometheus.Gauge
	pending      prometheus.Gauge
	updated      *prometheus.GaugeVec
	resources    *prometheus.GaugeVec
	rejected     *prometheus.GaugeVec
	stale        *prometheus.GaugeVec
}

// NewMetrics registers the families (spec/state-xds-dns.md §3.9, and ours). It
// panics when r already has them, as prometheus.Registerer.MustRegister does.
func NewMetrics(r prometheus.Registerer) *Metrics {
	counter := func(name, help, label string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "istio_xds_" + name, Help: help + " (unstable)"}, []string{label})
	}
	gauge := func(name, help string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "istio_xds_" + name, Help: help + " (unstable)"}, []string{"url"})
	}
	m := &Metrics{
		terminations: counter("connection_terminations_total", "The total number of completed connections to the xDS server", "reason"),
		messages:     counter("message_total", "The total number of messages received from the xDS server", "url"),
		bytes:        counter("message_bytes_total", "The total number of payload bytes received from the xDS server", "url"),
		demands:      counter("on_demand_total", "The total number of resources that were asked for on demand, by outcome", "outcome"),
		connected: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "istio_xds_connected", Help: "Whether there is a stream to the xDS server (unstable)",
		}),
		pending: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "istio_xds_on_demand_pending", Help: "The number of resources that were asked for on demand and have not been answered (unstable)",
		}),
		updated:   gauge("last_update_timestamp_seconds", "The time of the last message received from the xDS server"),
		resources: gauge("resources", "The number of resources that were accepted from the xDS server and not removed since"),
		rejected:  gauge("rejected_resources", "The number of resources of which the latest version was rejected"),
		stale:     gauge("stale_resources", "The number of resources that the xDS server did not name after a reconnect, and that are removed soon"),
	}
	r.MustRegister(m.terminations, m.messages, m.bytes, m.demands, m.connected, m.pending, m.updated, m.resources, m.rejected, m.stale)
	return m
}

func (m *Metrics) terminated(r reason) {
	if m != nil {
		m.terminations.WithLabelValues(string(r)).Inc()
	}
}

func (m *Metrics) setConnected(yes bool) {
	if m == nil {
		return
	}
	v := 0.0
	if yes {
		v = 1
	}
	m.connected.Set(v)
}

// received counts a message of a type, unknownType for those that are none of
// ours: the server must not be able to make series.
func (m *Metrics) received(url string, bytes int, now time.Time) {
	if m == nil {
		return
	}
	m.messages.WithLabelValues(url).Inc()
	m.bytes.WithLabelValues(url).Add(float64(bytes))
	m.updated.WithLabelValues(url).Set(float64(now.UnixMilli()) / 1e3)
}

// holds tells the sizes of one type.
func (m *Metrics) holds(url string, resources, rejected, stale int) {
	if m == nil {
		return
	}
	m.resources.WithLabelValues(url).Set(float64(resources))
	m.rejected.WithLabelValues(url).Set(float64(rejected))
	m.stale.WithLabelValues(url).Set(float64(stale))
}

func (m *Metrics) demanded(outcome string) {
	if m != nil {
		m.demands.WithLabelValues(outcome).Inc()
	}
}

func (m *Metrics) waiting(n int) {
	if m != nil {
		m.pending.Set(float64(n))
	}
}
