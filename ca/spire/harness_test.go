package spire

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest/spireagent"
)

// world is a running provider over a fake agent.
type world struct {
	agent    *spireagent.Agent
	provider ca.Provider
}

// newWorld starts a provider that ends with the test.
func newWorld(t *testing.T, cfg DelegatedConfig, entries ...spireagent.Entry) *world {
	t.Helper()
	agent := spireagent.New(t, spireagent.Config{})
	agent.SetEntries(entries...)
	if cfg.Dial == nil {
		cfg.Dial = agent.Dial
	}
	return &world{agent, newRunning(t, cfg)}
}

// newRunning runs a provider until the test ends.
func newRunning(t *testing.T, cfg DelegatedConfig) ca.Provider {
	t.Helper()
	p, err := NewDelegated(cfg)
	if err != nil {
		t.Fatal(err)
	}
	background(t, func(ctx context.Context) {
		if err := p.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return p
}

// background runs f, whose context ends with the test.
func background(t *testing.T, f func(context.Context)) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context())) // t.Context ends before the cleanups
	var done sync.WaitGroup
	done.Go(func() { f(ctx) })
	t.Cleanup(func() {
		cancel()
		done.Wait()
	})
}

// events are what one Watch reported.
type events struct {
	mu  sync.Mutex
	all []ca.Event
	at  []time.Time
	new chan struct{} // one slot
}

// watch watches w until the test ends.
func watch(t *testing.T, p ca.Provider, w ca.WorkloadRef) *events {
	t.Helper()
	e := &events{new: make(chan struct{}, 1)}
	background(t, func(ctx context.Context) {
		if err := p.Watch(ctx, w, e.add); !errors.Is(err, context.Canceled) {
			t.Errorf("Watch: %v", err)
		}
	})
	return e
}

func (e *events) add(ev ca.Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.all = append(e.all, ev)
	e.at = append(e.at, time.Now())
	select {
	case e.new <- struct{}{}:
	default:
	}
}

// count is the number of events, without a first one that says that the bundles
// have not come: they may come before the SVID, or after.
func (e *events) count() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.all) > 0 && errors.Is(e.all[0].Err, errNoBundles) {
		return len(e.all) - 1
	}
	return len(e.all)
}

// last is the latest event, and when it was reported.
func (e *events) last(t *testing.T) (ca.Event, time.Time) {
	t.Helper()
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.all) == 0 {
		t.Fatal("nothing was reported")
	}
	return e.all[len(e.all)-1], e.at[len(e.at)-1]
}

// want fails unless the latest event has the state, and an error with all of the
// texts; none wants no error.
func (e *events) want(t *testing.T, state ca.State, texts ...string) ca.Event {
	t.Helper()
	ev, _ := e.last(t)
	if ev.State != state || (ev.SVID != nil) != (state == ca.Available) {
		t.Fatalf("got %v, %v, %v, want %v", ev.State, ev.SVID, ev.Err, state)
	}
	if len(texts) == 0 && ev.Err != nil {
		t.Fatalf("got error %q, want none", ev.Err)
	}
	for _, s := range texts {
		if !strings.Contains(text(ev.Err), s) {
			t.Fatalf("got error %q, want one with %q", text(ev.Err), s)
		}
	}
	return ev
}

// eventually waits, outside of a bubble, for an event that fits.
func (e *events) eventually(t *testing.T, what string, fits func(ca.Event) bool) ca.Event {
	t.Helper()
	timeout := time.NewTimer(20 * time.Second)
	defer timeout.Stop()
	for {
		e.mu.Lock()
		all := e.all
		e.mu.Unlock()
		if len(all) > 0 && fits(all[len(all)-1]) {
			return all[len(all)-1]
		}
		select {
		case <-e.new:
		case <-timeout.C:
			t.Fatalf("no %s; got %v", what, all)
		}
	}
}

// pass lets d pass in a bubble, and everything happen that follows.
func pass(d time.Duration) {
	if d > 0 {
		<-time.NewTimer(d).C
	}
	synctest.Wait()
}

// numbered is one workload of many, with its entry.
func numbered(i int) (ca.WorkloadRef, spireagent.Entry) {
	w := web
	w.UID, w.Pod = fmt.Sprintf("uid-%d", i), fmt.Sprintf("web-%d", i)
	return w, spireagent.Entry{ID: webText, Selectors: []string{"k8s:pod-uid:" + w.UID}}
}
