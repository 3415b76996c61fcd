package spire

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	workloadapi "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/ca/catest/spireagent"
)

// TestBrokerOwnSVIDMissing: without its own SVID the proxy waits, says for what,
// and goes on as soon as it has one.
func TestBrokerOwnSVIDMissing(t *testing.T) {
	inBrokerBubble(t, "no entry for the proxy", func(t *testing.T, w *world) {
		w.agent.SetEntries(webEntry)
		e := watch(t, w.provider, web)
		pass(time.Minute)
		e.want(t, ca.Unavailable, "waiting for the proxy's own SVID from the Workload API", "make a SPIRE entry for this node", "no identity issued")
		if n := w.agent.Opened(spireagent.SubscribeToX509SVID); n != 0 {
			t.Errorf("%d streams were opened", n)
		}
		w.agent.AddEntry(proxyEntry)
		pass(36 * time.Second) // the Workload API's backoff, and none of the endpoint's
		e.want(t, ca.Available)
	})
	inBrokerBubble(t, "the Workload API hangs", func(t *testing.T, w *world) {
		w.agent.Hang(true)
		e := watch(t, w.provider, web)
		pass(9 * time.Second)
		if n := e.count(); n != 0 {
			t.Errorf("%d events while there is no answer yet", n)
		}
		pass(time.Minute)
		e.want(t, ca.Unavailable, "waiting for the proxy's own SVID", "the agent sent no message within 10s")
		w.agent.Hang(false)
		pass(36 * time.Second)
		e.want(t, ca.Available)
	})
	inBrokerBubble(t, "the agent does not run", func(t *testing.T, w *world) {
		w.agent.Stop()
		e := watch(t, w.provider, web)
		pass(time.Minute)
		e.want(t, ca.Unavailable, "waiting for the proxy's own SVID", "the agent does not run")
		w.agent.Start()
		pass(36 * time.Second)
		e.want(t, ca.Available)
	})
}

// TestBrokerOwnID: of several SVIDs of the proxy the one that is configured is
// used, or the first (R45).
func TestBrokerOwnID(t *testing.T) {
	const secondText = "spiffe://cluster.local/ns/istio-system/sa/second"
	for name, tt := range map[string]struct {
		cfg  BrokerConfig
		want string
	}{
		"the first":      {BrokerConfig{}, proxyText},
		"the configured": {BrokerConfig{OwnID: catest.ID(secondText)}, secondText},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newBrokerWorld(t, tt.cfg)
				w.agent.AddEntry(spireagent.Entry{ID: secondText, Selectors: proxyEntry.Selectors, Life: 2 * time.Hour})
				w.agent.SetBrokers(spireagent.Broker{ID: proxyText}, spireagent.Broker{ID: secondText})
				e := watch(t, w.provider, web)
				pass(time.Minute)
				e.want(t, ca.Available)
				requests := w.agent.Requests()
				if got := requests[len(requests)-1].Caller; got != tt.want {
					t.Errorf("the endpoint saw %s, want %s", got, tt.want)
				}
			})
		})
	}
	t.Run("one that is not granted", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newBrokerWorld(t, BrokerConfig{OwnID: catest.ID(secondText)})
			e := watch(t, w.provider, web)
			pass(time.Minute)
			e.want(t, ca.Unavailable, "waiting for the proxy's own SVID", "did not find expected SAN: "+secondText)
		})
	})
}

