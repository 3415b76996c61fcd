package ca_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
)

// named is a provider that remembers whom its running watches name. One that tells
// pods apart contributes to each what it grants to that one.
type named struct {
	*catest.Provider

	mu      sync.Mutex // guards what follows
	grants  map[string]*ca.Bundles
	changed chan struct{} // closed and replaced with each grant
	svids   map[ca.WorkloadRef]int
	bundles map[ca.WorkloadRef]int
	begun   int // watches of bundles, also those that have ended
}

func nameless(name string) *named { return newNamed(catest.NewProvider(name)) }
func perPodOf(name string) *named { return newNamed(catest.NewPerWorkload(name)) }
func newNamed(p *catest.Provider) *named {
	return &named{
		Provider: p, grants: map[string]*ca.Bundles{}, changed: make(chan struct{}),
		svids: map[ca.WorkloadRef]int{}, bundles: map[ca.WorkloadRef]int{},
	}
}

func (p *named) count(of map[ca.WorkloadRef]int, w ca.WorkloadRef) (end func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	of[w]++
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if of[w]--; of[w] == 0 {
			delete(of, w)
		}
	}
}

func (p *named) Watch(ctx context.Context, w ca.WorkloadRef, update func(ca.Event)) error {
	defer p.count(p.svids, w)()
	return p.Provider.Watch(ctx, w, update)
}

// grant sets what the pod with the UID is granted; nil is no answer yet.
func (p *named) grant(uid string, b *ca.Bundles) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.grants[uid] = b
	close(p.changed)
	p.changed = make(chan struct{})
}

