package state

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var updateGolden = flag.Bool("update", false, "write the golden files")

// golden compares the JSON of v with a file of testdata.
func golden(t *testing.T, name string, v any) {
	t.Helper()
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(v); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join("testdata", name+".golden")
	if *updateGolden {
		if err := os.WriteFile(path, buf.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), buf.String()); diff != "" {
		t.Errorf("%s (-want +got):\n%s", path, diff)
	}
}

// A decision with everything: claims that lose, endpoints that drop out, a
// weighted waypoint in another network, its gateway, and two sets of identities.
func TestExplainGolden(t *testing.T) {
	way := map[NamespacedHostname][]Port{host("ns", "way.example"): nil}
	shared := func(hostname, ns string, mods ...func(*Service)) *Service {
		s := &Service{Name: hostname, Namespace: ns, Hostname: hostname, VIPs: []NetworkAddress{{"", addr("127.0.0.3")}}, Ports: []Port{{80, 80}}}
		for _, m := range mods {
			m(s)
		}
		return s
	}
	c := routeCase{
		services: []*Service{
			example(named("san"), weights(WeightedWaypoint{*byHost("way.example", 15008), 2}, WeightedWaypoint{*gw("127.0.0.11", 15008), 1}, WeightedWaypoint{*gw("127.0.0.12", 15008), 0})),
			shared("elsewhere.example", "other"),
			shared("hidden.example", "other", private),
			shared("wide.example", "ns", func(s *Service) { s.VIPs = nil }, cidrs("127.0.0.0/24", "127.0.0.0/16")),
			{Name: "way", Namespace: "ns", Hostname: "way.example", Ports: []Port{{15008, 15008}}, SubjectAltNames: []string{"spiffe://cluster.local/ns/ns/sa/way-san"},
				LoadBalancer: &LoadBalancer{Mode: LoadBalanceFailover, Preferences: []Scope{ScopeRegion}}},
		},
		workloads: []WorkloadUpdate{
			member(but(obWaypoint, behind(inRemote(gw("10.22.1.1", 15009))), func(w *Workload) { w.Network = "remote" }), way),
			member(Workload{UID: "way-2", IPs: ips("127.0.0.21"), Locality: Locality{Region: "far"}}, way),
			member(Workload{UID: "way-3"}, way),
			member(obGateway, nil),
		},
		dst: "127.0.0.3:80",
	}
	s := c.store(t)
	golden(t, "explain_remote_waypoint", s.Explain(c.query(s)))
}

func TestExplainInboundGolden(t *testing.T) {
	c := inboundCase{
		serviceVia: gw("10.0.0.4", 15008), weighted: []WeightedWaypoint{{*gw(inWaypointVIP, 15008), 1}},
	}
	s := c.store(t)
	local, _ := s.WorkloadByUID("waypoint")
	golden(t, "explain_inbound_sandwich", s.ExplainInbound(InboundQuery{Local: local, ConnDst: addrPort(inWaypoint + ":15008"), Addr: addrPort(inVIP + ":80")}))
}

