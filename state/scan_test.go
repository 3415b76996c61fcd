package state

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// scanner is Authorize without an index: it asks every policy that applies, in
// order of the keys, and of each every rule. What a rule matches it takes from the
// code under test; naive does not.
type scanner struct {
	store  *Store
	byKey  map[string]*policy
	scopes map[string]*[policyKinds][]*policy // by namespace, "" = global
}

func newScanner(s *Store, policies []*policy) *scanner {
	sc := &scanner{store: s, byKey: map[string]*policy{}, scopes: map[string]*[policyKinds][]*policy{}}
	slices.SortFunc(policies, comparePolicies)
	for _, p := range policies {
		sc.byKey[p.key] = p
		ns := p.Namespace
		switch p.Scope {
		case PolicySelector:
			continue
		case PolicyGlobal:
			ns = ""
		}
		if sc.scopes[ns] == nil {
			sc.scopes[ns] = &[policyKinds][]*policy{}
		}
		sc.scopes[ns][p.kind()] = append(sc.scopes[ns][p.kind()], p)
	}
	return sc
}

func (sc *scanner) authorize(c Conn) (v Verdict) {
	var named []*policy
	for i, key := range c.Destination.AuthorizationPolicies {
		p := sc.byKey[key]
		switch {
		case p == nil:
			v.Missing = append(v.Missing, key)
		case p.Scope == PolicyGlobal, p.Scope == PolicyNamespace && p.Namespace == c.Destination.Namespace, slices.Contains(c.Destination.AuthorizationPolicies[:i], key):
		default:
			named = append(named, p)
		}
	}
	if len(v.Missing) > 0 && sc.store.cfg.AuthzMissingPolicy == DenyMissing {
		v.Events = []PolicyEvent{{"policy is missing, deny", v.Missing[0]}}
		v.Denied, v.Policy = &Denied{v.Missing[0]}, v.Missing[0]
		return v
	}
	sub := sc.store.subject(&c)
	sc.scan(Deny, true, named, c.Destination, &sub, &v)
	if _, denied := sc.scan(Deny, false, named, c.Destination, &sub, &v); denied {
		v.Denied = &Denied{v.Policy}
		return v
	}
	if exist, matched := sc.scan(Allow, true, named, c.Destination, &sub, &v); exist && !matched {
		v.Events = append(v.Events, PolicyEvent{Message: "dry-run: no allow policies match"})
	}
	switch exist, matched := sc.scan(Allow, false, named, c.Destination, &sub, &v); {
	case matched:
	case exist:
		v.Events = append(v.Events, PolicyEvent{Message: "no allow policies matched"})
		v.Denied = &Denied{}
	default:
		v.Events = append(v.Events, PolicyEvent{Message: "no allow policies, allow"})
	}
	return v
}

func (sc *scanner) scan(action Action, dryRun bool, named []*policy, dst *Workload, sub *subject, v *Verdict) (exist, matched bool) {
	var lists [3][]*policy
	if set := sc.scopes[dst.Namespace]; set != nil && dst.Namespace != "" {
		lists[0] = set[kindOf(action, dryRun)]
	}
	if set := sc.scopes[""]; set != nil {
		lists[1] = set[kindOf(action, dryRun)]
	}
	lists[2] = named
	for _, list := range lists {
		for _, p := range list {
			if p.Action != action || p.DryRun != dryRun {
				continue
			}
			exist = true
			for i, rule := range p.Rules {
				if !p.rule(rule, sub) {
					continue
				}
				matched = true
				v.Events = append(v.Events, p.events...)
				if !dryRun {
					v.Policy, v.Rule = p.denied.Policy, i
					return exist, matched
				}
				break
			}
		}
	}
	return exist, matched
}

// crowd draws what world draws, and more of it: policies that an index separates,
// and all that decides what a policy sees.
type crowd struct {
	world
}

// draws gives the bytes of a fuzzer to rand, and then those of a generator.
type draws struct {
	data []byte
	rest *rand.PCG
}

