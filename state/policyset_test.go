package state

import (
	"net/netip"
	"reflect"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func scoped(scope PolicyScope, action Action, rules ...Rule) *Policy {
	return &Policy{Name: "p", Namespace: "ns", Scope: scope, Action: action, Rules: rules}
}

// badRule is one that rejects its policy.
func badRule() Rule { return Rule{{{SourceIPs: make([]netip.Prefix, 1)}}} }

func portRule(ports ...uint16) Rule { return Rule{{{DestinationPorts: ports}}} }

// spec/state-xds-dns.md §4.11: every accepted policy is a change, be it what was
// known before; what is not accepted is one only if a tombstone takes effect.
func TestST_PoliciesChangedByWhat(t *testing.T) {
	good, bad := scoped(PolicyNamespace, Deny, portRule(80)), scoped(PolicyNamespace, Deny, badRule())
	undecodable := scoped(PolicySelector, Allow)
	policies := func(p ...*Policy) Update { return Update{Policies: p} }
	removed := Update{RemovedPolicies: []string{"ns/p"}}
	tests := []struct {
		name   string
		before []Update
		update Update
		want   bool
	}{
		{"new", nil, policies(good), true},
		{"unchanged", []Update{policies(good)}, policies(good), true},
		{"unchanged beside a rejected one", []Update{policies(good)}, policies(good, &Policy{Name: "q", Rules: []Rule{badRule()}}), true},
		{"changed", []Update{policies(good)}, policies(scoped(PolicyNamespace, Deny, portRule(81))), true},
		{"removed", []Update{policies(good)}, removed, true},
		{"removed, but unknown", nil, removed, false},
		{"removed twice", []Update{policies(good), removed}, removed, false},
		{"in and out", nil, Update{Policies: []*Policy{good}, RemovedPolicies: []string{"ns/p"}}, true},
		{"nothing", []Update{policies(good)}, Update{}, false},
		{"rejected, with a last good one", []Update{policies(good)}, policies(bad), false},
		{"undecodable, with a last good one", []Update{policies(good)}, Update{Tombstones: []*Policy{undecodable}}, false},
		{"rejected", nil, policies(bad), true},
		{"rejected again", []Update{policies(bad)}, policies(bad), false},
		{"undecodable", nil, Update{Tombstones: []*Policy{undecodable}}, true},
		{"undecodable after rejected", []Update{policies(bad)}, Update{Tombstones: []*Policy{undecodable}}, true},
		{"good after rejected", []Update{policies(bad)}, policies(good), true},
		{"removed after rejected", []Update{policies(bad)}, removed, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := New(Config{})
			for _, u := range tt.before {
				_ = s.Apply(u) // some of it is rejected
			}
			policies, all := s.PoliciesChanged(), s.Changed()
			_ = s.Apply(tt.update)
			if got := isClosed(policies); got != tt.want || isClosed(all) != tt.want {
				t.Errorf("policies changed %v, anything %v, want %v", got, isClosed(all), tt.want)
			}
		})
	}
}

// POL-01, R-21 and §4.2: each scope after each other one, beside a policy that
// stays; the workload names the policy as well, which must not make two of it.
func TestST_POL01_ScopeThereAndBack(t *testing.T) {
	scopes := []PolicyScope{PolicyGlobal, PolicyNamespace, PolicySelector}
	for _, from := range scopes {
		for _, to := range scopes {
			s := New(Config{})
			beside := &Policy{Name: "beside", Namespace: "ns", Scope: PolicyNamespace, Action: Deny, DryRun: true, Rules: []Rule{{}}}
			apply(t, s, Update{Policies: []*Policy{beside}})
			for _, scope := range []PolicyScope{from, to, from} {
				p := scoped(scope, Deny, Rule{})
				p.DryRun = true
				apply(t, s, Update{Policies: []*Policy{p}})
				for _, w := range []struct {
					destination *Workload
					want        int
				}{
					{destination("elsewhere"), count(scope == PolicyGlobal)},
					{destination("elsewhere", "ns/p", "ns/p"), 1},
					{destination("ns"), 1 + count(scope != PolicySelector)},
					{destination("ns", "ns/p", "ns/beside", "ns/p"), 2},
					{destination(""), count(scope == PolicyGlobal)},
				} {
					v := s.Authorize(Conn{Destination: w.destination})
					if got := len(v.Events) - 1; got != w.want { // the last event is the outcome
						t.Errorf("from %v to %v, now %v: %d matches in %q naming %v, want %d",
							from, to, scope, got, w.destination.Namespace, w.destination.AuthorizationPolicies, w.want)
					}
				}
			}
		}
	}
}

func count(b bool) int {
	if b {
		return 1
	}
	return 0
}

