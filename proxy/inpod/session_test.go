package inpod

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// gaps are the times between the tries to connect.
func (w *world) gaps() (gaps []time.Duration) {
	all := w.tries()
	for i := 1; i < len(all); i++ {
		gaps = append(gaps, all[i].Sub(all[i-1]))
	}
	return gaps
}

// setRefuse makes every try to connect fail, nil lets them succeed.
func (w *world) setRefuse(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.refuse = err
}

// Spec §7.8: 20, 40, 80 ms … 15 s without jitter, from the beginning each time.
func TestConnectTiming(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t)
		w.refuse = errors.New("connection refused")
		w.run()
		time.Sleep(time.Minute)
		var want []time.Duration
		for d := 20 * time.Millisecond; d < 15*time.Second; d *= 2 {
			want = append(want, d)
		}
		want = append(want, 15*time.Second, 15*time.Second)
		if diff := cmp.Diff(want, w.gaps()); diff != "" {
			t.Errorf("between the tries (-want +got):\n%s", diff)
		}
		w.setRefuse(nil)
		time.Sleep(15 * time.Second)
		c := w.conn()
		accept(t, c.sent())
		w.setRefuse(errors.New("connection refused"))
		before := len(w.tries())
		c.eof()
		time.Sleep(100 * time.Millisecond)
		if diff := cmp.Diff([]time.Duration{20 * time.Millisecond, 40 * time.Millisecond}, w.gaps()[before:]); diff != "" {
			t.Errorf("between the tries after a loss (-want +got):\n%s", diff)
		}
	})
}

// Spec §7.8: B from 500 ms, twice as long each time, up to 15 s, ±20 %; from 5 ms
// once the node was ready.
func TestHelloTiming(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t)
		var bad atomic.Bool
		bad.Store(true)
		dial := w.m.dial
		w.m.dial = func(ctx context.Context) (agentConn, error) {
			c, err := dial(ctx)
			if bad.Load() && err == nil {
				c.(*fakeConn).eof()
			}
			return c, err
		}
		w.m.Open()
		w.run()
		time.Sleep(2 * time.Minute)
		want := 500 * time.Millisecond
		for i, got := range w.gaps() {
			if got < want*8/10 || got > want*12/10 {
				t.Errorf("pause %d: got %v, want %v ±20 %%", i, got, want)
			}
			want = min(2*want, 15*time.Second)
		}
		bad.Store(false)
		time.Sleep(20 * time.Second)
		c := w.conn()
		accept(t, c.sent())
		bad.Store(true)
		before := len(w.tries())
		c.eof()
		time.Sleep(time.Second)
		gaps := w.gaps()[before:] // the first reconnect is at once
		if len(gaps) == 0 || gaps[0] < 4*time.Millisecond || gaps[0] > 6*time.Millisecond {
			t.Errorf("after the node was ready: got %v, want 5 ms ±20 %% first", gaps)
		}
	})
}

// Cilium §1.9: after an accepted connection was lost, at once, then fast, then
// jittered up to a second.
func TestLossTiming(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t)
		w.run()
		var waits []time.Duration
		for range 60 {
			c, lost, before := w.conn(), time.Now(), len(w.tries())
			c.eof()
			time.Sleep(2 * time.Second)
			waits = append(waits, w.tries()[before].Sub(lost))
		}
		var longest time.Duration
		for i, got := range waits {
			if i == 0 && got != 0 || i < 4 && got > 100*time.Millisecond || got > time.Second {
				t.Errorf("loss %d: reconnected after %v, want at once, then fast, then within 1 s", i, got)
			}
			longest = max(longest, got)
		}
		if longest < 500*time.Millisecond {
			t.Errorf("the longest wait is %v, want it near 1 s", longest)
		}
	})
}

// A good connection in between lets the next loss be the first again.
func TestLossAfterAGoodConnection(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t)
		w.run()
		for range 20 {
			w.conn().eof()
			time.Sleep(2 * time.Second)
		}
		c := w.conn()
		accept(t, c.sent())
		time.Sleep(lasting)
		before := len(w.tries())
		c.eof()
		synctest.Wait()
		if after := len(w.tries()); after != before+1 {
			t.Errorf("%d tries at once, want one", after-before)
		}
	})
}

