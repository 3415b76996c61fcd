package inpod

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// Each step has its reason, until nothing is missing any more.
func TestReadinessHasReasons(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t)
		w.refuse = errors.New("no such file or directory")
		w.run()
		w.wantReady("not connected to the node agent at /var/run/ztunnel/ztunnel.sock: no such file or directory")
		w.mu.Lock()
		w.refuse = nil
		w.mu.Unlock()
		time.Sleep(time.Second)
		c := w.conn()
		accept(t, c.add("a", w.ns("1")))
		w.wantReady("waiting for the ZDS snapshot since 2000-01-01T00:00:00Z")
		accept(t, c.sent())
		w.wantReady("waiting for the first answer of the control plane")
		w.wantStates("a starting")
		if settled := w.last("a").pod.Settled; isClosed(settled) {
			t.Error("settled before the node is ready")
		}
		w.m.Open()
		w.wantReady("")
		if settled := w.last("a").pod.Settled; !isClosed(settled) {
			t.Error("ready, and not settled")
		}
		w.wantStates("a active")
		accept(t, c.add("b", w.ns("2")), c.del("a"))
		w.wantReady("")
		w.m.Drain()
		<-w.ended
		w.wantReady("draining")
		// The reasons in their order, each once.
		want := []string{
			"not connected to the node agent at /var/run/ztunnel/ztunnel.sock: no attempt yet",
			"not connected to the node agent at /var/run/ztunnel/ztunnel.sock: no such file or directory",
			"waiting for the ZDS snapshot since 2000-01-01T00:00:00Z",
			"waiting for the first answer of the control plane: until then the pods' ports are taken and nobody listens",
			"1 of 1 pods not tried: default/a starting: it has its ports and listens as soon as the control plane has answered",
			"", "draining",
		}
		if diff := cmp.Diff(want, w.ready); diff != "" {
			t.Errorf("reasons (-want +got):\n%s", diff)
		}
	})
}

// Fault 121, P10: a pod that fails holds readiness until its first retry, and
// then it shows as failed and blocks nothing.
func TestFault_121_BadPodBlocksNothing(t *testing.T) {
	for _, nack := range []NACK{NACKAlways, NACKNever} {
		t.Run(fmt.Sprint(nack), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w, c := start(t, func(cfg *Config) { cfg.NACK = nack })
				w.fail("uid007", errors.New("no such device"))
				for i := range 100 {
					uid := fmt.Sprintf("uid%03d", i)
					refused := c.add(uid, w.ns(uid)) != ""
					if want := i == 7 && nack == NACKAlways; refused != want {
						t.Errorf("%s: refused is %v, want %v", uid, refused, want)
					}
				}
				accept(t, c.sent())
				w.wantReady("1 of 100 pods not tried: default/uid007 failed: no such device")
				w.wantCounts(99, 1, 99, 0)
				time.Sleep(retryEvery - time.Nanosecond)
				w.wantReady("1 of 100 pods not tried: default/uid007 failed: no such device")
				time.Sleep(time.Nanosecond)
				w.wantReady("")
				i := slices.IndexFunc(w.m.Snapshot(), func(s PodStatus) bool { return s.State == Failed })
				if s := w.m.Snapshot()[i]; s.UID != "uid007" || s.Reason != "no such device" || s.Retries != 2 {
					t.Errorf("got %+v, want uid007 with its reason, tried twice", s)
				}
				// With the next connection it is no news.
				c.eof()
				c = w.conn()
				for i := range 100 {
					uid := fmt.Sprintf("uid%03d", i)
					c.add(uid, w.ns(uid))
				}
				accept(t, c.sent())
				w.wantReady("")
				w.wantCounts(99, 1, 99, 0)
			})
		})
	}
}

// A pod that is added later and fails has nothing to do with readiness.
func TestLaterPodBlocksNothing(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t)
		accept(t, c.sent())
		w.fail("a", errors.New("no such device"))
		if c.add("a", w.ns("1")) == "" {
			t.Error("accepted")
		}
		w.wantReady("")
		w.wantCounts(0, 1, 0, 0)
	})
}

