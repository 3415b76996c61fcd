package spire

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/ca/catest/spireagent"
)

// domains are the names of the trust domains that an SVID trusts.
func domains(v *ca.SVID) (names []string) {
	for _, td := range v.Bundles.Domains() {
		names = append(names, td.Name())
	}
	return names
}

func equalNames(got []string, want ...string) bool { return slices.Equal(got, want) }

// TestFederationPerWorkload: a workload trusts the trust domains that its own
// entry federates with, and no others that the agent knows (R29, R30, design D2).
func TestFederationPerWorkload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w1, e1 := numbered(1)
		w2, e2 := numbered(2)
		e1.FederatesWith = []string{"friend.example", "unknown.example"}
		w := newWorld(t, DelegatedConfig{}, e1, e2)
		friend, other := catest.NewCA(t, "friend.example"), catest.NewCA(t, "other.example")
		w.agent.Federate("friend.example", friend)
		w.agent.Federate("other.example", other)
		granted, plain := watch(t, w.provider, w1), watch(t, w.provider, w2)
		pass(time.Minute)
		a, b := granted.want(t, ca.Available).SVID, plain.want(t, ca.Available).SVID
		if got := domains(a); !equalNames(got, "cluster.local", "friend.example") {
			t.Errorf("the workload that federates trusts %q", got)
		}
		if got := domains(b); !equalNames(got, "cluster.local") {
			t.Errorf("the other workload trusts %q", got)
		}

		peerOf := func(c *catest.CA) func(*ca.SVID) error {
			chain, _ := c.Leaf(t, "spiffe://"+c.TrustDomain.Name()+"/ns/x/sa/y")
			return func(v *ca.SVID) error {
				_, err := ca.VerifySVID(chain, v.Bundles, ca.VerifyOptions{Usage: ca.Client})
				return err
			}
		}
		own := w.agent.CA()
		for _, tt := range []struct {
			name string
			peer func(*ca.SVID) error
			svid *ca.SVID
			rule string // "" when it is accepted
		}{
			{"own", peerOf(own), a, ""},
			{"own, without federation", peerOf(own), b, ""},
			{"friend", peerOf(friend), a, ""},
			{"friend, without federation", peerOf(friend), b, "R29"},
			{"another one that the agent knows", peerOf(other), a, "R29"},
		} {
			err := tt.peer(tt.svid)
			var refused *ca.VerifyError
			switch {
			case tt.rule == "" && err != nil:
				t.Errorf("%s: %v", tt.name, err)
			case tt.rule != "" && (!errors.As(err, &refused) || refused.Rule != tt.rule):
				t.Errorf("%s: got %v, want a refusal by %s", tt.name, err, tt.rule)
			}
		}

		// A root of the friend says nothing about us, nor ours about the friend.
		impostor, _ := friend.Leaf(t, webText)
		if _, err := ca.VerifySVID(impostor, a.Bundles, ca.VerifyOptions{Usage: ca.Client}); err == nil {
			t.Error("a certificate of our trust domain by the friend's root was accepted")
		}

		// What the entry grants later is there without a new SVID.
		e2.FederatesWith = []string{"other.example"}
		w.agent.SetEntries(e1, e2)
		pass(0)
		next := plain.want(t, ca.Available).SVID
		if got := domains(next); !equalNames(got, "cluster.local", "other.example") {
			t.Errorf("after the grant the workload trusts %q", got)
		}
		if next.Cert.Leaf.SerialNumber.Cmp(b.Cert.Leaf.SerialNumber) != 0 || next.Epoch() == b.Epoch() {
			t.Error("want the same certificate in a new epoch")
		}
		if ev := granted.want(t, ca.Available); ev.SVID != a {
			t.Error("the other workload's SVID changed")
		}
	})
}

// friend is a foreign trust domain.
const friend = "friend.example"

// withFriend is a world with a workload that trusts friend.
func withFriend(t *testing.T) (*world, *events) {
	t.Helper()
	wl, entry := numbered(1)
	entry.FederatesWith = []string{friend}
	w := newWorld(t, DelegatedConfig{Resync: 10 * time.Minute}, entry)
	w.agent.Federate(friend, catest.NewCA(t, friend))
	e := watch(t, w.provider, wl)
	pass(time.Second)
	if got := domains(e.want(t, ca.Available).SVID); !equalNames(got, "cluster.local", friend) {
		t.Fatalf("the workload trusts %q", got)
	}
	return w, e
}

