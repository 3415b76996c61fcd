package state

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func destination(ns string, policies ...string) *Workload {
	return &Workload{UID: "dst", Namespace: ns, TrustDomain: "td", AuthorizationPolicies: policies}
}

// The three connections against which attributes are tried.
func conns(t testing.TB) (plain, tls, other Conn) {
	plain = Conn{Src: addrPort("127.0.0.1:1234"), Dst: addrPort("127.0.0.2:8080"), Destination: destination("dst")}
	tls, other = plain, plain
	tls.Identity = spiffe(t, "spiffe://td/ns/namespace/sa/account")
	other.Identity = spiffe(t, "spiffe://td/ns/other/sa/other-account")
	return plain, tls, other
}

// matching tells whether a policy of these rules matches c.
func matching(t testing.TB, c Conn, rules ...Rule) bool {
	t.Helper()
	s := New(Config{DefaultTrustDomain: "td"})
	apply(t, s, Update{Policies: []*Policy{{Name: "p", Namespace: c.Destination.Namespace, Action: Allow, Rules: rules}}})
	return s.Authorize(c).Denied == nil
}

// §11.3, R-01 and POL-02.
func TestDP_R01_EmptyPolicy(t *testing.T) {
	plain, _, _ := conns(t)
	port := func(p uint16) Match { return Match{DestinationPorts: []uint16{p}} }
	tests := []struct {
		name  string
		rules []Rule
		want  bool
	}{
		{"no rules", nil, false},
		{"rule without clauses", []Rule{{}}, true},
		{"clause without matches", []Rule{{{}}}, true},
		{"match without attributes", []Rule{{{{}}}}, false},
		{"match without attributes beside another", []Rule{{{{}, port(8080)}}}, true},
		{"clauses are AND", []Rule{{{port(8080)}, {port(1)}}}, false},
		{"empty clause beside another", []Rule{{{}, {port(1)}}}, false},
		{"matches are OR", []Rule{{{port(1), port(8080)}}}, true},
		{"rules are OR", []Rule{{{port(1)}}, {{port(8080)}}}, true},
		{"positive list is any", []Rule{{{{DestinationPorts: []uint16{1, 8080}}}}}, true},
		{"negative list is none", []Rule{{{{NotDestinationPorts: []uint16{1, 8080}}}}}, false},
		{"negative list", []Rule{{{{NotDestinationPorts: []uint16{1, 2}}}}}, true},
		{"both lists", []Rule{{{{DestinationPorts: []uint16{8080}, NotDestinationPorts: []uint16{8080}}}}}, false},
		{"attributes are AND", []Rule{{{{DestinationPorts: []uint16{8080}, SourceIPs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}}}}, false},
	}
	for _, tt := range tests {
		if got := matching(t, plain, tt.rules...); got != tt.want {
			t.Errorf("%s: got %v, want %v", tt.name, got, tt.want)
		}
	}
}

// R-02 and POL-03: (a or b) and port 80, wherever the destination is.
func TestDP_R02_Nesting(t *testing.T) {
	rule := Rule{
		{{Namespaces: []StringMatch{{Exact, "a"}}}, {Namespaces: []StringMatch{{Exact, "b"}}}},
		{{DestinationPorts: []uint16{80}}},
	}
	for _, tt := range []struct {
		ns   string
		port uint16
		want bool
	}{{"a", 80, true}, {"b", 80, true}, {"bad", 80, false}, {"a", 12345, false}} {
		for _, network := range []string{"", "remote"} {
			d := destination("dst")
			d.Network = network
			c := Conn{Dst: netip.AddrPortFrom(addr("127.0.0.2"), tt.port), Destination: d, Identity: spiffe(t, "spiffe://td/ns/"+tt.ns+"/sa/x")}
			if got := matching(t, c, rule); got != tt.want {
				t.Errorf("%s:%d in network %q: got %v, want %v", tt.ns, tt.port, network, got, tt.want)
			}
		}
	}
}

