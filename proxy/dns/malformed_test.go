package dns

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

// malformed is a corpus of messages that nobody should send, and what becomes of
// them: an RCODE, "dropped", or "forwarded".
type malformed struct {
	name string
	raw  []byte
	want string
}

// head is a header with these counts.
func head(flags uint16, counts ...uint16) []byte {
	b := binary.BigEndian.AppendUint16([]byte{0xab, 0xcd}, flags)
	for i := range 4 {
		var n uint16
		if i < len(counts) {
			n = counts[i]
		}
		b = binary.BigEndian.AppendUint16(b, n)
	}
	return b
}

const recursive = 0x0100 // RD

func join(parts ...any) []byte {
	var out []byte
	for _, p := range parts {
		switch p := p.(type) {
		case []byte:
			out = append(out, p...)
		case string:
			out = append(out, p...)
		}
	}
	return out
}

// label is a label with its length in front.
func label(s string) string { return string(rune(len(s))) + s }

const (
	inA = "\x00\x01\x00\x01" // type and class
	opt = "\x00\x00\x29\x04\xd0\x00\x00\x00\x00\x00\x00"
)

func corpus(t testing.TB) []malformed {
	good := packed(t, query1("productpage.ns1.", dns.TypeA))
	name := label("productpage") + label("ns1") + "\x00"
	long := strings.Repeat(label(strings.Repeat("a", 61)), 4) // 248 octets
	return []malformed{
		{"nothing", nil, "dropped"},
		{"eleven bytes", good[:11], "dropped"},
		{"a header only", good[:12], "FORMERR"},
		{"a response", join(head(0x8100, 1), name, inA), "dropped"},
		{"a response that is cut off", head(0x8100, 1), "dropped"},
		{"cut off in the name", good[:20], "FORMERR"},
		{"cut off before the class", good[:len(good)-2], "FORMERR"},
		{"pointer to itself", join(head(recursive, 1), "\xc0\x0c", inA), "FORMERR"},
		{"pointers to each other", join(head(recursive, 2), "\xc0\x12", inA, "\xc0\x0c", inA), "FORMERR"},
		{"pointer forward", join(head(recursive, 1), "\xc0\x20", inA, name), "FORMERR"},
		{"pointer into the header", join(head(recursive, 1), "\xc0\x02", inA), "FORMERR"},
		{"pointer that is cut off", join(head(recursive, 1), "\xc0"), "FORMERR"},
		{"label of 64", join(head(recursive, 1), "\x40", strings.Repeat("a", 64), "\x00", inA), "FORMERR"},
		{"label type 10", join(head(recursive, 1), "\x80a\x00", inA), "FORMERR"},
		{"name of 255 octets", join(head(recursive, 1), long, label("abcde"), "\x00", inA), "forwarded"},
		{"name of 256 octets", join(head(recursive, 1), long, label("abcdef"), "\x00", inA), "FORMERR"},
		{"127 labels", join(head(recursive, 1), strings.Repeat(label("a"), 127), "\x00", inA), "forwarded"},
		{"128 labels", join(head(recursive, 1), strings.Repeat(label("a"), 128), "\x00", inA), "FORMERR"},
		{"the root", join(head(recursive, 1), "\x00", inA), "forwarded"},
		{"no question", head(recursive, 0), "SERVFAIL"},
		{"two questions", join(head(recursive, 2), name, inA, name, inA), "SERVFAIL"},
		{"two questions, the second compressed", join(head(recursive, 2), name, inA, "\xc0\x0c", inA), "SERVFAIL"},
		{"65535 questions", join(head(recursive, 65535), name, inA), "FORMERR"},
		{"more answers than there are", join(head(recursive, 1, 1), name, inA), "FORMERR"},
		{"more additional records than there are", join(head(recursive, 1, 0, 0, 2), name, inA, opt), "FORMERR"},
		{"record with more data than there is", join(head(recursive, 1, 0, 0, 1), name, inA, opt[:9], "\x00\x05"), "FORMERR"},
		{"two OPT records", join(head(recursive, 1, 0, 0, 2), name, inA, opt, opt), "FORMERR"},
		{"OPT record with a name", join(head(recursive, 1, 0, 0, 1), name, inA, label("a"), opt), "FORMERR"},
		{"data after the end", join(good, "whatever"), "AA"},
		{"EDNS of version 9", join(head(recursive, 1, 0, 0, 1), name, inA, opt[:6], "\x09\x80\x00", opt[9:]), "AA"},
		{"EDNS with an unknown option", join(head(recursive, 1, 0, 0, 1), name, inA, opt[:9], "\x00\x06\xff\xfe\x00\x02xy"), "AA"},
		{"class ANY", join(head(recursive, 1), name, "\x00\x01\x00\xff"), "AA"},
		{"type ANY", join(head(recursive, 1), name, "\x00\xff\x00\x01"), "forwarded"},
		{"AXFR", join(head(recursive, 1), name, "\x00\xfc\x00\x01"), "forwarded"},
		{"IXFR with the SOA that it needs", join(head(recursive, 1, 0, 1), name, "\x00\xfb\x00\x01", "\x00\x00\x06\x00\x01\x00\x00\x00\x00\x00\x16\x00\x00",
			strings.Repeat("\x00", 20)), "forwarded"},
		{"name with a dot in a label", join(head(recursive, 1), label("productpage.ns1"), "\x00", inA), "forwarded"},
		{"name with bytes that are no text", join(head(recursive, 1), label("product\x00\xff page"), "\x00", inA), "forwarded"},
		{"opcode UPDATE", join(head(0x2800, 1), name, "\x00\x06\x00\x01"), "forwarded"},
		{"opcode NOTIFY that is cut off", join(head(0x2000, 1), name), "FORMERR"},
		{"opcode 15 with nothing", head(0x7800), "forwarded"},
	}
}

