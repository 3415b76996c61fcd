package state

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func weights(list ...WeightedWaypoint) func(*Service) {
	return func(s *Service) { s.WeightedWaypoints = list }
}

// S-01 and ST-01, and sums that 32 bits do not hold.
func TestDP_S01_WeightedWaypoint(t *testing.T) {
	first, second, single := gw("10.1.0.1", 15008), gw("10.1.0.2", 15008), gw("10.1.0.3", 15008)
	set := func(a, b uint32) []WeightedWaypoint { return []WeightedWaypoint{{*first, a}, {*second, b}} }
	draw := func(svc *service, draw func(uint64) uint64) *GatewayAddress {
		d := decision{q: &Query{Draw: draw}}
		return d.waypointOf(svc)
	}
	for _, tt := range []struct {
		name string
		set  []WeightedWaypoint
		want *GatewayAddress
	}{
		{"none", nil, single}, {"first", set(100, 0), first}, {"second", set(0, 100), second}, {"no weight", set(0, 0), single},
	} {
		svc := &service{Service: Service{Waypoint: single, WeightedWaypoints: tt.set}}
		for range 100 {
			if got := draw(svc, nil); got.String() != tt.want.String() {
				t.Fatalf("%s: got %s, want %s", tt.name, got, tt.want)
			}
		}
	}
	if got := draw(&service{Service: Service{WeightedWaypoints: set(0, 0)}}, nil); got != nil {
		t.Errorf("no weight and no waypoint: %s", got)
	}
	svc := &service{Service: Service{WeightedWaypoints: set(75, 25)}}
	n := 0
	for range 10_000 {
		if draw(svc, nil).String() == first.String() {
			n++
		}
	}
	if n < 7000 || n > 8000 {
		t.Errorf("a weight of 75 %% got %d of 10000", n)
	}
	const all = 1<<32 - 1
	svc = &service{Service: Service{Waypoint: single, WeightedWaypoints: set(all, all)}}
	for want, n := range map[*GatewayAddress]uint64{first: all - 1, second: all} {
		got := draw(svc, func(sum uint64) uint64 {
			if sum != 2*all {
				t.Errorf("drawn from %d, want %d", sum, uint64(2*all))
			}
			return n
		})
		if got.String() != want.String() {
			t.Errorf("draw %d: got %s, want %s", n, got, want)
		}
	}
}

// One connection draws once among the waypoints, and once among the endpoints of
// the one that was drawn.
func TestWeightedWaypointRoute(t *testing.T) {
	member1 := WeightedWaypoint{*gw("127.0.0.10", 15008), 1}
	member2 := WeightedWaypoint{*gw("127.0.0.11", 15008), 3}
	workloads := join(obWaypoints, []WorkloadUpdate{inExample(obLocal)})
	var cases []routeCase
	for i, hop := range []string{"127.0.0.10:15008", "127.0.0.11:15008", "127.0.0.11:15008", "127.0.0.11:15008"} {
		uid := obWaypoint.UID
		if i > 0 {
			uid = obDualWay.UID
		}
		cases = append(cases, routeCase{name: hop, workloads: workloads, services: []*Service{example(weights(member1, member2), via(gw("10.9.9.9", 1)))},
			dst: "127.0.0.3:80", draw: []uint64{uint64(i)}, rule: "A2", protocol: HBONE, authority: "127.0.0.3:80", nextHop: hop, uid: uid})
	}
	member1.Weight, member2.Weight = 0, 0
	cases = append(cases,
		routeCase{name: "no weight, no waypoint", workloads: workloads, services: []*Service{example(weights(member1, member2))}, dst: "127.0.0.3:80",
			rule: "F", protocol: HBONE, authority: "127.0.0.2:8080", nextHop: "127.0.0.2:15008", uid: obLocal.UID},
		routeCase{name: "no weight, single waypoint", workloads: workloads, services: []*Service{example(weights(member1, member2), via(gw("127.0.0.10", 15008)))}, dst: "127.0.0.3:80",
			rule: "A2", protocol: HBONE, authority: "127.0.0.3:80", nextHop: "127.0.0.10:15008", uid: obWaypoint.UID})
	runCases(t, cases)
}