//
func TestDP_R03_MultiRule(t *testing.T) {
	rules := []Rule{{{{Namespaces: []StringMatch{{Exact, "a"}}}}}, {{{DestinationPorts: []uint16{80}}}}}
	for _, tt := range []struct {
		ns   string
		port uint16
		want bool
	}{{"a", 1, true}, {"x", 80, true}, {"a", 80, true}, {"x", 1, false}} {
		c := Conn{Dst: netip.AddrPortFrom(addr("127.0.0.2"), tt.port), Destination: destination("dst"), Identity: spiffe(t, "spiffe://td/ns/"+tt.ns+"/sa/x")}
		if got := matching(t, c, rules...); got != tt.want {
			t.Errorf("%s:%d: got %v, want %v", tt.ns, tt.port, got, tt.want)
		}
	}
}

// R-04 … R-16 and POL-04: each attribute against plaintext, a peer that fits and
// another peer.
func TestDP_R04_R16_Attributes(t *testing.T) {
	plain, tls, other := conns(t)
	far := func(c Conn) Conn { c.Src, c.Dst = addrPort("10.0.0.1:1"), addrPort("10.0.0.2:1"); return c }
	prefix := func(s string) []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix(s)} }
	exact := func(s string) []StringMatch { return []StringMatch{{Exact, s}} }
	account := []ServiceAccountMatch{{"namespace", "account"}}
	tests := []struct {
		name              string
		match             Match
		plain, tls, other bool
	}{
		{"R-04 namespaces", Match{Namespaces: exact("namespace")}, false, true, false},
		{"R-05 not namespaces", Match{NotNamespaces: exact("namespace")}, true, false, true},
		{"R-06 service accounts", Match{ServiceAccounts: account}, false, true, false},
		{"R-07 not service accounts", Match{NotServiceAccounts: account}, true, false, true},
		{"service account of another namespace", Match{ServiceAccounts: []ServiceAccountMatch{{"other", "account"}}}, false, false, false},
		{"service account of nobody", Match{ServiceAccounts: []ServiceAccountMatch{{}}}, false, false, false},
		{"R-08 principals", Match{Principals: exact("td/ns/namespace/sa/account")}, false, true, false},
		{"R-09 not principals", Match{NotPrincipals: exact("td/ns/namespace/sa/account")}, true, false, true},
		{"principals present", Match{Principals: []StringMatch{{Kind: Presence}}}, false, true, true},
		{"principals with an empty prefix", Match{Principals: []StringMatch{{Prefix, ""}}}, false, true, true},
		{"not principals present", Match{NotPrincipals: []StringMatch{{Kind: Presence}}}, true, false, false},
		{"principal with scheme", Match{Principals: exact("spiffe://td/ns/namespace/sa/account")}, false, false, false},
		{"R-10 source IPs", Match{SourceIPs: prefix("127.0.0.1/32")}, true, true, false},
		{"R-11 not source IPs", Match{NotSourceIPs: prefix("127.0.0.1/32")}, false, false, true},
		{"R-12 destination IPs", Match{DestinationIPs: prefix("127.0.0.2/32")}, true, true, false},
		{"R-13 not destination IPs", Match{NotDestinationIPs: prefix("127.0.0.2/32")}, false, false, true},
		{"R-14 range with host bits", Match{SourceIPs: prefix("127.0.0.9/24")}, true, true, false},
		{"other family", Match{SourceIPs: prefix("::/0")}, false, false, false},
		{"not other family", Match{NotSourceIPs: prefix("::/0")}, true, true, true},
		{"R-15 destination ports", Match{DestinationPorts: []uint16{8080}}, true, true, false},
		{"R-16 not destination ports", Match{NotDestinationPorts: []uint16{8080}}, false, false, true},
	}
	for _, tt := range tests {
		for _, c := range []struct {
			name string
			conn Conn
			want bool
		}{{"plaintext", plain, tt.plain}, {"tls", tls, tt.tls}, {"other", far(other), tt.other}} {
			if got := matching(t, c.conn, Rule{{tt.match}}); got != c.want {
				t.Errorf("%s, %s: got %v, want %v", tt.name, c.name, got, c.want)
			}
		}
	}
	mapped := plain
	mapped.Src = addrPort("[::ffff:127.0.0.1]:1")
	if !matching(t, mapped, Rule{{{SourceIPs: prefix("127.0.0.0/8")}}}) {
		t.Error("a mapped address is not in the range of its IPv4 form")
	}
}

