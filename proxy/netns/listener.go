package netns

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// tcpListener is a Listener over a socket of the kernel.
type tcpListener struct {
	ln          *net.TCPListener
	addr        netip.AddrPort
	transparent bool
	s           *sockets

	yieldMu  sync.Mutex // guards yielding
	yielding yielding
}

var (
	_ Listener       = (*tcpListener)(nil)
	_ Checker        = (*tcpListener)(nil)
	_ DeadlineSetter = (*tcpListener)(nil)
)

func (l *tcpListener) Accept() (Conn, error) {
	tcp, err := l.ln.AcceptTCP()
	if err != nil {
		return nil, err
	}
	c, err := newTCPConn(tcp, l)
	if err != nil {
		return nil, errors.Join(err, tcp.Close())
	}
	c.guard = l.s.guard
	// Package net knows only its own idea of keepalive for a listener that it did
	// not open. Like that one, ours is worth trying and no reason to fail.
	_ = tcp.SetKeepAliveConfig(l.s.keepalive())
	return c, nil
}

func (l *tcpListener) Close() error                  { return l.ln.Close() }
func (l *tcpListener) Addr() netip.AddrPort          { return l.addr }
func (l *tcpListener) Transparent() bool             { return l.transparent }
func (l *tcpListener) SetDeadline(t time.Time) error { return l.ln.SetDeadline(t) }

// Listening implements Checker by SO_ACCEPTCONN.
func (l *tcpListener) Listening() bool {
	c, err := l.ln.SyscallConn()
	if err != nil {
		return false
	}
	listens := 0
	cerr := c.Control(func(fd uintptr) {
		listens, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	})
	return cerr == nil && err == nil && listens != 0
}

// SyscallConn implements syscall.Conn, for those who steer a group of
// listeners that share a port.
func (l *tcpListener) SyscallConn() (syscall.RawConn, error) { return l.ln.SyscallConn() }
