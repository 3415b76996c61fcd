package spire

import (
	"context"
	"errors"
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

// newWorkloadWorld runs a provider over the Workload API of a fake agent, which
// takes the proxy for web.
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

func inWorkloadBubble(t *testing.T, name string, f func(*testing.T, *world), entries ...spireagent.Entry) {
	t.Helper()
	t.Run(name, func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) { f(t, newWorkloadWorld(t, entries...)) })
	})
}

// TestFault_109_WorkloadAPI: PermissionDenied is all redacted (R42), which means
// nothing before there was an SVID.
func TestFault_109_WorkloadAPI(t *testing.T) {
	const hint = "make a SPIRE entry for this node whose selectors match the proxy's own pod"
	inWorkloadBubble(t, "before the first it is unavailable, an entry later makes it available", func(t *testing.T, w *world) {
		e := watch(t, w.provider, web)
		pass(time.Minute)
		if ev := e.want(t, ca.Unavailable, hint, "no identity issued"); !errors.Is(ev.Err, ca.ErrDenied) || ev.Next.IsZero() {
			t.Errorf("got %v, next attempt %v, want a denial that is retried", ev.Err, ev.Next)
		}
		if got := w.agent.Opened(spireagent.FetchX509SVID); got < 4 || got > 10 {
			t.Errorf("%d attempts in a minute, want backoff from 0.5 s to 30 s", got)
		}
		w.agent.AddEntry(webEntry)
		pass(36 * time.Second)
		e.want(t, ca.Available)
	})
	inWorkloadBubble(t, "after one it is withdrawn after the grace", func(t *testing.T, w *world) {
		e := watch(t, w.provider, web)
		pass(time.Minute)
		w.agent.SetEntries()
		pass(5*time.Second - 1)
		e.want(t, ca.Available)
		pass(1)
		if ev := e.want(t, ca.Withdrawn, hint); !errors.Is(ev.Err, ca.ErrDenied) {
			t.Errorf("%v is no ErrDenied", ev.Err)
		}
		pass(time.Hour)
		e.want(t, ca.Withdrawn, hint)
		w.agent.AddEntry(webEntry)
		pass(36 * time.Second)
		e.want(t, ca.Available)
	}, webEntry)
	inWorkloadBubble(t, "an entry within the grace is as if nothing had been", func(t *testing.T, w *world) {
		e := watch(t, w.provider, web)
		pass(time.Minute)
		w.agent.SetEntries()
		pass(2 * time.Second)
		w.agent.SetEntries(webEntry)
		pass(time.Minute)
		e.want(t, ca.Available)
		for _, ev := range e.all {
			if ev.State != ca.Available {
				t.Errorf("it was %v, %v", ev.State, ev.Err)
			}
		}
	}, webEntry)
	inWorkloadBubble(t, "another identity is not ours", func(t *testing.T, w *world) {
		e := watch(t, w.provider, web)
		pass(time.Minute)
		e.want(t, ca.Unavailable, "did not find expected SAN: "+webText)
	}, spireagent.Entry{ID: webText + "-other", Selectors: webEntry.Selectors})
}

// TestFault_108_WorkloadAPI: nothing but a redaction takes an SVID back before it
// expires.
func TestFault_108_WorkloadAPI(t *testing.T) {
	for name, err := range map[string]error{
		"end of the stream": nil,
		"unavailable":       status.Error(codes.Unavailable, "shutting down"),
		"not attested":      status.Error(codes.Unavailable, "workload attestation failed"),
		"internal":          status.Error(codes.Internal, "oops"),
		"invalid argument":  status.Error(codes.InvalidArgument, "security header missing from request"),
		"too many":          status.Error(codes.ResourceExhausted, "rate limit exceeded"),
	} {
		inWorkloadBubble(t, name, func(t *testing.T, w *world) {
			e := watch(t, w.provider, web)
			pass(time.Minute)
			first := e.want(t, ca.Available).SVID
			if err == nil {
				w.agent.Stop()
			} else {
				w.agent.FailWorkloadAPI(err)
			}
			pass(50 * time.Minute)
			if ev, _ := e.last(t); ev.State != ca.Available || ev.SVID != first || ev.Err == nil || errors.Is(ev.Err, ca.ErrDenied) {
				t.Fatalf("got %v, %v, want the first SVID with an error", ev.State, ev.Err)
			}
			w.agent.Start()
			w.agent.FailWorkloadAPI(nil)
			pass(time.Minute)
			if next := e.want(t, ca.Available).SVID; !next.NotAfter.After(first.NotAfter) {
				t.Error("there is no new SVID")
			}
		}, webEntry)
	}
}

