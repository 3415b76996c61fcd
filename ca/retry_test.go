package ca_test

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/internal/backoff"
)

func TestID_ID12_BackoffResets(t *testing.T) {
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

// TestID_ID13_Unknown: an identity that nobody leased is not known.
func TestID_ID13_Unknown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mock := newMockCA(t)
		m := manage(t, mock, ca.PollConfig{})
		sleep(time.Hour)
		if n := len(m.Snapshot()); n != 0 || mock.count() != 0 {
			t.Errorf("%d entries and %d requests, want none", n, mock.count())
		}
	})
}

// TestID_ID14_ID15_Retention: a failing CA costs nothing before NotAfter, there is
// an attempt at NotAfter, and then the identity has none.
func TestID_ID14_ID15_Retention(t *testing.T) {
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

// TestID_ID16_ForgetAndRefetchInFlight: one request, and its result is delivered.
func TestID_ID16_ForgetAndRefetchInFlight(t *testing.T) {
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

// TestID_ID17_RetryTimes: the failing requests come at 1, 3, 7, 15 … s, and the
// counter survives a forget.
func TestID_ID17_RetryTimes(t *testing.T) {
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
