package loopback

import (
	"io"
	"net"
	"net/netip"
	"syscall"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// conn is a connection over 127.0.0.1 that shows virtual addresses.
type conn struct {
	netns.Conn
	local, remote, orig netip.AddrPort
}

var (
	_ syscall.Conn  = (*conn)(nil)
	_ io.ReaderFrom = (*conn)(nil)
)

func (c *conn) Local() netip.AddrPort                { return c.local }
func (c *conn) Remote() netip.AddrPort               { return c.remote }
func (c *conn) LocalAddr() net.Addr                  { return net.TCPAddrFromAddrPort(c.local) }
func (c *conn) RemoteAddr() net.Addr                 { return net.TCPAddrFromAddrPort(c.remote) }
func (c *conn) OriginalDst() (netip.AddrPort, error) { return c.orig, nil }

// PeerReset tells whether the peer has reset the connection. It is false where
// the system does not tell.
func (c *conn) PeerReset() bool {
	socket, ok := c.Conn.(interface{ PeerReset() bool })
	return ok && socket.PeerReset()
}

// SyscallConn implements syscall.Conn.
func (c *conn) SyscallConn() (syscall.RawConn, error) { return c.Conn.(syscall.Conn).SyscallConn() }

// ReadFrom implements io.ReaderFrom; between two connections it splices.
func (c *conn) ReadFrom(r io.Reader) (int64, error) {
	to := c.Conn.(io.ReaderFrom)
	switch s := r.(type) {
	case *conn:
		return to.ReadFrom(s.Conn)
	case *io.LimitedReader:
		if from, ok := s.R.(*conn); ok {
			lr := io.LimitedReader{R: from.Conn, N: s.N}
			n, err := to.ReadFrom(&lr)
			s.N = lr.N
			return n, err
		}
	}
	return to.ReadFrom(r)
}
