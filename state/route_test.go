package state

import (
	"errors"
	"net/netip"
	"reflect"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func gw(address string, port uint16) *GatewayAddress {
	return &GatewayAddress{Address: NetworkAddress{Addr: addr(address)}, Port: port}
}

func ips(list ...string) (out []netip.Addr) {
	for _, s := range list {
		out = append(out, addr(s))
	}
	return out
}

func example(mods ...func(*Service)) *Service {
	s := &Service{
		Name: "example", Namespace: "ns", Hostname: "example.com",
		VIPs:  []NetworkAddress{{"", addr("127.0.0.3")}},
		Ports: []Port{{80, 8080}},
	}
	for _, m := range mods {
		m(s)
	}
	return s
}

var exampleKey = host("ns", "example.com")

func inExample(w Workload, ports ...Port) WorkloadUpdate {
	return member(w, map[NamespacedHostname][]Port{exampleKey: ports})
}

var localNetwork = []Scope{ScopeNetwork}

func mode(m LoadBalancerMode, prefs ...Scope) func(*Service) {
	return func(s *Service) { s.LoadBalancer = &LoadBalancer{Mode: m, Preferences: prefs} }
}

func families(f IPFamilies) func(*Service) { return func(s *Service) { s.IPFamilies = f } }

// source is the client of every case: ns/source-workload, 127.0.0.1 and ::1.
func source() WorkloadUpdate {
	return member(Workload{
		UID: "c//Pod/ns/source-workload", Name: "source-workload", IPs: ips("127.0.0.1", "::1"), Node: "local-node", Protocol: TCP,
	}, nil)
}

// OB-01 … OB-19. A refusal must be one, whatever else is in the tables: a case
// with wantErr never yields a route.
func TestDP_OB_Route(t *testing.T) {
	remote := Workload{UID: "c//Pod/ns/remote", Name: "remote", Network: "remote", Protocol: HBONE, IPs: ips("10.22.1.9")}
	behind := remote
	behind.IPs, behind.NetworkGateway = nil, gw("10.22.1.1", 15009)
	byName := behind
	byName.NetworkGateway = &GatewayAddress{Hostname: host("ns", "gw.example"), Port: 15009}
	local := Workload{UID: "c//Pod/ns/local", Name: "local", Protocol: HBONE, IPs: ips("127.0.0.2")}
	sick := local
	sick.Health = Unhealthy
	tcp := local
	tcp.Protocol = TCP
	far := func(w Workload) Workload { w.Node = "remote-node"; return w }
	waypointed := local
	waypointed.Waypoint = gw("127.0.0.10", 15008)
	six := waypointed
	six.IPs = ips("ff06::c3")
	hostPod := func(uid string) Workload {
		return Workload{UID: uid, NetworkMode: HostNetwork, IPs: ips("127.0.0.2")}
	}
	dual := Workload{UID: "c//Pod/ns/dual", Protocol: HBONE, IPs: ips("127.0.0.2", "ff06::c3")}
	named := func(uid string, hostname string) Workload {
		return Workload{UID: uid, Protocol: HBONE, Hostname: hostname}
	}
	waypoint := func(s *Service) { s.Waypoint = gw("127.0.0.10", 15008) }
	weighted := func(weight uint32) func(*Service) {
		return func(s *Service) { s.WeightedWaypoints = []WeightedWaypoint{{*gw("127.0.0.10", 15008), weight}} }
	}
	sourceVia := source()
	sourceVia.Workload.Waypoint = gw("127.0.0.10", 15008)

	tests := []struct {
		name      string
		workloads []WorkloadUpdate
		services  []*Service
		dst       string
		rule      string
		protocol  Protocol
		authority string
		nextHop   string
		uid       string
		wantErr   error
		text      string
	}{
		{name: "OB-01 unknown", dst: "1.2.3.4:80", rule: "C", nextHop: "1.2.3.4:80"},
		{name: "OB-02 remote endpoint, no gateway", workloads: []WorkloadUpdate{inExample(remote)}, services: []*Service{example()}, dst: "127.0.0.3:80",
			wantErr: ErrNoValidDestination, text: "no valid routing destination for workload: Workload{remote with uid c//Pod/ns/remote (HBONE)}"},
		{name: "OB-03a gateway by address", workloads: []WorkloadUpdate{inExample(behind)}, services: []*Service{example()}, dst: "127.0.0.3:80",
			wantErr: ErrUnsupportedRoute, text: `route not supported: rule D: Workload{remote with uid c//Pod/ns/remote (HBONE)} is in network "remote", behind a gateway`},
		{name: "OB-03b gateway by hostname", workloads: []WorkloadUpdate{inExample(byName)}, services: []*Service{example()}, dst: "127.0.0.3:80", wantErr: ErrUnsupportedRoute},
		{name: "OB-03c remote waypoint", workloads: []WorkloadUpdate{inExample(local)}, services: []*Service{example(waypoint)}, dst: "127.0.0.3:80",
			wantErr: ErrUnsupportedRoute, text: "route not supported: rule A: service ns/example.com is reached through a waypoint"},
		{name: "OB-04 failover, healthy local", workloads: []WorkloadUpdate{inExample(local), inExample(behind)},
			services: []*Service{example(mode(LoadBalanceFailover, localNetwork...))}, dst: "127.0.0.3:80",
			rule: "F", protocol: HBONE, authority: "127.0.0.2:8080", nextHop: "127.0.0.2:15008", uid: local.UID},
		{name: "OB-04 failover, unhealthy local", workloads: []WorkloadUpdate{inExample(sick), inExample(behind)},
			services: []*Service{example(mode(LoadBalanceFailover, localNetwork...))}, dst: "127.0.0.3:80", wantErr: ErrUnsupportedRoute},
		{name: "OB-05 TCP workload", workloads: []WorkloadUpdate{member(far(tcp), nil)}, dst: "127.0.0.2:80", rule: "G", nextHop: "127.0.0.2:80", uid: tcp.UID},
		{name: "OB-06 HBONE workload", workloads: []WorkloadUpdate{member(far(local), nil)}, dst: "127.0.0.2:80",
			rule: "F", protocol: HBONE, authority: "127.0.0.2:80", nextHop: "127.0.0.2:15008", uid: local.UID},
		{name: "OB-07 TCP workload here", workloads: []WorkloadUpdate{member(tcp, nil)}, dst: "127.0.0.2:80", rule: "G", nextHop: "127.0.0.2:80", uid: tcp.UID},
		{name: "OB-08 HBONE workload here", workloads: []WorkloadUpdate{member(local, nil)}, dst: "127.0.0.2:80",
			rule: "F", protocol: HBONE, authority: "127.0.0.2:80", nextHop: "127.0.0.2:15008", uid: local.UID},
		{name: "OB-09 source has a waypoint", workloads: []WorkloadUpdate{sourceVia, member(tcp, nil)}, dst: "127.0.0.2:80", rule: "G", nextHop: "127.0.0.2:80", uid: tcp.UID},
		{name: "OB-10 workload waypoint", workloads: []WorkloadUpdate{member(waypointed, nil)}, dst: "127.0.0.2:80",
			wantErr: ErrUnsupportedRoute, text: "route not supported: rule E: Workload{local with uid c//Pod/ns/local (HBONE)} is reached through a waypoint"},
		{name: "OB-11 v6 with a v4 waypoint", workloads: []WorkloadUpdate{member(six, nil)}, dst: "[ff06::c3]:80", wantErr: ErrUnsupportedRoute},
		{name: "OB-12 service waypoint", workloads: []WorkloadUpdate{inExample(local)}, services: []*Service{example(waypoint)}, dst: "127.0.0.3:80", wantErr: ErrUnsupportedRoute},
		{name: "weighted waypoint", workloads: []WorkloadUpdate{inExample(local)}, services: []*Service{example(weighted(1))}, dst: "127.0.0.3:80", wantErr: ErrUnsupportedRoute},
		{name: "weighted waypoint of no weight", workloads: []WorkloadUpdate{inExample(local)}, services: []*Service{example(weighted(0))}, dst: "127.0.0.3:80",
			rule: "F", protocol: HBONE, authority: "127.0.0.2:8080", nextHop: "127.0.0.2:15008", uid: local.UID},
		{name: "a service without waypoint leads past that of the workload", workloads: []WorkloadUpdate{inExample(waypointed)}, services: []*Service{example()}, dst: "127.0.0.3:80",
			rule: "F", protocol: HBONE, authority: "127.0.0.2:8080", nextHop: "127.0.0.2:15008", uid: local.UID},
		{name: "OB-13 no endpoints", services: []*Service{example()}, dst: "127.0.0.3:80", wantErr: ErrNoHealthyUpstream, text: "no healthy upstream: 127.0.0.3:80"},
		{name: "no such port", workloads: []WorkloadUpdate{inExample(local)}, services: []*Service{example()}, dst: "127.0.0.3:81", wantErr: ErrNoHealthyUpstream},
		{name: "OB-14 named port", workloads: []WorkloadUpdate{inExample(Workload{UID: "a", IPs: ips("127.0.0.9")}), inExample(Workload{UID: "b", IPs: ips("127.0.0.2")}, Port{80, 1234})},
			services: []*Service{example(func(s *Service) { s.Ports = []Port{{80, 0}} })}, dst: "127.0.0.3:80", rule: "G", nextHop: "127.0.0.2:1234", uid: "b"},
		{name: "OB-15 host network via service", workloads: []WorkloadUpdate{inExample(hostPod("pod1"), Port{80, 80}), member(hostPod("pod2"), nil)},
			services: []*Service{example()}, dst: "127.0.0.3:80", rule: "G", nextHop: "127.0.0.2:80", uid: "pod1"},
		{name: "OB-15 host network direct", workloads: []WorkloadUpdate{inExample(hostPod("pod1")), member(hostPod("pod2"), nil)},
			services: []*Service{example()}, dst: "127.0.0.2:80", rule: "C", nextHop: "127.0.0.2:80"},
		{name: "OB-16 dual stack, v4", workloads: []WorkloadUpdate{member(dual, nil)}, dst: "127.0.0.2:80",
			rule: "F", protocol: HBONE, authority: "127.0.0.2:80", nextHop: "127.0.0.2:15008", uid: dual.UID},
		{name: "OB-16 dual stack, v6", workloads: []WorkloadUpdate{member(dual, nil)}, dst: "[ff06::c3]:80",
			rule: "F", protocol: HBONE, authority: "[ff06::c3]:80", nextHop: "[ff06::c3]:15008", uid: dual.UID},
		{name: "OB-17 v6 only", workloads: []WorkloadUpdate{inExample(dual)}, services: []*Service{example(families(IPv6Only))}, dst: "127.0.0.3:80",
			rule: "F", protocol: HBONE, authority: "[ff06::c3]:8080", nextHop: "[ff06::c3]:15008", uid: dual.UID},
		{name: "OB-17 v4 only", workloads: []WorkloadUpdate{inExample(dual)}, services: []*Service{example(families(IPv4Only), vips("::3"))}, dst: "[::3]:80",
			rule: "F", protocol: HBONE, authority: "127.0.0.2:8080", nextHop: "127.0.0.2:15008", uid: dual.UID},
		{name: "OB-17 dual, v4", workloads: []WorkloadUpdate{inExample(dual)}, services: []*Service{example(families(DualFamily))}, dst: "127.0.0.3:80",
			rule: "F", protocol: HBONE, authority: "127.0.0.2:8080", nextHop: "127.0.0.2:15008", uid: dual.UID},
		{name: "OB-17 dual, v6", workloads: []WorkloadUpdate{inExample(dual)}, services: []*Service{example(families(DualFamily), vips("::3"))}, dst: "[::3]:80",
			rule: "F", protocol: HBONE, authority: "[ff06::c3]:8080", nextHop: "[ff06::c3]:15008", uid: dual.UID},
		{name: "no address of the family", workloads: []WorkloadUpdate{inExample(local)}, services: []*Service{example(families(IPv6Only))}, dst: "127.0.0.3:80", wantErr: ErrNoValidDestination},
		{name: "OB-18 passthrough", workloads: []WorkloadUpdate{inExample(local)}, services: []*Service{example(mode(LoadBalancePassthrough), vips("1.2.3.4"))}, dst: "1.2.3.4:80",
			rule: "C", nextHop: "1.2.3.4:80"},
		{name: "OB-19 passthrough with waypoint", services: []*Service{example(mode(LoadBalancePassthrough), vips("1.2.3.4"), waypoint)}, dst: "1.2.3.4:80", wantErr: ErrUnsupportedRoute},
		{name: "hostname workload", workloads: []WorkloadUpdate{inExample(named("dns", "db.example"))}, services: []*Service{example()}, dst: "127.0.0.3:80",
			wantErr: ErrUnsupportedRoute, text: `route not supported: hostname: the address of Workload{ with uid dns (HBONE)} must be resolved from "db.example"`},
		{name: "service behind a CIDR", workloads: []WorkloadUpdate{inExample(local)}, services: []*Service{example(cidrs("10.9.0.0/16"))}, dst: "10.9.1.1:80",
			rule: "F", protocol: HBONE, authority: "127.0.0.2:8080", nextHop: "127.0.0.2:15008", uid: local.UID},
		{name: "hidden service", workloads: []WorkloadUpdate{inExample(local)}, services: []*Service{example(private, func(s *Service) { s.Namespace = "other" })},
			dst: "127.0.0.3:80", rule: "C", nextHop: "127.0.0.3:80"},
		// Address lookup says workload, endpoint lookup says service: the empty service is no reason to go around it.
		{name: "workload and empty service on one address", workloads: []WorkloadUpdate{member(local, nil)}, services: []*Service{example(vips("127.0.0.2"))}, dst: "127.0.0.2:80",
			wantErr: ErrNoHealthyUpstream},
		{name: "workload and service with waypoint on one address", workloads: []WorkloadUpdate{member(local, nil), inExample(tcp)}, services: []*Service{example(vips("127.0.0.2"), waypoint)},
			dst: "127.0.0.2:80", wantErr: ErrUnsupportedRoute},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := New(Config{})
			apply(t, s, Update{Workloads: append([]WorkloadUpdate{source()}, tt.workloads...), Services: tt.services})
			s.consistent(t)
			src, _ := s.WorkloadByUID("c//Pod/ns/source-workload")
			q := Query{Source: src, SourceIP: addr("127.0.0.1"), Dst: addrPort(tt.dst)}
			r, err := s.Route(q)
			e := s.Explain(q)
			if (e.Err == nil) != (err == nil) || e.Route.Rule != r.Rule || len(e.Steps) == 0 {
				t.Errorf("Explain: %+v, Route: %+v, %v", e, r, err)
			}
			if tt.wantErr != nil {
				if !errors.Is(err, tt.wantErr) || tt.text != "" && err.Error() != tt.text {
					t.Fatalf("got %v\nwant %v %s", err, tt.wantErr, tt.text)
				}
				if !reflect.DeepEqual(r, Route{}) {
					t.Errorf("a refusal with a route: %+v", r)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			uid := ""
			if r.Workload != nil {
				uid = r.Workload.UID
			}
			if r.Rule != tt.rule || r.Protocol != tt.protocol || r.Authority.String() != tt.authority || r.NextHop.String() != tt.nextHop || uid != tt.uid {
				t.Errorf("got rule %s, %s, %q, %s, workload %q\nwant rule %s, %s, %q, %s, workload %q",
					r.Rule, r.Protocol, r.Authority, r.NextHop, uid, tt.rule, tt.protocol, tt.authority, tt.nextHop, tt.uid)
			}
			if (r.Protocol == HBONE) != (len(r.ExpectedIDs) > 0) {
				t.Errorf("expected identities %v of protocol %s", r.ExpectedIDs, r.Protocol)
			}
			wantService := uid != "" && len(tt.services) > 0
			if (r.Service != nil) != wantService {
				t.Errorf("service %+v, want one: %v", r.Service, wantService)
			}
		})
	}
}

func TestRouteRefusesNonsense(t *testing.T) {
	s := New(Config{})
	if _, err := s.Route(Query{Dst: addrPort("1.2.3.4:80")}); err == nil {
		t.Error("routed without a source")
	}
	if _, err := s.Route(Query{Source: &Workload{}}); err == nil {
		t.Error("routed without a destination")
	}
}

// An endpoint of another network that no service of ours leads to.
func TestRouteOtherNetworkWithoutService(t *testing.T) {
	s := New(Config{Network: "here"})
	remote := inExample(Workload{UID: "r", Network: "far", IPs: ips("10.0.0.9")})
	apply(t, s, Update{Workloads: []WorkloadUpdate{remote}, Services: []*Service{example()}})
	_, err := s.Route(Query{Source: &Workload{Namespace: "ns"}, Dst: addrPort("127.0.0.3:80")})
	if err == nil || err.Error() != "no service for target address: 127.0.0.3:80" {
		t.Errorf("got %v", err)
	}
}

func TestRouteIdentities(t *testing.T) {
	s := New(Config{TrustDomainAliases: []string{"old"}, HBONEPort: 16000})
	apply(t, s, Update{
		Workloads: []WorkloadUpdate{inExample(Workload{UID: "w", Protocol: HBONE, IPs: ips("127.0.0.2")})},
		Services: []*Service{example(func(s *Service) {
			s.SubjectAltNames = []string{"spiffe://cluster.local/ns/ns/sa/gw", "no SPIFFE ID", "spiffe://far/x"}
		})},
	})
	r, err := s.Route(Query{Source: &Workload{Namespace: "ns"}, Dst: addrPort("127.0.0.3:80")})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, id := range r.ExpectedIDs {
		got = append(got, id.String())
	}
	want := []string{
		"spiffe://cluster.local/ns/ns/sa/gw", "spiffe://old/ns/ns/sa/gw", "spiffe://far/x",
		"spiffe://cluster.local/ns/ns/sa/default", "spiffe://old/ns/ns/sa/default",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("identities (-want +got):\n%s", diff)
	}
	if r.NextHop.Port() != 16000 {
		t.Errorf("next hop %s", r.NextHop)
	}
	if diff := cmp.Diff(&ServiceRef{Hostname: "example.com", Name: "example", Namespace: "ns"}, r.Service); diff != "" {
		t.Error(diff)
	}
}

// D8: what has just failed is not chosen again.
func TestD8_Avoid(t *testing.T) {
	s := New(Config{})
	apply(t, s, Update{
		Workloads: []WorkloadUpdate{inExample(Workload{UID: "a", IPs: ips("10.0.0.1")}), inExample(Workload{UID: "b", IPs: ips("10.0.0.2")})},
		Services:  []*Service{example()},
	})
	q := Query{Source: &Workload{Namespace: "ns"}, Dst: addrPort("127.0.0.3:80"), Avoid: []string{"a"}}
	for range 100 {
		if r, err := s.Route(q); err != nil || r.Workload.UID != "b" {
			t.Fatalf("got %+v, %v", r, err)
		}
	}
	q.Avoid = []string{"b", "a"}
	if _, err := s.Route(q); !errors.Is(err, ErrNoHealthyUpstream) {
		t.Errorf("got %v", err)
	}
	q.Dst = addrPort("10.0.0.1:80")
	if _, err := s.Route(q); !errors.Is(err, ErrNoHealthyUpstream) {
		t.Errorf("by address: got %v", err)
	}
}

// S-07 and ST-07.
func TestDP_S07_LoadBalance(t *testing.T) {
	at := func(network, region, zone string) Workload {
		return Workload{Network: network, Locality: Locality{Region: region, Zone: zone}, Namespace: "ns"}
	}
	endpoint := func(uid string, w Workload, ip ...string) WorkloadUpdate {
		w.UID, w.IPs = uid, ips(ip...)
		return inExample(w)
	}
	workloads := []WorkloadUpdate{
		endpoint("match", at("network", "reg", "zone"), "10.0.0.1"),
		endpoint("almost", at("network", "reg", "not-zone"), "10.0.0.2"),
		endpoint("no_locality", at("network", "", ""), "10.0.0.3"),
		endpoint("other", at("other", "reg", "zone"), "10.0.0.4"),
		endpoint("empty_ip", at("network", "reg", "zone")),
	}
	prefs := []Scope{ScopeNetwork, ScopeRegion, ScopeZone}
	tests := []struct {
		name string
		mode LoadBalancerMode
		src  Workload
		want []string
	}{
		{"strict, no match", LoadBalanceStrict, at("", "", ""), nil},
		{"strict, match", LoadBalanceStrict, at("network", "reg", "zone"), []string{"match"}},
		{"failover, no match", LoadBalanceFailover, at("none", "none", "none"), []string{"almost", "match", "no_locality", "other"}},
		{"failover, full", LoadBalanceFailover, at("network", "reg", "zone"), []string{"match"}},
		{"failover, network and region", LoadBalanceFailover, at("network", "reg", ""), []string{"almost", "match"}},
		{"failover, network", LoadBalanceFailover, at("network", "none", "none"), []string{"almost", "match", "no_locality"}},
		{"failover, region and zone", LoadBalanceFailover, at("none", "reg", "zone"), []string{"match", "other"}},
		{"standard ignores preferences", LoadBalanceAny, at("network", "reg", "zone"), []string{"almost", "match", "no_locality", "other"}},
	}
	for _, tt := range tests {
		s := New(Config{})
		apply(t, s, Update{Workloads: workloads, Services: []*Service{example(mode(tt.mode, prefs...))}})
		var got []string
		for i := range uint64(8) {
			p := picker{t: s.now(), src: &tt.src, port: 80, draw: func(n uint64) uint64 { return i % n }}
			if w, _ := p.pick(s.now().services[exampleKey]); w != nil && !slices.Contains(got, w.UID) {
				got = append(got, w.UID)
			}
		}
		slices.Sort(got)
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
}

func TestRank(t *testing.T) {
	prefs := []Scope{ScopeNetwork, ScopeRegion, ScopeZone}
	for _, tt := range []struct {
		network, region, zone bool
		want                  int
	}{{true, true, true, 5}, {true, true, false, 4}, {true, false, true, 3}, {false, true, true, 2}, {false, true, false, 1}, {false, false, true, 0}} {
		name := func(same bool) string {
			if same {
				return "same"
			}
			return "other"
		}
		src := &Workload{Network: "same", Locality: Locality{Region: "same", Zone: "same"}}
		dst := &Workload{Network: name(tt.network), Locality: Locality{Region: name(tt.region), Zone: name(tt.zone)}}
		m, bonus := (&LoadBalancer{Preferences: prefs}).rank(src, dst)
		if m+bonus != tt.want {
			t.Errorf("%+v: rank %d", tt, m+bonus)
		}
	}
	a := &Workload{Node: "n", ClusterID: "c", Locality: Locality{Subzone: "s"}}
	all := &LoadBalancer{Preferences: []Scope{ScopeSubzone, ScopeNode, ScopeCluster}}
	if m, _ := all.rank(a, a); m != 3 {
		t.Errorf("the same workload matches %d of 3", m)
	}
	for i, b := range []*Workload{{}, {Locality: Locality{Subzone: "s"}}, {Locality: Locality{Subzone: "s"}, Node: "n"}} {
		if m, _ := all.rank(a, b); m != i {
			t.Errorf("workload %d matches %d", i, m)
		}
	}
}

// Capacity is the weight; 0 never gets traffic.
func TestCapacity(t *testing.T) {
	mk := func(uid string, capacity uint32, ip string) WorkloadUpdate {
		u := inExample(Workload{UID: uid, IPs: ips(ip)})
		u.Workload.Capacity = capacity
		return u
	}
	s := New(Config{})
	apply(t, s, Update{Services: []*Service{example()}, Workloads: []WorkloadUpdate{mk("a", 0, "10.0.0.1"), mk("b", 3, "10.0.0.2"), mk("c", 1, "10.0.0.3")}})
	counts := map[string]int{}
	for i := range uint64(4) {
		r, err := s.Route(Query{Source: &Workload{Namespace: "ns"}, Dst: addrPort("127.0.0.3:80"), Draw: func(n uint64) uint64 {
			if n != 4 {
				t.Errorf("draw from %d, want 4", n)
			}
			return i
		}})
		if err != nil {
			t.Fatal(err)
		}
		counts[r.Workload.UID]++
	}
	if diff := cmp.Diff(map[string]int{"b": 3, "c": 1}, counts); diff != "" {
		t.Error(diff)
	}
	apply(t, s, Update{Removed: []string{"b", "c"}})
	if _, err := s.Route(Query{Source: &Workload{Namespace: "ns"}, Dst: addrPort("127.0.0.3:80")}); !errors.Is(err, ErrNoHealthyUpstream) {
		t.Errorf("only capacity 0: %v", err)
	}
	huge := []WorkloadUpdate{mk("x", 1<<32-1, "10.0.0.4"), mk("y", 1<<32-1, "10.0.0.5")}
	apply(t, s, Update{Workloads: huge})
	r, err := s.Route(Query{Source: &Workload{Namespace: "ns"}, Dst: addrPort("127.0.0.3:80"), Draw: func(n uint64) uint64 { return n - 1 }})
	if err != nil || r.Workload.UID != "y" {
		t.Errorf("got %+v, %v", r, err)
	}
}

// S-06 and ST-06.
func TestDP_S06_PortMappings(t *testing.T) {
	tests := []struct {
		name     string
		service  []Port
		endpoint []Port
		tunnel   *ApplicationTunnel
		want     uint16 // 0: no endpoint
	}{
		{"endpoint", []Port{{80, 0}}, []Port{{80, 9090}}, nil, 9090},
		{"endpoint over service", []Port{{80, 8080}}, []Port{{80, 9090}}, nil, 9090},
		{"service", []Port{{80, 8080}}, nil, nil, 8080},
		{"named port without the endpoint's", []Port{{80, 0}}, nil, nil, 0},
		{"tunnel is no help to a service", []Port{{80, 0}}, nil, &ApplicationTunnel{Port: 15088}, 0},
	}
	for _, tt := range tests {
		s := New(Config{})
		apply(t, s, Update{
			Workloads: []WorkloadUpdate{inExample(Workload{UID: "w", IPs: ips("10.0.0.1"), ApplicationTunnel: tt.tunnel}, tt.endpoint...)},
			Services:  []*Service{example(func(s *Service) { s.Ports = tt.service })},
		})
		p := picker{t: s.now(), src: &Workload{}, port: 80}
		w, port := p.pick(s.now().services[exampleKey])
		if port != tt.want || (w != nil) != (tt.want != 0) {
			t.Errorf("%s: got port %d of %v, want %d", tt.name, port, w, tt.want)
		}
	}
}
