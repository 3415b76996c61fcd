//go:build e2e

package netns

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/ztunnel-go/ztunnel/e2e/cni/rules"
	"github.com/ztunnel-go/ztunnel/e2e/world"
)

// dnsWorld is a client captured with Istio's rules for DNS, services of several
// kinds, and a nameserver that knows what is outside of the mesh. What the client
// believes to be its nameserver does not exist.
type dnsWorld struct {
	*world.World
	client, server, outside *world.Pod
	proxy                   *world.Proxy
}

var (
	noNameserver  = netip.MustParseAddr("10.96.0.53")
	noNameserver6 = netip.MustParseAddr("fd10:96::53")
	serviceVIP6   = netip.MustParseAddr("fd10:96::1")
	externalAddr  = netip.MustParseAddr("192.0.2.7")
)

func newDNSWorld(t *testing.T, m mode) *dnsWorld {
	t.Helper()
	w := world.New(t)
	d := &dnsWorld{World: w, client: w.AddPod("client", 1), server: w.AddPod("server", 2), outside: w.AddPod("outside", 2)}
	d.server.StartApp()
	d.outside.Nameserver(d.outside.Addr, map[string]netip.Addr{"db.example.com": externalAddr, "server.default.example.com": externalAddr})
	d.server.Services = `"default/server.default.svc.cluster.local": {80: 8080}, "default/headless.default.svc.cluster.local": {80: 8080}`
	w.Services = fmt.Sprintf(`{name: server, namespace: default, hostname: server.default.svc.cluster.local, vips: ["/%v", "/%v"], ports: {80: 8080}}, `+
		`{name: headless, namespace: default, hostname: headless.default.svc.cluster.local, vips: [], ports: {80: 8080}}, `+
		`{name: wild, namespace: default, hostname: "*.wild.example.com", vips: ["/10.96.0.9"], ports: {80: 8080}}`, serviceVIP, serviceVIP6)
	d.client.RedirectBy(rules.Config{DNS: true})
	w.WriteConfig()
	resolvers := "nameserver " + d.outside.Addr.String() + "\n"
	search := "search default.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5 timeout:2\n"
	if m.proxy.Shared {
		o := m.proxy
		o.ResolvConf = resolvers
		d.proxy = d.client.StartProxy(o)
	} else {
		d.client.ResolvConf(resolvers + search)
		d.proxy = d.client.StartProxy(m.proxy)
	}
	d.client.ResolvConf("nameserver " + noNameserver.String() + "\n" + search)
	return d
}

// ask sends one question from the client to a nameserver that does not exist.
func (d *dnsWorld) ask(network string, server netip.Addr, name string, qtype uint16) (*dns.Msg, error) {
	q := new(dns.Msg).SetQuestion(name, qtype)
	dst := netip.AddrPortFrom(server, 53)
	deadline := time.Now().Add(5 * time.Second)
	if network == "tcp" {
		c, err := d.client.Net.Dial(d.Ctx, netip.Addr{}, dst)
		if err != nil {
			return nil, err
		}
		defer c.Close()
		if err := c.SetDeadline(deadline); err != nil {
			return nil, err
		}
		conn := &dns.Conn{Conn: c}
		if err := conn.WriteMsg(q); err != nil {
			return nil, err
		}
		return conn.ReadMsg()
	}
	local := d.client.Addr
	if server.Is6() {
		local = d.client.Addr6
	}
	pc, err := d.client.Net.ListenPacket(d.Ctx, netip.AddrPortFrom(local, 0))
	if err != nil {
		return nil, err
	}
	defer pc.Close()
	if err := pc.SetDeadline(deadline); err != nil {
		return nil, err
	}
	b, err := q.Pack()
	if err == nil {
		_, err = pc.WriteTo(b, net.UDPAddrFromAddrPort(dst))
	}
	if err != nil {
		return nil, err
	}
	buf := make([]byte, 4096)
	n, from, err := pc.ReadFrom(buf)
	if err != nil {
		return nil, err
	}
	if got := from.(*net.UDPAddr).AddrPort(); netip.AddrPortFrom(got.Addr().Unmap(), got.Port()) != dst {
		return nil, fmt.Errorf("the answer comes from %v, want %v", got, dst)
	}
	m := new(dns.Msg)
	return m, m.Unpack(buf[:n])
}

// addresses are the answers' in text, sorted.
func addresses(m *dns.Msg) []string {
	var out []string
	for _, rr := range m.Answer {
		switch rr := rr.(type) {
		case *dns.A:
			out = append(out, rr.A.String())
		case *dns.AAAA:
			out = append(out, rr.AAAA.String())
		}
	}
	slices.Sort(out)
	return out
}

// The rules lead port 53 of every nameserver, UDP and TCP, to the proxy in the
// pod: it knows services by all their names, and asks for the rest.
func TestST_DNS_ThroughRules(t *testing.T) {
	in(t, []mode{dedicated, shared}, func(t *testing.T, m mode) { newDNSWorld(t, m).checkNames(m) })
}

