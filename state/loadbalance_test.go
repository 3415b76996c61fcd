package state

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

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
		{"strict, network only", LoadBalanceStrict, at("network", "none", "none"), nil},
		{"strict, all but the network", LoadBalanceStrict, at("none", "reg", "zone"), nil},
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
			q := Query{Source: &tt.src, Draw: func(n uint64) uint64 { return i % n }}
			if w, _ := s.pick(exampleKey, &q, 80, standardMode); w != nil && !slices.Contains(got, w.UID) {
				got = append(got, w.UID)
			}
		}
		slices.Sort(got)
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
}

// Without an address, an endpoint can be reached through the gateway of another
// network only.
func TestEndpointWithoutAddress(t *testing.T) {
	behind := behind(gw("127.0.0.10", 15009))
	key := host("ns", "example.com")
	for _, tt := range []struct {
		name string
		w    Workload
		want bool
	}{
		{"in our network, without gateway", but(obLocal, func(w *Workload) { w.IPs = nil }), false},
		{"in our network, with a gateway", but(obLocal, behind), false},
		{"in another network, without gateway", but(obRemote, func(w *Workload) { w.IPs = nil }), false},
		{"in another network, with a gateway", but(obRemote, behind), true},
		{"in our network, with a hostname", but(obLocal, func(w *Workload) { w.IPs, w.Hostname = nil, "db.example" }), true},
	} {
		s := New(Config{})
		apply(t, s, Update{Workloads: []WorkloadUpdate{inExample(tt.w)}, Services: []*Service{example()}})
		if w, _ := s.pick(key, &Query{Source: &Workload{}}, 80, standardMode); (w != nil) != tt.want {
			t.Errorf("%s: %+v", tt.name, w)
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

// The best endpoints of many are found wherever they stand.
func TestPickAmongMany(t *testing.T) {
	s := New(Config{})
	u := Update{Services: []*Service{example(mode(LoadBalanceFailover, ScopeRegion))}}
	best := map[string]bool{"w05": true, "w50": true, "w99": true}
	for i := range 100 {
		uid := fmt.Sprintf("w%02d", i)
		w := Workload{UID: uid, IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})}, Locality: Locality{Region: "far"}}
		if best[uid] {
			w.Locality.Region = "near"
		}
		u.Workloads = append(u.Workloads, inExample(w))
	}
	apply(t, s, u)
	q := Query{Source: &Workload{Namespace: "ns", Locality: Locality{Region: "near"}}}
	got := map[string]int{}
	for n := range uint64(3) {
		q.Draw = func(sum uint64) uint64 {
			if sum != 3 {
				t.Errorf("drawn from %d, want 3", sum)
			}
			return n
		}
		w, _ := s.pick(exampleKey, &q, 80, standardMode)
		got[w.UID]++
	}
	if diff := cmp.Diff(map[string]int{"w05": 1, "w50": 1, "w99": 1}, got); diff != "" {
		t.Error(diff)
	}
}

// S-06 and ST-06.
func TestDP_S06_PortMappings(t *testing.T) {
	tests := []struct {
		name     string
		service  []Port
		endpoint []Port
		tunnel   *ApplicationTunnel
		mode     portMode
		want     uint16 // 0: no endpoint
	}{
		{"endpoint", []Port{{80, 0}}, []Port{{80, 9090}}, nil, standardMode, 9090},
		{"endpoint over service", []Port{{80, 8080}}, []Port{{80, 9090}}, nil, standardMode, 9090},
		{"service", []Port{{80, 8080}}, nil, nil, standardMode, 8080},
		{"named port without the endpoint's", []Port{{80, 0}}, nil, nil, standardMode, 0},
		{"mapped to nothing", []Port{{80, 8080}}, []Port{{80, 0}}, nil, standardMode, 0},
		{"undeclared", nil, []Port{{80, 9090}}, nil, standardMode, 0},
		{"tunnel is no help to a service", []Port{{80, 0}}, nil, &ApplicationTunnel{Port: 15088}, standardMode, 0},
		{"waypoint with a tunnel, named port", []Port{{80, 0}}, nil, &ApplicationTunnel{Port: 15088}, waypointMode, 80},
		{"waypoint with a tunnel, undeclared port", nil, nil, &ApplicationTunnel{Port: 15088}, waypointMode, 80},
		{"waypoint with a tunnel, endpoint's port", nil, []Port{{80, 9090}}, &ApplicationTunnel{Port: 15088}, waypointMode, 9090},
		{"waypoint with a tunnel, service's port", []Port{{80, 8080}}, nil, &ApplicationTunnel{Port: 15088}, waypointMode, 8080},
		{"waypoint with a tunnel that has no port", nil, nil, &ApplicationTunnel{Proxy: true}, waypointMode, 0},
		{"waypoint without a tunnel, undeclared port", nil, []Port{{80, 9090}}, nil, waypointMode, 0},
		{"waypoint without a tunnel", []Port{{80, 8080}}, nil, nil, waypointMode, 8080},
	}
	for _, tt := range tests {
		s := New(Config{})
		apply(t, s, Update{
			Workloads: []WorkloadUpdate{inExample(Workload{UID: "w", IPs: ips("10.0.0.1"), ApplicationTunnel: tt.tunnel}, tt.endpoint...)},
			Services:  []*Service{example(func(s *Service) { s.Ports = tt.service })},
		})
		w, port := s.pick(exampleKey, &Query{Source: &Workload{}}, 80, tt.mode)
		if port != tt.want || (w != nil) != (tt.want != 0) {
			t.Errorf("%s: got port %d of %v, want %d", tt.name, port, w, tt.want)
		}
	}
}
