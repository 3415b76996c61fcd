package netns

import "golang.org/x/sys/unix"

// tcpClose is TCP_CLOSE of the kernel's socket states (include/net/tcp_states.h).
const tcpClose = 7

// PeerReset tells whether the peer has reset the connection, which nobody would
// notice otherwise before reading or writing. A FIN is no reset. It does not
// block.
func (c *tcpConn) PeerReset() bool {
	reset := false
	err := control(c.raw, func(fd int) error {
		info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		reset = err == nil && info.State == tcpClose
		return err
	})
	return err == nil && reset
}