func (d *dnsWorld) checkNames(m mode) {
	t := d.T
	for _, tc := range []struct {
		name  string
		qtype uint16
		rcode int
		want  string // addresses
		local bool   // answered by the proxy
	}{
		{"server.default.svc.cluster.local.", dns.TypeA, dns.RcodeSuccess, serviceVIP.String(), true},
		{"SERVER.default.svc.cluster.local.", dns.TypeA, dns.RcodeSuccess, serviceVIP.String(), true},
		{"server.default.svc.cluster.local.", dns.TypeAAAA, dns.RcodeSuccess, serviceVIP6.String(), true},
		{"server.", dns.TypeA, dns.RcodeSuccess, serviceVIP.String(), true},
		{"server.default.", dns.TypeA, dns.RcodeSuccess, serviceVIP.String(), true},
		{"server.default.svc.", dns.TypeA, dns.RcodeSuccess, serviceVIP.String(), true},
		{"server.default.default.svc.cluster.local.", dns.TypeA, dns.RcodeSuccess, serviceVIP.String(), true},
		{"headless.default.", dns.TypeA, dns.RcodeSuccess, d.server.Addr.String(), true},
		{"any.wild.example.com.", dns.TypeA, dns.RcodeSuccess, "10.96.0.9", true},
		{"any.wild.example.com.", dns.TypeAAAA, dns.RcodeSuccess, "", true},
		{"db.example.com.", dns.TypeA, dns.RcodeSuccess, externalAddr.String(), false},
		{"db.example.com.", dns.TypeAAAA, dns.RcodeSuccess, "", false},
		{"nobody.example.com.", dns.TypeA, dns.RcodeNameError, "", false},
	} {
		for _, network := range []string{"udp", "tcp"} {
			for _, server := range []netip.Addr{noNameserver, noNameserver6} {
				got, err := d.ask(network, server, tc.name, tc.qtype)
				if err != nil {
					t.Errorf("%s %s at %v: %v", network, tc.name, server, err)
					continue
				}
				if addrs := strings.Join(addresses(got), " "); got.Rcode != tc.rcode || addrs != tc.want {
					t.Errorf("%s %s %s: got %s %q, want %s %q", network, tc.name, dns.TypeToString[tc.qtype],
						dns.RcodeToString[got.Rcode], addrs, dns.RcodeToString[tc.rcode], tc.want)
				}
				if len(got.Question) != 1 || got.Question[0].Name != tc.name {
					t.Errorf("%s %s: the question comes back as %v", network, tc.name, got.Question)
				}
			}
		}
	}
	if n, err := d.proxy.Metric("istio_dns_requests_total", map[string]string{"request_protocol": "tcp", "source_canonical_service": "client"}); err != nil || n < 20 {
		t.Errorf("istio_dns_requests_total over TCP: %v, %v", n, err)
	}
	if n, err := d.proxy.Metric("istio_dns_upstream_requests_total", nil); err != nil || n < 6 {
		t.Errorf("istio_dns_upstream_requests_total: %v, %v", n, err)
	}
}

// Programs find services by short names, and reach them, with the resolver of the
// C library and with curl's own.
func TestST_DNS_Programs(t *testing.T) {
	in(t, []mode{dedicated, shared}, func(t *testing.T, m mode) { newDNSWorld(t, m).checkPrograms() })
}

func (d *dnsWorld) checkPrograms() {
	t := d.T
	for name, want := range map[string]netip.Addr{"server": serviceVIP, "server.default.svc": serviceVIP, "db.example.com": externalAddr} {
		out, err := world.Command(d.Ctx, "", d.client.In("getent", "ahostsv4", name)...)
		if err != nil || !strings.HasPrefix(out, want.String()+" ") {
			t.Errorf("getent %s: got %q, %v, want %v", name, out, err, want)
		}
	}
	got, err := d.client.Curl("-4", "http://server/")
	if want := "hello " + d.client.Addr.String(); err != nil || strings.TrimSpace(got) != want {
		t.Errorf("curl http://server/: got %q, %v, want %q", got, err, want)
	}
	d.proxy.Expect(d.Ctx, world.Fields{"message": "connection complete", "direction": "outbound", "dst.service": "server.default.svc.cluster.local", "error": ""})
}

// Who is not in the pod gets no answer from its resolver.
func TestFault_125_NoOpenResolver(t *testing.T) {
	in(t, []mode{dedicated, shared}, func(t *testing.T, m mode) { newDNSWorld(t, m).checkClosed() })
}

func (d *dnsWorld) checkClosed() {
	t := d.T
	if err := reachable(d.client, 15053); err != nil {
		t.Fatalf("the resolver is not in the pod: %v", err)
	}
	pc, err := d.outside.Net.ListenPacket(d.Ctx, netip.AddrPortFrom(d.outside.Addr, 0))
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	q, err := new(dns.Msg).SetQuestion("server.default.svc.cluster.local.", dns.TypeA).Pack()
	if err != nil {
		t.Fatal(err)
	}
	for _, port := range []uint16{53, 15053} {
		if err := pc.SetDeadline(time.Now().Add(time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := pc.WriteTo(q, net.UDPAddrFromAddrPort(d.client.At(port))); err != nil {
			t.Fatal(err)
		}
		if n, from, err := pc.ReadFrom(make([]byte, 512)); err == nil {
			t.Errorf("UDP port %d of the pod answers with %d bytes from %v", port, n, from)
		}
		if exchange(d.outside, d.client.At(port), string(q), "x") == nil {
			t.Errorf("TCP port %d of the pod answers", port)
		}
	}
}