// D7: a policy that the server has removed is missing for whoever names it, be it
// a good one or a tombstone, and is so no more when it comes again.
func TestD7_RemovedPolicyIsMissing(t *testing.T) {
	for name, u := range map[string]Update{
		"good":        {Policies: []*Policy{scoped(PolicySelector, Deny, Rule{})}},
		"tombstone":   {Policies: []*Policy{scoped(PolicySelector, Deny, badRule())}},
		"undecodable": {Tombstones: []*Policy{scoped(PolicySelector, Allow)}},
	} {
		for mode, wantDenied := range map[MissingPolicy]bool{AllowMissing: false, DenyMissing: true} {
			s := New(Config{AuthzMissingPolicy: mode})
			_ = s.Apply(u)
			c := Conn{Destination: destination("dst", "ns/p")}
			if v := s.Authorize(c); v.Denied == nil || v.Missing != nil {
				t.Errorf("%s: %+v", name, v)
			}
			apply(t, s, Update{RemovedPolicies: []string{"ns/p"}})
			v := s.Authorize(c)
			if diff := cmp.Diff([]string{"ns/p"}, v.Missing); diff != "" || (v.Denied != nil) != wantDenied {
				t.Errorf("%s, removed: %+v", name, v)
			}
			if wantDenied && (v.Policy != "ns/p" || len(v.Events) != 1 || v.Events[0] != PolicyEvent{"policy is missing, deny", "ns/p"}) {
				t.Errorf("%s, removed: %+v", name, v)
			}
			apply(t, s, Update{Policies: []*Policy{scoped(PolicySelector, Allow, Rule{})}})
			if v := s.Authorize(c); v.Denied != nil || v.Missing != nil {
				t.Errorf("%s, there again: %+v", name, v)
			}
		}
	}
}

// D7: a rejected policy without a name has its scope and action all the same.
func TestD7_TombstoneWithoutName(t *testing.T) {
	s := New(Config{})
	nameless := &Policy{Namespace: "ns", ResourceName: "ns/p", Scope: PolicyNamespace, Action: Deny}
	if err := s.Apply(Update{Policies: []*Policy{nameless}}); err == nil {
		t.Error("applied without a name")
	}
	for _, w := range []*Workload{destination("ns"), destination("elsewhere", "ns/p")} {
		if v := s.Authorize(Conn{Destination: w}); v.Denied == nil {
			t.Errorf("in %s naming %v: %+v", w.Namespace, w.AuthorizationPolicies, v)
		}
	}
	if v := s.Authorize(Conn{Destination: destination("elsewhere")}); v.Denied != nil {
		t.Errorf("elsewhere: %v", v.Denied)
	}
}

// D7: a rejected policy whose scope or action means nothing is in force for those
// who name it, by the name that they use; a dry run is none the less for that.
func TestD7_TombstoneWithoutScope(t *testing.T) {
	for _, tt := range []struct {
		name   string
		p      Policy
		denied bool
	}{
		{"namespace without a name", Policy{Name: "p", Scope: PolicyNamespace, Action: Deny}, true},
		{"unknown scope", Policy{Name: "p", Namespace: "ns", Scope: 9, Action: Deny}, true},
		{"unknown scope and action", Policy{Name: "p", Namespace: "ns", Scope: 9, Action: 9}, true},
		{"unknown action", Policy{Name: "p", Namespace: "ns", Scope: PolicySelector, Action: 9}, true},
		{"unknown scope of a dry run", Policy{Name: "p", Namespace: "ns", Scope: 9, Action: Deny, DryRun: true}, false},
		{"unknown action of a dry run", Policy{Name: "p", Namespace: "ns", Scope: PolicySelector, Action: 9, DryRun: true}, false},
	} {
		s := New(Config{})
		tt.p.ResourceName = "key"
		tt.p.Rules = []Rule{{}}
		if err := s.Apply(Update{Policies: []*Policy{&tt.p}}); err == nil {
			t.Errorf("%s: applied", tt.name)
		}
		v := s.Authorize(Conn{Destination: destination("ns", "key")})
		if (v.Denied != nil) != tt.denied || v.Missing != nil {
			t.Errorf("%s: %+v", tt.name, v)
		}
		if v := s.Authorize(Conn{Destination: destination("ns")}); v.Denied != nil {
			t.Errorf("%s, not named: %v", tt.name, v.Denied)
		}
	}
}

// Within one update: the last of a key counts, a rejected one does not take the
// place of a good one, and a removal comes last.
func TestPoliciesOfOneUpdate(t *testing.T) {
	deny, allow, bad := scoped(PolicyNamespace, Deny, Rule{}), scoped(PolicyGlobal, Allow, Rule{}), scoped(PolicyNamespace, Deny, badRule())
	for _, tt := range []struct {
		name   string
		update Update
		want   string // the policy's action, "" if there is none
	}{
		{"the last one counts", Update{Policies: []*Policy{deny, allow}}, "Allow"},
		{"so it does the other way round", Update{Policies: []*Policy{allow, deny}}, "Deny"},
		{"good and rejected", Update{Policies: []*Policy{allow, bad}}, "Allow"},
		{"rejected and good", Update{Policies: []*Policy{bad, allow}}, "Allow"},
		{"removed", Update{Policies: []*Policy{allow, deny}, RemovedPolicies: []string{"ns/p"}}, ""},
	} {
		for name, s := range map[string]*Store{"new": New(Config{}), "known": New(Config{})} {
			if name == "known" {
				apply(t, s, Update{Policies: []*Policy{{Name: "p", Namespace: "ns", Scope: PolicySelector}}})
			}
			_ = s.Apply(tt.update)
			got := ""
			switch v := s.Authorize(Conn{Destination: destination("ns")}); {
			case v.Denied != nil:
				got = "Deny"
			case v.Policy != "":
				got = "Allow"
			}
			if got != tt.want {
				t.Errorf("%s, %s: got %q, want %q", tt.name, name, got, tt.want)
			}
		}
	}
}

