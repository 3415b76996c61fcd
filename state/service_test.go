package state

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

type lookupCase struct{ network, ip, ns, want string }

func svc(ns, name string, mod func(*Service)) *Service {
	s := &Service{Name: name, Namespace: ns, Hostname: name + "." + ns + ".svc.cluster.local", Ports: []Port{{80, 8080}}}
	if mod != nil {
		mod(s)
	}
	return s
}

func vips(list ...string) func(*Service) {
	return func(s *Service) {
		for _, v := range list {
			s.VIPs = append(s.VIPs, NetworkAddress{Addr: addr(v)})
		}
	}
}

func cidrs(list ...string) func(*Service) {
	return func(s *Service) {
		for _, c := range list {
			s.CIDRVIPs = append(s.CIDRVIPs, CIDRAddress{Prefix: netip.MustParsePrefix(c)})
		}
	}
}

func with(mods ...func(*Service)) func(*Service) {
	return func(s *Service) {
		for _, m := range mods {
			m(s)
		}
	}
}

func private(s *Service)   { s.Visibility = NamespaceVisibility }
func canonical(s *Service) { s.Canonical = true }

func onNetwork(n string) func(*Service) {
	return func(s *Service) {
		for i := range s.VIPs {
			s.VIPs[i].Network = n
		}
		for i := range s.CIDRVIPs {
			s.CIDRVIPs[i].Network = n
		}
	}
}

const suffix = ".svc.cluster.local"