func (p *named) WatchBundles(ctx context.Context, w ca.WorkloadRef, update func(*ca.Bundles)) error {
	defer p.count(p.bundles, w)()
	p.mu.Lock()
	p.begun++
	p.mu.Unlock()
	for {
		p.mu.Lock()
		b, changed := p.grants[p.Key(w).UID], p.changed
		p.mu.Unlock()
		if b != nil {
			update(b)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// names are those whom the running watches of SVIDs and of bundles name, each once.
func (p *named) names() (svids, bundles string) {
	synctest.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	text := func(of map[ca.WorkloadRef]int) string {
		var all []string
		for w, n := range of {
			all = append(all, strings.TrimSpace(strings.Repeat(fmt.Sprintf("%s/%s/%s/%v ", w.Namespace, w.Pod, w.UID, w.PIDFD != nil), n)))
		}
		slices.Sort(all)
		return strings.Join(all, " ")
	}
	return text(p.svids), text(p.bundles)
}

// all counts the running watches of both kinds; who has its SVID of p does not
// watch p's bundles.
func (p *named) all() map[ca.WorkloadRef]int {
	synctest.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	all := maps.Clone(p.svids)
	for w, n := range p.bundles {
		all[w] += n
	}
	return all
}

func (p *named) want(t *testing.T, when, svids, bundles string) {
	t.Helper()
	if s, b := p.names(); s != svids || b != bundles {
		t.Errorf("%s: watches of %s name %q and %q, want %q and %q", when, p.Name(), s, b, svids, bundles)
	}
}

// pod is the i-th of one identity, with a process.
func pod(t *testing.T, i int) ca.WorkloadRef {
	t.Helper()
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return ca.WorkloadRef{ID: web, Namespace: "a", ServiceAccount: "web", Pod: fmt.Sprint("web-", i), UID: fmt.Sprint("u", i), PIDFD: f}
}

// trusts reports whether l believes those whom c signs.
func trusts(t *testing.T, l *ca.Lease, c *catest.CA) bool {
	t.Helper()
	svid, err := now(t, l)
	if err != nil {
		t.Fatalf("%s: %v", l.Ref().Pod, err)
	}
	return slices.ContainsFunc(svid.Bundles.Anchors(c.TrustDomain), func(a ca.Anchor) bool { return a.Cert.Equal(c.Root) })
}

// TestFault_115_WatchesNameLivingLeases: a hold that pods share names none of them to its own
// provider, and to one that tells pods apart those that hold a lease; and what is
// granted to one of them counts for that one.
func TestFault_115_WatchesNameLivingLeases(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		own, common, broker := nameless("own"), nameless("common"), perPodOf("broker")
		td, forAll, forFirst, forSecond := catest.NewCA(t, "td.test"), catest.NewCA(t, "td.test"), catest.NewCA(t, "td.test"), catest.NewCA(t, "td.test")
		own.Set(ca.Key{Provider: "own", ID: web}, available(td.SVID(t, web)))
		common.grant("", forAll.Bundles(ca.Strict))
		broker.grant("u1", forFirst.Bundles(ca.Strict))
		m := catest.RunManager(t, catest.Fixed{own, common, broker}, ca.ManagerConfig{})
		first := m.Acquire(pod(t, 1))
		second := m.Acquire(pod(t, 2))
		again := m.Acquire(pod(t, 2))
		own.want(t, "three leases", "a///false", "")
		common.want(t, "three leases", "", "a///false")
		broker.want(t, "three leases", "", "a/web-1/u1/true a/web-2/u2/true")
		check := func(when string, l *ca.Lease, want ...*catest.CA) {
			t.Helper()
			for name, c := range map[string]*catest.CA{"all": forAll, "the first": forFirst, "the second": forSecond} {
				if got := trusts(t, l, c); got != slices.Contains(want, c) {
					t.Errorf("%s: %s trusts what is for %s: %v", when, l.Ref().Pod, name, got)
				}
			}
		}
		check("before the second is granted anything", first, forAll, forFirst)
		check("before the second is granted anything", second, forAll)
		a, _ := now(t, first)
		b, _ := now(t, second)
		if a.Cert != b.Cert || a.Epoch() == b.Epoch() {
			t.Error("want one certificate in two epochs")
		}
		changed := first.Changed()
		broker.grant("u2", forSecond.Bundles(ca.Strict))
		check("both", first, forAll, forFirst)
		check("both", second, forAll, forSecond)
		check("both", again, forAll, forSecond)
		select {
		case <-changed:
			t.Error("what the second is granted was visible to the first")
		default:
		}

		first.Release()
		own.want(t, "the first has gone", "a///false", "")
		common.want(t, "the first has gone", "", "a///false")
		broker.want(t, "the first has gone", "", "a/web-2/u2/true")
		broker.grant("u1", forAll.Renewed(t).Bundles(ca.Strict))
		check("the first has gone", second, forAll, forSecond)
		own.Set(ca.Key{Provider: "own", ID: web}, available(td.SVID(t, web)))
		check("renewed", second, forAll, forSecond)
		second.Release()
		check("its other lease", again, forAll, forSecond)
		again.Release()
		own.want(t, "the linger", "a///false", "")
		common.want(t, "the linger", "", "a///false")
		broker.want(t, "the linger", "", "")
		late := m.Acquire(pod(t, 3))
		check("who comes later", late, forAll)
		broker.want(t, "who comes later", "", "a/web-3/u3/true")
		late.Release()
		sleep(5 * time.Minute)
		for _, p := range []*named{own, common, broker} {
			p.want(t, "the end", "", "")
		}
	})
}

// TestWatchFollowsLease: of two leases of one pod the second keeps the watches when
// the first goes, under its own name, and neither SVID nor trust is lost.
func TestWatchFollowsLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		own, side, common := perPodOf("own"), perPodOf("side"), nameless("common")
		td, granted := catest.NewCA(t, "td.test"), catest.NewCA(t, "td.test")
		key := ca.Key{Provider: "own", ID: web, UID: "u1"}
		own.Set(key, available(td.SVID(t, web)))
		side.grant("u1", granted.Bundles(ca.Strict))
		m := catest.RunManager(t, catest.Fixed{own, side, common}, ca.ManagerConfig{})
		was, is := pod(t, 1), pod(t, 1)
		is.Pod = "renamed" // so that the texts differ
		first, second := m.Acquire(was), m.Acquire(is)
		defer second.Release()
		if !trusts(t, second, granted) {
			t.Error("the grant is not trusted")
		}
		own.want(t, "both", "a/web-1/u1/true", "")
		side.want(t, "both", "", "a/web-1/u1/true")
		before, _ := now(t, second)

		side.grant("u1", nil) // it does not answer for a while
		own.Set(key, ca.Event{})
		changed := second.Changed()
		first.Release()
		own.want(t, "the first has gone", "a/renamed/u1/true", "")
		side.want(t, "the first has gone", "", "a/renamed/u1/true")
		common.want(t, "the first has gone", "", "a///false")
		if common.begun != 1 {
			t.Errorf("%d watches of what is for all pods, want 1", common.begun)
		}
		if after, err := now(t, second); err != nil || after != before {
			t.Errorf("%v, %v, want what was before", after, err)
		}
		own.Set(key, ca.Event{State: ca.Unavailable, Err: errors.New("down")})
		if after, err := now(t, second); err != nil || after != before {
			t.Errorf("when the backend is down: %v, %v, want what was before", after, err)
		}
		select {
		case <-changed:
			t.Error("the change was visible")
		default:
		}
		common.grant("", catest.NewCA(t, "td.test").Bundles(ca.Strict)) // all is put together again
		if !trusts(t, second, granted) {
			t.Error("what the side has said is forgotten before it speaks again")
		}
		side.grant("u1", ca.NewBundles(nil))
		if trusts(t, second, granted) {
			t.Error("what is granted no more is still trusted")
		}
		// The new watch has never seen an SVID, so it takes none back: nothing is all.
		own.Set(key, ca.Event{State: ca.Pending, Err: ca.ErrDenied})
		synctest.Wait()
		if svid, ok := second.Current(); ok {
			t.Errorf("the backend grants nothing, and there is %v", svid)
		}
		own.Set(key, available(td.SVID(t, web)))
		if _, err := now(t, second); err != nil {
			t.Error(err)
		}
		own.Set(key, ca.Event{State: ca.Pending, Err: ca.ErrDenied})
		if _, err := now(t, second); err != nil {
			t.Errorf("a provider that has granted takes back by Withdrawn alone: %v", err)
		}
	})
}

