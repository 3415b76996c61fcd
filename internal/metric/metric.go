// Package metric holds families of counters and gauges whose label values come
// from the traffic: a series is resolved once into a handle, goes away when it
// is idle, and their number is bounded.
//
// Families that share their labels form a [Set]: one look-up and one copy of
// the label values serve all of them. [Counters] and [Gauges] are sets of one
// family. All of them are collectors for a Prometheus registry.
//
// A series lives while it is held. With and Release bracket the holding, as a
// connection does from open to end:
//
//	row := set.With(labels)
//	defer row.Release()
//	row.Series(opened).Inc()
//	sent := row.Series(sentBytes).Value() // the data path adds to it
//
// Events without a life of their own use Counters.Inc and Counters.Add.
package metric

import (
	"fmt"
	"hash/maphash"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"
)

const (
	// DefaultIdle is how long a series that nobody holds is kept.
	DefaultIdle = 15 * time.Minute
	// DefaultMax is the bound on the label sets of one Set.
	DefaultMax = 10_000
	// Unknown stands for an empty label value.
	Unknown = "unknown"
	// Overflow is the value of every label of the series that takes what does
	// not fit below the bound.
	Overflow = "overflow"
)

// sweepInterval bounds how often a full set looks for idle series.
const sweepInterval = time.Second

// Family is one metric of a Set.
type Family struct {
	// Name is the name without the suffix _total, which the exposition adds.
	Name string
	// Help is the help text.
	Help string
}

// SetOpts describes a Set.
type SetOpts struct {
	// Labels are the label names, in the order of With's values.
	Labels []string
	// Idle is how long a series that nobody holds is kept after its last use. 0
	// means DefaultIdle, negative means for ever.
	Idle time.Duration
	// Max is how many label sets there may be; 0 means DefaultMax. Beyond it
	// everything goes to one series with the value "overflow" in every label.
	Max int
}

// Set is a group of families that share one set of labels. All methods are safe
// for concurrent use.
type Set struct {
	labels   []string
	families []Family
	gauge    bool
	idle     time.Duration // negative: for ever
	max      int
	seed     maphash.Seed
	dropped  atomic.Uint64

	mu       sync.RWMutex // guards the fields below; rows gain holders under it
	rows     map[uint64]*Row
	count    int
	overflow *Row
	swept    time.Time
}

// Row is one label set of a Set with a series in each family.
type Row struct {
	set    *Set
	hash   uint64
	values []string
	next   *Row // with the same hash; guarded by Set.mu
	refs   atomic.Int64
	used   atomic.Int64 // Unix nanoseconds of the last release or unheld add
	series []Series
}

// Series is one counter. It appears in the exposition from the first call of
// any of its methods, with the value 0 if nothing was added.
type Series struct {
	row  *Row
	n    atomic.Uint64
	live atomic.Bool
}

// NewSet returns an empty set of counters. It panics if a family or label is
// missing or doubled, which is a mistake of the program.
func NewSet(o SetOpts, families ...Family) *Set { return newSet(o, false, families) }

func newSet(o SetOpts, gauge bool, families []Family) *Set {
	s := &Set{
		labels: slices.Clone(o.Labels), families: slices.Clone(families), gauge: gauge,
		idle: o.Idle, max: o.Max,
		seed: maphash.MakeSeed(), rows: make(map[uint64]*Row),
	}
	if s.idle == 0 {
		s.idle = DefaultIdle
	}
	if s.max == 0 {
		s.max = DefaultMax
	}
	var names []string
	for _, f := range families {
		names = append(names, f.Name)
	}
	if len(families) == 0 || doubled(names) || doubled(s.labels) {
		panic(fmt.Sprintf("metric: families %q with labels %q: names must be unique and not empty", names, s.labels))
	}
	return s
}

func doubled(names []string) bool {
	sorted := slices.Sorted(slices.Values(names))
	return slices.Contains(sorted, "") || len(slices.Compact(sorted)) != len(names)
}

// With resolves the label values, in the order of SetOpts.Labels, and holds the
// row until Release. An empty value becomes "unknown". It does not keep values,
// and does not allocate when the row exists. It panics if the number of values
// is not that of the labels.
func (s *Set) With(values []string) *Row { return s.resolve(values) }

// Dropped is how many calls of With and Add went to the overflow series.
func (s *Set) Dropped() uint64 { return s.dropped.Load() }