// TestFault_125_MalformedMessages sends what nobody should, by both protocols. None of
// it stops the server, and what it refuses it refuses in no more bytes than came.
func TestFault_125_MalformedMessages(t *testing.T) {
	n := newInternet(t, plainConf, nil)
	n.first.set(nil)
	forwarded := n.spy(t)
	p := n.newPod(t, ServerConfig{Store: fixture(t), IPv6: true})
	for _, proto := range protocols {
		for _, m := range corpus(t) {
			t.Run(proto+"/"+m.name, func(t *testing.T) {
				forwarded()
				got, reply := p.provoke(t, proto, m.raw)
				if passed := forwarded(); len(passed) > 0 {
					got = "forwarded"
					if raw := m.raw; !bytes.Equal(passed[0][2:], raw[2:]) {
						t.Errorf("forwarded %x, want %x with another ID", passed[0], raw)
					}
				}
				if got != m.want {
					t.Errorf("got %s, want %s", got, m.want)
				}
				if refused := got == "FORMERR" || got == "SERVFAIL"; refused && len(reply) > len(m.raw) {
					t.Errorf("%d bytes became %d", len(m.raw), len(reply))
				}
				if got == "FORMERR" && len(reply) != headerLen {
					t.Errorf("got %x, want a header", reply)
				}
				if got == "SERVFAIL" && !bytes.Equal(reply[headerLen:], m.raw[headerLen:]) {
					t.Errorf("got %x, want the questions of %x", reply, m.raw)
				}
			})
		}
	}
}

// A chain of pointers is cut short: thousands of records that lead into a long one
// would cost as many steps each.
func TestFault_125_PointerChain(t *testing.T) {
	for _, c := range []struct {
		pointers int
		ok       bool
	}{{maxPointers, true}, {maxPointers + 1, false}} {
		msg := join(head(recursive), "\x00")
		for to := len(msg) - 1; c.pointers > 0; c.pointers-- {
			next := len(msg)
			msg = binary.BigEndian.AppendUint16(msg, 0xc000|uint16(to))
			to = next
		}
		if _, err := skipName(msg, len(msg)-2); (err == nil) != c.ok {
			t.Errorf("%d bytes: %v", len(msg), err)
		}
	}
}

// spy lets the nameserver answer everything with its own bytes, and returns what it
// got since the last call.
func (n *internet) spy(t testing.TB) func() [][]byte {
	ip := netip.MustParseAddr("10.0.0.99")
	n.write("resolv.conf", "nameserver "+ip.String()+"\n")
	seen := make(chan []byte, 1000)
	echo := func(raw []byte) []byte {
		seen <- slices.Clone(raw)
		reply := slices.Clone(raw)
		reply[2] |= bitResponse
		return reply
	}
	host := n.net.Host(ip)
	pc, err := host.ListenPacket(t.Context(), netip.AddrPortFrom(ip, port))
	if err != nil {
		t.Fatal(err)
	}
	ln, err := host.Listen(t.Context(), netip.AddrPortFrom(ip, port))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for buf := make([]byte, 1<<16); ; {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = pc.WriteTo(echo(buf[:n]), from)
		}
	}()
	streams := make(chan struct{})
	go func() {
		defer close(streams)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			st := &stub{c}
			if raw := st.receive(t); raw != nil {
				st.send(t, echo(raw))
			}
			c.Close()
		}
	}()
	t.Cleanup(func() {
		pc.Close()
		ln.Close()
		<-done
		<-streams
	})
	return func() (out [][]byte) {
		for len(seen) > 0 {
			out = append(out, <-seen)
		}
		return out
	}
}

