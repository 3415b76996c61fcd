package state

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

var inNS1 = &Workload{Namespace: "ns1", Network: "nw1"}

// kube are the search domains of a pod in ns1.
var kube = []string{"ns1.svc.cluster.local", "svc.cluster.local", "cluster.local"}

func nameQuery(name string) *NameQuery {
	return &NameQuery{Client: inNS1, Name: []byte(name), Domain: "cluster.local"}
}

// named is a service with a VIP in the network of inNS1.
func hosted(ns, hostname, vip string) *Service {
	s := &Service{Name: hostname, Namespace: ns, Hostname: hostname}
	if vip != "" {
		s.VIPs = []NetworkAddress{{"nw1", addr(vip)}}
	}
	return s
}

// found tells which of the hostnames a name leads to, if there is no other.
func found(t *testing.T, q *NameQuery, hostnames []string) []string {
	t.Helper()
	out := []string{}
	for _, h := range hostnames {
		s := New(Config{})
		apply(t, s, Update{Services: []*Service{hosted("ns9", h, "10.0.0.1")}})
		if _, ok := s.ResolveName(q, nil); ok {
			out = append(out, h)
		}
	}
	return out
}

// TestST_DNS03_SearchDomain takes domains off the end of names.
func TestST_DNS03_SearchDomain(t *testing.T) {
	for _, tt := range []struct{ name, domain, bare string }{
		{"name.ns.svc.cluster.local", "svc.cluster.local", "name.ns"},
		{"name.ns.svc.cluster.local", "ns.svc.cluster.local", "name"},
		{"name.ns.svc.cluster.local", "different.domain", ""},
		{"svc.cluster.local", "name.ns.svc.cluster.local", ""},
		{"svc.cluster.local", "svc.cluster.local", ""},
		{"name.ns.svcxcluster.local", "svc.cluster.local", ""},
		{"name.xsvc.cluster.local", "svc.cluster.local", ""},
		{"name", "", ""},
	} {
		s := New(Config{})
		apply(t, s, Update{Services: []*Service{hosted("ns9", "name.ns", "10.0.0.1"), hosted("ns9", "name", "10.0.0.1")}})
		q := nameQuery(tt.name)
		q.Search = []string{tt.domain}
		q.Client = &Workload{Namespace: "other"}
		got := ""
		if a, ok := s.ResolveName(q, nil); ok && a.Bare > 0 {
			got = tt.name[:a.Bare]
		}
		if got != tt.bare {
			t.Errorf("%s without %q: got %q, want %q", tt.name, tt.domain, got, tt.bare)
		}
	}
}

