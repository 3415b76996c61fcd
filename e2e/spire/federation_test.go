//go:build e2e

package spire

import (
	"testing"
	"time"
)

// Two meshes, each with a SPIRE server of its own that has the bundle of the
// other: a peer of the other trust domain is believed only as long as the entry
// of the workload says federatesWith, on both sides.
func TestDelegated_Federation(t *testing.T) {
	m := newMesh(t, meshOptions{other: otherServer})
	m.client.server.federate(t, m.server.server.bundle(t))
	m.server.server.federate(t, m.client.server.bundle(t))
	foreign := map[*side]string{m.client: otherDomain, m.server: meshDomain}
	ids := map[*side]string{}
	for _, s := range m.sides() {
		s.entry(s.proxyEntry())
		ids[s] = s.entry(s.podEntry())
	}
	m.launchDelegated("SPIRE_BUNDLE_RESYNC=2s")
	m.refuses()
	for _, s := range m.sides() {
		m.federates(s, ids[s], foreign[s])
	}
	m.works()
	m.checkTraffic()
	f := m.openFleet(10, 200*time.Millisecond)
	for _, tc := range []struct {
		name string
		s    *side
	}{{"source", m.client}, {"destination", m.server}} {
		// Without the grant its tunnels end and new ones are refused, although the
		// other side still believes this one.
		m.federates(tc.s, ids[tc.s])
		f.allLost(20 * time.Second)
		m.refuses()
		m.federates(tc.s, ids[tc.s], foreign[tc.s])
		m.works()
		f = m.openFleet(10, 200*time.Millisecond)
	}
	f.check()
}

// federates changes the entry of a workload. The agent holds only bundles that
// some entry of its own names, so that the proxy's names them too.
func (m *mesh) federates(s *side, id string, domains ...string) {
	m.T.Helper()
	e := s.podEntry()
	e.federates = domains
	s.updateEntry(m.T, id, s.node, e)
}
