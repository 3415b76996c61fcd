package ca_test

import (
	"context"
	"crypto/x509"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
)

// mute is a provider that says nothing of its bundles to those who ask.
type mute struct{ *catest.Provider }

func (mute) WatchBundles(ctx context.Context, _ ca.WorkloadRef, _ func(*ca.Bundles)) error {
	<-ctx.Done()
	return ctx.Err()
}

// TestMoveKeepsTrust: the first SVID of the new provider already trusts those
// of the old one, and of a third one, that are still listed; also when it was
// there before they were asked.
func TestMoveKeepsTrust(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		from, third, to := mute{catest.NewProvider("from")}, catest.NewProvider("third"), catest.NewProvider("to")
		oldCA, thirdCA, newCA := catest.NewCA(t, "td.test"), catest.NewCA(t, "td.test"), catest.NewCA(t, "td.test")
		ref := ca.WorkloadRef{ID: web}
		// The old one grants the workload a federated trust domain, too.
		federated := catest.NewCA(t, "other.test")
		from.Set(from.Key(ref), available(oldCA.SVIDWith(t, web, ca.Union(oldCA.Bundles(ca.Strict), federated.Bundles(ca.Strict)))))
		to.Set(to.Key(ref), available(newCA.SVID(t, web)))
		third.SetBundles(thirdCA.Bundles(ca.Strict))
		m := catest.RunManager(t, catest.Fixed{from, third}, ca.ManagerConfig{})
		l := m.Acquire(ref)
		defer l.Release()
		if _, err := now(t, l); err != nil {
			t.Fatal(err)
		}
		peerOld, _ := oldCA.Leaf(t, other.String())
		peerThird, _ := thirdCA.Leaf(t, other.String())
		trusts := func(when string, want bool) {
			t.Helper()
			svid, err := now(t, l)
			if err != nil {
				t.Fatalf("%s: %v", when, err)
			}
			for _, peer := range [][]*x509.Certificate{peerOld, peerThird} {
				if _, err := ca.VerifySVID(peer, svid.Bundles, ca.VerifyOptions{}); (err == nil) != want {
					t.Errorf("%s: %v, want trusted: %v", when, err, want)
				}
			}
		}
		m.Replace(catest.Fixed{to, from, third})
		trusts("after the move", true)
		svid, _ := now(t, l)
		if _, err := ca.VerifySVID([]*x509.Certificate{svid.Cert.Leaf}, newCA.Bundles(ca.Strict), ca.VerifyOptions{}); err != nil {
			t.Errorf("the lease has not moved: %v", err)
		}
		if svid.Bundles.Has(federated.TrustDomain) {
			t.Error("what the old provider granted with its SVID outlives that")
		}
		m.Replace(catest.Fixed{to})
		trusts("the others are no longer listed", false)
	})
}

// counted counts the watches of bundles.
type counted struct {
	*catest.Provider
	watches atomic.Int32
}

func (c *counted) WatchBundles(ctx context.Context, w ca.WorkloadRef, update func(*ca.Bundles)) error {
	c.watches.Add(1)
	defer c.watches.Add(-1)
	return c.Provider.WatchBundles(ctx, w, update)
}

// TestOwnBundlesAlone: of the provider that issues it, a lease trusts what came with
// its SVID, and not what the provider contributes to others; and nobody goes on
// listening to a provider that is no longer listed.
func TestOwnBundlesAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		own, side := &counted{Provider: catest.NewProvider("own")}, &counted{Provider: catest.NewProvider("side")}
		granted, wider := catest.NewCA(t, "td.test"), catest.NewCA(t, "td.test")
		ref := ca.WorkloadRef{ID: web}
		own.Set(own.Key(ref), available(granted.SVID(t, web)))
		own.SetBundles(wider.Bundles(ca.Strict))
		m := catest.RunManager(t, catest.Fixed{own, side}, ca.ManagerConfig{})
		l := m.Acquire(ref)
		defer l.Release()
		if svid, err := now(t, l); err != nil || !svid.Bundles.Equal(granted.Bundles(ca.Strict)) {
			t.Errorf("%v, %v, want the bundles of the SVID and no others", svid, err)
		}
		if own, side := own.watches.Load(), side.watches.Load(); own != 0 || side != 1 {
			t.Errorf("%d and %d watches of bundles, want none of the own provider, one of the other", own, side)
		}
		m.Replace(catest.Fixed{own})
		synctest.Wait()
		if n := side.watches.Load(); n != 0 {
			t.Errorf("%d watches of the provider that is gone", n)
		}
	})
}

