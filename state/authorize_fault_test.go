package state

import (
	"slices"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Faults §A11 III: 68–76, 80 and 81, as far as a verdict shows them; 70, 71 and 73
// are TestD7_…, 74 is TestD18_….

// Case 68: what there is of policies decides before what they say.
func TestFault_68_Precedence(t *testing.T) {
	pol := func(name string, action Action, rules ...Rule) *Policy {
		return &Policy{Name: name, Namespace: "ns", Scope: PolicyNamespace, Action: action, Rules: rules}
	}
	for _, tt := range []struct {
		name     string
		policies []*Policy
		want     string // the deciding policy
		denied   bool
	}{
		{"none", nil, "", false},
		{"ALLOW that matches nothing", []*Policy{pol("a", Allow)}, "", true},
		{"DENY that matches nothing", []*Policy{pol("d", Deny)}, "", false},
		{"both match", []*Policy{pol("a", Allow, Rule{}), pol("d", Deny, Rule{})}, "ns/d", true},
		{"DENY does not", []*Policy{pol("a", Allow, Rule{}), pol("d", Deny, portRule(1))}, "ns/a", false},
		{"empty match", []*Policy{pol("a", Allow, Rule{{{}}})}, "", true},
		{"an empty match denies nothing", []*Policy{pol("d", Deny, Rule{{{}}})}, "", false},
	} {
		s := New(Config{})
		apply(t, s, Update{Policies: tt.policies})
		v := s.Authorize(Conn{Dst: addrPort("10.0.0.1:80"), Destination: destination("ns")})
		if v.Policy != tt.want || (v.Denied != nil) != tt.denied {
			t.Errorf("%s: got %+v, want denied %v by %q", tt.name, v, tt.denied, tt.want)
		}
	}
}

// Case 69: a replaced or removed policy counts from the update on.
func TestFault_69_PolicyReplacedAndRemoved(t *testing.T) {
	s := New(Config{DefaultTrustDomain: "td"})
	c := benchConn(t)
	policies := crowdOfDenies(50)
	apply(t, s, Update{Policies: policies})
	for range 3 {
		p := *policies[25]
		p.Rules = append(slices.Clone(p.Rules), Rule{{{Principals: []StringMatch{{Exact, "td/ns/good/sa/good"}}}}})
		apply(t, s, Update{Policies: []*Policy{&p}})
		if v := s.Authorize(c); v.Denied == nil || v.Policy != p.Key() || v.Rule != len(p.Rules)-1 {
			t.Errorf("replaced: %+v", v)
		}
		apply(t, s, Update{RemovedPolicies: []string{p.Key()}})
		if v := s.Authorize(c); v.Denied != nil {
			t.Errorf("removed: %v", v.Denied)
		}
	}
}

// Case 75: forms of principals.
func TestFault_75_Principals(t *testing.T) {
	const id = "spiffe://td/ns/a/sa/b"
	for _, tt := range []struct {
		m    StringMatch
		want bool
	}{
		{StringMatch{Exact, "td/ns/a/sa/b"}, true},
		{StringMatch{Exact, id}, false},
		{StringMatch{Prefix, id}, false},
		{StringMatch{Exact, "td/ns/a/sa/*"}, false}, // the control plane makes a prefix of it
		{StringMatch{Exact, "*"}, false},
		{StringMatch{Exact, ""}, false},
		{StringMatch{Prefix, ""}, true},
		{StringMatch{Kind: Presence}, true},
		{StringMatch{Prefix, "td/ns/a/sa/"}, true},
		{StringMatch{Prefix, "td/ns/a/"}, true},
		{StringMatch{Prefix, "td/ns/a"}, true},
		{StringMatch{Prefix, "td/ns/"}, true},
		{StringMatch{Prefix, "td/"}, true},
		{StringMatch{Prefix, "t"}, true},
		{StringMatch{Prefix, "/ns/a/"}, false},
		{StringMatch{Prefix, "td/ns/b/"}, false},
		{StringMatch{Prefix, "other/ns/a/"}, false},
		{StringMatch{Suffix, "/sa/b"}, true},
		{StringMatch{Suffix, "b"}, true},
		{StringMatch{Suffix, "td/ns/a/sa/b"}, true},
		{StringMatch{Suffix, "xtd/ns/a/sa/b"}, false},
		{StringMatch{Suffix, ""}, true},
		{StringMatch{Exact, "TD/ns/a/sa/b"}, false},
		{StringMatch{Exact, "td/ns/a/sa/b/"}, false},
	} {
		c := Conn{Destination: destination("dst"), Identity: spiffe(t, id)}
		if got := matching(t, c, Rule{{{Principals: []StringMatch{tt.m}}}}); got != tt.want {
			t.Errorf("%+v: got %v, want %v", tt.m, got, tt.want)
		}
		c.Identity = spiffe(t, "spiffe://td")
		if matching(t, c, Rule{{{Principals: []StringMatch{tt.m}}}}) != (tt.m.Kind == Presence || tt.m.Kind != Exact && (tt.m.Value == "" || tt.m == StringMatch{Prefix, "t"})) {
			t.Errorf("%+v: without a path", tt.m)
		}
	}
}

// Case 76: what would be special in a regular expression is literal.
func TestFault_76_AccountsAreLiteral(t *testing.T) {
	for _, tt := range []struct {
		account, identity string
		want              bool
	}{
		{"a.b", "a.b", true},
		{"a.b", "axb", false},
		{".*", "anything", false},
		{"*", "anything", false},
		{"a|b", "a", false},
		{"", "a", false},
		{"a/b", "a", false},
		{"b/sa/c", "c", false},
	} {
		c := Conn{Destination: destination("dst"), Identity: spiffe(t, "spiffe://td/ns/ns/sa/"+tt.identity)}
		m := Match{ServiceAccounts: []ServiceAccountMatch{{"ns", tt.account}}}
		if got := matching(t, c, Rule{{m}}); got != tt.want {
			t.Errorf("%q, %q: got %v, want %v", tt.account, tt.identity, got, tt.want)
		}
	}
}

// Case 80: the policy into which the control plane converts STRICT denies what has
// no identity, and that only.
func TestFault_80_StrictConverted(t *testing.T) {
	s := New(Config{DefaultTrustDomain: "td"})
	apply(t, s, Update{Policies: []*Policy{
		{Name: "istio_converted_static_strict", Namespace: "istio-system", Scope: PolicySelector, Action: Deny,
			Rules: []Rule{{{{NotPrincipals: []StringMatch{{Kind: Presence}}}}}}},
		{Name: "allow", Namespace: "ns", Scope: PolicyNamespace, Rules: []Rule{{{{Principals: []StringMatch{{Exact, "td/ns/good/sa/good"}}}}}}},
	}})
	c := benchConn(t)
	c.Destination = destination("ns", "istio-system/istio_converted_static_strict")
	if v := s.Authorize(c); v.Denied != nil || v.Policy != "ns/allow" {
		t.Errorf("with an identity: %+v", v)
	}
	plain := c
	plain.Identity = spiffeid.ID{}
	if v := s.Authorize(plain); v.Denied == nil || v.Policy != "istio-system/istio_converted_static_strict" {
		t.Errorf("plaintext: %+v", v)
	}
	apply(t, s, Update{RemovedPolicies: []string{"istio-system/istio_converted_static_strict"}})
	if v := s.Authorize(plain); v.Denied == nil || v.Policy != "" {
		t.Errorf("plaintext against ALLOW by identity: %+v", v)
	}
}

// Case 81: a dry run decides nothing, whatever it says, and is logged.
func TestFault_81_DryRun(t *testing.T) {
	for _, action := range []Action{Allow, Deny} {
		for _, rules := range [][]Rule{nil, {{}}, {portRule(80)}} {
			s := New(Config{})
			apply(t, s, Update{Policies: []*Policy{{Name: "dry", Namespace: "ns", Action: action, DryRun: true, Rules: rules}}})
			v := s.Authorize(Conn{Dst: addrPort("10.0.0.1:80"), Destination: destination("ns")})
			logged := slices.ContainsFunc(v.Events, func(e PolicyEvent) bool { return e.Policy == "ns/dry" })
			if v.Denied != nil || v.Policy != "" || logged != (rules != nil) {
				t.Errorf("%v %v: %+v", action, rules, v)
			}
		}
	}
}
