package dns

import (
	"context"
	"net"
	"net/netip"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// anywhere is a network whose sockets are bound to all addresses, as those of a
// namespace are reached with route_localnet.
type anywhere struct {
	n  *internet
	at netip.AddrPort
}

var _ netns.Network = anywhere{}

func (a anywhere) Bind(ctx context.Context, addr netip.AddrPort) (netns.Bound, error) {
	return a.n.net.Host(ourIP).Bind(ctx, a.bound(addr))
}

func (a anywhere) Listen(ctx context.Context, addr netip.AddrPort) (netns.Listener, error) {
	return a.n.net.Host(ourIP).Listen(ctx, a.bound(addr))
}

func (a anywhere) ListenPacket(ctx context.Context, addr netip.AddrPort) (net.PacketConn, error) {
	return a.n.net.Host(ourIP).ListenPacket(ctx, a.bound(addr))
}

func (a anywhere) Dial(ctx context.Context, src netip.Addr, dst netip.AddrPort) (netns.Conn, error) {
	return a.n.net.Host(ourIP).Dial(ctx, src, dst)
}

func (a anywhere) bound(addr netip.AddrPort) netip.AddrPort {
	if addr == proxyAddr {
		return a.at
	}
	return addr
}
