package dns

import (
	"bytes"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

// TestST_DL_43 asks what is not one question: two of them, another opcode, a response.
func TestST_DL_43(t *testing.T) {
	n := newInternet(t, plainConf, nil)
	forwarded := n.spy(t)
	p := n.newPod(t, ServerConfig{Store: fixture(t)})
	two := query1("productpage.ns1.", dns.TypeA)
	two.Question = append(two.Question, two.Question[0])
	update := new(dns.Msg).SetUpdate("example.")
	update.Insert([]dns.RR{&dns.A{Hdr: dns.RR_Header{Name: "a.example.", Rrtype: dns.TypeA, Class: dns.ClassINET}, A: []byte{1, 2, 3, 4}}})
	response := query1("productpage.ns1.", dns.TypeA)
	response.Response = true
	for _, proto := range protocols {
		if reply := p.ask(t, proto, two); reply.Rcode != dns.RcodeServerFailure || reply.Authoritative || reply.RecursionAvailable {
			t.Errorf("%s: two questions: got %v, want SERVFAIL", proto, reply)
		}
		raw := packed(t, update)
		reply := p.exchange(t, proto, raw)
		passed := forwarded()
		if len(passed) != 1 || !bytes.Equal(passed[0][2:], raw[2:]) {
			t.Errorf("%s: opcode 5: passed on %x, want %x", proto, passed, raw)
		}
		if len(reply) == 0 || !bytes.Equal(reply[3:], raw[3:]) || !bytes.Equal(reply[:2], raw[:2]) {
			t.Errorf("%s: opcode 5: got %x", proto, reply)
		}
		if got, _ := p.provoke(t, proto, packed(t, response)); got != "dropped" {
			t.Errorf("%s: a response: got %s, want nothing", proto, got)
		}
	}
}

// Without an upstream an opcode that is not ours is not implemented, and other names
// can't be found out.
func TestNoUpstream(t *testing.T) {
	n := newInternet(t, "", nil)
	p := n.newPod(t, ServerConfig{Store: fixture(t)})
	update := new(dns.Msg).SetUpdate("example.")
	for _, proto := range protocols {
		if got := told(p.ask(t, proto, update)); got != "NOTIMP" {
			t.Errorf("%s: opcode 5: got %q", proto, got)
		}
		if got := told(p.ask(t, proto, query1("www.example.", dns.TypeA))); got != "SERVFAIL" {
			t.Errorf("%s: got %q", proto, got)
		}
		if got := told(p.ask(t, proto, query1("productpage.", dns.TypeA))); got != "AA productpage. A 9.9.9.9" {
			t.Errorf("%s: a local name: got %q", proto, got)
		}
	}
}

// TestFault_126_Bytes: what a nameserver says comes to the client as it is, all
// sections, EDNS options, flags and the case of names; only the ID is the client's.
func TestFault_126_Bytes(t *testing.T) {
	n := newInternet(t, plainConf, nil)
	p := n.newPod(t, ServerConfig{Store: fixture(t)})
	for name, answer := range map[string]func(*dns.Msg){
		"SRV with additional addresses": func(m *dns.Msg) {
			m.Answer = records(t, "_headless._tcp.ns1.svc.cluster.local. 5 IN SRV 0 100 80 pod0.headless.ns1.svc.cluster.local.")
			m.Extra = records(t, "pod0.headless.ns1.svc.cluster.local. 5 IN A 30.30.30.30")
		},
		"NXDOMAIN": func(m *dns.Msg) {
			m.Rcode, m.Ns = dns.RcodeNameError, records(t, "local. 5 IN SOA ns.local. root.local. 1 2 3 4 5")
		},
		"NODATA": func(m *dns.Msg) { m.Ns = records(t, "local. 5 IN SOA ns.local. root.local. 1 2 3 4 5") },
		"authority and flags": func(m *dns.Msg) {
			m.Authoritative, m.AuthenticatedData, m.RecursionAvailable, m.Zero = true, true, false, true
			m.Answer, m.Ns = records(t, "a.b. 5 CH TXT x"), records(t, "b. 5 IN NS c.")
		},
		"EDNS": func(m *dns.Msg) {
			m.SetEdns0(4000, true)
			opt := m.IsEdns0()
			opt.SetExtendedRcode(dns.RcodeBadCookie)
			opt.Option = append(opt.Option, &dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0123456789abcdef"})
		},
		"REFUSED": func(m *dns.Msg) { m.Rcode = dns.RcodeRefused },
	} {
		for _, proto := range protocols {
			var sent []byte
			handle := func(r *request) {
				m := r.reply(t, dns.RcodeSuccess)
				answer(m)
				sent = append(packed(t, m), "and what follows"...)
				r.send(sent)
			}
			n.first.set(handle)
			n.next.set(handle)
			m := query1("_Headless._TCP.ns1.svc.Cluster.local.", dns.TypeSRV)
			reply := p.exchange(t, proto, packed(t, m))
			if len(reply) < 2 || !bytes.Equal(reply[2:], sent[2:]) || uint16(reply[0])<<8|uint16(reply[1]) != m.Id {
				t.Errorf("%s, %s: got %x, want %x", name, proto, reply, sent)
			}
		}
	}
	if ids := slices.Compact(n.first.ids); len(ids) < 8 {
		t.Errorf("IDs %v: every query needs its own", ids)
	}
	if ports := slices.Compact(slices.Clone(n.first.ports)); len(ports) != len(n.first.ports) {
		t.Errorf("%v: every query needs a socket of its own", n.first.ports)
	}
}

func records(t testing.TB, texts ...string) (out []dns.RR) {
	t.Helper()
	for _, text := range texts {
		rr, err := dns.NewRR(text)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, rr)
	}
	return out
}

// TestFault_126_Truncation: a client by UDP gets what the nameserver has cut off, and
// the whole by TCP.
func TestFault_126_Truncation(t *testing.T) {
	var texts []string
	for i := range 100 {
		texts = append(texts, fmt.Sprintf("large.example. 60 IN A 192.0.2.%d", i))
	}
	n := newInternet(t, plainConf, zone(t, texts...))
	p := n.newPod(t, ServerConfig{Store: fixture(t)})
	m := query1("large.example.", dns.TypeA)
	reply := p.ask(t, "udp", m)
	if !reply.Truncated || len(reply.Answer) == 0 || len(reply.Answer) == 100 {
		t.Errorf("udp: got %d answers, truncated %t", len(reply.Answer), reply.Truncated)
	}
	equalQuestions(t, n.first, "udp A large.example.")
	if reply = p.ask(t, "tcp", m); reply.Truncated || len(reply.Answer) != 100 {
		t.Errorf("tcp: got %d answers, truncated %t", len(reply.Answer), reply.Truncated)
	}
	equalQuestions(t, n.first, "tcp A large.example.", "udp A large.example.")

	// A nameserver that cuts a record in two, because the datagram is full.
	n.first.set(func(r *request) {
		m := r.reply(t, dns.RcodeSuccess, texts...)
		for len(m.Answer) < 400 {
			m.Answer = append(m.Answer, m.Answer...)
		}
		b := packed(t, m)
		if r.proto == "udp" {
			b = b[:5000]
		}
		r.send(b)
	})
	big := m.Copy()
	big.SetEdns0(65000, false)
	if reply := p.ask(t, "udp", big); reply.Truncated || len(reply.Answer) != 400 {
		t.Errorf("datagram that is cut off: got %d answers, truncated %t", len(reply.Answer), reply.Truncated)
	}
	if reply := p.ask(t, "udp", m); !reply.Truncated || len(reply.Answer) != 16 { // (512-31)/29, not compressed
		t.Errorf("the same for a client without EDNS: got %d answers, truncated %t", len(reply.Answer), reply.Truncated)
	}
}

// TestFault_126_NameserverDown: another one is asked; when none can tell, the client
// is told that, as soon as that is clear.
func TestFault_126_NameserverDown(t *testing.T) {
	for _, proto := range protocols {
		synctest.Test(t, func(t *testing.T) {
			n := newInternet(t, "nameserver 10.0.0.53\nnameserver 10.0.0.54\n", nil)
			n.next.set(zone(t, "www.example. 60 IN A 192.0.2.1"))
			p := n.newPod(t, ServerConfig{Store: fixture(t)})
			start := time.Now()
			if got := told(p.ask(t, proto, query1("www.example.", dns.TypeA))); got != "www.example. A 192.0.2.1" {
				t.Errorf("one is silent: got %q", got)
			}
			if d := time.Since(start); d != stagger {
				t.Errorf("one is silent: took %v, want %v", d, stagger)
			}
			n.next.set(func(r *request) { r.answer(t, dns.RcodeServerFailure) })
			n.first.set(func(r *request) { r.answer(t, dns.RcodeRefused) })
			if got := told(p.ask(t, proto, query1("www.example.", dns.TypeA))); got != "SERVFAIL" && got != "REFUSED" {
				t.Errorf("nobody can tell: got %q", got)
			}
			n.first.set(nil)
			n.next.set(nil)
			start = time.Now()
			if got := told(p.ask(t, proto, query1("www.example.", dns.TypeA))); got != "SERVFAIL" {
				t.Errorf("all are silent: got %q", got)
			}
			if d := time.Since(start); d < 2*5*time.Second || d > maxFlight {
				t.Errorf("all are silent: took %v", d)
			}
		})
	}
}

// Nothing is kept: the second query is passed on as the first was (decision D24).
func TestFault_126_NoCache(t *testing.T) {
	n := newInternet(t, plainConf, zone(t, "www.example. 60 IN A 192.0.2.1"))
	p := n.newPod(t, ServerConfig{Store: fixture(t)})
	for range 3 {
		p.ask(t, "udp", query1("www.example.", dns.TypeA))
		equalQuestions(t, n.first, "udp A www.example.")
	}
}

// What others send in the place of the nameserver does not reach the client.
func TestFault_126_Poison(t *testing.T) {
	n := newInternet(t, plainConf, func(r *request) {
		evil := r.reply(t, dns.RcodeSuccess, "www.example. 60 IN A 203.0.113.66")
		evil.Id++
		r.send(packed(t, evil))
		evil.Id--
		evil.Question[0].Name = "other.example."
		r.send(packed(t, evil))
		r.answer(t, dns.RcodeSuccess, "www.example. 60 IN A 192.0.2.1")
	})
	p := n.newPod(t, ServerConfig{Store: fixture(t)})
	if got := told(p.ask(t, "udp", query1("www.example.", dns.TypeA))); got != "www.example. A 192.0.2.1" {
		t.Errorf("got %q", got)
	}
}

// The names of the hosts file, and those that say what they are, reach no nameserver.
func TestWellKnownNames(t *testing.T) {
	n := newInternet(t, plainConf, func(r *request) { r.answer(t, dns.RcodeSuccess) })
	n.write("hosts", "192.0.2.7 myself Alias.Example\n2001:db8::7 myself\n192.0.2.8 myself\n")
	p := n.newPod(t, ServerConfig{Store: fixture(t), IPv6: true})
	off := n.newOtherPod(t, ServerConfig{Store: fixture(t)})
	for _, tt := range []struct {
		p                 *pod
		name, qtype, want string
		passed            bool
	}{
		{p, "myself.", "A", "myself. A 192.0.2.7, myself. A 192.0.2.8", false},
		{p, "MySelf.", "AAAA", "myself. AAAA 2001:db8::7", false},
		{p, "alias.example.", "A", "alias.example. A 192.0.2.7", false},
		{p, "alias.example.", "AAAA", "", true},
		{p, "myself.", "MX", "", true},
		{p, "localhost.", "A", "localhost. A 127.0.0.1", false},
		{p, "localhost.", "AAAA", "localhost. AAAA ::1", false},
		{p, "a.localhost.", "A", "a.localhost. A 127.0.0.1", false},
		{p, "localhost.", "NS", "", true},
		{p, "dual.localhost.", "A", "AA dual.localhost. A 2.2.2.2", false}, // a service comes first
		{p, "a.invalid.", "A", "NXDOMAIN", false},
		{p, "onion.", "AAAA", "NXDOMAIN", false},
		{p, "1.0.0.127.in-addr.arpa.", "PTR", "1.0.0.127.in-addr.arpa. PTR localhost.", false},
		{p, "127.in-addr.arpa.", "PTR", "127.in-addr.arpa. PTR localhost.", false},
		{p, reverseOne, "PTR", reverseOne + " PTR localhost.", false},
		{p, "7.2.0.192.in-addr.arpa.", "PTR", "", true},
		{p, "x127.in-addr.arpa.", "PTR", "", true},
		{off, "localhost.", "AAAA", "", false},
		{off, "localhost.", "A", "localhost. A 127.0.0.1", false},
		{off, "myself.", "AAAA", "", true},
		{off, "productpage.ns1.", "AAAA", "AA", false},
		{off, "dual.localhost.", "AAAA", "AA", false},
	} {
		m := query1(tt.name, dns.StringToType[tt.qtype])
		m.SetEdns0(1232, false)
		n.first.questions()
		reply := tt.p.ask(t, "udp", m)
		if got := told(reply); got != tt.want {
			t.Errorf("%s %s: got %q, want %q", tt.qtype, tt.name, got, tt.want)
		}
		if passed := len(n.first.questions()) > 0; passed != tt.passed {
			t.Errorf("%s %s: passed on: %t, want %t", tt.qtype, tt.name, passed, tt.passed)
		}
		if !tt.passed && tt.want != "NXDOMAIN" && (reply.IsEdns0() == nil || !reply.RecursionAvailable) {
			t.Errorf("%s %s: got %v, want OPT and RA", tt.qtype, tt.name, reply)
		}
	}
}

// A query that is late does not hold up others, and neither does waiting for the
// control plane.
func TestConcurrentQueries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newInternet(t, plainConf, nil)
		store := fixture(t)
		p := n.newPod(t, ServerConfig{Store: store})
		pc := p.socket(t)
		defer pc.Close()
		sendTo(t, pc, packed(t, query1("slow.example.", dns.TypeA)))
		start := time.Now()
		sendTo(t, pc, packed(t, query1("productpage.", dns.TypeA)))
		if reply := receiveFrom(t, pc); rcode(reply) != dns.RcodeSuccess {
			t.Errorf("got %x", reply)
		}
		n.first.set(zone(t, "fast.example. 60 IN A 192.0.2.1"))
		if got := told(p.ask(t, "udp", query1("fast.example.", dns.TypeA))); got != "fast.example. A 192.0.2.1" {
			t.Errorf("got %q", got)
		}
		if d := time.Since(start); d != 0 {
			t.Errorf("took %v", d)
		}
	})
}

