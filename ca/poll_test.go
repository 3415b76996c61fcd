package ca_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/internal/backoff"
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

func TestID_02_StressCaching(t *testing.T) {
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

func TestID_03_CacheRefresh(t *testing.T) {
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

// TestID_04_Priority: a waiting connection goes before warm-up, and warm-up
// before renewal.
func TestID_04_Priority(t *testing.T) {
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

// TestID_05_06_WaitingOvertakesWarmUp: a new identity, and one that is queued.
func TestID_05_06_WaitingOvertakesWarmUp(t *testing.T) {
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

func TestID_07_Coalescing(t *testing.T) {
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

func TestID_08_Concurrency(t *testing.T) {
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

func TestID_11_Forget(t *testing.T) {
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

func TestID_12_BackoffResets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mock := newMockCA(t)
		mock.latency = 0
		broken := errors.New("signing gRPC error (Unavailable): broken")
		mock.fail(broken)
		m := manage(t, mock, ca.PollConfig{})
		l := m.Acquire(sa("x"))
		defer l.Release()
		if _, err := within(t, l, time.Minute); !errors.Is(err, broken) {
			t.Fatalf("got %v, want the CA's error at once", err)
		}
		mock.fail(nil)
		if _, err := now(t, l); !errors.Is(err, broken) {
			t.Errorf("immediately after: %v, want the stored error", err)
		}
		sleep(3 * time.Second)
		if _, err := now(t, l); err != nil {
			t.Errorf("after 3s: %v", err)
		}
	})
}

// TestID_13_Unknown: an identity that nobody leased is not known.
func TestID_13_Unknown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mock := newMockCA(t)
		m := manage(t, mock, ca.PollConfig{})
		sleep(time.Hour)
		if n := len(m.Snapshot()); n != 0 || mock.count() != 0 {
			t.Errorf("%d entries and %d requests, want none", n, mock.count())
		}
	})
}

// TestID_14_15_Retention: a failing CA costs nothing before NotAfter, there is
// an attempt at NotAfter, and then the identity has none.
func TestID_14_15_Retention(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mock := newMockCA(t)
		mock.latency = 0
		m := manage(t, mock, ca.PollConfig{Backoff: backoff.Policy{Jitter: -1}})
		l := m.Acquire(sa("x"))
		defer l.Release()
		first, err := within(t, l, time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		broken := errors.New("broken")
		mock.fail(broken)
		sleep(49 * time.Second)
		if n := mock.count(); n != 1 {
			t.Errorf("%d requests before half-life, want 1", n)
		}
		sleep(12 * time.Second)
		if n := mock.count(); n < 2 {
			t.Errorf("%d requests past half-life, want a renewal", n)
		}
		if svid, err := now(t, l); err != nil || svid.Cert != first.Cert {
			t.Errorf("renewal fails: %v, %v, want the old SVID", svid, err)
		}
		if s := m.Snapshot()[0]; s.Text != "Available" || !errors.Is(s.Err, broken) {
			t.Errorf("snapshot %q, %v, want Available with the error", s.Text, s.Err)
		}
		sleep(time.Until(first.NotAfter))
		if svid, err := now(t, l); err == nil {
			t.Errorf("at NotAfter: %v, want an error", svid)
		}
		mock.mu.Lock()
		atExpiry := slices.ContainsFunc(mock.times, first.NotAfter.Equal)
		mock.mu.Unlock()
		if !atExpiry {
			t.Error("no attempt at NotAfter")
		}
		mock.fail(nil)
		if svid := waitFor(t, l, 3*time.Minute); svid == nil {
			t.Error("the CA is back, and no SVID came within 3 minutes")
		}
	})
}

func waitFor(t *testing.T, l *ca.Lease, d time.Duration) *ca.SVID {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	for {
		changed := l.Changed()
		if svid, err := l.SVID(ctx); err == nil {
			return svid
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

// TestID_16_ForgetAndRefetchInFlight: one request, and its result is delivered.
func TestID_16_ForgetAndRefetchInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mock := newMockCA(t)
		m := manage(t, mock, ca.PollConfig{})
		l := m.Acquire(sa("x"))
		sleep(500 * time.Millisecond)
		l.Release()
		synctest.Wait()
		start := time.Now()
		again := m.Acquire(sa("x"))
		defer again.Release()
		if _, err := within(t, again, time.Minute); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took != 500*time.Millisecond || mock.count() != 1 {
			t.Errorf("took %v with %d requests, want the running one", took, mock.count())
		}
	})
}

// TestID_17_RetryTimes: the failing requests come at 1, 3, 7, 15 … s, and the
// counter survives a forget.
func TestID_17_RetryTimes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mock := newMockCA(t)
		mock.latency = 0
		mock.fail(errors.New("broken"))
		m := manage(t, mock, ca.PollConfig{Backoff: backoff.Policy{Jitter: -1}})
		start := time.Now()
		l := m.Acquire(sa("x"))
		sleep(20 * time.Second)
		l.Release()
		sleep(time.Minute)
		again := m.Acquire(sa("x"))
		defer again.Release()
		sleep(20 * time.Second) // asked at once; the next delay is 32 s, not 1 s
		var got []float64
		for _, at := range mock.times {
			got = append(got, at.Sub(start).Seconds())
		}
		if d := cmp.Diff([]float64{0, 1, 3, 7, 15, 80}, got); d != "" {
			t.Errorf("request times (-want +got):\n%s", d)
		}
	})
}

func TestPollTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mock := newMockCA(t)
		mock.latency = time.Hour
		m := manage(t, mock, ca.PollConfig{})
		l := m.Acquire(sa("x"))
		defer l.Release()
		start := time.Now()
		_, err := within(t, l, time.Minute)
		if took := time.Since(start); took != 10*time.Second || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v after %v, want a timeout after 10s", err, took)
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
			m := catest.RunManager(t, catest.Fixed{p}, ca.ManagerConfig{})
			l := m.Acquire(sa("x"))
			defer l.Release()
			sleep(time.Minute)
			mock.mu.Lock()
			mock.td = catest.NewCA(t, "td.test")
			last := mock.td.Bundles(ca.Strict)
			mock.mu.Unlock()
			sleep(time.Minute)
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
