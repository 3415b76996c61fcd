// Package memnet is a network in memory, for tests: hosts with addresses whose
// connections behave as TCP does, with half-close, resets, bounded buffers,
// deadlines and redirection.
//
//	net := memnet.New(memnet.Config{})
//	node := net.Host(netip.MustParseAddr("10.0.0.1"))
//	pod := net.Host(netip.MustParseAddr("10.0.0.2"))
//	ln, _ := pod.Listen(ctx, netip.MustParseAddrPort("[::]:8080"))
//	c, _ := node.Dial(ctx, netip.Addr{}, netip.MustParseAddrPort("10.0.0.2:8080"))
//
// It starts no goroutines and waits on condition variables, channels and timers
// only, so it works in a testing/synctest bubble.
package memnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// Config of an Internet. The zero value is usable.
type Config struct {
	// Buffer is how many bytes a connection holds per direction before Write
	// blocks, 0 = 64 KiB.
	Buffer int
	// Transparent is what Listener.Transparent says.
	Transparent bool
	// PortReuse lets several sockets of a host share a port, as SO_REUSEPORT does:
	// connections go to those that listen on an address in turn, packets to the
	// newest.
	PortReuse bool
	// ConnectTimeout bounds Dial, 0 = netns.DefaultConnectTimeout.
	ConnectTimeout time.Duration
}

// Internet is a set of hosts that reach each other. It is safe for concurrent
// use.
type Internet struct {
	cfg Config

	mu    sync.Mutex // guards the fields below and the tables of all hosts
	hosts map[netip.Addr]*Host
	holes map[netip.Addr]bool
	port  uint16 // last ephemeral port
}

// New returns an Internet without hosts.
func New(cfg Config) *Internet {
	if cfg.Buffer <= 0 {
		cfg.Buffer = 64 << 10
	}
	if cfg.ConnectTimeout <= 0 {
		cfg.ConnectTimeout = netns.DefaultConnectTimeout
	}
	return &Internet{
		cfg:   cfg,
		hosts: make(map[netip.Addr]*Host),
		holes: make(map[netip.Addr]bool),
		port:  32767,
	}
}

// Host returns the host that has the given addresses, which it makes when the
// first of them is new. Further addresses are added to it. Every host has the
// loopback addresses besides, which nobody else reaches.
func (n *Internet) Host(addrs ...netip.Addr) *Host {
	if len(addrs) == 0 {
		panic("memnet: a host needs an address")
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	h := n.hosts[addrs[0].Unmap()]
	if h == nil {
		h = &Host{
			net:       n,
			listeners: make(map[netip.AddrPort]*group),
			packets:   make(map[netip.AddrPort][]*packetConn),
		}
	}
	for _, a := range addrs {
		if a = a.Unmap(); n.hosts[a] == nil {
			n.hosts[a] = h
			h.addrs = append(h.addrs, a)
		}
	}
	return h
}

// Blackhole makes connecting to a silent, as a NetworkPolicy does, or lets it
// go through again. Connections that are there are not touched.
func (n *Internet) Blackhole(a netip.Addr, silent bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.holes[a.Unmap()] = silent
}

// Host is the netns.Network of one host. It is safe for concurrent use.
type Host struct {
	net       *Internet
	addrs     []netip.Addr
	listeners map[netip.AddrPort]*group
	packets   map[netip.AddrPort][]*packetConn
}

var _ netns.Network = (*Host)(nil)

// take checks addr and chooses a port if it has none. The caller holds mu.
func (h *Host) take(addr netip.AddrPort, taken func(netip.AddrPort) bool) (netip.AddrPort, error) {
	addr = netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port())
	fail := func(err error) (netip.AddrPort, error) {
		return addr, fmt.Errorf("failed to bind to address %v: %w", addr, err)
	}
	if !addr.Addr().IsValid() {
		return fail(errors.New("no address"))
	}
	if !addr.Addr().IsUnspecified() && !h.has(addr.Addr()) {
		return fail(os.NewSyscallError("bind", syscall.EADDRNOTAVAIL))
	}
	inUse := func(addr netip.AddrPort) bool {
		if taken(addr) || taken(wildcard4(addr.Port())) || taken(wildcard6(addr.Port())) {
			return true
		}
		if !addr.Addr().IsUnspecified() {
			return false
		}
		for _, a := range append(loopbacks(), h.addrs...) {
			if taken(netip.AddrPortFrom(a, addr.Port())) {
				return true
			}
		}
		return false
	}
	if addr.Port() == 0 {
		for addr = netip.AddrPortFrom(addr.Addr(), h.net.nextPort()); inUse(addr); {
			addr = netip.AddrPortFrom(addr.Addr(), h.net.nextPort())
		}
	}
	if inUse(addr) && !h.net.cfg.PortReuse {
		return fail(os.NewSyscallError("bind", syscall.EADDRINUSE))
	}
	return addr, nil
}

