package ca_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
)

// mockCA answers after latency, with certificates of the given life. Lives
// below a second are those of the SVID only: X.509 has whole seconds.
type mockCA struct {
	t       *testing.T
	td      *catest.CA
	latency time.Duration
	life    time.Duration

	mu    sync.Mutex // guards what follows
	err   error
	calls []spiffeid.ID
	times []time.Time
}

func newMockCA(t *testing.T) *mockCA {
	return &mockCA{t: t, td: catest.NewCA(t, "td.test"), latency: time.Second, life: 100 * time.Second}
}

func (m *mockCA) Fetch(ctx context.Context, id spiffeid.ID) (*ca.SVID, error) {
	m.mu.Lock()
	m.calls = append(m.calls, id)
	m.times = append(m.times, time.Now())
	m.mu.Unlock()
	timer := time.NewTimer(m.latency)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return nil, m.err
	}
	svid := m.td.SVID(m.t, id, catest.Life(max(m.life, time.Hour)))
	svid.NotBefore = time.Now()
	svid.NotAfter = svid.NotBefore.Add(m.life)
	return svid, nil
}

func (m *mockCA) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.err = err
}

func (m *mockCA) count() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.calls)
}

// order is the last path segments of the requests so far.
func (m *mockCA) order() (names []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, id := range m.calls {
		_, name, _ := ca.SplitIdentity(id)
		names = append(names, name)
	}
	return names
}

func sa(name string) ca.WorkloadRef {
	return ca.WorkloadRef{ID: catest.ID("spiffe://td.test/ns/a/sa/" + name)}
}

func manage(t *testing.T, m *mockCA, cfg ca.PollConfig) *ca.Manager {
	t.Helper()
	return catest.RunManager(t, catest.Fixed{ca.Poll("mock", m, cfg)}, ca.ManagerConfig{Linger: -1})
}

// within waits at most d for the lease's SVID.
func within(t *testing.T, l *ca.Lease, d time.Duration) (*ca.SVID, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	return l.SVID(ctx)
}

func TestID_ID02_StressCaching(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mock := newMockCA(t)
		mock.latency, mock.life = time.Millisecond, 50*time.Millisecond
		m := manage(t, mock, ca.PollConfig{})
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for i := range 100 {
					l := m.Acquire(sa(fmt.Sprint("id", i)))
					t.Cleanup(l.Release)
					if _, err := within(t, l, time.Minute); err != nil {
						t.Errorf("id%d: %v", i, err)
					}
				}
			})
		}
		wg.Wait()
		if n := len(m.Snapshot()); n != 100 {
			t.Errorf("%d entries, want 100", n)
		}
	})
}

func TestID_ID03_CacheRefresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mock := newMockCA(t)
		mock.latency, mock.life = time.Millisecond, 50*time.Millisecond
		m := manage(t, mock, ca.PollConfig{})
		l := m.Acquire(sa("x"))
		defer l.Release()
		first, err := within(t, l, time.Second)
		if err != nil {
			t.Fatal(err)
		}
		sleep(2 * time.Second)
		next, err := now(t, l)
		if err != nil {
			t.Fatal(err)
		}
		if next.Cert.Leaf.SerialNumber.Cmp(first.Cert.Leaf.SerialNumber) == 0 || !next.NotBefore.After(first.NotBefore) {
			t.Errorf("still %v after 2s", next)
		}
		if n := mock.count(); n < 40 || n > 100 {
			t.Errorf("%d requests in 2s for a life of 50ms, want one for each half or so", n)
		}
	})
}

