package metric

import (
	"fmt"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// Histograms is one family of histograms of durations, in seconds. Its series
// expire as those of counters do. All methods are safe for concurrent use.
type Histograms struct {
	// Families of set: one per bucket, that of the longest observations, the sum in
	// nanoseconds.
	set    *Set
	bounds []float64 // seconds
}

var _ prometheus.Collector = (*Histograms)(nil)

// NewHistograms returns an empty family with buckets up to the given bounds, in
// seconds, and one for what is longer. It panics as NewSet does, and if the bounds
// do not increase.
func NewHistograms(o Opts, bounds ...float64) *Histograms {
	if !slices.IsSorted(bounds) || len(slices.Compact(slices.Clone(bounds))) != len(bounds) {
		panic(fmt.Sprintf("metric: %s: bounds %v must increase", o.Name, bounds))
	}
	families := []Family{{Name: o.Name, Help: o.Help}}
	for i := range len(bounds) + 1 {
		families = append(families, Family{Name: fmt.Sprint(o.Name, " ", i)})
	}
	return &Histograms{
		set:    newSet(SetOpts{Labels: o.Labels, Idle: o.Idle, Max: o.Max}, false, families),
		bounds: slices.Clone(bounds),
	}
}

// Observe adds one duration to the series of values, without holding it. What is
// negative counts as nothing.
func (h *Histograms) Observe(d time.Duration, values ...string) {
	r := h.set.With(values)
	defer r.Release()
	i, _ := slices.BinarySearch(h.bounds, d.Seconds())
	r.Series(i).Inc()
	r.Series(len(h.bounds) + 1).Add(uint64(max(d, 0)))
}

// Describe implements [prometheus.Collector].
func (h *Histograms) Describe(ch chan<- *prometheus.Desc) {
	d := h.descriptors()
	ch <- d.families[0]
	ch <- d.dropped
}

// descriptors has that of the histogram as its first family.
func (h *Histograms) descriptors() descriptors {
	d := h.set.descriptors()
	f := h.set.families[0]
	d.families[0] = prometheus.NewDesc(f.Name, f.Help, h.set.labels, nil)
	return d
}

// Collect implements [prometheus.Collector]. Series that are idle go before.
func (h *Histograms) Collect(ch chan<- prometheus.Metric) {
	h.set.expire(time.Now())
	d := h.descriptors()
	for _, r := range h.set.snapshot() {
		ch <- &histogram{desc: d.families[0], labels: d.pairs(r.values), row: r, bounds: h.bounds}
	}
	if n := h.set.Dropped(); n > 0 {
		ch <- prometheus.MustNewConstMetric(d.dropped, prometheus.CounterValue, float64(n))
	}
}

// histogram is one series at one scrape.
type histogram struct {
	desc   *prometheus.Desc
	labels []*dto.LabelPair
	row    *Row
	bounds []float64
}

// Desc implements [prometheus.Metric].
func (m *histogram) Desc() *prometheus.Desc { return m.desc }

// Write implements [prometheus.Metric].
func (m *histogram) Write(out *dto.Metric) error {
	var count uint64
	buckets := make([]*dto.Bucket, len(m.bounds))
	for i := range m.bounds {
		count += m.row.series[i].n.Load()
		cumulative := count
		buckets[i] = &dto.Bucket{UpperBound: &m.bounds[i], CumulativeCount: &cumulative}
	}
	count += m.row.series[len(m.bounds)].n.Load()
	sum := time.Duration(m.row.series[len(m.bounds)+1].n.Load()).Seconds()
	out.Label = m.labels
	out.Histogram = &dto.Histogram{SampleCount: &count, SampleSum: &sum, Bucket: buckets}
	return nil
}