// Every reason for which a claim on an address or an endpoint loses is told.
func TestExplainReasons(t *testing.T) {
	said := func(e Explanation, want ...string) {
		t.Helper()
		var all strings.Builder
		for _, step := range e.Steps {
			all.WriteString(step.Subject + ": " + step.Found + "\n")
			for _, c := range step.Candidates {
				if c.Chosen == (c.Why != "") {
					t.Errorf("%s of step %q: chosen %t, why %q", c.Name, step.Subject, c.Chosen, c.Why)
				}
				all.WriteString(c.Name + ": " + c.Why + "\n")
			}
		}
		for _, text := range want {
			if !strings.Contains(all.String(), text) {
				t.Errorf("nothing says %q:\n%s", text, all.String())
			}
		}
	}
	endpoint := func(uid string, w Workload, ports ...Port) WorkloadUpdate {
		w.UID = uid
		return inExample(w, ports...)
	}
	noCapacity := endpoint("no-capacity", Workload{IPs: ips("10.0.0.6")})
	noCapacity.Workload.Capacity = 0
	in := func(region string) Locality { return Locality{Region: region} }
	c := routeCase{
		services: []*Service{example(mode(LoadBalanceFailover, ScopeRegion), func(s *Service) { s.Endpoints = []Endpoint{{WorkloadUID: "unknown"}} })},
		workloads: []WorkloadUpdate{
			endpoint("a", Workload{IPs: ips("10.0.0.1")}), endpoint("b", Workload{IPs: ips("10.0.0.2")}), endpoint("failed", Workload{IPs: ips("10.0.0.3")}),
			endpoint("no-address", Workload{}), endpoint("no-port", Workload{IPs: ips("10.0.0.4")}, Port{80, 0}), endpoint("far", Workload{IPs: ips("10.0.0.5"), Locality: in("far")}),
			noCapacity,
		},
		dst: "127.0.0.3:80", avoid: []string{"failed"},
	}
	s := c.store(t)
	e := s.Explain(c.query(s))
	said(e, "unknown: the workload is not known", "failed: it has just failed", "no-address: it has no address", "no-port: it has no target for port 80",
		"far: others match more preferences", "no-capacity: its capacity is 0", "b: another one was drawn", "a: \n")
	c.dst = "127.0.0.3:81"
	said(s.Explain(c.query(s)), "none of the 8 of service ns/example.com for port 81")

	c = routeCase{services: []*Service{example(mode(LoadBalanceStrict, ScopeRegion))}, workloads: []WorkloadUpdate{endpoint("far", Workload{IPs: ips("10.0.0.5"), Locality: in("far")})}, dst: "127.0.0.3:80"}
	s = c.store(t)
	said(s.Explain(c.query(s)), "far: it does not match all preferences of the service", "rule B: ")

	pod, twin, vm := but(obLocal, tcp), obLocal, Workload{UID: "vm", IPs: ips("127.0.0.2")}
	pod.UID, twin.UID = "c//Pod/ns/pod", "c//Pod/ns/twin"
	canonical := example(vips("127.0.0.3"), func(s *Service) { s.Hostname, s.Canonical, s.Namespace = "canonical.example", true, "third" })
	near := example(func(s *Service) { s.VIPs = []NetworkAddress{{"", addr("127.0.0.2")}} })
	c = routeCase{
		services: []*Service{near, canonical, example(func(s *Service) { s.Namespace = "fourth" }),
			example(private, func(s *Service) { s.Namespace = "fifth" }), example(cidrs("127.0.0.0/24"), func(s *Service) { s.VIPs, s.Namespace = nil, "range" }),
			example(cidrs("127.0.0.0/8"), func(s *Service) { s.VIPs, s.Namespace = nil, "wide" })},
		workloads: []WorkloadUpdate{member(twin, nil), member(obLocal, nil), member(pod, nil), member(vm, nil)}, dst: "127.0.0.2:80",
	}
	s = c.store(t)
	said(s.Explain(c.query(s)), "c//Pod/ns/pod: pods go first, then workloads that speak HBONE", "vm: pods go first", "c//Pod/ns/twin: another one came later",
		"service ns/example.com: a workload has the address", "(127.0.0.0/24): another one has the address itself")
	c.dst = "127.0.0.3:80"
	said(s.Explain(c.query(s)), "service third/canonical.example: \n", "service fourth/example.com: another one is canonical", "service fifth/example.com: not visible from namespace \"ns\"")
	c.dst = "127.0.0.9:80"
	said(s.Explain(c.query(s)), "(127.0.0.0/24): \n", "(127.0.0.0/8): another one has a longer prefix")
	apply(t, s, Update{Stale: []string{"third/canonical.example"}})
	c.dst = "127.0.0.3:80"
	said(s.Explain(c.query(s)), "service third/canonical.example: it is stale")
}

// Telling costs nothing to who does not ask.
func TestRouteDoesNotAllocate(t *testing.T) {
	c := routeCase{
		workloads: join(obWaypoints, []WorkloadUpdate{inExample(obLocal), inExample(but(obDual, func(w *Workload) { w.Waypoint = gw("127.0.0.10", 15008); w.IPs = ips("127.0.0.20") }))}),
		services: []*Service{
			example(cidrs("10.9.0.0/16"), mode(LoadBalanceFailover, ScopeNetwork, ScopeRegion)),
			example(vips("127.0.0.4"), func(s *Service) { s.Hostname = "via.example" }, weights(WeightedWaypoint{*gw("127.0.0.10", 15008), 1})),
			example(vips("127.0.0.5"), func(s *Service) { s.Hostname = "past.example" }, mode(LoadBalancePassthrough)),
		},
		dst: "127.0.0.3:80",
	}
	s := c.store(t)
	q := c.query(s)
	q.Draw = nil
	for dst, rule := range map[string]string{
		"127.0.0.2:80": "F", "127.0.0.3:80": "F", "10.9.1.1:80": "F", "127.0.0.4:80": "A2", "127.0.0.5:80": "C", "1.2.3.4:80": "C", "127.0.0.20:80": "E",
	} {
		q.Dst = addrPort(dst)
		n := testing.AllocsPerRun(100, func() {
			if r, err := s.Route(q); err != nil || r.Rule != rule {
				t.Fatalf("%s: %+v, %v", dst, r, err)
			}
		})
		if n != 0 {
			t.Errorf("%s: %v allocations", dst, n)
		}
	}
}
