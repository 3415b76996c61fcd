package state

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

// D15: who is stale loses a shared address to anybody who is not, and is usable
// otherwise, until it is sent again or removed.
func TestD15_StaleWorkload(t *testing.T) {
	mk := func(uid string, p Protocol) WorkloadUpdate {
		return member(Workload{UID: uid, Name: "n", Hostname: "host", Protocol: p, IPs: ips("10.0.0.1")}, nil)
	}
	first, second := mk("c//Pod/a", HBONE), mk("entry", TCP)
	s := New(Config{})
	check := func(what, want string) {
		t.Helper()
		s.consistent(t)
		local, _ := s.Local(Ref{Namespace: "ns", Name: "n", ServiceAccount: "default"})
		named := s.now().workloadByHost("ns", "host")
		if got := s.uidAt("", "10.0.0.1"); got != want || local == nil || local.UID != want || named == nil || named.UID != want {
			t.Errorf("%s: by address %s, local %+v, by hostname %+v; want %s", what, got, local, named, want)
		}
	}
	apply(t, s, Update{Workloads: []WorkloadUpdate{first, second}})
	check("the pod has the higher rank", "c//Pod/a")
	changed := s.Changed()
	apply(t, s, Update{Stale: []string{"c//Pod/a", "unknown", "no/service", "x/y/z"}})
	check("it is stale", "entry")
	if _, ok := s.WorkloadByUID("c//Pod/a"); !ok || !isClosed(changed) {
		t.Error("a stale workload is gone, or nobody was told")
	}
	apply(t, s, Update{Stale: []string{"entry"}})
	check("both are", "c//Pod/a")
	apply(t, s, Update{Workloads: []WorkloadUpdate{second}})
	check("the other is sent again", "entry")
	apply(t, s, Update{Workloads: []WorkloadUpdate{first}})
	check("so is the pod", "c//Pod/a")
	apply(t, s, Update{Stale: []string{"c//Pod/a"}})
	apply(t, s, Update{Removed: []string{"entry"}})
	check("nobody else is left", "c//Pod/a")
	apply(t, s, Update{Removed: []string{"c//Pod/a"}})
	if s.uidAt("", "10.0.0.1") != "" {
		t.Error("a stale workload cannot be removed")
	}
	s.consistent(t)
}

func TestD15_StaleService(t *testing.T) {
	a := svc("a", "s", with(vips("10.0.0.1"), cidrs("10.1.0.0/24", "10.2.0.0/16"), canonical))
	b := svc("b", "s", with(vips("10.0.0.1"), cidrs("10.1.0.0/24", "10.2.0.0/24")))
	b.Hostname = a.Hostname
	s := New(Config{})
	check := func(what string, ns string, want ...string) {
		t.Helper()
		s.consistent(t)
		got := []string{s.host(a.Hostname, ns), s.vip("", "10.0.0.1", ns), s.vip("", "10.1.0.1", ns), s.vip("", "10.2.0.1", ns)}
		for i := range got {
			got[i], _, _ = strings.Cut(got[i], "/")
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: host, VIP, shared range, nested ranges: got %v, want %v", what, got, want)
		}
	}
	apply(t, s, Update{Services: []*Service{a, b}, Workloads: []WorkloadUpdate{pod("w", Healthy)(a.Key())}})
	check("neither", "", "a", "a", "a", "b")
	apply(t, s, Update{Stale: []string{a.Key().String()}})
	check("a is stale", "", "b", "b", "b", "b")
	check("a is stale, for its namespace", "a", "b", "b", "a", "a") // ranges: its own namespace comes first
	if got := s.endpointUIDs(a.Key()); !slices.Equal(got, []string{"w"}) {
		t.Errorf("a stale service has the endpoints %v", got)
	}
	apply(t, s, Update{Workloads: []WorkloadUpdate{pod("v", Healthy)(a.Key())}})
	check("an endpoint is no news of the service", "", "b", "b", "b", "b")
	apply(t, s, Update{Services: []*Service{a}})
	check("sent again", "", "a", "a", "a", "b")
	if got := s.endpointUIDs(a.Key()); !slices.Equal(got, []string{"v", "w"}) {
		t.Errorf("a service that was stale has the endpoints %v", got)
	}
	apply(t, s, Update{Stale: []string{a.Key().String()}, Removed: []string{b.Key().String()}})
	check("alone", "", "a", "a", "a", "a")
}

