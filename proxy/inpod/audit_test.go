package inpod

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/state"
)

// knows tells the store of the workload of a pod.
func (w *world) knows(uid string, addrs ...string) {
	w.t.Helper()
	workload := &state.Workload{UID: "wds/" + uid, Name: uid, Namespace: "default", ServiceAccount: "sa-" + uid}
	for _, a := range addrs {
		workload.IPs = append(workload.IPs, netip.MustParseAddr(a))
	}
	if err := w.store.Apply(state.Update{Workloads: []state.WorkloadUpdate{{Workload: workload}}}); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) forgets(uid string) {
	w.t.Helper()
	if err := w.store.Apply(state.Update{Removed: []string{"wds/" + uid}}); err != nil {
		w.t.Fatal(err)
	}
}

// settle gives the audit the time that it takes between two looks.
func settle() {
	time.Sleep(2 * auditPause)
	synctest.Wait()
}

// verifyLocal asks as the proxy of a pod does.
func (w *world) verifyLocal(uid string) error {
	w.t.Helper()
	p := w.last(uid)
	workload, _ := w.store.Local(p.pod.Ref())
	return p.pod.Verify(w.t.Context(), workload)
}

// Decision D13, fault 122: a pod that is not the workload of its name gets no
// identity, until it is.
func TestFault_122_ForeignNamespace(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t)
		w.namespace("1").set("10.0.0.7", "fe80::1")
		accept(t, c.add("a", w.ns("1")), c.sent())
		if err := w.verifyLocal("a"); err != nil {
			t.Errorf("a pod that the control plane does not know: %v", err)
		}
		settle()
		w.knows("a", "10.0.0.8", "fd00::8")
		settle()
		w.wantStates("a failed")
		want := "workload wds/a has the addresses [10.0.0.8 fd00::8], the pod's network namespace [10.0.0.7 fe80::1]: it may be that of another pod"
		if s := w.m.Snapshot()[0]; s.Reason != want {
			t.Errorf("reason: got %q, want %q", s.Reason, want)
		}
		if err := w.verifyLocal("a"); err == nil || err.Error() != want {
			t.Errorf("Verify: got %v, want %q", err, want)
		}
		since := w.m.Snapshot()[0].Since
		time.Sleep(5 * auditSoon)
		if got := w.m.Snapshot()[0].Since; got != since {
			t.Errorf("failed since %v, then since %v", since, got)
		}
		w.wantReady("")
		w.wantCounts(1, 0, 2, 1) // another proxy runs: the first one may have acted with the identity
		if cause := w.proxies("a")[0].cutBy(); cause == nil || !strings.Contains(cause.Error(), want) {
			t.Errorf("the first proxy was cut by %v, want %q", cause, want)
		}
		if got := w.value("workload_manager_pods", "failed"); got != 1 {
			t.Errorf("failed pods: got %v, want 1", got)
		}
		// The address comes later: a second, and it is known.
		w.namespace("1").set("10.0.0.7", "fd00::8")
		time.Sleep(auditSoon + auditPause)
		w.wantStates("a active")
		if err := w.verifyLocal("a"); err != nil {
			t.Errorf("any address will do: %v", err)
		}
		// Another object, another look.
		w.knows("a", "10.9.9.9")
		settle()
		w.wantStates("a failed")
		w.knows("a")
		settle()
		w.wantStates("a active")
		if err := w.verifyLocal("a"); err != nil {
			t.Errorf("a workload without addresses: %v", err)
		}
		w.knows("a", "10.9.9.9")
		settle()
		w.forgets("a")
		settle()
		w.wantStates("a active")
		if n := strings.Count(w.log.String(), "a pod gets no identity"); n != 3 {
			t.Errorf("%d warnings, want 3", n)
		}
	})
}

// The pod whose workload lives elsewhere gives way to one that may be the right one,
// and they do not take turns.
func TestFault_122_NamespaceGivenBack(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t)
		w.shared = true
		w.namespace("1").set("10.0.0.7")
		w.knows("wrong", "10.0.0.8")
		accept(t, c.add("wrong", w.ns("1")), c.sent())
		time.Sleep(auditSoon)
		accept(t, c.add("right", w.ns("1")))
		w.knows("right", "10.0.0.7")
		time.Sleep(time.Minute)
		w.wantStates("right active, wrong failed")
		if n := len(w.proxies("right")); n != 1 {
			t.Errorf("%d proxies of the right pod, want 1", n)
		}
		if r := w.m.Snapshot()[1].Reason; r != "its network namespace is that of pod default/right, UID right" {
			t.Errorf("reason: %q", r)
		}
		// Now neither is the pod: the one that is there stays, and serves nobody.
		w.namespace("1").set("10.0.0.9")
		time.Sleep(auditEvery + 2*retryEvery)
		if n := len(w.proxies("right")); n != 2 { // it has started anew
			t.Errorf("%d proxies of the right pod, want 2", n)
		}
		w.wantStates("right failed, wrong failed")
	})
}

