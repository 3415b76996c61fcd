package metric

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

const (
	opened = iota
	received
	failed
)

func newTCP(o SetOpts) *Set {
	return NewSet(o, Family{"istio_tcp_connections_opened", "Opened."}, Family{"istio_tcp_received_bytes", "Received."}, Family{"istio_tcp_connections_failed", "Failed (unstable)."})
}

func rowCount(s *Set) int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.count
}

func TestOneRowPerLabelSet(t *testing.T) {
	s := newTCP(SetOpts{Labels: []string{"a", "b"}})
	first := s.With([]string{"ab", "c"})
	tests := []struct {
		values []string
		same   bool
	}{
		{[]string{"ab", "c"}, true},
		{[]string{"a", "bc"}, false},
		{[]string{"ab", ""}, false},
	}
	for _, tt := range tests {
		r := s.With(tt.values)
		if got := r == first; got != tt.same {
			t.Errorf("With(%q) and With(ab, c): got same row %t, want %t", tt.values, got, tt.same)
		}
		r.Release()
	}
	empty, unknown := s.With([]string{"", "x"}), s.With([]string{"unknown", "x"})
	if empty != unknown || empty.values[0] != Unknown {
		t.Errorf("empty value: got labels %q, want unknown and the row of unknown", empty.values)
	}
	bad, mended := s.With([]string{"a\xff", "x"}), s.With([]string{"a\uFFFD", "x"})
	if bad != mended {
		t.Error("a value that is not UTF-8: got a row of its own, want that of the mended value")
	}
}

func TestValuesAreCopied(t *testing.T) {
	s := newTCP(SetOpts{Labels: []string{"a", "b", "c"}})
	header := []byte("client,,v1")
	values := strings.Split(string(header), ",")
	r := s.With(values)
	values[0] = "other"
	if got := strings.Join(r.values, ","); got != "client,unknown,v1" {
		t.Errorf("got %q, want the values at the time of With", got)
	}
}

func TestExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTCP(SetOpts{Labels: []string{"a"}})
		held := s.With([]string{"held"})
		again := s.With([]string{"again"})
		again.Release()
		s.With([]string{"idle"}).Release()
		advance(DefaultIdle - time.Second)
		again = s.With([]string{"again"})
		again.Release()
		s.expire(time.Now())
		if got := rowCount(s); got != 3 {
			t.Errorf("before the time: got %d rows, want 3", got)
		}
		advance(time.Second)
		s.expire(time.Now())
		if got := rowCount(s); got != 2 {
			t.Errorf("after it: got %d rows, want the held one and the one used again", got)
		}
		advance(time.Hour)
		held.Series(received).Value().Add(5)
		s.expire(time.Now())
		if r := s.With([]string{"held"}); r != held || r.Series(received).Value().Load() != 5 {
			t.Error("a held row went away")
		}
		held.Release()
		held.Release()
		s.expire(time.Now())
		if got := rowCount(s); got != 1 {
			t.Errorf("after its release: got %d rows, want it to stay for its idle time", got)
		}
		advance(DefaultIdle)
		s.expire(time.Now())
		if got := rowCount(s); got != 0 || len(s.rows) != 0 {
			t.Errorf("at the end: got %d rows in %d chains, want none", got, len(s.rows))
		}
	})
}

func TestNoExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := NewGauges(Opts{Name: "g", Labels: []string{"reporter"}})
		s := g.With("source")
		s.Set(7)
		s.Release()
		advance(24 * time.Hour)
		g.set.expire(time.Now())
		s = g.With("source")
		s.Add(-9)
		if got := int64((*Series)(s).Value().Load()); got != -2 {
			t.Errorf("got %d, want -2", got)
		}
		s.Release()
	})
}

