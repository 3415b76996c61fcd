package proxy

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/proxy/hbone"
	"github.com/ztunnel-go/ztunnel/state"
)

// witness remembers for whom its provider was asked.
type witness struct {
	ca.Provider

	mu    sync.Mutex // guards asked
	asked []spiffeid.ID
}

func (w *witness) Watch(ctx context.Context, ref ca.WorkloadRef, update func(ca.Event)) error {
	w.mu.Lock()
	if !slices.Contains(w.asked, ref.ID) {
		w.asked = append(w.asked, ref.ID)
	}
	w.mu.Unlock()
	return w.Provider.Watch(ctx, ref, update)
}

// Case 82: no peer and no application makes a proxy ask for the certificate of
// another workload than its own, on this node or elsewhere.
func TestFault_082_NobodyElsesCertificate(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		seen := &witness{Provider: m.ca}
		server := m.add("server", "10.0.2.2", func(p *nodeParts) { p.provider = seen },
			withConfig(func(c *Config) { c.Prefetch, c.SOCKSAddr = true, socksListener }))
		neighbour := m.add("neighbour", "10.0.3.2", uncaptured, withWorkload(func(w *state.Workload) { w.Node = "node-server" }))
		other := m.add("other", "10.0.4.2")
		const host = "neighbour.default.svc.cluster.local"
		neighbour.services = map[state.NamespacedHostname][]state.Port{{Namespace: "default", Hostname: host}: {{Service: 80, Target: echoPort}}}
		m.push()

		pool := m.handmade(server, m.svid(clientID))
		defer pool.Close()
		for _, authority := range []string{"10.0.3.2:8080", "10.0.4.2:8080", "nowhere.example:80", "10.0.3.2:15008", host + ":80"} {
			stream, err := pool.Open(t.Context(), "", authority,
				hbone.Field{Name: fieldForwarded, Value: `for="10.0.3.2:1";host=` + host}, hbone.Field{Name: fieldBaggage, Value: baggageOf(neighbour.w).String()})
			var status *hbone.StatusError
			switch {
			case err == nil && authority == host+":80": // the name stands for a port of our own pod
				stream.Close()
			case !errors.As(err, &status):
				t.Errorf("%s: got %v, want a refusal", authority, err)
			}
		}
		for _, dst := range []*node{neighbour, other} {
			if err := server.request(dst.echoAddr(), "out"); err != nil {
				t.Error(err)
			}
			if err := server.requestSOCKS("127.0.0.1:40000", socksRequest(dst.echoAddr())); err != nil {
				t.Error(err)
			}
			if err := dst.request(server.echoAddr(), "in"); err != nil {
				t.Error(err)
			}
		}
		seen.mu.Lock()
		defer seen.mu.Unlock()
		if want := []spiffeid.ID{server.identity()}; !slices.Equal(seen.asked, want) {
			t.Errorf("asked for %v, want %v", seen.asked, want)
		}
	})
}
