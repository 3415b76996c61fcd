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
	"github.com/ztunnel-go/ztunnel/internal/backoff"
)

// gaps are the times between the requests so far, in seconds.
func (m *mockCA) gaps() (gaps []float64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i, at := range m.times[1:] {
		gaps = append(gaps, at.Sub(m.times[i]).Seconds())
	}
	return gaps
}

// TestID_TL08_WallClock is TL-08: the times in certificates, which are those of the
// wall clock, become times to wait without a loss, however often.
func TestID_TL08_WallClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mock := newMockCA(t)
		mock.latency = 0
		m := manage(t, mock, ca.PollConfig{RenewSpread: -1})
		l := m.Acquire(sa("x"))
		defer l.Release()
		sleep(time.Hour)
		gaps := mock.gaps()
		if len(gaps) != 72 {
			t.Errorf("%d renewals in an hour, want 72", len(gaps))
		}
		for i, gap := range gaps {
			if gap != 50 {
				t.Errorf("renewal %d came after %v s, want 50: half of the life", i, gap)
			}
		}
	})
}

// TestDenialIsRetriedSlower: also after an outage, which has a counter of its
// own.
func TestDenialIsRetriedSlower(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mock := newMockCA(t)
		mock.latency = 0
		mock.fail(fmt.Errorf("sign: %w", ca.ErrDenied))
		m := manage(t, mock, ca.PollConfig{Backoff: backoff.Policy{Jitter: -1}, Denied: backoff.Policy{Jitter: -1}})
		l := m.Acquire(sa("x"))
		defer l.Release()
		if _, err := within(t, l, time.Second); !errors.Is(err, ca.ErrDenied) {
			t.Fatalf("got %v, want the denial at once", err)
		}
		sleep(100 * time.Second)
		mock.fail(errors.New("broken"))
		sleep(80 * time.Second) // at 170 s the first ordinary failure
		mock.fail(ca.ErrDenied)
		sleep(3 * time.Minute)
		if d := cmp.Diff([]float64{2, 8, 32, 128, 1, 2, 4, 8, 150}, mock.gaps()); d != "" {
			t.Errorf("times between the requests (-want +got):\n%s", d)
		}
		mock.fail(nil)
		if svid := waitFor(t, l, 150*time.Second); svid == nil {
			t.Fatal("no SVID after the denial ended")
		}
		mock.fail(ca.ErrDenied)
		renewal := mock.count()
		sleep(70 * time.Second)
		if gaps := mock.gaps(); len(gaps) <= renewal || gaps[renewal] != 2 {
			t.Errorf("times between the requests after a success %v, want 2 after the failed renewal", gaps[renewal-1:])
		}
	})
}

// TestDenialJitter: the first delay is not the same for all.
func TestDenialJitter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mock := newMockCA(t)
		mock.latency = 0
		mock.fail(ca.ErrDenied)
		m := manage(t, mock, ca.PollConfig{Concurrency: 100})
		start := time.Now()
		for i := range 50 {
			defer m.Acquire(sa(fmt.Sprint("id", i))).Release()
		}
		sleep(3 * time.Second)
		mock.mu.Lock()
		defer mock.mu.Unlock()
		if len(mock.times) != 100 {
			t.Fatalf("%d requests within 3s, want 100", len(mock.times))
		}
		seen := make(map[time.Duration]bool)
		for _, at := range mock.times[50:] {
			d := at.Sub(start)
			seen[d] = true
			if d < 1600*time.Millisecond || d > 2400*time.Millisecond {
				t.Errorf("a retry after %v, want 1.6 s to 2.4 s", d)
			}
		}
		if len(seen) < 40 {
			t.Errorf("only %d different times for 50 retries", len(seen))
		}
	})
}