// SVC-02 … SVC-14, SVC-16, SVC-17 and S-08: which service a VIP leads to.
func TestST_SVC_VIPLookup(t *testing.T) {
	tests := []struct {
		name     string
		services []*Service
		cases    []lookupCase
	}{
		{"SVC-02 visibility of a VIP", []*Service{svc("a", "s", with(vips("10.0.0.1"), private))}, []lookupCase{
			{"", "10.0.0.1", "a", "a/s.a"}, {"", "10.0.0.1", "b", ""}, {"", "10.0.0.1", "", "a/s.a"},
		}},
		{"SVC-02 visibility of a CIDR", []*Service{svc("a", "s", with(cidrs("10.0.0.0/24"), private))}, []lookupCase{
			{"", "10.0.0.1", "a", "a/s.a"}, {"", "10.0.0.1", "b", ""}, {"", "10.0.0.1", "", "a/s.a"},
		}},
		{"SVC-03 hidden VIP falls through to a CIDR", []*Service{
			svc("a", "exact", with(vips("10.0.0.1"), private)), svc("c", "range", cidrs("10.0.0.0/24")),
		}, []lookupCase{{"", "10.0.0.1", "b", "c/range.c"}, {"", "10.0.0.1", "a", "a/exact.a"}}},
		{"SVC-05 CIDR v4", []*Service{svc("a", "s", cidrs("10.0.0.0/24"))}, []lookupCase{
			{"", "10.0.0.7", "", "a/s.a"}, {"", "10.0.0.255", "", "a/s.a"}, {"", "10.0.1.5", "", ""},
		}},
		{"SVC-06 CIDR v6", []*Service{svc("a", "s", cidrs("fd00::/112"))}, []lookupCase{
			{"", "fd00::7", "", "a/s.a"}, {"", "fd00::ffff", "", "a/s.a"}, {"", "fd00::1:0", "", ""},
		}},
		{"host bits do not matter", []*Service{svc("a", "s", cidrs("10.0.0.9/24"))}, []lookupCase{{"", "10.0.0.7", "", "a/s.a"}}},
		{"SVC-07 longest prefix v4", []*Service{svc("a", "wide", cidrs("10.0.0.0/16")), svc("a", "narrow", cidrs("10.0.0.0/24"))}, []lookupCase{
			{"", "10.0.0.7", "", "a/narrow.a"}, {"", "10.0.9.7", "", "a/wide.a"},
		}},
		{"SVC-08 longest prefix v6", []*Service{svc("a", "wide", cidrs("fd00::/48")), svc("a", "narrow", cidrs("fd00::/112"))}, []lookupCase{
			{"", "fd00::7", "", "a/narrow.a"}, {"", "fd00::1:7", "", "a/wide.a"},
		}},
		{"SVC-09 both families", []*Service{svc("a", "s", cidrs("10.0.0.0/24", "fd00::/112"))}, []lookupCase{
			{"", "10.0.0.7", "", "a/s.a"}, {"", "fd00::7", "", "a/s.a"},
		}},
		{"SVC-10 families never mix", []*Service{svc("a", "four", cidrs("10.0.0.0/8")), svc("a", "six", cidrs("b00::/8"))}, []lookupCase{
			{"", "a00::1", "", ""}, {"", "11.0.0.1", "", ""},
		}},
		{"SVC-11 exact v4 with CIDR v6", []*Service{svc("a", "s", with(vips("10.0.0.1"), cidrs("fd00::/112")))}, []lookupCase{
			{"", "10.0.0.1", "", "a/s.a"}, {"", "10.0.0.2", "", ""}, {"", "fd00::7", "", "a/s.a"},
		}},
		{"SVC-12 exact beats CIDR v4", []*Service{svc("a", "range", cidrs("10.0.0.0/24")), svc("a", "exact", vips("10.0.0.1"))}, []lookupCase{
			{"", "10.0.0.1", "", "a/exact.a"}, {"", "10.0.0.2", "", "a/range.a"},
		}},
		{"SVC-13 exact beats CIDR v6", []*Service{svc("a", "range", cidrs("fd00::/112")), svc("a", "exact", vips("fd00::1"))}, []lookupCase{
			{"", "fd00::1", "", "a/exact.a"}, {"", "fd00::2", "", "a/range.a"},
		}},
		{"SVC-14 networks", []*Service{svc("a", "s", with(cidrs("10.0.0.0/24"), onNetwork("net-a")))}, []lookupCase{
			{"net-a", "10.0.0.1", "", "a/s.a"}, {"net-b", "10.0.0.1", "", ""}, {"", "10.0.0.1", "", ""},
		}},
		{"SVC-16 one CIDR, two namespaces", []*Service{svc("a", "s", cidrs("10.0.0.0/24")), svc("b", "s", cidrs("10.0.0.0/24"))}, []lookupCase{
			{"", "10.0.0.1", "a", "a/s.a"}, {"", "10.0.0.1", "b", "b/s.b"}, {"", "10.0.0.1", "", "a/s.a"},
		}},
		{"SVC-17 namespace beats length", []*Service{svc("a", "wide", cidrs("10.0.0.0/16")), svc("b", "narrow", cidrs("10.0.0.0/24"))}, []lookupCase{
			{"", "10.0.0.1", "a", "a/wide.a"}, {"", "10.0.0.1", "b", "b/narrow.b"}, {"", "10.0.0.1", "c", "b/narrow.b"},
			{"", "10.0.0.1", "", "b/narrow.b"}, {"", "10.0.9.1", "a", "a/wide.a"}, {"", "10.0.9.1", "b", "a/wide.a"},
		}},
		{"canonical beats first, the last canonical wins", []*Service{
			svc("a", "s", vips("10.0.0.1")), svc("b", "s", with(vips("10.0.0.1"), canonical)), svc("c", "s", with(vips("10.0.0.1"), canonical)),
		}, []lookupCase{{"", "10.0.0.1", "", "c/s.c"}, {"", "10.0.0.1", "x", "c/s.c"}, {"", "10.0.0.1", "a", "a/s.a"}}},
		{"canonical CIDR among equals", []*Service{svc("a", "s", cidrs("10.0.0.0/24")), svc("b", "s", with(cidrs("10.0.0.0/24"), canonical))},
			[]lookupCase{{"", "10.0.0.1", "", "b/s.b"}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := New(Config{})
			apply(t, s, Update{Services: tt.services})
			s.consistent(t)
			for _, c := range tt.cases {
				if got := strings.TrimSuffix(s.vip(c.network, c.ip, c.ns), suffix); got != c.want {
					t.Errorf("%s in network %q from %q = %q, want %q", c.ip, c.network, c.ns, got, c.want)
				}
			}
		})
	}
}

