package netns

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"
)

// tcpConn is a Conn over a socket of the kernel.
//
// It is a syscall.Conn, so that a caller can wait for readability without
// holding a buffer, and an io.ReaderFrom that splices: io.Copy between two of
// them moves the bytes in the kernel.
type tcpConn struct {
	tcp           *net.TCPConn
	raw           syscall.RawConn
	local, remote netip.AddrPort
	accepted      *tcpListener // nil for a dialled connection
	guard         *loopGuard   // nil for a wrapped one
	track         tracked      // guarded by guard

	try     sync.Mutex // guards the fields below, which are arguments and results of tryOnce
	buf     []byte
	n       int
	err     error
	tryOnce func(fd uintptr) bool // kept, so that TryWrite does not allocate
}

var (
	_ Conn          = (*tcpConn)(nil)
	_ syscall.Conn  = (*tcpConn)(nil)
	_ io.ReaderFrom = (*tcpConn)(nil)
)

func newTCPConn(tcp *net.TCPConn, ln *tcpListener) (*tcpConn, error) {
	raw, err := tcp.SyscallConn()
	if err != nil {
		return nil, err
	}
	c := &tcpConn{tcp: tcp, raw: raw, accepted: ln, local: addrPort(tcp.LocalAddr()), remote: addrPort(tcp.RemoteAddr())}
	c.tryOnce = func(fd uintptr) bool {
		c.n, c.err = writeOnce(fd, c.buf)
		return true // never wait
	}
	return c, nil
}

// WrapTCP makes a dialled or accepted connection of package net a Conn, which
// then owns it. Its original destination is its local address.
func WrapTCP(tcp *net.TCPConn) (Conn, error) {
	c, err := newTCPConn(tcp, nil)
	if err != nil {
		return nil, err
	}
	return c, nil
}

func addrPort(a net.Addr) netip.AddrPort {
	if t, ok := a.(*net.TCPAddr); ok {
		return unmap(t.AddrPort())
	}
	return netip.AddrPort{}
}

func (c *tcpConn) Read(p []byte) (int, error)         { return c.tcp.Read(p) }
func (c *tcpConn) Write(p []byte) (int, error)        { return c.tcp.Write(p) }
func (c *tcpConn) CloseWrite() error                  { return c.tcp.CloseWrite() }
func (c *tcpConn) SetDeadline(t time.Time) error      { return c.tcp.SetDeadline(t) }
func (c *tcpConn) SetReadDeadline(t time.Time) error  { return c.tcp.SetReadDeadline(t) }
func (c *tcpConn) SetWriteDeadline(t time.Time) error { return c.tcp.SetWriteDeadline(t) }
func (c *tcpConn) Local() netip.AddrPort              { return c.local }
func (c *tcpConn) Remote() netip.AddrPort             { return c.remote }
func (c *tcpConn) LocalAddr() net.Addr                { return net.TCPAddrFromAddrPort(c.local) }
func (c *tcpConn) RemoteAddr() net.Addr               { return net.TCPAddrFromAddrPort(c.remote) }

// SyscallConn implements syscall.Conn.
func (c *tcpConn) SyscallConn() (syscall.RawConn, error) { return c.raw, nil }

// Close implements net.Conn.
func (c *tcpConn) Close() error {
	if c.guard != nil {
		c.guard.remove(&c.track)
	}
	return c.tcp.Close()
}

// Abort closes with RST. The socket may have been closed in one direction.
func (c *tcpConn) Abort() error {
	// An error means that the socket is closed already; Close says so too.
	_ = c.tcp.SetLinger(0)
	return c.Close()
}

// TryWrite implements Conn. It must not be called while a Write is blocked: it
// would wait for it.
func (c *tcpConn) TryWrite(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	c.try.Lock()
	defer c.try.Unlock()
	c.buf, c.n, c.err = p, 0, nil
	err := c.raw.Write(c.tryOnce)
	c.buf = nil
	if err == nil && c.err != nil {
		err = &net.OpError{Op: "write", Net: "tcp", Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: c.err}
	}
	return c.n, err
}

// ReadFrom implements io.ReaderFrom by splice where r is a socket of this
// package, or a limited one, and by copying otherwise.
func (c *tcpConn) ReadFrom(r io.Reader) (int64, error) {
	switch s := r.(type) {
	case *tcpConn:
		return c.tcp.ReadFrom(s.tcp)
	case *io.LimitedReader:
		if t, ok := s.R.(*tcpConn); ok {
			lr := io.LimitedReader{R: t.tcp, N: s.N}
			n, err := c.tcp.ReadFrom(&lr)
			s.N = lr.N
			return n, err
		}
	}
	return c.tcp.ReadFrom(r)
}

// OriginalDst implements Conn. Where nothing was redirected, and with TPROXY,
// that is the local address; a socket that is not transparent warns then,
// because it looks like missing rules. The error is that of a closed socket, or
// ErrSelfCapture.
func (c *tcpConn) OriginalDst() (netip.AddrPort, error) {
	if c.accepted == nil {
		return c.local, nil
	}
	dst, err := originalDst(c.raw, c.local)
	switch {
	case err == nil && dst != c.local:
		return dst, c.guard.capture(&c.track, flow{c.remote, dst})
	case err == nil:
		return dst, nil
	case errors.Is(err, net.ErrClosed):
		return netip.AddrPort{}, fmt.Errorf("original destination of %v: %w", c.remote, err)
	}
	if !c.accepted.transparent {
		c.accepted.s.log.Warn("original destination unknown, using the local address",
			"src.addr", c.remote, "local", c.local, "error", err)
	}
	return c.local, nil
}