// TestNoLingerInSomebodysName: what is one pod's ends with its last lease, also
// where the pod's UID is not known.
func TestNoLingerInSomebodysName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		own := perPodOf("own")
		m := catest.RunManager(t, catest.Fixed{own}, ca.ManagerConfig{})
		w := pod(t, 1)
		w.UID = ""
		l := m.Acquire(w)
		own.want(t, "leased", "a/web-1//true", "")
		l.Release()
		own.want(t, "released", "", "")
	})
}

// commonNamed tells pods apart by its certificates alone.
type commonNamed struct{ *named }

func (commonNamed) CommonBundles() bool { return true }

// TestCommonBundles: what a provider of pods' own certificates contributes to
// everybody is asked for once, in nobody's name, and counts for all leases and in
// what the manager tells of them, also after a live move.
func TestCommonBundles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		istio, spire := nameless("istio"), commonNamed{perPodOf("spire")}
		td, other := catest.NewCA(t, "td.test"), catest.NewCA(t, "td.test")
		istio.Set(ca.Key{Provider: "istio", ID: web}, available(td.SVID(t, web)))
		spire.grant("", other.Bundles(ca.Strict))
		m := catest.RunManager(t, catest.Fixed{istio, spire}, ca.ManagerConfig{})
		leases := []*ca.Lease{m.Acquire(pod(t, 1)), m.Acquire(pod(t, 2))}
		check := func(when string) {
			t.Helper()
			spire.want(t, when, "", "a///false")
			for _, l := range leases {
				if !trusts(t, l, other) {
					t.Errorf("%s: %s does not trust the other provider", when, l.Ref().UID)
				}
			}
			if s := m.Snapshot(); len(s) != 1 || len(s[0].Roots) != 2 {
				t.Errorf("%s: the manager tells of %d certificates, the first with %d roots, want 1 with 2", when, len(s), len(s[0].Roots))
			}
		}
		check("at first")
		leases[0].Release()
		leases = leases[1:]
		check("when the first has gone")
		m.Replace(catest.Fixed{istio})
		if trusts(t, leases[0], other) {
			t.Error("a provider that is no longer listed is trusted")
		}
		m.Replace(catest.Fixed{istio, spire})
		check("listed again")
		leases[0].Release()
	})
}

