package netns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Bound holds a TCP port without listening on it: it takes no connection, and
// has found out whether it could. It is owned by the caller.
type Bound struct {
	s    *sockets
	fd   int // -1 = closed
	addr netip.AddrPort
}

// Bind takes the port of a later Listen, with the same errors. Connections to
// it are refused until then.
func (s *sockets) Bind(ctx context.Context, addr netip.AddrPort) (*Bound, error) {
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	if !addr.Addr().IsValid() {
		return nil, bindError(addr, errors.New("no address"))
	}
	b := &Bound{s: s, fd: -1, addr: s.bindAddr(addr)}
	if err := s.inside(b.bind); err != nil {
		return nil, bindError(b.addr, errors.Join(err, b.Close()))
	}
	return b, nil
}

func (b *Bound) bind() error {
	family := unix.AF_INET
	if b.addr.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	b.fd = fd
	// What net sets on its own for a listener, so that both get the same answer.
	if err := setInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return fmt.Errorf("set SO_REUSEADDR: %w", err)
	}
	if b.addr.Addr().IsUnspecified() && b.addr.Addr().Is6() {
		if err := setInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0); err != nil {
			return fmt.Errorf("clear IPV6_V6ONLY: %w", err)
		}
	}
	if err := b.s.setListenOptions(fd, b.addr); err != nil {
		return err
	}
	if err := unix.Bind(fd, sockaddr(b.addr)); err != nil {
		return os.NewSyscallError("bind", err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return os.NewSyscallError("getsockname", err)
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		b.addr = netip.AddrPortFrom(b.addr.Addr(), uint16(sa.Port))
	case *unix.SockaddrInet6:
		b.addr = netip.AddrPortFrom(b.addr.Addr(), uint16(sa.Port))
	}
	return nil
}

// Addr is the bound address, with the port that the kernel chose for port 0.
func (b *Bound) Addr() netip.AddrPort { return b.addr }

// Listen is Network.Listen on the port that is held. It lets go of it if that
// succeeds: sockets that reuse an address may share it while one of them
// listens.
func (b *Bound) Listen(ctx context.Context) (Listener, error) {
	if b.fd < 0 {
		return nil, bindError(b.addr, net.ErrClosed)
	}
	ln, err := b.s.Listen(ctx, b.addr)
	if err != nil {
		return nil, err
	}
	if err := b.Close(); err != nil {
		return nil, errors.Join(bindError(b.addr, err), ln.Close())
	}
	return ln, nil
}

// Close frees the port, unless Listen has taken it over.
func (b *Bound) Close() error {
	if b.fd < 0 {
		return nil
	}
	fd := b.fd
	b.fd = -1
	return os.NewSyscallError("close", unix.Close(fd))
}

// listenControl runs between socket and bind.
func (s *sockets) listenControl(addr netip.AddrPort) func(string, string, syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		return control(c, func(fd int) error { return s.setListenOptions(fd, addr) })
	}
}

// setListenOptions configures a socket that will listen. Accepted sockets
// inherit keepalive, user timeout and mark, which saves system calls per
// connection.
func (s *sockets) setListenOptions(fd int, addr netip.AddrPort) error {
	if s.opt.reusePort {
		if err := setInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1); err != nil {
			s.log.Warn("listener can't share its port", "address", addr, "error", err)
		}
	}
	s.setTCPOptions(fd)
	return setMark(fd, s.opt.listenMark)
}

// finishListener does what comes after bind and listen.
func (s *sockets) finishListener(ln syscall.Conn) (transparent bool, err error) {
	c, err := ln.SyscallConn()
	if err != nil {
		return false, err
	}
	err = control(c, func(fd int) error {
		// A second listen changes the backlog, for which net takes somaxconn.
		if err := unix.Listen(fd, s.opt.backlog); err != nil {
			return os.NewSyscallError("listen", err)
		}
		transparent, err = s.makeTransparent(fd)
		return err
	})
	return transparent, err
}

// setTCPOptions sets what every TCP socket has. Keepalive and user timeout
// are worth trying and no reason to fail.
func (s *sockets) setTCPOptions(fd int) {
	_ = setInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	if k := s.opt.keepalive; k.Enabled {
		_ = setInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
		_ = setInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(k.Time/time.Second))
		_ = setInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(k.Interval/time.Second))
		_ = setInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPCNT, k.Retries)
	}
	if t := s.opt.userTimeout; t > 0 {
		_ = setInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(t.Milliseconds()))
	}
}

// makeTransparent follows spec/datapath.md §3.3: the IPv4 option, on an IPv6
// socket too.
func (s *sockets) makeTransparent(fd int) (bool, error) {
	if s.opt.originalSource == OriginalSourceOff {
		return false, nil
	}
	err := setInt(fd, unix.IPPROTO_IP, unix.IP_TRANSPARENT, 1)
	if err != nil && s.opt.originalSource == OriginalSourceRequired {
		return false, fmt.Errorf("set IP_TRANSPARENT, which the original source needs: %w", err)
	}
	return err == nil, nil
}

