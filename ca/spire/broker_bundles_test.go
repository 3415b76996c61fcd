package spire

import (
	"errors"
	"runtime"
	"slices"
	"testing"
	"time"

	brokerapi "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/ca/catest/spireagent"
)

// twoPods gives the agent two pods of one service account, of which the first
// federates with friend.example.
func twoPods(agent *spireagent.Agent) (a, b ca.WorkloadRef) {
	a, first := numbered(1)
	b, second := numbered(2)
	first.FederatesWith = []string{"friend.example"}
	agent.SetEntries(proxyEntry, first, second)
	agent.SetPods(webPod, spireagent.Pod{Namespace: "shop", Name: "web-2", UID: "uid-2"})
	return a, b
}

// TestFault_115_Isolation: the bundles of one workload never serve another (R49),
// though both have one identity.
func TestFault_115_Isolation(t *testing.T) {
	inBrokerBubble(t, "", func(t *testing.T, w *world) {
		friend := catest.NewCA(t, "friend.example")
		w.agent.Federate("friend.example", friend)
		wa, wb := twoPods(w.agent)
		a, b := watch(t, w.provider, wa), watch(t, w.provider, wb)
		pass(time.Minute)
		first, second := a.want(t, ca.Available).SVID, b.want(t, ca.Available).SVID
		if first.Cert.Leaf.Equal(second.Cert.Leaf) {
			t.Error("two pods share an SVID")
		}
		if w.provider.Key(wa) == w.provider.Key(wb) {
			t.Error("two pods share a key")
		}
		chain, _ := friend.Leaf(t, "spiffe://friend.example/ns/x/sa/y")
		judge := func(v *ca.SVID) error {
			_, err := ca.VerifySVID(chain, v.Bundles, ca.VerifyOptions{Usage: ca.Client})
			return err
		}
		if err := judge(first); err != nil {
			t.Errorf("the workload that federates: %v", err)
		}
		var refused *ca.VerifyError
		if err := judge(second); !errors.As(err, &refused) || refused.Rule != "R29" {
			t.Errorf("the other workload: got %v, want a refusal by R29", err)
		}

		events := b.count()
		w.agent.Federate("friend.example", friend, friend.Renewed(t))
		pass(0)
		if got := a.want(t, ca.Available).SVID.Bundles.Anchors(friend.TrustDomain); len(got) != 2 {
			t.Errorf("%d anchors of the friend after a change, want 2", len(got))
		}
		if b.count() != events {
			t.Error("the other workload heard of a bundle that is not its own")
		}

		// A bundle that cannot be read spoils one workload's message.
		w.agent.TamperBroker(func(m *brokerapi.SubscribeToX509SVIDResponse) {
			if len(m.GetFederatedBundles()) > 0 {
				m.FederatedBundles["spiffe://friend.example"] = []byte("garbage")
			}
		})
		w.agent.Renew()
		pass(0)
		if ev, _ := a.last(t); !errors.Is(ev.Err, ca.ErrRejected) {
			t.Errorf("got %v, want that the message was rejected", ev.Err)
		}
		if got := b.want(t, ca.Available).SVID; got.Cert == second.Cert {
			t.Error("the other workload was not renewed")
		}
	})
}

