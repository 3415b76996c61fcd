//go:build e2e

package spire

import "testing"

// Two nodes in the middle of a move: each signs by another provider and believes
// the roots of both, because the operator has listed both (design D25). One has
// them by order, the other by route. The Istio CA is ca/catest/fakeistiod over
// TLS.
func TestSeveral_MixedMesh(t *testing.T) {
	m := newMesh(t, meshOptions{})
	m.entries()
	m.client.launch(append(m.client.delegated(m.Client.StartIstiod()...), "CA_PROVIDER=istio,spire-delegated"))
	m.server.launch(append(m.server.delegated(m.Server.StartIstiod()...),
		"CA_PROVIDER=istio,spire-delegated", "CA_ROUTES=ns=default:spire-delegated,*:istio"))
	for s, provider := range map[*side]string{m.client: "istio", m.server: "spire-delegated"} {
		if c := s.await("Available", ""); c.Provider != provider || c.roots != 2 {
			t.Errorf("%s: provider %s with %d roots, want %s with 2", c.Identity, c.Provider, c.roots, provider)
		}
	}
	m.works()
	m.checkTraffic()
}

// One node believes SPIRE alone: a peer with a certificate of the Istio CA is
// refused, although its trust domain is the same.
func TestSeveral_OneSideOnly(t *testing.T) {
	m := newMesh(t, meshOptions{})
	m.entries()
	m.client.launch(append(m.client.delegated(m.Client.StartIstiod()...), "CA_PROVIDER=istio,spire-delegated"))
	m.server.launch(m.server.delegated())
	m.awaitAvailable()
	m.refuses()
}
