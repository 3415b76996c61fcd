package dns

import (
	"context"
	"net"
	"net/netip"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// Dial opens a socket to a nameserver; network is "udp" or "tcp". A UDP socket
// has a port that cannot be guessed, and its Read gives the datagrams of addr and
// of nobody else. The caller closes it. Dial is bounded by ctx and safe for
// concurrent use.
type Dial func(ctx context.Context, network string, addr netip.AddrPort) (net.Conn, error)

// Over makes the sockets in n.
func Over(n netns.Network) Dial {
	return func(ctx context.Context, network string, addr netip.AddrPort) (net.Conn, error) {
		if network == "tcp" {
			return n.Dial(ctx, netip.Addr{}, addr)
		}
		local := netip.IPv4Unspecified()
		if addr.Addr().Is6() {
			local = netip.IPv6Unspecified()
		}
		pc, err := n.ListenPacket(ctx, netip.AddrPortFrom(local, 0))
		if err != nil {
			return nil, err
		}
		return &packetConn{PacketConn: pc, remote: addr}, nil
	}
}

// packetConn is a UDP socket with one peer. Network has none that are connected.
type packetConn struct {
	net.PacketConn
	remote netip.AddrPort
}

var _ net.Conn = (*packetConn)(nil)

func (c *packetConn) RemoteAddr() net.Addr { return net.UDPAddrFromAddrPort(c.remote) }

func (c *packetConn) Write(p []byte) (int, error) { return c.WriteTo(p, c.RemoteAddr()) }

// Read drops what others send: only the deadline bounds how much that is.
func (c *packetConn) Read(p []byte) (int, error) {
	for {
		n, from, err := c.ReadFrom(p)
		if err != nil {
			return n, err
		}
		if ua, ok := from.(*net.UDPAddr); ok {
			ap := ua.AddrPort()
			if netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()) == c.remote {
				return n, nil
			}
		}
	}
}
