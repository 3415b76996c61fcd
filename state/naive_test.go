package state

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// naive is Authorize written down from spec/datapath.md §11 with no regard to
// cost: policies in a list, identities as joined strings, one trust domain.
func naive(policies []*Policy, c Conn) (denied bool, by string) {
	var allows, allowed bool
	for _, p := range policies {
		applies := p.Scope == PolicyGlobal || p.Scope == PolicyNamespace && p.Namespace == c.Destination.Namespace
		for _, name := range c.Destination.AuthorizationPolicies {
			applies = applies || name == p.Namespace+"/"+p.Name
		}
		if !applies || p.DryRun {
			continue
		}
		matches := naiveRules(p, c)
		if p.Action == Deny && matches {
			return true, p.Namespace + "/" + p.Name
		}
		if p.Action == Allow {
			allows = true
			allowed = allowed || matches
		}
	}
	return allows && !allowed, ""
}

func naiveRules(p *Policy, c Conn) bool {
	for _, rule := range p.Rules {
		all := true
		for _, clause := range rule {
			holds := len(clause) == 0
			for _, m := range clause {
				holds = holds || naiveMatch(m, p.Action, c)
			}
			all = all && holds
		}
		if all {
			return true
		}
	}
	return false
}

func naiveMatch(m Match, action Action, c Conn) bool {
	var principal, ns, sa string
	if !c.Identity.IsZero() && c.Identity.TrustDomain().Name() != "td" && action == Allow {
		if m.Namespaces != nil || m.NotNamespaces != nil || m.ServiceAccounts != nil || m.NotServiceAccounts != nil {
			return false
		}
	}
	if !c.Identity.IsZero() {
		principal = strings.TrimPrefix(c.Identity.String(), "spiffe://")
		if parts := strings.Split(principal, "/"); len(parts) == 5 && parts[1] == "ns" && parts[3] == "sa" && parts[0] == "td" {
			ns, sa = parts[2], parts[4]
		}
	}
	attributes := 0
	check := func(positive, negative int, in, notIn func() bool) bool {
		attributes += positive + negative
		return (positive == 0 || in()) && !notIn()
	}
	str := func(list []StringMatch, value string) func() bool {
		return func() bool {
			for _, s := range list {
				switch s.Kind {
				case Exact:
					if value == s.Value {
						return true
					}
				case Prefix:
					if strings.HasPrefix(value, s.Value) {
						return true
					}
				case Suffix:
					if strings.HasSuffix(value, s.Value) {
						return true
					}
				case Presence:
					if value != "" {
						return true
					}
				}
			}
			return false
		}
	}
	princ := func(list []StringMatch) func() bool {
		return func() bool { return principal != "" && str(list, principal)() }
	}
	ips := func(list []netip.Prefix, ip netip.Addr) func() bool {
		return func() bool {
			for _, p := range list {
				if p.Contains(ip) {
					return true
				}
			}
			return false
		}
	}
	ports := func(list []uint16) func() bool {
		return func() bool {
			for _, p := range list {
				if p == c.Dst.Port() {
					return true
				}
			}
			return false
		}
	}
	accounts := func(list []ServiceAccountMatch) func() bool {
		return func() bool {
			for _, a := range list {
				if sa != "" && a == (ServiceAccountMatch{ns, sa}) {
					return true
				}
			}
			return false
		}
	}
	ok := check(len(m.Namespaces), len(m.NotNamespaces), str(m.Namespaces, ns), str(m.NotNamespaces, ns))
	ok = check(len(m.Principals), len(m.NotPrincipals), princ(m.Principals), princ(m.NotPrincipals)) && ok
	ok = check(len(m.ServiceAccounts), len(m.NotServiceAccounts), accounts(m.ServiceAccounts), accounts(m.NotServiceAccounts)) && ok
	ok = check(len(m.SourceIPs), len(m.NotSourceIPs), ips(m.SourceIPs, c.Src.Addr()), ips(m.NotSourceIPs, c.Src.Addr())) && ok
	ok = check(len(m.DestinationIPs), len(m.NotDestinationIPs), ips(m.DestinationIPs, c.Dst.Addr()), ips(m.NotDestinationIPs, c.Dst.Addr())) && ok
	ok = check(len(m.DestinationPorts), len(m.NotDestinationPorts), ports(m.DestinationPorts), ports(m.NotDestinationPorts)) && ok
	return ok && attributes > 0
}

// world draws policies and connections from small sets, so that they meet.
type world struct{ *rand.Rand }

func (w world) of(list ...string) string { return list[w.IntN(len(list))] }

