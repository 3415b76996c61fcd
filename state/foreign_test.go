package state

import "testing"

// D18 and D2: whose namespaces and principals count.
func TestD18_TrustDomains(t *testing.T) {
	byNamespace := Match{Namespaces: []StringMatch{{Exact, "a"}}}
	byAccount := Match{ServiceAccounts: []ServiceAccountMatch{{"a", "b"}}}
	byPrincipal := func(td string) Match { return Match{Principals: []StringMatch{{Exact, td + "/ns/a/sa/b"}}} }
	cfg := Config{DefaultTrustDomain: "td", TrustDomainAliases: []string{"old", "older"}}
	match := cfg
	match.AuthzForeignTrustDomain = MatchForeign
	tests := []struct {
		name     string
		cfg      Config
		own      string // trust domain of the destination
		identity string
		match    Match
		want     bool
	}{
		{"local", cfg, "td", "spiffe://td/ns/a/sa/b", byNamespace, true},
		{"alias", cfg, "td", "spiffe://old/ns/a/sa/b", byNamespace, true},
		{"alias, account", cfg, "td", "spiffe://older/ns/a/sa/b", byAccount, true},
		{"the destination has the alias", cfg, "old", "spiffe://td/ns/a/sa/b", byNamespace, true},
		{"foreign", cfg, "td", "spiffe://foreign/ns/a/sa/b", byNamespace, false},
		{"foreign, account", cfg, "td", "spiffe://foreign/ns/a/sa/b", byAccount, false},
		{"foreign, matched", match, "td", "spiffe://foreign/ns/a/sa/b", byNamespace, true},
		{"foreign, account matched", match, "td", "spiffe://foreign/ns/a/sa/b", byAccount, true},
		{"foreign principal", cfg, "td", "spiffe://foreign/ns/a/sa/b", byPrincipal("foreign"), true},
		{"foreign principal is not ours", cfg, "td", "spiffe://foreign/ns/a/sa/b", byPrincipal("td"), false},
		{"principal by alias", cfg, "td", "spiffe://old/ns/a/sa/b", byPrincipal("td"), true},
		{"principal of an alias", cfg, "td", "spiffe://td/ns/a/sa/b", byPrincipal("older"), true},
		{"principal of a stranger", cfg, "td", "spiffe://td/ns/a/sa/b", byPrincipal("foreign"), false},
		{"mesh of its own", cfg, "mesh", "spiffe://mesh/ns/a/sa/b", byNamespace, true},
		{"alias of a mesh of its own", cfg, "mesh", "spiffe://old/ns/a/sa/b", byPrincipal("mesh"), true},
		{"the default is a stranger to it", cfg, "mesh", "spiffe://td/ns/a/sa/b", byNamespace, false},
		{"other form of identity", cfg, "td", "spiffe://td/a", byNamespace, false},
		{"other form, principal", cfg, "td", "spiffe://td/a", Match{Principals: []StringMatch{{Exact, "td/a"}}}, true},
		{"further segments", cfg, "td", "spiffe://td/ns/a/sa/b/c", byNamespace, false},
	}
	for _, tt := range tests {
		s := New(tt.cfg)
		apply(t, s, Update{Policies: []*Policy{{Name: "p", Namespace: "ns", Rules: []Rule{{{tt.match}}}}}})
		w := destination("ns")
		w.TrustDomain = tt.own
		if got := s.Authorize(Conn{Destination: w, Identity: spiffe(t, tt.identity)}).Denied == nil; got != tt.want {
			t.Errorf("%s: got %v, want %v", tt.name, got, tt.want)
		}
	}
}