// R-17 and POL-05, with every way to cut the input in two.
func TestDP_R17_StringMatch(t *testing.T) {
	tests := []struct {
		m     StringMatch
		input string
		want  bool
	}{
		{StringMatch{Exact, "foo"}, "foo", true},
		{StringMatch{Exact, "foo"}, "foobar", false},
		{StringMatch{Exact, "foo"}, "fo", false},
		{StringMatch{Exact, "foo"}, "", false},
		{StringMatch{Exact, ""}, "", true},
		{StringMatch{Prefix, "foo"}, "foobar", true},
		{StringMatch{Prefix, "foo"}, "foo", true},
		{StringMatch{Prefix, "foo"}, "barfoo", false},
		{StringMatch{Prefix, "foo"}, "", false},
		{StringMatch{Prefix, ""}, "", true},
		{StringMatch{Suffix, "foo"}, "barfoo", true},
		{StringMatch{Suffix, "foo"}, "foo", true},
		{StringMatch{Suffix, "foo"}, "foobar", false},
		{StringMatch{Suffix, "foo"}, "", false},
		{StringMatch{Presence, ""}, "foo", true},
		{StringMatch{Presence, ""}, "", false},
	}
	for _, tt := range tests {
		for i := range len(tt.input) + 1 {
			if got := tt.m.matches(tt.input[:i], tt.input[i:]); got != tt.want {
				t.Errorf("%+v, %q+%q: got %v, want %v", tt.m, tt.input[:i], tt.input[i:], got, tt.want)
			}
		}
	}
}

func allowNamespace(name, ns, peer string) *Policy {
	return &Policy{Name: name, Namespace: ns, Scope: PolicyNamespace, Rules: []Rule{{{{Namespaces: []StringMatch{{Exact, peer}}}}}}}
}

// R-18 and ST-08.
func TestDP_R18_DenyAllow(t *testing.T) {
	s := New(Config{DefaultTrustDomain: "td"})
	all := []Rule{{}}
	apply(t, s, Update{Policies: []*Policy{
		{Name: "allow", Namespace: "ns1", Scope: PolicyNamespace, Rules: []Rule{{{{Principals: []StringMatch{{Exact, "td/ns/a/sa/good"}, {Exact, "td/ns/a/sa/deny"}}}}}}},
		{Name: "deny", Namespace: "ns1", Scope: PolicyNamespace, Action: Deny, Rules: []Rule{{{{Principals: []StringMatch{{Exact, "td/ns/a/sa/deny"}}}}}}},
		{Name: "dry-allow", Namespace: "ns1", Scope: PolicyNamespace, DryRun: true, Rules: all},
		{Name: "dry-deny", Namespace: "ns1", Scope: PolicyNamespace, DryRun: true, Action: Deny, Rules: all},
	}})
	for _, tt := range []struct{ ns, sa, want string }{
		{"ns2", "any", ""},
		{"ns1", "good", ""},
		{"ns1", "other", "connection closed due to policy rejection: allow policies exist, but none allowed"},
		{"ns1", "deny", "connection closed due to policy rejection: explicitly denied by: ns1/deny"},
	} {
		got := ""
		if v := s.Authorize(Conn{Destination: destination(tt.ns), Identity: spiffe(t, "spiffe://td/ns/a/sa/"+tt.sa)}); v.Denied != nil {
			got = v.Denied.Error()
		}
		if got != tt.want {
			t.Errorf("%s to %s: got %q, want %q", tt.sa, tt.ns, got, tt.want)
		}
	}
}

