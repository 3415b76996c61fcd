//go:build e2e

package world

import (
	"net/netip"
	"strings"
	"sync"

	"github.com/miekg/dns"
)

// ServeDNS gives the pod a nameserver on its loopback, and a resolv.conf that
// names it to the programs that start from then on. It knows the addresses of
// these names, in lower case, and denies that there are others.
func (p *Pod) ServeDNS(names map[string]netip.Addr) {
	p.W.T.Helper()
	loopback := netip.MustParseAddr("127.0.0.1")
	p.Nameserver(loopback, names)
	p.ResolvConf("nameserver " + loopback.String() + "\n")
}

// ResolvConf is what programs that start in the pod from then on find in
// /etc/resolv.conf.
func (p *Pod) ResolvConf(content string) {
	p.W.T.Helper()
	if err := p.lab.WriteEtc("resolv.conf", content); err != nil {
		p.W.T.Fatal(err)
	}
}

// Nameserver serves these names, in lower case and without a dot at the end, on
// an address of the pod, by UDP and TCP, until the test ends. It denies that there
// are others.
func (p *Pod) Nameserver(addr netip.Addr, names map[string]netip.Addr) {
	t := p.W.T
	t.Helper()
	pc, err := p.Net.ListenPacket(p.W.Ctx, netip.AddrPortFrom(addr, 53))
	if err != nil {
		t.Fatal(err)
	}
	ln, err := p.Net.Listen(p.W.Ctx, netip.AddrPortFrom(addr, 53))
	if err != nil {
		t.Fatal(err)
	}
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) { _ = w.WriteMsg(answer(names, q)) })
	var servers sync.WaitGroup
	for _, srv := range []*dns.Server{{PacketConn: pc, Handler: handler}, {Listener: NetListener(ln), Handler: handler}} {
		servers.Go(func() { _ = srv.ActivateAndServe() })
		t.Cleanup(func() { _ = srv.Shutdown() })
	}
	t.Cleanup(func() {
		_ = pc.Close()
		_ = ln.Close()
		servers.Wait()
	})
}

func answer(names map[string]netip.Addr, q *dns.Msg) *dns.Msg {
	m := new(dns.Msg).SetReply(q)
	m.Authoritative = true
	for _, question := range q.Question {
		addr, ok := names[strings.ToLower(strings.TrimSuffix(question.Name, "."))]
		if !ok {
			m.Rcode = dns.RcodeNameError
			continue
		}
		head := dns.RR_Header{Name: question.Name, Class: dns.ClassINET, Ttl: 30}
		switch {
		case question.Qtype == dns.TypeA && addr.Is4():
			head.Rrtype = dns.TypeA
			m.Answer = append(m.Answer, &dns.A{Hdr: head, A: addr.AsSlice()})
		case question.Qtype == dns.TypeAAAA && addr.Is6():
			head.Rrtype = dns.TypeAAAA
			m.Answer = append(m.Answer, &dns.AAAA{Hdr: head, AAAA: addr.AsSlice()})
		}
	}
	return m
}
