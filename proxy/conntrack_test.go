package proxy

import (
	"context"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ztunnel-go/ztunnel/state"
)

func trackedConn(port uint16) state.Conn {
	return state.Conn{
		Src: netip.AddrPortFrom(netip.MustParseAddr("10.0.0.1"), port),
		Dst: netip.MustParseAddrPort("10.0.0.2:80"),
	}
}

// track is trackInbound with a context that shows the end.
func (t *conntrack) track(ctx context.Context, c state.Conn, host string) (context.Context, func()) {
	ctx, end := context.WithCancelCause(ctx)
	release := t.trackInbound(end, c, host)
	return ctx, func() { release(); end(nil) }
}

// C-01: a shared key is one entry; closing it wakes all who wait on it within a
// second; independent keys are not affected.
func TestDP_C01_ManagerClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := newConntrack()
		shared1, release1 := tr.track(t.Context(), trackedConn(1), "")
		shared2, release2 := tr.track(t.Context(), trackedConn(1), "")
		other, release3 := tr.track(t.Context(), trackedConn(2), "")
		defer release3()
		if n := len(tr.snapshot().Inbound); n != 2 {
			t.Fatalf("entries = %d, want 2", n)
		}
		ended, wait := tr.recheck(func(c state.Conn) bool { return c.Src.Port() == 1 })
		if len(ended) != 1 {
			t.Errorf("ended = %v, want the one shared entry", ended)
		}
		for _, ctx := range []context.Context{shared1, shared2} {
			if cause := context.Cause(ctx); cause != ErrPolicyChanged {
				t.Errorf("cause = %v, want %v", cause, ErrPolicyChanged)
			}
		}
		if err := other.Err(); err != nil {
			t.Errorf("the independent connection ended: %v", err)
		}
		done := make(chan struct{})
		go func() { wait(t.Context()); close(done) }()
		synctest.Wait()
		select {
		case <-done:
			t.Error("wait returned before the users let go")
		default:
		}
		release1()
		release2()
		<-done
		bounded, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if wait(bounded); bounded.Err() != nil {
			t.Error("wait still waits for released users")
		}
	})
}

// C-02: the entry lives until its last user lets go; a second release is harmless.
func TestDP_C02_ManagerRelease(t *testing.T) {
	tr := newConntrack()
	_, release1 := tr.track(t.Context(), trackedConn(1), "example.com")
	_, release2 := tr.track(t.Context(), trackedConn(1), "example.com")
	_, release3 := tr.track(t.Context(), trackedConn(1), "other.com")
	for _, step := range []struct {
		do   func()
		want int
	}{{func() {}, 2}, {release1, 2}, {release1, 2}, {release3, 1}, {release2, 0}} {
		step.do()
		if got := len(tr.snapshot().Inbound); got != step.want {
			t.Errorf("entries = %d, want %d", got, step.want)
		}
	}
	ctx, release := tr.track(t.Context(), trackedConn(1), "example.com")
	release()
	if got := context.Cause(ctx); got != context.Canceled {
		t.Errorf("cause after release = %v, want %v", got, context.Canceled)
	}

	out := OutboundConnection{Src: trackedConn(1).Src, OriginalDst: trackedConn(1).Dst, ActualDst: trackedConn(1).Dst}
	untrack1, untrack2 := tr.trackOutbound(out), tr.trackOutbound(out)
	if diff := cmp.Diff([]OutboundConnection{out}, tr.snapshot().Outbound, cmp.Comparer(func(a, b OutboundConnection) bool { return a == b })); diff != "" {
		t.Errorf("outbound (-want +got):\n%s", diff)
	}
	untrack1()
	untrack1()
	if n := len(tr.snapshot().Outbound); n != 1 {
		t.Errorf("outbound entries = %d, want 1", n)
	}
	untrack2()
	if n := len(tr.snapshot().Outbound); n != 0 {
		t.Errorf("outbound entries = %d, want 0", n)
	}
}
