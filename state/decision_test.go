package state

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// Every line of the case index of spec/datapath.md §4.4.
func TestDP_CaseIndex(t *testing.T) {
	way := gw("127.0.0.10", 15008)
	gateway := member(obGateway, nil)
	farWay := member(but(obWaypoint, behind(inRemote(gw("10.22.1.1", 15009))), func(w *Workload) { w.Network = "remote" }),
		map[NamespacedHostname][]Port{host("ns", "way.example"): nil})
	wayService := &Service{
		Name: "way", Namespace: "ns", Hostname: "way.example", Ports: []Port{{15008, 15008}},
		SubjectAltNames: []string{"spiffe://cluster.local/ns/ns/sa/way-san"},
	}
	local := []WorkloadUpdate{inExample(obLocal)}
	localTCP := []WorkloadUpdate{inExample(but(obLocal, tcp))}
	viaWay := []WorkloadUpdate{inExample(but(obLocal, waypointed(way)))}
	alone := func(w Workload) []WorkloadUpdate { return []WorkloadUpdate{member(w, nil)} }
	headless := func(s *Service) { s.VIPs = nil }
	asWaypoint := &Workload{Namespace: "ns", Identity: spiffe(t, "spiffe://cluster.local/ns/ns/sa/waypoint")}
	passthrough := example(mode(LoadBalancePassthrough))
	hidden := func(s *Service) { s.Namespace, s.Visibility = "other", NamespaceVisibility }
	runCases(t, []routeCase{
		{name: "VIP, local waypoint", workloads: join(obWaypoints, local), services: []*Service{example(via(way))}, dst: "127.0.0.3:80",
			rule: "A2", protocol: HBONE, authority: "127.0.0.3:80", nextHop: "127.0.0.10:15008", uid: obWaypoint.UID},
		{name: "VIP, waypoint in another network", workloads: join(local, []WorkloadUpdate{farWay, gateway}),
			services: []*Service{example(via(byHost("way.example", 15008))), wayService}, dst: "127.0.0.3:80",
			rule: "A1", protocol: DoubleHBONE, authority: "example.com:80", nextHop: "10.22.1.1:15009", uid: obWaypoint.UID, gateway: obGateway.UID, final: []string{"way-san"}},
		{name: "VIP, HBONE endpoint", workloads: local, services: []*Service{example()}, dst: "127.0.0.3:80",
			rule: "F", protocol: HBONE, authority: "127.0.0.2:8080", nextHop: "127.0.0.2:15008", uid: obLocal.UID, service: "ns/example.com"},
		{name: "VIP, TCP endpoint", workloads: localTCP, services: []*Service{example()}, dst: "127.0.0.3:80",
			rule: "G", nextHop: "127.0.0.2:8080", uid: obLocal.UID, service: "ns/example.com"},
		{name: "VIP, the waypoint of the endpoint does not matter", workloads: viaWay, services: []*Service{example()}, dst: "127.0.0.3:80",
			rule: "F", protocol: HBONE, authority: "127.0.0.2:8080", nextHop: "127.0.0.2:15008", uid: obLocal.UID},
		{name: "VIP, endpoint in another network", workloads: []WorkloadUpdate{inExample(but(obRemote, behind(inRemote(gw("10.22.1.1", 15009))))), gateway},
			services: []*Service{example(named("san"))}, dst: "127.0.0.3:80",
			rule: "D", protocol: DoubleHBONE, authority: "example.com:80", nextHop: "10.22.1.1:15009", uid: obRemote.UID, gateway: obGateway.UID, final: []string{"san"}},
		{name: "VIP, nothing usable", workloads: []WorkloadUpdate{inExample(but(obLocal, sick))}, services: []*Service{example()}, dst: "127.0.0.3:80",
			wantErr: ErrNoHealthyUpstream, text: "no healthy upstream: 127.0.0.3:80"},
		{name: "VIP, no such port", workloads: local, services: []*Service{example()}, dst: "127.0.0.3:81", wantErr: ErrNoHealthyUpstream},
		{name: "headless, waypoint of the pod", workloads: join(obWaypoints, viaWay), services: []*Service{example(headless)}, dst: "127.0.0.2:80",
			rule: "E", protocol: HBONE, authority: "127.0.0.2:80", nextHop: "127.0.0.10:15008", uid: obWaypoint.UID},
		{name: "pod IP, the caller is its waypoint", from: asWaypoint, fromIP: "127.0.0.10", dst: "127.0.0.2:80",
			workloads: join(obWaypoints, alone(but(obLocal, waypointed(way)))),
			rule:      "F", protocol: HBONE, authority: "127.0.0.2:80", nextHop: "127.0.0.2:15008", uid: obLocal.UID},
		{name: "TCP pod IP, the caller is its waypoint", from: asWaypoint, fromIP: "127.0.0.10", dst: "127.0.0.2:80",
			workloads: join(obWaypoints, alone(but(obLocal, waypointed(way), tcp))), rule: "G", nextHop: "127.0.0.2:80", uid: obLocal.UID},
		{name: "headless, no waypoint", workloads: local, services: []*Service{example(headless)}, dst: "127.0.0.2:80",
			rule: "F", protocol: HBONE, authority: "127.0.0.2:80", nextHop: "127.0.0.2:15008", uid: obLocal.UID},
		{name: "pod IP, no waypoint", workloads: alone(but(obLocal, tcp)), dst: "127.0.0.2:80", rule: "G", nextHop: "127.0.0.2:80", uid: obLocal.UID},
		{name: "host-network pod", workloads: alone(but(obLocal, func(w *Workload) { w.NetworkMode = HostNetwork })), dst: "127.0.0.2:80", rule: "C", nextHop: "127.0.0.2:80"},
		{name: "by CIDR VIP", workloads: local, services: []*Service{example(cidrs("10.9.0.0/16"))}, dst: "10.9.1.1:80",
			rule: "F", protocol: HBONE, authority: "127.0.0.2:8080", nextHop: "127.0.0.2:15008", uid: obLocal.UID},
		{name: "by CIDR VIP, waypoint", workloads: join(obWaypoints, local), services: []*Service{example(cidrs("10.9.0.0/16"), via(way))}, dst: "10.9.1.1:80",
			rule: "A2", protocol: HBONE, authority: "10.9.1.1:80", nextHop: "127.0.0.10:15008", uid: obWaypoint.UID},
		{name: "external IP", workloads: local, services: []*Service{example()}, dst: "[2001:db8::1]:443", rule: "C", nextHop: "[2001:db8::1]:443"},
		{name: "hidden service", workloads: local, services: []*Service{example(hidden)}, dst: "127.0.0.3:80", rule: "C", nextHop: "127.0.0.3:80"},
		{name: "hidden service, a visible CIDR", workloads: local, dst: "127.0.0.3:80",
			services: []*Service{example(hidden), example(func(s *Service) { s.VIPs = nil }, cidrs("127.0.0.0/24"))},
			rule:     "F", protocol: HBONE, authority: "127.0.0.2:8080", nextHop: "127.0.0.2:15008", uid: obLocal.UID, service: "ns/example.com"},
		{name: "passthrough", workloads: local, services: []*Service{passthrough}, dst: "127.0.0.3:80", rule: "C", nextHop: "127.0.0.3:80"},
		{name: "passthrough with a waypoint by hostname", dst: "127.0.0.3:80",
			workloads: []WorkloadUpdate{member(obDualWay, map[NamespacedHostname][]Port{host("ns", "way.example"): nil})},
			services:  []*Service{example(mode(LoadBalancePassthrough), via(byHost("way.example", 15008))), wayService},
			rule:      "A2", protocol: HBONE, authority: "127.0.0.3:80", nextHop: "127.0.0.11:15008", uid: obDualWay.UID},
	})
}

