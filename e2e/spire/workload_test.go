//go:build e2e

package spire

import (
	"testing"
	"time"
)

// The proxies ask for themselves: their paths tell the agents which workload each
// stands for.
func TestWorkload_Traffic(t *testing.T) {
	m := newMesh(t, meshOptions{})
	m.selfEntries(0)
	m.launch((*side).workload)
	m.awaitAvailable()
	m.checkTraffic()
	m.checkProvider("spire-workload")
}

// selfEntries registers each proxy as its workload, and returns the entries' IDs.
func (m *mesh) selfEntries(ttl time.Duration) map[*side]string {
	m.T.Helper()
	ids := map[*side]string{}
	for _, s := range m.sides() {
		e := s.selfEntry()
		e.ttl = ttl
		ids[s] = s.entry(e)
	}
	return ids
}

func TestWorkload_RotationAndRestart(t *testing.T) {
	m := newMesh(t, meshOptions{})
	m.selfEntries(time.Minute)
	m.launch((*side).workload)
	m.awaitAvailable()
	m.survivesRotationAndRestart()
}

// A proxy whose entry comes late, and goes again.
func TestWorkload_EntryComesLateAndGoes(t *testing.T) {
	m := newMesh(t, meshOptions{})
	m.launch((*side).workload, "SVID_WITHDRAW_GRACE=2s")
	for _, s := range m.sides() {
		s.awaitReason("make a SPIRE entry for this node whose selectors match the proxy's own pod")
	}
	m.refuses()
	ids := m.selfEntries(0)
	m.awaitAvailable()
	m.checkTraffic()
	m.loses(m.client, ids[m.client], m.client.selfEntry())
}
