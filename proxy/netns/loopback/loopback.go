// Package loopback is a network of virtual hosts inside one process: every
// connection is a real TCP connection over 127.0.0.1, every address that the
// program sees is virtual, and redirection is played instead of configured. It
// needs no privileges.
//
// A host has two sides. What its application dials is captured, as the rules
// in a pod do (spec/datapath.md §3.6); what its proxy dials is not:
//
//	fabric := loopback.New()
//	node := fabric.Host(netip.MustParseAddr("10.0.0.1"))
//	node.Capture(true)
//	node.Proxy() // the Network of the proxy: listens on 15001, 15006, 15008
//	node.App()   // the Network of the application
package loopback

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

// Ports of a proxy (spec/datapath.md §2.1).
const (
	outboundPort  = 15001
	plaintextPort = 15006
	hbonePort     = 15008
)

// Fabric is a set of hosts that reach each other, and nothing else. It is safe
// for concurrent use and holds nothing that has to be closed.
type Fabric struct {
	mu      sync.Mutex // guards the fields below and those of all hosts and listeners
	hosts   map[netip.Addr]*Host
	packets map[netip.AddrPort]netip.AddrPort // real address of a UDP socket → virtual
}

// flow is a connection as the hosts see it.
type flow struct{ src, local, orig netip.AddrPort }

// New returns a Fabric without hosts.
func New() *Fabric {
	return &Fabric{
		hosts:   make(map[netip.Addr]*Host),
		packets: make(map[netip.AddrPort]netip.AddrPort),
	}
}

// Host is one virtual host.
type Host struct {
	fabric    *Fabric
	addr      netip.Addr
	captured  bool
	listeners map[netip.AddrPort]*listener      // by virtual address
	udp       map[netip.AddrPort]netip.AddrPort // virtual → real
}

// Host returns the host with address a, which it makes if it is new.
func (f *Fabric) Host(a netip.Addr) *Host {
	a = a.Unmap()
	f.mu.Lock()
	defer f.mu.Unlock()
	h := f.hosts[a]
	if h == nil {
		h = &Host{
			fabric:    f,
			addr:      a,
			listeners: make(map[netip.AddrPort]*listener),
			udp:       make(map[netip.AddrPort]netip.AddrPort),
		}
		f.hosts[a] = h
	}
	return h
}

// Addr is the address of the host.
func (h *Host) Addr() netip.Addr { return h.addr }

// Capture turns redirection on or off: of what the application of h dials to
// the host's port 15001, of what others dial here, save port 15008, to 15006.
func (h *Host) Capture(on bool) {
	h.fabric.mu.Lock()
	defer h.fabric.mu.Unlock()
	h.captured = on
}

// App is the network as the application sees it.
func (h *Host) App() netns.Network { return side{h, false} }

// Proxy is the network as the proxy sees it, whose packets carry the mark.
func (h *Host) Proxy() netns.Network { return side{h, true} }

type side struct {
	*Host
	proxy bool
}

var _ netns.Network = side{}

// realIP is where every socket is bound.
var realIP = netip.AddrFrom4([4]byte{127, 0, 0, 1})

// Listen implements netns.Network. A port 0 becomes one that is free on the
// machine.
func (s side) Listen(ctx context.Context, addr netip.AddrPort) (netns.Listener, error) {
	b, err := s.Bind(ctx, addr)
	if err != nil {
		return nil, err
	}
	return b.Listen(ctx)
}

// Bind implements netns.Network. The real socket listens already, but nobody is
// led to it.
func (s side) Bind(ctx context.Context, addr netip.AddrPort) (netns.Bound, error) {
	fail := func(err error) error { return fmt.Errorf("failed to bind to address %v: %w", addr, err) }
	if err := s.check(addr); err != nil {
		return nil, fail(err)
	}
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(ctx, "tcp4", netip.AddrPortFrom(realIP, 0).String())
	if err != nil {
		return nil, fail(err)
	}
	at := ln.Addr().(*net.TCPAddr).AddrPort()
	if addr.Port() == 0 {
		addr = netip.AddrPortFrom(addr.Addr(), at.Port())
	}
	l := &listener{host: s.Host, ln: ln.(*net.TCPListener), addr: addr, at: at, dials: make(map[netip.AddrPort]*flow)}
	if !register(s.fabric, s.listeners, addr, l) {
		return nil, errors.Join(fail(os.NewSyscallError("bind", syscall.EADDRINUSE)), ln.Close())
	}
	return &bound{l}, nil
}

