package dns

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/dns"

	"github.com/ztunnel-go/ztunnel/state"
)

// lookups is the matrix of spec/state-xds-dns.md §9.5. An answer is forwarded
// unless it begins with AA; what follows is the answer section, owners as they are
// in it.
var lookups = []struct {
	row, name, qtype string
	want             string
}{
	{"DL-01", "productpage.ns1.", "NS", "NXDOMAIN"},
	{"DL-02", "www.google.com.", "A", "AA www.google.com. A 1.1.1.1"},
	{"DL-03", "www.google.com.ns1.svc.cluster.local.", "A",
		"AA www.google.com.ns1.svc.cluster.local. CNAME www.google.com., www.google.com. A 1.1.1.1"},
	{"DL-04", "www.bing.com.", "A", "www.bing.com. A 1.1.1.1, additional www.bing.com. AAAA ::1"},
	{"DL-05", "productpage.ns1.svc.cluster.local.", "A", "AA productpage.ns1.svc.cluster.local. A 9.9.9.9"},
	{"DL-06", "productpage.ns1.", "A", "AA productpage.ns1. A 9.9.9.9"},
	{"DL-07", "productpage.", "A", "AA productpage. A 9.9.9.9"},
	{"DL-08", "productpage.ns1.ns1.svc.cluster.local.", "A",
		"AA productpage.ns1.ns1.svc.cluster.local. CNAME productpage.ns1., productpage.ns1. A 9.9.9.9"},
	{"DL-09", "productpage.ns1.ns1.svc.cluster.local.", "AAAA", "AA"},
	{"DL-10", "example.ns2.", "A", "AA example.ns2. A 10.10.10.10"},
	{"DL-11", "example.ns2.svc.cluster.local.", "A", "AA example.ns2.svc.cluster.local. A 10.10.10.10"},
	{"DL-12", "nslocal.ns2.svc.cluster.local.", "A", "NXDOMAIN"},
	{"DL-13", "nslocalsame.ns1.svc.cluster.local.", "A", "AA nslocalsame.ns1.svc.cluster.local. A 10.10.10.241"},
	{"DL-14", "example.ns2.svc.", "A", "AA example.ns2.svc. A 10.10.10.10"},
	{"DL-15", "example.", "A", "NXDOMAIN"},
	{"DL-16", "details.ns2.svc.cluster.remote.", "A", "AA details.ns2.svc.cluster.remote. A 11.11.11.11, " +
		"details.ns2.svc.cluster.remote. A 12.12.12.12, details.ns2.svc.cluster.remote. A 13.13.13.13, " +
		"details.ns2.svc.cluster.remote. A 14.14.14.14"},
	{"DL-17", "details.ns2.", "A", "NXDOMAIN"},
	{"DL-18", "dual.localhost.", "A", "AA dual.localhost. A 2.2.2.2"},
	{"DL-19", "dual.localhost.", "AAAA", "AA dual.localhost. AAAA 2001:db8::ff00:42:8329"},
	{"DL-20", "ipv6.localhost.", "A", "AA"},
	{"DL-21", "ipv4.localhost.", "AAAA", "AA"},
	{"DL-22", "foo.wildcard.", "A", "AA foo.wildcard. A 10.10.10.10"},
	{"DL-23", "a.b.wildcard.", "A", "AA a.b.wildcard. A 11.11.11.11"},
	{"DL-24", "foo.svc.mesh.company.net.", "A", "AA foo.svc.mesh.company.net. A 10.1.2.3"},
	{"DL-25", "foo.foons.svc.mesh.company.net.", "A", "AA foo.foons.svc.mesh.company.net. A 10.1.2.3"},
	{"DL-26", "foo.svc.mesh.company.net.ns1.svc.cluster.local.", "A",
		"AA foo.svc.mesh.company.net.ns1.svc.cluster.local. A 10.1.2.3"},
	{"DL-27", "nw2-only.ns1.svc.cluster.local.", "A", "AA"},
	{"DL-28", "both-networks.ns1.svc.cluster.local.", "A", "AA both-networks.ns1.svc.cluster.local. A 21.21.21.21"},
	{"DL-29", "headless.ns1.svc.cluster.local.", "A",
		"AA headless.ns1.svc.cluster.local. A 30.30.30.30, headless.ns1.svc.cluster.local. A 31.31.31.31"},
	{"DL-30", "headless.ns1.svc.cluster.local.", "AAAA",
		"AA headless.ns1.svc.cluster.local. AAAA 2001:db8::30, headless.ns1.svc.cluster.local. AAAA 2001:db8::31"},
	{"DL-31", "headless-ipv6.ns1.svc.cluster.local.", "AAAA", "AA headless-ipv6.ns1.svc.cluster.local. AAAA 2001:db8::33"},
	{"DL-32", "headless-ipv6.ns1.svc.cluster.local.", "A", "AA"},
	{"DL-33", "headless.pod0.ns1.svc.cluster.local.", "A", "NXDOMAIN"},
	{"DL-34", "headless.pod0.ns1.", "A", "NXDOMAIN"},
	{"DL-35", "headless-no-endpoints.example.com.", "A", "NXDOMAIN"},
	{"DL-36", "headless.example.com.", "A", "NXDOMAIN"},
	{"DL-37", "preferred.io.", "A", "AA preferred.io. A 10.10.10.211"},
	{"DL-38", "everywhere.io.", "A", "AA everywhere.io. A 10.10.10.112"},
	{"DL-39", "canonical.svc.", "A", "AA canonical.svc. A 10.10.10.141"},
	{"DL-40", "canonical.with.local.", "A", "AA canonical.with.local. A 10.10.10.150"},
	{"DL-41", "ProductPage.NS1.svc.Cluster.LOCAL.", "A", "AA productpage.ns1.svc.cluster.local. A 9.9.9.9"},
	{"DL-42", "cidr-only.example.com.", "A", "NXDOMAIN"},
}

