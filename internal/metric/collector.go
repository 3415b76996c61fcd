package metric

import (
	"cmp"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

var (
	_ prometheus.Collector = (*Set)(nil)
	_ prometheus.Collector = (*Counters)(nil)
	_ prometheus.Collector = (*Gauges)(nil)
)

// descriptors are what the exposition needs to know of a set.
type descriptors struct {
	families []*prometheus.Desc
	names    []*string // label names in the exposition's order
	index    []int     // of names in a row's values
	dropped  *prometheus.Desc
}

func (s *Set) descriptors() descriptors {
	var d descriptors
	for _, f := range s.families {
		name := f.Name
		if !s.gauge {
			name += "_total"
		}
		d.families = append(d.families, prometheus.NewDesc(name, f.Help, s.labels, nil))
	}
	for i := range s.labels {
		d.index = append(d.index, i)
	}
	slices.SortFunc(d.index, func(a, b int) int { return cmp.Compare(s.labels[a], s.labels[b]) })
	for _, i := range d.index {
		d.names = append(d.names, &s.labels[i])
	}
	d.dropped = prometheus.NewDesc("istio_metric_series_dropped_total",
		"Recordings that went to the overflow series because a family reached its bound (unstable).",
		nil, prometheus.Labels{"family": s.families[0].Name})
	return d
}

// Describe implements [prometheus.Collector].
func (s *Set) Describe(ch chan<- *prometheus.Desc) {
	d := s.descriptors()
	for _, f := range d.families {
		ch <- f
	}
	ch <- d.dropped
}

// Collect implements [prometheus.Collector]. Series that are idle go before.
func (s *Set) Collect(ch chan<- prometheus.Metric) {
	s.expire(time.Now())
	d := s.descriptors()
	for _, r := range s.snapshot() {
		labels := d.pairs(r.values)
		for i := range r.series {
			if c := &r.series[i]; c.live.Load() {
				ch <- &sample{desc: d.families[i], labels: labels, value: c.n.Load(), gauge: s.gauge}
			}
		}
	}
	if n := s.Dropped(); n > 0 {
		ch <- prometheus.MustNewConstMetric(d.dropped, prometheus.CounterValue, float64(n))
	}
}

// snapshot lists the rows, so that a slow scrape holds no lock.
func (s *Set) snapshot() []*Row {
	s.mu.RLock()
	defer s.mu.RUnlock()
	rows := make([]*Row, 0, s.count+1)
	for _, r := range s.rows {
		for ; r != nil; r = r.next {
			rows = append(rows, r)
		}
	}
	if s.overflow != nil {
		rows = append(rows, s.overflow)
	}
	return rows
}

// pairs are the labels of all samples of one row.
func (d *descriptors) pairs(values []string) []*dto.LabelPair {
	block := make([]dto.LabelPair, len(d.names))
	pairs := make([]*dto.LabelPair, len(d.names))
	for i := range block {
		block[i].Name, block[i].Value = d.names[i], &values[d.index[i]]
		pairs[i] = &block[i]
	}
	return pairs
}

// sample is the state of one series at one scrape.
type sample struct {
	desc   *prometheus.Desc
	labels []*dto.LabelPair
	value  uint64
	gauge  bool
}

// Desc implements [prometheus.Metric].
func (m *sample) Desc() *prometheus.Desc { return m.desc }

// Write implements [prometheus.Metric].
func (m *sample) Write(out *dto.Metric) error {
	out.Label = m.labels
	if m.gauge {
		v := float64(int64(m.value))
		out.Gauge = &dto.Gauge{Value: &v}
		return nil
	}
	v := float64(m.value)
	out.Counter = &dto.Counter{Value: &v}
	return nil
}

// Describe implements [prometheus.Collector].
func (c *Counters) Describe(ch chan<- *prometheus.Desc) { c.set.Describe(ch) }

// Collect implements [prometheus.Collector].
func (c *Counters) Collect(ch chan<- prometheus.Metric) { c.set.Collect(ch) }

// Describe implements [prometheus.Collector].
func (g *Gauges) Describe(ch chan<- *prometheus.Desc) { g.set.Describe(ch) }

// Collect implements [prometheus.Collector].
func (g *Gauges) Collect(ch chan<- prometheus.Metric) { g.set.Collect(ch) }
