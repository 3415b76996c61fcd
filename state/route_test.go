package state

import (
	"encoding/json"
	"errors"
	"net/netip"
	"reflect"
	"strings"
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

// routeCase is one question and its answer: a route, or with wantErr a refusal.
type routeCase struct {
	name      string
	config    Config
	workloads []WorkloadUpdate // beside source
	services  []*Service
	from      *Workload // instead of source
	fromIP    string    // instead of 127.0.0.1
	dst       string
	avoid     []string
	asked     []string
	draw      []uint64 // in order, then 0

	rule      string
	protocol  Protocol
	authority string
	nextHop   string
	resolve   string
	uid       string
	gateway   string
	service   string   // namespace/hostname; not checked if empty
	expected  []string // names of service accounts; not checked if empty
	final     []string
	wantErr   error
	text      string
}

func (c *routeCase) store(t *testing.T) *Store {
	t.Helper()
	s := New(c.config)
	apply(t, s, Update{Workloads: append([]WorkloadUpdate{source()}, c.workloads...), Services: c.services})
	s.consistent(t)
	return s
}

// query is a new one for each use, because of its draws.
func (c *routeCase) query(s *Store) Query {
	q := Query{Source: c.from, SourceIP: addr("127.0.0.1"), Dst: addrPort(c.dst), Avoid: c.avoid, Asked: c.asked}
	if q.Source == nil {
		q.Source, _ = s.WorkloadByUID("c//Pod/ns/source-workload")
	}
	if c.fromIP != "" {
		q.SourceIP = addr(c.fromIP)
	}
	draws := c.draw
	q.Draw = func(n uint64) uint64 {
		if len(draws) == 0 {
			return 0
		}
		d := draws[0]
		draws = draws[1:]
		return d % n
	}
	return q
}

// run checks Route, and that Explain agrees with it.
func (c *routeCase) run(t *testing.T) {
	s := c.store(t)
	r, err := s.Route(c.query(s))
	agrees(t, s.Explain(c.query(s)), r, err)
	if c.wantErr != nil {
		if !errors.Is(err, c.wantErr) || c.text != "" && err.Error() != c.text {
			t.Fatalf("got %+v, %v\nwant %v %s", r, err, c.wantErr, c.text)
		}
		if !reflect.DeepEqual(r, Route{}) {
			t.Errorf("a refusal with a route: %+v", r)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	hop := r.NextHop.String()
	if !r.NextHop.Addr().IsValid() {
		hop = nextHopOf("?", r.NextHop)
	}
	if done := r.Resolved(addr("10.0.0.9")); c.resolve != "" && (!done.NextHop.IsValid() || done.Protocol != TCP && done.Authority.String() == "") {
		t.Errorf("resolved: %+v", done)
	}
	got := []string{r.Rule, r.Protocol.String(), r.Authority.String(), hop, r.Resolve, uid(r.Workload), uid(r.Gateway)}
	want := []string{c.rule, c.protocol.String(), c.authority, c.nextHop, c.resolve, c.uid, c.gateway}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("rule, protocol, authority, next hop, resolve, workload, gateway (-want +got):\n%s", diff)
	}
	if c.service != "" && r.Service.key() != c.service {
		t.Errorf("service %q, want %q", r.Service.key(), c.service)
	}
	if (r.Protocol != TCP) != (len(r.ExpectedIDs) > 0) || (r.Protocol == DoubleHBONE) != (len(r.FinalIDs) > 0) {
		t.Errorf("expected %v and %v of protocol %s", r.ExpectedIDs, r.FinalIDs, r.Protocol)
	}
	accounts := func(ids []string) (names []string) {
		for _, id := range ids {
			names = append(names, id[strings.LastIndex(id, "/")+1:])
		}
		return names
	}
	if diff := cmp.Diff(c.expected, accounts(idTexts(r.ExpectedIDs))); len(c.expected) > 0 && diff != "" {
		t.Errorf("expected identities (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(c.final, accounts(idTexts(r.FinalIDs))); len(c.final) > 0 && diff != "" {
		t.Errorf("final identities (-want +got):\n%s", diff)
	}
}

// agrees checks that an explanation is of that answer, and can be shown.
func agrees(t *testing.T, e Explanation, r Route, err error) {
	t.Helper()
	if !reflect.DeepEqual(e.Route, r) || !reflect.DeepEqual(e.Err, err) {
		t.Errorf("Explain: %+v, %v\nRoute: %+v, %v", e.Route, e.Err, r, err)
	}
	if len(e.Steps) == 0 {
		t.Error("an explanation without steps")
	}
	if err == nil && !strings.HasPrefix(e.Steps[len(e.Steps)-1].Subject, "rule "+r.Rule) {
		t.Errorf("the last step is %+v, want rule %s", e.Steps[len(e.Steps)-1], r.Rule)
	}
	if _, jsonErr := json.Marshal(e); jsonErr != nil {
		t.Error(jsonErr)
	}
}

func runCases(t *testing.T, cases []routeCase) {
	for _, c := range cases {
		t.Run(c.name, c.run)
	}
}

func named(sans ...string) func(*Service) {
	return func(s *Service) {
		for _, name := range sans {
			s.SubjectAltNames = append(s.SubjectAltNames, "spiffe://cluster.local/ns/ns/sa/"+name)
		}
	}
}

func via(g *GatewayAddress) func(*Service) { return func(s *Service) { s.Waypoint = g } }

func byHost(hostname string, port uint16) *GatewayAddress {
	return &GatewayAddress{Hostname: host("ns", hostname), Port: port}
}

// The workloads of the OB- rows.
var (
	obRemote = Workload{UID: "c//Pod/ns/remote", Name: "remote", ServiceAccount: "remote", Network: "remote", Protocol: HBONE, IPs: ips("10.22.1.9")}
	obLocal  = Workload{UID: "c//Pod/ns/local", Name: "local", ServiceAccount: "local", Protocol: HBONE, IPs: ips("127.0.0.2")}
	obDual   = Workload{UID: "c//Pod/ns/dual", Name: "dual", Protocol: HBONE, IPs: ips("127.0.0.2", "ff06::c3")}
	// The gateway stands in the network that it leads to, and is reachable from ours.
	obGateway  = Workload{UID: "c//Pod/ns/gateway", Name: "gateway", ServiceAccount: "gateway", Network: "remote", IPs: ips("10.22.1.1")}
	obWaypoint = Workload{UID: "c//Pod/ns/waypoint", Name: "waypoint", ServiceAccount: "waypoint", IPs: ips("127.0.0.10")}
	obDualWay  = Workload{UID: "c//Pod/ns/dual-waypoint", Name: "dual-waypoint", ServiceAccount: "waypoint", IPs: ips("127.0.0.11", "ff06::c5")}

	obWaypoints = []WorkloadUpdate{member(obWaypoint, nil), member(obDualWay, nil)}
)

func but(w Workload, mods ...func(*Workload)) Workload {
	for _, m := range mods {
		m(&w)
	}
	return w
}

func tcp(w *Workload)  { w.Protocol = TCP }
func sick(w *Workload) { w.Health = Unhealthy }
func far(w *Workload)  { w.Node = "remote-node" }

func behind(g *GatewayAddress) func(*Workload) {
	return func(w *Workload) { w.NetworkGateway, w.IPs = g, nil }
}

func waypointed(g *GatewayAddress) func(*Workload) { return func(w *Workload) { w.Waypoint = g } }

func inRemote(g *GatewayAddress) *GatewayAddress {
	g.Address.Network = "remote"
	return g
}

func join(lists ...[]WorkloadUpdate) (all []WorkloadUpdate) {
	for _, list := range lists {
		all = append(all, list...)
	}
	return all
}

// OB-01 … OB-19 of spec/datapath.md §16.3, OUT-01 … OUT-10 of spec/state-xds-dns.md §9.3.
func TestDP_OB_Route(t *testing.T) {
	hostPod := func(uid string) Workload {
		return Workload{UID: uid, NetworkMode: HostNetwork, IPs: ips("127.0.0.2")}
	}
	gateway := member(obGateway, nil)
	remote := inExample(but(obRemote, behind(inRemote(gw("10.22.1.1", 15009)))))
	failover := example(mode(LoadBalanceFailover, localNetwork...), named("san"))
	toLocal := func(c routeCase) routeCase {
		c.rule, c.protocol, c.nextHop, c.uid = "F", HBONE, "127.0.0.2:15008", obLocal.UID
		return c
	}
	gatewayService := &Service{
		Name: "gw", Namespace: "ns", Hostname: "gw.example", Ports: []Port{{15009, 15008}},
		VIPs: []NetworkAddress{{"", addr("127.0.0.4")}}, SubjectAltNames: []string{"spiffe://cluster.local/ns/ns/sa/gw-san"},
	}
	gatewayPod := member(Workload{UID: "c//Pod/ns/gw-pod", ServiceAccount: "gw", Network: "remote", IPs: ips("127.0.0.5")},
		map[NamespacedHostname][]Port{host("ns", "gw.example"): nil})
	runCases(t, []routeCase{
		{name: "OB-01, OUT-01 unknown", dst: "1.2.3.4:80", rule: "C", nextHop: "1.2.3.4:80"},
		{name: "OB-02, OUT-02 remote endpoint, no gateway", workloads: []WorkloadUpdate{inExample(obRemote)}, services: []*Service{example(named("san"))}, dst: "127.0.0.3:80",
			wantErr: ErrNoValidDestination, text: "no valid routing destination for workload: Workload{remote with uid c//Pod/ns/remote (HBONE)}"},
		{name: "OB-03a, OUT-03 gateway by address", workloads: []WorkloadUpdate{remote, gateway}, services: []*Service{example(named("san"))}, dst: "127.0.0.3:80",
			rule: "D", protocol: DoubleHBONE, authority: "example.com:80", nextHop: "10.22.1.1:15009", uid: obRemote.UID, gateway: obGateway.UID,
			service: "ns/example.com", expected: []string{"gateway"}, final: []string{"san"}},
		{name: "OB-03b, OUT-03 gateway by hostname", dst: "127.0.0.3:80",
			workloads: []WorkloadUpdate{inExample(but(obRemote, behind(byHost("gw.example", 15009)))), gatewayPod},
			services:  []*Service{example(named("san", "other")), gatewayService},
			rule:      "D", protocol: DoubleHBONE, authority: "example.com:80", nextHop: "127.0.0.5:15008", uid: obRemote.UID, gateway: "c//Pod/ns/gw-pod",
			expected: []string{"gw-san", "gw"}, final: []string{"san", "other"}},
		{name: "OB-03c, OUT-03 waypoint in the remote network", dst: "127.0.0.3:80",
			workloads: []WorkloadUpdate{inExample(obLocal), gateway,
				member(but(obWaypoint, behind(inRemote(gw("10.22.1.1", 15009))), func(w *Workload) { w.Network = "remote" }),
					map[NamespacedHostname][]Port{host("ns", "way.example"): nil})},
			services: []*Service{
				example(named("san"), via(byHost("way.example", 15008))),
				{Name: "way", Namespace: "ns", Hostname: "way.example", Ports: []Port{{15008, 15008}}, SubjectAltNames: []string{"spiffe://cluster.local/ns/ns/sa/way-san"}},
			},
			rule: "A1", protocol: DoubleHBONE, authority: "example.com:80", nextHop: "10.22.1.1:15009", uid: obWaypoint.UID, gateway: obGateway.UID,
			service: "ns/example.com", expected: []string{"gateway"}, final: []string{"way-san"}},
		toLocal(routeCase{name: "OB-04, OUT-04 failover, healthy local", workloads: []WorkloadUpdate{inExample(obLocal), remote, gateway}, services: []*Service{failover}, dst: "127.0.0.3:80",
			authority: "127.0.0.2:8080", expected: []string{"san", "local"}}),
		{name: "OB-04, OUT-04 failover, unhealthy local", workloads: []WorkloadUpdate{inExample(but(obLocal, sick)), remote, gateway}, services: []*Service{failover}, dst: "127.0.0.3:80",
			rule: "D", protocol: DoubleHBONE, authority: "example.com:80", nextHop: "10.22.1.1:15009", uid: obRemote.UID, gateway: obGateway.UID},
		{name: "OB-05 TCP workload", workloads: []WorkloadUpdate{member(but(obLocal, tcp, far), nil)}, dst: "127.0.0.2:80", rule: "G", nextHop: "127.0.0.2:80", uid: obLocal.UID},
		toLocal(routeCase{name: "OB-06 HBONE workload", workloads: []WorkloadUpdate{member(but(obLocal, far), nil)}, dst: "127.0.0.2:80", authority: "127.0.0.2:80", expected: []string{"local"}}),
		{name: "OB-07 TCP workload here", workloads: []WorkloadUpdate{member(but(obLocal, tcp), nil)}, dst: "127.0.0.2:80", rule: "G", nextHop: "127.0.0.2:80", uid: obLocal.UID},
		toLocal(routeCase{name: "OB-08 HBONE workload here", workloads: []WorkloadUpdate{member(obLocal, nil)}, dst: "127.0.0.2:80", authority: "127.0.0.2:80", expected: []string{"local"}}),
		{name: "OB-09 source has a waypoint", dst: "127.0.0.1:80", rule: "G", nextHop: "127.0.0.1:80", uid: "c//Pod/ns/source-workload",
			from: &Workload{Namespace: "ns", Waypoint: gw("127.0.0.10", 15008)}},
		{name: "OB-10 workload waypoint", workloads: join(obWaypoints, []WorkloadUpdate{member(but(obLocal, waypointed(gw("127.0.0.10", 15008))), nil)}), dst: "127.0.0.2:80",
			rule: "E", protocol: HBONE, authority: "127.0.0.2:80", nextHop: "127.0.0.10:15008", uid: obWaypoint.UID, expected: []string{"waypoint"}},
		{name: "OB-11 v6 with a v4 waypoint", dst: "[ff06::c3]:80",
			workloads: join(obWaypoints, []WorkloadUpdate{member(but(obDual, waypointed(gw("127.0.0.11", 15008))), nil)}),
			rule:      "E", protocol: HBONE, authority: "[ff06::c3]:80", nextHop: "127.0.0.11:15008", uid: obDualWay.UID},
		{name: "OB-12, OUT-05 service waypoint", workloads: join(obWaypoints, []WorkloadUpdate{inExample(obLocal)}), services: []*Service{example(via(gw("127.0.0.10", 15008)))}, dst: "127.0.0.3:80",
			rule: "A2", protocol: HBONE, authority: "127.0.0.3:80", nextHop: "127.0.0.10:15008", uid: obWaypoint.UID, service: "ns/example.com", expected: []string{"waypoint"}},
		{name: "OB-13, OUT-06 no endpoints", services: []*Service{example()}, dst: "127.0.0.3:80", wantErr: ErrNoHealthyUpstream, text: "no healthy upstream: 127.0.0.3:80"},
		{name: "OB-14, OUT-07 named port", workloads: []WorkloadUpdate{inExample(Workload{UID: "a", IPs: ips("127.0.0.9")}), inExample(Workload{UID: "b", IPs: ips("127.0.0.2")}, Port{80, 1234})},
			services: []*Service{example(func(s *Service) { s.Ports = []Port{{80, 0}} })}, dst: "127.0.0.3:80", rule: "G", nextHop: "127.0.0.2:1234", uid: "b"},
		{name: "OB-15, OUT-08 host network via service", workloads: []WorkloadUpdate{inExample(hostPod("pod1"), Port{80, 80}), member(hostPod("pod2"), nil)},
			services: []*Service{example()}, dst: "127.0.0.3:80", rule: "G", nextHop: "127.0.0.2:80", uid: "pod1"},
		{name: "OB-15, OUT-08 host network direct", workloads: []WorkloadUpdate{inExample(hostPod("pod1")), member(hostPod("pod2"), nil)},
			services: []*Service{example()}, dst: "127.0.0.2:80", rule: "C", nextHop: "127.0.0.2:80"},
		{name: "OB-16, OUT-09 dual stack, v4", workloads: []WorkloadUpdate{member(obDual, nil)}, dst: "127.0.0.2:80",
			rule: "F", protocol: HBONE, authority: "127.0.0.2:80", nextHop: "127.0.0.2:15008", uid: obDual.UID},
		{name: "OB-16, OUT-09 dual stack, v6", workloads: []WorkloadUpdate{member(obDual, nil)}, dst: "[ff06::c3]:80",
			rule: "F", protocol: HBONE, authority: "[ff06::c3]:80", nextHop: "[ff06::c3]:15008", uid: obDual.UID},
		{name: "OB-17, OUT-09 v6 only", workloads: []WorkloadUpdate{inExample(obDual)}, services: []*Service{example(families(IPv6Only))}, dst: "127.0.0.3:80",
			rule: "F", protocol: HBONE, authority: "[ff06::c3]:8080", nextHop: "[ff06::c3]:15008", uid: obDual.UID},
		{name: "OB-17, OUT-09 v4 only", workloads: []WorkloadUpdate{inExample(obDual)}, services: []*Service{example(families(IPv4Only), vips("::3"))}, dst: "[::3]:80",
			rule: "F", protocol: HBONE, authority: "127.0.0.2:8080", nextHop: "127.0.0.2:15008", uid: obDual.UID},
		{name: "OB-17, OUT-09 dual, v4", workloads: []WorkloadUpdate{inExample(obDual)}, services: []*Service{example(families(DualFamily))}, dst: "127.0.0.3:80",
			rule: "F", protocol: HBONE, authority: "127.0.0.2:8080", nextHop: "127.0.0.2:15008", uid: obDual.UID},
		{name: "OB-17, OUT-09 dual, v6", workloads: []WorkloadUpdate{inExample(obDual)}, services: []*Service{example(families(DualFamily), vips("::3"))}, dst: "[::3]:80",
			rule: "F", protocol: HBONE, authority: "[ff06::c3]:8080", nextHop: "[ff06::c3]:15008", uid: obDual.UID},
		{name: "OB-18, OUT-10 passthrough", workloads: []WorkloadUpdate{inExample(obLocal)}, services: []*Service{example(mode(LoadBalancePassthrough), vips("1.2.3.4"))}, dst: "1.2.3.4:80",
			rule: "C", nextHop: "1.2.3.4:80"},
		{name: "OB-19, OUT-05 passthrough with waypoint", workloads: obWaypoints, dst: "1.2.3.4:80",
			services: []*Service{example(mode(LoadBalancePassthrough), vips("1.2.3.4"), via(gw("127.0.0.10", 15008)))},
			rule:     "A2", protocol: HBONE, authority: "1.2.3.4:80", nextHop: "127.0.0.10:15008", uid: obWaypoint.UID, service: "ns/example.com"},
	})
}
