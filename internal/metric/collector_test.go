package metric

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

func expose(t testing.TB, cs ...prometheus.Collector) string {
	t.Helper()
	reg := prometheus.NewPedanticRegistry()
	for _, c := range cs {
		if err := reg.Register(c); err != nil {
			t.Fatal(err)
		}
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	for _, f := range families {
		if _, err := expfmt.MetricFamilyToOpenMetrics(&out, f); err != nil {
			t.Fatal(err)
		}
	}
	return out.String()
}

func TestExposition(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tcp := newTCP(SetOpts{Labels: []string{"reporter", "flags"}, Max: 2})
		r := tcp.With([]string{"source", "-"})
		defer r.Release()
		r.Series(opened).Inc()
		r.Series(received).Value() // shows at 0; failed does not show
		tcp.With([]string{"idle", ""}).Release()
		lost := tcp.With([]string{"a", "b"})
		lost.Series(opened).Add(3)
		lost.Release()
		gauges := NewGauges(Opts{Name: "istio_tcp_sockets_open", Help: "Open sockets (unstable).", Labels: []string{"reporter"}})
		gauges.With("source").Add(-2)
		counters := NewCounters(Opts{Name: "quoted", Help: "Q.", Labels: []string{"x"}})
		counters.Inc("a\"b\\c\nd")
		counters.Inc("\xff")
		empty := NewCounters(Opts{Name: "empty", Help: "E."})
		want := `# HELP istio_metric_series_dropped Recordings that went to the overflow series because a family reached its bound (unstable).
# TYPE istio_metric_series_dropped counter
istio_metric_series_dropped_total{family="istio_tcp_connections_opened"} 1.0
# HELP istio_tcp_connections_opened Opened.
# TYPE istio_tcp_connections_opened counter
istio_tcp_connections_opened_total{flags="-",reporter="source"} 1.0
istio_tcp_connections_opened_total{flags="overflow",reporter="overflow"} 3.0
# HELP istio_tcp_received_bytes Received.
# TYPE istio_tcp_received_bytes counter
istio_tcp_received_bytes_total{flags="-",reporter="source"} 0.0
# HELP istio_tcp_sockets_open Open sockets (unstable).
# TYPE istio_tcp_sockets_open gauge
istio_tcp_sockets_open{reporter="source"} -2.0
# HELP quoted Q.
# TYPE quoted counter
quoted_total{x="a\"b\\c\nd"} 1.0
quoted_total{x="�"} 1.0
`
		if diff := cmp.Diff(want, expose(t, tcp, gauges, counters, empty)); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		advance(DefaultIdle)
		r.Series(failed).Inc()
		counters.Inc("new")
		want = `# HELP istio_tcp_connections_failed Failed (unstable).
# TYPE istio_tcp_connections_failed counter
istio_tcp_connections_failed_total{flags="-",reporter="source"} 1.0
`
		if got := expose(t, tcp); !strings.Contains(got, want) {
			t.Errorf("after the first failure: got\n%swant it to have\n%s", got, want)
		}
		want = `# HELP quoted Q.
# TYPE quoted counter
quoted_total{x="new"} 1.0
`
		if diff := cmp.Diff(want, expose(t, counters)); diff != "" {
			t.Errorf("after the idle time (-want +got):\n%s", diff)
		}
	})
}

// F16: every label value has an exposition that can be read back.
func FuzzLabels(f *testing.F) {
	for _, s := range []string{"", "a", "\"", "\\", "\n", "\xff", "a\x00b", "\u2028", "overflow"} {
		f.Add(s, "other")
	}
	f.Fuzz(func(t *testing.T, a, b string) {
		c := NewCounters(Opts{Name: "c", Help: "C.", Labels: []string{"l"}})
		c.Inc(a)
		c.Inc(b)
		out := expose(t, c)
		parser := expfmt.NewTextParser(model.UTF8Validation)
		families, err := parser.TextToMetricFamilies(strings.NewReader(out))
		if err != nil {
			t.Fatalf("%q, %q became %q: %v", a, b, out, err)
		}
		total := 0.0
		for _, m := range families["c_total"].GetMetric() {
			total += m.GetUntyped().GetValue()
		}
		if total != 2 {
			t.Errorf("%q, %q became %q", a, b, out)
		}
	})
}

func BenchmarkScrape(b *testing.B) {
	names, values := tLabels()
	s := newTCP(SetOpts{Labels: names})
	reg := prometheus.NewRegistry()
	reg.MustRegister(s)
	for i := range 3000 {
		values[3] = fmt.Sprint(i)
		r := s.With(values)
		for f := range r.series {
			r.Series(f).Inc()
		}
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := reg.Gather(); err != nil {
			b.Fatal(err)
		}
	}
}
