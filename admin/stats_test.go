package admin

import (
	"bytes"
	"compress/gzip"
	"compress/zlib"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/andybalholm/brotli"
	"github.com/klauspost/compress/zstd"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/ztunnel-go/ztunnel/internal/metric"
)

// X-05, AD-05.
func TestID_AD05_ContentType(t *testing.T) {
	s := NewStats(prometheus.NewRegistry(), 0, nil)
	tests := []struct {
		accept []string
		want   string
	}{
		{nil, plainType},
		{[]string{"application/json"}, plainType},
		{[]string{"*/*"}, plainType},
		{[]string{"application/openmetrics-text"}, openMetricsType},
		{[]string{"application/OpenMetrics-text ; version=1.0.0"}, openMetricsType},
		{[]string{"text/plain", "application/openmetrics-text;version=0.0.1"}, openMetricsType},
		{[]string{"application/vnd.google.protobuf;proto=x;encoding=delimited;q=0.6, application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.1"}, openMetricsType},
		{[]string{"application/openmetrics-textual, x/application/openmetrics-text"}, plainType},
	}
	for _, tt := range tests {
		var header []string
		for _, a := range tt.accept {
			header = append(header, "Accept", a)
		}
		resp := do(s, "GET", "/metrics", header...)
		if got := resp.Header.Get("Content-Type"); got != tt.want {
			t.Errorf("Accept %q: got %q, want %q", tt.accept, got, tt.want)
		}
		if got := body(t, resp); got != "# EOF\n" {
			t.Errorf("Accept %q: got body %q, want the empty exposition", tt.accept, got)
		}
	}
}

func testRegistry(t *testing.T) *prometheus.Registry {
	t.Helper()
	reg := prometheus.NewRegistry()
	tcp := metric.NewSet(metric.SetOpts{Labels: []string{"reporter", "source_workload"}},
		metric.Family{Name: "istio_tcp_connections_opened", Help: "The total number of TCP connections opened."},
		metric.Family{Name: "istio_tcp_connections_failed", Help: "The total number of TCP connections failed (unstable)."})
	row := tcp.With([]string{"source", ""})
	t.Cleanup(row.Release)
	row.Series(0).Inc()
	h := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "istio_dns_upstream_request_duration_seconds", Help: "Latency (unstable).", Buckets: []float64{.001, 1}}, []string{"source"})
	h.WithLabelValues("a").Observe(.5)
	for _, c := range []prometheus.Collector{tcp, h} {
		if err := reg.Register(c); err != nil {
			t.Fatal(err)
		}
	}
	return reg
}

func TestDP_14_1_Exposition(t *testing.T) {
	s := NewStats(testRegistry(t), 0, nil)
	golden(t, "metrics.golden", body(t, do(s, "GET", "/metrics")))
	for _, tt := range []struct {
		method, path string
		status       int
	}{{"GET", "/stats/prometheus", 200}, {"POST", "/metrics", 200}, {"GET", "/metrics/", 404}, {"GET", "/", 404}} {
		if resp := do(s, tt.method, tt.path); resp.StatusCode != tt.status {
			t.Errorf("%s %s: got %d, want %d", tt.method, tt.path, resp.StatusCode, tt.status)
		}
	}
}

