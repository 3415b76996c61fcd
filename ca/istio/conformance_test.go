package istio_test

import (
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/ca/catest/istiod"
	"github.com/ztunnel-go/ztunnel/ca/istio"
)

// TestProviderConformance runs the suite against each CA of the field, over TLS
// except where the CA is on our node and listens on a socket.
func TestProviderConformance(t *testing.T) {
	for _, tt := range []struct {
		name        string
		personality istiod.Personality
		life        time.Duration
		plaintext   bool
	}{
		{"istiod", istiod.Istiod, time.Hour, false},
		{"istio-csr", istiod.IstioCSR, time.Hour, false},
		{"cilium", istiod.Cilium, 6 * time.Hour, false},
		{"unix socket", istiod.Istiod, time.Hour, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			catest.TestProvider(t, catest.Harness{
				Impersonates: true,
				Denies:       true,
				Start: func(t *testing.T) *catest.Backend {
					w := newWorld(t, istiod.Config{Personality: tt.personality, AgentTTL: tt.life, Plaintext: tt.plaintext}, func(c *istio.Config) {
						if tt.plaintext {
							c.Address = "unix:///run/ca.sock"
						}
					})
					return w.backend(tt.personality, tt.life)
				},
			})
		})
	}
}

func (w *world) backend(p istiod.Personality, life time.Duration) *catest.Backend {
	other := catest.ID("spiffe://cluster.local/ns/a/sa/other")
	return &catest.Backend{
		Provider: w.provider,
		Workload: ca.WorkloadRef{ID: webID, Namespace: "a", ServiceAccount: "web"},
		Life:     life,
		Rotate: func() {
			if p != istiod.Cilium {
				w.server.SetCA(openCA(w.t, time.Hour))
			} else if err := w.server.RotateAgent(); err != nil {
				w.t.Error(err)
			}
		},
		Deny: func(deny bool) {
			if w.server.SetPods(); deny {
				w.server.SetPods(other)
			}
		},
		Down: w.setDown,
		Impostor: func(b bool) {
			w.server.SetReply(nil)
			if b {
				w.server.SetReply(func(istiod.Request) *istiod.Reply { return &istiod.Reply{Identity: other} })
			}
		},
		Traffic: func() int { return len(w.server.Requests()) },
	}
}
