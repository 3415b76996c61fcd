package dns

import (
	"strings"
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/ztunnel-go/ztunnel/internal/metric"
	"github.com/ztunnel-go/ztunnel/state"
)

// Metrics are the counters of the DNS proxy (spec/state-xds-dns.md §5.6). All
// servers of the process share one. Safe for concurrent use.
type Metrics struct {
	requests         *metric.Counters
	forwards, failed *metric.Counters
	duration         *metric.Histograms
}

// labelNames are those of all families.
var labelNames = []string{"request_query_type", "request_protocol", "source_canonical_service", "source_canonical_revision"}

// NewMetrics makes the families and registers them.
func NewMetrics(r prometheus.Registerer) *Metrics {
	counters := func(name, help string) *metric.Counters {
		return metric.NewCounters(metric.Opts{Name: name, Help: help, Labels: labelNames})
	}
	m := &Metrics{
		requests: counters("istio_dns_requests", "The number of DNS queries (unstable)"),
		forwards: counters("istio_dns_upstream_requests", "The number of DNS queries that were passed on to a nameserver (unstable)"),
		failed:   counters("istio_dns_upstream_failures", "The number of DNS queries that were passed on and got no answer, an error, or no records (unstable)"),
		duration: metric.NewHistograms(metric.Opts{
			Name: "istio_dns_upstream_request_duration_seconds", Help: "The time until a nameserver had answered (unstable)", Labels: labelNames,
		}, .0005, .001, .01, .1, 1, 5),
	}
	r.MustRegister(m.requests, m.forwards, m.failed, m.duration)
	return m
}

// labels are the values of labelNames. Empty ones become unknown.
func (q *query) labels(source *state.Workload) [4]string {
	l := [4]string{queryType(q.qtype), string(q.proto)}
	if source != nil {
		l[2], l[3] = source.CanonicalName, source.CanonicalRevision
	}
	return l
}

func (m *Metrics) asked(q *query, source *state.Workload) {
	l := q.labels(source)
	m.requests.Inc(l[:]...)
}

func (m *Metrics) forwarded(q *query, source *state.Workload, took time.Duration, failed bool) {
	l := q.labels(source)
	m.forwards.Inc(l[:]...)
	m.duration.Observe(took, l[:]...)
	if failed {
		m.failed.Inc(l[:]...)
	}
}

// queryType is the name of a type in lower case. Those without a name share one:
// their number is the client's choice.
func queryType(t uint16) string {
	switch t {
	case dns.TypeA:
		return "a"
	case dns.TypeAAAA:
		return "aaaa"
	}
	return strings.ToLower(dns.TypeToString[t])
}
