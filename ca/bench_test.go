package ca_test

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
)

// heldLease is a lease that has an SVID, until the test ends.
func heldLease(tb testing.TB) *ca.Lease {
	tb.Helper()
	p := catest.NewProvider("fixed")
	m := ca.NewManager(catest.Fixed{p}, ca.ManagerConfig{})
	ctx, cancel := context.WithCancel(context.WithoutCancel(tb.Context()))
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	tb.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			tb.Errorf("Manager.Run: %v", err)
		}
	})
	l := m.Acquire(sa("x"))
	p.Set(p.Key(l.Ref()), available(catest.NewCA(tb, "td.test").SVID(tb, l.Ref().ID)))
	wait, stop := context.WithTimeout(ctx, time.Minute)
	defer stop()
	if _, err := l.SVID(wait); err != nil {
		tb.Fatal(err)
	}
	return l
}

// slot is the yardstick: one atomic load behind a call that is not inlined.
type slot struct{ p atomic.Pointer[ca.SVID] }

//go:noinline
func (s *slot) load(context.Context) (*ca.SVID, error) { return s.p.Load(), nil }

// BenchmarkLeaseSVID fails when Lease.SVID costs more than twice the yardstick.
// Both run in turn, and the best of each counts: a busy machine only ever adds.
func BenchmarkLeaseSVID(b *testing.B) {
	const round = 10_000
	l, s := heldLease(b), new(slot)
	svid, err := l.SVID(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	s.p.Store(svid)
	ctx := b.Context()
	lease, load := time.Hour, time.Hour
	b.ReportAllocs()
	for b.Loop() {
		start := time.Now()
		for range round {
			if v, err := s.load(ctx); v == nil || err != nil {
				b.Fatal(err)
			}
		}
		mid := time.Now()
		for range round {
			if v, err := l.SVID(ctx); v == nil || err != nil {
				b.Fatal(err)
			}
		}
		load, lease = min(load, mid.Sub(start)), min(lease, time.Since(mid))
	}
	ratio := float64(lease) / float64(load)
	b.ReportMetric(float64(lease)/round, "ns/SVID")
	b.ReportMetric(float64(load)/round, "ns/load")
	b.ReportMetric(ratio, "ratio")
	if b.N > 50 && ratio > 2 {
		b.Errorf("Lease.SVID costs %.2f times an atomic load behind a call, at most 2 are allowed", ratio)
	}
}

func TestLeaseSVIDDoesNotAllocate(t *testing.T) {
	l, ctx := heldLease(t), t.Context()
	if n := testing.AllocsPerRun(1000, func() {
		if _, err := l.SVID(ctx); err != nil {
			t.Error(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations, want none", n)
	}
}

// crowdCA answers after latency, and counts what it sees.
type crowdCA struct {
	tb      testing.TB
	td      *catest.CA
	latency time.Duration
	life    time.Duration

	mu      sync.Mutex // guards what follows
	running int
	most    int
	starts  []time.Time
}

func (c *crowdCA) Fetch(ctx context.Context, id spiffeid.ID) (*ca.SVID, error) {
	c.mu.Lock()
	c.running++
	c.most = max(c.most, c.running)
	c.starts = append(c.starts, time.Now())
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.running--
	}()
	timer := time.NewTimer(c.latency)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	return c.td.SVIDWith(c.tb, id, c.td.Bundles(ca.Compatible), catest.Life(c.life)), nil
}

// TestScaleRenewal: 5 000 identities of one node are renewed within one
// half-life, 8 at a time, by a CA that takes a second for each.
func TestScaleRenewal(t *testing.T) {
	identities := 5000
	if raceEnabled || testing.Short() {
		identities = 500
	}
	synctest.Test(t, func(t *testing.T) {
		crowd := &crowdCA{tb: t, td: catest.NewCA(t, "td.test"), latency: time.Second, life: time.Hour}
		m := catest.RunManager(t, catest.Fixed{ca.Poll("crowd", crowd, ca.PollConfig{})}, ca.ManagerConfig{Linger: -1})
		began := time.Now()
		leases := make([]*ca.Lease, identities)
		for i := range leases {
			leases[i] = m.Acquire(sa(fmt.Sprint("id", i)))
			defer leases[i].Release()
		}
		first := make([]*ca.SVID, identities)
		for i, l := range leases {
			var err error
			if first[i], err = within(t, l, time.Hour); err != nil {
				t.Fatalf("%v: %v", l.Ref().ID, err)
			}
		}
		issued := time.Since(began)
		for i, l := range leases { // at the end of its own life each has the next
			sleep(time.Until(first[i].NotAfter.Add(-time.Second)))
			if svid, err := now(t, l); err != nil || svid.Cert == first[i].Cert {
				t.Fatalf("%v: %v, %v, want a renewed SVID", l.Ref().ID, svid, err)
			}
		}
		crowd.mu.Lock()
		defer crowd.mu.Unlock()
		if crowd.most != 8 {
			t.Errorf("%d requests at one time, want 8", crowd.most)
		}
		renewals := crowd.starts[identities : 2*identities]
		t.Logf("%d identities: issued in %v, renewed between %v and %v of a life of %v, %d at a time",
			identities, issued, renewals[0].Sub(began), renewals[identities-1].Sub(began), crowd.life, crowd.most)
	})
}

// TestScaleHeap: what an identity costs in memory, all in all.
func TestScaleHeap(t *testing.T) {
	const limit = 20 << 10 // bytes
	identities := 5000
	if raceEnabled || testing.Short() {
		identities = 500
	}
	synctest.Test(t, func(t *testing.T) {
		td := catest.NewCA(t, "td.test")
		bundles := td.Bundles(ca.Compatible)
		p := ca.Poll("mem", fetchFunc(func(_ context.Context, id spiffeid.ID) (*ca.SVID, error) {
			return td.SVIDWith(t, id, bundles), nil
		}), ca.PollConfig{})
		m := catest.RunManager(t, catest.Fixed{p}, ca.ManagerConfig{Linger: -1})
		leases := make([]*ca.Lease, identities)
		before := heap()
		for i := range leases {
			leases[i] = m.Acquire(sa(fmt.Sprint("id", i)))
			defer leases[i].Release()
		}
		for _, l := range leases {
			if _, err := within(t, l, time.Minute); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		per := (heap() - before) / int64(identities)
		t.Logf("%d bytes of heap per identity", per)
		if per > limit {
			t.Errorf("%d bytes of heap per identity, at most %d are allowed", per, limit)
		}
	})
}

// heap is what is in use after garbage collection, with stacks.
func heap() int64 {
	runtime.GC()
	runtime.GC() // what finalizers let go
	var s runtime.MemStats
	runtime.ReadMemStats(&s)
	return int64(s.HeapAlloc + s.StackInuse)
}