// Addresses that cannot be told are none.
func TestVerifyFailsClosed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t)
		w.knows("a", "10.0.0.8")
		n := w.namespace("1")
		n.err = errors.New("no such process")
		accept(t, c.add("a", w.ns("1")))
		settle()
		w.wantStates("a failed")
		if err := w.verifyLocal("a"); err == nil || !strings.Contains(err.Error(), "no such process") {
			t.Errorf("Verify: got %v", err)
		}
	})
}

// That the addresses of a pod cannot be told for a moment, for want of descriptors
// say, ends nothing that is open.
func TestAddressesUnknownForAMoment(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t)
		w.knows("a", "10.0.0.7")
		w.namespace("1").set("10.0.0.7")
		accept(t, c.add("a", w.ns("1")), c.sent())
		settle()
		n := w.namespace("1")
		n.mu.Lock()
		n.err = errors.New("too many open files")
		n.mu.Unlock()
		time.Sleep(2 * auditEvery)
		w.wantStates("a failed")
		if cause := w.last("a").cutBy(); cause != nil {
			t.Errorf("the proxy was cut: %v", cause)
		}
		w.wantCounts(1, 0, 1, 0)
		n.mu.Lock()
		n.err = nil
		n.mu.Unlock()
		time.Sleep(auditSoon + auditPause)
		w.wantStates("a active")
	})
}

// Fault 95: a pod whose ports another program shares is not served.
func TestFault_095_SharedPort(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t)
		w.shared = true
		accept(t, c.add("a", w.ns("1")), c.sent())
		settle()
		w.wantStates("a active")
		p := w.last("a")
		p.mu.Lock()
		p.broken = fmt.Errorf("inbound listener: %w: pid 7 (nginx) at [::]:15008", netns.ErrShared)
		p.mu.Unlock()
		time.Sleep(auditEvery + auditPause)
		w.wantStates("a failed")
		if got, want := w.m.Snapshot()[0].Reason, p.broken.Error(); got != want {
			t.Errorf("reason: got %q, want %q", got, want)
		}
		time.Sleep(retryEvery)
		w.wantStates("a active") // it has gone
		w.wantReady("")
	})
}

// Before the gate nobody is looked at: the control plane has told nothing yet.
func TestNoAuditBeforeTheGate(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t)
		w.run()
		c := w.conn()
		w.knows("a", "10.0.0.8")
		w.namespace("dead").dead = true
		accept(t, c.add("a", w.ns("1")), c.add("unknown", w.ns("dead")), c.sent())
		time.Sleep(10 * auditEvery)
		w.wantStates("a starting, unknown starting")
		w.m.Open()
		settle()
		w.wantStates("a failed, unknown active")
		accept(t, c.del("unknown"))
		w.namespace("1").set("10.0.0.8")
		time.Sleep(auditSoon + auditPause)
		w.wantStates("a active")
	})
}

// users.md 19: a listener that is gone comes back.
func TestVanishedListener(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t)
		accept(t, c.add("a", w.ns("1")), c.add("b", w.ns("2")), c.sent())
		p := w.last("a")
		p.mu.Lock()
		p.broken = errors.New("inbound listener: the socket listens no more")
		p.mu.Unlock()
		time.Sleep(auditEvery)
		w.wantStates("a active, b active")
		w.wantReady("")
		w.wantCounts(2, 0, 3, 1)
		if len(w.proxies("a")) != 2 || len(w.proxies("b")) != 1 {
			t.Errorf("%d and %d proxies, want 2 and 1", len(w.proxies("a")), len(w.proxies("b")))
		}
		var again *restartError
		if err := p.cutBy(); !errors.As(err, &again) {
			t.Errorf("cut by %v", err)
		}
		time.Sleep(10 * auditEvery)
		w.wantCounts(2, 0, 3, 1)
	})
}