// TestBrokerWatchBundles: a workload of another provider gets the bundle of the
// agent's trust domain by a stream that names it, and no other way.
func TestBrokerWatchBundles(t *testing.T) {
	own := catest.TrustDomain("cluster.local")
	foreign := web
	foreign.ID = catest.ID("spiffe://elsewhere.example/ns/shop/sa/web")
	inBrokerBubble(t, "follows the agent", func(t *testing.T, w *world) {
		w.agent.Federate("friend.example", catest.NewCA(t, "friend.example"))
		updates := bundleUpdates(t, w.provider, foreign)
		pass(time.Minute)
		b := oneUpdate(t, updates)
		if len(b.Domains()) != 1 || len(b.Anchors(own)) != 1 || b.Anchors(own)[0].Mode != ca.Strict || b.Anchors(own)[0].Provider != "spire-broker" {
			t.Errorf("got %v of %v", b.Anchors(own), b.Domains())
		}
		requests := w.agent.Requests()
		if r := requests[len(requests)-1]; r.Method != spireagent.BrokerX509Bundles || r.UID != "uid-1" || r.Pod != "shop/web-1" {
			t.Errorf("the stream is %+v", r)
		}
		w.agent.Defederate("friend.example")
		w.agent.Renew()
		pass(time.Minute)
		noUpdate(t, updates)
		w.agent.PrepareRoot()
		pass(0)
		if b := oneUpdate(t, updates); len(b.Anchors(own)) != 2 {
			t.Errorf("%d anchors after a new root", len(b.Anchors(own)))
		}
		w.agent.EmptyBundle()
		pass(0)
		if b := oneUpdate(t, updates); !b.Has(own) || len(b.Anchors(own)) != 0 {
			t.Error("an empty bundle trusts somebody (R31)")
		}
	})
	inBrokerBubble(t, "outlasts a broken stream", func(t *testing.T, w *world) {
		updates := bundleUpdates(t, w.provider, foreign)
		pass(time.Minute)
		oneUpdate(t, updates)
		for _, err := range []error{nil, status.Error(codes.Unavailable, "bye"), status.Error(codes.PermissionDenied, `broker "x" is not configured`)} {
			w.agent.Cut(err)
			pass(time.Minute)
		}
		w.agent.Stop()
		pass(time.Hour)
		w.agent.Start()
		pass(time.Minute)
		noUpdate(t, updates)
	})
	inBrokerBubble(t, "goes with the pod", func(t *testing.T, w *world) {
		updates := bundleUpdates(t, w.provider, foreign)
		pass(time.Minute)
		oneUpdate(t, updates)
		w.agent.SetPods()
		pass(5*time.Second - 1)
		noUpdate(t, updates)
		pass(time.Second)
		if b := oneUpdate(t, updates); len(b.Domains()) != 0 {
			t.Errorf("got bundles of %v for a pod that is gone", b.Domains())
		}
		pass(time.Hour)
		noUpdate(t, updates)
		w.agent.SetPods(webPod)
		pass(36 * time.Second)
		if b := oneUpdate(t, updates); len(b.Anchors(own)) != 1 {
			t.Error("the bundle did not come back")
		}
	})
	inBrokerBubble(t, "of a pod that the agent does not know", func(t *testing.T, w *world) {
		w.agent.SetPods()
		updates := bundleUpdates(t, w.provider, foreign)
		pass(time.Minute)
		if b := oneUpdate(t, updates); len(b.Domains()) != 0 {
			t.Errorf("got bundles of %v for a pod that is none", b.Domains())
		}
		pass(time.Hour)
		noUpdate(t, updates)
	})
}

// TestBrokerMessages: what cannot be read, or lacks what is mandatory, is
// discarded (R43).
func TestBrokerMessages(t *testing.T) {
	for name, spoil := range map[string]func(*brokerapi.SubscribeToX509SVIDResponse){
		"no bundle":        func(m *brokerapi.SubscribeToX509SVIDResponse) { m.Svids[0].Bundle = nil },
		"no chain":         func(m *brokerapi.SubscribeToX509SVIDResponse) { m.Svids[0].X509Svid = nil },
		"no key":           func(m *brokerapi.SubscribeToX509SVIDResponse) { m.Svids[0].X509SvidKey = nil },
		"garbage as a key": func(m *brokerapi.SubscribeToX509SVIDResponse) { m.Svids[0].X509SvidKey = []byte("garbage") },
		"an upper-case trust domain": func(m *brokerapi.SubscribeToX509SVIDResponse) {
			m.FederatedBundles = map[string][]byte{"spiffe://Friend.example": m.Svids[0].Bundle}
		},
	} {
		inBrokerBubble(t, name, func(t *testing.T, w *world) {
			e := watch(t, w.provider, web)
			pass(time.Minute)
			first := e.want(t, ca.Available).SVID
			w.agent.TamperBroker(spoil)
			w.agent.Renew()
			pass(0)
			if ev, _ := e.last(t); ev.SVID != first || !errors.Is(ev.Err, ca.ErrRejected) {
				t.Fatalf("got %v, %v, want the first SVID and that a message was rejected", ev.SVID, ev.Err)
			}
			w.agent.TamperBroker(nil)
			pass(0)
			if next := e.want(t, ca.Available).SVID; next.Cert == first.Cert {
				t.Error("the next message was discarded, too")
			}
		})
	}
	inBrokerBubble(t, "own trust domain among the federated", func(t *testing.T, w *world) {
		stranger := catest.NewCA(t, "cluster.local")
		w.agent.TamperBroker(func(m *brokerapi.SubscribeToX509SVIDResponse) {
			m.FederatedBundles = map[string][]byte{"spiffe://cluster.local": stranger.Root.Raw}
		})
		e := watch(t, w.provider, web)
		pass(time.Minute)
		anchors := e.want(t, ca.Available).SVID.Bundles.Anchors(stranger.TrustDomain)
		if len(anchors) != 1 || anchors[0].Cert.Equal(stranger.Root) {
			t.Error("a federated bundle replaced, or joined, that of the own trust domain")
		}
	})
}