// A waypoint or gateway that is not there is never gone around.
func TestUnknownWaypoint(t *testing.T) {
	local := inExample(obLocal)
	wayService := func(mods ...func(*Service)) *Service {
		s := &Service{Name: "way", Namespace: "ns", Hostname: "way.example", Ports: []Port{{15008, 15008}}, VIPs: []NetworkAddress{{"", addr("127.0.0.7")}}}
		for _, m := range mods {
			m(s)
		}
		return s
	}
	remote := func(g *GatewayAddress) WorkloadUpdate { return inExample(but(obRemote, behind(g))) }
	refuse := func(name string, want error, text string, services []*Service, workloads ...WorkloadUpdate) routeCase {
		return routeCase{name: name, workloads: workloads, services: services, dst: "127.0.0.3:80", wantErr: want, text: text}
	}
	one := func(mods ...func(*Service)) []*Service { return []*Service{example(mods...)} }
	runCases(t, []routeCase{
		refuse("waypoint by address", ErrUnknownWaypoint, "unknown waypoint: waypoint /127.0.0.10 not found", one(via(gw("127.0.0.10", 15008))), local),
		refuse("waypoint by hostname", ErrUnknownWaypoint, "unknown waypoint: waypoint way.example not found", one(via(byHost("way.example", 15008))), local),
		refuse("waypoint without endpoints", ErrUnknownWaypoint, "unknown waypoint: waypoint way.example has no endpoint that can take the connection on port 15008",
			[]*Service{example(via(byHost("way.example", 15008))), wayService()}, local),
		refuse("waypoint that lacks the port", ErrUnknownWaypoint, "", []*Service{example(via(byHost("way.example", 15009))), wayService()}, local,
			member(obWaypoint, map[NamespacedHostname][]Port{host("ns", "way.example"): nil})),
		refuse("passthrough waypoint by hostname", ErrUnknownWaypoint, "", []*Service{example(via(byHost("way.example", 15008))), wayService(mode(LoadBalancePassthrough))}, local,
			member(obWaypoint, map[NamespacedHostname][]Port{host("ns", "way.example"): nil})),
		refuse("passthrough waypoint by address", ErrUnknownWaypoint, "", []*Service{example(via(gw("127.0.0.7", 15008))), wayService(mode(LoadBalancePassthrough))}, local),
		refuse("waypoint that we do not see", ErrUnknownWaypoint, "", []*Service{example(via(gw("127.0.0.7", 15008))),
			wayService(private, func(s *Service) { s.Namespace = "other" })}, local),
		refuse("waypoint on port 0", ErrUnknownWaypoint, "", one(via(gw("127.0.0.10", 0))), local, member(obWaypoint, nil)),
		refuse("waypoint in another network without a gateway", ErrNoValidDestination, "", one(via(byHost("way.host", 15008))), local,
			member(but(obRemote, func(w *Workload) { w.Hostname = "way.host" }), nil)),
		refuse("one bad member of a set", ErrUnknownWaypoint, "", one(weights(WeightedWaypoint{*byHost("way.example", 15008), 1}, WeightedWaypoint{*gw("127.0.0.10", 15008), 1}),
			via(gw("127.0.0.10", 15008))), local, member(obWaypoint, nil)),
		{name: "waypoint of a workload", workloads: []WorkloadUpdate{member(but(obLocal, waypointed(byHost("way.example", 15008))), nil)}, dst: "127.0.0.2:80",
			wantErr: ErrUnknownWaypoint, text: "unknown waypoint: waypoint way.example not found"},
		{name: "waypoint of a workload in another network", dst: "127.0.0.2:80", wantErr: ErrNoValidDestination,
			workloads: []WorkloadUpdate{member(but(obLocal, waypointed(inRemote(gw("10.22.1.9", 15008)))), nil),
				member(but(obRemote, func(w *Workload) { w.NetworkGateway = gw("127.0.0.10", 15009) }), nil)}},
		refuse("gateway by address", ErrUnknownGateway, "unknown network gateway: network gateway remote/10.22.1.1 not found", one(named("san")), remote(inRemote(gw("10.22.1.1", 15009)))),
		refuse("gateway by hostname", ErrUnknownGateway, "unknown network gateway: network gateway gw.example not found", one(named("san")), remote(byHost("gw.example", 15009))),
		refuse("gateway whose service lacks the port, though it has a tunnel", ErrUnknownGateway, "", []*Service{example(named("san")), wayService()}, remote(byHost("way.example", 15009)),
			member(but(obGateway, func(w *Workload) { w.ApplicationTunnel = &ApplicationTunnel{Port: 1} }), map[NamespacedHostname][]Port{host("ns", "way.example"): nil})),
		refuse("nobody to believe behind the gateway", ErrNoValidDestination,
			"no valid routing destination for workload: Workload{remote with uid c//Pod/ns/remote (HBONE)}: ns/example.com names no subject alt names to expect behind the network gateway",
			one(), remote(inRemote(gw("10.22.1.1", 15009))), member(obGateway, nil)),
		refuse("nobody to believe at a waypoint behind a gateway, found by its address", ErrNoValidDestination, "", one(named("san"), via(inRemote(gw("10.22.1.9", 15008)))), local,
			member(but(obRemote, func(w *Workload) { w.NetworkGateway = inRemote(gw("10.22.1.1", 15009)) }), nil), member(obGateway, nil)),
	})
}