// One whose start never ends is not waited for for ever either, and keeps no
// other pod from starting, nor the agent waiting.
func TestHangingPodBlocksNothing(t *testing.T) {
	for _, opened := range []bool{false, true} {
		t.Run(fmt.Sprint(opened), func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := newWorld(t)
				if opened {
					w.m.Open()
				}
				w.run()
				c := w.conn()
				hang := make(chan struct{})
				for i := range 20 {
					w.hostile[fmt.Sprint("bad", i)] = func(context.Context) error { <-hang; return errors.New("late") }
				}
				for i := range 20 {
					began := time.Now()
					if got, want := c.add(fmt.Sprint("bad", i), w.ns(fmt.Sprint("bad", i))), "failure to start proxy : not done within 800ms"; got != want {
						t.Errorf("answer: got %q, want %q", got, want)
					}
					if took := time.Since(began); took >= time.Second {
						t.Errorf("answered after %v", took)
					}
				}
				began := time.Now()
				accept(t, c.add("good", w.ns("good")))
				if took := time.Since(began); took > 2*startPatience {
					t.Errorf("a pod beside those that hang took %v", took)
				}
				accept(t, c.sent())
				w.m.Open()
				time.Sleep(2 * startPatience)
				w.wantReady("20 of 21 pods not tried: default/bad0 starting")
				time.Sleep(holdMax + auditSoon)
				w.wantReady("")
				w.wantCounts(1, 0, 1, 0)
				close(hang)
				w.wantCounts(1, 20, 1, 0)
			})
		})
	}
}

// In the mode for Cilium the agent is not told, and the pod is tried again.
func TestID_NackNever(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t, func(cfg *Config) { cfg.Path = "/var/run/cilium/ztunnel.sock" })
		free := w.occupy("1")
		accept(t, c.sent(), c.add("a", w.ns("1")))
		w.wantStates("a failed")
		if got := w.value("workload_manager_zds_nacks_total", "start"); got != 0 {
			t.Errorf("nacks: got %v, want none", got)
		}
		free()
		time.Sleep(retryEvery)
		w.wantStates("a active")
		// A breach of the protocol is refused all the same.
		if got := c.sent(); got != "failure to process message : pod snapshot received already" {
			t.Errorf("answer: got %q", got)
		}
		w.wantProtocolError("pod snapshot received already")
	})
}

func TestNACKAuto(t *testing.T) {
	for path, want := range map[string]NACK{
		"/var/run/cilium/ztunnel.sock":            NACKNever,
		"/run/cilium/ztunnel.sock":                NACKNever,
		"/var/run//cilium/./sub/ztunnel.sock":     NACKNever,
		"/var/run/ztunnel/ztunnel.sock":           NACKAlways,
		"/var/run/cilium-like/ztunnel.sock":       NACKAlways,
		"/var/run/cilium/../ztunnel/ztunnel.sock": NACKAlways,
		"var/run/cilium/ztunnel.sock":             NACKAlways,
	} {
		w := newWorld(t, func(cfg *Config) { cfg.Path = path })
		if got := w.m.cfg.NACK; got != want {
			t.Errorf("%s: got %d, want %d", path, got, want)
		}
	}
	w := newWorld(t, func(cfg *Config) { cfg.Path, cfg.NACK = "/run/cilium/z", NACKAlways })
	if got := w.m.cfg.NACK; got != NACKAlways {
		t.Errorf("explicit: got %d, want always", got)
	}
}

func TestNewChecks(t *testing.T) {
	good := newWorld(t).m.cfg
	for name, change := range map[string]func(*Config){
		"no path":    func(c *Config) { c.Path = "" },
		"no network": func(c *Config) { c.Network = nil },
		"no proxy":   func(c *Config) { c.New = nil },
		"no store":   func(c *Config) { c.Store = nil },
		"nack":       func(c *Config) { c.NACK = 3 },
	} {
		cfg := good
		change(&cfg)
		if _, err := New(cfg); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	least := Config{Path: "/x", Network: good.Network, New: good.New, Store: good.Store}
	if _, err := New(least); err != nil {
		t.Errorf("what is required only: %v", err)
	}
}

// Decision D13: until the gate opens the ports are taken and nobody listens; then
// all pods do.
func TestOpenListensEverywhere(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t)
		w.run()
		c := w.conn()
		uids := []string{"a", "b", "c"}
		for _, uid := range uids {
			accept(t, c.add(uid, w.ns(uid)))
		}
		accept(t, c.sent())
		time.Sleep(time.Hour)
		synctest.Wait()
		for _, uid := range uids {
			if w.last(uid).isListening() {
				t.Errorf("%s listens", uid)
			}
		}
		w.wantStates("a starting, b starting, c starting")
		w.wantCounts(0, 0, 0, 0)
		w.m.Open()
		w.m.Open()
		synctest.Wait()
		for _, uid := range uids {
			if !w.last(uid).isListening() || len(w.proxies(uid)) != 1 {
				t.Errorf("%s does not listen, or was started more than once", uid)
			}
		}
		accept(t, c.add("d", w.ns("d")))
		if !w.last("d").isListening() {
			t.Error("one that was added later does not listen when that is answered")
		}
		w.wantCounts(4, 0, 4, 0)
	})
}