func TestST_SVC01_SharedVIP(t *testing.T) {
	s := New(Config{})
	a, b := svc("a", "s", vips("10.0.0.1", "10.0.0.2")), svc("b", "s", vips("10.0.0.1", "10.0.0.3"))
	apply(t, s, Update{Services: []*Service{a, b}})
	s.consistent(t)
	if got := s.now().countVIPs(); got != 3 || len(s.now().services) != 2 {
		t.Errorf("%d VIPs of %d services, want 3 of 2", got, len(s.now().services))
	}
	for _, c := range []lookupCase{
		{"", "10.0.0.1", "a", "a/s.a"}, {"", "10.0.0.1", "b", "b/s.b"}, {"", "10.0.0.2", "b", "a/s.a"}, {"", "10.0.0.3", "a", "b/s.b"},
		{"", "10.0.0.1", "", "a/s.a"},
	} {
		if got := strings.TrimSuffix(s.vip("", c.ip, c.ns), suffix); got != c.want {
			t.Errorf("%s from %q = %q, want %q", c.ip, c.ns, got, c.want)
		}
	}
	apply(t, s, Update{Removed: []string{a.Key().String()}})
	if got := s.vip("", "10.0.0.1", "a"); got != b.Key().String() {
		t.Errorf("after the removal of one: %q", got)
	}
	apply(t, s, Update{Removed: []string{b.Key().String()}})
	if s.now().countVIPs()+len(s.now().hosts)+len(s.now().services) != 0 {
		t.Errorf("indexes are not empty: %v", s.now().networks)
	}
}

func TestST_SVC04_VisibilityByHost(t *testing.T) {
	s := New(Config{})
	hidden := svc("a", "s", private)
	open := svc("b", "o", nil)
	shared := []*Service{svc("c", "x", private), svc("d", "x", nil)}
	for _, x := range shared {
		x.Hostname = "shared.example"
	}
	apply(t, s, Update{Services: append(shared, hidden, open)})
	for _, c := range []struct{ host, ns, want string }{
		{hidden.Hostname, "a", "a/" + hidden.Hostname}, {hidden.Hostname, "b", ""}, {hidden.Hostname, "", "a/" + hidden.Hostname},
		{open.Hostname, "a", "b/" + open.Hostname}, {open.Hostname, "", "b/" + open.Hostname},
		{"shared.example", "z", "d/shared.example"}, {"shared.example", "c", "c/shared.example"},
	} {
		if got := s.host(c.host, c.ns); got != c.want {
			t.Errorf("%s from %q = %q, want %q", c.host, c.ns, got, c.want)
		}
	}
}

func TestST_SVC15_16_CIDRRemoval(t *testing.T) {
	s := New(Config{})
	a, b := svc("a", "s", cidrs("10.0.0.0/24")), svc("b", "s", cidrs("10.0.0.0/24"))
	apply(t, s, Update{Services: []*Service{a, b}})
	apply(t, s, Update{Removed: []string{a.Key().String()}})
	s.consistent(t)
	if got := s.vip("", "10.0.0.1", "a"); got != b.Key().String() {
		t.Errorf("after the removal of one: %q", got)
	}
	apply(t, s, Update{Removed: []string{b.Key().String()}})
	if len(s.now().cidrs) != 0 {
		t.Errorf("CIDR index: %v", s.now().cidrs)
	}
}

func pod(uid string, h Health, ports ...Port) func(NamespacedHostname) WorkloadUpdate {
	return func(key NamespacedHostname) WorkloadUpdate {
		return member(Workload{UID: uid, Health: h}, map[NamespacedHostname][]Port{key: ports})
	}
}

func TestST_SVC18_StagedAndFiltered(t *testing.T) {
	s := New(Config{})
	sv := svc("a", "s", nil)
	key := sv.Key()
	apply(t, s, Update{Workloads: []WorkloadUpdate{pod("good", Healthy)(key), pod("bad", Unhealthy)(key)}})
	if got := len(s.now().staged[key]); got != 2 {
		t.Errorf("%d staged, want 2", got)
	}
	apply(t, s, Update{Services: []*Service{sv}})
	s.consistent(t)
	if diff := cmp.Diff([]string{"good"}, s.endpointUIDs(key)); diff != "" {
		t.Error(diff)
	}
}

func TestST_SVC19_StagedRemovals(t *testing.T) {
	s := New(Config{})
	key := host("a", "h")
	apply(t, s, Update{Workloads: []WorkloadUpdate{pod("one", Healthy)(key), pod("two", Healthy)(key)}})
	apply(t, s, Update{Removed: []string{"one"}})
	if got := len(s.now().staged[key]); got != 1 {
		t.Errorf("%d staged, want 1", got)
	}
	apply(t, s, Update{Removed: []string{"two"}})
	apply(t, s, Update{Removed: []string{"two", "three", "/invalid", "no slash", "x/y/z"}})
	if len(s.now().staged) != 0 {
		t.Errorf("staged: %v", s.now().staged)
	}
}