// spec/datapath.md §4.4.1.
func TestGatewayReference(t *testing.T) {
	wayService := func(ports ...Port) *Service {
		return &Service{Name: "way", Namespace: "ns", Hostname: "way.example", Ports: ports, VIPs: []NetworkAddress{{"", addr("127.0.0.7")}},
			SubjectAltNames: []string{"spiffe://cluster.local/ns/ns/sa/way-san"}}
	}
	inWay := func(w Workload, ports ...Port) WorkloadUpdate {
		return member(w, map[NamespacedHostname][]Port{host("ns", "way.example"): ports})
	}
	tunnel := func(w *Workload) { w.ApplicationTunnel = &ApplicationTunnel{Port: 15088} }
	six := func(s *Service) { s.VIPs = append(s.VIPs, NetworkAddress{"", addr("::3")}) }
	toWay := func(c routeCase) routeCase {
		c.rule, c.protocol, c.authority, c.service = "A2", HBONE, c.dst, "ns/example.com"
		if c.uid == "" {
			c.uid = obDualWay.UID
		}
		return c
	}
	runCases(t, []routeCase{
		toWay(routeCase{name: "by VIP", dst: "127.0.0.3:80", workloads: []WorkloadUpdate{inWay(obDualWay)}, nextHop: "127.0.0.11:15018", expected: []string{"way-san", "waypoint"},
			services: []*Service{example(via(gw("127.0.0.7", 15008))), wayService(Port{15008, 15018})}}),
		toWay(routeCase{name: "by hostname, v4", dst: "127.0.0.3:80", workloads: []WorkloadUpdate{inWay(obDualWay)}, nextHop: "127.0.0.11:15008",
			services: []*Service{example(six, via(byHost("way.example", 15008))), wayService(Port{15008, 15008})}}),
		toWay(routeCase{name: "by hostname, v6", dst: "[::3]:80", workloads: []WorkloadUpdate{inWay(obDualWay)}, nextHop: "[ff06::c5]:15008",
			services: []*Service{example(six, via(byHost("way.example", 15008))), wayService(Port{15008, 15008})}}),
		toWay(routeCase{name: "by VIP, v6 becomes v4", dst: "[::3]:80", workloads: []WorkloadUpdate{inWay(obDualWay)}, nextHop: "127.0.0.11:15008",
			services: []*Service{example(six, via(gw("127.0.0.7", 15008))), wayService(Port{15008, 15008})}}),
		toWay(routeCase{name: "by hostname of a workload", dst: "127.0.0.3:80", nextHop: "127.0.0.10:15009", uid: obWaypoint.UID,
			workloads: []WorkloadUpdate{member(but(obWaypoint, func(w *Workload) { w.Hostname = "host" }), nil)}, services: []*Service{example(via(byHost("host", 15009)))}}),
		toWay(routeCase{name: "undeclared port, application tunnel", dst: "127.0.0.3:80", workloads: []WorkloadUpdate{inWay(but(obDualWay, tunnel))}, nextHop: "127.0.0.11:15008",
			services: []*Service{example(via(byHost("way.example", 15008))), wayService(Port{80, 80})}}),
		toWay(routeCase{name: "undeclared port, only one has a tunnel", dst: "127.0.0.3:80", workloads: []WorkloadUpdate{inWay(obWaypoint), inWay(but(obDualWay, tunnel))},
			nextHop: "127.0.0.11:15008", services: []*Service{example(via(gw("127.0.0.7", 15008))), wayService()}}),
		toWay(routeCase{name: "a TCP workload is a waypoint, too", dst: "127.0.0.3:80", workloads: []WorkloadUpdate{member(but(obWaypoint, tcp), nil)}, nextHop: "127.0.0.10:15008",
			uid: obWaypoint.UID, services: []*Service{example(via(gw("127.0.0.10", 15008)))}}),
		toWay(routeCase{name: "host-network waypoint by hostname", dst: "127.0.0.3:80", nextHop: "127.0.0.10:15008", uid: obWaypoint.UID,
			workloads: []WorkloadUpdate{inWay(but(obWaypoint, func(w *Workload) { w.NetworkMode = HostNetwork }))},
			services:  []*Service{example(via(byHost("way.example", 15008))), wayService(Port{15008, 15008})}}),
	})
}

