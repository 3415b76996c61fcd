//go:build e2e

package spire

import (
	"testing"
	"time"
)

// Two meshes, each with a SPIRE server of its own that has the bundle of the
// other: a peer of the other trust domain is believed only as long as the entry
// of the workload says federatesWith, on both sides.
func TestFederation(t *testing.T) {
	for _, tc := range []struct {
		name     string
		provider func(*side, ...string) []string
		entry    func(*side) entry // of the workload
		env      []string
	}{
		{"delegated", (*side).delegated, (*side).podEntry, []string{"SPIRE_BUNDLE_RESYNC=2s"}},
		{"broker", (*side).broker, (*side).podEntry, nil},
		{"workload", (*side).workload, (*side).selfEntry, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := newMesh(t, meshOptions{other: otherServer})
			m.client.server.federate(t, m.server.server.bundle(t))
			m.server.server.federate(t, m.client.server.bundle(t))
			ids := map[*side]string{}
			for _, s := range m.sides() {
				if tc.name != "workload" {
					s.entry(s.proxyEntry())
				}
				ids[s] = s.entry(tc.entry(s))
			}
			grant := func(s *side, domains ...string) {
				e := tc.entry(s)
				e.federates = domains
				s.updateEntry(t, ids[s], s.node, e)
			}
			m.launch(tc.provider, tc.env...)
			m.awaitAvailable()
			m.refuses()
			m.checkFederation(grant)
		})
	}
}

// checkFederation grants and takes back on either side.
func (m *mesh) checkFederation(grant func(s *side, domains ...string)) {
	m.T.Helper()
	foreign := map[*side]string{m.client: m.server.domain, m.server: m.client.domain}
	for s, domain := range foreign {
		grant(s, domain)
	}
	m.works()
	m.checkTraffic()
	f := m.openFleet(10, 200*time.Millisecond)
	for _, s := range m.sides() {
		// Without the grant its tunnels end and new ones are refused, although the
		// other side still believes this one.
		grant(s)
		f.allLost(20 * time.Second)
		m.refuses()
		grant(s, foreign[s])
		m.works()
		f = m.openFleet(10, 200*time.Millisecond)
	}
	f.check()
}