// What readers hold stays as it is, and what does not change is shared.
func TestPolicySetsAreImmutable(t *testing.T) {
	s := New(Config{DefaultTrustDomain: "td"})
	policies := crowdOfDenies(200)
	apply(t, s, Update{Policies: policies})
	get := func() *ruleIndex {
		tables := s.read()
		defer s.release(tables)
		return tables.sets[""].index(kindOf(Deny, false))
	}
	old := get()
	want := *old
	want.pieces = make([][]posting, len(old.pieces))
	for i := range old.pieces {
		want.pieces[i] = append([]posting(nil), old.pieces[i]...)
	}
	apply(t, s, Update{Policies: policies})
	if get() != old {
		t.Error("an update that says nothing new makes a new index")
	}
	changed := *policies[100]
	changed.Rules = []Rule{portRule(1)}
	apply(t, s, Update{Policies: []*Policy{&changed}, RemovedPolicies: []string{policies[7].Key()}})
	shared := 0
	next := get()
	for i := range next.pieces {
		if len(next.pieces[i]) > 0 && len(old.pieces[i]) > 0 && &next.pieces[i][0] == &old.pieces[i][0] {
			shared++
		}
	}
	if next == old || len(old.pieces) < 16 || shared < len(old.pieces)/2 || shared == len(old.pieces) {
		t.Errorf("%d of %d pieces are shared", shared, len(old.pieces))
	}
	equal := func(a, b *ruleIndex) bool {
		return cmp.Equal(len(a.policies), len(b.policies)) && cmp.Equal(a.uses, b.uses, cmp.AllowUnexported(use{}, keyForm{}))
	}
	if !equal(old, &want) {
		t.Error("an index was edited")
	}
	for i := range old.pieces {
		for j, p := range old.pieces[i] {
			if p != want.pieces[i][j] {
				t.Fatalf("posting %d of piece %d was edited", j, i)
			}
		}
	}
}

// A policy that differs in anything is another one, and takes the place of the
// first; equal compares what is named in a list, which must be complete.
func TestPolicyEqualComparesEveryField(t *testing.T) {
	if p := (&policy{Policy: *scoped(PolicyGlobal, Deny, portRule(80))}); !p.equal(&policy{Policy: *scoped(PolicyGlobal, Deny, portRule(80))}) {
		t.Error("a policy is not equal to its like")
	}
	values := map[string]any{
		"Name": "x", "Namespace": "x", "Scope": PolicyNamespace, "Action": Deny, "DryRun": true, "Unknown": true, "Rules": []Rule{{}},
	}
	differ := func(typ reflect.Type, equal func(v reflect.Value) bool) {
		for i := range typ.NumField() {
			v, field := reflect.New(typ).Elem(), typ.Field(i)
			switch value, ok := values[field.Name]; {
			case ok:
				v.Field(i).Set(reflect.ValueOf(value))
			case field.Type.Kind() == reflect.Slice:
				v.Field(i).Set(reflect.MakeSlice(field.Type, 1, 1))
			case field.Name == "ResourceName":
				continue // it is in the key
			default:
				t.Fatalf("%s: what is another value?", field.Name)
			}
			if equal(v) {
				t.Errorf("policies are equal that differ in %s", field.Name)
			}
		}
	}
	differ(reflect.TypeFor[Policy](), func(v reflect.Value) bool {
		return (&policy{}).equal(&policy{Policy: v.Interface().(Policy)})
	})
	differ(reflect.TypeFor[Match](), func(v reflect.Value) bool {
		return (&policy{Policy: Policy{Rules: []Rule{{{{}}}}}}).equal(&policy{Policy: Policy{Rules: []Rule{{{v.Interface().(Match)}}}}})
	})
	if (&policy{}).equal(&policy{tombstone: true}) || (&policy{}).equal(&policy{key: "x"}) {
		t.Error("a tombstone or another key is equal")
	}
}

// Principals that differ in their trust domain are one key.
func TestRuleStandsOnceUnderAKey(t *testing.T) {
	p := &policy{key: "ns/p", Policy: Policy{Rules: []Rule{{{{Principals: []StringMatch{
		{Exact, "td/ns/a/sa/b"}, {Exact, "old/ns/a/sa/b"}, {Exact, "td/ns/a/sa/b"}, {Exact, "td/ns/a/sa/c"},
	}}}}}}}
	ix := (*ruleIndex)(nil).with(nil, []*policy{p})
	if ix.size != 2 {
		t.Errorf("%d postings, want 2", ix.size)
	}
	if ix = ix.with([]*policy{p}, nil); ix != nil {
		t.Errorf("left of nothing: %+v", ix)
	}
}