// On a shared host network, one that has had its snapshot lets the other one have
// the connection for longer than the other one can be thrown out.
func TestHandOverYields(t *testing.T) {
	for _, handOver := range []bool{false, true} {
		t.Run(fmt.Sprint(handOver), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := newWorld(t, func(cfg *Config) { cfg.HandOver = handOver })
				w.run()
				var longest time.Duration
				for range 20 {
					c := w.conn()
					accept(t, c.sent())
					lost, before := time.Now(), len(w.tries())
					c.eof()
					time.Sleep(6 * time.Second)
					longest = max(longest, w.tries()[before].Sub(lost))
				}
				if handOver && (longest < 2*time.Second || longest > 5*time.Second) || !handOver && longest > time.Second {
					t.Errorf("the longest wait is %v", longest)
				}
				for range 5 { // without a snapshot it is as eager as any
					lost, before := time.Now(), len(w.tries())
					w.conn().eof()
					time.Sleep(6 * time.Second)
					if got := w.tries()[before].Sub(lost); got > time.Second {
						t.Errorf("without a snapshot: waited %v", got)
					}
				}
			})
		})
	}
}

// users.md 17: an agent that has forgotten us.
func TestNoSnapshot(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t)
		w.run()
		c := w.conn()
		time.Sleep(snapshotPatience - time.Second)
		accept(t, c.add("a", w.ns("1"))) // it goes on
		time.Sleep(snapshotPatience - time.Nanosecond)
		synctest.Wait()
		if c.isClosed() {
			t.Error("closed although the agent was at work")
		}
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if !c.isClosed() {
			t.Error("still open although nothing comes")
		}
		if got := w.log.String(); !strings.Contains(got, errNoSnapshot.Error()) {
			t.Errorf("the log does not say why:\n%s", got)
		}
		c = w.conn()
		accept(t, c.keep("a"), c.sent())
		time.Sleep(time.Hour) // then silence is in order
		synctest.Wait()
		if c.isClosed() {
			t.Error("closed after the snapshot")
		}
	})
}

// Cilium §1.7: an agent that cannot complete its snapshot ends the connection,
// again and again: its own log says why.
func TestHintAboutTheAgent(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t)
		w.run()
		const hint = "the node agent keeps closing the connection before its snapshot is complete"
		for range hintAfter - 1 {
			w.conn().eof()
			time.Sleep(2 * time.Second)
		}
		accept(t, w.conn().sent()) // the agent can
		w.conn().eof()
		time.Sleep(2 * time.Second)
		for range hintAfter - 1 {
			w.conn().eof()
			time.Sleep(2 * time.Second)
		}
		for range 10 { // of those the agent does not close any
			time.Sleep(snapshotPatience + 2*time.Second)
		}
		if strings.Contains(w.log.String(), hint) {
			t.Error("a hint too early")
		}
		before := strings.Count(w.log.String(), "level=WARN msg=\"lost the connection")
		for range 40 { // 80 s
			w.conn().eof()
			time.Sleep(2 * time.Second)
		}
		if n := strings.Count(w.log.String(), hint); n != 2 {
			t.Errorf("%d hints in 80 s, want 2", n)
		}
		if n := strings.Count(w.log.String(), "level=WARN msg=\"lost the connection") - before; n > 2 {
			t.Errorf("%d warnings about lost connections in 80 s", n)
		}
	})
}

// A connection that comes when nobody wants it any more is closed.
func TestDialOutlivesTheManager(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t)
		dial := w.m.dial
		w.m.dial = func(ctx context.Context) (agentConn, error) {
			<-ctx.Done()
			return dial(ctx)
		}
		w.run()
		synctest.Wait()
		w.m.Drain()
		<-w.ended
		if len(w.conns) != 1 || !w.conns[0].isClosed() {
			t.Error("the connection is open")
		}
	})
}
