package xds

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/ztunnel-go/ztunnel/state"
	"github.com/ztunnel-go/ztunnel/xds/discoverypb"
	"github.com/ztunnel-go/ztunnel/xds/securitypb"
	"github.com/ztunnel-go/ztunnel/xds/workloadpb"
)

func exact(v string) *securitypb.StringMatch {
	return &securitypb.StringMatch{MatchType: &securitypb.StringMatch_Exact{Exact: v}}
}

// policyOf is a policy of one match.
func policyOf(action securitypb.Action, m *securitypb.Match) *securitypb.Authorization {
	return &securitypb.Authorization{
		Name: "p", Namespace: "ns", Action: action,
		Rules: []*securitypb.Rule{{Clauses: []*securitypb.Clause{{Matches: []*securitypb.Match{m}}}}},
	}
}

// fullPolicy has every field set.
func fullPolicy() *securitypb.Authorization {
	ip := func(ip string, length uint32) *securitypb.Address {
		return &securitypb.Address{Address: bytesOf(ip), Length: length}
	}
	account := func(ns, sa string) *securitypb.ServiceAccountMatch {
		return &securitypb.ServiceAccountMatch{Namespace: ns, ServiceAccount: sa}
	}
	prefix := &securitypb.StringMatch{MatchType: &securitypb.StringMatch_Prefix{Prefix: "a"}}
	suffix := &securitypb.StringMatch{MatchType: &securitypb.StringMatch_Suffix{Suffix: "b"}}
	presence := &securitypb.StringMatch{MatchType: &securitypb.StringMatch_Presence{Presence: &emptypb.Empty{}}}
	extension := []*workloadpb.Extension{{Name: "e"}}
	in := policyOf(securitypb.Action_DENY, &securitypb.Match{
		Namespaces: []*securitypb.StringMatch{exact("n"), prefix}, NotNamespaces: []*securitypb.StringMatch{suffix},
		Principals: []*securitypb.StringMatch{presence}, NotPrincipals: []*securitypb.StringMatch{exact("")},
		SourceIps: []*securitypb.Address{ip("10.0.0.1", 8)}, NotSourceIps: []*securitypb.Address{ip("::1", 128)},
		DestinationIps: []*securitypb.Address{ip("0.0.0.0", 0)}, NotDestinationIps: []*securitypb.Address{ip("2001:db8::", 32)},
		DestinationPorts: []uint32{0, 65535}, NotDestinationPorts: []uint32{80},
		ServiceAccounts: []*securitypb.ServiceAccountMatch{account("n", "s")}, NotServiceAccounts: []*securitypb.ServiceAccountMatch{account("m", "t")},
		Extensions: extension,
	})
	in.Scope, in.DryRun, in.Extensions = securitypb.Scope_NAMESPACE, true, extension
	in.Rules = append(in.Rules, &securitypb.Rule{Clauses: []*securitypb.Clause{{}}}, &securitypb.Rule{})
	return in
}

func TestConvertEveryFieldOfAPolicy(t *testing.T) {
	var u state.Update
	if err := convertAuthorization(policyResource(t, fullPolicy()), &u); err != nil {
		t.Fatal(err)
	}
	p := func(s string) []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix(s)} }
	want := state.Update{Policies: []*state.Policy{{
		Name: "p", Namespace: "ns", Scope: state.PolicyNamespace, Action: state.Deny, DryRun: true,
		Rules: []state.Rule{{{{
			Namespaces:    []state.StringMatch{{Kind: state.Exact, Value: "n"}, {Kind: state.Prefix, Value: "a"}},
			NotNamespaces: []state.StringMatch{{Kind: state.Suffix, Value: "b"}},
			Principals:    []state.StringMatch{{Kind: state.Presence}}, NotPrincipals: []state.StringMatch{{Kind: state.Exact}},
			SourceIPs: p("10.0.0.1/8"), NotSourceIPs: p("::1/128"), DestinationIPs: p("0.0.0.0/0"), NotDestinationIPs: p("2001:db8::/32"),
			DestinationPorts: []uint16{0, 65535}, NotDestinationPorts: []uint16{80},
			ServiceAccounts:    []state.ServiceAccountMatch{{Namespace: "n", ServiceAccount: "s"}},
			NotServiceAccounts: []state.ServiceAccountMatch{{Namespace: "m", ServiceAccount: "t"}},
		}}}, {nil}, nil},
	}}}
	if diff := cmp.Diff(want, u, compareState); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// verdicts tells for two peers, one of them without identity, whether a policy