// References that lead in circles end at the first hop.
func TestWaypointCycles(t *testing.T) {
	way := gw("127.0.0.10", 15008)
	wayService := &Service{Name: "way", Namespace: "ns", Hostname: "way.example", Ports: []Port{{15008, 15008}},
		VIPs: []NetworkAddress{{"", addr("127.0.0.7")}}, Waypoint: byHost("way.example", 15008)}
	inWay := map[NamespacedHostname][]Port{host("ns", "way.example"): nil}
	farGateway := but(obGateway, func(w *Workload) { w.NetworkGateway = inRemote(gw("10.22.1.1", 15009)) })
	runCases(t, []routeCase{
		{name: "a workload is its own waypoint", workloads: []WorkloadUpdate{member(but(obWaypoint, waypointed(way)), nil)}, dst: "127.0.0.10:80",
			rule: "E", protocol: HBONE, authority: "127.0.0.10:80", nextHop: "127.0.0.10:15008", uid: obWaypoint.UID},
		{name: "two waypoints of each other", dst: "127.0.0.10:80",
			workloads: []WorkloadUpdate{member(but(obWaypoint, waypointed(gw("127.0.0.11", 15008))), nil), member(but(obDualWay, waypointed(way)), nil)},
			rule:      "E", protocol: HBONE, authority: "127.0.0.10:80", nextHop: "127.0.0.11:15008", uid: obDualWay.UID},
		{name: "the service of a waypoint has itself as waypoint", workloads: []WorkloadUpdate{member(but(obWaypoint, waypointed(way)), inWay), inExample(obLocal)},
			services: []*Service{example(via(gw("127.0.0.7", 15008))), wayService}, dst: "127.0.0.3:80",
			rule: "A2", protocol: HBONE, authority: "127.0.0.3:80", nextHop: "127.0.0.10:15008", uid: obWaypoint.UID},
		{name: "to that service itself", workloads: []WorkloadUpdate{member(but(obWaypoint, waypointed(way)), inWay)}, services: []*Service{wayService}, dst: "127.0.0.7:15008",
			rule: "A2", protocol: HBONE, authority: "127.0.0.7:15008", nextHop: "127.0.0.10:15008", uid: obWaypoint.UID, service: "ns/way.example"},
		{name: "a gateway behind itself", workloads: []WorkloadUpdate{inExample(but(obRemote, behind(inRemote(gw("10.22.1.1", 15009))))), member(farGateway, nil)},
			services: []*Service{example(named("san"))}, dst: "127.0.0.3:80",
			rule: "D", protocol: DoubleHBONE, authority: "example.com:80", nextHop: "10.22.1.1:15009", uid: obRemote.UID, gateway: obGateway.UID},
		{name: "a gateway that is the endpoint", workloads: []WorkloadUpdate{inExample(farGateway)}, services: []*Service{example(named("san"))}, dst: "127.0.0.3:80",
			rule: "D", protocol: DoubleHBONE, authority: "example.com:80", nextHop: "10.22.1.1:15009", uid: obGateway.UID, gateway: obGateway.UID},
		{name: "a gateway without address behind a gateway", dst: "127.0.0.3:80", wantErr: ErrNoValidDestination,
			workloads: []WorkloadUpdate{inExample(but(obRemote, behind(byHost("way.example", 15008)))),
				member(but(farGateway, func(w *Workload) { w.IPs = nil }), inWay)},
			services: []*Service{example(named("san")), wayService}},
	})
}