// Where the two lookups of a connection disagree, no waypoint is passed by.
func TestRouteAmbiguousAddress(t *testing.T) {
	way := gw("127.0.0.10", 15008)
	viaWay := member(but(obLocal, tcp, waypointed(way)), nil)
	toWay := func(rule string, c routeCase) routeCase {
		c.rule, c.protocol, c.authority, c.nextHop, c.uid = rule, HBONE, c.dst, "127.0.0.10:15008", obWaypoint.UID
		return c
	}
	runCases(t, []routeCase{
		{name: "workload and empty service", workloads: []WorkloadUpdate{member(obLocal, nil)}, services: []*Service{example(vips("127.0.0.2"))}, dst: "127.0.0.2:80",
			wantErr: ErrNoHealthyUpstream},
		toWay("A2", routeCase{name: "workload and service with waypoint", dst: "127.0.0.2:80", service: "ns/example.com",
			workloads: join(obWaypoints, []WorkloadUpdate{member(obLocal, nil), inExample(but(obDual, tcp))}), services: []*Service{example(vips("127.0.0.2"), via(way))}}),
		toWay("E", routeCase{name: "workload with waypoint and passthrough service", dst: "127.0.0.2:80",
			workloads: join(obWaypoints, []WorkloadUpdate{viaWay}), services: []*Service{example(vips("127.0.0.2"), mode(LoadBalancePassthrough))}}),
		{name: "our network is not that of the source", config: Config{Network: "other"}, dst: "127.0.0.2:80",
			workloads: join(obWaypoints, []WorkloadUpdate{viaWay}), services: []*Service{example(func(s *Service) { s.VIPs = []NetworkAddress{{"other", addr("127.0.0.2")}} })},
			rule: "E", protocol: HBONE, authority: "127.0.0.2:80", nextHop: "127.0.0.10:15008", uid: obWaypoint.UID},
		{name: "a workload with waypoint in our network, which is not that of the source", config: Config{Network: "other"}, dst: "127.0.0.2:80",
			workloads: []WorkloadUpdate{member(but(obLocal, waypointed(way), func(w *Workload) { w.Network = "other" }), nil)},
			wantErr:   ErrNoService, text: "no service for target address: 127.0.0.2:80"},
		{name: "a service of our network only, which is not that of the source", config: Config{Network: "other"}, dst: "127.0.0.3:80",
			services: []*Service{example(func(s *Service) { s.VIPs = []NetworkAddress{{"other", addr("127.0.0.3")}} })},
			wantErr:  ErrNoHealthyUpstream, text: "no healthy upstream: 127.0.0.3:80"},
		{name: "endpoint in another network, no service in ours", config: Config{Network: "here"}, dst: "127.0.0.3:80",
			workloads: []WorkloadUpdate{inExample(obRemote)}, services: []*Service{example()},
			wantErr: ErrNoService, text: "no service for target address: 127.0.0.3:80"},
	})
}