// set lets them reach port 80 of a workload in namespace ns that names the policies.
func verdicts(t testing.TB, s *state.Store, named ...string) (identified, anonymous bool) {
	t.Helper()
	dst := &state.Workload{Namespace: "ns", TrustDomain: "cluster.local", AuthorizationPolicies: named}
	c := state.Conn{
		Src: netip.MustParseAddrPort("10.0.0.1:1000"), Dst: netip.MustParseAddrPort("10.0.0.2:80"), Destination: dst,
		Identity: spiffeid.RequireFromString("spiffe://cluster.local/ns/client/sa/client"),
	}
	identified = s.Authorize(c).Denied == nil
	c.Identity = spiffeid.ID{}
	return identified, s.Authorize(c).Denied == nil
}

// Every reason to refuse a policy, with the text of the NACK and what stands in
// its place (decision D7): a DENY denies, an ALLOW allows nothing.
func TestST_XDS12ReasonsToRejectAPolicy(t *testing.T) {
	bad := func(m *securitypb.Match) func(*securitypb.Authorization) {
		return func(a *securitypb.Authorization) { a.Rules[0].Clauses[0].Matches[0] = m }
	}
	for name, tc := range map[string]struct {
		change func(*securitypb.Authorization)
		want   string
	}{
		"no string match": {bad(&securitypb.Match{Namespaces: []*securitypb.StringMatch{exact("x"), {}}}), "string match without exact, prefix, suffix or presence"},
		"source address":  {bad(&securitypb.Match{SourceIps: []*securitypb.Address{{Address: make([]byte, 6)}}}), "failed to parse address, had 6 bytes"},
		"source length":   {bad(&securitypb.Match{NotSourceIps: []*securitypb.Address{{Address: bytesOf("10.0.0.1"), Length: 33}}}), "invalid cidr: 10.0.0.1/33: want a length of at most 32"},
		"8 bits":          {bad(&securitypb.Match{DestinationIps: []*securitypb.Address{{Address: bytesOf("10.0.0.1"), Length: 256}}}), "invalid cidr: 10.0.0.1/256: want a length of at most 32"},
		"mapped range":    {bad(&securitypb.Match{NotDestinationIps: []*securitypb.Address{{Address: bytesOf("::ffff:10.0.0.1"), Length: 64}}}), "not destination IPs: invalid cidr: ::ffff:10.0.0.1/64: want a length of at least 96 for an IPv4-mapped IPv6 address"},
		"port":            {bad(&securitypb.Match{DestinationPorts: []uint32{80, 65536 + 80}}), "destination_ports: port 65616: want one from 0 to 65535"},
		"not port":        {bad(&securitypb.Match{NotDestinationPorts: []uint32{1 << 31}}), "not_destination_ports: port 2147483648: want one from 0 to 65535"},
		"empty name":      {func(a *securitypb.Authorization) { a.Name = "" }, "name is empty"},
	} {
		for _, action := range []securitypb.Action{securitypb.Action_ALLOW, securitypb.Action_DENY} {
			t.Run(name+" "+action.String(), func(t *testing.T) {
				s := newStore()
				a := policyOf(action, &securitypb.Match{DestinationPorts: []uint32{80}})
				tc.change(a)
				got := text(applyAuthorizations(s, []*discoverypb.Resource{resource(t, "ns/p", a)}, nil))
				if want := "ns/p: " + tc.want; got != want {
					t.Errorf("got %q, want %q", got, want)
				}
				if identified, anonymous := verdicts(t, s); identified || anonymous {
					t.Errorf("a rejected %s policy opens: %v, %v", action, identified, anonymous)
				}
				applyAuthorizations(s, nil, []string{"ns/p"})
				if identified, anonymous := verdicts(t, s); !identified || !anonymous {
					t.Error("the tombstone outlives its policy")
				}
			})
		}
	}
}