// TestTooManyQueries: a pod that asks for more than may wait is refused that, and so
// are the others when it takes all that there is; when there is room again all goes on.
func TestTooManyQueries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newInternet(t, plainConf, nil)
		limits := NewLimits(maxPending+1, 0)
		p := n.newPod(t, ServerConfig{Store: fixture(t), Limits: limits})
		other := n.newOtherPod(t, ServerConfig{Store: fixture(t), Limits: limits})
		pc := p.socket(t)
		defer pc.Close()
		for i := range maxPending {
			sendTo(t, pc, packed(t, query1(fmt.Sprintf("n%d.example.", i), dns.TypeA)))
			synctest.Wait()
		}
		start := time.Now()
		for _, proto := range protocols {
			if got := told(p.ask(t, proto, query1("one.more.", dns.TypeA))); got != "SERVFAIL" {
				t.Errorf("%s: one more: got %q", proto, got)
			}
		}
		if got := told(p.ask(t, "udp", query1("productpage.", dns.TypeA))); got != "AA productpage. A 9.9.9.9" {
			t.Errorf("a local name: got %q", got)
		}
		spare := other.socket(t)
		defer spare.Close()
		sendTo(t, spare, packed(t, query1("last.example.", dns.TypeA)))
		synctest.Wait()
		if got := told(other.ask(t, "udp", query1("beyond.example.", dns.TypeA))); got != "SERVFAIL" {
			t.Errorf("beyond all: got %q", got)
		}
		if d := time.Since(start); d != 0 {
			t.Errorf("refusals took %v", d)
		}
		if got := p.log.count("DNS queries are refused"); got != 1 {
			t.Errorf("%d warnings, want 1", got)
		}
		n.first.set(zone(t, "later.example. 60 IN A 192.0.2.1"))
		time.Sleep(maxFlight)
		synctest.Wait()
		if got := told(p.ask(t, "udp", query1("later.example.", dns.TypeA))); got != "later.example. A 192.0.2.1" {
			t.Errorf("later: got %q", got)
		}
		if p.server.pending.taken.Load() != 0 || limits.pending.taken.Load() != 0 {
			t.Error("room is lost")
		}
		equals(t, p.value(t, "istio_dns_upstream_failures_total", "a", "udp"), maxPending+1)
	})
}

