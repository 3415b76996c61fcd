package inpod

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// The connection to the agent goes first; then every pod drains at the same time,
// and Run ends with the last connection.
func TestDrain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t)
		var slow []chan struct{}
		w.m.cfg.New = func(pod Pod) (Proxy, error) {
			p, err := w.newProxy(pod)
			p.(*fakeProxy).release = make(chan struct{})
			slow = append(slow, p.(*fakeProxy).release)
			return &watchedProxy{p.(*fakeProxy), func() {
				if !w.conns[0].isClosed() {
					t.Error("a pod drains while the agent may send others")
				}
			}}, err
		}
		w.m.Open()
		w.run()
		c := w.conn()
		accept(t, c.add("a", w.ns("1")), c.add("b", w.ns("2")), c.sent())
		w.wantReady("")
		w.m.Drain()
		w.m.Drain()
		synctest.Wait()
		w.wantStates("a draining, b draining")
		w.wantReady("draining")
		close(slow[0])
		synctest.Wait()
		w.wantStates("b draining")
		time.Sleep(time.Hour)
		select {
		case <-w.ended:
			t.Error("Run has ended before the last connection")
		default:
		}
		close(slow[1])
		<-w.ended
		if w.err != nil {
			t.Errorf("Run: %v", w.err)
		}
		w.wantReady("draining")
	})
}

type watchedProxy struct {
	*fakeProxy
	drained func()
}

func (p *watchedProxy) Drain() {
	p.drained()
	p.fakeProxy.Drain()
}

// The end of the context cuts what is left of a drain.
func TestDrainIsCut(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t)
		w.m.cfg.New = func(pod Pod) (Proxy, error) {
			p, err := w.newProxy(pod)
			p.(*fakeProxy).release = make(chan struct{})
			return p, err
		}
		w.m.Open()
		w.run()
		accept(t, w.conn().add("a", w.ns("1")))
		w.wantStates("a active")
		w.m.Drain()
		synctest.Wait()
		deadline := errors.New("the deadline")
		w.cut(deadline)
		<-w.ended
		if err := w.last("a").cutBy(); err != deadline {
			t.Errorf("cut by %v, want %v", err, deadline)
		}
	})
}

// Whatever is not served is not drained: it ends.
func TestDrainOfWhatIsNotServed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t)
		w.run()
		c := w.conn()
		w.fail("failed", errors.New("no such device"))
		c.add("failed", w.ns("1"))
		accept(t, c.add("waiting", w.ns("2")))
		w.wantStates("failed failed, waiting starting")
		began := time.Now()
		w.m.Drain()
		<-w.ended
		if took := time.Since(began); took != 0 {
			t.Errorf("took %v, want no time", took)
		}
		if p := w.last("waiting"); p.isListening() {
			t.Error("it listens")
		}
		w.m.Open()
		w.wantReady("draining")
	})
}

// A message that comes with the drain is not carried out.
func TestAddDuringDrain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t)
		ns := w.ns("1")
		w.m.mu.Lock()
		w.m.drained = true // Drain has begun, and the connection is still open
		w.m.mu.Unlock()
		defer close(w.m.draining)
		select {
		case c.in <- packet{data: mustMarshal(t, addRequest("a")), files: files(ns)}:
		case <-c.closed:
			_ = ns.Close()
		}
		synctest.Wait()
		if n := len(w.proxies("a")); n != 0 {
			t.Errorf("%d proxies were made", n)
		}
	})
}

// One that is binding when the drain begins gives up, and the agent is not kept
// waiting.
func TestDrainWhileAPodStarts(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t)
		begun := make(chan struct{})
		w.hostile["a"] = func(ctx context.Context) error {
			close(begun)
			<-ctx.Done()
			return context.Cause(ctx)
		}
		c.in <- packet{data: mustMarshal(t, addRequest("a")), files: files(w.ns("1"))}
		<-begun
		began := time.Now()
		w.m.Drain()
		<-w.ended
		if took := time.Since(began); took > startTimeout {
			t.Errorf("ended after %v", took)
		}
	})
}

// Without a drain, the end of the context is the end of everything.
func TestRunIsCut(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t)
		accept(t, c.add("a", w.ns("1")))
		w.wantStates("a active")
		stop := errors.New("stop")
		w.cut(stop)
		<-w.ended
		if w.err != nil {
			t.Errorf("Run: %v", w.err)
		}
		if err := w.last("a").cutBy(); err != stop {
			t.Errorf("cut by %v, want %v", err, stop)
		}
		if !strings.HasPrefix(w.pending(), "not connected") {
			t.Errorf("readiness: %q", w.pending())
		}
	})
}

func TestDrainBeforeRun(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t)
		w.m.Drain()
		w.run()
		<-w.ended
		if n := len(w.tries()); n > 1 {
			t.Errorf("%d connections", n)
		}
		w.wantReady("draining")
	})
}

// An audit that does not get on, in a namespace that answers nothing, keeps no pod
// from draining.
func TestDrainWhileTheAuditIsStuck(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t)
		w.knows("a", "10.0.0.1")
		n := w.namespace("1")
		n.stuck = make(chan struct{})
		accept(t, c.add("a", w.ns("1")))
		time.Sleep(auditSoon)
		w.m.Drain()
		synctest.Wait()
		select {
		case <-w.last("a").drained:
		default:
			t.Error("the pod does not drain")
		}
		close(n.stuck)
		<-w.ended
	})
}

// A drain that begins while a proxy is being made.
func TestDrainWhileAProxyIsMade(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t)
		w.m.cfg.New = func(pod Pod) (Proxy, error) {
			w.m.Drain()
			return w.newProxy(pod)
		}
		w.hostile["a"] = func(context.Context) error { t.Error("its ports were taken"); return nil }
		w.m.Open()
		w.run()
		c := w.conn()
		c.in <- packet{data: mustMarshal(t, addRequest("a")), files: files(w.ns("1"))}
		<-w.ended
	})
}
