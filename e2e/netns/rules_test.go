//go:build e2e

package netns

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/ztunnel-go/ztunnel/e2e/world"
)

// TestRedirection checks namespaces, rules and sockets without a tunnel, so
// that a failure here says that the machine, not the proxy, is at fault.
func TestRedirection(t *testing.T) {
	for _, tc := range []struct{ client, server bool }{{false, false}, {true, false}, {false, true}, {true, true}} {
		t.Run(fmt.Sprintf("client=%v,server=%v", tc.client, tc.server), func(t *testing.T) {
			w := world.New(t)
			client, server := w.AddPod("client", 1), w.AddPod("server", 2)
			server.StartApp()
			for p, captured := range map[*world.Pod]bool{client: tc.client, server: tc.server} {
				if captured {
					p.Redirect()
					p.StartRelay()
				}
			}
			client.ExpectHello(client.Addr, netip.AddrPortFrom(server.Addr, world.HTTPPort))
			client.ExpectHello(client.Addr6, netip.AddrPortFrom(server.Addr6, world.HTTPPort))
		})
	}
}
