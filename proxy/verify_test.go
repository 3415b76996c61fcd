package proxy

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/state"
)

// inspector is a Verify whose answer a test sets.
type inspector struct {
	mu    sync.Mutex // guards all
	err   error
	asked int
	about *state.Workload
}

func (i *inspector) set(err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.err = err
}

func (i *inspector) verify(_ context.Context, w *state.Workload) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.asked++
	i.about = w
	return i.err
}

func (i *inspector) wantAsked(t *testing.T, want int) {
	t.Helper()
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.asked != want {
		t.Errorf("asked %d times, want %d", i.asked, want)
	}
	i.asked = 0
}

var errForeign = errors.New("10.0.2.2 is not an address of the pod's network namespace")

// D13: the identity of a workload whose address is not in the pod's namespace is
// not used, in any role; the log says why. An error holds for a second, a good
// answer until the workload changes.
func TestVerify(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		other := m.add("other", "10.0.1.2")
		bare := m.add("bare", "10.0.3.2", uncaptured)
		var check inspector
		pod := m.add("pod", "10.0.2.2", withConfig(func(c *Config) { c.Verify = check.verify }))
		check.set(errForeign)
		const text = "identity spiffe://cluster.local/ns/default/sa/pod is not used: 10.0.2.2 is not an address of the pod's network namespace"
		for _, tt := range []struct {
			name     string
			from, to *node
			line     map[string]string
		}{
			{"outbound, HBONE", pod, other, map[string]string{"direction": "outbound", "dst.addr": "10.0.1.2:8080"}},
			{"outbound, plaintext", pod, bare, map[string]string{"direction": "outbound", "dst.addr": "10.0.3.2:8080"}},
			{"inbound, HBONE", other, pod, map[string]string{"direction": "inbound", "dst.addr": "10.0.2.2:15008"}},
			{"inbound, plaintext", bare, pod, map[string]string{"direction": "inbound", "dst.addr": "10.0.2.2:8080"}},
		} {
			if err := tt.from.request(tt.to.echoAddr(), "x"); err == nil {
				t.Errorf("%s: it succeeded", tt.name)
			}
			tt.line["scope"], tt.line["message"], tt.line["level"], tt.line["error"] = "access", "connection failed", "warn", text
			pod.wantLog(tt.line)
		}
		check.wantAsked(t, 1) // no time has passed
		pod.wantMetric(2, "istio_tcp_connections_rejected", map[string]string{"reporter": "source", "reason": "unverified_workload"})
		pod.wantMetric(2, "istio_tcp_connections_rejected", map[string]string{"reporter": "destination", "reason": "unverified_workload"})
		if check.about != mustLocal(t, pod) {
			t.Errorf("asked about %v", check.about)
		}

		check.set(nil) // the address has come
		if err := pod.request(other.echoAddr(), "x"); err == nil {
			t.Error("the refusal is forgotten at once")
		}
		time.Sleep(verifyAgain)
		for range 3 {
			if err := errors.Join(pod.request(other.echoAddr(), "x"), other.request(pod.echoAddr(), "x"), bare.request(pod.echoAddr(), "x")); err != nil {
				t.Error(err)
			}
		}
		check.wantAsked(t, 1)

		check.set(errForeign) // nobody looks, until the workload is another one
		if err := pod.request(other.echoAddr(), "x"); err != nil {
			t.Error(err)
		}
		pod.w.CanonicalRevision = "v2"
		m.push()
		if err := pod.request(other.echoAddr(), "x"); err == nil {
			t.Error("another object of the store is believed unseen")
		}
		if err := other.request(pod.echoAddr(), "x"); err == nil {
			t.Error("a request over a tunnel that was there succeeded")
		}
		check.wantAsked(t, 1)
	})
}

func mustLocal(t *testing.T, n *node) *state.Workload {
	t.Helper()
	w, ok := n.store.Local(n.proxy.cfg.Local)
	if !ok {
		t.Fatalf("the store does not know %s", n.w.Name)
	}
	return w
}

// A workload without addresses is not asked about, the stand-in of D22 among them.
func TestVerifyWithoutAddress(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		var check inspector
		check.set(errForeign)
		client, arrive := m.late("client", "10.0.1.2", withConfig(func(c *Config) { c.Verify = check.verify }))
		server := m.add("server", "10.0.2.2")
		if err := client.request(server.echoAddr(), "x"); err != nil {
			t.Error(err)
		}
		check.wantAsked(t, 0)
		arrive()
		if err := client.request(server.echoAddr(), "x"); err == nil {
			t.Error("the real one is believed unseen")
		}
		check.wantAsked(t, 1)
	})
}

// One asks at a time, and the others have its answer; who gives up says nothing
// about the workload; and a question that takes for ever is a refusal.
func TestVerifyIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var asked atomic.Int64
		v := verifier{turn: make(chan struct{}, 1), ask: func(ctx context.Context, _ *state.Workload) error {
			asked.Add(1)
			<-ctx.Done()
			return ctx.Err()
		}}
		w := &state.Workload{IPs: []netip.Addr{podAddr}}
		gone, leave := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Second, func() { leave(errClientReset) })
		begin := time.Now()
		if err := v.verify(gone, w); !errors.Is(err, errClientReset) || time.Since(begin) != time.Second {
			t.Errorf("got %v after %v, want %v after 1s", err, time.Since(begin), errClientReset)
		}
		var parts sync.WaitGroup
		for range 5 {
			parts.Go(func() {
				var refused *unverifiedError
				if err := v.verify(t.Context(), w); !errors.As(err, &refused) || !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("got %v", err)
				}
				if d := time.Since(begin); d != time.Second+verifyWait {
					t.Errorf("answered after %v", d)
				}
			})
		}
		parts.Wait()
		if n := asked.Load(); n != 2 {
			t.Errorf("asked %d times, want 2", n)
		}
	})
}

