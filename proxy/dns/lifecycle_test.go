package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/proxy/netns/memnet"
)

// Bind holds the TCP ports, which take no connections, and leaves UDP alone
// (decision D13); a conflict is told at once, and nothing is held then.
func TestBind(t *testing.T) {
	n := newInternet(t, plainConf, bing(t))
	p := n.makePod(t, ServerConfig{Store: fixture(t)})
	if err := p.server.Bind(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := p.server.Bind(t.Context()); err != nil {
		t.Errorf("a second time: %v", err)
	}
	if c, err := p.host.Dial(t.Context(), netip.Addr{}, proxyAddr); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a connection: got %v, %v", c, err)
	}
	pc, err := p.host.ListenPacket(t.Context(), proxyAddr)
	if err != nil {
		t.Fatalf("UDP is taken: %v", err)
	}
	pc.Close()
	next := n.makePod(t, ServerConfig{Store: fixture(t)})
	if err := next.server.Bind(t.Context()); err == nil || !strings.Contains(err.Error(), "DNS listener: failed to bind to address 127.0.0.1:15053: ") {
		t.Errorf("a conflict: got %v", err)
	}
	p.run(t)
	for _, proto := range protocols {
		if got := told(p.ask(t, proto, query1("productpage.", dns.TypeA))); got != "AA productpage. A 9.9.9.9" {
			t.Errorf("%s: got %q", proto, got)
		}
	}
	if err := p.server.Check(); err != nil {
		t.Error(err)
	}
}

// Listen opens everything or nothing.
func TestListenConflict(t *testing.T) {
	n := newInternet(t, plainConf, nil)
	p := n.makePod(t, ServerConfig{Store: fixture(t)})
	if err := p.server.Run(t.Context()); err == nil {
		t.Error("Run without Listen: no error")
	}
	blocker, err := p.host.ListenPacket(t.Context(), proxyAddr6)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.server.Listen(t.Context()); err == nil || !strings.Contains(err.Error(), "failed to bind to address [::1]:15053") {
		t.Errorf("got %v", err)
	}
	for _, addr := range []netip.AddrPort{proxyAddr, proxyAddr6} {
		ln, err := p.host.Listen(t.Context(), addr)
		if err != nil {
			t.Fatalf("it is still held: %v", err)
		}
		ln.Close()
	}
	blocker.Close()
	p.run(t) // it may be tried again
	if err := p.server.Listen(t.Context()); err == nil {
		t.Error("Listen twice: no error")
	}
	p.ask(t, "udp", query1("productpage.", dns.TypeA)) // it runs
	if err := p.server.Run(t.Context()); err == nil {
		t.Error("Run twice: no error")
	}
}

// Without Run, Drain closes everything; afterwards nothing is opened.
func TestDrainWithoutRun(t *testing.T) {
	n := newInternet(t, plainConf, nil)
	for _, prepare := range []func(*Server) error{
		func(s *Server) error { return nil },
		func(s *Server) error { return s.Bind(t.Context()) },
		func(s *Server) error { return s.Listen(t.Context()) },
	} {
		p := n.makePod(t, ServerConfig{Store: fixture(t)})
		if err := prepare(p.server); err != nil {
			t.Fatal(err)
		}
		p.server.Drain()
		p.server.Drain()
		for name, err := range map[string]error{"Bind": p.server.Bind(t.Context()), "Listen": p.server.Listen(t.Context()), "Run": p.server.Run(t.Context())} {
			if !errors.Is(err, ErrDrained) {
				t.Errorf("%s after Drain: got %v", name, err)
			}
		}
	}
}

// noIPv6 is a network whose loopback interface has no IPv6 address.
type noIPv6 struct{ *memnet.Host }

func (n noIPv6) Bind(ctx context.Context, addr netip.AddrPort) (netns.Bound, error) {
	if addr.Addr().Is6() {
		return nil, fmt.Errorf("failed to bind to address %v: %w", addr, syscall.EADDRNOTAVAIL)
	}
	return n.Host.Bind(ctx, addr)
}