func TestDP_14_6_Compression(t *testing.T) {
	s := NewStats(testRegistry(t), 0, nil)
	plain := body(t, do(s, "GET", "/metrics"))
	readers := map[string]func(io.Reader) (io.Reader, error){
		"gzip":    func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) },
		"deflate": func(r io.Reader) (io.Reader, error) { return zlib.NewReader(r) },
		"br":      func(r io.Reader) (io.Reader, error) { return brotli.NewReader(r), nil },
		"zstd": func(r io.Reader) (io.Reader, error) {
			dec, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1))
			if err != nil {
				return nil, err
			}
			t.Cleanup(dec.Close)
			return dec, nil
		},
	}
	for coding, reader := range readers {
		resp := do(s, "GET", "/metrics", "Accept-Encoding", coding)
		if resp.Header.Get("Content-Encoding") != coding || resp.Header.Get("Vary") != "accept-encoding" {
			t.Errorf("%s: got header %v", coding, resp.Header)
		}
		r, err := reader(resp.Body)
		if err != nil {
			t.Fatalf("%s: %v", coding, err)
		}
		got, err := io.ReadAll(r)
		if err != nil {
			t.Fatalf("%s: %v", coding, err)
		}
		if len(got) != len(plain) || string(got) != plain {
			t.Errorf("%s: got %d bytes, want the %d of identity", coding, len(got), len(plain))
		}
	}
	if resp := do(NewStats(prometheus.NewRegistry(), 0, nil), "GET", "/metrics", "Accept-Encoding", "gzip"); resp.Header.Get("Content-Encoding") != "" {
		t.Error("a body below 32 bytes was compressed")
	}
	if _, err := compress("lzw", nil); err == nil {
		t.Error("unknown coding: got no error")
	}
}

func TestDP_14_6_Negotiation(t *testing.T) {
	tests := []struct {
		accept string
		want   string // "" for 406
	}{
		{"", "identity"},
		{"gzip", "gzip"},
		{"x-gzip", "gzip"},
		{"GZIP", "gzip"},
		{"gzip, deflate, br, zstd", "zstd"},
		{"gzip, deflate, br", "br"},
		{"deflate, gzip", "gzip"},
		{"gzip;q=0.9, deflate;q=1.0", "deflate"},
		{"gzip;q=0.5,br;q=0.5", "br"},
		{"*", "zstd"},
		{"zstd;q=0, *", "br"},
		{"compress", "identity"},
		{"gzip;q=0", "identity"},
		{"gzip;q=0.5, identity", "identity"},
		{"identity;q=0.2, gzip;q=0.1", "identity"},
		{"identity;q=0", ""},
		{"*;q=0", ""},
		{"*;q=0, identity;q=0.1", "identity"},
		{"identity;q=0, gzip", "gzip"},
		{"compress, *;q=0", ""},
		{"gzip;q=x", "identity"},
		{"gzip;q=NaN", "identity"},
		{"gzip ; Q=0.3", "gzip"},
	}
	s := NewStats(testRegistry(t), 0, nil)
	for _, tt := range tests {
		resp := do(s, "GET", "/metrics", "Accept-Encoding", tt.accept)
		got := resp.Header.Get("Content-Encoding")
		if got == "" && resp.StatusCode == 200 {
			got = "identity"
		}
		if got != tt.want || tt.want == "" && resp.StatusCode != http.StatusNotAcceptable {
			t.Errorf("Accept-Encoding %q: got %q with status %d, want %q", tt.accept, got, resp.StatusCode, tt.want)
		}
	}
}

// AD-06, D-17.
func TestID_AD06_StatsExist(t *testing.T) {
	reg, err := NewRegistry("1.31.0")
	if err != nil {
		t.Fatal(err)
	}
	got := body(t, do(NewStats(reg, 0, nil), "GET", "/stats/prometheus"))
	for _, want := range []string{
		"istio_build{component=\"ztunnel\",tag=\"1.31.0\"} 1.0\n",
		"# TYPE process_open_fds gauge\n", "# TYPE process_max_fds gauge\n", "process_resident_memory_bytes ", "process_cpu_seconds_total ",
		"go_goroutines ", "go_memstats_alloc_bytes ", "go_memstats_heap_alloc_bytes ", "go_memstats_heap_inuse_bytes ", "go_memstats_heap_sys_bytes ", "go_memstats_stack_inuse_bytes ",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("the exposition lacks %q", want)
		}
	}
	families := make(map[string]bool)
	for line := range strings.Lines(got) {
		f := strings.Fields(line)
		if len(f) < 4 || f[0] != "#" || f[1] != "TYPE" {
			continue
		}
		if families[f[2]] {
			t.Errorf("the family %s stands there twice", f[2])
		}
		families[f[2]] = true
	}
	if strings.Contains(got, "_created") || !strings.HasSuffix(got, "\n# EOF\n") {
		t.Error("the exposition has _created samples or no end")
	}
	if err := CheckHelp(reg); err != nil {
		t.Error(err)
	}
	if reg, err = NewRegistry(""); err != nil || !strings.Contains(body(t, do(NewStats(reg, 0, nil), "GET", "/metrics")), `tag="unknown"`) {
		t.Errorf("without a tag: %v", err)
	}
}

