package state

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// An index that finds too much gives the right answers, too, only not fast: these
// rules have nothing in common with the connection and must not be looked at.
func TestKeysSeparate(t *testing.T) {
	prefixes := func(s ...string) (list []netip.Prefix) {
		for _, p := range s {
			list = append(list, netip.MustParsePrefix(p))
		}
		return list
	}
	exact := func(s string) []StringMatch { return []StringMatch{{Exact, s}} }
	dear := slices.Repeat([]uint16{80}, 300)
	for name, m := range map[string]Match{
		"principal":                        {Principals: exact("td/ns/good/sa/better")},
		"principal, one prefix":            {Principals: []StringMatch{{Exact, "td/x"}, {Prefix, "td/ns/goo/"}}},
		"service account":                  {ServiceAccounts: []ServiceAccountMatch{{"good", "better"}, {"better", "good"}}},
		"namespace":                        {Namespaces: exact("goo")},
		"no namespace":                     {Namespaces: exact("")},
		"the account":                      {Namespaces: exact("/ns/good/sa/good")},
		"the namespace as path":            {Principals: exact("td/good")},
		"port":                             {DestinationPorts: []uint16{81, 80 << 8, 336}},
		"source neighbour":                 {SourceIPs: prefixes("10.0.0.0/32", "10.0.0.3/32", "10.0.0.2/31", "10.0.1.0/24", "::a00:1/128")},
		"source as destination":            {DestinationIPs: prefixes("10.0.0.1/32")},
		"destination as source":            {SourceIPs: prefixes("10.0.0.2/32")},
		"other family":                     {SourceIPs: prefixes("::/0")},
		"cheaper than a namespace":         {Namespaces: exact("good"), Principals: exact("td/x"), DestinationPorts: []uint16{80}},
		"cheaper than a wide one":          {SourceIPs: prefixes("0.0.0.0/0"), DestinationPorts: []uint16{81}},
		"cheaper than many":                {Namespaces: exact("x"), DestinationPorts: dear, SourceIPs: prefixes("10.0.0.0/8")},
		"prefix has no key":                {Namespaces: []StringMatch{{Prefix, "g"}}, DestinationPorts: []uint16{81}},
		"suffix has no key":                {Principals: []StringMatch{{Suffix, "/good"}}, DestinationPorts: []uint16{81}},
		"cheaper than a namespace, source": {Namespaces: exact("good"), SourceIPs: prefixes("192.0.2.2/32")},
		"matches nothing":                  {},
	} {
		s := New(Config{DefaultTrustDomain: "td"})
		hidden := Rule{{}, {{NotDestinationPorts: []uint16{1}}}, {m}, {{DestinationPorts: dear}}}
		apply(t, s, Update{Policies: []*Policy{
			{Name: "p", Namespace: "ns", Action: Deny, Rules: []Rule{{{m}}, hidden}},
			// For its sake everything is looked up.
			{Name: "q", Namespace: "ns", Action: Deny, Rules: []Rule{
				{{{Principals: []StringMatch{{Exact, "td/z"}, {Prefix, "td/ns/z/"}}}}},
				{{{Namespaces: exact("z")}}},
				{{{DestinationPorts: []uint16{1}}}},
				{{{SourceIPs: prefixes("192.0.2.1/32")}}},
				{{{DestinationIPs: prefixes("192.0.2.1/32")}}},
			}},
		}})
		if e := s.ExplainAuthorize(benchConn(t)); len(e.Policies) != 2 || e.Policies[0].Rules != nil || e.Policies[1].Rules != nil {
			t.Errorf("%s: %+v", name, e.Policies)
		}
	}
	plain := benchConn(t)
	plain.Identity = spiffeid.ID{}
	s := New(Config{DefaultTrustDomain: "td"})
	apply(t, s, Update{Policies: []*Policy{{Name: "p", Namespace: "ns", Action: Deny, Rules: []Rule{{{{Principals: exact("td")}}}}}}})
	if e := s.ExplainAuthorize(plain); e.Policies[0].Rules != nil {
		t.Errorf("a principal for a connection without identity: %+v", e.Policies)
	}
	six := benchConn(t)
	six.Src, six.Dst = addrPort("[fd00::1]:1"), addrPort("[fd00::2]:80")
	for _, p := range prefixes("fd00::/128", "fd00::3/128", "fd00::2/127", "fd00:0:0:1::/64", "fd00::8000:0:0:0/65", "fd01::/16", "0.0.0.0/0") {
		s := New(Config{DefaultTrustDomain: "td"})
		apply(t, s, Update{Policies: []*Policy{{Name: "p", Namespace: "ns", Action: Deny, Rules: []Rule{{{{SourceIPs: []netip.Prefix{p}}}}}}}})
		if e := s.ExplainAuthorize(six); e.Policies[0].Rules != nil {
			t.Errorf("%s: %+v", p, e.Policies)
		}
	}
}

// An index is cut into more pieces as it grows and into fewer as it shrinks, and
// is at any time the one that is made of its policies at once.
func TestRuleIndexGrowsAndShrinks(t *testing.T) {
	policies := crowdOfDenies(300)
	all := make([]*policy, len(policies))
	for i := range policies {
		all[i] = &policy{Policy: *policies[i], key: policies[i].Key()}
	}
	var ix *ruleIndex
	most := uint8(0)
	for batch := range slices.Chunk(all, 25) {
		ix = ix.with(nil, batch)
		ix.check(t)
		most = max(most, ix.bits)
	}
	if most < 5 {
		t.Errorf("1<<%d pieces for %d postings", most, ix.size)
	}
	for batch := range slices.Chunk(all[:275], 25) {
		ix = ix.with(batch, nil)
		ix.check(t)
	}
	if ix.bits >= most-1 {
		t.Errorf("1<<%d pieces for %d postings", ix.bits, ix.size)
	}
	if ix = ix.with(all[275:], nil); ix != nil {
		t.Errorf("left of nothing: %+v", ix)
	}
}
