//go:build e2e

package netns

import (
	"os"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/world"
)

// TestInterop runs the same checks with another implementation on one side:
// ZTUNNEL_PEER_BIN. Where it differs by design (resets, design D6), only our
// leg is asserted. "control" is the peer with itself: what fails there is no
// fault of ours.
func TestInterop(t *testing.T) {
	if os.Getenv("ZTUNNEL_PEER_BIN") == "" {
		t.Skip("ZTUNNEL_PEER_BIN names no peer")
	}
	world.RequireRoot(t)
	theirs := world.ProxyOptions{Bin: world.Binary(t, "ZTUNNEL_PEER_BIN"), Peer: true, Credentials: (*world.Pod).StartIstiod}
	for _, role := range []struct {
		name string
		o    world.PairOptions
	}{
		{"control", world.PairOptions{CaptureClient: true, CaptureServ: true, Source: theirs, Dest: theirs}},
		{"source", world.PairOptions{CaptureClient: true, CaptureServ: true, Source: theirs}},
		{"destination", world.PairOptions{CaptureClient: true, CaptureServ: true, Dest: theirs}},
	} {
		t.Run(role.name, func(t *testing.T) {
			t.Run("exchange", func(t *testing.T) { newPair(t, role.o).checkExchange() })
			t.Run("same node", func(t *testing.T) {
				o := role.o
				o.SameNode = true
				newPair(t, o).checkExchange()
			})
			t.Run("half close", func(t *testing.T) { newPair(t, role.o).checkHalfClose() })
			t.Run("reset", func(t *testing.T) { newPair(t, role.o).checkReset() })
			t.Run("bulk", func(t *testing.T) { newPair(t, role.o).checkBulk() })
			t.Run("policy", func(t *testing.T) {
				o := role.o
				o.Policies = denyChat
				newPair(t, o).checkDenied()
			})
			t.Run("D11 many denied", func(t *testing.T) {
				o := role.o
				o.Policies = denyChat
				newPair(t, o).checkManyDenied()
			})
			t.Run("N-17 shutdown", func(t *testing.T) {
				p, limit := newPair(t, role.o), shutdownLimit
				ours := p.Source
				if role.o.Source.Peer {
					ours = p.Dest
				}
				if role.o.Dest.Peer && role.o.Source.Peer {
					// A pooled tunnel without streams holds the peer up, now and then until
					// its deadline, 10 s.
					limit = 15 * time.Second
				}
				p.checkShutdown(ours, limit)
			})
		})
	}
	t.Run("xDS", func(t *testing.T) { checkInteropXDS(t, theirs) })
	t.Run("source alone", func(t *testing.T) { // N-02 with a peer
		newPair(t, world.PairOptions{CaptureClient: true, Source: theirs}).checkExchange()
	})
	t.Run("destination alone", func(t *testing.T) {
		o := world.PairOptions{CaptureServ: true, Dest: theirs}
		t.Run("N-03", func(t *testing.T) { newPair(t, o).checkExchange() })
		t.Run("N-19", func(t *testing.T) { checkPrincipals(t, theirs) })
		t.Run("N-20", func(t *testing.T) { newPair(t, o).checkIPMismatch() })
		t.Run("N-24", func(t *testing.T) { newPair(t, o).checkTrustDomain() })
	})
}

// checkInteropXDS feeds both implementations from one control plane, of which the
// peer thus also says that it speaks the protocol.
func checkInteropXDS(t *testing.T, theirs world.ProxyOptions) {
	var ours world.ProxyOptions
	for _, role := range []struct {
		name         string
		source, dest world.ProxyOptions
	}{{"source", theirs, ours}, {"destination", ours, theirs}} {
		o := world.PairOptions{CaptureClient: true, CaptureServ: true, Source: role.source, Dest: role.dest}
		o.Source.XDS, o.Dest.XDS = true, true
		t.Run("N-04 "+role.name, func(t *testing.T) { newPair(t, o).checkExchange() })
		t.Run("policy push "+role.name, func(t *testing.T) { checkPolicyPush(t, o) })
		t.Run("N-16 "+role.name, func(t *testing.T) { checkLoadBalancing(t, role.source, role.dest) })
	}
	for _, row := range []struct {
		name  string
		check func(*testing.T, world.ProxyOptions)
	}{
		{"N-08", checkWorkloadWaypoint}, {"N-09", checkDoubleHBONE}, {"N-10", checkDoubleHBONEByHostname}, {"N-11", checkServiceWaypoint},
		{"N-12", checkWaypointByService}, {"N-13", checkWaypointByWorkload}, {"N-14", checkSandwichPlain}, {"N-15", checkSandwichProxy},
	} {
		t.Run(row.name, func(t *testing.T) { row.check(t, theirs) })
	}
	t.Run("N-21", func(t *testing.T) { checkServiceHostname(t, theirs, 8080) })
	t.Run("N-22", func(t *testing.T) { checkServiceHostname(t, theirs, 0) })
}

// checkDenied expects that port ChatPort is denied at the destination, and that
// both sides say so in their own log.
func (p *pair) checkDenied() {
	p.T.Helper()
	if err := world.Exchange(p.Dial(world.ChatPort), "denied", "denied"); err == nil {
		p.T.Error("a denied connection works")
	}
	p.Dest.Expect(p.Ctx, world.Fields{"error": "connection closed due to policy rejection: explicitly denied by: default/deny-chat"})
	p.Source.Expect(p.Ctx, world.Fields{"error": "http status: 401 Unauthorized"})
	if err := world.Exchange(p.Dial(world.DoublePort), greeting, greeting+greeting); err != nil {
		p.T.Error(err)
	}
}