// TestWorkloadAPIErrors: what the errors of the Workload API tell the operator.
func TestWorkloadAPIErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := spireagent.New(t, spireagent.Config{})
		p, err := NewWorkload(WorkloadConfig{Common{Dial: agent.Dial}}) // the admin socket
		if err != nil {
			t.Fatal(err)
		}
		run(t, p)
		e := watch(t, p, web)
		pass(time.Minute)
		if ev := e.want(t, ca.Unavailable, "this is not the socket of the Workload API; it must name socket_path of the agent"); !errors.Is(ev.Err, ca.ErrConfig) {
			t.Errorf("%v is no ErrConfig", ev.Err)
		}
	})
	for code, tt := range map[codes.Code]struct {
		message, hint string
		kind          error
	}{
		codes.Unavailable:     {"workload attestation failed", "in Kubernetes by hostPID", nil},
		codes.InvalidArgument: {"security header missing from request", "workload.spiffe.io", ca.ErrConfig},
	} {
		inWorkloadBubble(t, code.String(), func(t *testing.T, w *world) {
			w.agent.FailWorkloadAPI(status.Error(code, tt.message))
			e := watch(t, w.provider, web)
			pass(time.Minute)
			if ev := e.want(t, ca.Unavailable, tt.hint, tt.message); tt.kind != nil && !errors.Is(ev.Err, tt.kind) {
				t.Errorf("%v is no %v", ev.Err, tt.kind)
			}
		}, webEntry)
	}
}

// TestWorkloadMessages: a message without a mandatory field is discarded (R43),
// and the bundles are those of the SVID's own trust domain and of those that it
// federates with.
func TestWorkloadMessages(t *testing.T) {
	federated := webEntry
	federated.FederatesWith = []string{"friend.example"}
	inWorkloadBubble(t, "bundles", func(t *testing.T, w *world) {
		w.agent.Federate("friend.example", catest.NewCA(t, "friend.example"))
		w.agent.Federate("other.example", catest.NewCA(t, "other.example"))
		e := watch(t, w.provider, web)
		pass(time.Minute)
		svid := e.want(t, ca.Available).SVID
		if got := domains(svid); !equalNames(got, "cluster.local", "friend.example") {
			t.Errorf("trusts %q", got)
		}
		w.agent.Defederate("friend.example")
		pass(0)
		if got := domains(e.want(t, ca.Available).SVID); !equalNames(got, "cluster.local") {
			t.Errorf("trusts %q after a redaction", got)
		}
	}, federated)
	for name, spoil := range map[string]func(*workloadapi.X509SVIDResponse){
		"no bundle":            func(m *workloadapi.X509SVIDResponse) { m.Svids[0].Bundle = nil },
		"garbage for a bundle": func(m *workloadapi.X509SVIDResponse) { m.Svids[0].Bundle = []byte("garbage") },
		"no chain":             func(m *workloadapi.X509SVIDResponse) { m.Svids[0].X509Svid = nil },
		"no key":               func(m *workloadapi.X509SVIDResponse) { m.Svids[0].X509SvidKey = nil },
		"two bundles of one domain": func(m *workloadapi.X509SVIDResponse) {
			m.FederatedBundles = map[string][]byte{"a.b": nil, "spiffe://a.b": nil}
		},
		"a bundle of nobody": func(m *workloadapi.X509SVIDResponse) { m.FederatedBundles = map[string][]byte{"spiffe://": nil} },
	} {
		inWorkloadBubble(t, name, func(t *testing.T, w *world) {
			e := watch(t, w.provider, web)
			pass(time.Minute)
			first := e.want(t, ca.Available).SVID
			w.agent.TamperWorkloadAPI(spoil)
			w.agent.Renew()
			pass(0)
			if ev, _ := e.last(t); ev.SVID != first || !errors.Is(ev.Err, ca.ErrRejected) {
				t.Fatalf("got %v, %v, want the first SVID and that a message was rejected", ev.SVID, ev.Err)
			}
			w.agent.TamperWorkloadAPI(nil)
			pass(0)
			if next := e.want(t, ca.Available).SVID; next.Cert == first.Cert {
				t.Error("the next message was discarded, too")
			}
			if got := w.agent.Opened(spireagent.FetchX509SVID); got != 1 {
				t.Errorf("%d streams, want one: a discarded message does not end it", got)
			}
		}, webEntry)
	}
	inWorkloadBubble(t, "the latest of two SVIDs of one identity", func(t *testing.T, w *world) {
		e := watch(t, w.provider, web)
		pass(time.Minute)
		if svid := e.want(t, ca.Available).SVID; svid.NotAfter.Sub(svid.NotBefore) != 2*time.Hour {
			t.Errorf("got the SVID until %v", svid.NotAfter)
		}
	}, webEntry, spireagent.Entry{ID: webText, Selectors: webEntry.Selectors, Life: 2 * time.Hour})
}

