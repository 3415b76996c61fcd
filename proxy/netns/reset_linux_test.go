package netns

import (
	"io"
	"net/netip"
	"testing"
)

// PeerReset sees an RST, also behind data that nobody has read, and does not
// take a FIN for one.
func TestPeerReset(t *testing.T) {
	network := NewHost(HostConfig{})
	ln, err := network.Listen(t.Context(), netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for _, tt := range []struct {
		name string
		end  func(Conn) error
		want bool
	}{
		{"open", func(Conn) error { return nil }, false},
		{"half closed", Conn.CloseWrite, false},
		{"reset", Conn.Abort, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			peer, err := network.Dial(t.Context(), netip.Addr{}, ln.Addr())
			if err != nil {
				t.Fatal(err)
			}
			defer peer.Close()
			conn, err := ln.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := io.WriteString(peer, "unread"); err != nil {
				t.Fatal(err)
			}
			if err := tt.end(peer); err != nil {
				t.Fatal(err)
			}
			// Loopback delivers before the call returns.
			if got := conn.(interface{ PeerReset() bool }).PeerReset(); got != tt.want {
				t.Errorf("PeerReset() = %t, want %t", got, tt.want)
			}
		})
	}
}