// TestID_ID04_Priority: a waiting connection goes before warm-up, and warm-up
// before renewal.
func TestID_ID04_Priority(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mock := newMockCA(t)
		m := manage(t, mock, ca.PollConfig{Concurrency: 1, RenewSpread: -1})
		acquire := func(name string) *ca.Lease {
			l := m.Acquire(sa(name))
			t.Cleanup(l.Release)
			return l
		}
		renewed := acquire("renewed")
		if _, err := within(t, renewed, time.Minute); err != nil {
			t.Fatal(err)
		}
		sleep(49*time.Second + 500*time.Millisecond)
		if got := mock.order(); len(got) != 1 {
			t.Fatalf("requests %v before half-life, want only the first", got)
		}
		acquire("busy") // keeps the only slot over half-life
		synctest.Wait()
		sleep(600 * time.Millisecond) // now the renewal is due
		acquire("warm")
		synctest.Wait()
		waiting := acquire("waiting")
		if _, err := within(t, waiting, time.Minute); err != nil {
			t.Fatal(err)
		}
		sleep(3 * time.Second)
		if d := cmp.Diff([]string{"renewed", "busy", "waiting", "warm", "renewed"}, mock.order()); d != "" {
			t.Errorf("order (-want +got):\n%s", d)
		}
	})
}

// TestID_ID05_ID06_WaitingOvertakesWarmUp: a new identity, and one that is queued.
func TestID_ID05_ID06_WaitingOvertakesWarmUp(t *testing.T) {
	for _, wanted := range []string{"w4", "new"} {
		t.Run(wanted, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				mock := newMockCA(t)
				m := manage(t, mock, ca.PollConfig{Concurrency: 1})
				var leases []*ca.Lease
				for _, name := range []string{"w1", "w2", "w3", "w4"} {
					l := m.Acquire(sa(name))
					defer l.Release()
					leases = append(leases, l)
					synctest.Wait()
				}
				l := m.Acquire(sa(wanted))
				defer l.Release()
				if _, err := within(t, l, time.Minute); err != nil {
					t.Fatal(err)
				}
				if got := mock.order(); got[0] != "w1" || got[1] != wanted {
					t.Errorf("order %v, want w1, %s first", got, wanted)
				}
				for _, l := range leases {
					if _, err := within(t, l, time.Minute); err != nil {
						t.Errorf("%v: %v", l.Ref().ID, err)
					}
				}
			})
		})
	}
}

func TestID_ID07_Coalescing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mock := newMockCA(t)
		m := manage(t, mock, ca.PollConfig{})
		got := make([]*ca.SVID, 4)
		var wg sync.WaitGroup
		for i := range got {
			wg.Go(func() {
				l := m.Acquire(sa("x"))
				t.Cleanup(l.Release)
				var err error
				if got[i], err = within(t, l, time.Minute); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if n := mock.count(); n != 1 {
			t.Errorf("%d requests, want 1", n)
		}
		for _, s := range got {
			if s != got[0] {
				t.Error("two callers have different objects")
			}
		}
	})
}

func TestID_ID08_Concurrency(t *testing.T) {
	for _, tt := range []struct {
		concurrency, identities int
		want                    time.Duration
	}{{4, 4, time.Second}, {4, 5, 2 * time.Second}, {0, 8, time.Second}, {0, 9, 2 * time.Second}} {
		synctest.Test(t, func(t *testing.T) {
			m := manage(t, newMockCA(t), ca.PollConfig{Concurrency: tt.concurrency})
			start := time.Now()
			var wg sync.WaitGroup
			for i := range tt.identities {
				wg.Go(func() {
					l := m.Acquire(sa(fmt.Sprint("id", i)))
					t.Cleanup(l.Release)
					if _, err := within(t, l, time.Minute); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			if got := time.Since(start); got != tt.want {
				t.Errorf("%d identities with concurrency %d took %v, want %v", tt.identities, tt.concurrency, got, tt.want)
			}
		})
	}
}

func TestID_ID11_Forget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mock := newMockCA(t)
		m := manage(t, mock, ca.PollConfig{})
		l := m.Acquire(sa("x"))
		if _, err := within(t, l, time.Minute); err != nil {
			t.Fatal(err)
		}
		l.Release()
		synctest.Wait()
		if n := len(m.Snapshot()); n != 0 {
			t.Errorf("%d entries, want none", n)
		}
		sleep(time.Hour)
		if n := mock.count(); n != 1 {
			t.Errorf("%d requests, want none after the first", n)
		}
	})
}