func (h *Host) has(a netip.Addr) bool { return a.IsLoopback() || h.net.hosts[a] == h }

func loopbacks() []netip.Addr {
	return []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}
}

func wildcard4(port uint16) netip.AddrPort { return netip.AddrPortFrom(netip.IPv4Unspecified(), port) }
func wildcard6(port uint16) netip.AddrPort { return netip.AddrPortFrom(netip.IPv6Unspecified(), port) }

// nextPort is called with mu held.
func (n *Internet) nextPort() uint16 {
	if n.port++; n.port < 32768 {
		n.port = 32768
	}
	return n.port
}

// owner is the host behind a, as seen from h. The caller holds mu.
func (h *Host) owner(a netip.Addr) *Host {
	if a.IsLoopback() {
		return h
	}
	return h.net.hosts[a]
}

// Dial implements netns.Network. Any src is granted.
func (h *Host) Dial(ctx context.Context, src netip.Addr, dst netip.AddrPort) (netns.Conn, error) {
	return h.dial(ctx, src, dst, dst)
}

// DialVia is Dial with redirection: it connects to a listener at via, whose
// Conn has dst as original destination. The caller's Conn seems to be connected
// to dst.
func (h *Host) DialVia(ctx context.Context, via netip.AddrPort, src netip.Addr, dst netip.AddrPort) (netns.Conn, error) {
	return h.dial(ctx, src, via, dst)
}

func (h *Host) dial(ctx context.Context, src netip.Addr, via, dst netip.AddrPort) (netns.Conn, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	via = netip.AddrPortFrom(via.Addr().Unmap(), via.Port())
	dst = netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())
	if !via.IsValid() || !dst.IsValid() {
		return nil, fmt.Errorf("connect to %v: no address", dst)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, h.net.cfg.ConnectTimeout, netns.ErrConnectTimeout)
	defer cancel()

	client, server, l, err := h.route(src.Unmap(), via, dst)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(dst), Err: err}
	}
	if l == nil { // nobody answers
		<-ctx.Done()
		return nil, context.Cause(ctx)
	}
	select {
	case l.queue <- server:
	case <-l.done:
		return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(dst), Err: errRefused}
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	select {
	case <-l.done: // closed meanwhile: what it did not accept is reset
		l.reset()
	default:
	}
	return client, nil
}

var (
	errRefused = os.NewSyscallError("connect", syscall.ECONNREFUSED)
	errNoRoute = os.NewSyscallError("connect", syscall.EHOSTUNREACH)
)

// route finds the listener and makes the two ends; no listener and no error
// mean silence.
func (h *Host) route(src netip.Addr, via, dst netip.AddrPort) (client, server *conn, l *listener, err error) {
	n := h.net
	n.mu.Lock()
	defer n.mu.Unlock()
	to := h.owner(via.Addr())
	switch {
	case n.holes[via.Addr()]:
		return nil, nil, nil, nil
	case to == nil:
		return nil, nil, nil, errNoRoute
	}
	if l = to.listening(via); l == nil {
		return nil, nil, nil, errRefused
	}
	if !src.IsValid() {
		src = h.source(via.Addr())
	}
	from := netip.AddrPortFrom(src, n.nextPort())
	client, server = pair(n.cfg.Buffer, from, dst, from, via)
	server.orig = dst
	return client, server, l, nil
}

// source is the address that h uses towards dst. The caller holds mu.
func (h *Host) source(dst netip.Addr) netip.Addr {
	if dst.IsLoopback() || h.net.hosts[dst] == h {
		return dst
	}
	for _, a := range h.addrs {
		if a.Is4() == dst.Is4() {
			return a
		}
	}
	return h.addrs[0]
}

// Pipe returns the two ends of a connection between a and b that nobody
// listened for.
func Pipe(a, b netip.AddrPort) (netns.Conn, netns.Conn) {
	x, y := pair(64<<10, a, b, a, b)
	return x, y
}