func TestRejectedPolicyKeepsTheLastGoodOne(t *testing.T) {
	s := newStore()
	good := policyOf(securitypb.Action_ALLOW, &securitypb.Match{DestinationPorts: []uint32{80}})
	bad := policyOf(securitypb.Action_DENY, &securitypb.Match{DestinationPorts: []uint32{80000}})
	for _, r := range []*discoverypb.Resource{policyResource(t, good), policyResource(t, bad), garbage("ns/p"), {Name: "ns/p"}} {
		applyAuthorizations(s, []*discoverypb.Resource{r}, nil)
		if identified, _ := verdicts(t, s); !identified {
			t.Fatal("the last good policy is gone")
		}
	}
}

// A policy that cannot be decoded denies those who name it and nobody else.
func TestUndecodablePolicyHoldsForThoseWhoNameIt(t *testing.T) {
	for _, name := range []string{"ns/p", "oddly-named", "a/b/c"} {
		for _, r := range []*discoverypb.Resource{garbage(name), {Name: name}} {
			s := newStore()
			if applyAuthorizations(s, []*discoverypb.Resource{r}, nil) == nil {
				t.Error("not rejected")
			}
			if identified, anonymous := verdicts(t, s, name); identified || anonymous {
				t.Errorf("%s: it opens: %v, %v", name, identified, anonymous)
			}
			if identified, anonymous := verdicts(t, s); !identified || !anonymous {
				t.Errorf("%s: it denies those who do not name it", name)
			}
			applyAuthorizations(s, nil, []string{name})
			if identified, _ := verdicts(t, s, name); !identified {
				t.Errorf("%s: the tombstone outlives its policy", name)
			}
		}
	}
}

// What is unknown of scope and action opens nothing that is certain to be meant.
func TestPolicyOfUnknownScopeOrAction(t *testing.T) {
	for name, tc := range map[string]struct {
		scope  securitypb.Scope
		action securitypb.Action
		want   string
		all    bool // denies also those who do not name it
	}{
		"scope":  {3, securitypb.Action_ALLOW, "unknown enum: scope 3", false},
		"wraps":  {256, securitypb.Action_DENY, "unknown enum: scope 256", false},
		"action": {securitypb.Scope_GLOBAL, 2, "unknown enum: action 2", true},
		"both":   {-1, 256, "unknown enum: scope -1", false},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore()
			a := policyOf(tc.action, &securitypb.Match{DestinationPorts: []uint32{80}})
			a.Scope = tc.scope
			if got, want := text(applyAuthorizations(s, []*discoverypb.Resource{policyResource(t, a)}, nil)), "ns/p: "+tc.want; got != want {
				t.Errorf("got %q, want %q", got, want)
			}
			if identified, anonymous := verdicts(t, s, "ns/p"); identified || anonymous {
				t.Error("it opens for those who name it")
			}
			all := &securitypb.Authorization{Name: "all", Namespace: "ns", Rules: []*securitypb.Rule{{}}}
			applyAuthorizations(s, []*discoverypb.Resource{policyResource(t, all)}, nil)
			if identified, _ := verdicts(t, s, "ns/p"); identified == (tc.action != securitypb.Action_ALLOW) {
				t.Errorf("beside an ALLOW policy for all: allowed = %v", identified)
			}
			applyAuthorizations(s, nil, []string{"ns/all"})
			if identified, _ := verdicts(t, s); identified == tc.all {
				t.Errorf("for those who do not name it: allowed = %v", identified)
			}
		})
	}
}

func TestPolicyWithoutANameIsRefusedAndHolds(t *testing.T) {
	s := newStore()
	a := policyOf(securitypb.Action_DENY, &securitypb.Match{DestinationPorts: []uint32{81}})
	if got, want := text(applyAuthorizations(s, []*discoverypb.Resource{resource(t, "", a)}, nil)), ": resource without a name: it could never be removed"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if identified, _ := verdicts(t, s); identified {
		t.Error("a rejected DENY policy opens")
	}
}

