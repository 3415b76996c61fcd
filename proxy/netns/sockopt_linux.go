package netns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// streamSocket opens a TCP socket, not an MPTCP one.
func streamSocket(family int) (fd int, err error) {
	return unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
}

// setListenOptions configures a socket that will listen. Accepted sockets
// inherit user timeout and mark, which saves system calls per connection.
func (s *sockets) setListenOptions(fd int, addr netip.AddrPort) error {
	if s.opt.reusePort {
		if err := setInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1); err != nil {
			s.log.Warn("listener can't share its port", "address", addr, "error", err)
		}
	}
	if t := s.opt.userTimeout; t > 0 {
		_ = setInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(t.Milliseconds()))
	}
	return setMark(fd, s.opt.listenMark)
}

// setTCPOptions sets what every TCP socket that connects has. Keepalive and user
// timeout are worth trying and no reason to fail.
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
	return func(ctx context.Context, network, _ string, c syscall.RawConn) error {
		return control(c, func(fd int) error {
			if s.opt.enter != nil {
				if err := s.replaceSocket(ctx, fd, network); err != nil {
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

func (s *sockets) replaceSocket(ctx context.Context, fd int, network string) error {
	family := unix.AF_INET
	if network == "tcp6" {
		family = unix.AF_INET6
	}
	var inside int
	err := s.inside(ctx, func() (err error) {
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
			// A port that the kernel chooses would be shared, too, and what comes to one
			// socket might be given to the other.
			if s.opt.reusePort && addr.Port() != 0 {
				if err := setInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1); err != nil {
					return fmt.Errorf("set SO_REUSEPORT: %w", err)
				}
			}
			return setMark(fd, mark)
		})
	}
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
