package memnet

import (
	"context"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"
)

// packetConn is a UDP socket. Packets to nobody, or to a full buffer, are lost.
type packetConn struct {
	host *Host
	addr netip.AddrPort

	mu     sync.Mutex // guards the fields below
	wake   sync.Cond  // on mu
	queue  []packet
	closed bool
	rdl    *deadline
}

type packet struct {
	from netip.AddrPort
	data []byte
}

const packetQueue = 256

// ListenPacket implements netns.Network.
func (h *Host) ListenPacket(ctx context.Context, addr netip.AddrPort) (net.PacketConn, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	addr, err := h.take(addr, func(a netip.AddrPort) bool { return h.packets[a] != nil })
	if err != nil {
		return nil, err
	}
	p := &packetConn{host: h, addr: addr}
	p.wake.L = &p.mu
	h.packets[addr] = append(h.packets[addr], p)
	return p, nil
}

func (p *packetConn) fail(op string, err error) error {
	return &net.OpError{Op: op, Net: "udp", Source: p.LocalAddr(), Err: err}
}

func (p *packetConn) LocalAddr() net.Addr { return net.UDPAddrFromAddrPort(p.addr) }

// ReadFrom implements net.PacketConn.
func (p *packetConn) ReadFrom(b []byte) (int, net.Addr, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		switch {
		case p.closed:
			return 0, nil, p.fail("read", net.ErrClosed)
		case p.rdl.passed():
			return 0, nil, p.fail("read", os.ErrDeadlineExceeded)
		case len(p.queue) > 0:
			m := p.queue[0]
			p.queue = p.queue[1:]
			return copy(b, m.data), net.UDPAddrFromAddrPort(m.from), nil
		}
		p.wake.Wait()
	}
}

// WriteTo implements net.PacketConn. It never blocks.
func (p *packetConn) WriteTo(b []byte, addr net.Addr) (int, error) {
	p.mu.Lock()
	closed := p.closed
	p.mu.Unlock()
	if closed {
		return 0, p.fail("write", net.ErrClosed)
	}
	ua, ok := addr.(*net.UDPAddr)
	if !ok {
		return 0, p.fail("write", &net.AddrError{Err: "not a UDP address", Addr: addr.String()})
	}
	dst := netip.AddrPortFrom(ua.AddrPort().Addr().Unmap(), ua.AddrPort().Port())
	to, from := p.host.packetTo(dst, p.addr)
	if to != nil {
		to.deliver(packet{from, append([]byte(nil), b...)})
	}
	return len(b), nil
}

func (h *Host) packetTo(dst, local netip.AddrPort) (to *packetConn, from netip.AddrPort) {
	h.net.mu.Lock()
	defer h.net.mu.Unlock()
	owner := h.owner(dst.Addr())
	if owner == nil || h.net.holes[dst.Addr()] {
		return nil, from
	}
	from = local
	if local.Addr().IsUnspecified() {
		from = netip.AddrPortFrom(h.source(dst.Addr()), local.Port())
	}
	for _, a := range []netip.AddrPort{dst, wildcard6(dst.Port()), wildcard4(dst.Port())} {
		if sharing := owner.packets[a]; len(sharing) > 0 {
			return sharing[len(sharing)-1], from
		}
	}
	return nil, from
}

func (p *packetConn) deliver(m packet) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.closed && len(p.queue) < packetQueue {
		p.queue = append(p.queue, m)
		p.wake.Broadcast()
	}
}

// Close implements net.PacketConn.
func (p *packetConn) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return p.fail("close", net.ErrClosed)
	}
	p.closed = true
	p.queue = nil
	p.rdl.stop()
	p.wake.Broadcast()
	p.mu.Unlock()
	p.host.net.mu.Lock()
	defer p.host.net.mu.Unlock()
	left := slices.DeleteFunc(p.host.packets[p.addr], func(o *packetConn) bool { return o == p })
	if p.host.packets[p.addr] = left; len(left) == 0 {
		delete(p.host.packets, p.addr)
	}
	return nil
}

// SetDeadline implements net.PacketConn.
func (p *packetConn) SetDeadline(t time.Time) error { return p.SetReadDeadline(t) }

// SetWriteDeadline implements net.PacketConn; writing never blocks.
func (p *packetConn) SetWriteDeadline(time.Time) error { return nil }

// SetReadDeadline implements net.PacketConn.
func (p *packetConn) SetReadDeadline(t time.Time) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return p.fail("set", net.ErrClosed)
	}
	p.rdl.stop()
	p.rdl = newDeadline(t, &p.wake)
	p.wake.Broadcast()
	return nil
}