// TestGrantsMove: in a live move each lease takes along what it was granted itself,
// and nothing that was another pod's.
func TestGrantsMove(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		istio, broker, local := nameless("istio"), perPodOf("broker"), nameless("local")
		td, next, brokers := catest.NewCA(t, "td.test"), catest.NewCA(t, "td.test"), catest.NewCA(t, "td.test")
		granted := map[string]*catest.CA{"u1": catest.NewCA(t, "td.test"), "u2": catest.NewCA(t, "td.test")}
		istio.Set(ca.Key{Provider: "istio", ID: web}, available(td.SVID(t, web)))
		local.Set(ca.Key{Provider: "local", ID: web}, available(next.SVID(t, web)))
		for uid, c := range granted {
			broker.grant(uid, c.Bundles(ca.Strict))
			// What comes with the SVID is of one pod, too.
			bundles := ca.Union(brokers.Bundles(ca.Strict), c.Bundles(ca.Strict))
			broker.Set(ca.Key{Provider: "broker", ID: web, UID: uid}, available(brokers.SVIDWith(t, web, bundles)))
		}
		m := catest.RunManager(t, catest.Fixed{istio, broker}, ca.ManagerConfig{})
		leases := []*ca.Lease{m.Acquire(pod(t, 1)), m.Acquire(pod(t, 2))}
		check := func(when string, provider string) {
			t.Helper()
			for _, l := range leases {
				for uid, c := range granted {
					if got := trusts(t, l, c); got != (uid == l.Ref().UID) {
						t.Errorf("%s: %s trusts what is for %s: %v", when, l.Ref().UID, uid, got)
					}
				}
				if svid, _ := now(t, l); svid.Provider != provider {
					t.Errorf("%s: the certificate is of %s, want %s", when, svid.Provider, provider)
				}
			}
		}
		label := func(p string, k ca.Key, svid *ca.SVID, set func(ca.Key, ca.Event)) {
			s := *svid
			s.Provider = p
			set(k, available(&s))
		}
		label("istio", ca.Key{Provider: "istio", ID: web}, td.SVID(t, web), istio.Set)
		label("local", ca.Key{Provider: "local", ID: web}, next.SVID(t, web), local.Set)
		for uid, c := range granted {
			label("broker", ca.Key{Provider: "broker", ID: web, UID: uid},
				brokers.SVIDWith(t, web, ca.Union(brokers.Bundles(ca.Strict), c.Bundles(ca.Strict))), broker.Set)
		}
		check("at first", "istio")
		for _, uid := range []string{"u1", "u2"} {
			broker.grant(uid, nil) // new watches hear nothing: all depends on what goes along
		}
		m.Replace(catest.Fixed{local, istio, broker})
		check("to another that is shared", "local")
		m.Replace(catest.Fixed{broker, local})
		check("to the one that grants", "broker")
		m.Replace(catest.Fixed{local, broker})
		check("and back", "local")
		silent := perPodOf("broker")
		m.Replace(catest.Fixed{local, silent})
		check("with other settings", "local")
		silent.grant("u1", ca.NewBundles(nil))
		if trusts(t, leases[0], granted["u1"]) || !trusts(t, leases[1], granted["u2"]) {
			t.Error("want the grant of the first taken back, and no other")
		}
		m.Replace(catest.Fixed{local})
		if trusts(t, leases[1], granted["u2"]) {
			t.Error("the grant of a provider that is no longer listed is trusted")
		}
		silent.want(t, "no longer listed", "", "")
		for _, l := range leases {
			l.Release()
		}
	})
}

