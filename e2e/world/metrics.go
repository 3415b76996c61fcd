//go:build e2e

package world

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// Metric sums the series of a sample whose labels include want. A sample
// without HELP and TYPE of its family does not count.
func (s *Proxy) Metric(name string, want map[string]string) (float64, error) {
	body, err := s.Pod.Get("http://127.0.0.1:15020/metrics")
	if err != nil {
		return 0, err
	}
	return metricSum(body, name, want)
}

var sampleLine = regexp.MustCompile(`^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)`)
var labelPair = regexp.MustCompile(`([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"`)

func metricSum(body, name string, want map[string]string) (float64, error) {
	family := strings.TrimSuffix(name, "_total")
	for _, meta := range []string{"# HELP ", "# TYPE "} {
		if !strings.Contains(body, "\n"+meta+family+" ") && !strings.HasPrefix(body, meta+family+" ") {
			return 0, fmt.Errorf("no %s%s", meta, family)
		}
	}
	var sum float64
	found := false
lines:
	for line := range strings.Lines(body) {
		m := sampleLine.FindStringSubmatch(line)
		if m == nil || m[1] != name {
			continue
		}
		labels := make(map[string]string)
		for _, pair := range labelPair.FindAllStringSubmatch(m[2], -1) {
			labels[pair[1]] = pair[2]
		}
		for k, v := range want {
			if labels[k] != v {
				continue lines
			}
		}
		v, err := strconv.ParseFloat(m[3], 64)
		if err != nil {
			return 0, fmt.Errorf("sample %q: %w", line, err)
		}
		sum += v
		found = true
	}
	if !found {
		return 0, fmt.Errorf("no sample of %s with %v", name, want)
	}
	return sum, nil
}

// ExpectMetrics waits until the four counters of one connection have the given
// values for a reporter: the check "M" of the row.
func (s *Proxy) ExpectMetrics(ctx context.Context, reporter string, labels map[string]string, received, sent float64) {
	s.t.Helper()
	want := map[string]string{"reporter": reporter}
	for k, v := range labels {
		want[k] = v
	}
	for name, value := range map[string]float64{
		"istio_tcp_connections_opened_total": 1,
		"istio_tcp_connections_closed_total": 1,
		"istio_tcp_received_bytes_total":     received,
		"istio_tcp_sent_bytes_total":         sent,
	} {
		s.ExpectMetric(ctx, name, want, value)
	}
	if err := s.checkCompressed(); err != nil {
		s.t.Errorf("compressed metrics of %s: %v", s.Name, err)
	}
}

// checkCompressed asks for the metrics as Prometheus does.
func (s *Proxy) checkCompressed() error {
	req, err := http.NewRequestWithContext(s.Pod.W.Ctx, http.MethodGet, "http://127.0.0.1:15020/metrics", nil)
	if err != nil {
		return err
	}
	req.Header.Set("Accept-Encoding", "gzip") // set here, it is not undone by the client
	resp, err := s.Pod.Client().Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if got := resp.Header.Get("Content-Encoding"); got != "gzip" {
		return fmt.Errorf("content encoding %q, want gzip", got)
	}
	body, err := gzip.NewReader(resp.Body)
	if err != nil {
		return err
	}
	text, err := io.ReadAll(body)
	if err == nil && !strings.Contains(string(text), "istio_tcp_connections_opened_total") {
		err = errors.New("no connections")
	}
	return err
}

// ExpectMetric waits until the series with these labels sum up to value.
func (s *Proxy) ExpectMetric(ctx context.Context, name string, labels map[string]string, value float64) {
	s.t.Helper()
	Eventually(s.t, ctx, 10*time.Second, func() error {
		got, err := s.Metric(name, labels)
		if err == nil && got != value {
			err = fmt.Errorf("%s of %s with %v: got %v, want %v", name, s.Name, labels, got, value)
		}
		return err
	})
}