// Rules that lead our own queries back to us cost one turn, not all that there is.
func TestSelfCapture(t *testing.T) {
	for _, proto := range protocols {
		synctest.Test(t, func(t *testing.T) {
			n := newInternet(t, plainConf, nil)
			n.write("resolv.conf", "nameserver 127.0.0.1\n")
			p := n.makePod(t, ServerConfig{
				Store: fixture(t), Addrs: []netip.AddrPort{netip.AddrPortFrom(loopback4, port)}, // as if redirected
			})
			p.addr = netip.AddrPortFrom(loopback4, port)
			p.run(t)
			if got := told(p.ask(t, proto, query1("www.example.", dns.TypeA))); got != "SERVFAIL" {
				t.Errorf("%s: got %q", proto, got)
			}
			if got := p.log.count("redirected to the proxy itself"); got != 1 {
				t.Errorf("%s: %d warnings, want 1", proto, got)
			}
			if got := p.value(t, "istio_dns_requests_total", "a", "udp") + p.value(t, "istio_dns_requests_total", "a", "tcp"); got > 4 {
				t.Errorf("%s: %v queries", proto, got)
			}
		})
	}
}

// A nameserver on a loopback address is that of the host, which is not in the pod's
// network namespace: who looks for the reason finds it in the log, once.
func TestLoopbackNameserver(t *testing.T) {
	for conf, want := range map[string]int{"nameserver 127.0.0.53\n": 1, "nameserver 10.0.0.99\noptions timeout:1 attempts:1\n": 0} {
		synctest.Test(t, func(t *testing.T) {
			n := newInternet(t, conf, nil)
			p := n.newPod(t, ServerConfig{Store: fixture(t)})
			for range 2 {
				if reply := p.ask(t, "tcp", query1("www.bing.com.", dns.TypeA)); reply.Rcode != dns.RcodeServerFailure {
					t.Errorf("%q: got %v, want SERVFAIL", conf, reply)
				}
			}
			if got := p.log.count("one is a loopback address"); got != want {
				t.Errorf("%q: %d warnings, want %d", conf, got, want)
			}
		})
	}
}

// A client that happens to send what we have sent, with the same ID, is no loop.
func TestSameMessageIsNoLoop(t *testing.T) {
	for _, proto := range protocols {
		synctest.Test(t, func(t *testing.T) {
			n := newInternet(t, plainConf, nil)
			ours := make(chan []byte, 1)
			n.first.set(func(r *request) { ours <- r.raw })
			p := n.newPod(t, ServerConfig{Store: fixture(t)})
			pc := p.socket(t)
			defer pc.Close()
			sendTo(t, pc, packed(t, query1("www.example.", dns.TypeA)))
			raw := <-ours
			n.first.set(zone(t, "www.example. 60 IN A 192.0.2.1"))
			if reply := p.exchange(t, proto, raw); reply == nil || rcode(reply) != dns.RcodeSuccess {
				t.Errorf("%s: got %x", proto, reply)
			}
		})
	}
}
