package loopback

import (
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// The proxy asks its connections whether the application has given up.
func TestPeerReset(t *testing.T) {
	f := New()
	ln := listen(t, f.Host(ipB).App(), "0.0.0.0:80")
	client, err := f.Host(ipA).App().Dial(t.Context(), netip.Addr{}, b80)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	server, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	socket := server.(interface{ PeerReset() bool })
	if socket.PeerReset() {
		t.Error("reset before Abort")
	}
	if err := client.Abort(); err != nil {
		t.Fatal(err)
	}
	awaitHangup(t, server.(*conn))
	if !socket.PeerReset() {
		t.Error("not reset after Abort")
	}
}

// awaitHangup blocks until an event of the socket says that it is of no use.
func awaitHangup(t *testing.T, c *conn) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var pollErr error
	err = raw.Control(func(fd uintptr) {
		for pollErr = unix.EINTR; pollErr == unix.EINTR; {
			_, pollErr = unix.Poll([]unix.PollFd{{Fd: int32(fd)}}, 10_000)
		}
	})
	if err != nil || pollErr != nil {
		t.Fatal(err, pollErr)
	}
}
