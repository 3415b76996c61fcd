package spire

import (
	"testing"
	"time"

	workloadapi "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/ca/catest/spireagent"
)

// switchAgent stops an agent, or starts it again.
func switchAgent(agent *spireagent.Agent) func(down bool) {
	return func(down bool) {
		if down {
			agent.Stop()
		} else {
			agent.Start()
		}
	}
}

func workloadHarness() catest.Harness {
	return catest.Harness{
		Impersonates: true, Streams: true, Denies: true, Withdraws: true,
		Start: func(t *testing.T) *catest.Backend {
			agent := spireagent.New(t, spireagent.Config{})
			agent.AddEntry(webEntry)
			agent.SetProxy(webEntry.Selectors...)
			p, err := NewWorkload(WorkloadConfig{Common{Dial: agent.DialWorkload}})
			if err != nil {
				t.Fatal(err)
			}
			return &catest.Backend{
				Provider: p, Workload: web, Life: time.Hour,
				Rotate: func() { agent.Rotate(false) },
				Deny: func(on bool) {
					if on {
						agent.SetProxy()
					} else {
						agent.SetProxy(webEntry.Selectors...)
					}
				},
				Withdraw: func() { agent.SetEntries() },
				Down:     switchAgent(agent),
				Impostor: func(on bool) {
					if !on {
						agent.TamperWorkloadAPI(nil)
						return
					}
					agent.TamperWorkloadAPI(func(m *workloadapi.X509SVIDResponse) {
						for _, s := range m.GetSvids() {
							s.SpiffeId += "-impostor"
						}
					})
				},
				Traffic: func() int { return agent.Opened(spireagent.FetchX509SVID) },
			}
		},
	}
}

// newWorkloadWorld runs a provider over the Workload API of a fake agent.
func newWorkloadWorld(t *testing.T, entries ...spireagent.Entry) *world {
	t.Helper()
	agent := spireagent.New(t, spireagent.Config{})
	agent.SetEntries(entries...)
	agent.SetProxy(webEntry.Selectors...)
	p, err := NewWorkload(WorkloadConfig{Common{Dial: agent.DialWorkload}})
	if err != nil {
		t.Fatal(err)
	}
	run(t, p)
	return &world{agent, p}
}

var _ = ca.Pending