// spec/datapath.md §4.4.2: by identity and address.
func TestCallerIsWaypoint(t *testing.T) {
	way := gw("127.0.0.10", 15008)
	wayService := &Service{Name: "way", Namespace: "ns", Hostname: "way.example", Ports: []Port{{15008, 15008}}, VIPs: []NetworkAddress{{"", addr("127.0.0.7")}}}
	inWay := map[NamespacedHostname][]Port{host("ns", "way.example"): nil}
	self := &Workload{Namespace: "ns", Identity: spiffe(t, "spiffe://cluster.local/ns/ns/sa/waypoint")}
	stranger := &Workload{Namespace: "ns", Identity: spiffe(t, "spiffe://cluster.local/ns/ns/sa/stranger")}
	for _, tt := range []struct {
		name   string
		via    *GatewayAddress
		from   *Workload
		fromIP string
		direct bool
	}{
		{"by address", way, self, "127.0.0.10", true},
		{"by mapped address", way, self, "::ffff:127.0.0.10", true},
		{"by VIP", gw("127.0.0.7", 15008), self, "127.0.0.10", true},
		{"by hostname", byHost("way.example", 15008), self, "127.0.0.10", true},
		{"by hostname of the workload", byHost("way.host", 15008), self, "127.0.0.10", true},
		{"another instance of it", byHost("way.example", 15008), self, "127.0.0.11", true},
		{"another instance, but not of what the reference names", way, self, "127.0.0.11", false},
		{"another identity", way, stranger, "127.0.0.10", false},
		{"another address", way, self, "127.0.0.1", false},
		{"no address", way, self, "", false},
	} {
		c := routeCase{
			name: tt.name, services: []*Service{wayService}, from: tt.from, fromIP: tt.fromIP, dst: "127.0.0.2:80",
			workloads: []WorkloadUpdate{
				member(but(obWaypoint, func(w *Workload) { w.Hostname = "way.host" }), inWay), member(obDualWay, inWay),
				member(but(obLocal, waypointed(tt.via)), nil),
			},
			rule: "E", protocol: HBONE, authority: "127.0.0.2:80", nextHop: "127.0.0.10:15008", uid: obWaypoint.UID,
		}
		if tt.direct {
			c.rule, c.nextHop, c.uid = "F", "127.0.0.2:15008", obLocal.UID
		}
		t.Run(tt.name, func(t *testing.T) {
			if tt.fromIP != "" {
				c.run(t)
				return
			}
			s := c.store(t)
			q := c.query(s)
			q.SourceIP = netip.Addr{}
			if r, err := s.Route(q); err != nil || r.Rule != "E" {
				t.Errorf("got %+v, %v", r, err)
			}
		})
	}
	// The waypoint of the service, which is what the client has dialled, is never gone around.
	runCases(t, []routeCase{{
		name: "service waypoint", services: []*Service{example(via(way))}, from: self, fromIP: "127.0.0.10", dst: "127.0.0.3:80",
		workloads: []WorkloadUpdate{member(obWaypoint, nil), inExample(but(obLocal, waypointed(way)))},
		rule:      "A2", protocol: HBONE, authority: "127.0.0.3:80", nextHop: "127.0.0.10:15008", uid: obWaypoint.UID,
	}})
}