// TestST_DNS04_ShortNames expands names to those of Kubernetes services.
func TestST_DNS04_ShortNames(t *testing.T) {
	for name, want := range map[string][]string{
		"name":                       {"name.ns1.svc.cluster.local"},
		"name.ns2":                   {"name.ns2.svc.cluster.local", "name.ns2.ns1.svc.cluster.local"},
		"name.ns2.svc":               {"name.ns2.svc.cluster.local", "name.ns2.svc.svc.cluster.local"},
		"name.ns2.not-svc":           {"name.ns2.not-svc.svc.cluster.local"},
		"pod.sub-domain.ns.svc":      {"pod.sub-domain.ns.svc.cluster.local"},
		"pod.sub-domain.ns.not-svc":  {},
		"name.ns2.svc.cluster":       {},
		"name.ns2.svc.cluster.local": {},
		"www.google.com":             {"www.google.com.svc.cluster.local"},
	} {
		var all []string // everything that could be meant, and more
		for _, end := range []string{"svc.cluster.local", "ns1.svc.cluster.local", "cluster.local", "svc.svc.cluster.local", "ns1", "local"} {
			all = append(all, name+"."+end)
		}
		got := found(t, nameQuery(name), all)
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
	s := New(Config{})
	apply(t, s, Update{Services: []*Service{hosted("ns9", "name.ns2.ns1.svc.cluster.local", "10.0.0.2"), hosted("ns9", "name.ns2.svc.cluster.local", "10.0.0.1")}})
	if a, _ := s.ResolveName(nameQuery("name.ns2"), nil); len(a.Addrs) != 1 || a.Addrs[0] != addr("10.0.0.1") {
		t.Errorf("name.ns2: got %v, want the service of ns2 first", a.Addrs)
	}
}

// TestST_DNS05_Wildcards tries a name, then its wildcards, the longest first.
func TestST_DNS05_Wildcards(t *testing.T) {
	for name, want := range map[string][]string{
		"svc1": {"svc1"},
		"svc1.ns1.svc.cluster.local": {
			"svc1.ns1.svc.cluster.local", "*.ns1.svc.cluster.local", "*.svc.cluster.local", "*.cluster.local", "*.local",
		},
	} {
		q := nameQuery(name)
		q.Client = &Workload{Namespace: "other", Network: "nw1"}
		if got := found(t, q, append(slices.Clone(want), "*", "*.", "*.svc1", ".local", "*.svc1.local")); !slices.Equal(got, want) {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
		var u Update
		for _, h := range slices.Backward(want) {
			u.Services = append(u.Services, hosted("ns9", h, "10.0.0.1"))
			s := New(Config{})
			apply(t, s, u)
			if a, ok := s.ResolveName(q, nil); !ok || a.Service.Hostname != h || a.Wildcard != strings.HasPrefix(h, "*") {
				t.Errorf("%s with %d wildcards: got %+v, want %q", name, len(u.Services), a, h)
			}
		}
	}
}

// The order of precedence: the name itself, its wildcards, its expansions, and only
// then what is left without a search domain.
func TestNamesPrecedence(t *testing.T) {
	q := nameQuery("foo.bar.ns1.svc.cluster.local")
	q.Search = kube
	order := []string{
		"foo.bar.ns1.svc.cluster.local", "*.bar.ns1.svc.cluster.local", "*.local",
		"foo.bar", "*.bar", "foo.bar.svc.cluster.local", "foo.bar.ns1", "*.ns1", "foo.bar.ns1.svc", "*.svc",
	}
	var u Update
	for i, h := range slices.Backward(order) {
		if strings.HasSuffix(h, "svc.cluster.local") && h != order[0] && h[0] == 'f' {
			continue // a wildcard in front of it would take it: TestST_DNS04 has it
		}
		u.Services = append(u.Services, hosted("ns9", h, fmt.Sprintf("10.0.0.%d", i+1)))
		s := New(Config{})
		apply(t, s, u)
		if a, ok := s.ResolveName(q, nil); !ok || a.Service.Hostname != h {
			t.Errorf("with %q at best: got %+v", h, a.Service)
		}
	}
}

// Names longer than DNS allows are not tried, and names that are none do no harm.
func TestNamesOutOfBounds(t *testing.T) {
	long := strings.Repeat("a.", 123) + "bbbbb" // 251 bytes
	s := New(Config{})
	apply(t, s, Update{Services: []*Service{
		hosted("ns1", long+".svc.cluster.local", "10.0.0.1"), hosted("ns1", long, "10.0.0.2"), hosted("ns1", "x."+strings.Repeat("y", 260), "10.0.0.3"),
		hosted("ns1", strings.Repeat("z", 240)+".ns1.svc.cluster.local", "10.0.0.4"), hosted("ns1", "", "10.0.0.5"),
	}[:4]})
	if a, ok := s.ResolveName(nameQuery(long), nil); !ok || a.Addrs[0] != addr("10.0.0.2") {
		t.Errorf("got %v, %+v", ok, a)
	}
	for _, name := range []string{"", ".", "..", "a.", ".a", "a..b", "*", "x." + strings.Repeat("y", 260), strings.Repeat("z", 240), strings.Repeat(".", 253)} {
		q := nameQuery(name)
		q.Search = append([]string{"", "."}, kube...)
		if a, ok := s.ResolveName(q, nil); ok {
			t.Errorf("%q: got %+v", name, a)
		}
	}
}

// Of several services with one hostname the client's namespace decides, then canonical,
// then the preferred namespace, then the order; what is hidden from the client, has no
// address of its own or is stale, does not count if there is another.
func TestNamesRank(t *testing.T) {
	near, canonical, last := hosted("ns1", "a.b", "10.0.0.1"), hosted("ns2", "a.b", "10.0.0.2"), hosted("ns3", "a.b", "10.0.0.3")
	canonical.Canonical, last.Canonical = true, true
	preferred, first, hidden := hosted("pref", "a.b", "10.0.0.4"), hosted("ns5", "a.b", "10.0.0.5"), hosted("ns6", "a.b", "10.0.0.6")
	hidden.Visibility, hidden.Canonical = NamespaceVisibility, true
	both := hosted("pref", "a.b", "10.0.0.7")
	both.Canonical = true
	headless := hosted("ns1", "a.b", "")
	headless.CIDRVIPs = []CIDRAddress{{"nw1", netip.MustParsePrefix("10.9.0.0/16")}}
	for i, tt := range []struct {
		services []*Service
		want     string
	}{
		{[]*Service{first, preferred, canonical, last, near}, "10.0.0.1"},
		{[]*Service{first, preferred, canonical, last}, "10.0.0.3"},
		{[]*Service{first, last, preferred, canonical}, "10.0.0.2"},
		{[]*Service{both, canonical}, "10.0.0.2"},
		{[]*Service{first, preferred}, "10.0.0.4"},
		{[]*Service{first, hidden}, "10.0.0.5"},
		{[]*Service{headless, first}, "10.0.0.5"},
		{[]*Service{hidden}, ""},
		{[]*Service{headless}, ""},
	} {
		s := New(Config{})
		apply(t, s, Update{Services: tt.services})
		q := nameQuery("a.b")
		q.Preferred = "pref"
		got := ""
		if a, ok := s.ResolveName(q, nil); ok {
			got = a.Addrs[0].String()
		}
		if got != tt.want {
			t.Errorf("case %d: got %q, want %q", i, got, tt.want)
		}
	}
	s := New(Config{})
	apply(t, s, Update{Services: []*Service{first, near}, Stale: []string{"ns1/a.b"}})
	if a, _ := s.ResolveName(nameQuery("a.b"), nil); a.Addrs[0] != addr("10.0.0.5") {
		t.Errorf("got %v, want the service that is not stale", a.Addrs)
	}
}

// The addresses are those of the client's network, the first of each endpoint, and
// each is there once.
func TestNamesAddresses(t *testing.T) {
	s := New(Config{})
	headless := host("ns1", "h.ns1.svc.cluster.local")
	pod := func(uid, network string, health Health, list ...string) WorkloadUpdate {
		w := Workload{UID: uid, Network: network, Health: health}
		for _, ip := range list {
			w.IPs = append(w.IPs, addr(ip))
		}
		return member(w, map[NamespacedHostname][]Port{headless: nil})
	}
	vips := hosted("ns1", "vips.ns1.svc.cluster.local", "10.1.0.2")
	vips.VIPs = append(vips.VIPs, NetworkAddress{"nw1", addr("10.1.0.1")}, NetworkAddress{"nw2", addr("10.1.0.3")},
		NetworkAddress{"nw1", addr("::1:1")}, NetworkAddress{"nw1", addr("10.1.0.1")})
	apply(t, s, Update{
		Services: []*Service{vips, hosted("ns1", headless.Hostname, "")},
		Workloads: []WorkloadUpdate{
			pod("a", "nw1", Healthy, "10.2.0.2", "10.2.0.9", "::2:2"), pod("b", "nw2", Healthy, "10.2.0.1"),
			pod("c", "nw1", Unhealthy, "10.2.0.3"), pod("d", "nw1", Healthy, "10.2.0.2"), pod("e", "nw1", Healthy),
		},
	})
	for _, tt := range []struct {
		name string
		ipv6 bool
		want string
	}{
		{"vips", false, "[10.1.0.1 10.1.0.2]"},
		{"vips", true, "[::1:1]"},
		{"h", false, "[10.2.0.1 10.2.0.2]"},
		{"h", true, "[::2:2]"},
	} {
		q := nameQuery(tt.name)
		q.IPv6 = tt.ipv6
		a, ok := s.ResolveName(q, nil)
		if got := fmt.Sprint(a.Addrs); !ok || got != tt.want || a.OtherFamily {
			t.Errorf("%s, IPv6 %t: got %s, %v", tt.name, tt.ipv6, got, a.OtherFamily)
		}
	}
	vips.IPFamilies = IPv4Only
	apply(t, s, Update{Services: []*Service{vips}})
	q := nameQuery("vips")
	q.IPv6 = true
	if a, ok := s.ResolveName(q, nil); !ok || !a.OtherFamily || len(a.Addrs) > 0 {
		t.Errorf("IPv6 of a service that has IPv4 only: got %v, %+v", ok, a)
	}
}

func BenchmarkNames(b *testing.B) {
	s := New(Config{})
	var u Update
	for i := range 5000 {
		u.Services = append(u.Services, hosted("ns1", fmt.Sprintf("svc-%d.ns1.svc.cluster.local", i), fmt.Sprintf("10.0.%d.%d", i/250, i%250)))
	}
	apply(b, s, u)
	for _, name := range []string{"svc-77.ns1.svc.cluster.local", "svc-77", "www.example.com", strings.Repeat("a.", 110) + "ns1.svc.cluster.local"} {
		b.Run(name[:min(len(name), 12)], func(b *testing.B) {
			q := nameQuery(name)
			q.Search = kube
			buf := make([]netip.Addr, 0, 8)
			b.ReportAllocs()
			for b.Loop() {
				s.ResolveName(q, buf)
			}
		})
	}
}
