package state

import (
	"maps"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestST_WL03_WorkloadInformation(t *testing.T) {
	s := New(Config{NodeName: "node"})
	key := host("ns", "svc.example")
	in := func(services ...NamespacedHostname) WorkloadUpdate {
		m := map[NamespacedHostname][]Port{}
		for _, k := range services {
			m[k] = []Port{{80, 8080}}
		}
		return member(Workload{UID: "uid1", Name: "w1", Node: "node", IPs: []netip.Addr{addr("127.0.0.1")}}, m)
	}
	apply(t, s, Update{Workloads: []WorkloadUpdate{in(key)}})
	w, ok := s.WorkloadByUID("uid1")
	if !ok || s.uidAt("", "127.0.0.1") != "uid1" {
		t.Fatal("not found by UID and address")
	}
	if w.TrustDomain != "cluster.local" || w.ServiceAccount != "default" || w.ClusterID != "Kubernetes" ||
		w.Identity.String() != "spiffe://cluster.local/ns/ns/sa/default" {
		t.Errorf("defaults: %+v", w)
	}
	if l, ok := s.Local(Ref{Namespace: "ns", Name: "w1", ServiceAccount: "default"}); !ok || l != w {
		t.Error("not found as a local workload")
	}
	if _, ok := s.Local(Ref{Namespace: "ns", Name: "w1", ServiceAccount: "other"}); ok {
		t.Error("found as a local workload of another service account")
	}
	apply(t, s, Update{Removed: []string{"/invalid", "unknown"}})
	if len(s.now().staged) != 1 {
		t.Errorf("%d services staged, want 1", len(s.now().staged))
	}

	one := Service{Namespace: "ns", Hostname: "svc.example", VIPs: []NetworkAddress{{"", addr("10.0.0.1")}}, Ports: []Port{{80, 8080}}}
	two := one
	two.VIPs = append(slices.Clone(one.VIPs), NetworkAddress{"", addr("10.0.0.2")})
	for i, version := range []Service{one, two, one} {
		apply(t, s, Update{Services: []*Service{&version}})
		s.consistent(t)
		if len(s.now().staged) != 0 || s.now().countVIPs() != len(version.VIPs) || len(s.now().services) != 1 {
			t.Errorf("version %d: %d staged, %d VIPs", i, len(s.now().staged), s.now().countVIPs())
		}
		if diff := cmp.Diff([]string{"uid1"}, s.endpointUIDs(key)); diff != "" {
			t.Errorf("version %d: endpoints (-want +got):\n%s", i, diff)
		}
	}

	second := member(Workload{UID: "uid2", IPs: []netip.Addr{addr("127.0.0.2")}}, map[NamespacedHostname][]Port{key: nil})
	picks := func(want ...string) {
		t.Helper()
		s.consistent(t)
		got := map[string]bool{}
		for range 1000 {
			if w, _ := s.pick(key, &Query{Source: w}, 80, standardMode); w != nil {
				got[w.UID] = true
			}
		}
		if diff := cmp.Diff(want, slices.Sorted(maps.Keys(got))); diff != "" {
			t.Errorf("picked (-want +got):\n%s", diff)
		}
	}
	picks("uid1")
	apply(t, s, Update{Workloads: []WorkloadUpdate{second}})
	picks("uid1", "uid2")
	apply(t, s, Update{Removed: []string{"uid2"}})
	picks("uid1")
	apply(t, s, Update{Workloads: []WorkloadUpdate{second}})
	apply(t, s, Update{Workloads: []WorkloadUpdate{in()}})
	picks("uid2")
	sick := *second.Workload
	sick.Health = Unhealthy
	apply(t, s, Update{Workloads: []WorkloadUpdate{in(key), {Workload: &sick, Endpoints: second.Endpoints}}})
	picks("uid1")

	apply(t, s, Update{Removed: []string{"ns/svc.example", "uid1", "uid2"}})
	tb := s.now()
	if n := len(tb.workloads) + tb.countAddresses() + len(tb.local) + len(tb.services) + len(tb.hosts) + tb.countVIPs() + len(tb.staged); n != 0 {
		t.Errorf("%d index entries are left", n)
	}
}

func TestST_WL04_OverlappingAddress(t *testing.T) {
	s := New(Config{})
	p := member(Workload{UID: "c//Pod/ns/p", IPs: []netip.Addr{addr("10.0.0.1")}}, nil)
	entry := member(Workload{UID: "c/networking.istio.io/WorkloadEntry/ns/p", IPs: []netip.Addr{addr("10.0.0.1")}}, nil)
	apply(t, s, Update{Workloads: []WorkloadUpdate{p, entry, p}})
	s.consistent(t)
	if s.now().countAddresses() != 1 || len(s.now().workloads) != 2 || s.uidAt("", "10.0.0.1") != p.Workload.UID {
		t.Errorf("%d addresses, %d workloads, at the address: %s", s.now().countAddresses(), len(s.now().workloads), s.uidAt("", "10.0.0.1"))
	}
	apply(t, s, Update{Removed: []string{p.Workload.UID}})
	if got := s.uidAt("", "10.0.0.1"); got != entry.Workload.UID {
		t.Errorf("after the removal of the pod: %s", got)
	}
	apply(t, s, Update{Removed: []string{entry.Workload.UID}})
	if s.now().countAddresses() != 0 {
		t.Error("the address is left")
	}
}

// §0 item 17: who wins a shared address.
func TestSharedAddressRank(t *testing.T) {
	const ip = "10.0.0.1"
	mk := func(uid string, p Protocol) WorkloadUpdate {
		return member(Workload{UID: uid, Protocol: p, IPs: []netip.Addr{addr(ip)}}, nil)
	}
	tests := []struct {
		name string
		in   []WorkloadUpdate
		want string
	}{
		{"pod with HBONE over pod", []WorkloadUpdate{mk("c//Pod/a", HBONE), mk("c//Pod/b", TCP)}, "c//Pod/a"},
		{"pod over HBONE", []WorkloadUpdate{mk("c//Pod/a", TCP), mk("c/entry/b", HBONE)}, "c//Pod/a"},
		{"HBONE over other", []WorkloadUpdate{mk("c/entry/a", HBONE), mk("c/entry/b", TCP)}, "c/entry/a"},
		{"v1/Pod is no pod", []WorkloadUpdate{mk("c//v1/Pod/a", TCP), mk("c/entry/b", HBONE)}, "c/entry/b"},
		{"the last among equals", []WorkloadUpdate{mk("c//Pod/a", TCP), mk("c//Pod/b", TCP)}, "c//Pod/b"},
		{"inserted again is last", []WorkloadUpdate{mk("c//Pod/a", TCP), mk("c//Pod/b", TCP), mk("c//Pod/a", TCP)}, "c//Pod/a"},
	}
	for _, tt := range tests {
		s := New(Config{})
		apply(t, s, Update{Workloads: tt.in})
		if got := s.uidAt("", ip); got != tt.want {
			t.Errorf("%s: got %s, want %s", tt.name, got, tt.want)
		}
	}
}

func healthServices() (all, normal *Service) {
	all = svc("ns", "all", func(s *Service) { s.LoadBalancer = &LoadBalancer{HealthPolicy: AllowAll} })
	return all, svc("ns", "normal", nil)
}

func healthWorkloads(all, normal *Service) []WorkloadUpdate {
	m := map[NamespacedHostname][]Port{all.Key(): nil, normal.Key(): nil}
	return []WorkloadUpdate{member(Workload{UID: "good"}, m), member(Workload{UID: "sick", Health: Unhealthy}, m)}
}

func TestST_WL05_WL06_Unhealthy(t *testing.T) {
	for name, servicesFirst := range map[string]bool{"WL-05 staged": false, "WL-06 services first": true} {
		t.Run(name, func(t *testing.T) {
			s := New(Config{})
			all, normal := healthServices()
			services, workloads := Update{Services: []*Service{all, normal}}, Update{Workloads: healthWorkloads(all, normal)}
			if servicesFirst {
				apply(t, s, services)
				apply(t, s, workloads)
			} else {
				apply(t, s, workloads)
				apply(t, s, services)
			}
			counts := func(wantAll, wantNormal int) {
				t.Helper()
				s.consistent(t)
				if a, n := len(s.endpointUIDs(all.Key())), len(s.endpointUIDs(normal.Key())); a != wantAll || n != wantNormal {
					t.Errorf("%d and %d endpoints, want %d and %d", a, n, wantAll, wantNormal)
				}
			}
			counts(2, 1)
			strict, _ := healthServices()
			strict.LoadBalancer = nil
			apply(t, s, Update{Services: []*Service{strict}})
			counts(1, 1)
			again, _ := healthServices()
			apply(t, s, Update{Services: []*Service{again}})
			counts(1, 1) // what was dropped does not come back by itself
		})
	}
}

func TestST_WL07_StagedCleanup(t *testing.T) {
	s := New(Config{})
	key := host("ns", "h")
	w := pod("w", Healthy)(key)
	for i, step := range []struct {
		u    Update
		want int
	}{
		{Update{Workloads: []WorkloadUpdate{w}}, 1},
		{Update{Workloads: []WorkloadUpdate{member(Workload{UID: "w"}, nil)}}, 0},
		{Update{Workloads: []WorkloadUpdate{w}}, 1},
		{Update{Removed: []string{"w"}}, 0},
	} {
		apply(t, s, step.u)
		if got := len(s.now().staged); got != step.want {
			t.Errorf("step %d: %d staged, want %d", i, got, step.want)
		}
	}
}

func TestST_ST05_LookupAddress(t *testing.T) {
	s := New(Config{})
	sv := &Service{Namespace: "default", Hostname: "defaulthost", VIPs: []NetworkAddress{{"", addr("10.0.0.1")}}}
	apply(t, s, Update{
		Workloads: []WorkloadUpdate{member(Workload{UID: "w", Namespace: "default", Hostname: "by-name", IPs: []netip.Addr{addr("127.0.0.1")}}, nil)},
		Services:  []*Service{sv},
	})
	if w, sv := s.now().at("", addr("127.0.0.1"), ""); w == nil || sv != nil {
		t.Error("127.0.0.1 is no workload")
	}
	if w, sv := s.now().at("", addr("10.0.0.1"), ""); w != nil || sv == nil {
		t.Error("10.0.0.1 is no service")
	}
	if w, sv := s.now().at("", addr("127.0.0.2"), ""); w != nil || sv != nil {
		t.Error("127.0.0.2 is something")
	}
	if sv, w := s.now().atHost(host("default", "defaulthost")); sv == nil || w != nil {
		t.Error("default/defaulthost is no service")
	}
	if sv, w := s.now().atHost(host("default", "by-name")); sv != nil || w == nil {
		t.Error("default/by-name is no workload")
	}
	for _, key := range []NamespacedHostname{host("default", "nothost"), host("other", "defaulthost"), host("other", "by-name")} {
		if sv, w := s.now().atHost(key); sv != nil || w != nil {
			t.Errorf("%s is something", key)
		}
	}
}

func TestLocalNeedsNode(t *testing.T) {
	ref := Ref{Namespace: "ns", Name: "p", ServiceAccount: "default"}
	elsewhere := member(Workload{UID: "c//Pod/ns/p", Name: "p", Node: "elsewhere"}, nil)
	for node, want := range map[string]bool{"": true, "elsewhere": true, "here": false} {
		s := New(Config{NodeName: node})
		apply(t, s, Update{Workloads: []WorkloadUpdate{elsewhere}})
		if _, ok := s.Local(ref); ok != want {
			t.Errorf("node %q: found %v, want %v", node, ok, want)
		}
	}
}