// TestMoveWithNewSettingsKeepsTrust: the same when the providers that stay listed
// get other settings with the change that moves the lease, and for the aliases of
// a trust domain.
func TestMoveWithNewSettingsKeepsTrust(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		from, side, to := catest.NewProvider("from"), catest.NewProvider("side"), catest.NewProvider("to")
		oldCA, sideCA, newCA := catest.NewCA(t, "td.test"), catest.NewCA(t, "td.test"), catest.NewCA(t, "td.test")
		alias := catest.TrustDomain("alias.test")
		ref := ca.WorkloadRef{ID: web}
		from.Set(from.Key(ref), available(oldCA.SVIDWith(t, web, oldCA.Bundles(ca.Strict).WithAliases(oldCA.TrustDomain, alias))))
		side.SetBundles(sideCA.Bundles(ca.Strict))
		to.Set(to.Key(ref), available(newCA.SVID(t, web)))
		m := catest.RunManager(t, catest.Fixed{from, side}, ca.ManagerConfig{})
		l := m.Acquire(ref)
		defer l.Release()
		if _, err := now(t, l); err != nil {
			t.Fatal(err)
		}
		m.Replace(catest.Fixed{to, mute{catest.NewProvider("from")}, mute{catest.NewProvider("side")}})
		svid, err := now(t, l)
		if err != nil || svid.Bundles.Equal(newCA.Bundles(ca.Strict)) {
			t.Fatalf("%v, %v, want the anchors of the others, too", svid, err)
		}
		peer := func(c *catest.CA, id string) []*x509.Certificate {
			chain, _ := c.Leaf(t, id)
			return chain
		}
		for name, chain := range map[string][]*x509.Certificate{
			"the old one": peer(oldCA, other.String()), "the one beside it": peer(sideCA, other.String()),
			"an alias": peer(oldCA, "spiffe://alias.test/ns/a/sa/other"), "the new one": peer(newCA, other.String()),
		} {
			if _, err := ca.VerifySVID(chain, svid.Bundles, ca.VerifyOptions{}); err != nil {
				t.Errorf("a peer of %s: %v", name, err)
			}
		}
	})
}

// TestBundlesBringNothingBack: an SVID that was withdrawn or has expired does not
// come back with the next change of another provider's anchors.
func TestBundlesBringNothingBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		own, side := catest.NewProvider("own"), catest.NewProvider("side")
		td := catest.NewCA(t, "td.test")
		ref := ca.WorkloadRef{ID: web}
		m := catest.RunManager(t, catest.Fixed{own, side}, ca.ManagerConfig{})
		l := m.Acquire(ref)
		defer l.Release()
		for _, end := range []struct {
			name string
			do   func()
			want error
		}{
			{"withdrawn", func() { own.Set(own.Key(ref), ca.Event{State: ca.Withdrawn, Err: ca.ErrDenied}) }, ca.ErrDenied},
			{"expired", func() { sleep(time.Hour) }, ca.ErrExpired},
		} {
			own.Set(own.Key(ref), available(td.SVID(t, web, catest.Life(time.Hour))))
			if _, err := now(t, l); err != nil {
				t.Fatal(err)
			}
			end.do()
			synctest.Wait()
			side.SetBundles(catest.NewCA(t, "td.test").Bundles(ca.Strict))
			if svid, err := now(t, l); !errors.Is(err, end.want) {
				t.Errorf("%s, after new anchors: %v, %v, want %v", end.name, svid, err, end.want)
			}
		}
	})
}

// TestNewSettingsKeepTrust: a provider that takes the place of another of its name
// is trusted with what that one had said, until it speaks itself.
func TestNewSettingsKeepTrust(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		own, side, next := catest.NewProvider("own"), catest.NewProvider("side"), catest.NewProvider("side")
		td, was, is := catest.NewCA(t, "td.test"), catest.NewCA(t, "td.test"), catest.NewCA(t, "td.test")
		ref := ca.WorkloadRef{ID: web}
		own.Set(own.Key(ref), available(td.SVID(t, web)))
		side.SetBundles(was.Bundles(ca.Strict))
		m := catest.RunManager(t, catest.Fixed{own, side}, ca.ManagerConfig{})
		l := m.Acquire(ref)
		defer l.Release()
		before, err := now(t, l)
		if err != nil {
			t.Fatal(err)
		}
		changed := l.Changed()
		m.Replace(catest.Fixed{own, next})
		if after, err := now(t, l); err != nil || after != before {
			t.Errorf("before it speaks: %v, %v, want what was", after, err)
		}
		select {
		case <-changed:
			t.Error("the change was visible")
		default:
		}
		next.SetBundles(is.Bundles(ca.Strict))
		svid, err := now(t, l)
		if err != nil {
			t.Fatal(err)
		}
		for c, want := range map[*catest.CA]bool{was: false, is: true} {
			peer, _ := c.Leaf(t, other.String())
			if _, err := ca.VerifySVID(peer, svid.Bundles, ca.VerifyOptions{}); (err == nil) != want {
				t.Errorf("after it spoke: %v, want trusted: %v", err, want)
			}
		}
		m.Replace(catest.Fixed{own})
		if after, err := now(t, l); err != nil || len(after.Bundles.Anchors(td.TrustDomain)) != 1 {
			t.Errorf("without it: %v, %v, want one anchor", after, err)
		}
	})
}
