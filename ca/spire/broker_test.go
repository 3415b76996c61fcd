package spire

import (
	"context"
	"testing"
	"time"

	brokerapi "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/ca/catest/spireagent"
)

const proxyText = "spiffe://cluster.local/ns/istio-system/sa/ztunnel"

var (
	proxyEntry = spireagent.Entry{ID: proxyText, Selectors: []string{"k8s:sa:ztunnel"}}
	webPod     = spireagent.Pod{Namespace: "shop", Name: "web-1", UID: "uid-1", Selectors: []string{"k8s:sa:web"}}
)

// newBrokerAgent is an agent that lets the proxy in, and has the pod of web.
func newBrokerAgent(t *testing.T) *spireagent.Agent {
	t.Helper()
	agent := spireagent.New(t, spireagent.Config{})
	agent.SetEntries(proxyEntry, webEntry)
	agent.SetProxy("k8s:sa:ztunnel")
	agent.SetBrokers(spireagent.Broker{ID: proxyText})
	agent.SetPods(webPod)
	return agent
}

func newBroker(t *testing.T, agent *spireagent.Agent, cfg BrokerConfig) ca.Provider {
	t.Helper()
	if cfg.Dial == nil {
		cfg.Dial = agent.DialBroker
	}
	if cfg.DialWorkloadAPI == nil {
		cfg.DialWorkloadAPI = agent.DialWorkload
	}
	p, err := NewBroker(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// run runs p until the test ends.
func run(t *testing.T, p ca.Provider) {
	t.Helper()
	background(t, func(ctx context.Context) {
		if err := p.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func brokerHarness() catest.Harness {
	return catest.Harness{
		Impersonates: true, Streams: true, Denies: true, Withdraws: true,
		Start: func(t *testing.T) *catest.Backend {
			agent := newBrokerAgent(t)
			return &catest.Backend{
				Provider: newBroker(t, agent, BrokerConfig{}), Workload: web, Life: time.Hour,
				Rotate: func() { agent.Rotate(false) },
				Deny: func(on bool) {
					if on {
						agent.SetPods()
					} else {
						agent.SetPods(webPod)
					}
				},
				Withdraw: func() { agent.SetPods() },
				Down:     switchAgent(agent),
				Impostor: func(on bool) {
					if !on {
						agent.TamperBroker(nil)
						return
					}
					agent.TamperBroker(func(m *brokerapi.SubscribeToX509SVIDResponse) {
						for _, s := range m.GetSvids() {
							s.SpiffeId += "-impostor"
						}
					})
				},
				Traffic: func() int { return agent.Opened(spireagent.SubscribeToX509SVID) },
			}
		},
	}
}