func TestCheckHelp(t *testing.T) {
	if err := CheckHelp(testRegistry(t)); err != nil {
		t.Error(err)
	}
	for name, help := range map[string]string{
		"istio_new_total":                    "Something new.",
		"istio_tcp_connections_opened_total": "Opened (unstable).",
	} {
		reg := prometheus.NewRegistry()
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
		if err := reg.Register(c); err != nil {
			t.Fatal(err)
		}
		if err := CheckHelp(reg); err == nil || !strings.Contains(err.Error(), strings.TrimSuffix(name, "_total")) {
			t.Errorf("%s with help %q: got %v, want an error", name, help, err)
		}
	}
}

func TestCheckHelpFindsCollisions(t *testing.T) {
	reg := prometheus.NewRegistry()
	for _, c := range []prometheus.Collector{
		prometheus.NewGauge(prometheus.GaugeOpts{Name: "a", Help: "unstable"}),
		prometheus.NewCounter(prometheus.CounterOpts{Name: "a_total", Help: "unstable"}),
	} {
		if err := reg.Register(c); err != nil {
			t.Fatal(err)
		}
	}
	if err := CheckHelp(reg); err == nil || !strings.Contains(err.Error(), "two metric families a") {
		t.Errorf("got %v, want an error about a", err)
	}
	if _, err := without(prometheus.NewGauge(prometheus.GaugeOpts{Name: "a"}), "b"); err == nil {
		t.Error("a metric to leave out that is not there: got no error")
	}
}

func TestGatherErrors(t *testing.T) {
	partly := prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) {
		families, err := testRegistry(t).Gather()
		return families, errors.Join(err, errors.New("one collector failed"))
	})
	if resp := do(NewStats(partly, 0, nil), "GET", "/metrics"); resp.StatusCode != 200 || !strings.Contains(body(t, resp), "connections_opened") {
		t.Errorf("one failed collector: got %d, want the others' metrics", resp.StatusCode)
	}
	failed := prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) { return nil, errors.New("broken") })
	resp := do(NewStats(failed, 0, nil), "GET", "/metrics")
	if got := body(t, resp); resp.StatusCode != 500 || got != "gather metrics: broken" {
		t.Errorf("got %d %q, want 500 with the error", resp.StatusCode, got)
	}
}

func TestConcurrentScrapesAreBounded(t *testing.T) {
	begun, finish := make(chan struct{}), make(chan struct{})
	s := NewStats(prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) {
		begun <- struct{}{}
		<-finish
		return nil, nil
	}), 0, nil)
	done := make(chan int)
	for _, coding := range codings[:maxScrapes] {
		go func() { done <- do(s, "GET", "/metrics", "Accept-Encoding", coding).StatusCode }()
		<-begun
	}
	if got := do(s, "GET", "/metrics").StatusCode; got != http.StatusServiceUnavailable {
		t.Errorf("one scrape too many: got %d, want 503", got)
	}
	close(finish)
	for range maxScrapes {
		if got := <-done; got != 200 {
			t.Errorf("got %d, want 200", got)
		}
	}
}

