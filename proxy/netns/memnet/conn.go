package memnet

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// link is what the two ends of a connection share.
type link struct {
	mu   sync.Mutex // guards all fields of both conns
	wake sync.Cond  // on mu: something changed at either end
	size int        // bytes that a receive buffer holds
}

// conn is one end. It follows Linux: received data outlives a reset, a socket
// error is reported once, and a close with unread data is a reset.
type conn struct {
	link          *link
	peer          *conn
	local, remote netip.AddrPort
	orig          netip.AddrPort

	buf      []byte // received, not read
	finIn    bool   // peer ended its direction
	finOut   bool   // we ended ours
	dead     bool   // reset by the peer
	sockErr  error  // to be reported once
	closed   bool
	rdl, wdl *deadline
}

var _ netns.Conn = (*conn)(nil)

// pair makes both ends. With redirection, what the client takes for its peer is
// not the server's local address.
func pair(size int, clientLocal, clientRemote, serverRemote, serverLocal netip.AddrPort) (client, server *conn) {
	l := &link{size: size}
	l.wake.L = &l.mu
	client = &conn{link: l, local: clientLocal, remote: clientRemote, orig: clientLocal}
	server = &conn{link: l, local: serverLocal, remote: serverRemote, orig: serverLocal}
	client.peer, server.peer = server, client
	return client, server
}

func (c *conn) Local() netip.AddrPort                { return c.local }
func (c *conn) Remote() netip.AddrPort               { return c.remote }
func (c *conn) LocalAddr() net.Addr                  { return net.TCPAddrFromAddrPort(c.local) }
func (c *conn) RemoteAddr() net.Addr                 { return net.TCPAddrFromAddrPort(c.remote) }
func (c *conn) OriginalDst() (netip.AddrPort, error) { return c.orig, nil }

func (c *conn) fail(op string, err error) error {
	if errno := syscall.Errno(0); errors.As(err, &errno) {
		err = os.NewSyscallError(op, errno)
	}
	return &net.OpError{Op: op, Net: "tcp", Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: err}
}

// Read implements net.Conn.
func (c *conn) Read(p []byte) (int, error) {
	c.link.mu.Lock()
	defer c.link.mu.Unlock()
	for {
		switch {
		case c.closed:
			return 0, c.fail("read", net.ErrClosed)
		case c.rdl.passed():
			return 0, c.fail("read", os.ErrDeadlineExceeded)
		case len(p) == 0:
			return 0, nil
		case len(c.buf) > 0:
			n := copy(p, c.buf)
			if c.buf = c.buf[n:]; len(c.buf) == 0 {
				c.buf = nil // give the memory back
			}
			c.link.wake.Broadcast()
			return n, nil
		case c.finIn:
			return 0, io.EOF
		case c.sockErr != nil:
			return 0, c.fail("read", c.takeError())
		case c.dead:
			return 0, io.EOF
		}
		c.link.wake.Wait()
	}
}

// Write implements net.Conn.
func (c *conn) Write(p []byte) (int, error) {
	c.link.mu.Lock()
	defer c.link.mu.Unlock()
	done := 0
	for {
		n, err := c.writeLocked(p[done:])
		if done += n; err != nil || done == len(p) {
			return done, err
		}
		c.link.wake.Wait()
	}
}

// TryWrite implements netns.Conn.
func (c *conn) TryWrite(p []byte) (int, error) {
	c.link.mu.Lock()
	defer c.link.mu.Unlock()
	return c.writeLocked(p)
}

// writeLocked writes what fits.
func (c *conn) writeLocked(p []byte) (int, error) {
	switch {
	case c.closed:
		return 0, c.fail("write", net.ErrClosed)
	case c.wdl.passed():
		return 0, c.fail("write", os.ErrDeadlineExceeded)
	case len(p) == 0:
		return 0, nil
	case c.sockErr != nil:
		return 0, c.fail("write", c.takeError())
	case c.finOut || c.dead:
		return 0, c.fail("write", syscall.EPIPE)
	case c.peer.closed:
		c.receiveReset() // the bytes are gone; the answer to them is a reset
		return len(p), nil
	}
	n := min(len(p), c.link.size-len(c.peer.buf))
	if n > 0 {
		c.peer.buf = append(c.peer.buf, p[:n]...)
		c.link.wake.Broadcast()
	}
	return n, nil
}

func (c *conn) takeError() error {
	err := c.sockErr
	c.sockErr = nil
	return err
}

// receiveReset is the arrival of RST.
func (c *conn) receiveReset() {
	if c.dead || c.closed {
		return
	}
	c.dead = true
	c.sockErr = syscall.ECONNRESET
	if c.finIn {
		c.sockErr = syscall.EPIPE
	}
	c.link.wake.Broadcast()
}

// CloseWrite implements netns.Conn.
func (c *conn) CloseWrite() error {
	c.link.mu.Lock()
	defer c.link.mu.Unlock()
	switch {
	case c.closed:
		return c.fail("close", net.ErrClosed)
	case c.dead:
		return c.fail("shutdown", syscall.ENOTCONN)
	}
	c.finish()
	return nil
}

func (c *conn) finish() {
	if c.finOut {
		return
	}
	c.finOut = true
	c.peer.finIn = true
	c.link.wake.Broadcast()
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.link.mu.Lock()
	defer c.link.mu.Unlock()
	return c.close(len(c.buf) > 0)
}

// Abort implements netns.Conn.
func (c *conn) Abort() error {
	c.link.mu.Lock()
	defer c.link.mu.Unlock()
	return c.close(!c.finOut || !c.finIn) // nothing to reset after both FINs
}

func (c *conn) close(reset bool) error {
	if c.closed {
		return c.fail("close", net.ErrClosed)
	}
	c.closed = true
	c.buf = nil
	c.rdl.stop()
	c.wdl.stop()
	switch {
	case c.dead:
	case reset:
		c.peer.receiveReset()
	default:
		c.finish()
	}
	c.link.wake.Broadcast()
	return nil
}

// SetDeadline implements net.Conn.
func (c *conn) SetDeadline(t time.Time) error { return c.setDeadline(t, &c.rdl, &c.wdl) }

// SetReadDeadline implements net.Conn.
func (c *conn) SetReadDeadline(t time.Time) error { return c.setDeadline(t, &c.rdl) }

// SetWriteDeadline implements net.Conn.
func (c *conn) SetWriteDeadline(t time.Time) error { return c.setDeadline(t, &c.wdl) }

func (c *conn) setDeadline(t time.Time, which ...**deadline) error {
	c.link.mu.Lock()
	defer c.link.mu.Unlock()
	if c.closed {
		return c.fail("set", net.ErrClosed)
	}
	for _, d := range which {
		(*d).stop()
		*d = newDeadline(t, &c.link.wake)
	}
	c.link.wake.Broadcast()
	return nil
}

// deadline is a point in time that wakes those who wait on a condition, whose
// lock guards it. nil = never.
type deadline struct {
	over  bool
	timer *time.Timer
}

func newDeadline(t time.Time, wake *sync.Cond) *deadline {
	if t.IsZero() {
		return nil
	}
	d := new(deadline)
	left := time.Until(t)
	if left <= 0 {
		d.over = true
		return d
	}
	d.timer = time.AfterFunc(left, func() {
		wake.L.Lock()
		defer wake.L.Unlock()
		d.over = true
		wake.Broadcast()
	})
	return d
}

func (d *deadline) passed() bool { return d != nil && d.over }

func (d *deadline) stop() {
	if d != nil && d.timer != nil {
		d.timer.Stop()
	}
}
