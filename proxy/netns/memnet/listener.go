package memnet

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
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
	h.listeners[addr] = l
	return &bound{l}, nil
}

// listening is the listener that a connection to via reaches, nil if it is
// refused. The caller holds mu.
func (h *Host) listening(via netip.AddrPort) *listener {
	for _, a := range []netip.AddrPort{via, wildcard6(via.Port()), wildcard4(via.Port())} {
		if l := h.listeners[a]; l != nil && l.open {
			return l
		}
	}
	return nil
}

// bound implements netns.Bound.
type bound struct{ l *listener }

func (b *bound) Addr() netip.AddrPort { return b.l.addr }

func (b *bound) Listen(ctx context.Context) (netns.Listener, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	b.l.host.net.mu.Lock()
	defer b.l.host.net.mu.Unlock()
	if b.l.open || b.l.closed {
		return nil, fmt.Errorf("failed to bind to address %v: %w", b.l.addr, net.ErrClosed)
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

	open, closed bool // guarded by the mu of the Internet

	mu       sync.Mutex // guards the fields below
	deadline time.Time
	moved    chan struct{} // closed and replaced when the deadline changes
}

var (
	_ netns.Listener       = (*listener)(nil)
	_ netns.Checker        = (*listener)(nil)
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

// Listening implements netns.Checker.
func (l *listener) Listening() bool {
	l.host.net.mu.Lock()
	defer l.host.net.mu.Unlock()
	return l.open && !l.closed
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
	l.closed = true
	delete(l.host.listeners, l.addr)
	return true
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