// TestCeiling: a certificate of ten years is renewed after a week.
func TestCeiling(t *testing.T) {
	const day = 24 * time.Hour
	for _, tt := range []struct {
		name       string
		life       time.Duration
		cfg        ca.PollConfig
		from, till time.Duration
	}{
		{"ten years", 3650 * day, ca.PollConfig{}, 6 * day, 7 * day},
		{"the end of time", 290 * 365 * day, ca.PollConfig{}, 6 * day, 7 * day},
		{"thirty days", 30 * day, ca.PollConfig{}, 6 * day, 7 * day},
		{"one day", day, ca.PollConfig{}, 12 * time.Hour, 15 * time.Hour},
		{"no ceiling", 30 * day, ca.PollConfig{Ceiling: -1}, 15 * day, 18 * day},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				mock := newMockCA(t)
				mock.latency, mock.life = 0, tt.life
				m := manage(t, mock, tt.cfg)
				l := m.Acquire(sa("x"))
				defer l.Release()
				sleep(tt.from - time.Second)
				if n := mock.count(); n != 1 {
					t.Errorf("%d requests within %v, want 1", n, tt.from)
				}
				sleep(tt.till - tt.from + 2*time.Second)
				if n := mock.count(); n != 2 {
					t.Errorf("%d requests within %v, want 2", n, tt.till)
				}
			})
		})
	}
}

// TestSkew: the CA's clock is ahead of ours.
func TestSkew(t *testing.T) {
	for _, tt := range []struct {
		name  string
		early time.Duration
		skew  time.Duration
		ok    bool
	}{
		{"in time", -time.Second, 0, true},
		{"some seconds", 4 * time.Second, 0, true},
		{"an hour", time.Hour, 0, false},
		{"no skew allowed", 4 * time.Second, -1, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				td := catest.NewCA(t, "td.test")
				var mu sync.Mutex
				calls := make(map[spiffeid.ID]int)
				p := ca.Poll("ahead", fetchFunc(func(_ context.Context, id spiffeid.ID) (*ca.SVID, error) {
					mu.Lock()
					defer mu.Unlock()
					calls[id]++
					return td.SVID(t, id, catest.Between(tt.early, tt.early+time.Hour)), nil
				}), ca.PollConfig{Concurrency: 1, Skew: tt.skew})
				m := catest.RunManager(t, catest.Fixed{p}, ca.ManagerConfig{})
				start := time.Now()
				var leases []*ca.Lease
				for i := range 3 {
					l := m.Acquire(sa(fmt.Sprint("id", i)))
					defer l.Release()
					leases = append(leases, l)
				}
				for _, l := range leases {
					_, err := within(t, l, time.Minute)
					if (err == nil) != tt.ok {
						t.Errorf("%v: got %v, want success %v", l.Ref().ID, err, tt.ok)
					}
					if !tt.ok && !errors.Is(err, ca.ErrRejected) {
						t.Errorf("%v is no rejection", err)
					}
				}
				if took := time.Since(start); tt.ok && took != max(tt.early, 0) {
					t.Errorf("three identities took %v with one slot, want %v: the wait takes no slot", took, max(tt.early, 0))
				}
				sleep(10*time.Minute - time.Second)
				mu.Lock()
				defer mu.Unlock()
				for id, n := range calls {
					if tt.ok && n != 1 || n > 20 {
						t.Errorf("%v: %d requests in 10 minutes", id, n)
					}
				}
			})
		})
	}
}

// lineCA is a Fetcher that keeps something open.
type lineCA struct {
	*mockCA
	events chan string
}

func (c lineCA) Fetch(ctx context.Context, id spiffeid.ID) (*ca.SVID, error) {
	svid, err := c.mockCA.Fetch(ctx, id)
	c.events <- "fetched"
	return svid, err
}

func (c lineCA) Disconnect() { c.events <- "disconnected" }

// TestDisconnect comes with the end of each Run, after the last request.
func TestDisconnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := lineCA{newMockCA(t), make(chan string, 10)}
		p := ca.Poll("line", c, ca.PollConfig{})
		wctx, stop := context.WithCancel(t.Context())
		watched := make(chan error, 1)
		go func() { watched <- p.Watch(wctx, sa("x"), func(ca.Event) {}) }()
		for range 2 {
			ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond) // in the midst of a request
			if err := p.Run(ctx); err != nil {
				t.Error(err)
			}
			cancel()
		}
		stop()
		<-watched
		close(c.events)
		var got []string
		for e := range c.events {
			got = append(got, e)
		}
		if d := cmp.Diff([]string{"fetched", "disconnected", "fetched", "disconnected"}, got); d != "" {
			t.Errorf("(-want +got):\n%s", d)
		}
	})
}