func TestST_SVC20_21_EndpointReplaced(t *testing.T) {
	s := New(Config{})
	sv := svc("a", "s", nil)
	key := sv.Key()
	apply(t, s, Update{Services: []*Service{sv}, Workloads: []WorkloadUpdate{pod("w", Healthy, Port{80, 8080})(key)}})
	apply(t, s, Update{Workloads: []WorkloadUpdate{pod("w", Healthy, Port{90, 9090})(key)}})
	s.consistent(t)
	want := []Endpoint{{WorkloadUID: "w", Ports: []Port{{90, 9090}}}}
	if diff := cmp.Diff(want, s.now().services[key].Endpoints, cmpopts.IgnoreUnexported(Endpoint{})); diff != "" {
		t.Errorf("after other ports (-want +got):\n%s", diff)
	}
	apply(t, s, Update{Workloads: []WorkloadUpdate{pod("w", Unhealthy)(key)}})
	if diff := cmp.Diff([]string{}, s.endpointUIDs(key)); diff != "" {
		t.Errorf("after it became unhealthy (-want +got):\n%s", diff)
	}
	if _, ok := s.WorkloadByUID("w"); !ok {
		t.Error("an unhealthy workload is gone")
	}
}

// SVC-22: no stale object in the CIDR index; two services of one namespace on one VIP.
func TestST_SVC22_NoStaleObjects(t *testing.T) {
	s := New(Config{})
	ranged := svc("a", "ranged", cidrs("10.0.0.0/24"))
	one, two := svc("a", "one", vips("10.1.0.1")), svc("a", "two", with(vips("10.1.0.1"), canonical))
	apply(t, s, Update{Services: []*Service{ranged, one, two}})
	apply(t, s, Update{Workloads: []WorkloadUpdate{pod("w", Healthy)(ranged.Key())}})
	s.consistent(t)
	if got := s.now().serviceAt("", addr("10.0.0.5"), ""); len(got.Endpoints) != 1 {
		t.Errorf("%d endpoints by CIDR, want 1", len(got.Endpoints))
	}
	if got := s.vip("", "10.1.0.1", "a"); got != two.Key().String() {
		t.Errorf("shared VIP leads to %q", got)
	}
	apply(t, s, Update{Removed: []string{two.Key().String()}})
	if got := s.vip("", "10.1.0.1", "a"); got != one.Key().String() {
		t.Errorf("shared VIP leads to %q after the removal of the other", got)
	}
}

func TestRemovedServiceForgetsEndpoints(t *testing.T) {
	s := New(Config{})
	sv := svc("a", "s", nil)
	apply(t, s, Update{Services: []*Service{sv}, Workloads: []WorkloadUpdate{pod("w", Healthy)(sv.Key())}})
	apply(t, s, Update{Removed: []string{sv.Key().String()}})
	apply(t, s, Update{Services: []*Service{svc("a", "s", nil)}})
	if diff := cmp.Diff([]string{}, s.endpointUIDs(sv.Key())); diff != "" {
		t.Error(diff)
	}
}

// A removal in the same update cancels what was said of the workload before.
func TestRemovalCancelsUpsert(t *testing.T) {
	s := New(Config{})
	sv := svc("a", "s", nil)
	apply(t, s, Update{Services: []*Service{sv}})
	apply(t, s, Update{Workloads: []WorkloadUpdate{pod("w", Healthy)(sv.Key())}, Removed: []string{"w"}})
	if diff := cmp.Diff([]string{}, s.endpointUIDs(sv.Key())); diff != "" {
		t.Error(diff)
	}
	apply(t, s, Update{Workloads: []WorkloadUpdate{pod("w", Healthy)(sv.Key()), member(Workload{UID: "w"}, nil)}})
	if diff := cmp.Diff([]string{}, s.endpointUIDs(sv.Key())); diff != "" {
		t.Error(diff)
	}
}

