package ca_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
)

var (
	web   = catest.ID("spiffe://td.test/ns/a/sa/web")
	other = catest.ID("spiffe://td.test/ns/a/sa/other")
)

// sleep lets fake time pass, and then everything that it set off.
func sleep(d time.Duration) {
	timer := time.NewTimer(d)
	<-timer.C
	synctest.Wait()
}

func available(svid *ca.SVID) ca.Event { return ca.Event{State: ca.Available, SVID: svid} }

// now is what a lease says without waiting.
func now(t *testing.T, l *ca.Lease) (*ca.SVID, error) {
	t.Helper()
	synctest.Wait()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	return l.SVID(ctx)
}

func TestManagerStates(t *testing.T) { // design D23
	synctest.Test(t, func(t *testing.T) {
		p := catest.NewProvider("fake")
		m := catest.RunManager(t, catest.Fixed{p}, ca.ManagerConfig{})
		td := catest.NewCA(t, "td.test")
		ref := ca.WorkloadRef{ID: web}
		k := p.Key(ref)
		l := m.Acquire(ref)
		defer l.Release()

		// Pending waits, as long as the caller likes, and hurries the provider.
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		if _, err := l.SVID(ctx); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != time.Hour {
			t.Errorf("pending: %v after %v, want the deadline after 1h", err, time.Since(start))
		}
		if p.Hurried(k) == 0 {
			t.Error("nobody hurried the provider")
		}
		text(t, m, "Initializing")

		// Unavailable answers at once.
		failure := errors.New("signing gRPC error (Unavailable): down")
		p.Set(k, ca.Event{State: ca.Unavailable, Err: failure})
		if _, err := now(t, l); !errors.Is(err, failure) {
			t.Errorf("unavailable: %v, want %v", err, failure)
		}
		text(t, m, "Unavailable: signing gRPC error (Unavailable): down")

		// Available, then failing: the SVID stays.
		first := td.SVID(t, web)
		p.Set(k, available(first))
		if svid, err := now(t, l); svid != first || err != nil {
			t.Errorf("available: %v, %v, want %v", svid, err, first)
		}
		text(t, m, "Available")
		for _, ev := range []ca.Event{{State: ca.Unavailable, Err: failure}, {State: ca.Pending}} {
			p.Set(k, ev)
			if svid, err := now(t, l); svid != first || err != nil {
				t.Errorf("%v after an SVID: %v, %v, want the old one", ev.State, svid, err)
			}
		}

		// Withdrawn takes it back at once, though it has not expired.
		gone := errors.New("workload not found")
		p.Set(k, ca.Event{State: ca.Withdrawn, Err: gone})
		if _, err := now(t, l); !errors.Is(err, gone) {
			t.Errorf("withdrawn: %v, want %v", err, gone)
		}
		text(t, m, "Unavailable: workload not found")
		p.Set(k, available(td.SVID(t, web)))
		if _, err := now(t, l); err != nil {
			t.Errorf("available again: %v", err)
		}
	})
}

func text(t *testing.T, m *ca.Manager, want string) {
	t.Helper()
	synctest.Wait()
	got := m.Snapshot()
	if len(got) != 1 || got[0].Text != want {
		t.Errorf("snapshot %+v, want one entry %q", got, want)
	}
}

// TestID_ID15_ExpiredIsNeverHandedOut: the SVID goes at its NotAfter, whatever
// the provider does.
func TestID_ID15_ExpiredIsNeverHandedOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := catest.NewProvider("fake")
		m := catest.RunManager(t, catest.Fixed{p}, ca.ManagerConfig{})
		ref := ca.WorkloadRef{ID: web}
		svid := catest.NewCA(t, "td.test").SVID(t, web, catest.Life(100*time.Second))
		p.Set(p.Key(ref), available(svid))
		l := m.Acquire(ref)
		defer l.Release()
		if got, err := now(t, l); got != svid {
			t.Fatalf("got %v, %v", got, err)
		}
		sleep(time.Until(svid.NotAfter) - time.Millisecond)
		if got, err := now(t, l); got != svid {
			t.Errorf("just before NotAfter: %v, %v", got, err)
		}
		sleep(time.Millisecond)
		if got, err := now(t, l); !errors.Is(err, ca.ErrExpired) {
			t.Errorf("at NotAfter: %v, %v, want ErrExpired", got, err)
		}
		// An expired one is not even taken over.
		l2 := m.Acquire(ca.WorkloadRef{ID: other})
		defer l2.Release()
		p.Set(ca.Key{Provider: "fake", ID: other}, available(svid))
		p.Set(p.Key(ref), available(svid))
		if got, err := now(t, l); !errors.Is(err, ca.ErrExpired) {
			t.Errorf("expired from the provider: %v, %v, want ErrExpired", got, err)
		}
		if _, err := now(t, l2); err == nil || err.Error() != "did not find expected SAN: "+other.String() {
			t.Errorf("wrong identity: %v", err)
		}
	})
}

