package state

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"testing"
	"time"
)

const (
	benchCIDRs     = 10_000
	benchWaypoints = 10
	benchBehind    = 10_000  // services behind waypoints
	benchDraws     = 1 << 14 // addresses that a benchmark asks for, more than caches hold
	routeMaxRatio  = 10
)

// routeWorld is the large cluster with ranges and waypoints, and a source in it.
func routeWorld(b *testing.B) (*Store, Query) {
	b.Helper()
	s := New(Config{Network: "network-1"})
	apply(b, s, scaleUpdate(0))
	apply(b, s, Update{Services: append(cidrServices(benchCIDRs), waypointServices()...)})
	runtime.GC()
	return s, Query{Source: &Workload{UID: "source", Namespace: scaleNamespace(0), Network: "network-1"}}
}

// cidrServices have a range of 256 addresses each, and one endpoint.
func cidrServices(n int) []*Service {
	var list []*Service
	for i := range n {
		ns := scaleNamespace(i)
		list = append(list, &Service{
			Name: "range", Namespace: ns, Hostname: fmt.Sprintf("range-%d.%s", i, ns), Ports: []Port{{80, 8080}},
			CIDRVIPs:  []CIDRAddress{{"network-1", netip.PrefixFrom(cidrIP(i, 0), 24)}},
			Endpoints: []Endpoint{{WorkloadUID: padded("Kubernetes//Pod/%06d/%d-", i, 0)}},
		})
	}
	return list
}

// waypointServices are waypoints of ten endpoints each, and services behind them:
// half of these name their waypoint by hostname, the others by address.
func waypointServices() []*Service {
	var list []*Service
	for i := range benchWaypoints {
		wp := &Service{
			Name: "waypoint", Namespace: scaleNamespace(i), Hostname: fmt.Sprintf("waypoint-%d", i), Ports: []Port{{15008, 15008}},
			VIPs: []NetworkAddress{{"network-1", waypointIP(i, 255)}},
		}
		for k := range scaleEndpoints {
			wp.Endpoints = append(wp.Endpoints, Endpoint{WorkloadUID: padded("Kubernetes//Pod/%06d/%d-", i*scaleEndpoints+k, 0)})
		}
		list = append(list, wp)
	}
	for i := range benchBehind {
		wp := list[i%benchWaypoints]
		g := &GatewayAddress{Address: wp.VIPs[0], Port: 15008}
		if i%2 == 0 {
			g = &GatewayAddress{Hostname: wp.Key(), Port: 15008}
		}
		list = append(list, &Service{
			Name: "behind", Namespace: scaleNamespace(i), Hostname: fmt.Sprintf("behind-%d", i), Ports: []Port{{80, 8080}},
			VIPs: []NetworkAddress{{"network-1", waypointIP(i, 0)}}, Waypoint: g,
		})
	}
	return list
}

func waypointIP(i int, low byte) netip.Addr {
	return netip.AddrFrom4([4]byte{13, byte(i >> 8), byte(i), low})
}

func cidrIP(i int, low byte) netip.Addr {
	return netip.AddrFrom4([4]byte{byte(100 + i>>16), byte(i >> 8), byte(i), low})
}

// routeReference is a map of as many addresses as the world has. What a lookup
// costs depends on where the addresses lie in memory, so all draws are asked for in
// turns.
func routeReference() map[netip.Addr]int {
	m := make(map[netip.Addr]int)
	for i := range scaleWorkloads {
		m[scaleWorkloadIP(i)] = i
	}
	for i := range scaleServices {
		m[scaleVIP(i)] = i
	}
	return m
}

