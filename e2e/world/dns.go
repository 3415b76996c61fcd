//go:build e2e

package world

import (
	"net/netip"
	"os"
	"path/filepath"

	"github.com/miekg/dns"
)

// etcDir holds, by namespace, what "ip netns exec" mounts over /etc.
const etcDir = "/etc/netns"

// ServeDNS gives the pod a nameserver on its loopback, and a resolv.conf that
// names it to the programs that start from then on. It knows the addresses of
// these names, in lower case, and denies that there are others.
func (p *Pod) ServeDNS(names map[string]netip.Addr) {
	t := p.W.T
	t.Helper()
	pc, err := p.Net.ListenPacket(p.W.Ctx, netip.MustParseAddrPort("127.0.0.1:53"))
	if err != nil {
		t.Fatal(err)
	}
	srv := &dns.Server{PacketConn: pc, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetReply(q)
		m.Authoritative = true
		for _, question := range q.Question {
			name := question.Name[:len(question.Name)-1]
			addr, ok := names[name]
			if !ok {
				m.Rcode = dns.RcodeNameError
				continue
			}
			head := dns.RR_Header{Name: question.Name, Class: dns.ClassINET, Ttl: 30}
			if question.Qtype == dns.TypeA && addr.Is4() {
				head.Rrtype = dns.TypeA
				m.Answer = append(m.Answer, &dns.A{Hdr: head, A: addr.AsSlice()})
			}
		}
		_ = w.WriteMsg(m)
	})}
	done := make(chan error, 1)
	go func() { done <- srv.ActivateAndServe() }()
	t.Cleanup(func() {
		_ = pc.Close()
		<-done
	})
	dir := filepath.Join(etcDir, p.NS) // goes with the namespace
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "resolv.conf"), []byte("nameserver 127.0.0.1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
}