func (s *Set) resolve(values []string) *Row {
	if len(values) != len(s.labels) {
		panic(fmt.Sprintf("metric: %s has %d labels, got %d values", s.families[0].Name, len(s.labels), len(values)))
	}
	h := s.hash(values)
	s.mu.RLock()
	r := s.find(h, values)
	if r != nil {
		r.refs.Add(1)
	}
	s.mu.RUnlock()
	if r != nil {
		return r
	}
	if i := slices.IndexFunc(values, invalid); i >= 0 {
		// The exposition has to be UTF-8. Two values may become one here, so look
		// again.
		valid := slices.Clone(values)
		for i, v := range valid {
			valid[i] = strings.ToValidUTF8(v, "\uFFFD")
		}
		return s.resolve(valid)
	}
	return s.add(h, values)
}

func invalid(v string) bool { return !utf8.ValidString(v) }

func (s *Set) add(h uint64, values []string) *Row {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.find(h, values)
	if r == nil && s.count >= s.max {
		s.sweep(time.Now(), false)
	}
	switch {
	case r != nil:
	case s.count < s.max:
		r = s.newRow(values)
		r.hash, r.next = h, s.rows[h]
		s.rows[h] = r
		s.count++
	default:
		if s.overflow == nil {
			s.overflow = s.newRow(slices.Repeat([]string{Overflow}, len(s.labels)))
		}
		r = s.overflow
		s.dropped.Add(1)
	}
	r.refs.Add(1)
	return r
}

// hash is that of the values as they are stored.
func (s *Set) hash(values []string) uint64 {
	var h maphash.Hash
	h.SetSeed(s.seed)
	for _, v := range values {
		if v == "" {
			v = Unknown
		}
		_, _ = h.WriteString(v)
		_ = h.WriteByte(0xff) // in no UTF-8 text, so that ab,c and a,bc differ
	}
	return h.Sum64()
}

// find returns the row of values or nil. The caller holds s.mu.
func (s *Set) find(h uint64, values []string) *Row {
	for r := s.rows[h]; r != nil; r = r.next {
		if r.has(values) {
			return r
		}
	}
	return nil
}

func (r *Row) has(values []string) bool {
	for i, v := range values {
		if v == "" {
			v = Unknown
		}
		if v != r.values[i] {
			return false
		}
	}
	return true
}

// newRow copies values into one string: a value may be a piece of a large
// header, which must not live as long as the row.
func (s *Set) newRow(values []string) *Row {
	var size int
	for _, v := range values {
		size += max(len(v), len(Unknown))
	}
	var all strings.Builder
	all.Grow(size)
	for _, v := range values {
		if v == "" {
			v = Unknown
		}
		all.WriteString(v)
	}
	rest := all.String()
	stored := make([]string, len(values))
	for i, v := range values {
		n := len(v)
		if n == 0 {
			n = len(Unknown)
		}
		stored[i], rest = rest[:n], rest[n:]
	}
	r := &Row{set: s, values: stored, series: make([]Series, len(s.families))}
	for i := range r.series {
		r.series[i].row = r
	}
	return r
}

// expire removes what is idle.
func (s *Set) expire(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sweep(now, true)
}

// sweep removes the rows that nobody holds and that were last used more than
// s.idle ago. Unless forced, it does so once per sweepInterval. The caller holds
// s.mu for writing, so no row can gain a holder meanwhile.
func (s *Set) sweep(now time.Time, force bool) {
	if s.idle < 0 || !force && now.Sub(s.swept) < sweepInterval {
		return
	}
	s.swept = now
	limit := now.Add(-s.idle).UnixNano()
	for h, first := range s.rows {
		var kept *Row
		for r := first; r != nil; {
			next := r.next
			if r.refs.Load() == 0 && r.used.Load() <= limit {
				s.count--
			} else {
				r.next, kept = kept, r
			}
			r = next
		}
		if kept == nil {
			delete(s.rows, h)
		} else {
			s.rows[h] = kept
		}
	}
}

// Series returns the row's series in the family with that index of NewSet.
func (r *Row) Series(family int) *Series { return &r.series[family] }

// Release ends the holding that With began. Neither the row nor its series may
// be used afterwards.
func (r *Row) Release() {
	r.used.Store(time.Now().UnixNano())
	if r.refs.Add(-1) < 0 {
		panic("metric: a row was released twice")
	}
}

// Add adds n.
func (s *Series) Add(n uint64) {
	s.show()
	s.n.Add(n)
}

// Inc adds 1.
func (s *Series) Inc() { s.Add(1) }

// Value returns the counter itself, for paths that may afford no more than one
// atomic add.
func (s *Series) Value() *atomic.Uint64 {
	s.show()
	return &s.n
}

// Release releases the series' row: see Row.Release.
func (s *Series) Release() { s.row.Release() }

func (s *Series) show() {
	if !s.live.Load() {
		s.live.Store(true)
	}
}