// A namespace without an IPv6 loopback address is served by IPv4.
func TestNoIPv6Loopback(t *testing.T) {
	n := newInternet(t, plainConf, bing(t))
	network := noIPv6{n.net.Host(ourIP)}
	p := n.newPod(t, ServerConfig{Store: fixture(t), IPv6: true, Network: network})
	if got := told(p.ask(t, "udp", query1("dual.localhost.", dns.TypeAAAA))); got != "AA dual.localhost. AAAA 2001:db8::ff00:42:8329" {
		t.Errorf("got %q", got)
	}
	if len(p.server.sockets) != 1 || len(p.server.listeners) != 1 {
		t.Errorf("%d sockets, %d listeners, want those of IPv4", len(p.server.sockets), len(p.server.listeners))
	}
	p = n.makePod(t, ServerConfig{Store: fixture(t), Network: network, Addrs: []netip.AddrPort{proxyAddr6}})
	if err := p.server.Bind(t.Context()); !errors.Is(err, syscall.EADDRNOTAVAIL) {
		t.Errorf("with nothing left: got %v", err)
	}
}

// What came before Drain is answered: queries that are under way, those that are
// queued, connections that are open or come within a second.
func TestDrain(t *testing.T) {
	inTCP(t, ServerConfig{}, func(t *testing.T, n *internet, p *pod) {
		pc, idle, busy := p.socket(t), p.dial(t), p.dial(t)
		defer pc.Close()
		sendTo(t, pc, packed(t, query1("slow.4.example.", dns.TypeA)))
		busy.ask(t, "slow.3.example.", "productpage.")
		synctest.Wait()
		start := time.Now()
		p.server.Drain()
		p.server.Drain()
		sendTo(t, pc, packed(t, query1("example.ns2.", dns.TypeA)))
		if got := receiveFrom(t, pc); rcode(got) != dns.RcodeSuccess || time.Since(start) != 0 {
			t.Errorf("a datagram that was on its way: got %x after %v", got, time.Since(start))
		}
		late := p.dial(t)
		time.Sleep(linger / 2)
		late.ask(t, "productpage.")
		idle.ask(t, "example.ns2.")
		for name, c := range map[string]*stub{"productpage.": late, "example.ns2.": idle} {
			if got := c.names(t, 1); got[0] != name {
				t.Errorf("got %q, want %q", got, name)
			}
			if got := c.receive(t); got != nil {
				t.Errorf("got %x, want the end", got)
			}
			c.Close()
		}
		if _, err := p.host.Dial(t.Context(), netip.Addr{}, proxyAddr); err == nil {
			t.Error("connections are still taken")
		}
		if got := busy.names(t, 3); got[0] != "slow.3.example." || got[1] != "productpage." || got[2] != "end" {
			t.Errorf("got %q", got)
		}
		busy.Close()
		if got := receiveFrom(t, pc); rcode(got) != dns.RcodeSuccess || time.Since(start) != 4*time.Second {
			t.Errorf("what was under way: got %x after %v", got, time.Since(start))
		}
		<-p.done
		if d := time.Since(start); p.err != nil || d != 4*time.Second {
			t.Errorf("Run has returned %v after %v", p.err, d)
		}
		if err := p.server.Check(); err != nil {
			t.Errorf("Check: %v", err)
		}
	})
}