// compareRoutes holds Route to ten lookups in a map of the same size, asked for the
// same addresses in the same run, and to no allocation.
func compareRoutes(b *testing.B, s *Store, q Query, rule string, draw func(r *rand.Rand) netip.Addr) {
	b.Helper()
	reference := routeReference()
	r := rand.New(rand.NewPCG(1, 2))
	addrs := make([]netip.Addr, benchDraws)
	for i := range addrs {
		addrs[i] = draw(r)
	}
	q.Dst = netip.AddrPortFrom(addrs[0], 80)
	if route, err := s.Route(q); err != nil || route.Rule != rule {
		b.Fatalf("rule %q, %v; want rule %s", route.Rule, err, rule)
	}
	if n := testing.AllocsPerRun(100, func() { _, _ = s.Route(q) }); n != 0 {
		b.Errorf("%v allocations, want none", n)
	}
	const turn = 64
	var lookups, routes []time.Duration // of turns
	sum := 0
	for b.Loop() {
		part := addrs[len(routes)*turn%benchDraws:][:turn]
		start := time.Now()
		for _, a := range part {
			sum += reference[a]
		}
		middle := time.Now()
		for _, a := range part {
			q.Dst = netip.AddrPortFrom(a, 80)
			if _, err := s.Route(q); err != nil {
				b.Fatal(err)
			}
		}
		lookups, routes = append(lookups, middle.Sub(start)), append(routes, time.Since(middle))
	}
	runtime.KeepAlive(sum)
	// The median of the turns leaves out those in which something else ran.
	lookup, route := quantile(lookups, .5), quantile(routes, .5)
	ratio := float64(route) / float64(lookup)
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(route.Nanoseconds())/turn, "ns/route")
	b.ReportMetric(float64(lookup.Nanoseconds())/turn, "ns/lookup")
	b.ReportMetric(ratio, "lookups/route")
	if len(routes) > 100 && ratio > routeMaxRatio {
		b.Errorf("a route costs %.1f lookups, want at most %d", ratio, routeMaxRatio)
	}
}

func BenchmarkRouteScale(b *testing.B) {
	s, q := routeWorld(b)
	for _, bb := range []struct {
		name, rule string
		draw       func(r *rand.Rand) netip.Addr
	}{
		{"workload", "F", func(r *rand.Rand) netip.Addr { return scaleWorkloadIP(r.IntN(scaleWorkloads)) }},
		{"VIP", "F", func(r *rand.Rand) netip.Addr { return scaleVIP(r.IntN(scaleServices)) }},
		{"CIDR", "F", func(r *rand.Rand) netip.Addr { return cidrIP(r.IntN(benchCIDRs), byte(r.IntN(256))) }},
		{"waypoint", "A2", func(r *rand.Rand) netip.Addr { return waypointIP(r.IntN(benchBehind), 0) }},
		{"passthrough", "C", func(r *rand.Rand) netip.Addr {
			return netip.AddrFrom4([4]byte{12, byte(r.Uint32()), byte(r.Uint32()), byte(r.Uint32())})
		}},
	} {
		b.Run(bb.name, func(b *testing.B) { compareRoutes(b, s, q, bb.rule, bb.draw) })
	}
}

// BenchmarkCIDRGrowth compares the lookup among 10 ranges with that among 100 000,
// of addresses that lie in ranges of both.
func BenchmarkCIDRGrowth(b *testing.B) {
	few, many := New(Config{}), New(Config{})
	services := cidrServices(100_000)
	apply(b, few, Update{Services: services[:10]})
	apply(b, many, Update{Services: services})
	q := Query{Source: &Workload{Namespace: "elsewhere", Network: "network-1"}}
	var spent [2][]time.Duration
	for b.Loop() {
		for i, s := range []*Store{few, many} {
			t := s.read()
			start := time.Now()
			for k := range 256 {
				if t.serviceAt("network-1", cidrIP(k%10, byte(k)), q.Source.Namespace) == nil {
					b.Fatal("no service")
				}
			}
			spent[i] = append(spent[i], time.Since(start))
			s.release(t)
		}
	}
	before, after := quantile(spent[0], .5), quantile(spent[1], .5)
	ratio := float64(after) / float64(before)
	b.ReportMetric(float64(after.Nanoseconds())/256, "ns/lookup")
	b.ReportMetric(ratio, "many/few")
	if len(spent[0]) > 100 && ratio > 2 {
		b.Errorf("a lookup among 100 000 ranges takes %.1f times that among 10, want at most 2", ratio)
	}
}
