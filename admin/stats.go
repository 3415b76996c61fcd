package admin

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
)

const (
	openMetrics     = "application/openmetrics-text"
	openMetricsType = openMetrics + ";charset=utf-8;version=1.0.0"
	plainType       = "text/plain; charset=utf-8"
	// maxScrapes bounds the memory that the expositions under way take. Clients
	// that share one count once.
	maxScrapes = 4
)

// NewRegistry returns a registry with what describes the process: istio_build,
// the Go runtime and process_*. tag is ISTIO_META_ISTIO_VERSION; "" becomes
// "unknown".
func NewRegistry(tag string) (*prometheus.Registry, error) {
	if tag == "" {
		tag = "unknown"
	}
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "istio_build", Help: "Istio component build info.",
		ConstLabels: prometheus.Labels{"component": "ztunnel", "tag": tag},
	})
	build.Set(1)
	runtime, err := without(collectors.NewGoCollector(), "go_memstats_alloc_bytes_total")
	if err != nil {
		return nil, err
	}
	reg := prometheus.NewRegistry()
	for _, c := range []prometheus.Collector{
		build, runtime, collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("register the process metrics: %w", err)
		}
	}
	return reg, nil
}

// filtered is a collector without one of its metrics.
type filtered struct {
	prometheus.Collector
	left *prometheus.Desc
}

// without leaves the metric called name out of c. In OpenMetrics the suffix _total
// is no part of a family's name, so that a counter and a gauge may collide.
func without(c prometheus.Collector, name string) (prometheus.Collector, error) {
	descs := make(chan *prometheus.Desc)
	go func() {
		defer close(descs)
		c.Describe(descs)
	}()
	f := filtered{Collector: c}
	for d := range descs {
		if strings.Contains(d.String(), fmt.Sprintf("fqName: %q,", name)) {
			f.left = d
		}
	}
	if f.left == nil {
		return nil, fmt.Errorf("register the process metrics: there is no %s to leave out", name)
	}
	return f, nil
}

// Collect implements [prometheus.Collector].
func (f filtered) Collect(ch chan<- prometheus.Metric) {
	all := make(chan prometheus.Metric)
	go func() {
		defer close(all)
		f.Collector.Collect(all)
	}()
	for m := range all {
		if m.Desc() != f.left {
			ch <- m
		}
	}
}

// NewStats returns the server of /metrics and /stats/prometheus. The body is
// always OpenMetrics 1.0; only its Content-Type follows the Accept header. drain
// is as in Config.
func NewStats(g prometheus.Gatherer, drain time.Duration, log *slog.Logger) *Server {
	s := &stats{gatherer: g, log: orDiscard(log).With("component", "stats"), joinable: make(map[string]*scrape)}
	return newServer("stats", prompt(routes{"/metrics": s.serve, "/stats/prometheus": s.serve}), drain, log)
}

type stats struct {
	gatherer prometheus.Gatherer
	log      *slog.Logger
	size     atomic.Int64 // of the last exposition

	mu       sync.Mutex         // guards what follows
	joinable map[string]*scrape // by coding: those that are being rendered
	live     int                // scrapes with users
}

// scrape is one rendered body and all who asked for it while it was made.
type scrape struct {
	users int           // guarded by stats.mu
	done  chan struct{} // closed when what follows is set
	body  []byte
	plain bool // the body is not compressed, as it is too short
	err   error
}

func (s *stats) serve(w http.ResponseWriter, r *http.Request) {
	coding, ok := negotiate(r.Header.Values("Accept-Encoding"))
	if !ok {
		w.WriteHeader(http.StatusNotAcceptable)
		return
	}
	sc, first := s.join(coding)
	if sc == nil {
		text(w, http.StatusServiceUnavailable, fmt.Sprintf("%d scrapes are under way already\n", maxScrapes))
		return
	}
	defer s.leave(sc)
	if first {
		s.run(sc, coding)
	}
	<-sc.done // rendering does not wait for anyone
	expectRead(w)
	if sc.err != nil {
		text(w, http.StatusInternalServerError, sc.err.Error())
		return
	}
	h := w.Header()
	if coding != identity && !sc.plain {
		h.Set("Content-Encoding", coding)
		h.Set("Vary", "accept-encoding")
	}
	h.Set("Content-Type", contentType(r.Header.Values("Accept")))
	_, _ = w.Write(sc.body)
}