// bundleUpdates records what a WatchBundles reports until the test ends.
func bundleUpdates(t *testing.T, p ca.Provider, w ca.WorkloadRef) chan *ca.Bundles {
	t.Helper()
	updates := make(chan *ca.Bundles, 10)
	background(t, func(ctx context.Context) {
		if err := p.WatchBundles(ctx, w, func(b *ca.Bundles) { updates <- b }); !errors.Is(err, context.Canceled) {
			t.Errorf("WatchBundles: %v", err)
		}
	})
	return updates
}

// oneUpdate is the one update that there is.
func oneUpdate(t *testing.T, updates chan *ca.Bundles) *ca.Bundles {
	t.Helper()
	if len(updates) != 1 {
		t.Fatalf("%d updates, want one", len(updates))
	}
	return <-updates
}

// noUpdate fails if there is an update.
func noUpdate(t *testing.T, updates chan *ca.Bundles) {
	t.Helper()
	if len(updates) != 0 {
		t.Fatalf("there is an update of the bundles of %v", (<-updates).Domains())
	}
}

// TestWorkloadWatchBundles: to the workloads of other providers goes the trust
// domain of the default SVID (R45), whoever they are.
func TestWorkloadWatchBundles(t *testing.T) {
	first := spireagent.Entry{ID: "spiffe://cluster.local/ns/z/sa/first", Selectors: webEntry.Selectors, FederatesWith: []string{"friend.example"}}
	inWorkloadBubble(t, "own trust domain", func(t *testing.T, w *world) {
		w.agent.Federate("friend.example", catest.NewCA(t, "friend.example"))
		updates := bundleUpdates(t, w.provider, ca.WorkloadRef{ID: catest.ID("spiffe://elsewhere.example/ns/a/sa/b")})
		pass(time.Minute)
		own := catest.TrustDomain("cluster.local")
		if b := oneUpdate(t, updates); len(b.Domains()) != 1 || len(b.Anchors(own)) != 1 {
			t.Errorf("got bundles of %v", b.Domains())
		}
		w.agent.Renew()
		pass(time.Minute)
		noUpdate(t, updates)
		w.agent.PrepareRoot()
		pass(0)
		if b := oneUpdate(t, updates); len(b.Anchors(own)) != 2 {
			t.Errorf("%d anchors after a new root", len(b.Anchors(own)))
		}
		w.agent.Stop()
		pass(20 * time.Minute)
		w.agent.Start()
		pass(time.Minute)
		noUpdate(t, updates)
		w.agent.SetEntries()
		pass(5*time.Second - 1)
		noUpdate(t, updates)
		pass(time.Second)
		if b := oneUpdate(t, updates); len(b.Domains()) != 0 {
			t.Errorf("got bundles of %v after all was redacted", b.Domains())
		}
		w.agent.SetEntries(webEntry)
		pass(time.Minute)
		if b := oneUpdate(t, updates); len(b.Anchors(own)) != 2 {
			t.Error("the bundle did not come back")
		}
	}, first, webEntry)
}
