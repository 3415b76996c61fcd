//go:build !linux

package netns

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Without Linux there is neither redirection nor an original source, marks or
// other namespaces: enough to develop with, not to capture.

func streamSocket(family int) (fd int, err error) {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	if fd, err = unix.Socket(family, unix.SOCK_STREAM, unix.IPPROTO_TCP); err != nil {
		return -1, err
	}
	unix.CloseOnExec(fd)
	return fd, nil
}

// yielding is empty: without Linux no two proxies share a port.
type yielding struct{}

func (s *sockets) setListenOptions(int, netip.AddrPort) error { return nil }

func setInt(fd, level, name, value int) error {
	return os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, level, name, value))
}

func (s *sockets) makeTransparent(int) (bool, error) {
	if s.opt.originalSource == OriginalSourceRequired {
		return false, fmt.Errorf("original source: %w", errors.ErrUnsupported)
	}
	return false, nil
}

func (s *sockets) dialControl(src netip.Addr) func(context.Context, string, string, syscall.RawConn) error {
	return func(context.Context, string, string, syscall.RawConn) error {
		if s.opt.dialMark != 0 {
			return fmt.Errorf("set packet mark %#x: %w", s.opt.dialMark, errors.ErrUnsupported)
		}
		if src.IsValid() {
			s.log.Warn("original source not used", "source", src, "error", errors.ErrUnsupported)
		}
		return nil
	}
}

func (s *sockets) packetControl(netip.AddrPort) func(string, string, syscall.RawConn) error {
	return nil
}

func writeOnce(fd uintptr, p []byte) (int, error) {
	for {
		n, err := syscall.Write(int(fd), p)
		switch err {
		case nil:
			return n, nil
		case syscall.EINTR:
		case syscall.EAGAIN:
			return 0, nil
		default:
			return 0, err
		}
	}
}

func originalDst(syscall.RawConn, netip.AddrPort) (netip.AddrPort, error) {
	return netip.AddrPort{}, errors.ErrUnsupported
}

// Sharer implements Checker: listeners carry no mark.
func (l *tcpListener) Sharer() (string, error) { return "", nil }