// A waypoint of another network with the identity and the address of the caller is
// not the caller.
func TestCallerIsNoWaypointOfAnotherNetwork(t *testing.T) {
	far := but(obWaypoint, func(w *Workload) { w.Network, w.Hostname = "remote", "way.host" })
	self := &Workload{Namespace: "ns", Identity: spiffe(t, "spiffe://cluster.local/ns/ns/sa/waypoint")}
	runCases(t, []routeCase{{
		name: "by hostname", from: self, fromIP: "127.0.0.10", dst: "127.0.0.2:80", wantErr: ErrNoValidDestination,
		workloads: []WorkloadUpdate{member(far, nil), member(but(obLocal, waypointed(byHost("way.host", 15008))), nil)},
	}})
}

// Decision D2: aliases are believed at waypoints, gateways and behind them.
func TestWaypointIdentities(t *testing.T) {
	s := New(Config{TrustDomainAliases: []string{"old"}})
	apply(t, s, Update{
		Workloads: []WorkloadUpdate{source(), member(obWaypoint, nil), member(obGateway, nil),
			member(but(obRemote, behind(inRemote(gw("10.22.1.1", 15009)))), map[NamespacedHostname][]Port{host("ns", "far.example"): nil})},
		Services: []*Service{
			example(named("san"), via(gw("127.0.0.10", 15008))),
			{Name: "far", Namespace: "ns", Hostname: "far.example", VIPs: []NetworkAddress{{"", addr("127.0.0.4")}}, Ports: []Port{{80, 80}},
				SubjectAltNames: []string{"spiffe://old/ns/ns/sa/far"}},
		},
	})
	src, _ := s.WorkloadByUID("c//Pod/ns/source-workload")
	// What the service that the client addressed may present, its waypoint may not.
	r, err := s.Route(Query{Source: src, Dst: addrPort("127.0.0.3:80")})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"spiffe://cluster.local/ns/ns/sa/waypoint", "spiffe://old/ns/ns/sa/waypoint"}, idTexts(r.ExpectedIDs)); diff != "" {
		t.Errorf("waypoint (-want +got):\n%s", diff)
	}
	if r, err = s.Route(Query{Source: src, Dst: addrPort("127.0.0.4:80")}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"spiffe://cluster.local/ns/ns/sa/gateway", "spiffe://old/ns/ns/sa/gateway"}, idTexts(r.ExpectedIDs)); diff != "" {
		t.Errorf("gateway (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"spiffe://old/ns/ns/sa/far", "spiffe://cluster.local/ns/ns/sa/far"}, idTexts(r.FinalIDs)); diff != "" {
		t.Errorf("behind the gateway (-want +got):\n%s", diff)
	}
	if r.Hop() != r.Gateway || r.Gateway.UID != obGateway.UID {
		t.Errorf("hop %v, gateway %v", r.Hop(), r.Gateway)
	}
}