// TestBrokerOwnSVIDRotation: a rotation of the proxy's own SVID, and of the root,
// breaks no stream, and new connections use what is new.
func TestBrokerOwnSVIDRotation(t *testing.T) {
	inBrokerBubble(t, "", func(t *testing.T, w *world) {
		short := proxyEntry
		short.Life = 2 * time.Minute
		w.agent.SetEntries(short, webEntry)
		e := watch(t, w.provider, web)
		pass(12 * time.Hour)
		e.want(t, ca.Available)
		if streams, dials := w.agent.Opened(spireagent.SubscribeToX509SVID), w.agent.Dials(); streams != 1 || dials != 2 {
			t.Errorf("%d streams and %d connections, want one, and one for each API", streams, dials)
		}
		w.agent.Rotate(false)
		pass(time.Minute)
		e.want(t, ca.Available)
		if streams := w.agent.Opened(spireagent.SubscribeToX509SVID); streams != 1 {
			t.Errorf("%d streams after a new root", streams)
		}
		w.agent.Cut(nil)
		w.agent.Stop()
		w.agent.Start()
		pass(time.Minute)
		e.want(t, ca.Available) // an old SVID, or the old root, would be refused
	})
}

// TestBrokerOwnSVIDExpires: a proxy that is cut off from the Workload API keeps
// the streams that it has, and what they delivered; it opens none.
func TestBrokerOwnSVIDExpires(t *testing.T) {
	inBrokerBubble(t, "", func(t *testing.T, w *world) {
		short := proxyEntry
		short.Life = 2 * time.Minute
		w.agent.SetEntries(short, webEntry)
		e := watch(t, w.provider, web)
		pass(time.Minute / 2)
		first := e.want(t, ca.Available).SVID
		w.agent.FailWorkloadAPI(status.Error(codes.Unavailable, "workload attestation failed"))
		pass(40 * time.Minute)
		renewed := e.want(t, ca.Available).SVID
		if !renewed.NotAfter.After(first.NotAfter) {
			t.Error("the stream that was there did not deliver a renewal")
		}
		w.agent.Cut(status.Error(codes.Unavailable, "bye"))
		pass(20 * time.Minute)
		streams := w.agent.Opened(spireagent.SubscribeToX509SVID)
		ev := e.want(t, ca.Available, "waiting for the proxy's own SVID", "the certificate of "+proxyText+" has expired", "workload attestation failed")
		if ev.SVID != renewed {
			t.Error("there is another SVID")
		}
		pass(time.Hour)
		if n := w.agent.Opened(spireagent.SubscribeToX509SVID); n != streams {
			t.Errorf("%d streams were opened with an expired SVID", n-streams)
		}
		w.agent.FailWorkloadAPI(nil)
		pass(36 * time.Second)
		e.want(t, ca.Available)
	})
}

// TestBrokerOwnSVIDWithdrawn: what was reached with an SVID that SPIRE took back
// is let go (R42); the workloads' SVIDs are theirs until they expire.
func TestBrokerOwnSVIDWithdrawn(t *testing.T) {
	inBrokerBubble(t, "", func(t *testing.T, w *world) {
		e := watch(t, w.provider, web)
		pass(time.Minute)
		e.want(t, ca.Available)
		w.agent.RemoveEntries(proxyText)
		pass(5*time.Second - 1)
		e.want(t, ca.Available)
		pass(1)
		e.want(t, ca.Available, "waiting for the proxy's own SVID", "make a SPIRE entry")
		pass(time.Minute)
		if n := w.agent.Streams(); n != 0 {
			t.Errorf("%d streams are open", n)
		}
		w.agent.AddEntry(proxyEntry)
		pass(36 * time.Second)
		e.want(t, ca.Available)
	})
}

// TestBrokerOwnSVIDRejected: an own SVID that no endpoint would accept is not
// used.
func TestBrokerOwnSVIDRejected(t *testing.T) {
	stranger := catest.NewCA(t, "cluster.local").Root.Raw
	inBrokerBubble(t, "of another root", func(t *testing.T, w *world) {
		w.agent.TamperWorkloadAPI(func(m *workloadapi.X509SVIDResponse) {
			for _, s := range m.GetSvids() {
				s.Bundle = slices.Clone(stranger)
			}
		})
		e := watch(t, w.provider, web)
		pass(time.Minute)
		e.want(t, ca.Unavailable, "waiting for the proxy's own SVID", "R29")
		w.agent.TamperWorkloadAPI(nil)
		pass(time.Minute)
		e.want(t, ca.Available)
	})
}