func (d *draws) Uint64() uint64 {
	if len(d.data) == 0 {
		return d.rest.Uint64()
	}
	b := d.data[0]
	d.data = d.data[1:]
	return uint64(b) << 56
}

func (w crowd) config() Config {
	return Config{
		DefaultTrustDomain:      "td",
		TrustDomainAliases:      [][]string{nil, {"old"}, {"old", "older", "not/valid"}}[w.IntN(3)],
		AuthzForeignTrustDomain: ForeignTrustDomain(w.IntN(2)),
		AuthzMissingPolicy:      MissingPolicy(max(0, w.IntN(8)-6)),
	}
}

func (w crowd) namespace() string { return w.of("a", "b", "c", "d", "") }
func (w crowd) account() string   { return w.of("x", "y", "z", "") }
func (w crowd) domain() string    { return w.of("td", "old", "older", "far", "mesh", "not/valid") }

func (w crowd) principal() StringMatch {
	ns, sa := w.namespace(), w.account()
	switch w.IntN(12) {
	case 0:
		return w.str()
	case 1, 2:
		return StringMatch{Prefix, w.domain() + "/ns/" + ns + w.of("", "/", "/sa/")}
	case 3:
		return StringMatch{Suffix, "/ns/" + ns + "/sa/" + sa}
	case 4:
		return StringMatch{Kind: Presence}
	case 5:
		return StringMatch{Exact, w.of("td", "td/", "td/x", "", "/", "td/ns/a/sa/x/more")}
	}
	return StringMatch{Exact, w.domain() + "/ns/" + ns + "/sa/" + sa}
}

func (w crowd) prefix() netip.Prefix {
	return netip.MustParsePrefix(w.of(
		"10.0.0.1/32", "10.0.0.9/24", "0.0.0.0/0", "::/0", "fd00::1/128", "10.0.0.2/31", "10.0.0.0/8", "10.1.0.0/16",
		"::ffff:10.0.0.0/120", "::ffff:0.0.0.0/96", "fd00::/8", "fd00::7/64", "fd00::/65", "10.0.0.3/32", "10.0.0.4/32", "8000::/1"))
}