// provoke sends raw and then a good query: nothing before its answer means that raw
// was dropped.
func (p *pod) provoke(t testing.TB, proto string, raw []byte) (told string, reply []byte) {
	t.Helper()
	const sentinel = 0x5e17
	good := query1("productpage.ns1.svc.cluster.local.", dns.TypeA)
	good.Id = sentinel
	var send func([]byte)
	var receive func() []byte
	if proto == "tcp" {
		c := p.dial(t)
		defer c.Close()
		send, receive = func(b []byte) { c.send(t, b) }, func() []byte { return c.receive(t) }
	} else {
		pc := p.socket(t)
		defer pc.Close()
		send, receive = func(b []byte) { sendTo(t, pc, b) }, func() []byte { return receiveFrom(t, pc) }
	}
	send(raw)
	if proto == "udp" && len(raw) >= headerLen && raw[2]&bitResponse == 0 {
		reply = receive() // what is forwarded comes later than the answer to the next query
	}
	send(packed(t, good))
	last := receive()
	if proto == "tcp" && last != nil && binary.BigEndian.Uint16(last) != sentinel {
		reply, last = last, receive()
	}
	if last == nil || binary.BigEndian.Uint16(last) != sentinel {
		t.Fatalf("the next query got %x", last)
	}
	if reply == nil {
		return "dropped", nil
	}
	switch {
	case !bytes.Equal(reply[:2], raw[:2]):
		t.Errorf("got ID %x, want that of %x", reply[:2], raw[:2])
	case reply[2]&bitAuthoritative != 0:
		return "AA", reply
	}
	return rcodeText(rcode(reply)), reply
}

// A datagram that fills all the room may have been longer: it is not passed on.
func TestFault_125_LongDatagram(t *testing.T) {
	n := newInternet(t, plainConf, nil)
	forwarded := n.spy(t)
	p := n.newPod(t, ServerConfig{Store: fixture(t)})
	m := query1("long.example.", dns.TypeA)
	o := &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}}
	o.Option = []dns.EDNS0{&dns.EDNS0_PADDING{Padding: make([]byte, 5000)}}
	m.Extra = []dns.RR{o}
	raw := packed(t, m)
	if got, _ := p.provoke(t, "udp", raw); got != "FORMERR" {
		t.Errorf("udp: got %s", got)
	}
	if got := len(forwarded()); got != 0 {
		t.Errorf("%d messages were passed on", got)
	}
	if p.exchange(t, "tcp", raw); len(forwarded()) != 1 {
		t.Error("tcp: not passed on")
	}
	big := slices.Concat(raw, make([]byte, 65535-len(raw)))
	if reply := p.exchange(t, "tcp", big); len(reply) != len(big) {
		t.Errorf("65535 bytes by TCP: got %d back", len(reply))
	}
}

// TestFault_125_NoOpenResolver: whoever is not in the namespace gets no answer, even
// if the kernel lets its packets through.
func TestFault_125_NoOpenResolver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newInternet(t, plainConf, bing(t))
		p := n.newPod(t, ServerConfig{Store: fixture(t), Addrs: []netip.AddrPort{proxyAddr},
			Network: anywhere{n, netip.MustParseAddrPort("0.0.0.0:15053")}})
		raw := packed(t, query1("productpage.ns1.", dns.TypeA))
		spy := n.net.Host(spyIP)
		pc, err := spy.ListenPacket(t.Context(), netip.AddrPortFrom(spyIP, 0))
		if err != nil {
			t.Fatal(err)
		}
		defer pc.Close()
		if _, err := pc.WriteTo(raw, net.UDPAddrFromAddrPort(netip.AddrPortFrom(ourIP, proxyAddr.Port()))); err != nil {
			t.Fatal(err)
		}
		if got := receiveFrom(t, pc); got != nil {
			t.Errorf("udp: a stranger got %x", got)
		}
		c, err := spy.Dial(t.Context(), netip.Addr{}, netip.AddrPortFrom(ourIP, proxyAddr.Port()))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_, _ = c.Write(join("\x00"+string(rune(len(raw))), raw))
		if got := (&stub{c}).receive(t); got != nil {
			t.Errorf("tcp: a stranger got %x", got)
		}
		// A client of the same host that comes to the address of the host: only the
		// loopback address is ours.
		c, err = p.host.Dial(t.Context(), netip.Addr{}, netip.AddrPortFrom(ourIP, proxyAddr.Port()))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if got := (&stub{c}).receive(t); got != nil {
			t.Errorf("tcp to another address: got %x", got)
		}
		if got := told(p.ask(t, "udp", query1("productpage.ns1.", dns.TypeA))); got != "AA productpage.ns1. A 9.9.9.9" {
			t.Errorf("a client: got %q", got)
		}
		time.Sleep(time.Second)
	})
}
