package main

import (
	"bytes"
	"errors"
	"io"
	"testing"
)

// A client that speaks something else, and much of it, can read why it is refused,
// although what we do not read of it makes the end a reset (faults 93).
func TestFault_093_SOCKSRefusalCanBeRead(t *testing.T) {
	d := startDirect(t, "local", "UNSTABLE_ENABLE_SOCKS5=true")
	for range 20 {
		c, err := d.dial(directSOCKS)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(append([]byte("GET / HTTP/1.1\r\n"), make([]byte, 10_000)...)); err != nil {
			t.Fatal(err)
		}
		d.eventually(func() error { // the reset has arrived
			if socket, ok := c.(interface{ PeerReset() bool }); !ok || !socket.PeerReset() {
				return errors.New("the connection was not reset")
			}
			return nil
		})
		got, want := make([]byte, 10), []byte{5, 7, 0, 1, 0, 0, 0, 0, 0, 0}
		if n, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("got % x, %v, want % x", got[:n], err, want)
		}
	}
}
