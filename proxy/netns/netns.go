// Package netns opens the sockets of one network namespace: a pod's, the
// host's, or one that exists only in memory. The proxy never opens a socket of
// the data path in another way.
package netns

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"time"
)

// Network is a place where the data path opens its sockets. All methods are
// safe for concurrent use.
type Network interface {
	// Bind takes the TCP port of a later Listen, with the same errors, and does not
	// listen: connections to it are refused until then (design D13). The returned
	// Bound is owned by the caller.
	Bind(ctx context.Context, addr netip.AddrPort) (Bound, error)
	// Listen binds and listens. The returned listener is owned by the caller.
	Listen(ctx context.Context, addr netip.AddrPort) (Listener, error)
	// ListenPacket binds a UDP socket.
	ListenPacket(ctx context.Context, addr netip.AddrPort) (net.PacketConn, error)
	// Dial connects to dst. A valid src that differs from dst's address asks for
	// that source address (original source, port 0); where it can't be had the
	// connection is made without, after a warning, as spec/datapath.md §3.4 says.
	Dial(ctx context.Context, src netip.Addr, dst netip.AddrPort) (Conn, error)
}

// Bound holds a TCP port without listening on it: it takes no connection, and
// has found out whether it could. It is for one goroutine at a time.
type Bound interface {
	// Addr is the bound address, with the port that was chosen for port 0.
	Addr() netip.AddrPort
	// Listen makes the port a Listener, or after an error frees it: the Bound is used
	// up either way, and a second Listen gives an error that wraps net.ErrClosed, as
	// it does after Close.
	Listen(ctx context.Context) (Listener, error)
	// Close frees the port. After Listen it does nothing.
	Close() error
}

// Listener accepts the connections of one address. It may implement Yielder,
// Checker and DeadlineSetter.
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

// Yielder is a Listener that may share its port with listeners of other
// processes, as a proxy and its successor do (design D14). The methods are safe
// for concurrent use and don't wait for others.
type Yielder interface {
	// Yield steers new connections of the port away from this listener, to another
	// one. It is true if there was one; alone there is nothing to steer, which is no
	// error. What is queued here, or in the middle of its handshake, still comes
	// here. It is idempotent, and called again when connections that began after it
	// still come here.
	Yield() (bool, error)
	// Others tells how many other sockets listen on the same port in this network
	// namespace, at whatever address.
	Others() (int, error)
}

// Checker is a Listener that knows whether it still listens: whoever may
// administer the namespace can destroy a socket without its owner being told.
type Checker interface {
	// Listening is false as soon as no connection can come any more. It does not
	// block.
	Listening() bool
	// Sharer names who listens on the same port without being a proxy, "" if
	// nobody does: a program with our user can take part in a port that is shared
	// for the sake of our successor (SO_REUSEPORT), and gets a part of the
	// connections. Nobody is a stranger where listeners carry no mark. It enters the
	// namespace and blocks on nothing else.
	Sharer() (string, error)
}

// ErrShared is wrapped by errors that tell of a Sharer.
var ErrShared = errors.New("another program listens on the port, too")

// DeadlineSetter is a Listener whose Accept can be bounded in time.
type DeadlineSetter interface {
	// SetDeadline bounds Accept, pending and to come: once t has passed it fails,
	// without a look at the queue, with an error that wraps os.ErrDeadlineExceeded.
	// The zero time means no bound.
	SetDeadline(t time.Time) error
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
