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
	fd   int // -1 = closed
	addr netip.AddrPort
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
	b := &bound{s: s, fd: -1, addr: s.bindAddr(addr)}
	if err := s.inside(b.bind); err != nil {
		return nil, bindError(b.addr, errors.Join(err, b.Close()))
	}
	return b, nil
}

func (b *bound) bind() error {
	family := unix.AF_INET
	if b.addr.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err := streamSocket(family)
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

// Addr implements Bound.
func (b *bound) Addr() netip.AddrPort { return b.addr }

// Listen implements Bound by Network.Listen on the port that is held. It lets go
// of it if that succeeds: sockets that reuse an address may share it as long as
// at most one of them listens.
func (b *bound) Listen(ctx context.Context) (Listener, error) {
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

// Close implements Bound.
func (b *bound) Close() error {
	if b.fd < 0 {
		return nil
	}
	fd := b.fd
	b.fd = -1
	return os.NewSyscallError("close", unix.Close(fd))
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