func TestOverflow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTCP(SetOpts{Labels: []string{"a", "b"}, Max: 2})
		held := s.With([]string{"1", ""})
		s.With([]string{"2", ""}).Release()
		for _, v := range []string{"3", "4"} {
			r := s.With([]string{v, ""})
			if r.values[0] != Overflow || r.values[1] != Overflow {
				t.Errorf("beyond the bound: got labels %q", r.values)
			}
			r.Release()
		}
		if got := s.Dropped(); got != 2 {
			t.Errorf("got %d dropped, want 2", got)
		}
		advance(DefaultIdle)
		r := s.With([]string{"5", ""})
		if r.values[0] != "5" {
			t.Errorf("after the idle series expired: got labels %q, want its place taken", r.values)
		}
		r.Release()
		held.Release()
	})
}

func TestCollidingHashes(t *testing.T) {
	s := newTCP(SetOpts{Labels: []string{"a"}})
	add := func(v string) *Row { return s.add(42, []string{v}) }
	x, y, z := add("x"), add("y"), add("z")
	if x == y || y == z || add("y") != y {
		t.Error("rows of one hash are mixed up")
	}
	y.Release()
	y.Release()
	s.expire(time.Now().Add(DefaultIdle + time.Hour))
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.find(42, []string{"y"}) != nil || s.find(42, []string{"x"}) != x || s.find(42, []string{"z"}) != z || s.count != 2 {
		t.Error("expiry in the middle of a chain broke it")
	}
}

func TestConcurrentUse(t *testing.T) {
	c := NewCounters(Opts{Name: "c", Labels: []string{"a"}, Idle: time.Nanosecond, Max: 4})
	keep := c.With([]string{"0"})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i := range 2000 {
				s := c.With([]string{fmt.Sprint(i % 8)})
				s.Inc()
				s.Release()
				if i%100 == 0 {
					c.set.expire(time.Now())
				}
			}
		})
	}
	wg.Wait()
	if got, want := keep.Value().Load(), uint64(4*2000/8); got != want {
		t.Errorf("a held series lost counts: got %d, want %d", got, want)
	}
	keep.Release()
}

func TestMistakesPanic(t *testing.T) {
	s := newTCP(SetOpts{Labels: []string{"a"}})
	released := s.With([]string{"x"})
	released.Release()
	for name, f := range map[string]func(){
		"values":         func() { s.With([]string{"x", "y"}) },
		"no family":      func() { NewSet(SetOpts{}) },
		"doubled family": func() { NewSet(SetOpts{}, Family{Name: "a"}, Family{Name: "a"}) },
		"doubled label":  func() { NewCounters(Opts{Name: "a", Labels: []string{"l", "l"}}) },
		"empty label":    func() { NewCounters(Opts{Name: "a", Labels: []string{""}}) },
		"release twice":  func() { released.Release() },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: got no panic", name)
				}
			}()
			f()
		}()
	}
}

func tLabels() (names, values []string) {
	for i := range 27 {
		names = append(names, fmt.Sprintf("label_%02d", i))
		values = append(values, fmt.Sprintf("some-workload-value-%d", i))
	}
	return names, values
}

func BenchmarkWith(b *testing.B) {
	names, values := tLabels()
	s := newTCP(SetOpts{Labels: names})
	defer s.With(values).Release()
	b.ReportAllocs()
	for b.Loop() {
		s.With(values).Release()
	}
}

func BenchmarkWithParallel(b *testing.B) {
	names, values := tLabels()
	s := newTCP(SetOpts{Labels: names})
	defer s.With(values).Release()
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			s.With(values).Release()
		}
	})
}

func BenchmarkWithNew(b *testing.B) {
	names, values := tLabels()
	s := newTCP(SetOpts{Labels: names, Max: 1 << 30})
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		values[3] = fmt.Sprint(i)
		s.With(values).Release()
	}
}

func BenchmarkAdd(b *testing.B) {
	s := NewCounters(Opts{Name: "c", Labels: []string{"a"}}).With([]string{"x"})
	defer s.Release()
	b.ReportAllocs()
	for b.Loop() {
		s.Add(1)
	}
}

// advance lets the bubble's clock go on.
func advance(d time.Duration) { <-time.After(d) }
