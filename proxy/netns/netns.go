// Package netns opens the sockets of one network namespace: a pod's, the
// host's, or one that exists only in memory. The proxy never opens a socket of
// the data path in another way.
package netns

import (
	"context"
	"net"
	"net/netip"
)

// Network is a place where the data path opens its sockets. All methods are
// safe for concurrent use.
type Network interface {
	// Listen binds and listens. The returned listener is owned by the caller.
	Listen(ctx context.Context, addr netip.AddrPort) (Listener, error)
	// ListenPacket binds a UDP socket.
	ListenPacket(ctx context.Context, addr netip.AddrPort) (net.PacketConn, error)
	// Dial connects to dst. A valid src that differs from dst's address asks for
	// that source address (original source, port 0); where it can't be had the
	// connection is made without, after a warning, as spec/datapath.md §3.4 says.
	Dial(ctx context.Context, src netip.Addr, dst netip.AddrPort) (Conn, error)
}

// Listener accepts the connections of one address.
type Listener interface {
	// Accept blocks until a connection comes or the listener is closed, which
	// gives an error that wraps net.ErrClosed.
	Accept() (Conn, error)
	Close() error
	Addr() netip.AddrPort
	// Transparent tells whether IP_TRANSPARENT is set, and so whether the
	// original source may be used (spec/datapath.md §3.3).
	Transparent() bool
}

// Conn is one TCP connection of a Network. It has the method set of
// hbone.Socket. Addresses are unmapped: never IPv4 in IPv6.
type Conn interface {
	net.Conn
	CloseWrite() error
	// Abort closes with RST (SO_LINGER 0).
	Abort() error
	// TryWrite writes what fits without blocking; n < len(p) with a nil error
	// means that the socket is full.
	TryWrite(p []byte) (n int, err error)

	Local() netip.AddrPort
	Remote() netip.AddrPort
	// OriginalDst is the address that the client dialled before redirection
	// (SO_ORIGINAL_DST, spec/datapath.md §3.5). Without redirection it is Local.
	OriginalDst() (netip.AddrPort, error)
}