// D8: another endpoint of a waypoint or of a gateway takes the place of the one
// that has failed; there is no way around the last one.
func TestD8_AvoidWaypoint(t *testing.T) {
	inWay := map[NamespacedHostname][]Port{host("ns", "way.example"): nil}
	wayService := &Service{Name: "way", Namespace: "ns", Hostname: "way.example", Ports: []Port{{15008, 15008}}, VIPs: []NetworkAddress{{"", addr("127.0.0.7")}}}
	two := []WorkloadUpdate{member(obWaypoint, inWay), member(obDualWay, inWay), inExample(obLocal)}
	both := []string{obDualWay.UID, obWaypoint.UID}
	byName := []*Service{example(via(byHost("way.example", 15008))), wayService}
	far := []WorkloadUpdate{inExample(but(obRemote, behind(byHost("way.example", 15008)))), member(obWaypoint, inWay), member(obDualWay, inWay)}
	runCases(t, []routeCase{
		{name: "waypoint", workloads: two, services: byName, avoid: both[:1], dst: "127.0.0.3:80",
			rule: "A2", protocol: HBONE, authority: "127.0.0.3:80", nextHop: "127.0.0.10:15008", uid: obWaypoint.UID},
		{name: "all waypoints", workloads: two, services: byName, avoid: both, dst: "127.0.0.3:80", wantErr: ErrUnknownWaypoint},
		{name: "the only waypoint, by address", workloads: two, services: []*Service{example(via(gw("127.0.0.10", 15008)))}, avoid: both[1:], dst: "127.0.0.3:80", wantErr: ErrNoHealthyUpstream},
		{name: "the only waypoint, by hostname", avoid: []string{"way"}, dst: "127.0.0.3:80", wantErr: ErrUnknownWaypoint,
			workloads: []WorkloadUpdate{member(Workload{UID: "way", Hostname: "way.host", IPs: ips("127.0.0.10")}, nil)}, services: []*Service{example(via(byHost("way.host", 15008)))}},
		{name: "gateway", workloads: far, services: []*Service{example(named("san")), wayService}, avoid: both[:1], dst: "127.0.0.3:80",
			rule: "D", protocol: DoubleHBONE, authority: "example.com:80", nextHop: "127.0.0.10:15008", uid: obRemote.UID, gateway: obWaypoint.UID},
		{name: "the only waypoint of a pod on the address of a passthrough service", dst: "127.0.0.2:80", avoid: []string{obLocal.UID}, wantErr: ErrNoHealthyUpstream,
			workloads: []WorkloadUpdate{member(but(obLocal, waypointed(gw("127.0.0.10", 15008))), nil)}, services: []*Service{example(vips("127.0.0.2"), mode(LoadBalancePassthrough))}},
		{name: "endpoint behind the gateway", workloads: far, services: []*Service{example(named("san")), wayService}, avoid: []string{obRemote.UID}, dst: "127.0.0.3:80", wantErr: ErrNoHealthyUpstream},
	})
}

// D8 with a weighted set: the second try draws among the members that have
// another endpoint, and fails only when none has.
func TestD8_AvoidWeightedWaypoint(t *testing.T) {
	weighted := example(func(svc *Service) {
		svc.WeightedWaypoints = []WeightedWaypoint{
			{Destination: *gw("127.0.0.10", 15008), Weight: 99},
			{Destination: *gw("127.0.0.11", 15008), Weight: 1},
		}
	})
	s := New(Config{})
	apply(t, s, Update{
		Workloads: []WorkloadUpdate{member(obWaypoint, nil), member(obDualWay, nil), inExample(obLocal)},
		Services:  []*Service{weighted},
	})
	first := func(uint64) uint64 { return 0 }
	for _, tt := range []struct {
		avoid []string
		want  string
	}{
		{nil, obWaypoint.UID},
		{[]string{obWaypoint.UID}, obDualWay.UID},
		{[]string{obDualWay.UID}, obWaypoint.UID},
		{[]string{obWaypoint.UID, obDualWay.UID}, ""},
	} {
		r, err := s.Route(Query{Source: &Workload{Namespace: "ns"}, Dst: addrPort("127.0.0.3:80"), Avoid: tt.avoid, Draw: first})
		switch {
		case tt.want == "" && !errors.Is(err, ErrNoHealthyUpstream):
			t.Errorf("avoiding %v: got %v, %v, want no healthy upstream", tt.avoid, r.Workload, err)
		case tt.want != "" && (err != nil || r.Workload.UID != tt.want):
			t.Errorf("avoiding %v: got %v, %v, want %s", tt.avoid, r.Workload, err, tt.want)
		}
	}
}