func (w crowd) address() netip.AddrPort {
	ip := w.of("10.0.0.1", "10.0.0.2", "10.1.0.1", "fd00::1", "fd00::1:0:0:1", "::ffff:10.0.0.1", "192.0.2.1", "fe80::1%eth0", "")
	if ip == "" {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(addr(ip), w.port())
}

func (w crowd) oneMatch() Match {
	ns := func() StringMatch {
		if w.IntN(6) == 0 {
			return w.str()
		}
		return StringMatch{Exact, w.namespace()}
	}
	account := func() ServiceAccountMatch {
		return ServiceAccountMatch{w.namespace(), w.of("x", "y", "z", "", "x/more")}
	}
	list := func() int { return 1 + w.IntN(2) }
	m := Match{Unknown: w.IntN(20) == 0}
	for range w.IntN(4) {
		switch w.IntN(12) {
		case 0, 1, 2:
			m.Principals = times(list(), w.principal)
		case 3:
			m.Namespaces = times(list(), ns)
		case 4:
			m.ServiceAccounts = times(list(), account)
		case 5:
			m.SourceIPs = times(list(), w.prefix)
		case 6:
			m.DestinationIPs = times(list(), w.prefix)
		case 7:
			m.DestinationPorts = times(list(), w.port)
		case 8:
			m.NotPrincipals = times(list(), w.principal)
		case 9:
			m.NotNamespaces = times(list(), ns)
		case 10:
			m.NotSourceIPs = times(list(), w.prefix)
		case 11:
			m.NotServiceAccounts = times(list(), account)
		}
	}
	return m
}

func times[T any](n int, f func() T) []T {
	var out []T
	for range n {
		out = append(out, f())
	}
	return out
}

func (w crowd) policy() *Policy {
	p := &Policy{
		Name: fmt.Sprintf("p%d", w.IntN(60)), Namespace: w.of("dst", "other", "dst", "other", ""),
		Scope: PolicyScope(w.IntN(3)), Action: Action(w.IntN(2)), DryRun: w.IntN(3) == 0,
		Rules: times(max(0, w.IntN(8)-1), func() Rule {
			return times(max(1, w.IntN(5)-1)-w.IntN(20)/19, func() Clause { return times(max(1, w.IntN(4)-1)-w.IntN(20)/19, w.oneMatch) })
		}),
	}
	if p.Scope == PolicyNamespace && p.Namespace == "" {
		p.Scope = PolicyGlobal
	}
	return p
}

func (w crowd) conn() Conn {
	c := Conn{Src: w.address(), Dst: w.address(), Destination: destination(w.of("dst", "dst", "other", "third", ""))}
	c.Destination.TrustDomain = w.of("td", "td", "old", "mesh")
	for range w.IntN(5) {
		c.Destination.AuthorizationPolicies = append(c.Destination.AuthorizationPolicies, fmt.Sprintf("%s/p%d", w.of("dst", "other", ""), w.IntN(60)))
	}
	id := w.of("td", "td", "old", "older", "far", "mesh")
	switch w.IntN(8) {
	case 0:
		return c
	case 1:
		id += w.of("", "/x", "/ns/a", "/ns/a/sa", "/ns/a/sa/x/more", "/ns/a/x/y")
	default:
		id += "/ns/" + w.of("a", "b", "c", "d") + "/sa/" + w.of("x", "y", "z")
	}
	c.Identity = spiffeid.RequireFromString("spiffe://" + id)
	return c
}

// update changes the policies of a store and, by what decision D7 says of them,
// those of a model.
func (w crowd) update(model map[string]*policy) Update {
	var u Update
	add := func(p *policy, err error) {
		if err != nil {
			panic(err)
		}
		if old := model[p.key]; old == nil || old.tombstone || !p.tombstone {
			model[p.key] = p
		}
	}
	for range w.IntN(12) {
		p := w.policy()
		u.Policies = append(u.Policies, p)
		add(newPolicy(p))
	}
	for range w.IntN(3) {
		p := w.policy()
		u.Tombstones = append(u.Tombstones, p)
		add(newTombstone(p))
	}
	for range w.IntN(6) {
		key := w.policy().Key()
		u.RemovedPolicies = append(u.RemovedPolicies, key)
		delete(model, key)
	}
	return u
}

// outcomes counts what came of the comparisons.
type outcomes struct{ denied, explicit, allowed, dry, missing, ruled int }

func (o *outcomes) count(v Verdict) {
	one := func(b bool, n *int) {
		if b {
			*n++
		}
	}
	one(v.Denied != nil && v.Policy == "", &o.denied)
	one(v.Denied != nil && v.Policy != "", &o.explicit)
	one(v.Denied == nil && v.Policy != "", &o.allowed)
	one(len(v.Events) > 3, &o.dry)
	one(v.Missing != nil, &o.missing)
	one(v.Rule > 0, &o.ruled)
}

func compareWithScan(t *testing.T, src rand.Source, o *outcomes) {
	t.Helper()
	w := crowd{world: world{rand.New(src)}}
	s := New(w.config())
	model := map[string]*policy{}
	for range 1 + w.IntN(12) {
		u := w.update(model)
		apply(t, s, u)
		s.checkIndexes(t, model)
		sc := newScanner(s, slices.Collect(maps.Values(model)))
		for range 4 {
			c := w.conn()
			want, got := sc.authorize(c), s.Authorize(c)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Fatalf("(-scan +got):\n%s\n%+v\nto %+v", diff, c, c.Destination)
			}
			o.count(got)
			if e := s.ExplainAuthorize(c); !cmp.Equal(e.Verdict, want) {
				t.Fatalf("explained as %+v, want %+v", e.Verdict, want)
			} else {
				checkExplanation(t, e, sc)
			}
		}
	}
}