// dialControl prepares an outgoing socket. In another namespace it puts a
// socket from there in the place of the one that net opened here, which is
// neither connected nor known to the poller yet.
func (s *sockets) dialControl(src netip.Addr) func(context.Context, string, string, syscall.RawConn) error {
	return func(_ context.Context, network, _ string, c syscall.RawConn) error {
		return control(c, func(fd int) error {
			if s.opt.enter != nil {
				if err := s.replaceSocket(fd, network); err != nil {
					return err
				}
			}
			s.setTCPOptions(fd)
			if err := setMark(fd, s.opt.dialMark); err != nil {
				return err
			}
			s.bindSource(fd, src)
			return nil
		})
	}
}

func (s *sockets) replaceSocket(fd int, network string) error {
	family := unix.AF_INET
	if network == "tcp6" {
		family = unix.AF_INET6
	}
	var inside int
	err := s.inside(func() (err error) {
		inside, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
		return os.NewSyscallError("socket", err)
	})
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(inside) }() // the duplicate lives on
	return os.NewSyscallError("dup3", unix.Dup3(inside, fd, unix.O_CLOEXEC))
}

// bindSource asks for the address src without a port: the full original tuple
// is the client's entry in conntrack. The port is chosen here and not by
// connect, because connect prefers even ports, as it does for the client
// itself: a captured connection whose port it hits by chance would swallow
// ours. bind prefers odd ones, and so leaves the even ones to what else connects
// in this namespace.
//
// What fails is a warning: the connection is made from an address of ours then.
func (s *sockets) bindSource(fd int, src netip.Addr) {
	if !src.IsValid() {
		return
	}
	level, transparent, freebind := unix.IPPROTO_IP, unix.IP_TRANSPARENT, unix.IP_FREEBIND
	if src.Is6() {
		level, transparent, freebind = unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT, unix.IPV6_FREEBIND
	}
	err := errors.Join(setInt(fd, level, transparent, 1), setInt(fd, level, freebind, 1))
	if err == nil {
		err = os.NewSyscallError("bind", unix.Bind(fd, sockaddr(netip.AddrPortFrom(src, 0))))
	}
	if err != nil {
		s.log.Warn("original source not used", "source", src, "error", err)
	}
}

func (s *sockets) packetControl(addr netip.AddrPort) func(string, string, syscall.RawConn) error {
	mark := s.opt.listenMark
	if addr.Port() == 0 {
		mark = s.opt.dialMark
	}
	return func(_, _ string, c syscall.RawConn) error {
		return control(c, func(fd int) error {
			if s.opt.reusePort {
				if err := setInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1); err != nil {
					return fmt.Errorf("set SO_REUSEPORT: %w", err)
				}
			}
			return setMark(fd, mark)
		})
	}
}

func control(c interface{ Control(func(fd uintptr)) error }, f func(fd int) error) error {
	var err error
	if cerr := c.Control(func(fd uintptr) { err = f(int(fd)) }); cerr != nil {
		return cerr
	}
	return err
}

func setInt(fd, level, name, value int) error {
	return os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, level, name, value))
}

func setMark(fd int, mark uint32) error {
	if mark == 0 {
		return nil
	}
	if err := setInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(mark)); err != nil {
		return fmt.Errorf("set packet mark %#x: %w", mark, err)
	}
	return nil
}

// writeOnce writes without waiting; a full socket is n < len(p), not an error.
func writeOnce(fd uintptr, p []byte) (int, error) {
	for {
		n, err := unix.Write(int(fd), p)
		switch err {
		case nil:
			return n, nil
		case unix.EINTR:
		case unix.EAGAIN:
			return 0, nil
		default:
			return 0, os.NewSyscallError("write", err)
		}
	}
}

// Socket options of netfilter: linux/netfilter_ipv4.h, linux/netfilter_ipv6/ip6_tables.h.
const (
	soOriginalDst   = 80
	ip6tOriginalDst = 80
)

// originalDst asks conntrack. local tells the family of the connection.
func originalDst(c syscall.RawConn, local netip.AddrPort) (dst netip.AddrPort, err error) {
	err = control(c, func(fd int) error {
		if local.Addr().Is4() {
			var sa unix.RawSockaddrInet4
			if err := getsockopt(fd, unix.IPPROTO_IP, soOriginalDst, unsafe.Pointer(&sa), unsafe.Sizeof(sa)); err != nil {
				return err
			}
			dst = netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), networkOrder(&sa.Port))
			return nil
		}
		var sa unix.RawSockaddrInet6
		if err := getsockopt(fd, unix.IPPROTO_IPV6, ip6tOriginalDst, unsafe.Pointer(&sa), unsafe.Sizeof(sa)); err != nil {
			return err
		}
		dst = netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), networkOrder(&sa.Port))
		return nil
	})
	return dst, err
}

func networkOrder(p *uint16) uint16 {
	return binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(p))[:])
}

func getsockopt(fd, level, name int, p unsafe.Pointer, size uintptr) error {
	n := uint32(size)
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(name),
		uintptr(p), uintptr(unsafe.Pointer(&n)), 0)
	if errno != 0 {
		return os.NewSyscallError("getsockopt", errno)
	}
	return nil
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	sa := &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
	if zone := a.Addr().Zone(); zone != "" {
		if ifi, err := net.InterfaceByName(zone); err == nil {
			sa.ZoneId = uint32(ifi.Index)
		}
	}
	return sa
}