func TestManagerRejects(t *testing.T) {
	tests := []struct {
		name string
		svid func(t *testing.T, td *catest.CA) *ca.SVID
		want string
	}{
		{"nil", func(*testing.T, *catest.CA) *ca.SVID { return nil }, "chain returned from CA is empty for: " + web.String()},
		{"empty chain", func(*testing.T, *catest.CA) *ca.SVID { return &ca.SVID{ID: web} }, "chain returned from CA is empty for: " + web.String()},
		{"wrong identity", func(t *testing.T, td *catest.CA) *ca.SVID { return td.SVID(t, other) }, "did not find expected SAN: " + web.String()},
		{"mislabelled", func(t *testing.T, td *catest.CA) *ca.SVID {
			s := *td.SVID(t, other)
			s.ID = web
			return &s
		}, "did not find expected SAN: " + web.String()},
		{"foreign key", func(t *testing.T, td *catest.CA) *ca.SVID {
			s := *td.SVID(t, web)
			cert := *s.Cert
			cert.PrivateKey = td.Key
			s.Cert = &cert
			return &s
		}, "private key is not the key"},
		{"foreign root", func(t *testing.T, td *catest.CA) *ca.SVID {
			return td.SVIDWith(t, web, td.Renewed(t).Bundles(ca.Compatible))
		}, "R29"},
		{"no bundles", func(t *testing.T, td *catest.CA) *ca.SVID { return td.SVIDWith(t, web, nil) }, "R29"},
		{"not yet valid", func(t *testing.T, td *catest.CA) *ca.SVID {
			return td.SVID(t, web, catest.Between(time.Hour, 2*time.Hour))
		}, "R24"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := catest.NewProvider("fake")
				m := catest.RunManager(t, catest.Fixed{p}, ca.ManagerConfig{})
				td := catest.NewCA(t, "td.test")
				ref := ca.WorkloadRef{ID: web}
				p.Set(p.Key(ref), available(tt.svid(t, td)))
				l := m.Acquire(ref)
				defer l.Release()
				if svid, err := now(t, l); err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("got %v, %v, want an error about %q", svid, err, tt.want)
				}
				// A good one repairs it, and a bad one does not harm that.
				good := td.SVID(t, web)
				p.Set(p.Key(ref), available(good))
				if svid, err := now(t, l); svid != good {
					t.Errorf("got %v, %v, want the good one", svid, err)
				}
				p.Set(p.Key(ref), available(tt.svid(t, td)))
				if svid, err := now(t, l); svid != good {
					t.Errorf("got %v, %v, want the good one still", svid, err)
				}
			})
		})
	}
}

// TestRootTakenBackBeforeLeaf: bundles that no longer vouch for our own
// certificate count for peers all the same, and are no renewal.
func TestRootTakenBackBeforeLeaf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := catest.NewProvider("fake")
		r := prometheus.NewRegistry()
		m := catest.RunManager(t, catest.Fixed{p}, ca.ManagerConfig{Metrics: ca.NewMetrics(r)})
		old := catest.NewCA(t, "td.test")
		next := old.Renewed(t)
		ref := ca.WorkloadRef{ID: web}
		chain, key := old.Leaf(t, web.String())
		deliver := func(b *ca.Bundles) {
			svid, err := ca.NewSVID("fake", chain, key, b)
			if err != nil {
				t.Fatal(err)
			}
			p.Set(p.Key(ref), available(svid))
		}
		l := m.Acquire(ref)
		defer l.Release()
		deliver(old.Bundles(ca.Strict))
		first, err := now(t, l)
		if err != nil {
			t.Fatal(err)
		}
		deliver(next.Bundles(ca.Strict))
		svid, err := now(t, l)
		if err != nil {
			t.Fatalf("%v: the certificate is valid until %v", err, first.NotAfter)
		}
		peer, _ := old.Leaf(t, other.String())
		if _, err := ca.VerifySVID(peer, svid.Bundles, ca.VerifyOptions{Usage: ca.Client}); err == nil {
			t.Error("a peer of the root that was taken back is accepted")
		}
		if svid.Epoch() == first.Epoch() {
			t.Error("the epoch is the same")
		}
		if s := m.Snapshot()[0]; s.Err == nil || s.State != ca.Available {
			t.Errorf("state %v with error %v, want that it says what is wrong", s.State, s.Err)
		}
		if n := samples(t, r)["istio_ca_renewals_total{fake}"]; n != 0 {
			t.Errorf("%v renewals, want none", n)
		}

		// Another certificate that is bad changes nothing.
		p.Set(p.Key(ref), available(old.SVIDWith(t, other, old.Bundles(ca.Strict))))
		if again, _ := now(t, l); again != svid {
			t.Error("the bundles of a certificate of another identity were taken over")
		}
	})
}