// Those who ask while a body is rendered share it; who comes later does not.
func TestScrapesShareOneBody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gathered := 0
		finish := make(chan struct{})
		families, err := testRegistry(t).Gather()
		if err != nil {
			t.Fatal(err)
		}
		s := NewStats(prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) {
			gathered++
			<-finish
			return families, nil
		}), 0, nil)
		const clients = 3 * maxScrapes
		done := make(chan *http.Response)
		for range clients {
			go func() { done <- do(s, "GET", "/metrics", "Accept-Encoding", "gzip") }()
		}
		synctest.Wait()
		close(finish)
		for range clients {
			resp := <-done
			r, err := gzip.NewReader(resp.Body)
			if err != nil {
				t.Fatalf("status %d: %v", resp.StatusCode, err)
			}
			if got, err := io.ReadAll(r); err != nil || !bytes.HasSuffix(got, []byte("# EOF\n")) {
				t.Errorf("got %q, %v", got, err)
			}
		}
		if gathered != 1 {
			t.Errorf("%d clients at once: gathered %d times, want once", clients, gathered)
		}
		if do(s, "GET", "/metrics"); gathered != 2 {
			t.Errorf("a later client: gathered %d times, want 2", gathered)
		}
	})
}

// A collector that panics costs its scrape and no slot.
func TestPanickingCollector(t *testing.T) {
	s := NewStats(prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) { panic("collector") }), 0, nil)
	for i := range 2 * maxScrapes {
		func() {
			defer func() {
				if p := recover(); p != "collector" {
					t.Errorf("scrape %d: got %v, want the panic", i, p)
				}
			}()
			do(s, "GET", "/metrics")
		}()
	}
}

// Clients that do not read hold the slots of scrapes for promptTimeout only.
func TestSlowScrapersAreCutOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := prometheus.NewRegistry()
		g := prometheus.NewGauge(prometheus.GaugeOpts{Name: "g", Help: strings.Repeat("unstable ", 10_000)})
		if err := reg.Register(g); err != nil {
			t.Fatal(err)
		}
		ln := newPipes()
		stop := serve(t.Context(), NewStats(reg, 0, nil), ln)
		const request = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
		var slow []net.Conn
		for range maxScrapes {
			c := ln.dial(t)
			defer c.Close()
			if _, err := io.WriteString(c, request); err != nil {
				t.Fatal(err)
			}
			slow = append(slow, c)
			synctest.Wait() // it is being written: nobody joins it
		}
		get := func() int {
			c := ln.dial(t)
			defer c.Close()
			resp := roundTrip(t, c, request)
			if _, err := io.Copy(io.Discard, resp.Body); err != nil {
				t.Error(err)
			}
			return resp.StatusCode
		}
		if got := get(); got != http.StatusServiceUnavailable {
			t.Errorf("while %d clients do not read: got %d, want 503", maxScrapes, got)
		}
		<-time.After(promptTimeout)
		synctest.Wait()
		if got := get(); got != 200 {
			t.Errorf("after their time: got %d, want 200", got)
		}
		for _, c := range slow {
			if got, err := io.ReadAll(c); err != nil || bytes.HasSuffix(got, []byte("# EOF\n")) {
				t.Errorf("a client that did not read got %d bytes (%v), want a part of the answer", len(got), err)
			}
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
}

func BenchmarkExposition(b *testing.B) {
	reg := prometheus.NewRegistry()
	labels := make([]string, 27)
	values := make([]string, 27)
	for i := range labels {
		labels[i], values[i] = fmt.Sprintf("label_%02d", i), fmt.Sprintf("some-workload-%d", i)
	}
	c := metric.NewCounters(metric.Opts{Name: "c", Labels: labels})
	if err := reg.Register(c); err != nil {
		b.Fatal(err)
	}
	for i := range 10_000 {
		values[3] = fmt.Sprint(i)
		c.Inc(values...)
	}
	s := &stats{gatherer: reg}
	b.ReportAllocs()
	for b.Loop() {
		if out, err := s.exposition(); err != nil || !bytes.HasSuffix(out, []byte("# EOF\n")) {
			b.Fatal(err)
		}
	}
}
