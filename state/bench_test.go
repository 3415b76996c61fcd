package state

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func BenchmarkAuthorize(b *testing.B) {
	s := New(Config{DefaultTrustDomain: "td"})
	var u Update
	for i := range 10_000 {
		p := allowNamespace(fmt.Sprintf("p%05d", i), "ns", fmt.Sprintf("peer-%d", i))
		p.Rules = append(p.Rules, Rule{{{Principals: []StringMatch{{Prefix, fmt.Sprintf("td/ns/x-%d/", i)}}}}, {{DestinationPorts: []uint16{80}}}})
		u.Policies = append(u.Policies, p)
	}
	apply(b, s, u)
	c := Conn{Src: addrPort("10.0.0.1:1"), Dst: addrPort("10.0.0.2:80"), Destination: destination("ns")}
	for name, id := range map[string]string{"first": "spiffe://td/ns/peer-0/sa/x", "last": "spiffe://td/ns/peer-9999/sa/x", "none": "spiffe://td/ns/y/sa/x"} {
		c.Identity = spiffeid.RequireFromString(id)
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if s.Authorize(c).Events == nil {
					b.Fatal("no outcome")
				}
			}
		})
	}
}

func BenchmarkAuthorizeNoPolicies(b *testing.B) {
	s := New(Config{})
	c := Conn{Src: addrPort("10.0.0.1:1"), Dst: addrPort("10.0.0.2:80"), Destination: destination("ns"), Identity: spiffeid.RequireFromString("spiffe://td/ns/a/sa/b")}
	b.ReportAllocs()
	for b.Loop() {
		if s.Authorize(c).Denied != nil {
			b.Fatal("denied")
		}
	}
}

func BenchmarkRoute(b *testing.B) {
	s := New(Config{})
	var u Update
	for i := range 100 {
		ip := netip.AddrFrom4([4]byte{10, 0, 0, byte(i + 1)})
		u.Workloads = append(u.Workloads, inExample(Workload{UID: "w" + ip.String(), Protocol: HBONE, IPs: []netip.Addr{ip}}))
	}
	u.Services = []*Service{example(mode(LoadBalanceFailover, ScopeNetwork, ScopeRegion, ScopeZone))}
	u.Workloads = append(u.Workloads, member(Workload{UID: "tcp", IPs: ips("10.0.1.1")}, nil))
	apply(b, s, u)
	for name, dst := range map[string]string{"unknown": "1.2.3.4:80", "workload": "10.0.0.7:80", "tcp": "10.0.1.1:80", "service-100": "127.0.0.3:80"} {
		q := Query{Source: &Workload{Namespace: "ns"}, Dst: addrPort(dst)}
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := s.Route(q); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
