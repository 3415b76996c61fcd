package dns

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/dns"

	"github.com/ztunnel-go/ztunnel/proxy/netns/memnet"
	"github.com/ztunnel-go/ztunnel/state"
)

var protocols = []string{"udp", "tcp"}

func query1(name string, qtype uint16) *dns.Msg { return new(dns.Msg).SetQuestion(name, qtype) }

// knows is a nameserver of one name, whose answer has an additional record.
func knows(t testing.TB, name, record, extra string) func(*request) {
	return func(r *request) {
		if r.name() != name {
			r.answer(t, dns.RcodeNameError)
			return
		}
		m := r.reply(t, dns.RcodeSuccess, record)
		m.RecursionAvailable = true
		rr, err := dns.NewRR(extra)
		if err != nil {
			t.Error(err)
		}
		m.Extra = append(m.Extra, rr)
		r.send(packed(t, m))
	}
}

// TestST_DNS01_Forwarder and DNS-06, over both protocols: what a nameserver knows is
// an answer without authority of ours, what it does not know is its NXDOMAIN.
func TestST_DNS01_Forwarder(t *testing.T) { testForwarder(t) }
func TestST_DNS06_Forward(t *testing.T)   { testForwarder(t) }

func testForwarder(t *testing.T) {
	n := newInternet(t, plainConf, zone(t, "test.example.com. 60 IN A 1.1.1.1"))
	p := n.newPod(t, ServerConfig{Store: fixture(t)})
	for _, proto := range protocols {
		if got, want := told(p.ask(t, proto, query1("test.example.com.", dns.TypeA))), "test.example.com. A 1.1.1.1"; got != want {
			t.Errorf("%s: got %q, want %q", proto, got, want)
		}
		want := "NXDOMAIN authority example. SOA ns.example. root.example. 1 2 3 4 20"
		if got := told(p.ask(t, proto, query1("unknown.example.com.", dns.TypeA))); got != want {
			t.Errorf("%s: got %q, want %q", proto, got, want)
		}
		if got, want := told(p.ask(t, proto, query1("test.example.com.", dns.TypeMX))), "authority example. SOA ns.example. root.example. 1 2 3 4 20"; got != want {
			t.Errorf("%s: got %q, want %q", proto, got, want)
		}
	}
}

// TestST_DNS02_Header checks every bit of the header of an answer.
func TestST_DNS02_Header(t *testing.T) {
	n := newInternet(t, plainConf, knows(t, "fake.io.", "fake.io. 60 IN A 127.0.0.1", "fake.io. 60 IN AAAA ::1"))
	p := n.newPod(t, ServerConfig{Store: fixture(t), IPv6: true})
	for _, tt := range []struct {
		name   string
		rd, cd bool
		want   dns.MsgHdr
	}{
		{"fake.io.", true, false, dns.MsgHdr{RecursionAvailable: true}},
		{"productpage.ns1.", true, false, dns.MsgHdr{RecursionAvailable: true, Authoritative: true}},
		{"productpage.ns1.", false, true, dns.MsgHdr{RecursionAvailable: true, Authoritative: true}},
		{"nw2-only.ns1.", true, true, dns.MsgHdr{RecursionAvailable: true, Authoritative: true}},
	} {
		m := query1(tt.name, dns.TypeA)
		m.RecursionDesired, m.CheckingDisabled = tt.rd, tt.cd
		m.AuthenticatedData = !strings.HasPrefix(tt.name, "fake")
		reply := p.ask(t, "udp", m)
		want := tt.want
		want.Id, want.Response, want.RecursionDesired, want.CheckingDisabled = m.Id, true, tt.rd, tt.cd
		if reply == nil || reply.MsgHdr != want {
			t.Errorf("%s: got %+v, want %+v", tt.name, reply, want)
		}
	}
	reply := p.ask(t, "udp", query1("fake.io.", dns.TypeA))
	if got, want := told(reply), "fake.io. A 127.0.0.1, additional fake.io. AAAA ::1"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	for _, rr := range p.ask(t, "udp", query1("details.ns2.svc.cluster.remote.", dns.TypeA)).Answer {
		if h := rr.Header(); h.Ttl != 30 || h.Class != dns.ClassINET {
			t.Errorf("got %v, want TTL 30", rr)
		}
	}
}

// A network that tells addresses in the form of IPv4 in IPv6.
type mapped struct{ *memnet.Host }

func (m mapped) Addresses() ([]netip.Addr, error) {
	return []netip.Addr{netip.MustParseAddr("::ffff:2.2.2.2")}, nil
}

// TestST_DNS07_MappedClient: the form of a client's address does not matter.
func TestST_DNS07_MappedClient(t *testing.T) {
	p := peers{network: mapped{memnet.New(memnet.Config{}).Host(ourIP)}}
	for peer, want := range map[string]bool{
		"[::ffff:127.0.0.1]:5": true, "[::ffff:2.2.2.2]:5": true, "2.2.2.2:5": true, "127.9.9.9:5": true, "[::1]:5": true,
		"2.2.2.3:5": false, "[::ffff:2.2.2.3]:5": false, "127.0.0.1:0": false, "0.0.0.0:5": false, "[::]:5": false, "255.255.255.255:5": false,
	} {
		if got := p.allowed(netip.MustParseAddrPort(peer)); got != want {
			t.Errorf("%s: got %t, want %t", peer, got, want)
		}
	}
}

// large has 256 addresses.
func large(t testing.TB, hostname string) *state.Store {
	vips := make([]string, 256)
	for i := range vips {
		vips[i] = fmt.Sprintf("10.0.%d.%d", i/200, i%200)
	}
	s := fixture(t)
	if err := s.Apply(state.Update{Services: []*state.Service{serviceOf(t, hostname+" ns1 "+strings.Join(vips, " "))}}); err != nil {
		t.Fatal(err)
	}
	return s
}