// TestFault_111_Resync: the agent goes on to send the bundle of a trust domain that
// is gone, as long as a stream lives. For us it is gone after Resync.
func TestFault_111_Resync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, e := withFriend(t)
		w.agent.Defederate(friend)
		pass(7 * time.Minute)
		if got := domains(e.want(t, ca.Available).SVID); len(got) != 2 {
			t.Fatalf("the workload trusts %q; the fake should show the agent's bug", got)
		}
		pass(6 * time.Minute)
		if got := domains(e.want(t, ca.Available).SVID); !equalNames(got, "cluster.local") {
			t.Errorf("after Resync the workload trusts %q", got)
		}
		if got := w.agent.Opened(spireagent.SubscribeToX509SVIDs); got != 1 {
			t.Errorf("%d streams of the workload", got)
		}
	})
}

// TestFault_111_Hint: or as soon as the federation of any workload changes.
func TestFault_111_Hint(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, e := withFriend(t)
		other, entry := numbered(2)
		entry.FederatesWith = []string{friend}
		w.agent.AddEntry(entry)
		e2 := watch(t, w.provider, other)
		pass(time.Second)
		w.agent.Defederate(friend)
		entry.FederatesWith = nil
		_, first := numbered(1)
		first.FederatesWith = []string{friend}
		w.agent.SetEntries(first, entry)
		pass(2 * time.Second)
		for i, e := range []*events{e, e2} {
			if got := domains(e.want(t, ca.Available).SVID); !equalNames(got, "cluster.local") {
				t.Errorf("workload %d trusts %q", i+1, got)
			}
		}
	})
}

// TestFault_111_ManyHints: workloads whose federation changes together ask once.
func TestFault_111_ManyHints(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var entries []spireagent.Entry
		var refs []ca.WorkloadRef
		for i := range 50 {
			ref, entry := numbered(i)
			entry.FederatesWith = []string{friend}
			entries, refs = append(entries, entry), append(refs, ref)
		}
		w := newWorld(t, DelegatedConfig{Resync: time.Hour}, entries...)
		w.agent.Federate(friend, catest.NewCA(t, friend))
		for _, ref := range refs {
			watch(t, w.provider, ref)
		}
		pass(5 * time.Second)
		if got := w.agent.Opened(spireagent.SubscribeToX509Bundles); got != 1 {
			t.Errorf("the bundles were asked for %d times before anything changed", got)
		}
		for i := range entries {
			entries[i].FederatesWith = nil
		}
		w.agent.SetEntries(entries...)
		pass(10 * time.Second)
		if got := w.agent.Opened(spireagent.SubscribeToX509Bundles); got != 2 {
			t.Errorf("the bundles were asked for %d times, want once more", got)
		}
	})
}

// TestRedacted: with an agent without the bug a bundle goes with its message.
func TestRedacted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		wl, entry := numbered(1)
		entry.FederatesWith = []string{"friend.example"}
		w := newWorld(t, DelegatedConfig{}, entry)
		w.agent.Redact(true)
		w.agent.Federate("friend.example", catest.NewCA(t, "friend.example"))
		e := watch(t, w.provider, wl)
		pass(time.Second)
		w.agent.Federate("friend.example") // empty: nobody is to be trusted (R31)
		pass(0)
		svid := e.want(t, ca.Available).SVID
		if td := catest.TrustDomain("friend.example"); !svid.Bundles.Has(td) || len(svid.Bundles.Anchors(td)) != 0 {
			t.Errorf("the workload trusts %q, want an empty bundle of the friend", domains(svid))
		}
		w.agent.Defederate("friend.example")
		pass(0)
		if got := domains(e.want(t, ca.Available).SVID); !equalNames(got, "cluster.local") {
			t.Errorf("the workload trusts %q", got)
		}
	})
}

// TestOwnBundleEmptied: an empty bundle makes every SVID of the trust domain
// invalid (R31), ours among them; so does one that is gone (R42).
func TestOwnBundleEmptied(t *testing.T) {
	inBubble(t, "empty", func(t *testing.T, w *world) {
		e := watch(t, w.provider, web)
		pass(time.Minute)
		e.want(t, ca.Available)
		w.agent.EmptyBundle()
		pass(0)
		e.want(t, ca.Withdrawn, `no certificate in its bundle of trust domain "cluster.local"`)
		late := watch(t, w.provider, web)
		pass(0)
		late.want(t, ca.Unavailable, `no certificate in its bundle of trust domain "cluster.local"`)
		w.agent.Rotate(false)
		pass(0)
		e.want(t, ca.Available)
		late.want(t, ca.Available)
	}, webEntry)
}