// join returns the scrape under way, or a new one, which the caller must run. It
// returns nil if there are too many. Who gets one must leave it.
func (s *stats) join(coding string) (sc *scrape, first bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if sc := s.joinable[coding]; sc != nil {
		sc.users++
		return sc, false
	}
	if s.live == maxScrapes {
		return nil, false
	}
	s.live++
	sc = &scrape{users: 1, done: make(chan struct{})}
	s.joinable[coding] = sc
	return sc, true
}

func (s *stats) leave(sc *scrape) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if sc.users--; sc.users == 0 {
		s.live--
	}
}

// run renders sc. Requests that come later get another one, with newer values.
func (s *stats) run(sc *scrape, coding string) {
	sc.err = errors.New("gather metrics: a collector panicked") // unless replaced below
	defer func() {
		s.mu.Lock()
		delete(s.joinable, coding)
		s.mu.Unlock()
		close(sc.done)
	}()
	body, err := s.exposition()
	sc.plain = coding == identity || len(body) < minCompressed
	if err == nil && !sc.plain {
		body, err = compress(coding, body)
	}
	sc.body, sc.err = body, err
}

// exposition renders all families that have series. A collector that fails
// costs its own families and not all the others.
func (s *stats) exposition() ([]byte, error) {
	families, err := s.gatherer.Gather()
	if err != nil {
		if len(families) == 0 {
			return nil, fmt.Errorf("gather metrics: %w", err)
		}
		s.log.Warn("some metrics are missing", "error", err)
	}
	var b bytes.Buffer
	b.Grow(int(s.size.Load()))
	for _, f := range families {
		if len(f.GetMetric()) == 0 {
			continue
		}
		if _, err := expfmt.MetricFamilyToOpenMetrics(&b, f); err != nil {
			return nil, fmt.Errorf("encode metric %s: %w", f.GetName(), err)
		}
	}
	if _, err := expfmt.FinalizeOpenMetrics(&b); err != nil {
		return nil, fmt.Errorf("encode metrics: %w", err)
	}
	s.size.Store(int64(b.Len()))
	return b.Bytes(), nil
}

// contentType tells a client that lists OpenMetrics what it gets, and everybody
// else that it is text.
func contentType(accept []string) string {
	for _, header := range accept {
		for element := range strings.SplitSeq(header, ",") {
			media, _, _ := strings.Cut(element, ";")
			if strings.EqualFold(strings.TrimSpace(media), openMetrics) {
				return openMetricsType
			}
		}
	}
	return plainType
}

// stableMetrics are those whose names and labels users may rely on.
var stableMetrics = []string{
	"istio_build",
	"istio_tcp_connections_opened", "istio_tcp_connections_closed",
	"istio_tcp_received_bytes", "istio_tcp_sent_bytes",
}

// CheckHelp reports every family whose help text breaks the rule: it has the
// word "unstable" unless the metric is one of the stable ones. Families of the
// client library (go_*, process_*, promhttp_*) are exempt. It also reports those
// that have one name in OpenMetrics, and counters whose name does not end in
// _total: OpenMetrics 1.0 would know neither their type nor that name.
func CheckHelp(g prometheus.Gatherer) error {
	families, err := g.Gather()
	errs := []error{err}
	seen := make(map[string]bool)
	for _, f := range families {
		name := strings.TrimSuffix(f.GetName(), "_total")
		if seen[name] {
			errs = append(errs, fmt.Errorf("there are two metric families %s", name))
		}
		seen[name] = true
		if strings.HasPrefix(name, "go_") || strings.HasPrefix(name, "process_") || strings.HasPrefix(name, "promhttp_") {
			continue
		}
		if f.GetType() == dto.MetricType_COUNTER && !strings.HasSuffix(f.GetName(), "_total") {
			errs = append(errs, fmt.Errorf("the name of counter %s does not end in _total", f.GetName()))
		}
		stable, unstable := slices.Contains(stableMetrics, name), strings.Contains(f.GetHelp(), "unstable")
		if stable == unstable {
			errs = append(errs, fmt.Errorf("metric %s is stable: %t, but its help text is %q", name, stable, f.GetHelp()))
		}
	}
	return errors.Join(errs...)
}