// R-19 and ST-09.
func TestDP_R19_NoPolicies(t *testing.T) {
	v := New(Config{}).Authorize(Conn{Destination: destination("ns")})
	want := Verdict{Events: []PolicyEvent{{Message: "no allow policies, allow"}}}
	if diff := cmp.Diff(want, v); diff != "" {
		t.Error(diff)
	}
	if v := New(Config{}).Authorize(Conn{}); v.Denied == nil {
		t.Error("allowed without a destination")
	}
}

// R-20 and ST-10: what the policy log gets.
func TestDP_R20_Events(t *testing.T) {
	all := []Rule{{}}
	pol := func(name string, action Action, dry bool, rules []Rule) *Policy {
		return &Policy{Name: name, Namespace: "ns1", Scope: PolicyNamespace, Action: action, DryRun: dry, Rules: rules}
	}
	tests := []struct {
		name     string
		policies []*Policy
		events   []PolicyEvent
		denied   bool
	}{
		{"dry run beside real ones", []*Policy{pol("allow", Allow, false, all), pol("dry-run-deny", Deny, true, all), pol("dry-run-allow", Allow, true, all)},
			[]PolicyEvent{{"dry-run: deny policy match", "ns1/dry-run-deny"}, {"dry-run: allow policy match", "ns1/dry-run-allow"}, {"allow policy match", "ns1/allow"}}, false},
		{"dry run alone", []*Policy{pol("dry", Allow, true, nil)},
			[]PolicyEvent{{Message: "dry-run: no allow policies match"}, {Message: "no allow policies, allow"}}, false},
		{"every match of a dry run", []*Policy{pol("a", Deny, true, all), pol("b", Deny, true, all)},
			[]PolicyEvent{{"dry-run: deny policy match", "ns1/a"}, {"dry-run: deny policy match", "ns1/b"}, {Message: "no allow policies, allow"}}, false},
		{"deny", []*Policy{pol("a", Deny, false, all), pol("b", Deny, false, all)},
			[]PolicyEvent{{"deny policy match", "ns1/a"}}, true},
		{"none allowed", []*Policy{pol("a", Allow, false, nil)}, []PolicyEvent{{Message: "no allow policies matched"}}, true},
	}
	for _, tt := range tests {
		s := New(Config{})
		apply(t, s, Update{Policies: tt.policies})
		for range 2 { // the second time tells whether a shared slice was modified
			v := s.Authorize(Conn{Destination: destination("ns1")})
			if diff := cmp.Diff(tt.events, v.Events); diff != "" {
				t.Errorf("%s: events (-want +got):\n%s", tt.name, diff)
			}
			if (v.Denied != nil) != tt.denied {
				t.Errorf("%s: denied: %v", tt.name, v.Denied)
			}
		}
	}
}

// R-21 and POL-01.
func TestDP_R21_ChangeScope(t *testing.T) {
	s := New(Config{})
	denied := func(w *Workload) bool { return s.Authorize(Conn{Destination: w}).Denied != nil }
	p := Policy{Name: "p", Namespace: "ns", Scope: PolicyNamespace}
	apply(t, s, Update{Policies: []*Policy{&p}})
	if !denied(destination("ns")) || denied(destination("other")) {
		t.Error("scope Namespace")
	}
	selector := p
	selector.Scope = PolicySelector
	apply(t, s, Update{Policies: []*Policy{&selector}})
	if denied(destination("ns")) || !denied(destination("other", "ns/p")) || len(s.now().sets) != 0 {
		t.Error("scope WorkloadSelector")
	}
	global := p
	global.Scope = PolicyGlobal
	apply(t, s, Update{Policies: []*Policy{&global}})
	if !denied(destination("ns")) || !denied(destination("other")) {
		t.Error("scope Global")
	}
	apply(t, s, Update{RemovedPolicies: []string{"ns/p", "ns/unknown"}})
	if denied(destination("ns")) || len(s.now().sets)+len(s.now().policies) != 0 {
		t.Error("removed")
	}
}

