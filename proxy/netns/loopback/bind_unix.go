//go:build unix

package loopback

import (
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// bindLoopback binds a client's socket, so that its address is known before it
// connects.
func bindLoopback(c syscall.RawConn) (at netip.AddrPort, err error) {
	cerr := c.Control(func(fd uintptr) {
		if err = unix.Bind(int(fd), &unix.SockaddrInet4{Addr: realIP.As4()}); err != nil {
			err = os.NewSyscallError("bind", err)
			return
		}
		var sa unix.Sockaddr
		if sa, err = unix.Getsockname(int(fd)); err != nil {
			err = os.NewSyscallError("getsockname", err)
			return
		}
		at = netip.AddrPortFrom(realIP, uint16(sa.(*unix.SockaddrInet4).Port))
	})
	if cerr != nil {
		return at, cerr
	}
	return at, err
}
