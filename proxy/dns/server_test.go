package dns

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/miekg/dns"
	"go.uber.org/goleak"

	"github.com/ztunnel-go/ztunnel/proxy/netns/memnet"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	ourIP   = netip.MustParseAddr("10.0.0.1")
	firstIP = netip.MustParseAddr("10.0.0.53")
	nextIP  = netip.MustParseAddr("10.0.0.54")
	spyIP   = netip.MustParseAddr("10.0.0.66")
)

// request is one message that a nameserver got.
type request struct {
	*dns.Msg
	raw   []byte
	proto string // "udp" or "tcp"
	from  net.Addr
	send  func([]byte)
}

func (r *request) name() string { return r.Question[0].Name }

// reply answers with records, in the notation of a zone file.
func (r *request) reply(t testing.TB, rcode int, records ...string) *dns.Msg {
	m := new(dns.Msg).SetRcode(r.Msg, rcode)
	for _, text := range records {
		rr, err := dns.NewRR(text)
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		if rr.Header().Rrtype == dns.TypeSOA {
			m.Ns = append(m.Ns, rr)
		} else {
			m.Answer = append(m.Answer, rr)
		}
	}
	return m
}

// answer sends a reply, by UDP cut off where it must be.
func (r *request) answer(t testing.TB, rcode int, records ...string) {
	m := r.reply(t, rcode, records...)
	if r.proto == "udp" {
		m.Truncate(512)
	}
	r.send(packed(t, m))
}

func packed(t testing.TB, m *dns.Msg) []byte {
	b, err := m.Pack()
	if err != nil {
		t.Error(err)
	}
	return b
}

// reflected answers <ip>.reflect.internal. with that address, TTL 5, and no other
// name.
func reflected(t testing.TB) func(*request) {
	return func(r *request) {
		text, ok := strings.CutSuffix(r.name(), ".reflect.internal.")
		ip, err := netip.ParseAddr(text)
		if !ok || err != nil {
			r.answer(t, dns.RcodeNameError)
			return
		}
		if qtype := map[bool]uint16{true: dns.TypeA, false: dns.TypeAAAA}[ip.Is4()]; qtype != r.Question[0].Qtype {
			r.answer(t, dns.RcodeSuccess)
			return
		}
		r.answer(t, dns.RcodeSuccess, r.name()+" 5 IN "+dns.TypeToString[r.Question[0].Qtype]+" "+text)
	}
}

// zone answers from records, in the notation of a zone file, following their
// aliases; what it does not know does not exist.
func zone(t testing.TB, records ...string) func(*request) {
	const soa = "example. 60 IN SOA ns.example. root.example. 1 2 3 4 20"
	return func(r *request) {
		var out []string
		known, found, name := false, false, r.name()
		for range 20 {
			next := ""
			for _, text := range records {
				f := strings.Fields(text)
				if !strings.EqualFold(f[0], name) {
					continue
				}
				known = true
				if f[3] == "CNAME" {
					out, next = append(out, text), f[4]
				} else if dns.StringToType[f[3]] == r.Question[0].Qtype {
					out, found = append(out, text), true
				}
			}
			if next == "" {
				break
			}
			name = next
		}
		switch {
		case !known:
			r.answer(t, dns.RcodeNameError, soa)
		case !found:
			r.answer(t, dns.RcodeSuccess, append(out, soa)...)
		default:
			r.answer(t, dns.RcodeSuccess, out...)
		}
	}
}

// nameserver is a DNS server that does what its handler wants.
type nameserver struct {
	t  testing.TB
	wg sync.WaitGroup

	mu     sync.Mutex // guards the rest
	handle func(*request)
	asked  []string // "udp A name.", in order
	ids    []uint16
	ports  []string
}

func (s *nameserver) set(handle func(*request)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.handle = handle
}

// questions returns what was asked since the last call, sorted.
func (s *nameserver) questions() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	asked := s.asked
	s.asked = nil
	slices.Sort(asked)
	return asked
}

func (s *nameserver) got(proto string, raw []byte, from net.Addr, send func([]byte)) {
	m := new(dns.Msg)
	if err := m.Unpack(raw); err != nil || len(m.Question) != 1 || !m.RecursionDesired {
		s.t.Errorf("bad query %x: %v", raw, err)
		return
	}
	s.mu.Lock()
	s.asked = append(s.asked, proto+" "+question{m.Question[0].Name, m.Question[0].Qtype}.String())
	s.ids = append(s.ids, m.Id)
	s.ports = append(s.ports, from.String())
	handle := s.handle
	s.mu.Unlock()
	if handle != nil {
		handle(&request{Msg: m, raw: raw, proto: proto, from: from, send: send})
	}
}

