package netns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// bound is the Bound of real sockets.
type bound struct {
	s    *sockets
	addr netip.AddrPort
	file *os.File // the socket; nil = closed, or handed over
}

var _ Bound = (*bound)(nil)

// Bind implements Network. Its errors are those of Listen. It does not block.
func (s *sockets) Bind(ctx context.Context, addr netip.AddrPort) (Bound, error) {
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	if !addr.Addr().IsValid() {
		return nil, bindError(addr, errors.New("no address"))
	}
	b := &bound{s: s, addr: s.bindAddr(addr)}
	if err := s.inside(ctx, b.bind); err != nil {
		_ = b.Close() // it has not been used
		return nil, s.bindFailed(unix.IPPROTO_TCP, b.addr, err)
	}
	return b, nil
}

// bind opens the socket and gives it its address.
func (b *bound) bind() error {
	fd, err := b.open()
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	b.file = os.NewFile(uintptr(fd), "") // it blocks; package net changes that when it takes over
	if err := setInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return fmt.Errorf("set SO_REUSEADDR: %w", err)
	}
	if b.addr.Addr() == netip.IPv6Unspecified() { // whatever net.ipv6.bindv6only says here
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
	if b.addr.Port() == 0 {
		return b.takePort(fd)
	}
	return nil
}

func (b *bound) open() (fd int, err error) {
	if b.addr.Addr().Is4() {
		return streamSocket(unix.AF_INET)
	}
	fd, err = streamSocket(unix.AF_INET6)
	if withoutIPv6(b.addr, err) {
		b.addr = wildcard4(b.addr.Port())
		return streamSocket(unix.AF_INET)
	}
	return fd, err
}

// takePort learns which port the kernel has chosen.
func (b *bound) takePort(fd int) error {
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

// Addr implements Bound.
func (b *bound) Addr() netip.AddrPort { return b.addr }

// Listen implements Bound, on the socket that is held. It does not block.
func (b *bound) Listen(ctx context.Context) (Listener, error) {
	if b.file == nil {
		return nil, bindError(b.addr, net.ErrClosed)
	}
	// The Listener has a duplicate. In the end there is nothing to tell of this one.
	defer func() { _ = b.Close() }()
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	l := &tcpListener{addr: b.addr, s: b.s}
	fd := int(b.file.Fd())
	var err error
	if l.transparent, err = b.s.makeTransparent(fd); err != nil {
		return nil, bindError(b.addr, err)
	}
	if err := unix.Listen(fd, b.s.opt.backlog); err != nil {
		return nil, b.s.bindFailed(unix.IPPROTO_TCP, b.addr, os.NewSyscallError("listen", err))
	}
	ln, err := net.FileListener(b.file)
	if err != nil {
		return nil, bindError(b.addr, err)
	}
	l.ln = ln.(*net.TCPListener)
	return l, nil
}

// Close implements Bound.
func (b *bound) Close() error {
	if b.file == nil {
		return nil
	}
	f := b.file
	b.file = nil
	return f.Close()
}

// control runs f on the descriptor of c.
func control(c interface{ Control(func(fd uintptr)) error }, f func(fd int) error) error {
	var err error
	if cerr := c.Control(func(fd uintptr) { err = f(int(fd)) }); cerr != nil {
		return cerr
	}
	return err
}

// rawFile lets control use a file without switching it to blocking mode.
type rawFile struct{ f *os.File }

func (r rawFile) Control(f func(fd uintptr)) error {
	c, err := r.f.SyscallConn()
	if err != nil {
		return err
	}
	return c.Control(f)
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