// spec/state-xds-dns.md §4.9 and §4.10.
func TestRouteHostname(t *testing.T) {
	byName := Workload{UID: "dns", Protocol: HBONE, Hostname: "db.example"}
	runCases(t, []routeCase{
		{name: "HBONE", workloads: []WorkloadUpdate{inExample(byName)}, services: []*Service{example()}, dst: "127.0.0.3:80",
			rule: "F", protocol: HBONE, authority: "", nextHop: "?:15008", resolve: "db.example", uid: "dns"},
		{name: "TCP", workloads: []WorkloadUpdate{inExample(but(byName, tcp))}, services: []*Service{example()}, dst: "127.0.0.3:80",
			rule: "G", nextHop: "?:8080", resolve: "db.example", uid: "dns"},
		{name: "waypoint", workloads: []WorkloadUpdate{inExample(obLocal), member(byName, nil)}, services: []*Service{example(via(byHost("db.example", 15008)))}, dst: "127.0.0.3:80",
			rule: "A2", protocol: HBONE, authority: "127.0.0.3:80", nextHop: "?:15008", resolve: "db.example", uid: "dns"},
		{name: "network gateway", workloads: []WorkloadUpdate{inExample(but(obRemote, behind(byHost("db.example", 15009)))), member(byName, nil)},
			services: []*Service{example(named("san"))}, dst: "127.0.0.3:80",
			rule: "D", protocol: DoubleHBONE, authority: "example.com:80", nextHop: "?:15009", resolve: "db.example", uid: obRemote.UID, gateway: "dns"},
		{name: "an address of no allowed family", workloads: []WorkloadUpdate{inExample(but(obLocal, func(w *Workload) { w.Hostname = "db.example" }))},
			services: []*Service{example(families(IPv6Only))}, dst: "127.0.0.3:80",
			rule: "F", protocol: HBONE, authority: "", nextHop: "?:15008", resolve: "db.example", uid: obLocal.UID},
		{name: "no address of the family", workloads: []WorkloadUpdate{inExample(obLocal)}, services: []*Service{example(families(IPv6Only))}, dst: "127.0.0.3:80",
			wantErr: ErrNoValidDestination, text: "no valid routing destination for workload: Workload{local with uid c//Pod/ns/local (HBONE)}"},
	})
}

