package admin

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/common/expfmt"
)

const (
	openMetrics     = "application/openmetrics-text"
	openMetricsType = openMetrics + ";charset=utf-8;version=1.0.0"
	plainType       = "text/plain; charset=utf-8"
	// maxScrapes bounds the memory that the expositions under way take.
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
	reg := prometheus.NewRegistry()
	for _, c := range []prometheus.Collector{
		build, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	} {
		if err := reg.Register(c); err != nil {
			return nil, fmt.Errorf("register the process metrics: %w", err)
		}
	}
	return reg, nil
}

// NewStats returns the server of /metrics and /stats/prometheus. The body is
// always OpenMetrics 1.0; only its Content-Type follows the Accept header. drain
// is as in Config.
func NewStats(g prometheus.Gatherer, drain time.Duration, log *slog.Logger) *Server {
	s := &stats{gatherer: g, log: orDiscard(log).With("component", "stats"), slots: make(chan struct{}, maxScrapes)}
	return newServer("stats", routes{"/metrics": s.serve, "/stats/prometheus": s.serve}, drain, log)
}

type stats struct {
	gatherer prometheus.Gatherer
	log      *slog.Logger
	slots    chan struct{}
	size     atomic.Int64 // of the last exposition
}

func (s *stats) serve(w http.ResponseWriter, r *http.Request) {
	coding, ok := negotiate(r.Header.Values("Accept-Encoding"))
	if !ok {
		w.WriteHeader(http.StatusNotAcceptable)
		return
	}
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	default:
		text(w, http.StatusServiceUnavailable, fmt.Sprintf("%d scrapes are under way already\n", maxScrapes))
		return
	}
	body, err := s.exposition()
	if err != nil {
		text(w, http.StatusInternalServerError, err.Error())
		return
	}
	h := w.Header()
	if coding != identity && len(body) >= minCompressed {
		if body, err = compress(coding, body); err != nil {
			text(w, http.StatusInternalServerError, err.Error())
			return
		}
		h.Set("Content-Encoding", coding)
		h.Set("Vary", "accept-encoding")
	}
	h.Set("Content-Type", contentType(r.Header.Values("Accept")))
	_, _ = w.Write(body)
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
// client library (go_*, process_*, promhttp_*) are exempt.
func CheckHelp(g prometheus.Gatherer) error {
	families, err := g.Gather()
	errs := []error{err}
	for _, f := range families {
		name := strings.TrimSuffix(f.GetName(), "_total")
		if strings.HasPrefix(name, "go_") || strings.HasPrefix(name, "process_") || strings.HasPrefix(name, "promhttp_") {
			continue
		}
		stable, unstable := slices.Contains(stableMetrics, name), strings.Contains(f.GetHelp(), "unstable")
		if stable == unstable {
			errs = append(errs, fmt.Errorf("metric %s is stable: %t, but its help text is %q", name, stable, f.GetHelp()))
		}
	}
	return errors.Join(errs...)
}