// A policy that applies by its scope and by name counts once.
func TestNamedTwice(t *testing.T) {
	s := New(Config{})
	apply(t, s, Update{Policies: []*Policy{
		{Name: "scoped", Namespace: "ns", Scope: PolicyNamespace, Action: Deny, DryRun: true, Rules: []Rule{{}}},
		{Name: "named", Namespace: "ns", Scope: PolicySelector, Action: Deny, DryRun: true, Rules: []Rule{{}}},
	}})
	v := s.Authorize(Conn{Destination: destination("ns", "ns/scoped", "ns/named", "ns/named")})
	want := []PolicyEvent{{"dry-run: deny policy match", "ns/scoped"}, {"dry-run: deny policy match", "ns/named"}, {Message: "no allow policies, allow"}}
	if diff := cmp.Diff(want, v.Events); diff != "" {
		t.Error(diff)
	}
}

// D7: a named policy that nobody has sent.
func TestD7_MissingPolicy(t *testing.T) {
	for _, tt := range []struct {
		cfg    MissingPolicy
		denied *Denied
	}{{AllowMissing, nil}, {DenyMissing, &Denied{Policy: "ns/gone"}}} {
		v := New(Config{AuthzMissingPolicy: tt.cfg}).Authorize(Conn{Destination: destination("ns", "ns/gone")})
		if diff := cmp.Diff(tt.denied, v.Denied); diff != "" {
			t.Errorf("%v: %s", tt.cfg, diff)
		}
		if diff := cmp.Diff([]string{"ns/gone"}, v.Missing); diff != "" {
			t.Errorf("%v: %s", tt.cfg, diff)
		}
	}
}

// D7: what becomes of rejected policies.
func TestD7_Tombstones(t *testing.T) {
	bad := []Rule{{{{SourceIPs: make([]netip.Prefix, 1)}}}}
	mk := func(scope PolicyScope, action Action, dry bool, rules []Rule) *Policy {
		return &Policy{Name: "p", Namespace: "ns", Scope: scope, Action: action, DryRun: dry, Rules: rules}
	}
	allowAll, denyNone := []Rule{{}}, []Rule(nil)
	tests := []struct {
		name           string
		first          *Policy // good, may be nil
		second         Update
		scoped, naming bool // denied: a workload in the namespace; one elsewhere that names the policy
	}{
		{"allow", nil, Update{Policies: []*Policy{mk(PolicyNamespace, Allow, false, bad)}}, true, true},
		{"deny", nil, Update{Policies: []*Policy{mk(PolicyNamespace, Deny, false, bad)}}, true, true},
		{"deny by name", nil, Update{Policies: []*Policy{mk(PolicySelector, Deny, false, bad)}}, false, true},
		{"dry run", nil, Update{Policies: []*Policy{mk(PolicyNamespace, Deny, true, bad)}}, false, false},
		{"the last good allow stays", mk(PolicyNamespace, Allow, false, allowAll), Update{Policies: []*Policy{mk(PolicyNamespace, Allow, false, bad)}}, false, false},
		{"the last good deny stays", mk(PolicyNamespace, Deny, false, denyNone), Update{Policies: []*Policy{mk(PolicyNamespace, Deny, false, bad)}}, false, false},
		{"unknown scope", nil, Update{Policies: []*Policy{mk(77, Deny, false, bad)}}, false, true},
		{"undecodable", nil, Update{Tombstones: []*Policy{mk(PolicySelector, Allow, false, allowAll)}}, false, true},
		{"undecodable with a last good one", mk(PolicyNamespace, Allow, false, allowAll), Update{Tombstones: []*Policy{mk(PolicySelector, Allow, false, nil)}}, false, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := New(Config{})
			if tt.first != nil {
				apply(t, s, Update{Policies: []*Policy{tt.first}})
			}
			if err := s.Apply(tt.second); (err != nil) != (len(tt.second.Policies) > 0) {
				t.Errorf("Apply: %v", err)
			}
			if got := s.Authorize(Conn{Destination: destination("ns")}).Denied != nil; got != tt.scoped {
				t.Errorf("in the namespace: denied %v, want %v", got, tt.scoped)
			}
			if got := s.Authorize(Conn{Destination: destination("elsewhere", "ns/p")}).Denied != nil; got != tt.naming {
				t.Errorf("by name: denied %v, want %v", got, tt.naming)
			}
			if v := s.Authorize(Conn{Destination: destination("ns")}); tt.first == nil && tt.second.Policies != nil && tt.second.Policies[0].DryRun && len(v.Events) != 1 {
				t.Errorf("a tombstone of a dry run is logged: %v", v.Events)
			}
			// A good version ends the tombstone, and so does a removal.
			apply(t, s, Update{Policies: []*Policy{mk(PolicyNamespace, Allow, false, allowAll)}})
			if v := s.Authorize(Conn{Destination: destination("ns")}); v.Denied != nil {
				t.Errorf("after a good version: %v", v.Denied)
			}
		})
	}
}

