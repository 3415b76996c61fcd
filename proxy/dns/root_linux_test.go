package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

const mark = 1337

var (
	podIP     = netip.MustParseAddr("10.98.7.2") // of the pod
	outsideIP = netip.MustParseAddr("10.98.7.1") // of another host
	clusterIP = netip.MustParseAddrPort("10.96.0.10:53")
	serial    atomic.Int32
)

// namespace is a network namespace with a veth to another one, in which everything
// else is.
type namespace struct {
	name, outside string
	file          *os.File
}

// requireRoot skips without root, except where such a skip would hide that a test
// never runs.
func requireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") != "" || os.Getenv("ZTUNNEL_REQUIRE_ROOT") == "1" {
		t.Fatal("needs root, and CI or ZTUNNEL_REQUIRE_ROOT=1 forbids to skip")
	}
	t.Skip("needs root")
}

func newNamespace(t testing.TB) *namespace {
	t.Helper()
	requireRoot(t)
	id := serial.Add(1)
	ns := &namespace{name: fmt.Sprintf("zt-%d-dns%d", os.Getpid(), id), outside: fmt.Sprintf("zt-%d-out%d", os.Getpid(), id)}
	for _, name := range []string{ns.name, ns.outside} {
		run(t, "ip netns add "+name)
		t.Cleanup(func() { run(t, "ip netns del "+name) })
		run(t, "ip -n "+name+" link set lo up")
	}
	run(t, "ip -n "+ns.name+" link add eth0 type veth peer name eth0 netns "+ns.outside)
	for name, addr := range map[string]string{ns.name: podIP.String(), ns.outside: outsideIP.String()} {
		run(t, "ip -n "+name+" addr add "+addr+"/24 dev eth0")
		run(t, "ip -n "+name+" link set eth0 up")
	}
	run(t, "ip -n "+ns.name+" route add default via "+outsideIP.String())
	var err error
	if ns.file, err = os.Open("/var/run/netns/" + ns.name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.file.Close() })
	return ns
}

func run(t testing.TB, line string) {
	t.Helper()
	args := strings.Fields(line)
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", line, err, out)
	}
}

func (ns *namespace) run(t testing.TB, line string) {
	t.Helper()
	run(t, "ip netns exec "+ns.name+" "+line)
}

// redirect has the rules of the CNI agent for DNS, which leave packets with the
// mark alone.
func (ns *namespace) redirect(t testing.TB, marked uint32) {
	for _, proto := range protocols {
		ns.run(t, fmt.Sprintf("iptables -w -t nat -A OUTPUT -p %s --dport 53 -m mark ! --mark 0x%x -j REDIRECT --to-ports 15053", proto, marked))
	}
}