func TestAuthorizeAgainstScan(t *testing.T) {
	var o outcomes
	for seed := range uint64(300) {
		compareWithScan(t, rand.NewPCG(seed, 5), &o)
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
	// The comparison says little unless every outcome is met often.
	if min(o.denied, o.explicit, o.allowed, o.dry, o.missing, o.ruled) < 300 {
		t.Errorf("outcomes: %+v", o)
	}
}

func FuzzAuthorizeAgainstScan(f *testing.F) {
	f.Add([]byte("seed"))
	f.Fuzz(func(t *testing.T, data []byte) {
		compareWithScan(t, &draws{data: data, rest: rand.NewPCG(1, 2)}, &outcomes{})
	})
}

// checkExplanation checks what an explanation says of rules against what they do,
// and that nothing was left out which decides.
func checkExplanation(t *testing.T, e AuthorizeExplanation, sc *scanner) {
	t.Helper()
	decided := e.Verdict.Policy == "" || e.Verdict.Missing != nil && e.Verdict.Policy == e.Verdict.Missing[0]
	for _, ep := range e.Policies {
		p := sc.byKey[ep.Key]
		if p == nil || ep.Action != p.Action || ep.DryRun != p.DryRun || ep.Scope != p.Scope || ep.Tombstone != p.tombstone || ep.Policy != p.fullName() {
			t.Fatalf("%+v is not %+v", ep, p)
		}
		for i, r := range ep.Rules {
			if i > 0 && r.Rule <= ep.Rules[i-1].Rule {
				t.Errorf("rules of %s out of order: %+v", ep.Key, ep.Rules)
			}
			if r.Matched != (len(r.Matches) == len(p.Rules[r.Rule])) {
				t.Errorf("%s: %+v of %d clauses", ep.Key, r, len(p.Rules[r.Rule]))
			}
			decided = decided || r.Matched && ep.Policy == e.Verdict.Policy && r.Rule == e.Verdict.Rule
		}
	}
	if !decided {
		t.Errorf("no rule decided: %+v", e)
	}
}

// checkIndexes compares the policies of a store with those of a model, and each
// index, which grew by changes, with one that is made of its policies at once.
func (s *Store) checkIndexes(t *testing.T, model map[string]*policy) {
	t.Helper()
	tables := s.read()
	defer s.release(tables)
	if !maps.EqualFunc(tables.policies, model, (*policy).equal) {
		t.Fatalf("policies: %v, want %v", slices.Sorted(maps.Keys(tables.policies)), slices.Sorted(maps.Keys(model)))
	}
	n := 0
	for ns, set := range tables.sets {
		for kind, ix := range set.kinds {
			if ix == nil {
				continue
			}
			n += len(ix.policies)
			for _, p := range ix.policies {
				if tables.policies[p.key] != p || !p.in(ns) || int(p.kind()) != kind {
					t.Fatalf("%s does not belong into set %q", p.key, ns)
				}
			}
			ix.check(t)
		}
	}
	for _, p := range tables.policies {
		if p.Scope != PolicySelector {
			n--
		}
	}
	if n != 0 {
		t.Errorf("%d policies too many in the sets", n)
	}
}

func (ix *ruleIndex) check(t *testing.T) {
	t.Helper()
	fresh := (*ruleIndex)(nil).with(nil, ix.policies)
	equal := slices.Equal(ix.policies, fresh.policies) && slices.Equal(ix.always, fresh.always) && slices.Equal(ix.uses, fresh.uses) &&
		slices.Equal(slices.Concat(ix.pieces...), slices.Concat(fresh.pieces...)) && ix.size == fresh.size
	if !equal {
		t.Fatalf("changed: %+v\nnew: %+v", ix, fresh)
	}
	if len(ix.pieces) != 1<<ix.bits {
		t.Errorf("%d pieces for %d bits", len(ix.pieces), ix.bits)
	}
	for i, piece := range ix.pieces {
		for _, p := range piece {
			if p.hash>>(64-ix.bits) != uint64(i) {
				t.Errorf("%x in piece %d of 1<<%d", p.hash, i, ix.bits)
			}
		}
	}
	if average := ix.size >> ix.bits; average > pieceMax || average < pieceMin && ix.bits > 0 {
		t.Errorf("%d postings in 1<<%d pieces", ix.size, ix.bits)
	}
}