// TestRenewalIsJittered: not before half-life, not after 60 %, and not all at
// one time.
func TestRenewalIsJittered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mock := newMockCA(t)
		mock.latency, mock.life = 0, time.Hour
		m := manage(t, mock, ca.PollConfig{Concurrency: 100})
		for i := range 50 {
			defer m.Acquire(sa(fmt.Sprint("id", i))).Release()
		}
		start := time.Now()
		sleep(37 * time.Minute)
		mock.mu.Lock()
		defer mock.mu.Unlock()
		if len(mock.times) != 100 {
			t.Fatalf("%d requests, want 100", len(mock.times))
		}
		renewals := mock.times[50:]
		first, last := renewals[0].Sub(start), renewals[49].Sub(start)
		if first < 30*time.Minute || last > 36*time.Minute || last-first < 2*time.Minute {
			t.Errorf("renewals between %v and %v, want them spread over 30m to 36m", first, last)
		}
	})
}

// TestPastHalfLife: a CA that hands out old certificates is not asked in a
// tight loop.
func TestPastHalfLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var calls int
		td := catest.NewCA(t, "td.test")
		p := ca.Poll("old", fetchFunc(func(_ context.Context, id spiffeid.ID) (*ca.SVID, error) {
			calls++
			return td.SVID(t, id, catest.Between(-3*time.Hour, time.Hour)), nil
		}), ca.PollConfig{})
		m := catest.RunManager(t, catest.Fixed{p}, ca.ManagerConfig{})
		l := m.Acquire(sa("x"))
		defer l.Release()
		sleep(30 * time.Minute)
		if calls < 2 || calls > 10 {
			t.Errorf("%d requests in 30 minutes, want a few", calls)
		}
	})
}

// rootedCA also knows its anchors beforehand.
type rootedCA struct {
	*mockCA
	before *ca.Bundles
	err    error
}

func (r rootedCA) WatchRoots(ctx context.Context, update func(*ca.Bundles)) error {
	if r.err != nil {
		return r.err
	}
	update(r.before)
	<-ctx.Done()
	return ctx.Err()
}

// TestContributedBundles: what the fetcher knows beforehand counts until the
// first answer, and the latest answer afterwards.
func TestContributedBundles(t *testing.T) {
	for _, rootsErr := range []error{nil, errors.New("no such file")} {
		synctest.Test(t, func(t *testing.T) {
			mock := newMockCA(t)
			before := catest.NewCA(t, "td.test").Bundles(ca.Strict)
			p := ca.Poll("mock", rootedCA{mock, before, rootsErr}, ca.PollConfig{})
			var mu sync.Mutex
			var got []*ca.Bundles
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() {
				done <- p.WatchBundles(ctx, ca.WorkloadRef{}, func(b *ca.Bundles) {
					mu.Lock()
					defer mu.Unlock()
					got = append(got, b)
				})
			}()
			synctest.Wait() // the watch is there before the first answer
			m := catest.RunManager(t, catest.Fixed{p}, ca.ManagerConfig{})
			l := m.Acquire(sa("x"))
			defer l.Release()
			sleep(time.Minute)
			mock.mu.Lock()
			mock.td = catest.NewCA(t, "td.test")
			last := mock.td.Bundles(ca.Strict)
			mock.mu.Unlock()
			sleep(2 * time.Minute) // more than the latest renewal
			cancel()
			if err := <-done; !errors.Is(err, context.Canceled) {
				t.Errorf("WatchBundles: %v, want the end of the context", err)
			}
			mu.Lock()
			defer mu.Unlock()
			want := 3
			if rootsErr != nil {
				want = 2
			} else if got[0] != before {
				t.Error("the first report is not what the fetcher knew")
			}
			if len(got) != want || !got[len(got)-1].Equal(last) {
				t.Errorf("%d reports, want %d with the newest root last", len(got), want)
			}
		})
	}
}

type fetchFunc func(context.Context, spiffeid.ID) (*ca.SVID, error)

func (f fetchFunc) Fetch(ctx context.Context, id spiffeid.ID) (*ca.SVID, error) { return f(ctx, id) }