// TestBundleRotation: one message of bundles serves all workloads, and no stream
// is opened for it.
func TestBundleRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 20
		var entries []spireagent.Entry
		var refs []ca.WorkloadRef
		for i := range n {
			ref, entry := numbered(i)
			entries, refs = append(entries, entry), append(refs, ref)
		}
		w := newWorld(t, DelegatedConfig{Resync: time.Hour}, entries...)
		var all []*events
		for _, ref := range refs {
			all = append(all, watch(t, w.provider, ref))
		}
		pass(time.Minute)
		before := make([]*ca.SVID, n)
		for i, e := range all {
			before[i] = e.want(t, ca.Available).SVID
		}
		messages, requests := w.agent.Messages(), len(w.agent.Requests())
		w.agent.PrepareRoot()
		pass(0)
		if got := w.agent.Messages() - messages; got != 1 {
			t.Errorf("the agent sent %d messages, want one", got)
		}
		for i, e := range all {
			v := e.want(t, ca.Available).SVID
			if len(v.Bundles.Anchors(v.ID.TrustDomain())) != 2 || v.Epoch() == before[i].Epoch() {
				t.Fatalf("workload %d does not have the new bundle", i)
			}
			if v.Cert.Leaf != before[i].Cert.Leaf {
				t.Errorf("workload %d has another certificate", i)
			}
			if v.Bundles != all[0].want(t, ca.Available).SVID.Bundles {
				t.Errorf("workload %d has a bundle of its own, want a shared one", i)
			}
			if e.count() != 2 {
				t.Errorf("workload %d: %d events", i, e.count())
			}
		}
		w.agent.ActivateRoot()
		pass(0)
		for i, e := range all {
			if v := e.want(t, ca.Available).SVID; v.Cert.Leaf.Equal(before[i].Cert.Leaf) {
				t.Errorf("workload %d has the certificate of the old root", i)
			}
		}
		if got := len(w.agent.Requests()); got != requests {
			t.Errorf("%d streams were opened", got-requests)
		}
	})
}

// TestWatchBundles: what the provider contributes to the workloads of others is
// the bundle of the agent's own trust domain.
func TestWatchBundles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, DelegatedConfig{}, webEntry)
		w.agent.Federate("friend.example", catest.NewCA(t, "friend.example"))
		updates := make(chan *ca.Bundles, 10)
		background(t, func(ctx context.Context) {
			if err := w.provider.WatchBundles(ctx, web, func(b *ca.Bundles) { updates <- b }); !errors.Is(err, context.Canceled) {
				t.Errorf("WatchBundles: %v", err)
			}
		})
		pass(time.Minute)
		b := <-updates
		own := catest.TrustDomain("cluster.local")
		if got := b.Domains(); len(got) != 1 || got[0] != own || len(b.Anchors(own)) != 1 {
			t.Errorf("got bundles of %v", got)
		}
		if a := b.Anchors(own)[0]; a.Mode != ca.Strict || a.Provider != "spire-delegated" {
			t.Errorf("got anchor of %s, %s", a.Provider, a.Mode)
		}
		w.agent.Federate("other.example", catest.NewCA(t, "other.example"))
		pass(time.Minute)
		if len(updates) != 0 {
			t.Error("a foreign bundle was an update")
		}
		w.agent.PrepareRoot()
		pass(0)
		if b := <-updates; len(b.Anchors(own)) != 2 {
			t.Errorf("%d anchors after a new root", len(b.Anchors(own)))
		}
		w.agent.EmptyBundle()
		pass(0)
		if b := <-updates; !b.Has(own) || len(b.Anchors(own)) != 0 {
			t.Error("want an empty bundle")
		}
	})
}

// TestBoardForgets: what no workload federates with any more takes no memory.
func TestBoardForgets(t *testing.T) {
	b := newBoard()
	root := catest.NewCA(t, "cluster.local")
	own := root.TrustDomain
	for i := range 100 {
		anchors := map[spiffeid.TrustDomain][]ca.Anchor{own: {root.Anchor(ca.Strict)}}
		if i%2 == 0 {
			anchors[catest.TrustDomain("friend.example")] = nil
		}
		b.set(anchors)
		if _, err := b.bundles(own, []spiffeid.TrustDomain{catest.TrustDomain(string(rune('a'+i%26)) + "x.example")}); err != nil {
			t.Fatal(err)
		}
		if len(b.cut) > 2 {
			t.Fatalf("%d excerpts after %d messages", len(b.cut), i+1)
		}
	}
}