func some[T any](w world, f func() T) []T {
	var out []T
	for range max(0, w.IntN(5)-2) {
		out = append(out, f())
	}
	return out
}

func (w world) str() StringMatch {
	return StringMatch{MatchKind(w.IntN(4)), w.of("", "a", "b", "td", "td/ns/a", "/sa/x", "td/ns/a/sa/x", "far/ns/a/sa/y", "d/ns/b/sa/x")}
}

func (w world) prefix() netip.Prefix {
	return netip.MustParsePrefix(w.of("10.0.0.1/32", "10.0.0.0/24", "0.0.0.0/0", "::/0", "fd00::1/128", "10.0.0.2/31"))
}

func (w world) port() uint16 { return uint16(80 + w.IntN(3)) }

func (w world) account() ServiceAccountMatch {
	return ServiceAccountMatch{w.of("a", "b", ""), w.of("x", "y", "")}
}

func (w world) match() Match {
	return Match{
		Namespaces: some(w, w.str), NotNamespaces: some(w, w.str),
		ServiceAccounts: some(w, w.account), NotServiceAccounts: some(w, w.account),
		Principals: some(w, w.str), NotPrincipals: some(w, w.str),
		SourceIPs: some(w, w.prefix), NotSourceIPs: some(w, w.prefix),
		DestinationIPs: some(w, w.prefix), NotDestinationIPs: some(w, w.prefix),
		DestinationPorts: some(w, w.port), NotDestinationPorts: some(w, w.port),
	}
}

func (w world) policies() []*Policy {
	var list []*Policy
	for i := range w.IntN(6) {
		list = append(list, &Policy{
			Name: fmt.Sprintf("p%d", i), Namespace: w.of("dst", "other"),
			Scope: PolicyScope(w.IntN(3)), Action: Action(w.IntN(2)), DryRun: w.IntN(4) == 0,
			Rules: some(w, func() Rule {
				return some(w, func() Clause { return some(w, w.match) })
			}),
		})
	}
	return list
}

func (w world) conn() Conn {
	ip := func() netip.Addr { return netip.MustParseAddr(w.of("10.0.0.1", "10.0.0.2", "10.1.0.1", "fd00::1")) }
	c := Conn{Src: netip.AddrPortFrom(ip(), 1), Dst: netip.AddrPortFrom(ip(), w.port()), Destination: destination("dst")}
	for i := range 6 {
		if w.IntN(3) == 0 {
			c.Destination.AuthorizationPolicies = append(c.Destination.AuthorizationPolicies, fmt.Sprintf("%s/p%d", w.of("dst", "other"), i))
		}
	}
	if id := w.of("", "spiffe://td/ns/a/sa/x", "spiffe://td/ns/b/sa/x", "spiffe://far/ns/a/sa/y", "spiffe://td/a"); id != "" {
		c.Identity = spiffeid.RequireFromString(id)
	}
	return c
}

func compareWithNaive(t *testing.T, seed uint64) (denied, explicit bool) {
	w := world{rand.New(rand.NewPCG(seed, 1))}
	policies := w.policies()
	s := New(Config{DefaultTrustDomain: "td"})
	apply(t, s, Update{Policies: policies})
	for range 8 {
		c := w.conn()
		d, by := naive(policies, c)
		v := s.Authorize(c)
		if (v.Denied != nil) != d || d && (by == "") != (v.Denied.Policy == "") {
			t.Fatalf("seed %d: got %v, want denied %v by %q\n%+v\n%+v", seed, v.Denied, d, by, policies, c)
		}
		if v.Denied != nil && v.Denied.Policy != "" {
			// Which of several that deny is named is free, but it must be one.
			for _, p := range policies {
				if p.Key() == v.Denied.Policy && (p.Action != Deny || p.DryRun || !naiveRules(p, c)) {
					t.Fatalf("seed %d: %s did not deny", seed, p.Key())
				}
			}
		}
		denied, explicit = denied || d, explicit || by != ""
	}
	return denied, explicit
}

func TestAuthorizeAgainstNaive(t *testing.T) {
	var denied, explicit int
	for seed := range uint64(5000) {
		d, e := compareWithNaive(t, seed)
		if d {
			denied++
		}
		if e {
			explicit++
		}
	}
	// The comparison says little unless every outcome is met often.
	if denied < 500 || explicit < 200 || denied > 4800 {
		t.Errorf("of 5000 worlds %d denied, %d explicitly", denied, explicit)
	}
}

func FuzzAuthorize(f *testing.F) {
	f.Add(uint64(1))
	f.Fuzz(func(t *testing.T, seed uint64) { compareWithNaive(t, seed) })
}
