package loopback

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
)

// ListenPacket implements netns.Network.
func (s side) ListenPacket(ctx context.Context, addr netip.AddrPort) (net.PacketConn, error) {
	fail := func(err error) error { return fmt.Errorf("failed to bind to address %v: %w", addr, err) }
	if err := s.check(addr); err != nil {
		return nil, fail(err)
	}
	var lc net.ListenConfig
	pc, err := lc.ListenPacket(ctx, "udp4", netip.AddrPortFrom(realIP, 0).String())
	if err != nil {
		return nil, fail(err)
	}
	at := pc.LocalAddr().(*net.UDPAddr).AddrPort()
	if addr.Port() == 0 {
		addr = netip.AddrPortFrom(addr.Addr(), at.Port())
	}
	if !register(s.fabric, s.udp, addr, at) {
		_ = pc.Close()
		return nil, fail(os.NewSyscallError("bind", syscall.EADDRINUSE))
	}
	p := &packetConn{UDPConn: pc.(*net.UDPConn), host: s.Host, addr: addr, at: at}
	seen := addr
	if seen.Addr().IsUnspecified() {
		seen = netip.AddrPortFrom(s.addr, addr.Port())
	}
	s.fabric.mu.Lock()
	defer s.fabric.mu.Unlock()
	s.fabric.packets[at] = seen
	return p, nil
}

// packetConn is a UDP socket that translates addresses.
type packetConn struct {
	*net.UDPConn
	host     *Host
	addr, at netip.AddrPort
}

func (p *packetConn) LocalAddr() net.Addr { return net.UDPAddrFromAddrPort(p.addr) }

// WriteTo implements net.PacketConn. A packet to nobody is lost.
func (p *packetConn) WriteTo(b []byte, addr net.Addr) (int, error) {
	ua, ok := addr.(*net.UDPAddr)
	if !ok {
		return 0, &net.OpError{Op: "write", Net: "udp", Err: &net.AddrError{Err: "not a UDP address", Addr: addr.String()}}
	}
	at, ok := p.host.packetTo(unmapped(ua.AddrPort()))
	if !ok {
		return len(b), nil
	}
	return p.WriteToUDPAddrPort(b, at)
}

func (h *Host) packetTo(dst netip.AddrPort) (netip.AddrPort, bool) {
	h.fabric.mu.Lock()
	defer h.fabric.mu.Unlock()
	to := h
	if !dst.Addr().IsLoopback() {
		if to = h.fabric.hosts[dst.Addr()]; to == nil {
			return netip.AddrPort{}, false
		}
	}
	return lookup(to.udp, dst)
}

// ReadFrom implements net.PacketConn. Packets of other programs of the machine
// are dropped.
func (p *packetConn) ReadFrom(b []byte) (int, net.Addr, error) {
	for {
		n, from, err := p.ReadFromUDPAddrPort(b)
		if err != nil {
			return n, nil, err
		}
		p.host.fabric.mu.Lock()
		seen, ok := p.host.fabric.packets[unmapped(from)]
		p.host.fabric.mu.Unlock()
		if ok {
			return n, net.UDPAddrFromAddrPort(seen), nil
		}
	}
}

// Close implements net.PacketConn.
func (p *packetConn) Close() error {
	err := p.UDPConn.Close()
	if err == nil {
		p.host.fabric.mu.Lock()
		defer p.host.fabric.mu.Unlock()
		delete(p.host.udp, unmapped(p.addr))
		delete(p.host.fabric.packets, p.at)
	}
	return err
}