// The end of the context is the end of everything.
func TestRunEnds(t *testing.T) {
	inTCP(t, ServerConfig{}, func(t *testing.T, n *internet, p *pod) {
		pc, busy, idle := p.socket(t), p.dial(t), p.dial(t)
		defer pc.Close()
		sendTo(t, pc, packed(t, query1("slow.4.example.", dns.TypeA)))
		busy.ask(t, "slow.3.example.")
		synctest.Wait()
		start := time.Now()
		p.cancel()
		<-p.done
		for _, c := range []*stub{busy, idle} {
			if got := c.receive(t); got != nil {
				t.Errorf("got %x", got)
			}
			c.Close()
		}
		if d := time.Since(start); p.err != nil || d != 0 {
			t.Errorf("Run has returned %v after %v", p.err, d)
		}
		equals(t, float64(p.server.pending.taken.Load()), 0)
		equals(t, float64(len(p.server.conns)), 0)
	})
}

// broken is a network whose UDP sockets fail as long as it says so.
type broken struct {
	*memnet.Host
	failing atomic.Bool
}

func (b *broken) ListenPacket(ctx context.Context, addr netip.AddrPort) (net.PacketConn, error) {
	pc, err := b.Host.ListenPacket(ctx, addr)
	return &brokenConn{pc, b}, err
}

type brokenConn struct {
	net.PacketConn
	b *broken
}

func (c *brokenConn) ReadFrom(p []byte) (int, net.Addr, error) {
	if c.b.failing.Load() {
		return 0, nil, syscall.ENOMEM
	}
	return c.PacketConn.ReadFrom(p)
}

// A socket that fails is told of, and tried again; a listener that somebody has
// destroyed is told of.
func TestCheck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newInternet(t, plainConf, bing(t))
		network := &broken{Host: n.net.Host(ourIP)}
		p := n.makePod(t, ServerConfig{Store: fixture(t), Network: network})
		if err := p.server.Check(); err != nil {
			t.Errorf("before Listen: %v", err)
		}
		network.failing.Store(true)
		p.run(t)
		time.Sleep(10 * time.Second)
		if err := p.server.Check(); !errors.Is(err, syscall.ENOMEM) || !strings.Contains(err.Error(), "DNS listener 127.0.0.1:15053 (udp)") {
			t.Errorf("got %v", err)
		}
		if got := p.log.count("DNS queries can't be received"); got != 2 {
			t.Errorf("%d lines, want one for each socket", got)
		}
		network.failing.Store(false)
		time.Sleep(2 * time.Second)
		for _, addr := range []netip.AddrPort{proxyAddr, proxyAddr6} {
			p.addr = addr
			if got := told(p.ask(t, "tcp", query1("productpage.", dns.TypeA))); !strings.HasPrefix(got, "AA") {
				t.Errorf("%v: got %q", addr, got)
			}
		}
		p.addr = proxyAddr
		if got := told(p.ask(t, "udp", query1("productpage.", dns.TypeA))); !strings.HasPrefix(got, "AA") {
			t.Errorf("udp: got %q", got)
		}
		time.Sleep(stillFaulty)
		if err := p.server.Check(); err != nil {
			t.Errorf("when all is well again: got %v", err)
		}
		var ln netns.Listener = p.server.listeners[1].Listener
		ln.Close()
		if err := p.server.Check(); err == nil || !strings.Contains(err.Error(), "[::1]:15053 (tcp)") {
			t.Errorf("got %v", err)
		}
	})
}

// A client that goes on asking over its connection does not hold up a drain.
func TestDrainWhileAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newInternet(t, plainConf, nil)
		p := n.newPod(t, ServerConfig{Store: fixture(t)})
		c := p.dial(t)
		defer c.Close()
		synctest.Wait()
		start := time.Now()
		p.server.Drain()
		query := packed(t, query1("productpage.", dns.TypeA))
		query = append(binary.BigEndian.AppendUint16(nil, uint16(len(query))), query...)
		answers := 0
		for range 100 {
			if _, err := c.Write(query); err != nil || c.receive(t) == nil {
				break
			}
			answers++
			time.Sleep(linger / 2)
		}
		<-p.done
		if d := time.Since(start); answers < 2 || d < linger || d > maxLinger+linger {
			t.Errorf("ended after %v and %d answers, want some and at most %v", d, answers, maxLinger)
		}
	})
}
