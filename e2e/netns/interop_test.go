//go:build e2e

package netns

import (
	"os"
	"testing"
)

// TestInterop runs the same checks with another implementation on one side:
// ZTUNNEL_PEER_BIN. Where it differs by design (resets, design D6), only our
// leg is asserted. "control" is the peer with itself: what fails there is no
// fault of ours.
func TestInterop(t *testing.T) {
	if os.Getenv("ZTUNNEL_PEER_BIN") == "" {
		t.Skip("ZTUNNEL_PEER_BIN names no peer")
	}
	requireRoot(t)
	theirs := proxyOptions{bin: binary(t, "ZTUNNEL_PEER_BIN"), peer: true}
	for _, role := range []struct {
		name string
		o    pairOptions
	}{
		{"control", pairOptions{captureClient: true, captureServ: true, source: theirs, dest: theirs}},
		{"source", pairOptions{captureClient: true, captureServ: true, source: theirs}},
		{"destination", pairOptions{captureClient: true, captureServ: true, dest: theirs}},
	} {
		t.Run(role.name, func(t *testing.T) {
			t.Run("exchange", func(t *testing.T) { newPair(t, role.o).checkExchange() })
			t.Run("same node", func(t *testing.T) {
				o := role.o
				o.sameNode = true
				newPair(t, o).checkExchange()
			})
			t.Run("half close", func(t *testing.T) { newPair(t, role.o).checkHalfClose() })
			t.Run("reset", func(t *testing.T) { newPair(t, role.o).checkReset() })
			t.Run("bulk", func(t *testing.T) { newPair(t, role.o).checkBulk() })
			t.Run("policy", func(t *testing.T) {
				o := role.o
				o.policies = denyChat
				newPair(t, o).checkDenied()
			})
			t.Run("D11 many denied", func(t *testing.T) {
				o := role.o
				o.policies = denyChat
				newPair(t, o).checkManyDenied()
			})
			t.Run("N-17 shutdown", func(t *testing.T) {
				p := newPair(t, role.o)
				ours := p.source
				if role.o.source.peer {
					ours = p.dest
				}
				p.checkShutdown(ours)
			})
		})
	}
	t.Run("source alone", func(t *testing.T) { // N-02 with a peer
		newPair(t, pairOptions{captureClient: true, source: theirs}).checkExchange()
	})
	t.Run("destination alone", func(t *testing.T) {
		o := pairOptions{captureServ: true, dest: theirs}
		t.Run("N-03", func(t *testing.T) { newPair(t, o).checkExchange() })
		t.Run("N-19", func(t *testing.T) { checkPrincipals(t, theirs) })
		t.Run("N-20", func(t *testing.T) { newPair(t, o).checkIPMismatch() })
		t.Run("N-24", func(t *testing.T) { newPair(t, o).checkTrustDomain() })
	})
}

// checkDenied expects that port chatPort is denied at the destination, and that
// both sides say so in their own log.
func (p *pair) checkDenied() {
	p.t.Helper()
	if err := exchange(p.dial(chatPort), "denied", "denied"); err == nil {
		p.t.Error("a denied connection works")
	}
	p.dest.expect(p.ctx, fields{"error": "connection closed due to policy rejection: explicitly denied by: default/deny-chat"})
	p.source.expect(p.ctx, fields{"error": "http status: 401 Unauthorized"})
	if err := exchange(p.dial(doublePort), greeting, greeting+greeting); err != nil {
		p.t.Error(err)
	}
}