// A service may name workloads that do not list it, that come later, or that go
// and return.
func TestForeignEndpoints(t *testing.T) {
	sv := svc("a", "s", vips("10.0.0.1"))
	sv.Endpoints = []Endpoint{{WorkloadUID: "late"}, {WorkloadUID: "early"}}
	s := New(Config{})
	reached := func(what string, want ...string) {
		t.Helper()
		s.consistent(t)
		var got []string
		found := s.now().service(sv.Key())
		for i := range found.Endpoints {
			if w := s.now().endpointWorkload(&found.Endpoints[i]); w != nil {
				got = append(got, w.UID+w.Name)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: reached %v, want %v", what, got, want)
		}
	}
	named := func(uid, name string) WorkloadUpdate { return member(Workload{UID: uid, Name: name}, nil) }
	apply(t, s, Update{Workloads: []WorkloadUpdate{named("early", "1")}, Services: []*Service{sv}})
	reached("one is there", "early1")
	apply(t, s, Update{Workloads: []WorkloadUpdate{named("late", "1")}})
	reached("the other has come", "early1", "late1")
	apply(t, s, Update{Workloads: []WorkloadUpdate{named("late", "2")}})
	reached("it has changed", "early1", "late2")
	apply(t, s, Update{Removed: []string{"early"}})
	reached("one has gone", "late2")
	plain := svc("a", "s", vips("10.0.0.2"))
	apply(t, s, Update{Services: []*Service{plain}, Workloads: []WorkloadUpdate{named("early", "3")}})
	reached("it returns while the service changes", "early3", "late2")
	apply(t, s, Update{Workloads: []WorkloadUpdate{pod("late", Healthy)(sv.Key())}})
	reached("the other lists the service", "early3", "late")
	apply(t, s, Update{Workloads: []WorkloadUpdate{named("late", "4")}})
	reached("and no longer", "early3")
	apply(t, s, Update{Removed: []string{sv.Key().String()}})
	s.consistent(t)
	if len(s.edit.foreign) != 0 {
		t.Errorf("the writer remembers %v", s.edit.foreign)
	}
}

// naiveRange ranks the CIDR VIPs of a list as spec/state-xds-dns.md §4.4 says.
func naiveRange(list []*Service, ip netip.Addr, ns string) string {
	var found *Service
	var rank []int
	for _, sv := range list {
		if ns != "" && sv.Visibility == NamespaceVisibility && sv.Namespace != ns {
			continue
		}
		for _, c := range sv.CIDRVIPs {
			if c.Network != "" || !c.Prefix.Contains(ip) {
				continue
			}
			r := []int{0, c.Prefix.Bits(), 0}
			if ns != "" && sv.Namespace == ns {
				r[0] = 1
			}
			if sv.Canonical {
				r[2] = 1
			}
			if found == nil || slices.Compare(r, rank) > 0 {
				found, rank = sv, r
			}
		}
	}
	if found == nil {
		return ""
	}
	return found.Key().String()
}

func TestRangesAgainstNaive(t *testing.T) {
	hits := 0
	for seed := range uint64(300) {
		w := world{rand.New(rand.NewPCG(seed, 5))}
		s := New(Config{})
		var list []*Service
		for i := range 1 + w.IntN(8) {
			sv := svc(w.of("a", "b", "c"), string(rune('k'+i)), nil)
			for range 1 + w.IntN(3) {
				ip := netip.AddrFrom4([4]byte{10, 0, byte(w.IntN(2)), byte(w.IntN(256))})
				sv.CIDRVIPs = append(sv.CIDRVIPs, CIDRAddress{w.of("", "", "other"), netip.PrefixFrom(ip, 14+w.IntN(19))})
			}
			sv.Canonical, sv.Visibility = w.IntN(3) == 0, Visibility(w.IntN(2))
			list = append(list, sv)
			apply(t, s, Update{Services: []*Service{sv}})
		}
		gone := list[w.IntN(len(list))]
		apply(t, s, Update{Removed: []string{gone.Key().String()}})
		list = slices.DeleteFunc(list, func(sv *Service) bool { return sv == gone })
		s.consistent(t)
		for range 64 {
			ip := netip.AddrFrom4([4]byte{10, 0, byte(w.IntN(2)), byte(w.IntN(256))})
			ns := w.of("a", "b", "c", "d")
			want := naiveRange(list, ip, ns)
			if got := s.vip("", ip.String(), ns); got != want {
				t.Fatalf("seed %d: %s from %q = %q, want %q", seed, ip, ns, got, want)
			}
			if want != "" {
				hits++
			}
		}
	}
	if hits < 1000 {
		t.Errorf("only %d addresses were found", hits)
	}
}

// What workloads have in common is stored once, and a caller's list is not.
func TestSharedParts(t *testing.T) {
	mk := func(uid string) WorkloadUpdate {
		key := host(strings.Clone("ns"), strings.Clone("h"))
		return member(Workload{
			UID: uid, Name: strings.Clone("name"), AuthorizationPolicies: []string{strings.Clone("ns/p"), "ns/q"},
			Waypoint: &GatewayAddress{Hostname: host("ns", "wp"), Port: 15008}, ApplicationTunnel: &ApplicationTunnel{Port: 1}, IPs: ips("10.0.0.1"),
		}, map[NamespacedHostname][]Port{key: {{443, 2}, {80, 1}}})
	}
	s := New(Config{})
	apply(t, s, Update{Workloads: []WorkloadUpdate{mk("a"), mk("b"), mk("c/name")}})
	a, b := s.now().workloads["a"], s.now().workloads["b"]
	if a.Waypoint != b.Waypoint || a.ApplicationTunnel != b.ApplicationTunnel || &a.AuthorizationPolicies[0] != &b.AuthorizationPolicies[0] ||
		&a.Services[0] != &b.Services[0] || &a.ids[0] != &b.ids[0] {
		t.Error("equal parts are stored twice")
	}
	eps := s.now().staged[host("ns", "h")]
	if len(eps) != 3 || &eps[0].Ports[0] != &eps[1].Ports[0] {
		t.Errorf("endpoints with their own ports: %+v", eps)
	}
	if c := s.now().workloads["c/name"]; c.Name != "name" || a.Name != "name" || a.UID != "a" || &a.IPs[0] == &b.IPs[0] {
		t.Errorf("got %+v", c)
	}
	for i := range 3 * poolSize {
		_ = s.edit.pool.text(string(rune(i + 1)))
	}
	if n := len(s.edit.pool.texts.young) + len(s.edit.pool.texts.old); n > 2*poolSize {
		t.Errorf("%d texts are remembered, want at most %d", n, 2*poolSize)
	}
}

// A large update edits and copies maps as a whole: the outcome is the same.
func TestLargeUpdates(t *testing.T) {
	const n = 5000 // more than is carried over key by key
	s := New(Config{})
	list := func(from, to int) (out []WorkloadUpdate) {
		for i := from; i < to; i++ {
			u := scaleWorkload(i, 0)
			u.Workload.Hostname = u.Workload.Name
			out = append(out, u)
		}
		return out
	}
	steps := []Update{
		{Workloads: list(0, n), Services: []*Service{scaleService(1), scaleService(2)}},
		{Workloads: list(0, n)},
		{Removed: scaleRemoval(0)[10:n]},
		{Workloads: list(5, n+5)},
		{Removed: scaleRemoval(0)[:n+5]},
	}
	for i, want := range []int{n, n, 10, n + 5, 0} {
		apply(t, s, steps[i])
		s.consistent(t)
		if got := len(s.now().workloads); got != want {
			t.Errorf("step %d: %d workloads, want %d", i, got, want)
		}
	}
}
