package zlog

import (
	"io"
	"syscall"

	"golang.org/x/sys/unix"
)

// vectored returns the cheapest way to write a batch to out: writev(2) if it
// has a descriptor.
func vectored(out io.Writer) writeFunc {
	file, ok := out.(syscall.Conn)
	if !ok {
		return joined(out)
	}
	raw, err := file.SyscallConn()
	if err != nil {
		return joined(out)
	}
	return func(vector [][]byte) (int, error) {
		var n int
		var werr error
		err := raw.Write(func(fd uintptr) bool {
			n, werr = unix.Writev(int(fd), vector)
			return werr != unix.EAGAIN
		})
		if err != nil {
			return 0, err
		}
		return max(n, 0), werr
	}
}