// toPort is a next hop whose address is not known yet.
func toPort(port uint16) netip.AddrPort { return netip.AddrPortFrom(netip.Addr{}, port) }

// spec/state-xds-dns.md §4.9: the address that was dialled goes before all others,
// also before those that the service allows.
func TestRouteDialledAddress(t *testing.T) {
	many := but(obLocal, func(w *Workload) { w.IPs = ips("127.0.0.20", "127.0.0.2", "ff06::c3") })
	runCases(t, []routeCase{
		{name: "not the first", workloads: []WorkloadUpdate{member(many, nil)}, dst: "127.0.0.2:80",
			rule: "F", protocol: HBONE, authority: "127.0.0.2:80", nextHop: "127.0.0.2:15008", uid: obLocal.UID},
		{name: "waypoint by address", workloads: []WorkloadUpdate{member(many, nil)}, services: []*Service{example(via(gw("127.0.0.2", 15008)))}, dst: "127.0.0.3:80",
			rule: "A2", protocol: HBONE, authority: "127.0.0.3:80", nextHop: "127.0.0.2:15008", uid: obLocal.UID},
	})
}

func TestResolved(t *testing.T) {
	f := Route{Rule: "F", Protocol: HBONE, Resolve: "db", NextHop: toPort(15008), Authority: Authority{Addr: toPort(8080)}}
	g := Route{Rule: "G", Resolve: "db", NextHop: toPort(8080)}
	a := Route{Rule: "A2", Protocol: HBONE, Resolve: "db", NextHop: toPort(15008), Authority: Authority{Addr: addrPort("127.0.0.3:80")}}
	d := Route{Rule: "D", Protocol: DoubleHBONE, Resolve: "db", NextHop: toPort(15009), Authority: Authority{Host: "example.com", Port: 80}}
	for _, tt := range []struct {
		route              Route
		nextHop, authority string
	}{
		{f, "10.0.0.9:15008", "10.0.0.9:8080"}, {g, "10.0.0.9:8080", ""}, {a, "10.0.0.9:15008", "127.0.0.3:80"}, {d, "10.0.0.9:15009", "example.com:80"},
	} {
		r := tt.route.Resolved(addr("10.0.0.9"))
		if r.Resolve != "" || r.NextHop.String() != tt.nextHop || r.Authority.String() != tt.authority {
			t.Errorf("rule %s: got %q, %s, %q, want %s, %q", r.Rule, r.Resolve, r.NextHop, r.Authority, tt.nextHop, tt.authority)
		}
	}
}

func TestAuthorityText(t *testing.T) {
	for want, a := range map[string]Authority{
		"":               {},
		"10.0.0.1:80":    {Addr: addrPort("10.0.0.1:80")},
		"[2001:db8::]:1": {Addr: addrPort("[2001:db8::]:1")},
		"example.com:80": {Host: "example.com", Port: 80},
	} {
		if a.String() != want {
			t.Errorf("got %q, want %q", a, want)
		}
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