// bound is a listener that is not open yet.
type bound struct{ l *listener }

var _ netns.Bound = (*bound)(nil)

func (b *bound) Addr() netip.AddrPort { return b.l.addr }

// Listen implements netns.Bound.
func (b *bound) Listen(ctx context.Context) (netns.Listener, error) {
	if ctx.Err() != nil {
		return nil, errors.Join(context.Cause(ctx), b.Close())
	}
	b.l.host.fabric.mu.Lock()
	defer b.l.host.fabric.mu.Unlock()
	if b.l.open || b.l.dials == nil {
		return nil, fmt.Errorf("failed to bind to address %v: %w", b.l.addr, net.ErrClosed)
	}
	b.l.open = true
	return b.l, nil
}

// Close implements netns.Bound.
func (b *bound) Close() error {
	if b.l.isOpen() || !b.l.retire() {
		return nil
	}
	return b.l.ln.Close()
}

func (h *Host) check(addr netip.AddrPort) error {
	a := addr.Addr().Unmap()
	switch {
	case !a.IsValid():
		return errors.New("no address")
	case !a.IsUnspecified() && !a.IsLoopback() && a != h.addr:
		return os.NewSyscallError("bind", syscall.EADDRNOTAVAIL)
	}
	return nil
}

// register enters a socket into one of the tables of a host, unless the virtual
// address is taken.
func register[S any](f *Fabric, table map[netip.AddrPort]S, virtual netip.AddrPort, socket S) bool {
	virtual = unmapped(virtual)
	f.mu.Lock()
	defer f.mu.Unlock()
	for other := range table {
		if other.Port() == virtual.Port() && (other.Addr() == virtual.Addr() ||
			other.Addr().IsUnspecified() || virtual.Addr().IsUnspecified()) {
			return false
		}
	}
	table[virtual] = socket
	return true
}

func unmapped(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// lookup finds the socket behind a virtual address.
func lookup[S any](table map[netip.AddrPort]S, virtual netip.AddrPort) (socket S, ok bool) {
	for _, a := range []netip.Addr{virtual.Addr(), netip.IPv6Unspecified(), netip.IPv4Unspecified()} {
		if socket, ok = table[netip.AddrPortFrom(a, virtual.Port())]; ok {
			return socket, true
		}
	}
	return socket, false
}

// Dial implements netns.Network. The client's address is virtual: src, or that
// of the host.
func (s side) Dial(ctx context.Context, src netip.Addr, dst netip.AddrPort) (netns.Conn, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	dst = unmapped(dst)
	l, f, err := s.route(src.Unmap(), dst)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(dst), Err: err}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, netns.DefaultConnectTimeout, netns.ErrConnectTimeout)
	defer cancel()
	var from netip.AddrPort
	d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) (err error) {
		// The acceptor may be faster than our return: it has to know the
		// connection before it exists.
		if from, err = bindLoopback(c); err == nil {
			f.src = netip.AddrPortFrom(f.src.Addr(), from.Port())
			err = l.announce(from, f)
		}
		return err
	}}
	d.SetMultipathTCP(false)
	c, err := d.DialContext(ctx, "tcp4", l.at.String())
	if err != nil {
		l.forget(from, f)
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, err
	}
	tcp, err := netns.WrapTCP(c.(*net.TCPConn))
	if err != nil {
		l.forget(from, f)
		return nil, errors.Join(err, c.Close())
	}
	return &conn{Conn: tcp, local: f.src, remote: dst, orig: f.src}, nil
}