// TestAudienceModel lets leases come and go, and providers be listed in any order,
// and holds each time that watches name living leases alone, that every lease
// trusts what its pod is granted by the others that are listed, and nothing of
// another pod.
func TestAudienceModel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		random := rand.New(rand.NewPCG(seed, 0))
		td := catest.NewCA(t, "td.test")
		issuers := []*named{nameless("istio"), perPodOf("broker"), nameless("local"), perPodOf("delegated")}
		var pods []ca.WorkloadRef
		grants := map[string]map[string]*catest.CA{} // by provider and UID; "" is for all
		for i := range 4 {
			pods = append(pods, pod(t, i), pod(t, i)) // of each two processes
		}
		for _, p := range issuers {
			grants[p.Name()] = map[string]*catest.CA{}
			uids := []string{"u0", "u1", "u2", "u3"}
			if p.Key(pods[0]).UID == "" {
				uids = []string{""}
			}
			for _, uid := range uids {
				c := catest.NewCA(t, "td.test")
				grants[p.Name()][uid] = c
				p.grant(uid, c.Bundles(ca.Strict))
				p.Set(ca.Key{Provider: p.Name(), ID: web, UID: uid}, available(td.SVID(t, web)))
			}
		}
		listed := []*named{issuers[0], issuers[1]}
		router := func() (r catest.Fixed) {
			for _, p := range listed {
				r = append(r, p)
			}
			return r
		}
		m := catest.RunManager(t, router(), ca.ManagerConfig{Linger: time.Minute})
		leases := map[*ca.Lease]bool{}
		check := func(step int) {
			living := map[ca.WorkloadRef]bool{}
			for l := range leases {
				living[l.Ref()] = true
				for _, p := range issuers {
					for uid, c := range grants[p.Name()] {
						want := slices.Index(listed, p) > 0 && (uid == "" || uid == l.Ref().UID)
						if got := trusts(t, l, c); got != want {
							t.Fatalf("step %d: a lease of %s trusts what %s grants to %q: %v, want %v", step, l.Ref().UID, p.Name(), uid, got, want)
						}
					}
				}
			}
			synctest.Wait()
			for _, p := range issuers {
				for w, n := range p.all() {
					shared := p.Key(pods[0]).UID == ""
					if shared && (w.UID != "" || w.Pod != "" || w.PIDFD != nil) || !shared && (!living[w] || n != 1) {
						t.Fatalf("step %d: %d watches of %s name %+v", step, n, p.Name(), w)
					}
				}
			}
		}
		for step := range 400 {
			switch random.IntN(5) {
			case 0, 1:
				leases[m.Acquire(pods[random.IntN(len(pods))])] = true
			case 2, 3:
				for _, l := range slices.SortedFunc(maps.Keys(leases), func(a, b *ca.Lease) int {
					return strings.Compare(fmt.Sprintf("%s %p", a.Ref().UID, a), fmt.Sprintf("%s %p", b.Ref().UID, b))
				}) {
					l.Release()
					delete(leases, l)
					break
				}
			case 4:
				random.Shuffle(len(issuers), func(i, j int) { issuers[i], issuers[j] = issuers[j], issuers[i] })
				listed = slices.Clone(issuers[:1+random.IntN(len(issuers))])
				m.Replace(router())
			}
			check(step)
		}
		for l := range leases {
			l.Release()
		}
		sleep(2 * time.Minute)
		for _, p := range issuers {
			p.want(t, "the end", "", "")
		}
	})
}