// A field that our .proto lacks is an unknown condition: an ALLOW policy fails it,
// a DENY policy meets it (decision D7). Extensions are known, and ignored.
func TestUnknownConditions(t *testing.T) {
	unknownField := protowire.AppendString(protowire.AppendTag(nil, 99, protowire.BytesType), "new")
	on := func(m proto.Message) { m.ProtoReflect().SetUnknown(unknownField) }
	type policy struct {
		rule   *securitypb.Rule
		clause *securitypb.Clause
		match  *securitypb.Match
	}
	for name, tc := range map[string]struct {
		change      func(policy)
		allow, deny bool // whether the peer with an identity is let through
	}{
		"known":              {func(policy) {}, true, false},
		"match":              {func(p policy) { on(p.match) }, false, false},
		"clause":             {func(p policy) { on(p.clause) }, false, false},
		"rule":               {func(p policy) { on(p.rule) }, false, false},
		"match that fails":   {func(p policy) { on(p.match); p.match.DestinationPorts = []uint32{81} }, false, true},
		"clause that fails":  {func(p policy) { on(p.clause); p.match.DestinationPorts = []uint32{81} }, false, false},
		"rule that fails":    {func(p policy) { on(p.rule); p.match.DestinationPorts = []uint32{81} }, false, true},
		"nothing else known": {func(p policy) { on(p.match); p.match.DestinationPorts = nil }, false, false},
		"empty rule":         {func(p policy) { on(p.rule); p.rule.Clauses = nil }, false, false},
		"empty clause":       {func(p policy) { on(p.clause); p.clause.Matches = nil }, false, false},
		"another match": {func(p policy) {
			on(p.match)
			p.clause.Matches = append(p.clause.Matches, &securitypb.Match{DestinationPorts: []uint32{80}})
		}, true, false},
		"string match":         {func(p policy) { m := exact("no"); on(m); p.match.Namespaces = []*securitypb.StringMatch{m} }, false, false},
		"negated string match": {func(p policy) { m := exact("client"); on(m); p.match.NotNamespaces = []*securitypb.StringMatch{m} }, false, false},
		"address": {func(p policy) {
			m := &securitypb.Address{Address: bytesOf("10.9.9.9"), Length: 32}
			on(m)
			p.match.SourceIps = []*securitypb.Address{m}
		}, false, false},
		"service account": {func(p policy) {
			m := &securitypb.ServiceAccountMatch{Namespace: "no"}
			on(m)
			p.match.ServiceAccounts = []*securitypb.ServiceAccountMatch{m}
		}, false, false},
		"extensions": {func(p policy) { p.match.Extensions = []*workloadpb.Extension{{Name: "e"}} }, true, false},
	} {
		for _, action := range []securitypb.Action{securitypb.Action_ALLOW, securitypb.Action_DENY} {
			t.Run(name+" "+action.String(), func(t *testing.T) {
				a := policyOf(action, &securitypb.Match{DestinationPorts: []uint32{80}})
				rule := a.GetRules()[0]
				clause := rule.GetClauses()[0]
				tc.change(policy{rule, clause, clause.GetMatches()[0]})
				s := newStore()
				if got := text(applyAuthorizations(s, []*discoverypb.Resource{policyResource(t, a)}, nil)); got != "" {
					t.Fatal(got)
				}
				want := map[securitypb.Action]bool{securitypb.Action_ALLOW: tc.allow, securitypb.Action_DENY: tc.deny}[action]
				if got, _ := verdicts(t, s); got != want {
					t.Errorf("allowed = %v, want %v", got, want)
				}
			})
		}
	}
}

// One bad policy among many: named once, the others applied.
func TestOneBadPolicyAmongMany(t *testing.T) {
	s := newStore()
	var list []*discoverypb.Resource
	for i := range 10_000 {
		a := policyOf(securitypb.Action_ALLOW, &securitypb.Match{DestinationPorts: []uint32{80}})
		a.Name += string(rune('a'+i%26)) + string(rune('a'+i/26%26)) + string(rune('a'+i/676))
		if i == 5000 {
			a.Rules[0].Clauses[0].Matches[0].DestinationPorts[0] = 70000
		}
		list = append(list, policyResource(t, a))
	}
	bad := list[5000].GetName()
	if got, want := text(applyAuthorizations(s, list, nil)), bad+": destination_ports: port 70000: want one from 0 to 65535"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := len(s.Dump().Policies); got != 10_000 { // the tombstone is one of them
		t.Errorf("got %d policies", got)
	}
	if !slices.ContainsFunc(s.Dump().Policies, func(p state.PolicyDump) bool { return p.Namespace+"/"+p.Name == bad && len(p.Rules) == 0 }) {
		t.Error("no tombstone")
	}
}