// route decides where a connection to dst really goes.
func (s side) route(src netip.Addr, dst netip.AddrPort) (*listener, *flow, error) {
	s.fabric.mu.Lock()
	defer s.fabric.mu.Unlock()
	self := dst.Addr().IsLoopback() || dst.Addr() == s.addr
	if !src.IsValid() {
		src = s.addr
		if dst.Addr().IsLoopback() {
			src = dst.Addr()
		}
	}
	f := &flow{src: netip.AddrPortFrom(src, 0), local: dst, orig: dst}
	to := s.Host
	switch {
	case self:
	case s.captured && !s.proxy:
		f.local = netip.AddrPortFrom(realIP, outboundPort) // as REDIRECT does
	default:
		if to = s.fabric.hosts[dst.Addr()]; to == nil {
			return nil, nil, os.NewSyscallError("connect", syscall.EHOSTUNREACH)
		}
		if to.captured && dst.Port() != hbonePort {
			f.local = netip.AddrPortFrom(dst.Addr(), plaintextPort)
		}
	}
	l, ok := lookup(to.listeners, f.local)
	if !ok || !l.open {
		return nil, nil, os.NewSyscallError("connect", syscall.ECONNREFUSED)
	}
	return l, f, nil
}

type listener struct {
	host *Host
	ln   *net.TCPListener
	addr netip.AddrPort
	at   netip.AddrPort // where it really listens
	open bool           // false as long as it is a netns.Bound

	// dials are the connections that wait to be accepted, by the real address of
	// the client; nil once the listener is closed. One whose client has closed it
	// stays: what was sent before that is still to be read.
	dials map[netip.AddrPort]*flow
}

// announce tells the acceptor of a connection that is about to be made.
func (l *listener) announce(from netip.AddrPort, f *flow) error {
	l.host.fabric.mu.Lock()
	defer l.host.fabric.mu.Unlock()
	if l.dials == nil {
		return os.NewSyscallError("connect", syscall.ECONNREFUSED)
	}
	l.dials[from] = f
	return nil
}

// forget takes back an announcement. Another dial may have the address by now.
func (l *listener) forget(from netip.AddrPort, f *flow) {
	l.host.fabric.mu.Lock()
	defer l.host.fabric.mu.Unlock()
	if l.dials[from] == f {
		delete(l.dials, from)
	}
}

// take returns what was announced of a connection, nil if nothing.
func (l *listener) take(from netip.AddrPort) *flow {
	l.host.fabric.mu.Lock()
	defer l.host.fabric.mu.Unlock()
	f := l.dials[from]
	delete(l.dials, from)
	return f
}

var (
	_ netns.Listener       = (*listener)(nil)
	_ netns.Checker        = (*listener)(nil)
	_ netns.DeadlineSetter = (*listener)(nil)
)

// Accept implements netns.Listener. Connections from other programs of the
// machine are closed.
func (l *listener) Accept() (netns.Conn, error) {
	for {
		c, err := l.ln.AcceptTCP()
		if err != nil {
			return nil, err
		}
		f := l.take(c.RemoteAddr().(*net.TCPAddr).AddrPort())
		if f == nil {
			_ = c.Close()
			continue
		}
		tcp, err := netns.WrapTCP(c)
		if err != nil {
			return nil, errors.Join(err, c.Close())
		}
		return &conn{Conn: tcp, local: f.local, remote: f.src, orig: f.orig}, nil
	}
}

// Close implements netns.Listener. Connections that nobody has accepted are
// reset, and what is known of them is dropped: another program of the machine may
// get their ports.
func (l *listener) Close() error {
	l.retire()
	return l.ln.Close()
}

// retire takes the listener out of the fabric. It is false if that was done.
func (l *listener) retire() bool {
	l.host.fabric.mu.Lock()
	defer l.host.fabric.mu.Unlock()
	if l.dials == nil {
		return false
	}
	l.dials = nil
	delete(l.host.listeners, unmapped(l.addr))
	return true
}

func (l *listener) isOpen() bool {
	l.host.fabric.mu.Lock()
	defer l.host.fabric.mu.Unlock()
	return l.open
}

// SetDeadline implements netns.DeadlineSetter.
func (l *listener) SetDeadline(t time.Time) error { return l.ln.SetDeadline(t) }

// Sharer implements netns.Checker: ports are not shared.
func (l *listener) Sharer() (string, error) { return "", nil }

// Listening implements netns.Checker.
func (l *listener) Listening() bool {
	l.host.fabric.mu.Lock()
	defer l.host.fabric.mu.Unlock()
	return l.open && l.dials != nil
}

func (l *listener) Addr() netip.AddrPort { return l.addr }

// Transparent is true: any source address can be had.
func (l *listener) Transparent() bool { return true }
