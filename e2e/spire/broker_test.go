//go:build e2e

package spire

import (
	"fmt"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/world"
)

// Traffic with SVIDs by references to pods, which the agent attests by what the
// kubelet says.
func TestBroker_Traffic(t *testing.T) {
	m := newMesh(t, meshOptions{})
	m.entries()
	m.launch((*side).broker)
	m.awaitAvailable()
	m.checkTraffic()
	m.checkProvider("spire-broker")
}

// Workloads by their process, which the unix attestor knows by its path.
func TestBroker_ByPID(t *testing.T) {
	m := newMesh(t, meshOptions{agent: agentOptions{noPods: true}})
	apps := map[*side]*world.Process{m.client: m.Client.StartApp(), m.server: m.App}
	for _, s := range m.sides() {
		s.entry(s.proxyEntry())
		e := s.podEntry()
		e.selectors = self(t)
		s.entry(e)
		s.launch(s.broker("SPIFFE_BROKER_ATTESTATION=pid", pidEnv(apps[s])))
	}
	m.awaitAvailable()
	m.checkTraffic()
}

// Rotation of 60-second SVIDs, and of the proxy's own towards the broker, under
// connections that never pause; then the agent is killed and comes back.
func TestBroker_RotationAndRestart(t *testing.T) {
	m := newMesh(t, meshOptions{})
	for _, s := range m.sides() {
		for _, e := range []entry{s.proxyEntry(), s.podEntry()} {
			e.ttl = time.Minute
			s.entry(e)
		}
	}
	m.launch((*side).broker)
	m.awaitAvailable()
	m.survivesRotationAndRestart()
}

// survivesRotationAndRestart is for SVIDs of a minute. It lasts until the first
// ones have expired: tunnels that were set up with them take no new streams then,
// and go on with those that they have.
func (m *mesh) survivesRotationAndRestart() {
	m.T.Helper()
	f, a := m.openFleet(50, 200*time.Millisecond), m.arrive(100*time.Millisecond)
	first := m.server.await("Available", "")
	before := m.server.awaitRenewal(60*time.Second, first.Serial)
	m.server.kill()
	m.server.await("Available", "connect to the agent")
	f.check()
	m.server.start()
	m.server.awaitRenewal(40*time.Second, before.Serial)
	world.Eventually(m.T, m.Ctx, 70*time.Second, func() error {
		if left := time.Until(first.NotAfter.Add(2 * time.Second)); left > 0 {
			return fmt.Errorf("the first certificate is valid for %v", left)
		}
		return f.heard(1)
	})
	f.check()
	a.check()
}

// A broker that the agent's configuration does not name is refused by TLS, and
// told what to add.
func TestBroker_WrongOwnIdentity(t *testing.T) {
	m := newMesh(t, meshOptions{agent: agentOptions{broker: "spiffe://" + meshDomain + "/somebody/else"}})
	m.entries()
	m.launch((*side).broker)
	for _, s := range m.sides() {
		s.await("Unavailable", "add this SPIFFE ID to brokers of experimental.broker of the agent")
	}
	m.refuses()
	m.reconfigure(agentOptions{})
	m.awaitAvailable()
	m.checkTraffic()
}

// reconfigure restarts the agents with another configuration.
func (m *mesh) reconfigure(o agentOptions) {
	m.T.Helper()
	for _, s := range m.sides() {
		s.kill()
		s.configure(o)
		s.start()
	}
}

// A proxy without an SVID of its own waits for one.
func TestBroker_NoOwnSVID(t *testing.T) {
	m := newMesh(t, meshOptions{})
	for _, s := range m.sides() {
		s.entry(s.podEntry())
		s.launch(s.broker())
		s.await("Unavailable", "waiting for the proxy's own SVID from the Workload API")
	}
	m.refuses()
	for _, s := range m.sides() {
		s.entry(s.proxyEntry())
	}
	m.awaitAvailable()
	m.checkTraffic()
}

// A proxy that may not refer to pods is told so.
func TestBroker_ReferenceTypeNotAllowed(t *testing.T) {
	m := newMesh(t, meshOptions{agent: agentOptions{noPods: true}})
	m.entries()
	m.launch((*side).broker)
	for _, s := range m.sides() {
		s.await("Unavailable", "add the type of reference to allowed_reference_types")
	}
	m.refuses()
	m.reconfigure(agentOptions{})
	m.awaitAvailable()
	m.checkTraffic()
}

// A pod that the agent no longer finds on its node loses its identity, however
// long the SVID lives; it gets one when it is back (design D23). The agent looks
// at a reference when its stream begins, so a restart makes it look again.
func TestBroker_WorkloadNotFound(t *testing.T) {
	m := newMesh(t, meshOptions{})
	m.entries()
	m.launch((*side).broker, "SVID_WITHDRAW_GRACE=1s")
	m.awaitAvailable()
	f := m.openFleet(10, 200*time.Millisecond)
	pods := m.server.kubelet.pods
	m.server.kubelet.set()
	m.server.kill()
	m.server.start()
	m.server.await("Unavailable", "the agent finds no such workload on its node")
	f.allLost(10 * time.Second)
	m.refuses()
	m.server.kubelet.set(pods...)
	m.server.await("Available", "")
	m.works()
	m.checkTraffic()
}

// The entry of a workload is deleted: nothing is granted any more.
func TestBroker_EntryDeleted(t *testing.T) {
	m := newMesh(t, meshOptions{})
	m.client.entry(m.client.proxyEntry())
	m.client.entry(m.client.podEntry())
	m.server.entry(m.server.proxyEntry())
	id := m.server.entry(m.server.podEntry())
	m.launch((*side).broker, "SVID_WITHDRAW_GRACE=2s")
	m.awaitAvailable()
	m.loses(m.server, id, m.server.podEntry())
}

// loses has an entry deleted: after the grace the identity is no longer used and
// its tunnels end. A new entry brings it back.
func (m *mesh) loses(s *side, id string, again entry) {
	m.T.Helper()
	f := m.openFleet(20, 200*time.Millisecond)
	s.deleteEntry(m.T, id)
	s.await("Unavailable", "entry")
	s.awaitWarning("SPIRE took the identity back")
	f.allLost(10 * time.Second)
	m.refuses()
	s.entry(again)
	s.await("Available", "")
	m.works()
	m.checkTraffic()
}