// A pod whose ports were taken in vain before the gate goes the same way.
func TestRetryBeforeTheGate(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t)
		w.run()
		c := w.conn()
		free := w.occupy("1")
		if c.add("a", w.ns("1")) == "" {
			t.Error("accepted")
		}
		accept(t, c.sent())
		w.wantStates("a failed")
		free()
		time.Sleep(retryEvery)
		w.wantStates("a starting")
		w.wantCounts(0, 0, 0, 0)
		w.m.Open()
		w.wantStates("a active")
		w.wantReady("")
	})
}

// One that is deleted while it waits for the gate gives its ports up.
func TestDeletedBeforeTheGate(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t)
		w.run()
		c := w.conn()
		accept(t, c.sent(), c.add("a", w.ns("1")), c.del("a"))
		w.wantStates("")
		w.mu.Lock()
		if n := len(w.holders[w.last0("a").ns]); n != 0 {
			t.Errorf("%d proxies hold the ports", n)
		}
		w.mu.Unlock()
		w.wantCounts(0, 0, 0, 0)
	})
}

// last0 is last for who has the lock.
func (w *world) last0(uid string) *fakeProxy { return w.made[uid][len(w.made[uid])-1] }

// However many pods wait for the gate, few are at work in their namespaces at a
// time.
func TestStartsAreFew(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t)
		var now, most atomic.Int32
		w.m.cfg.New = func(pod Pod) (Proxy, error) {
			p, err := w.newProxy(pod)
			return &listeningProxy{p.(*fakeProxy), func() {
				most.Store(max(most.Load(), now.Add(1)))
				time.Sleep(10 * time.Millisecond)
				now.Add(-1)
			}}, err
		}
		w.run()
		c := w.conn()
		for i := range 100 {
			accept(t, c.add(fmt.Sprint(i), w.ns(fmt.Sprint(i))))
		}
		accept(t, c.sent())
		began := time.Now()
		w.m.Open()
		n := cap(w.m.starts.tokens)
		time.Sleep(time.Duration((100+n-1)/n) * 10 * time.Millisecond)
		w.wantReady("")
		w.wantCounts(100, 0, 100, 0)
		if got := int(most.Load()); got != n {
			t.Errorf("%d at a time, want %d", got, n)
		}
		if took := time.Since(began); took < startPatience {
			t.Errorf("took %v: the test means to outlast the patience", took)
		}
	})
}

type listeningProxy struct {
	*fakeProxy
	listen func()
}

func (p *listeningProxy) Listen(ctx context.Context) error {
	p.listen()
	return p.fakeProxy.Listen(ctx)
}

// A pod of the snapshot whose Listen hangs is waited for, and not for ever; that it
// was added again changes nothing.
func TestHangingListen(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t)
		hang := make(chan struct{})
		w.m.cfg.New = func(pod Pod) (Proxy, error) {
			p, err := w.newProxy(pod)
			return &listeningProxy{p.(*fakeProxy), func() { <-hang }}, err
		}
		w.run()
		c := w.conn()
		accept(t, c.add("a", w.ns("1")), c.sent(), c.add("a", w.ns("1")))
		time.Sleep(time.Hour)
		w.m.Open()
		w.wantReady("1 of 1 pods not tried: default/a starting")
		time.Sleep(holdMax - time.Second)
		w.wantReady("1 of 1 pods not tried: default/a starting")
		time.Sleep(2 * time.Second)
		w.wantReady("")
		close(hang)
		w.wantStates("a failed")
		time.Sleep(retryEvery)
		w.wantStates("a active")
	})
}

// Those that wait while nothing moves do not all go on at once.
func TestStartsGoOnOneByOne(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := newStarts(2)
		stuck := []func(){s.begin(t.Context()), s.begin(t.Context())}
		var now, most atomic.Int32
		var all sync.WaitGroup
		began := time.Now()
		for range 10 {
			all.Go(func() {
				defer s.begin(t.Context())()
				most.Store(max(most.Load(), now.Add(1)))
				time.Sleep(startPatience / 2)
				now.Add(-1)
			})
		}
		all.Wait()
		if got := most.Load(); got != 1 {
			t.Errorf("%d at a time beside those that are stuck, want 1", got)
		}
		if took, want := time.Since(began), startPatience+10*startPatience/2; took != want {
			t.Errorf("took %v, want %v", took, want)
		}
		for _, end := range stuck {
			end()
		}
		if n := len(s.tokens); n != 2 {
			t.Errorf("%d may start at a time, want 2", n)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		for range 5 {
			s.begin(ctx) // does not wait, whether it gets its turn or not
		}
	})
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
