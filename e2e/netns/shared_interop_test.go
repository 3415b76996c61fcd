//go:build e2e

package netns

import (
	"os"
	"testing"

	"github.com/ztunnel-go/ztunnel/e2e/world"
)

// TestInterop_Shared runs a proxy of ours and one of another implementation on
// two nodes, both in shared mode. "control" is the peer with itself: it says that
// the agent and the rules of this suite are those that it knows.
func TestInterop_Shared(t *testing.T) {
	if os.Getenv("ZTUNNEL_PEER_BIN") == "" {
		t.Skip("ZTUNNEL_PEER_BIN names no peer")
	}
	world.RequireRoot(t)
	theirs := world.ProxyOptions{Bin: world.Binary(t, "ZTUNNEL_PEER_BIN"), Peer: true, Credentials: (*world.Pod).StartIstiod, Shared: true}
	ours := world.ProxyOptions{Shared: true}
	for _, role := range []struct {
		name         string
		source, dest world.ProxyOptions
	}{{"control", theirs, theirs}, {"source", theirs, ours}, {"destination", ours, theirs}} {
		o := world.PairOptions{CaptureClient: true, CaptureServ: true, Source: role.source, Dest: role.dest}
		t.Run(role.name, func(t *testing.T) {
			t.Run("exchange", func(t *testing.T) { newPair(t, o).checkExchange() })
			t.Run("half close", func(t *testing.T) { newPair(t, o).checkHalfClose() })
			t.Run("policy", func(t *testing.T) {
				o := o
				o.Policies = denyChat
				newPair(t, o).checkDenied()
			})
		})
	}
}