func TestApplyRejectsPerResource(t *testing.T) {
	s := New(Config{})
	changed, policies := s.Changed(), s.PoliciesChanged()
	err := s.Apply(Update{
		Workloads: []WorkloadUpdate{
			member(Workload{UID: "good", IPs: []netip.Addr{addr("10.0.0.1")}}, nil),
			member(Workload{UID: "upper", TrustDomain: "UPPER"}, nil),
			member(Workload{UID: "slash", ServiceAccount: "a/b"}, nil),
			member(Workload{UID: "proto", Protocol: DoubleHBONE}, nil),
			member(Workload{UID: "gw", Waypoint: &GatewayAddress{}}, nil),
			member(Workload{UID: "noip", IPs: make([]netip.Addr, 1)}, nil),
			member(Workload{}, nil),
			{},
		},
		Services: []*Service{
			svc("a", "good", nil), nil, {Namespace: "a"},
			svc("a", "cidr", func(s *Service) { s.CIDRVIPs = make([]CIDRAddress, 1) }),
			svc("a", "lb", func(s *Service) { s.LoadBalancer = &LoadBalancer{Preferences: []Scope{0}} }),
		},
	})
	var rejected *RejectedError
	if !errors.As(err, &rejected) {
		t.Fatalf("got %v", err)
	}
	var names []string
	for _, r := range rejected.Resources {
		names = append(names, string(r.Kind)+" "+r.Name)
		if r.Err == nil || !strings.Contains(err.Error(), r.Name+": "+r.Err.Error()) {
			t.Errorf("%v lacks %q", err, r.Name)
		}
	}
	want := []string{
		"workload upper", "workload slash", "workload proto", "workload gw", "workload noip", "workload ", "workload ",
		"service ", "service a/", "service a/cidr.a" + suffix, "service a/lb.a" + suffix,
	}
	if diff := cmp.Diff(want, names); diff != "" {
		t.Errorf("rejected (-want +got):\n%s", diff)
	}
	if s.uidAt("", "10.0.0.1") != "good" || s.host("good.a"+suffix, "") == "" {
		t.Error("the good resources were not applied")
	}
	if !isClosed(changed) || isClosed(policies) {
		t.Errorf("changed %v, policies changed %v; want only the first", isClosed(changed), isClosed(policies))
	}
	// The version that was good stays.
	if err := s.Apply(Update{Workloads: []WorkloadUpdate{member(Workload{UID: "good", TrustDomain: "UPPER"}, nil)}}); err == nil {
		t.Error("no error")
	}
	if s.uidAt("", "10.0.0.1") != "good" {
		t.Error("a rejected update removed the workload")
	}
}

func isClosed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}

func TestReplace(t *testing.T) {
	s := New(Config{})
	apply(t, s, Update{
		Workloads: []WorkloadUpdate{member(Workload{UID: "old"}, nil)},
		Policies:  []*Policy{{Name: "old", Namespace: "ns"}},
		Services:  []*Service{svc("a", "old", vips("10.0.0.1"))},
	})
	bad := Update{Workloads: []WorkloadUpdate{member(Workload{UID: "new"}, nil), member(Workload{}, nil)}}
	changed := s.Changed()
	if err := s.Check(bad); err == nil {
		t.Error("Check accepts a bad update")
	}
	if err := s.Replace(bad); err == nil {
		t.Error("Replace accepts a bad update")
	}
	if _, ok := s.WorkloadByUID("old"); !ok || isClosed(changed) {
		t.Error("a bad update changed the store")
	}
	policies := s.PoliciesChanged()
	if err := s.Replace(Update{Workloads: bad.Workloads[:1]}); err != nil {
		t.Fatal(err)
	}
	if _, ok := s.WorkloadByUID("old"); ok || len(s.now().policies)+len(s.now().services) != 0 {
		t.Error("something of before is left")
	}
	if _, ok := s.WorkloadByUID("new"); !ok || !isClosed(changed) || !isClosed(policies) {
		t.Error("the update was not applied and announced")
	}
}

func TestSortPorts(t *testing.T) {
	in := []Port{{443, 1}, {80, 2}, {443, 3}, {80, 4}}
	if diff := cmp.Diff([]Port{{80, 4}, {443, 3}}, SortPorts(in)); diff != "" {
		t.Error(diff)
	}
	if !slices.Equal(in, []Port{{443, 1}, {80, 2}, {443, 3}, {80, 4}}) {
		t.Errorf("the argument was modified: %v", in)
	}
}