func (s *nameserver) serveUDP(pc net.PacketConn) {
	for buf := make([]byte, 4096); ; {
		n, from, err := pc.ReadFrom(buf)
		if err != nil {
			return
		}
		s.got("udp", slices.Clone(buf[:n]), from, func(b []byte) { _, _ = pc.WriteTo(b, from) })
	}
}

func (s *nameserver) serveTCP(accept func() (net.Conn, error)) {
	for {
		c, err := accept()
		if err != nil {
			return
		}
		s.wg.Go(func() {
			defer c.Close()
			var length [2]byte
			if _, err := io.ReadFull(c, length[:]); err != nil {
				return
			}
			raw := make([]byte, binary.BigEndian.Uint16(length[:]))
			if _, err := io.ReadFull(c, raw); err != nil {
				return
			}
			s.got("tcp", raw, c.RemoteAddr(), func(b []byte) {
				_, _ = c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...))
			})
			_, _ = c.Read(length[:]) // until the client has what it wants
		})
	}
}

// internet is a network in memory with a resolver and nameservers.
type internet struct {
	t        *testing.T
	net      *memnet.Internet
	dir      string
	first    *nameserver
	next     *nameserver
	resolver *Resolver
}

// newInternet has the nameservers of firstIP and nextIP; conf is resolv.conf.
func newInternet(t *testing.T, conf string, handle func(*request)) *internet {
	t.Helper()
	n := &internet{t: t, net: memnet.New(memnet.Config{}), dir: t.TempDir()}
	n.first, n.next = n.serve(firstIP, handle), n.serve(nextIP, handle)
	n.write("resolv.conf", conf)
	n.write("hosts", "")
	n.resolver = n.newResolver(ResolverConfig{IPv6: true})
	return n
}

func (n *internet) write(file, text string) {
	n.t.Helper()
	write(n.t, filepath.Join(n.dir, file), text)
}

func write(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (n *internet) newResolver(cfg ResolverConfig) *Resolver {
	n.t.Helper()
	if cfg.Dial == nil {
		cfg.Dial = Over(n.net.Host(ourIP))
	}
	cfg.ResolvConf, cfg.Hosts = filepath.Join(n.dir, "resolv.conf"), filepath.Join(n.dir, "hosts")
	r, err := NewResolver(cfg)
	if err != nil {
		n.t.Fatal(err)
	}
	return r
}

func (n *internet) serve(ip netip.Addr, handle func(*request)) *nameserver {
	n.t.Helper()
	s := &nameserver{t: n.t, handle: handle}
	host := n.net.Host(ip)
	pc, err := host.ListenPacket(n.t.Context(), netip.AddrPortFrom(ip, port))
	if err != nil {
		n.t.Fatal(err)
	}
	ln, err := host.Listen(n.t.Context(), netip.AddrPortFrom(ip, port))
	if err != nil {
		n.t.Fatal(err)
	}
	s.wg.Go(func() { s.serveUDP(pc) })
	s.wg.Go(func() { s.serveTCP(func() (net.Conn, error) { return ln.Accept() }) })
	n.t.Cleanup(func() {
		_ = errors.Join(pc.Close(), ln.Close())
		s.wg.Wait()
	})
	return s
}

// expect looks host up and compares, in order.
func (n *internet) expect(host string, want ...string) {
	n.t.Helper()
	got, err := n.resolver.Lookup(n.t.Context(), host)
	if err != nil {
		n.t.Errorf("Lookup(%q): %v", host, err)
		return
	}
	equalAddrs(n.t, host, got, want...)
}

func equalAddrs(t testing.TB, host string, got []netip.Addr, want ...string) {
	t.Helper()
	var texts []string
	for _, ip := range got {
		texts = append(texts, ip.String())
	}
	if !slices.Equal(texts, want) {
		t.Errorf("Lookup(%q) = %q, want %q", host, texts, want)
	}
}

func equalQuestions(t testing.TB, s *nameserver, want ...string) {
	t.Helper()
	if got := s.questions(); !slices.Equal(got, want) {
		t.Errorf("asked %q, want %q", got, want)
	}
}
