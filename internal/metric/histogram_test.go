package metric

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestHistograms(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHistograms(Opts{Name: "wait_seconds", Help: "W.", Labels: []string{"type"}, Max: 2}, .001, .5, 2)
		for _, d := range []time.Duration{0, time.Millisecond, 2 * time.Millisecond, 500 * time.Millisecond, time.Hour, -1} {
			h.Observe(d, "a")
		}
		h.Observe(time.Second, "")
		h.Observe(time.Second, "more than may be")
		want := `# HELP istio_metric_series_dropped Recordings that went to the overflow series because a family reached its bound (unstable).
# TYPE istio_metric_series_dropped counter
istio_metric_series_dropped_total{family="wait_seconds"} 1.0
# HELP wait_seconds W.
# TYPE wait_seconds histogram
wait_seconds_bucket{type="a",le="0.001"} 3
wait_seconds_bucket{type="a",le="0.5"} 5
wait_seconds_bucket{type="a",le="2.0"} 5
wait_seconds_bucket{type="a",le="+Inf"} 6
wait_seconds_sum{type="a"} 3600.503
wait_seconds_count{type="a"} 6
wait_seconds_bucket{type="overflow",le="0.001"} 0
wait_seconds_bucket{type="overflow",le="0.5"} 0
wait_seconds_bucket{type="overflow",le="2.0"} 1
wait_seconds_bucket{type="overflow",le="+Inf"} 1
wait_seconds_sum{type="overflow"} 1.0
wait_seconds_count{type="overflow"} 1
wait_seconds_bucket{type="unknown",le="0.001"} 0
wait_seconds_bucket{type="unknown",le="0.5"} 0
wait_seconds_bucket{type="unknown",le="2.0"} 1
wait_seconds_bucket{type="unknown",le="+Inf"} 1
wait_seconds_sum{type="unknown"} 1.0
wait_seconds_count{type="unknown"} 1
`
		if diff := cmp.Diff(want, expose(t, h)); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		advance(DefaultIdle)
		if got := expose(t, h); strings.Contains(got, `"a"`) {
			t.Errorf("after the idle time: got\n%s", got)
		}
	})
}

func TestHistogramBounds(t *testing.T) {
	for _, bounds := range [][]float64{{2, 1}, {1, 1}} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("bounds %v are accepted", bounds)
				}
			}()
			NewHistograms(Opts{Name: "h"}, bounds...)
		}()
	}
}
