package spire

import (
	"testing"
	"time"

	delegatedv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/ca/catest/spireagent"
)

const webText = "spiffe://cluster.local/ns/shop/sa/web"

var (
	web = ca.WorkloadRef{
		ID: catest.ID(webText), Namespace: "shop", ServiceAccount: "web", Pod: "web-1", UID: "uid-1",
	}
	webEntry = spireagent.Entry{ID: webText, Selectors: []string{"k8s:ns:shop", "k8s:sa:web"}}
)

// impostor makes the agent answer with another identity in every certificate.
var impostor = spireagent.Tamper{SVIDs: func(m *delegatedv1.SubscribeToX509SVIDsResponse) {
	for _, s := range m.GetX509Svids() {
		s.X509Svid.Id.Path += "-impostor"
	}
}}

func TestProviderConformance(t *testing.T) {
	t.Run("delegated", func(t *testing.T) { catest.TestProvider(t, delegatedHarness()) })
	t.Run("broker", func(t *testing.T) { catest.TestProvider(t, brokerHarness()) })
	t.Run("workload", func(t *testing.T) { catest.TestProvider(t, workloadHarness()) })
}

func delegatedHarness() catest.Harness {
	return catest.Harness{
		Impersonates: true, Streams: true, Denies: true, Withdraws: true,
		Start: func(t *testing.T) *catest.Backend {
			agent := spireagent.New(t, spireagent.Config{})
			agent.AddEntry(webEntry)
			p, err := NewDelegated(DelegatedConfig{Common: Common{Dial: agent.Dial}})
			if err != nil {
				t.Fatal(err)
			}
			return &catest.Backend{
				Provider: p, Workload: web, Life: time.Hour,
				Rotate: func() { agent.Rotate(false) },
				Deny: func(on bool) {
					agent.SetDelegate(map[bool]spireagent.Delegate{true: spireagent.WithoutEntry}[on])
				},
				Withdraw: func() { agent.SetEntries() },
				Down: func(down bool) {
					if down {
						agent.Stop()
					} else {
						agent.Start()
					}
				},
				Impostor: func(on bool) {
					if on {
						agent.SetTamper(impostor)
					} else {
						agent.SetTamper(spireagent.Tamper{})
					}
				},
				Traffic: func() int { return agent.Opened(spireagent.SubscribeToX509SVIDs) },
			}
		},
	}
}