// fixture is the mesh of spec/state-xds-dns.md §9.5.
func fixture(t testing.TB) *state.Store {
	s := state.New(state.Config{Network: "nw1"})
	var u state.Update
	for _, text := range []string{
		"www.google.com ns1 1.1.1.1",
		"productpage.ns1.svc.cluster.local ns1 9.9.9.9",
		"example.ns2.svc.cluster.local ns2 10.10.10.10",
		"nslocal.ns2.svc.cluster.local ns2 10.10.10.240 local",
		"nslocalsame.ns1.svc.cluster.local ns1 10.10.10.241 local",
		"everywhere.io ns2 10.10.10.110", "everywhere.io preferred-ns 10.10.10.111", "everywhere.io ns1 10.10.10.112",
		"preferred.io ns2 10.10.10.210", "preferred.io preferred-ns 10.10.10.211",
		"canonical.svc ns2 10.10.10.140", "canonical.svc ns3 10.10.10.141 canonical",
		"canonical.with.local ns1 10.10.10.150", "canonical.with.local ns2 10.10.10.151 canonical",
		"details.ns2.svc.cluster.remote ns2 11.11.11.11 12.12.12.12 13.13.13.13 14.14.14.14",
		"ipv4.localhost ns1 2.2.2.2", "ipv6.localhost ns1 2001:db8::ff00:42:8329", "dual.localhost ns1 2.2.2.2 2001:db8::ff00:42:8329",
		"*.wildcard ns1 10.10.10.10", "*.b.wildcard ns1 11.11.11.11", "*.svc.mesh.company.net ns1 10.1.2.3",
		"nw2-only.ns1.svc.cluster.local ns1 nw2/20.20.20.20",
		"both-networks.ns1.svc.cluster.local ns1 21.21.21.21 nw2/22.22.22.22",
		"headless.ns1.svc.cluster.local ns1", "headless-ipv6.ns1.svc.cluster.local ns1 ipv6",
		"headless.example.com ns1", "headless-no-endpoints.example.com ns1",
		"cidr-only.example.com ns1 10.77.0.0/16",
	} {
		u.Services = append(u.Services, serviceOf(t, text))
	}
	headless := state.NamespacedHostname{Namespace: "ns1", Hostname: "headless.ns1.svc.cluster.local"}
	onlyIPv6 := state.NamespacedHostname{Namespace: "ns1", Hostname: "headless-ipv6.ns1.svc.cluster.local"}
	outside := state.NamespacedHostname{Namespace: "ns1", Hostname: "headless.example.com"}
	for _, w := range []struct {
		name, ips string
		services  []state.NamespacedHostname
	}{
		{"client", "10.0.0.1", nil},
		{"pod0", "30.30.30.30 2001:db8::30", []state.NamespacedHostname{headless, outside}},
		{"pod1", "31.31.31.31 2001:db8::31", []state.NamespacedHostname{headless, outside}},
		{"pod2", "33.33.33.33 2001:db8::33", []state.NamespacedHostname{onlyIPv6}},
	} {
		in := state.WorkloadUpdate{Workload: &state.Workload{
			UID: "uid-" + w.name, Name: w.name, Namespace: "ns1", ServiceAccount: "sa", Network: "nw1",
			Hostname: "headless." + w.name + ".ns1.svc.cluster.local", CanonicalName: "canonical-" + w.name, CanonicalRevision: "v1",
		}, Endpoints: map[state.NamespacedHostname][]state.Port{}}
		for _, ip := range strings.Fields(w.ips) {
			in.Workload.IPs = append(in.Workload.IPs, netip.MustParseAddr(ip))
		}
		for _, svc := range w.services {
			in.Endpoints[svc] = nil
		}
		u.Workloads = append(u.Workloads, in)
	}
	if err := s.Apply(u); err != nil {
		t.Fatal(err)
	}
	return s
}