// TestBundleStore: equal bundles are parsed once, and forgotten with the last that
// holds them; what differs in any part is not equal.
func TestBundleStore(t *testing.T) {
	own, friend := catest.NewCA(t, "cluster.local"), catest.NewCA(t, "friend.example")
	s := newBundleStore("test")
	get := func(td spiffeid.TrustDomain, der []byte, federated map[string][]byte) *ca.Bundles {
		t.Helper()
		b, err := s.bundles(td, der, federated)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	all := []*ca.Bundles{
		get(own.TrustDomain, own.Root.Raw, nil),
		get(own.TrustDomain, own.Root.Raw, map[string][]byte{"spiffe://friend.example": friend.Root.Raw}),
		get(own.TrustDomain, own.Root.Raw, map[string][]byte{"spiffe://friend.example": nil}),
		get(own.TrustDomain, own.Root.Raw, map[string][]byte{"spiffe://other.example": friend.Root.Raw}),
		get(own.TrustDomain, friend.Root.Raw, nil),
		get(friend.TrustDomain, own.Root.Raw, nil),
	}
	for i, a := range all {
		for _, b := range all[:i] {
			if a.Equal(b) {
				t.Errorf("bundles %d equal earlier ones", i)
			}
		}
	}
	if get(own.TrustDomain, slices.Clone(own.Root.Raw), map[string][]byte{}) != all[0] {
		t.Error("equal bundles were parsed again")
	}
	if _, err := s.bundles(own.TrustDomain, own.Root.Raw, map[string][]byte{"spiffe://a": []byte("garbage")}); !errors.Is(err, ca.ErrRejected) {
		t.Errorf("garbage: %v", err)
	}
	runtime.KeepAlive(all)
	all = nil
	timeout := time.NewTimer(20 * time.Second)
	defer timeout.Stop()
	for {
		runtime.GC() // the cleanups run after it, on a goroutine of the runtime
		s.mu.Lock()
		n := len(s.known)
		s.mu.Unlock()
		if n == 0 {
			return
		}
		select {
		case <-timeout.C:
			t.Fatalf("%d bundles are known that nobody has", n)
		default:
			runtime.Gosched()
		}
	}
}

// TestFault_113_BrokerAnswerTooLate: an answer does not count that comes when the
// reference means somebody else, be it of SVIDs or of bundles.
func TestFault_113_BrokerAnswerTooLate(t *testing.T) {
	inBrokerBubble(t, "", func(t *testing.T, w *world) {
		pass(time.Second) // the proxy has its own SVID
		b := w.provider.(*broker)
		conn, err := b.endpoint.get(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		ref, err := b.reference(web)
		if err != nil {
			t.Fatal(err)
		}
		var guard error
		ref.guard = func() error { return guard }
		svids, err := b.openSVIDs(t.Context(), conn, web, ref)
		if err != nil {
			t.Fatal(err)
		}
		bundles, err := b.openBundles(t.Context(), conn, ref)
		if err != nil {
			t.Fatal(err)
		}
		guard = errEnded
		if a, err := svids(); !errors.Is(err, errEnded) {
			t.Errorf("SVIDs: got %v, %v, want that it has ended", a, err)
		}
		if got, err := bundles(); !errors.Is(err, errEnded) {
			t.Errorf("bundles: got %v, %v, want that it has ended", got, err)
		}
		if _, err := b.openBundles(t.Context(), conn, ref); !errors.Is(err, errEnded) {
			t.Errorf("a further request: %v", err)
		}
	})
}