// TestST_DNS08_LargeAnswer: TCP takes all records, UDP as many as fit.
func TestST_DNS08_LargeAnswer(t *testing.T) {
	var records []string
	for i := range 256 {
		records = append(records, fmt.Sprintf("far.com. 60 IN A 10.1.0.%d", i))
	}
	n := newInternet(t, plainConf, func(r *request) {
		m := r.reply(t, dns.RcodeSuccess, records...)
		m.Compress = true
		r.send(packed(t, m)) // the whole, even by UDP
	})
	p := n.newPod(t, ServerConfig{Store: large(t, "large.com")})
	for _, tt := range []struct {
		name, proto   string
		payload, want int
	}{
		{"large.com.", "tcp", 0, 256},
		{"large.com.", "tcp", 1232, 256},
		{"large.com.", "udp", 1232, 74},
		{"large.com.", "udp", 0, 30}, // (512-27)/16
		{"large.com.", "udp", 100, 29},
		{"large.com.", "udp", 65535, 256},
		{"far.com.", "tcp", 0, 256},
		{"far.com.", "udp", 1232, 75}, // (1232-25)/16: this nameserver gives no OPT
		{"far.com.", "udp", 0, 30},
	} {
		m := query1(tt.name, dns.TypeA)
		if tt.payload > 0 {
			m.SetEdns0(uint16(tt.payload), false)
		}
		raw := p.exchange(t, tt.proto, packed(t, m))
		reply := new(dns.Msg)
		if err := reply.Unpack(raw); err != nil {
			t.Fatal(err)
		}
		if len(reply.Answer) != tt.want || reply.Truncated != (tt.want < 256) {
			t.Errorf("%s %s %d: got %d answers, truncated %t, want %d", tt.name, tt.proto, tt.payload, len(reply.Answer), reply.Truncated, tt.want)
		}
		if limit := max(tt.payload, 512); tt.proto == "udp" && len(raw) > limit {
			t.Errorf("%s %d: got %d bytes", tt.name, tt.payload, len(raw))
		}
		if opt := reply.IsEdns0(); tt.name == "large.com." && tt.payload > 0 && (opt == nil || int(opt.UDPSize()) != max(tt.payload, 512)) {
			t.Errorf("%s %d: got OPT %v", tt.name, tt.payload, opt)
		}
	}
}

// TestST_DNS09_SearchDomains: in shared mode they are made from the namespace of the
// client, whatever resolv.conf says; otherwise they are those that were given.
func TestST_DNS09_SearchDomains(t *testing.T) {
	n := newInternet(t, plainConf+"search from.resolv.conf\n", reflected(t))
	p := n.makePod(t, ServerConfig{})
	want := []string{"default-ns.svc.cluster.local", "svc.cluster.local", "cluster.local"}
	if got := p.server.searchFor("default-ns"); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := p.server.searchFor("other")[0]; got != "other.svc.cluster.local" {
		t.Errorf("another namespace: got %q", got)
	}
	p = n.makePod(t, ServerConfig{ClusterDomain: "Corp.Example."})
	if got := p.server.searchFor("a"); got[2] != "corp.example" {
		t.Errorf("another cluster domain: got %q", got)
	}
	given, err := SearchDomains(n.dir + "/resolv.conf")
	if err != nil || !slices.Equal(given, []string{"from.resolv.conf"}) {
		t.Errorf("SearchDomains: got %q, %v", given, err)
	}
	p = n.makePod(t, ServerConfig{Search: given})
	if got := p.server.searchFor("default-ns"); !slices.Equal(got, given) {
		t.Errorf("dedicated mode: got %q, want %q", got, given)
	}
	n.write("resolv.conf", plainConf)
	if given, err = SearchDomains(n.dir + "/resolv.conf"); err != nil || given == nil || len(given) > 0 {
		t.Errorf("SearchDomains of no list: got %#v, %v", given, err)
	}
	p = n.makePod(t, ServerConfig{Search: given})
	if got := p.server.searchFor("default-ns"); len(got) > 0 {
		t.Errorf("dedicated mode without a list: got %q", got)
	}
}

// A cluster domain other than cluster.local is the one that counts, and the only one.
func TestFault_126_ClusterDomain(t *testing.T) {
	n := newInternet(t, plainConf, bing(t))
	s := fixture(t)
	err := s.Apply(state.Update{Services: []*state.Service{
		serviceOf(t, "reviews.ns1.svc.corp.example ns1 10.3.0.1"), serviceOf(t, "headless2.ns1.svc.corp.example ns1"),
	}})
	if err != nil {
		t.Fatal(err)
	}
	p := n.newPod(t, ServerConfig{Store: s, ClusterDomain: "corp.example"})
	for name, want := range map[string]string{
		"reviews.":                           "AA reviews. A 10.3.0.1",
		"reviews.ns1.":                       "AA reviews.ns1. A 10.3.0.1",
		"reviews.ns1.svc.corp.example.":      "AA reviews.ns1.svc.corp.example. A 10.3.0.1",
		"reviews.ns1.svc.cluster.local.":     "NXDOMAIN",
		"headless2.":                         "AA",
		"headless.ns1.svc.cluster.local.":    "NXDOMAIN", // no VIP, and not of this cluster
		"productpage.ns1.svc.cluster.local.": "AA productpage.ns1.svc.cluster.local. A 9.9.9.9",
		"productpage.":                       "NXDOMAIN",
		"www.google.com.ns1.svc.corp.example.": "AA www.google.com.ns1.svc.corp.example. CNAME www.google.com., " +
			"www.google.com. A 1.1.1.1",
	} {
		if got := told(p.ask(t, "udp", query1(name, dns.TypeA))); got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
}