// D7: a condition that we do not know.
func TestD7_UnknownCondition(t *testing.T) {
	known := Match{DestinationPorts: []uint16{80}, Unknown: true}
	for _, tt := range []struct {
		action Action
		match  Match
		port   uint16
		want   bool // matches
	}{
		{Allow, Match{Unknown: true}, 80, false},
		{Allow, known, 80, false},
		{Deny, Match{Unknown: true}, 80, true},
		{Deny, known, 80, true},
		{Deny, known, 81, false},
	} {
		s := New(Config{})
		apply(t, s, Update{Policies: []*Policy{{Name: "p", Namespace: "ns", Action: tt.action, Rules: []Rule{{{tt.match}}}}}})
		v := s.Authorize(Conn{Dst: netip.AddrPortFrom(addr("10.0.0.1"), tt.port), Destination: destination("ns")})
		matched := func(e PolicyEvent) bool { return e.Policy == "ns/p" }
		if got := slices.ContainsFunc(v.Events, matched); got != tt.want {
			t.Errorf("%v %+v, port %d: match %v, want %v", tt.action, tt.match, tt.port, got, tt.want)
		}
	}
}

func TestPolicyRejects(t *testing.T) {
	for name, p := range map[string]*Policy{
		"nil":             nil,
		"name":            {Namespace: "ns"},
		"scope":           {Name: "p", Scope: 3},
		"action":          {Name: "p", Action: 2},
		"namespace scope": {Name: "p", Scope: PolicyNamespace},
		"string match":    {Name: "p", Rules: []Rule{{{{NotPrincipals: []StringMatch{{Kind: 4}}}}}}},
		"prefix":          {Name: "p", Rules: []Rule{{{{NotDestinationIPs: make([]netip.Prefix, 1)}}}}},
	} {
		if err := New(Config{}).Apply(Update{Policies: []*Policy{p}}); err == nil {
			t.Errorf("%s: applied", name)
		}
	}
}

func TestPoliciesChanged(t *testing.T) {
	s := New(Config{})
	p, all := s.PoliciesChanged(), s.Changed()
	apply(t, s, Update{Workloads: []WorkloadUpdate{member(Workload{UID: "w"}, nil)}})
	if isClosed(p) || !isClosed(all) {
		t.Error("a workload is a change of policies, or none at all")
	}
	apply(t, s, Update{Policies: []*Policy{{Name: "p", Namespace: "ns"}}})
	if !isClosed(p) {
		t.Error("a policy is no change")
	}
	p, all = s.PoliciesChanged(), s.Changed()
	apply(t, s, Update{RemovedPolicies: []string{"ns/q"}, Removed: []string{"x"}})
	if isClosed(p) || isClosed(all) {
		t.Error("the removal of nothing is a change")
	}
	apply(t, s, Update{RemovedPolicies: []string{"ns/p"}})
	if !isClosed(p) || !isClosed(all) {
		t.Error("a removal is no change")
	}
}
