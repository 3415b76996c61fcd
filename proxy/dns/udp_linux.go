package dns

import (
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// readability returns a function that waits until there is something to read from
// c, or its deadline has passed. It is for one goroutine.
func readability(c *net.UDPConn) (func() error, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	ready := func(fd uintptr) bool {
		fds := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds[:], 0)
		return n > 0 || err != nil && err != unix.EINTR // reading will tell the error
	}
	return func() error { return raw.Read(ready) }, nil
}

// leaveGroup takes c out of the group of sockets that share its port, without
// losing what it has queued: a connected socket gets what its peer sends, and the
// group chooses among the others. It connects to a port from which nobody sends;
// replies name their receivers and go on.
func leaveGroup(c *net.UDPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	const discard = 9 // RFC 863
	var nobody unix.Sockaddr = &unix.SockaddrInet4{Port: discard, Addr: [4]byte{127, 0, 0, 1}}
	if a, ok := c.LocalAddr().(*net.UDPAddr); ok && a.IP.To4() == nil {
		nobody = &unix.SockaddrInet6{Port: discard, Addr: [16]byte{15: 1}}
	}
	cerr := raw.Control(func(fd uintptr) { err = os.NewSyscallError("connect", unix.Connect(int(fd), nobody)) })
	if cerr != nil {
		return cerr
	}
	return err
}