// A proxy that ends by itself is started again after the pause.
func TestProxyEndsByItself(t *testing.T) {
	for name, failure := range map[string]error{"the proxy has ended by itself": nil, "serve: out of order": errors.New("out of order")} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := newWorld(t)
				w.m.cfg.New = func(pod Pod) (Proxy, error) {
					p, err := w.newProxy(pod)
					return &endingProxy{p.(*fakeProxy), failure}, err
				}
				w.m.Open()
				w.run()
				c := w.conn()
				accept(t, c.sent(), c.add("a", w.ns("1")))
				w.wantStates("a active")
				w.last("a").Drain() // nobody of us
				w.wantStates("a failed")
				if s := w.m.Snapshot()[0]; s.Reason != name {
					t.Errorf("reason: got %q, want %q", s.Reason, name)
				}
				w.wantCounts(0, 1, 1, 1)
				time.Sleep(retryEvery)
				w.wantStates("a active")
				w.wantCounts(1, 0, 2, 1)
			})
		})
	}
}

type endingProxy struct {
	*fakeProxy
	err error
}

func (p *endingProxy) Run(ctx context.Context) error {
	_ = p.fakeProxy.Run(ctx)
	return p.err
}

// Cilium §1.7: a deletion that the agent could not tell us of.
func TestDeadNamespaceIsReaped(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t)
		for _, uid := range []string{"dead", "known", "alive", "failed"} {
			w.namespace(uid).dead = uid != "alive"
		}
		w.fail("failed", errors.New("no such device"))
		w.knows("known")
		accept(t, c.add("dead", w.ns("dead")), c.add("known", w.ns("known")), c.add("alive", w.ns("alive")))
		c.add("failed", w.ns("failed"))
		accept(t, c.sent())
		time.Sleep(auditEvery - time.Second)
		w.wantStates("alive active, dead active, failed failed, known active")
		time.Sleep(auditEvery + time.Second)
		w.wantStates("alive active, known active")
		if !strings.Contains(w.log.String(), "removed a pod of which the node agent has not said that it is gone") {
			t.Error("no warning")
		}
		if err := w.last("dead").cutBy(); !errors.Is(err, errDead) {
			t.Errorf("cut by %v, want %v", err, errDead)
		}
		w.wantReady("")
		if open := openFiles(t, w.dir); len(open) != 2 {
			t.Errorf("open namespaces: %v, want two", open)
		}
		w.forgets("known")
		time.Sleep(auditEvery - 2*time.Second)
		w.namespace("new").dead = true // an agent may add it before it has its interface
		accept(t, c.add("new", w.ns("new")))
		time.Sleep(2 * time.Second)
		w.wantStates("alive active, new active")
		time.Sleep(auditEvery)
		w.wantStates("alive active")
		accept(t, c.del("known"))
	})
}

// A panic stays with what it has happened in (design D21).
func TestPanics(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t)
		accept(t, c.add("good", w.ns("good")), c.sent())
		w.hostile["a"] = func(context.Context) error { panic("in Bind") }
		if got, want := c.add("a", w.ns("1")), "failure to start proxy : start: panic: in Bind"; got != want {
			t.Errorf("answer: got %q, want %q", got, want)
		}
		w.wantStates("a failed, good active")
	})
}

// One in our own handling of a message costs the connection.
func TestPanicInMessage(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t)
		once := true
		w.m.log = slog.New(panicking{w.m.log.Handler(), func(message string) bool {
			hit := once && message == "the node agent has told of all pods"
			once = once && !hit
			return hit
		}})
		w.m.Open()
		w.run()
		c := w.conn()
		accept(t, c.add("a", w.ns("1")))
		if got, want := c.sent(), "failure to process message : message of the node agent: panic: in the log"; got != want {
			t.Errorf("answer: got %q, want %q", got, want)
		}
		c = w.conn()
		accept(t, c.keep("a"), c.sent())
		w.wantStates("a active")
		w.wantReady("")
		if got := w.value("workload_manager_panics_total"); got != 1 {
			t.Errorf("panics: got %v, want 1", got)
		}
	})
}

// panicking is a log that does so at some messages.
type panicking struct {
	slog.Handler
	at func(message string) bool
}

func (h panicking) Handle(ctx context.Context, r slog.Record) error {
	if h.at(r.Message) {
		panic("in the log")
	}
	return h.Handler.Handle(ctx, r)
}