// serviceOf reads hostname, namespace, and VIPs or properties.
func serviceOf(t testing.TB, text string) *state.Service {
	f := strings.Fields(text)
	s := &state.Service{Hostname: f[0], Namespace: f[1], Name: strings.Split(f[0], ".")[0], Ports: []state.Port{{Service: 80, Target: 8080}}}
	for _, p := range f[2:] {
		network, rest, ok := strings.Cut(p, "/")
		switch {
		case p == "local":
			s.Visibility = state.NamespaceVisibility
		case p == "canonical":
			s.Canonical = true
		case p == "ipv6":
			s.IPFamilies = state.IPv6Only
		case ok && network == "nw2":
			s.VIPs = append(s.VIPs, state.NetworkAddress{Network: network, Addr: netip.MustParseAddr(rest)})
		case ok:
			s.CIDRVIPs = append(s.CIDRVIPs, state.CIDRAddress{Network: "nw1", Prefix: netip.MustParsePrefix(p)})
		default:
			s.VIPs = append(s.VIPs, state.NetworkAddress{Network: "nw1", Addr: netip.MustParseAddr(p)})
		}
	}
	return s
}

// bing is the nameserver of the matrix.
func bing(t testing.TB) func(*request) {
	return func(r *request) {
		if !strings.EqualFold(r.name(), "www.bing.com.") || r.Question[0].Qtype != dns.TypeA {
			r.answer(t, dns.RcodeNameError)
			return
		}
		m := r.reply(t, dns.RcodeSuccess, "www.bing.com. 60 IN A 1.1.1.1")
		m.RecursionAvailable = true
		rr, _ := dns.NewRR("www.bing.com. 60 IN AAAA ::1")
		m.Extra = append(m.Extra, rr)
		r.send(packed(t, m))
	}
}

var client1 = state.Ref{Namespace: "ns1", Name: "client", ServiceAccount: "sa"}

// localOf is ServerConfig.Local for a workload of a store, as proxies have it.
func localOf(s *state.Store, ref state.Ref) func(context.Context) (*state.Workload, error) {
	return func(ctx context.Context) (*state.Workload, error) {
		for {
			changed := s.Changed()
			if w, ok := s.Local(ref); ok {
				return w, nil
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		}
	}
}

// TestST_DL asks every question of the matrix, by UDP and by TCP.
func TestST_DL(t *testing.T) {
	n := newInternet(t, plainConf, bing(t))
	p := n.newPod(t, ServerConfig{Store: fixture(t), IPv6: true, PreferredNamespace: "preferred-ns"})
	for _, proto := range []string{"udp", "tcp"} {
		for _, l := range lookups {
			t.Run(proto+"/"+l.row, func(t *testing.T) {
				reply := p.ask(t, proto, new(dns.Msg).SetQuestion(l.name, dns.StringToType[l.qtype]))
				if got := told(reply); got != l.want {
					t.Errorf("%s %s: got %q, want %q", l.qtype, l.name, got, l.want)
				}
				if q := reply.Question; len(q) != 1 || q[0].Name != l.name {
					t.Errorf("question: got %v, want %s as it was asked", q, l.name)
				}
			})
		}
	}
}

// told is what an answer says, in the notation of lookups.
func told(m *dns.Msg) string {
	if m == nil {
		return "nothing"
	}
	var parts []string
	texts := func(prefix string, list []dns.RR) {
		var lines []string
		first := len(list) // of the addresses, whose order does not matter
		for _, rr := range list {
			if rr.Header().Rrtype == dns.TypeOPT {
				continue
			}
			f := strings.Fields(rr.String())
			if f[3] != "CNAME" {
				first = min(first, len(lines))
			}
			lines = append(lines, prefix+f[0]+" "+strings.Join(f[3:], " "))
		}
		slices.Sort(lines[min(first, len(lines)):])
		parts = append(parts, lines...)
	}
	texts("", m.Answer)
	texts("authority ", m.Ns)
	texts("additional ", m.Extra)
	text := strings.Join(parts, ", ")
	if m.Rcode != dns.RcodeSuccess {
		text = strings.TrimSpace(rcodeText(m.Rcode) + " " + text)
	}
	if m.Authoritative {
		text = strings.TrimSpace("AA " + text)
	}
	return text
}