// A good answer costs nothing afterwards.
func TestVerifyDoesNotAllocate(t *testing.T) {
	v := verifier{turn: make(chan struct{}, 1), ask: func(context.Context, *state.Workload) error { return nil }}
	w := &state.Workload{IPs: []netip.Addr{podAddr}}
	if n := testing.AllocsPerRun(100, func() { _ = v.verify(t.Context(), w) }); n != 0 {
		t.Errorf("%v allocations, want none", n)
	}
}

// prefetching makes a node whose provider issues per pod, and so stops the moment
// that the lease is released.
func (m *mesh) prefetching(name, addr string, options ...nodeOption) (*node, func(want ...string)) {
	m.t.Helper()
	provider := catest.NewPerWorkload("test")
	n := m.add(name, addr, append(options, withConfig(func(c *Config) { c.Prefetch, c.PodUID = true, "uid-"+name }),
		func(p *nodeParts) { p.provider = provider })...)
	return n, func(want ...string) {
		m.t.Helper()
		synctest.Wait()
		var got []string
		for key, n := range provider.Watches() {
			if n > 0 && key.UID == "uid-"+name {
				got = append(got, key.ID.Path())
			}
		}
		if !slices.Equal(got, want) {
			m.t.Errorf("%s: certificates of %q, want %q", name, got, want)
		}
	}
}

// The certificate is acquired when Run begins, follows the workload, and is given
// back with the pod (the in-pod spec §1.10, D16).
func TestPrefetch(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		known, want := m.prefetching("known", "10.0.1.2")
		want("/ns/default/sa/known")
		if err := known.store.Apply(state.Update{Removed: []string{known.w.UID}}); err != nil {
			t.Fatal(err)
		}
		want("/ns/default/sa/known") // the store may have lost it for a moment

		later, want := m.prefetching("later", "10.0.2.2", withConfig(func(c *Config) { c.Local.Name = "late" }),
			withWorkload(func(w *state.Workload) { w.TrustDomain = "old.test" }))
		want("/ns/default/sa/later") // by what ZDS says
		later.w.Name = "late"
		m.push()
		want("/ns/default/sa/later")
		if id := later.proxy.identity.current().Ref().ID; id != mustLocal(t, later).Identity || id.TrustDomain().Name() != "old.test" {
			t.Errorf("the lease is that of %s", id)
		}
		for _, change := range []state.Update{{Removed: []string{later.w.UID}}, {Policies: []*state.Policy{denyPort(1)}}} {
			if err := later.store.Apply(change); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		if td := later.proxy.identity.current().Ref().ID.TrustDomain().Name(); td != "old.test" {
			t.Errorf("lost by the store for a moment, it is that of %s", td)
		}
		later.stop(nil)
		if lease := later.proxy.identity.current(); lease != nil {
			t.Errorf("after the end of the pod it still has %v", lease.Ref())
		}
	})
}

// Nobody is asked for a certificate before there is time, but for a connection.
func TestPrefetchAfter(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		settled := make(chan struct{})
		after := withConfig(func(c *Config) { c.PrefetchAfter = settled })
		busy, wantBusy := m.prefetching("busy", "10.0.1.2", after)
		_, wantIdle := m.prefetching("idle", "10.0.2.2", after)
		wantBusy()
		wantIdle()
		m.push() // a change of the state is no reason
		wantIdle()
		_, _ = busy.proxy.svid(t.Context(), mustLocal(t, busy)) // the provider is asked, and issues nothing
		wantBusy("/ns/default/sa/busy")
		wantIdle()
		close(settled)
		wantBusy("/ns/default/sa/busy")
		wantIdle("/ns/default/sa/idle")
	})
}

// A workload that is not captured is not asked for, until a connection needs it
// (spec/state-xds-dns.md §4.2).
func TestPrefetchOfUncaptured(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		plain := withWorkload(func(w *state.Workload) { w.Protocol = state.TCP })
		_, want := m.prefetching("plain", "10.0.1.2", plain)
		want()
		_, want = m.prefetching("native", "10.0.2.2", plain, withWorkload(func(w *state.Workload) { w.NativeTunnel = true }))
		want("/ns/default/sa/native")

		later, want := m.prefetching("later", "10.0.3.2", plain, withConfig(func(c *Config) { c.Local.Name = "late" }))
		want("/ns/default/sa/later") // nobody knows better
		later.w.Name = "late"
		m.push()
		want()
		server := m.add("server", "10.0.4.2")
		c := later.mustDial(server.echoAddr())
		want("/ns/default/sa/later")
		c.Close()
		m.push() // nothing of it changes
		want("/ns/default/sa/later")
		later.w.Protocol = state.HBONE
		m.push()
		want("/ns/default/sa/later")
	})
}
