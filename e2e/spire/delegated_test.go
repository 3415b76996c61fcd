//go:build e2e

package spire

import (
	"fmt"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/world"
)

var spireDelegated = map[string]string{"provider": "spire-delegated"}

// Traffic between two nodes whose proxies have the SVIDs of their workloads by
// selectors.
func TestDelegated_Traffic(t *testing.T) {
	m := newMesh(t, meshOptions{})
	m.entries()
	m.launchDelegated()
	m.checkTraffic()
	m.checkProvider("spire-delegated")
}

// Workloads by their process instead: its path is what the entries select.
func TestDelegated_ByPID(t *testing.T) {
	m := newMesh(t, meshOptions{})
	apps := map[*side]*world.Process{m.client: m.Client.StartApp(), m.server: m.App}
	for _, s := range m.sides() {
		s.entry(s.proxyEntry())
		e := s.podEntry()
		e.selectors = self(t) // the application is a mode of the test binary
		s.entry(e)
		s.launch(s.delegated("SPIRE_REFERENCE=pid", pidEnv(apps[s])))
	}
	m.awaitAvailable()
	m.checkTraffic()
}

// 2-minute SVIDs, which the agent rotates at half of their life, under 200
// connections that never pause: none is lost.
func TestDelegated_Rotation(t *testing.T) {
	m := newMesh(t, meshOptions{})
	for _, s := range m.sides() {
		s.entry(s.proxyEntry())
		e := s.podEntry()
		e.ttl = 2 * time.Minute
		s.entry(e)
	}
	m.launchDelegated()
	f, a := m.openFleet(200, 500*time.Millisecond), m.arrive(100*time.Millisecond)
	before := map[*side]certificate{}
	for _, s := range m.sides() {
		before[s] = s.await("Available", "")
		if life := time.Until(before[s].NotAfter); life > 2*time.Minute {
			t.Fatalf("the certificate lives for %v, want 2 minutes", life)
		}
	}
	for _, s := range m.sides() {
		c := s.awaitRenewal(90*time.Second, before[s].Serial)
		if !c.NotAfter.After(before[s].NotAfter) {
			t.Errorf("%s: the new certificate ends at %v, not after %v", c.Identity, c.NotAfter, before[s].NotAfter)
		}
		s.awaitMetric("istio_ca_renewals_total", spireDelegated, 1)
	}
	f.check()
	a.check()
}

// faults row 108: the agent of a node is killed and comes back. What the proxy
// has stays, traffic goes on, and the certificate is renewed afterwards.
func TestFault_108_AgentRestart(t *testing.T) {
	m := newMesh(t, meshOptions{})
	m.entries()
	m.launchDelegated()
	f, a := m.openFleet(20, 200*time.Millisecond), m.arrive(100*time.Millisecond)
	before := m.client.await("Available", "")
	m.client.kill()
	m.client.await("Available", "connect to the agent")
	m.client.awaitWarning("no stream from the SPIRE agent")
	m.works()
	f.check()
	m.client.start()
	// An agent that has restarted has no SVIDs any more: that there is another one
	// says that the stream is back.
	m.client.awaitRenewal(40*time.Second, before.Serial)
	m.client.awaitMetric("istio_ca_stream_reconnects_total", spireDelegated, 1)
	if c, err := m.client.own(); err != nil || c.Reason != "" {
		t.Errorf("after the restart: %s, %v, want no complaint", c.Reason, err)
	}
	f.check()
	a.check()
}

// faults row 107: there is no agent when the proxy starts.
func TestFault_107_AgentAppearsLater(t *testing.T) {
	m := newMesh(t, meshOptions{agent: agentOptions{late: true}})
	for _, s := range m.sides() {
		s.launch(s.delegated())
		s.await("Unavailable", "the agent does not run, or the directory of the socket is not mounted")
	}
	m.refuses()
	m.entries()
	for _, s := range m.sides() {
		s.start()
	}
	m.awaitAvailable()
	m.checkTraffic()
}

// A delegate without an entry of its own is told so, and is one as soon as there
// is an entry.
func TestDelegated_DelegateWithoutEntry(t *testing.T) {
	m := newMesh(t, meshOptions{})
	for _, s := range m.sides() {
		s.entry(s.podEntry())
		s.launch(s.delegated())
		s.await("Unavailable", "SPIRE has no entry for this proxy on this node yet")
	}
	m.client.awaitWarning("no identity issued")
	m.client.awaitMetric("istio_ca_requests_total", map[string]string{"provider": "spire-delegated", "outcome": "denied"}, 1)
	m.refuses()
	for _, s := range m.sides() {
		s.entry(s.proxyEntry())
	}
	m.awaitAvailable()
	m.checkTraffic()
}

// A caller that the agent's configuration does not name is told what to add; the
// agent restarts with it, the proxy does not.
func TestDelegated_CallerNotAuthorized(t *testing.T) {
	m := newMesh(t, meshOptions{agent: agentOptions{delegate: "spiffe://" + meshDomain + "/somebody/else"}})
	m.entries()
	for _, s := range m.sides() {
		s.launch(s.delegated())
		s.await("Unavailable", "add the proxy's SPIFFE ID to authorized_delegates of the agent")
	}
	m.refuses()
	m.reconfigure(agentOptions{})
	m.awaitAvailable()
	m.checkTraffic()
}

// A workload whose entry comes late is pending, and nothing else (design D23).
func TestDelegated_EntryComesLate(t *testing.T) {
	m := newMesh(t, meshOptions{})
	for _, s := range m.sides() {
		s.entry(s.proxyEntry())
		s.launch(s.delegated())
		s.await("Initializing", "no SPIRE entry for this agent matches the selectors")
		s.awaitMetric("istio_ca_certificates", map[string]string{"provider": "spire-delegated", "state": "pending"}, 1)
	}
	m.refuses()
	for _, s := range m.sides() {
		s.entry(s.podEntry())
	}
	m.awaitAvailable()
	m.checkTraffic()
}

// faults row 109: an entry is deleted. After the grace the identity is no longer
// used and its tunnels end; a new entry brings it back.
func TestFault_109_EntryDeleted(t *testing.T) {
	for _, victim := range []string{"source", "destination"} {
		t.Run(victim, func(t *testing.T) {
			m := newMesh(t, meshOptions{})
			ids := map[*side]string{}
			for _, s := range m.sides() {
				s.entry(s.proxyEntry())
				ids[s] = s.entry(s.podEntry())
			}
			m.launchDelegated("SVID_WITHDRAW_GRACE=2s")
			s := m.client
			if victim == "destination" {
				s = m.server
			}
			m.loses(s, ids[s], s.podEntry())
		})
	}
}

// pidEnv names a process to the proxy.
func pidEnv(p *world.Process) string { return fmt.Sprintf("PROXY_WORKLOAD_PID=%d", p.PID()) }