func (ns *namespace) network(t testing.TB, cfg netns.PodConfig) *netns.Pod {
	t.Helper()
	p, err := netns.NewPod(ns.file, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// real is a server in a namespace.
type real struct {
	*Server
	log    *logged
	cancel context.CancelFunc
	done   chan struct{}
}

func (ns *namespace) serve(t testing.TB, resolvConf string) *real {
	t.Helper()
	r := &real{log: &logged{}, done: make(chan struct{})}
	conf := filepath.Join(t.TempDir(), "resolv.conf")
	write(t, conf, resolvConf)
	store := fixture(t)
	var err error
	r.Server, err = NewServer(ServerConfig{
		Store: store, Local: localOf(store, client1), Network: ns.network(t, netns.PodConfig{Mark: mark, PortReuse: true}),
		Addrs: []netip.AddrPort{proxyAddr, proxyAddr6}, IPv6: true, Metrics: NewMetrics(prometheus.NewRegistry()),
		Files: NewFiles(conf, conf, nil), Logger: slog.New(r.log),
	})
	if err == nil {
		err = r.Listen(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	r.cancel = cancel
	go func() {
		defer close(r.done)
		if err := r.Run(ctx); err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-r.done
	})
	return r
}

// ask sends one query as an application does, from a socket of its own, and only
// once. It is nil if no answer comes.
func ask(ctx context.Context, n netns.Network, proto string, server netip.AddrPort, m *dns.Msg) (*dns.Msg, error) {
	raw, err := m.Pack()
	if err != nil {
		return nil, err
	}
	c, err := Over(n)(ctx, proto, server)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	exchange := askDatagram
	if proto == "tcp" {
		exchange = askStream
	}
	reply, err := exchange(c, raw)
	if err != nil {
		return nil, err
	}
	out := new(dns.Msg)
	return out, out.Unpack(reply)
}

// upstream is a nameserver outside that knows www.bing.com.
func (ns *namespace) upstream(t testing.TB) {
	t.Helper()
	file, err := os.Open("/var/run/netns/" + ns.outside)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	n, err := netns.NewPod(file, netns.PodConfig{})
	if err != nil {
		t.Fatal(err)
	}
	pc, err := n.ListenPacket(t.Context(), netip.AddrPortFrom(outsideIP, port))
	if err != nil {
		t.Fatal(err)
	}
	s := &nameserver{t: t, handle: bing(t)}
	s.wg.Go(func() { s.serveUDP(pc) })
	t.Cleanup(func() {
		pc.Close()
		s.wg.Wait()
	})
}

// What applications ask their nameserver is redirected to us, with the pod's own
// address as the source, and answered from the store or by the nameserver.
func TestRedirectedQueries(t *testing.T) {
	ns := newNamespace(t)
	ns.redirect(t, mark)
	ns.upstream(t)
	r := ns.serve(t, "nameserver "+outsideIP.String()+"\n")
	app := ns.network(t, netns.PodConfig{IPv6Enabled: true})
	for _, proto := range protocols {
		for name, want := range map[string]string{
			"productpage.":  "AA productpage. A 9.9.9.9",
			"www.bing.com.": "www.bing.com. A 1.1.1.1, additional www.bing.com. AAAA ::1",
		} {
			if proto == "tcp" && name == "www.bing.com." {
				continue // our nameserver speaks UDP only, which is asked first
			}
			m, err := ask(t.Context(), app, proto, clusterIP, query1(name, dns.TypeA))
			if err != nil || told(m) != want {
				t.Errorf("%s %s: got %q, %v; want %q", proto, name, told(m), err, want)
			}
		}
	}
	if m, err := ask(t.Context(), app, "udp", proxyAddr6, query1("productpage.", dns.TypeA)); err != nil || told(m) != "AA productpage. A 9.9.9.9" {
		t.Errorf("by IPv6: got %q, %v", told(m), err)
	}
	if got := r.log.count("WARN"); got > 0 {
		t.Errorf("%d warnings: %q", got, r.log.lines)
	}
}

// Rules that do not know the mark lead our queries back to us: that is found out, and
// told of.
func TestRedirectedToOurselves(t *testing.T) {
	ns := newNamespace(t)
	ns.redirect(t, mark+1)
	r := ns.serve(t, "nameserver "+outsideIP.String()+"\noptions attempts:1\n")
	app := ns.network(t, netns.PodConfig{IPv6Enabled: true})
	for _, proto := range protocols {
		m, err := ask(t.Context(), app, proto, clusterIP, query1("www.bing.com.", dns.TypeA))
		if err != nil || told(m) != "SERVFAIL" {
			t.Errorf("%s: got %q, %v; want SERVFAIL", proto, told(m), err)
		}
	}
	if got := r.log.count("redirected to the proxy itself"); got != 1 {
		t.Errorf("%d warnings, want 1", got)
	}
}

// TestFault_125_StrangersInTheNetwork: even where the kernel routes packets of other
// hosts to loopback addresses, they get no answer.
func TestFault_125_StrangersInTheNetwork(t *testing.T) {
	ns := newNamespace(t)
	ns.run(t, "sysctl -qw net.ipv4.conf.all.route_localnet=1 net.ipv4.conf.eth0.route_localnet=1")
	for _, proto := range protocols {
		ns.run(t, "iptables -w -t nat -A PREROUTING -p "+proto+" --dport 53 -j DNAT --to-destination 127.0.0.1:15053")
	}
	r := ns.serve(t, "nameserver "+outsideIP.String()+"\n")
	file, err := os.Open("/var/run/netns/" + ns.outside)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	stranger, err := netns.NewPod(file, netns.PodConfig{})
	if err != nil {
		t.Fatal(err)
	}
	m, err := ask(t.Context(), stranger, "tcp", netip.AddrPortFrom(podIP, 53), query1("productpage.", dns.TypeA))
	if err == nil {
		t.Errorf("tcp: a stranger got %q", told(m))
	}
	c, err := Over(stranger)(t.Context(), "udp", netip.AddrPortFrom(podIP, 53))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write(packed(t, query1("productpage.", dns.TypeA))); err != nil {
		t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
	if n, err := c.Read(make([]byte, 512)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("udp: a stranger got %d bytes, %v", n, err)
	}
	if got := r.log.count("not of this network namespace"); got != 1 {
		t.Errorf("%d warnings, want 1: the packets have not come this far", got)
	}
}

// Two proxies share the ports. When the old one is drained, the new one gets what
// comes, and nothing is lost on the way: every query is asked once.
func TestHandOver(t *testing.T) {
	ns := newNamespace(t)
	ns.redirect(t, mark)
	before := ns.serve(t, "nameserver "+outsideIP.String()+"\n")
	app := ns.network(t, netns.PodConfig{IPv6Enabled: true})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var asking sync.WaitGroup
	defer asking.Wait()
	defer cancel()
	var answers [2]atomic.Int64
	for i := range 8 {
		asking.Go(func() {
			for ctx.Err() == nil {
				m, err := ask(ctx, app, protocols[i%2], clusterIP, query1("productpage.", dns.TypeA))
				if ctx.Err() != nil {
					return
				}
				if err != nil || told(m) != "AA productpage. A 9.9.9.9" {
					t.Errorf("%s: got %q, %v", protocols[i%2], told(m), err)
					return
				}
				answers[i%2].Add(1)
			}
		})
	}
	reached := func(more int64) {
		t.Helper()
		for i := range answers {
			for until := answers[i].Load() + more; answers[i].Load() < until && !t.Failed(); {
				time.Sleep(time.Millisecond)
			}
		}
	}
	for range 3 {
		reached(100)
		next := ns.serve(t, "nameserver "+outsideIP.String()+"\n")
		reached(100) // both answer
		before.Drain()
		reached(100)
		<-before.done
		reached(100)
		before = next
	}
}

// A server takes what has come to its queue while nobody read, even when it is drained
// at once.
func TestDrainAnswersTheQueue(t *testing.T) {
	ns := newNamespace(t)
	store := fixture(t)
	s, err := NewServer(ServerConfig{
		Store: store, Local: localOf(store, client1), Network: ns.network(t, netns.PodConfig{PortReuse: true}),
		Addrs: []netip.AddrPort{proxyAddr}, Metrics: NewMetrics(prometheus.NewRegistry()),
	})
	if err == nil {
		err = s.Listen(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	app := ns.network(t, netns.PodConfig{IPv6Enabled: true})
	c, err := Over(app)(t.Context(), "udp", proxyAddr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const queries = 50
	raw := packed(t, query1("productpage.", dns.TypeA))
	for range queries {
		if _, err := c.Write(raw); err != nil {
			t.Fatal(err)
		}
	}
	sockets, _, err := s.start()
	if err != nil {
		t.Fatal(err)
	}
	s.Drain() // before anything was read
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	s.serveUDP(t.Context(), ended, sockets[0])
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	for i := range queries {
		if _, err := c.Read(make([]byte, 512)); err != nil {
			t.Fatalf("answer %d: %v", i, err)
		}
	}
}

// A socket that leaves its group gets nothing more of what comes to the port, keeps
// what it has queued, and still answers.
func TestLeaveGroup(t *testing.T) {
	ns := newNamespace(t)
	app := ns.network(t, netns.PodConfig{IPv6Enabled: true})
	for _, addr := range []netip.AddrPort{proxyAddr, proxyAddr6} {
		member := func() *net.UDPConn {
			pc, err := ns.network(t, netns.PodConfig{Mark: mark, PortReuse: true, IPv6Enabled: true}).ListenPacket(t.Context(), addr)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { pc.Close() })
			return pc.(*net.UDPConn)
		}
		old, next := member(), member()
		const each = 100
		send := func(text string) {
			for range each {
				c, err := Over(app)(t.Context(), "udp", addr)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { c.Close() })
				if _, err := c.Write([]byte(text)); err != nil {
					t.Fatal(err)
				}
			}
		}
		received := func(c *net.UDPConn) map[string]int {
			counts := map[string]int{}
			buf := make([]byte, 16)
			for {
				_ = c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
				n, peer, err := c.ReadFromUDPAddrPort(buf)
				if err != nil {
					return counts
				}
				counts[string(buf[:n])]++
				if _, err := c.WriteToUDPAddrPort(buf[:n], peer); err != nil {
					t.Errorf("%v: answer to %v: %v", addr, peer, err)
				}
			}
		}
		send("before")
		if err := leaveGroup(old); err != nil {
			t.Fatal(err)
		}
		send("after")
		a, b := received(old), received(next)
		if a["before"] == 0 || a["before"]+b["before"] != each || a["after"] != 0 || b["after"] != each {
			t.Errorf("%v: who left got %v, the other %v", addr, a, b)
		}
	}
}
