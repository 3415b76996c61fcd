package memnet

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// Listen implements netns.Network.
func (h *Host) Listen(ctx context.Context, addr netip.AddrPort) (netns.Listener, error) {
	b, err := h.Bind(ctx, addr)
	if err != nil {
		return nil, err
	}
	return b.Listen(ctx)
}

// Bind implements netns.Network.
func (h *Host) Bind(ctx context.Context, addr netip.AddrPort) (netns.Bound, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	addr, err := h.take(addr, func(a netip.AddrPort) bool { return h.listeners[a] != nil })
	if err != nil {
		return nil, err
	}
	l := &listener{
		host:  h,
		addr:  addr,
		queue: make(chan *conn, netns.DefaultBacklog),
		done:  make(chan struct{}),
		moved: make(chan struct{}),
	}
	g := h.listeners[addr]
	if g == nil {
		g = new(group)
		h.listeners[addr] = g
	}
	g.members = append(g.members, l)
	return &bound{l}, nil
}

// group is what shares an address. The mu of the Internet guards it.
type group struct {
	members []*listener // bound, or open
	heir    *listener   // gets every connection as long as it is open; nil = they go by turns
	turn    int
}

// next is the listener of the next connection, nil if nobody listens.
func (g *group) next() *listener {
	if g.heir != nil && g.heir.open {
		return g.heir
	}
	open := g.open()
	if len(open) == 0 {
		return nil
	}
	g.turn++
	return open[g.turn%len(open)]
}

func (g *group) open() []*listener {
	return slices.DeleteFunc(slices.Clone(g.members), func(l *listener) bool { return !l.open })
}

// listening is the listener that a connection to via reaches, nil if it is
// refused. The caller holds mu.
func (h *Host) listening(via netip.AddrPort) *listener {
	for _, a := range []netip.AddrPort{via, wildcard6(via.Port()), wildcard4(via.Port())} {
		if g := h.listeners[a]; g != nil {
			if l := g.next(); l != nil {
				return l
			}
		}
	}
	return nil
}

// bound implements netns.Bound.
type bound struct{ l *listener }

func (b *bound) Addr() netip.AddrPort { return b.l.addr }

func (b *bound) Listen(ctx context.Context) (netns.Listener, error) {
	b.l.host.net.mu.Lock()
	defer b.l.host.net.mu.Unlock()
	if b.l.open || b.l.closed {
		return nil, fmt.Errorf("failed to bind to address %v: %w", b.l.addr, net.ErrClosed)
	}
	if ctx.Err() != nil {
		b.l.retire()
		return nil, context.Cause(ctx)
	}
	b.l.open = true
	return b.l, nil
}

func (b *bound) Close() error {
	b.l.host.net.mu.Lock()
	defer b.l.host.net.mu.Unlock()
	if !b.l.open {
		b.l.retire()
	}
	return nil
}

// listener implements netns.Listener.
type listener struct {
	host  *Host
	addr  netip.AddrPort
	queue chan *conn
	done  chan struct{} // closed with the listener

	// Guarded by the mu of the Internet.
	open, closed bool // neither = bound
	yields       int

	mu       sync.Mutex // guards the fields below
	deadline time.Time
	moved    chan struct{} // closed and replaced when the deadline changes
}

var (
	_ netns.Listener       = (*listener)(nil)
	_ netns.Checker        = (*listener)(nil)
	_ netns.Yielder        = (*listener)(nil)
	_ netns.DeadlineSetter = (*listener)(nil)
)

func (l *listener) Accept() (netns.Conn, error) {
	for {
		l.mu.Lock()
		deadline, moved := l.deadline, l.moved
		l.mu.Unlock()
		c, err := l.acceptUntil(deadline, moved)
		if c != nil || err != nil {
			return c, err
		}
	}
}

// acceptUntil is Accept, but returns nothing when the deadline was moved.
func (l *listener) acceptUntil(deadline time.Time, moved <-chan struct{}) (netns.Conn, error) {
	select {
	case <-l.done:
		return nil, l.fail(net.ErrClosed)
	default:
	}
	var over <-chan time.Time
	if !deadline.IsZero() {
		left := time.Until(deadline)
		if left <= 0 {
			return nil, l.fail(os.ErrDeadlineExceeded)
		}
		timer := time.NewTimer(left)
		defer timer.Stop()
		over = timer.C
	}
	select {
	case c := <-l.queue:
		return c, nil
	case <-l.done:
		return nil, l.fail(net.ErrClosed)
	case <-over:
		return nil, l.fail(os.ErrDeadlineExceeded)
	case <-moved:
		return nil, nil
	}
}

func (l *listener) fail(err error) error {
	return &net.OpError{Op: "accept", Net: "tcp", Addr: net.TCPAddrFromAddrPort(l.addr), Err: err}
}

// SetDeadline implements netns.DeadlineSetter.
func (l *listener) SetDeadline(t time.Time) error {
	select {
	case <-l.done:
		return &net.OpError{Op: "set", Net: "tcp", Addr: net.TCPAddrFromAddrPort(l.addr), Err: net.ErrClosed}
	default:
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.deadline = t
	close(l.moved)
	l.moved = make(chan struct{})
	return nil
}

// Sharer implements netns.Checker: there are no strangers.
func (l *listener) Sharer() (string, error) { return "", nil }

// Listening implements netns.Checker.
func (l *listener) Listening() bool {
	l.host.net.mu.Lock()
	defer l.host.net.mu.Unlock()
	return l.open
}

// Close resets the connections that were not accepted, as the kernel does.
func (l *listener) Close() error {
	l.host.net.mu.Lock()
	first := l.retire()
	l.host.net.mu.Unlock()
	if !first {
		return net.ErrClosed
	}
	close(l.done)
	l.reset()
	return nil
}

// retire frees the port. It is false if that was done. The caller holds mu.
func (l *listener) retire() bool {
	if l.closed {
		return false
	}
	l.closed, l.open = true, false
	g := l.host.listeners[l.addr]
	g.members = slices.DeleteFunc(g.members, func(m *listener) bool { return m == l })
	if len(g.members) == 0 {
		delete(l.host.listeners, l.addr)
	}
	return true
}

// Yield implements netns.Yielder. The newest of the others gets the connections,
// another one at the next call.
func (l *listener) Yield() (bool, error) {
	l.host.net.mu.Lock()
	defer l.host.net.mu.Unlock()
	if !l.open {
		return false, l.fail(net.ErrClosed)
	}
	g := l.host.listeners[l.addr]
	others := slices.DeleteFunc(g.open(), func(m *listener) bool { return m == l })
	if len(others) == 0 {
		return false, nil
	}
	g.heir = others[len(others)-1-l.yields%len(others)]
	l.yields++
	return true, nil
}

// Others implements netns.Yielder.
func (l *listener) Others() (int, error) {
	l.host.net.mu.Lock()
	defer l.host.net.mu.Unlock()
	if !l.open {
		return 0, l.fail(net.ErrClosed)
	}
	n := -1
	for addr, g := range l.host.listeners {
		if addr.Port() == l.addr.Port() {
			n += len(g.open())
		}
	}
	return n, nil
}

func (l *listener) reset() {
	for {
		select {
		case c := <-l.queue:
			_ = c.Abort()
		default:
			return
		}
	}
}

func (l *listener) Addr() netip.AddrPort { return l.addr }
func (l *listener) Transparent() bool    { return l.host.net.cfg.Transparent }