// D18: what a Match says of a foreign identity, by the action of its policy.
func TestD18_Foreign(t *testing.T) {
	only := func(ns string) []StringMatch { return []StringMatch{{Exact, ns}} }
	accounts := func(ns string) []ServiceAccountMatch { return []ServiceAccountMatch{{ns, "b"}} }
	const foreign = "spiffe://foreign/ns/a/sa/b"
	ours := func(m Match) Match { m.NotPrincipals = []StringMatch{{Prefix, "td/ns/x/"}}; return m }
	type holds struct{ allow, deny bool }
	tests := []struct {
		name            string
		identity        string
		match           Match
		ignored, looked holds // under IgnoreForeign and MatchForeign
	}{
		{"namespaces", foreign, Match{Namespaces: only("a")}, holds{false, false}, holds{true, true}},
		{"any namespace", foreign, Match{Namespaces: []StringMatch{{Kind: Presence}}}, holds{false, false}, holds{true, true}},
		{"every prefix", foreign, Match{Namespaces: []StringMatch{{Kind: Prefix}}}, holds{false, true}, holds{true, true}},
		{"service accounts", foreign, Match{ServiceAccounts: accounts("a")}, holds{false, false}, holds{true, true}},
		{"not its namespace", foreign, Match{NotNamespaces: only("a")}, holds{false, true}, holds{false, false}},
		{"not another namespace", foreign, Match{NotNamespaces: only("bad")}, holds{false, true}, holds{true, true}},
		{"not its account", foreign, Match{NotServiceAccounts: accounts("a")}, holds{false, true}, holds{false, false}},
		{"not another account", foreign, Match{NotServiceAccounts: accounts("bad")}, holds{false, true}, holds{true, true}},
		{"with a principal", foreign, Match{Principals: []StringMatch{{Prefix, "foreign/"}}, NotNamespaces: only("bad")}, holds{false, true}, holds{true, true}},
		{"with not a principal", foreign, ours(Match{NotServiceAccounts: accounts("bad")}), holds{false, true}, holds{true, true}},
		{"principals alone", foreign, Match{Principals: []StringMatch{{Prefix, "foreign/"}}}, holds{true, true}, holds{true, true}},
		{"not principals alone", foreign, ours(Match{}), holds{true, true}, holds{true, true}},
		{"ports alone", foreign, Match{DestinationPorts: []uint16{80}}, holds{true, true}, holds{true, true}},
		{"of another form", "spiffe://foreign/a", Match{NotNamespaces: only("bad")}, holds{false, true}, holds{true, true}},
		{"ours", "spiffe://td/ns/a/sa/b", Match{NotNamespaces: only("bad")}, holds{true, true}, holds{true, true}},
		{"an alias", "spiffe://old/ns/a/sa/b", Match{NotNamespaces: only("bad")}, holds{true, true}, holds{true, true}},
		{"none", "", Match{NotNamespaces: only("bad")}, holds{true, true}, holds{true, true}},
	}
	for _, tt := range tests {
		for mode, want := range map[ForeignTrustDomain]holds{IgnoreForeign: tt.ignored, MatchForeign: tt.looked} {
			c := Conn{Dst: addrPort("10.0.0.1:80"), Destination: destination("ns")}
			c.Destination.TrustDomain = "td"
			if tt.identity != "" {
				c.Identity = spiffe(t, tt.identity)
			}
			denied := func(action Action) bool {
				s := New(Config{DefaultTrustDomain: "td", TrustDomainAliases: []string{"old"}, AuthzForeignTrustDomain: mode})
				apply(t, s, Update{Policies: []*Policy{{Name: "p", Namespace: "ns", Action: action, Rules: []Rule{{{tt.match}}}}}})
				return s.Authorize(c).Denied != nil
			}
			if got := (holds{!denied(Allow), denied(Deny)}); got != want {
				t.Errorf("%s, mode %d: ALLOW and DENY hold %v, want %v", tt.name, mode, got, want)
			}
		}
	}
}

// An alias that is no trust domain equals nothing, whatever a principal says.
func TestD2_InvalidAlias(t *testing.T) {
	for _, alias := range []string{"", "spiffe://old", "old/ns", "OLD", "old/"} {
		s := New(Config{DefaultTrustDomain: "td", TrustDomainAliases: []string{alias, "other"}})
		apply(t, s, Update{Policies: []*Policy{{Name: "p", Namespace: "ns", Rules: []Rule{{{
			{Principals: []StringMatch{{Exact, alias + "/ns/a/sa/b"}, {Prefix, alias + "/ns/a/"}}},
		}}}}}})
		c := Conn{Destination: destination("ns"), Identity: spiffe(t, "spiffe://td/ns/a/sa/b")}
		if v := s.Authorize(c); v.Denied == nil {
			t.Errorf("the alias %q is ours", alias)
		}
	}
}