// choosing is a provider that decides by itself who we are.
type choosing struct{ *catest.Provider }

func (choosing) AnyID() bool { return true }

// TestAnyID: one provider may choose the identity, another one may not,
// whatever the first may.
func TestAnyID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		free, bound := choosing{catest.NewProvider("free")}, catest.NewProvider("bound")
		td, ref := catest.NewCA(t, "td.test"), ca.WorkloadRef{ID: web}
		m := catest.RunManager(t, catest.Fixed{free, bound}, ca.ManagerConfig{})
		free.Set(free.Key(ref), available(td.SVID(t, other)))
		bound.Set(bound.Key(ref), available(td.SVID(t, other)))
		l := m.Acquire(ref)
		defer l.Release()
		if svid, err := now(t, l); err != nil || svid.ID != other {
			t.Errorf("got %v, %v, want the CA's choice %v", svid, err, other)
		}
		m.Replace(catest.Fixed{bound, free})
		strict := m.Acquire(ref)
		defer strict.Release()
		if svid, err := now(t, strict); !errors.Is(err, ca.ErrRejected) {
			t.Errorf("got %v, %v, want the wrong identity rejected", svid, err)
		}
	})
}

// TestLinger: certificates by identity stay for a while, those of one workload
// go at once.
func TestLinger(t *testing.T) {
	tests := []struct {
		name   string
		make   func(string) *catest.Provider
		linger time.Duration
		want   time.Duration
	}{
		{"by identity", catest.NewProvider, 0, 5 * time.Minute},
		{"configured", catest.NewProvider, time.Minute, time.Minute},
		{"none", catest.NewProvider, -1, 0},
		{"by workload", catest.NewPerWorkload, 0, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := tt.make("fake")
				m := catest.RunManager(t, catest.Fixed{p}, ca.ManagerConfig{Linger: tt.linger})
				ref := ca.WorkloadRef{ID: web, UID: "u1"}
				p.Set(p.Key(ref), available(catest.NewCA(t, "td.test").SVID(t, web)))
				a, b := m.Acquire(ref), m.Acquire(ref)
				synctest.Wait()
				if n := p.Watches()[p.Key(ref)]; n != 1 {
					t.Fatalf("%d watches for two leases, want 1", n)
				}
				a.Release()
				a.Release() // counts once
				if _, err := now(t, b); err != nil {
					t.Errorf("the other lease: %v", err)
				}
				if _, err := now(t, a); !errors.Is(err, ca.ErrReleased) {
					t.Errorf("released lease: %v, want ErrReleased", err)
				}
				b.Release()
				if tt.want > 0 {
					sleep(tt.want - time.Second)
					if n := p.Watches()[p.Key(ref)]; n != 1 {
						t.Errorf("%d watches before the end of the linger, want 1", n)
					}
					if n := len(m.Snapshot()); n != 1 {
						t.Errorf("%d entries while it lingers, want 1", n)
					}
					c := m.Acquire(ref) // comes back in time: nothing is asked again
					if _, err := now(t, c); err != nil {
						t.Errorf("lingering: %v", err)
					}
					sleep(tt.want)
					if n := p.Watches()[p.Key(ref)]; n != 1 {
						t.Errorf("%d watches for a lease that came back, want 1", n)
					}
					c.Release()
					sleep(tt.want)
				}
				synctest.Wait()
				if n := len(p.Watches()); n != 0 {
					t.Errorf("%d watches at the end, want none", n)
				}
				if n := len(m.Snapshot()); n != 0 {
					t.Errorf("%d entries at the end, want none", n)
				}
			})
		})
	}
}

// TestID_ID10_ReleaseWhileWaiting: whoever waits on a released lease hears so.
func TestID_ID10_ReleaseWhileWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := catest.RunManager(t, catest.Fixed{catest.NewProvider("fake")}, ca.ManagerConfig{Linger: -1})
		l := m.Acquire(ca.WorkloadRef{ID: web})
		got := make(chan error, 1)
		go func() {
			_, err := l.SVID(t.Context())
			got <- err
		}()
		synctest.Wait()
		l.Release()
		if err := <-got; !errors.Is(err, ca.ErrReleased) || err.Error() != "the identity is no longer needed" {
			t.Errorf("got %v, want ErrReleased", err)
		}
		if n := len(m.Snapshot()); n != 0 {
			t.Errorf("%d entries, want none", n)
		}
	})
}

func TestPerWorkloadKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := catest.NewPerWorkload("fake")
		m := catest.RunManager(t, catest.Fixed{p}, ca.ManagerConfig{})
		td := catest.NewCA(t, "td.test")
		var got []*ca.SVID
		for _, uid := range []string{"u1", "u2"} {
			ref := ca.WorkloadRef{ID: web, UID: uid}
			p.Set(p.Key(ref), available(td.SVID(t, web)))
			l := m.Acquire(ref)
			defer l.Release()
			svid, err := now(t, l)
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, svid)
		}
		if got[0] == got[1] {
			t.Error("two workloads share an SVID")
		}
		var uids []string
		for _, s := range m.Snapshot() {
			uids = append(uids, s.UID)
		}
		if d := cmp.Diff([]string{"u1", "u2"}, uids); d != "" {
			t.Errorf("snapshot (-want +got):\n%s", d)
		}
	})
}

// TestID_ID09_RunEnds: everything ends with the manager, and leases know it.
func TestID_ID09_RunEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := catest.NewProvider("fake")
		m := ca.NewManager(catest.Fixed{p}, ca.ManagerConfig{})
		ref := ca.WorkloadRef{ID: web}
		p.Set(p.Key(ref), available(catest.NewCA(t, "td.test").SVID(t, web)))
		before := m.Acquire(ref) // before Run: pending
		if len(p.Watches()) != 0 {
			t.Error("a watch before Run")
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- m.Run(ctx) }()
		if _, err := now(t, before); err != nil {
			t.Errorf("acquired before Run: %v", err)
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v, want nil", err)
		}
		after := m.Acquire(ref)
		for _, l := range []*ca.Lease{before, after} {
			if _, err := now(t, l); !errors.Is(err, ca.ErrReleased) {
				t.Errorf("after the end: %v, want ErrReleased", err)
			}
			l.Release()
		}
		if p.Running() || len(p.Watches()) != 0 {
			t.Error("the provider still runs")
		}
		if err := m.Run(t.Context()); err == nil {
			t.Error("a second Run is no error")
		}
	})
}

func TestProviderFailureEndsRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		good, bad := catest.NewProvider("good"), catest.NewProvider("bad")
		m := ca.NewManager(catest.Fixed{good, bad}, ca.ManagerConfig{})
		done := make(chan error, 1)
		go func() { done <- m.Run(t.Context()) }()
		synctest.Wait()
		cause := errors.New("socket refused")
		bad.Fail(cause)
		if err := <-done; !errors.Is(err, cause) || !strings.Contains(err.Error(), "bad") {
			t.Errorf("Run: %v, want the provider's error with its name", err)
		}
		if good.Running() {
			t.Error("the other provider still runs")
		}
	})
}

func TestSnapshotHasFacts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := catest.NewProvider("fake")
		m := catest.RunManager(t, catest.Fixed{p}, ca.ManagerConfig{})
		td := catest.NewCA(t, "td.test").Intermediate(t)
		svid := td.SVID(t, web)
		next := time.Now().Add(30 * time.Minute)
		failure := errors.New("renewal failed")
		for _, id := range []spiffeid.ID{web, other} {
			defer m.Acquire(ca.WorkloadRef{ID: id}).Release()
		}
		p.Set(ca.Key{Provider: "fake", ID: web}, ca.Event{State: ca.Available, SVID: svid, Next: next, Err: failure})
		synctest.Wait()
		got := m.Snapshot()
		if len(got) != 2 || got[0].ID != other || got[1].ID != web {
			t.Fatalf("got %+v, want two entries by identity", got)
		}
		s := got[1]
		if s.State != ca.Available || s.Text != "Available" || !errors.Is(s.Err, failure) || !s.Renewal.Equal(next) || s.Leases != 1 ||
			len(s.Chain) != 2 || len(s.Roots) != 1 || !s.Roots[0].Cert.Equal(td.Root) || !s.NotAfter.Equal(svid.NotAfter) || !s.NotBefore.Equal(svid.NotBefore) {
			t.Errorf("got %+v", s)
		}
		if got[0].State != ca.Pending || got[0].Chain != nil {
			t.Errorf("got %+v, want a pending entry", got[0])
		}
	})
}
