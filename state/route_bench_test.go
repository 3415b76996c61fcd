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
	benchCIDRs    = 1000
	benchDraws    = 1 << 14 // addresses that a benchmark asks for, more than caches hold
	routeMaxRatio = 10
)

// routeWorld is the large cluster with ranges, and a source in it.
func routeWorld(b *testing.B) (*Store, Query) {
	b.Helper()
	s := New(Config{Network: "network-1"})
	apply(b, s, scaleUpdate(0))
	apply(b, s, Update{Services: cidrServices(benchCIDRs)})
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
	var lookups, routes time.Duration
	sum, n := 0, 0
	for b.Loop() {
		const turn = 64
		part := addrs[n*turn%benchDraws:][:turn]
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
		lookups += middle.Sub(start)
		routes += time.Since(middle)
		n++
	}
	runtime.KeepAlive(sum)
	ratio := float64(routes) / float64(lookups)
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(routes.Nanoseconds())/float64(n*64), "ns/route")
	b.ReportMetric(float64(lookups.Nanoseconds())/float64(n*64), "ns/lookup")
	b.ReportMetric(ratio, "lookups/route")
	if n > 100 && ratio > routeMaxRatio {
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
	var spent [2]time.Duration
	n := 0
	for b.Loop() {
		for i, s := range []*Store{few, many} {
			t := s.read()
			start := time.Now()
			for k := range 256 {
				if t.serviceAt("network-1", cidrIP(k%10, byte(k)), q.Source.Namespace) == nil {
					b.Fatal("no service")
				}
			}
			spent[i] += time.Since(start)
			s.release(t)
		}
		n++
	}
	ratio := float64(spent[1]) / float64(spent[0])
	b.ReportMetric(float64(spent[1].Nanoseconds())/float64(n*256), "ns/lookup")
	b.ReportMetric(ratio, "many/few")
	if n > 100 && ratio > 2 {
		b.Errorf("a lookup among 100 000 ranges takes %.1f times that among 10, want at most 2", ratio)
	}
}
