package spire

import (
	"context"
	"crypto/x509"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/ca/catest/spireagent"
)

// inBubble runs f with a world in a bubble.
func inBubble(t *testing.T, name string, f func(*testing.T, *world), entries ...spireagent.Entry) {
	t.Helper()
	t.Run(name, func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) { f(t, newWorld(t, DelegatedConfig{}, entries...)) })
	})
}

// TestFault_109_Sets is the table of design D23.
func TestFault_109_Sets(t *testing.T) {
	const none = "no SPIRE entry for this agent matches the selectors k8s:ns:shop k8s:sa:web k8s:pod-uid:uid-1 k8s:pod-name:web-1"
	inBubble(t, "empty before the first is pending, an entry later makes it available", func(t *testing.T, w *world) {
		e := watch(t, w.provider, web)
		pass(time.Hour)
		e.want(t, ca.Pending, none)
		if e.count() != 1 {
			t.Errorf("%d events, want one", e.count())
		}
		w.agent.AddEntry(webEntry)
		pass(0)
		e.want(t, ca.Available)
	})
	inBubble(t, "empty after one is withdrawn after the grace", func(t *testing.T, w *world) {
		e := watch(t, w.provider, web)
		pass(time.Minute)
		w.agent.SetEntries()
		pass(5*time.Second - 1)
		e.want(t, ca.Available)
		pass(1)
		ev := e.want(t, ca.Withdrawn, none)
		if !errors.Is(ev.Err, ca.ErrDenied) {
			t.Errorf("%v is no ErrDenied", ev.Err)
		}
		pass(time.Hour)
		if e.count() != 2 {
			t.Errorf("%d events, want two", e.count())
		}
		w.agent.AddEntry(webEntry)
		pass(0)
		e.want(t, ca.Available)
	}, webEntry)
	inBubble(t, "the grace is cancelled by a new SVID", func(t *testing.T, w *world) {
		e := watch(t, w.provider, web)
		pass(time.Minute)
		w.agent.SetEntries()
		pass(4 * time.Second)
		w.agent.AddEntry(webEntry)
		pass(4 * time.Second)
		w.agent.SetEntries()
		pass(4 * time.Second)
		e.want(t, ca.Available)
		pass(time.Second)
		e.want(t, ca.Withdrawn, none)
	}, webEntry)
	inBubble(t, "the grace is restarted by a new stream", func(t *testing.T, w *world) {
		e := watch(t, w.provider, web)
		pass(time.Minute)
		w.agent.SetEntries()
		pass(4 * time.Second)
		w.agent.Cut(nil)
		pass(5 * time.Second)
		requests := w.agent.Requests()
		e.want(t, ca.Available)
		pass(time.Second)
		e.want(t, ca.Withdrawn, none)
		_, at := e.last(t)
		if got := at.Sub(requests[len(requests)-1].At); got > 5*time.Second || got < 4500*time.Millisecond {
			t.Errorf("withdrawn %v after the new streams", got)
		}
	}, webEntry)
	inBubble(t, "streams that break all the time do not put off its end for ever", func(t *testing.T, w *world) {
		e := watch(t, w.provider, web)
		pass(time.Minute)
		w.agent.SetEntries()
		for range 13 {
			pass(4 * time.Second)
			w.agent.Cut(nil)
		}
		e.want(t, ca.Available) // after 52 s
		for range 3 {
			pass(4 * time.Second)
			w.agent.Cut(nil)
		}
		e.want(t, ca.Withdrawn, none) // after 64 s, of which 60 are grace
	}, webEntry)
	inBubble(t, "another identity instead", func(t *testing.T, w *world) {
		e := watch(t, w.provider, web)
		pass(time.Minute)
		other := webEntry
		other.ID = "spiffe://cluster.local/ns/shop/sa/other"
		w.agent.SetEntries(other)
		pass(6 * time.Second)
		e.want(t, ca.Withdrawn, "did not find expected SAN: "+webText)
	}, webEntry)
}

// TestFault_108_BrokenStreamKeepsTheSVID: whatever ends a stream says nothing of
// the identity. It is used until it expires, and then the cause is known.
func TestFault_108_BrokenStreamKeepsTheSVID(t *testing.T) {
	for _, tt := range []struct {
		name  string
		fail  func(*spireagent.Agent)
		mend  func(*spireagent.Agent)
		cause string
		is    error
	}{
		{"agent down", (*spireagent.Agent).Stop, (*spireagent.Agent).Start, "the agent does not run", nil},
		{"hang", func(a *spireagent.Agent) { a.Hang(true); a.Cut(nil) }, func(a *spireagent.Agent) { a.Hang(false) },
			"the agent sent no message within 10s", nil},
		{"delegate lost its entry", func(a *spireagent.Agent) { a.SetDelegate(spireagent.WithoutEntry) },
			func(a *spireagent.Agent) { a.SetDelegate(spireagent.Authorized) },
			"SPIRE has no entry for this proxy on this node yet", ca.ErrDenied},
		{"delegate not authorized", func(a *spireagent.Agent) { a.SetDelegate(spireagent.NotADelegate) },
			func(a *spireagent.Agent) { a.SetDelegate(spireagent.Authorized) },
			"authorized_delegates", ca.ErrDenied},
		{"delegate not attested", func(a *spireagent.Agent) { a.SetDelegate(spireagent.AttestationOff) },
			func(a *spireagent.Agent) { a.SetDelegate(spireagent.Authorized) },
			"could not attest", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				agent := spireagent.New(t, spireagent.Config{})
				agent.AddEntry(webEntry)
				p, err := NewDelegated(DelegatedConfig{Common: Common{Dial: agent.Dial}})
				if err != nil {
					t.Fatal(err)
				}
				lease := catest.RunManager(t, catest.Fixed{p}, ca.ManagerConfig{}).Acquire(web) // runs the provider, too
				defer lease.Release()
				e := watch(t, p, web)
				pass(time.Minute)
				before := e.want(t, ca.Available).SVID
				tt.fail(agent)
				pass(2 * time.Minute)
				ev := e.want(t, ca.Available, tt.cause)
				if ev.SVID != before {
					t.Error("the SVID changed")
				}
				if tt.is != nil && !errors.Is(ev.Err, tt.is) {
					t.Errorf("%v is no %v", ev.Err, tt.is)
				}
				if ev.Next.IsZero() || time.Until(ev.Next) > 36*time.Second {
					t.Errorf("next attempt at %v, in %v", ev.Next, time.Until(ev.Next))
				}
				svid, ok := lease.Current()
				if !ok {
					t.Fatal("no SVID while the stream is broken")
				}
				pass(time.Until(svid.NotAfter) - 1)
				if _, ok := lease.Current(); !ok {
					t.Error("the SVID is gone before its end")
				}
				for _, after := range []time.Duration{1, time.Minute} {
					pass(after)
					if _, err := lease.SVID(t.Context()); !errors.Is(err, ca.ErrExpired) || !strings.Contains(text(err), tt.cause) {
						t.Errorf("%v after NotAfter: %v, want ErrExpired because of %q", after, err, tt.cause)
					}
				}
				tt.mend(agent)
				pass(time.Minute)
				e.want(t, ca.Available)
				if _, err := lease.SVID(t.Context()); err != nil {
					t.Errorf("after it was mended: %v", err)
				}
			})
		})
	}
}

// TestFault_108_OneCut: a stream that ends once is opened anew almost at once, and
// nothing has changed.
func TestFault_108_OneCut(t *testing.T) {
	for name, end := range map[string]error{
		"EOF": nil, "unavailable": status.Error(codes.Unavailable, "shutting down"),
		"denied": status.Error(codes.PermissionDenied, "no longer"), "unknown": status.Error(codes.Unknown, "what"),
	} {
		inBubble(t, name, func(t *testing.T, w *world) {
			e := watch(t, w.provider, web)
			pass(time.Minute)
			before := e.want(t, ca.Available).SVID
			w.agent.Cut(end)
			pass(501 * time.Millisecond)
			if ev := e.want(t, ca.Available); ev.SVID != before || e.count() != 3 {
				t.Errorf("%d events, the last %v; want the same SVID, with an error and without", e.count(), ev)
			}
		}, webEntry)
	}
}

// TestFault_108_DeadConnection: a connection that is dead and does not know is
// found, and replaced, long before the SVID expires.
func TestFault_108_DeadConnection(t *testing.T) {
	inBubble(t, "dead", func(t *testing.T, w *world) {
		e := watch(t, w.provider, web)
		pass(time.Minute)
		before := e.want(t, ca.Available).SVID
		w.agent.Blackhole()
		w.agent.Renew()
		pass(10 * time.Minute)
		if ev := e.want(t, ca.Available); ev.SVID == before {
			t.Error("still the SVID from before")
		}
	}, webEntry)
}

// TestDenialIsRetriedSlower counts attempts in the first minute.
func TestDenialIsRetriedSlower(t *testing.T) {
	attempts := func(t *testing.T, fail func(*spireagent.Agent)) int {
		var n int
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, DelegatedConfig{}, webEntry)
			fail(w.agent)
			watch(t, w.provider, web)
			pass(20 * time.Second)
			n = w.agent.Opened(spireagent.SubscribeToX509SVIDs)
		})
		return n
	}
	denied := attempts(t, func(a *spireagent.Agent) { a.SetDelegate(spireagent.WithoutEntry) })
	broken := attempts(t, func(a *spireagent.Agent) { a.SetDelegate(spireagent.AttestationOff) })
	if denied > 5 || denied < 3 {
		t.Errorf("%d attempts within 20 s when denied, want one every 5 s ±20 %%", denied)
	}
	if broken <= denied {
		t.Errorf("%d attempts when broken, %d when denied", broken, denied)
	}
}

// TestFault_107_FirstState: what is wrong before the first message is seen, and
// passes.
func TestFault_107_FirstState(t *testing.T) {
	for _, tt := range []struct {
		name string
		fail func(*spireagent.Agent)
		mend func(*spireagent.Agent)
		want string
		is   error
	}{
		{"agent down", (*spireagent.Agent).Stop, (*spireagent.Agent).Start, "the agent does not run", nil},
		{"no entry of the delegate", func(a *spireagent.Agent) { a.SetDelegate(spireagent.WithoutEntry) },
			func(a *spireagent.Agent) { a.SetDelegate(spireagent.Authorized) }, "the delegate needs one", ca.ErrDenied},
		{"hang", func(a *spireagent.Agent) { a.Hang(true) }, func(a *spireagent.Agent) { a.Hang(false) }, "no message within 10s", nil},
	} {
		inBubble(t, tt.name, func(t *testing.T, w *world) {
			tt.fail(w.agent)
			e := watch(t, w.provider, web)
			pass(15 * time.Second)
			if ev := e.want(t, ca.Unavailable, tt.want); tt.is != nil && !errors.Is(ev.Err, tt.is) {
				t.Errorf("%v is no %v", ev.Err, tt.is)
			}
			tt.mend(w.agent)
			pass(time.Minute)
			e.want(t, ca.Available)
		}, webEntry)
	}
}

// TestRenewal12h keeps one lease and one watch for twelve hours.
func TestRenewal12h(t *testing.T) {
	inBubble(t, "12h", func(t *testing.T, w *world) {
		e := watch(t, w.provider, web)
		pass(time.Second)
		first := e.want(t, ca.Available).SVID
		for range 12 * 60 {
			pass(time.Minute)
			ev := e.want(t, ca.Available)
			if left := time.Until(ev.SVID.NotAfter); left < 29*time.Minute {
				t.Fatalf("only %v are left", left)
			}
			if ev.SVID.Epoch() != first.Epoch() {
				t.Fatal("a renewal changed the epoch")
			}
		}
		if got := e.count(); got != 25 {
			t.Errorf("%d events, want the first and 24 renewals", got)
		}
		if got := w.agent.Opened(spireagent.SubscribeToX509SVIDs); got != 1 {
			t.Errorf("%d streams for one workload", got)
		}
		// Every 5 min ± 20 %: between 120 and 180, and the first.
		if got := w.agent.Opened(spireagent.SubscribeToX509Bundles); got < 120 || got > 181 {
			t.Errorf("the bundles were subscribed to %d times", got)
		}
		if got := w.agent.Dials(); got != 1 {
			t.Errorf("%d connections", got)
		}
	}, webEntry)
}

// TestRepeatedMessages: the agent repeats itself (spire #2108), we do not.
func TestRepeatedMessages(t *testing.T) {
	inBubble(t, "repeat", func(t *testing.T, w *world) {
		e := watch(t, w.provider, web)
		pass(time.Minute)
		n, messages := e.count(), w.agent.Messages()
		for range 10 {
			w.agent.Repeat()
			pass(time.Second)
		}
		if got := w.agent.Messages() - messages; got != 20 {
			t.Fatalf("the agent sent %d messages, want 10 on each of two streams", got)
		}
		if e.count() != n {
			t.Errorf("%d further events", e.count()-n)
		}
	}, webEntry)
}

// TestWatchOutlastsRun: a watch waits while the provider does not run.
func TestWatchOutlastsRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := spireagent.New(t, spireagent.Config{})
		agent.AddEntry(webEntry)
		p, err := NewDelegated(DelegatedConfig{Common: Common{Dial: agent.Dial}})
		if err != nil {
			t.Fatal(err)
		}
		e := watch(t, p, web)
		pass(time.Hour)
		if e.count() != 0 {
			t.Errorf("%d events before Run", e.count())
		}
		for i := range 3 {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			done := make(chan error, 1)
			go func() { done <- p.Run(ctx) }()
			pass(time.Minute)
			e.want(t, ca.Available)
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Run %d: %v", i, err)
			}
			pass(10 * time.Minute)
			e.want(t, ca.Available)
			if agent.Streams() != 0 {
				t.Errorf("%d streams after Run", agent.Streams())
			}
			agent.Renew()
		}
		if e.count() != 3 {
			t.Errorf("%d events, want one of each Run", e.count())
		}
	})
}

// TestClockBehind: an SVID of a server whose clock is ahead of ours is used from
// the moment on at which it is valid, though the agent sends it only once; what
// there was before is used until then.
func TestClockBehind(t *testing.T) {
	premature := func(t *testing.T, a *spireagent.Agent, from time.Duration) spireagent.Tamper {
		chain, signer := a.CA().Leaf(t, webText, catest.Between(from, from+time.Hour))
		key, err := x509.MarshalPKCS8PrivateKey(signer)
		if err != nil {
			t.Fatal(err)
		}
		return spireagent.Tamper{SVIDs: func(m *svids) {
			if len(m.GetX509Svids()) > 0 {
				m.X509Svids[0].X509Svid.CertChain, m.X509Svids[0].X509SvidKey = [][]byte{chain[0].Raw}, key
			}
		}}
	}
	const hint = "compare the clocks of this node and of the SPIRE server"
	inBubble(t, "first", func(t *testing.T, w *world) {
		w.agent.SetTamper(premature(t, w.agent, 2*time.Minute))
		e := watch(t, w.provider, web)
		pass(2*time.Minute - 1)
		ev := e.want(t, ca.Unavailable, webText, hint)
		if ev.Next.IsZero() || time.Until(ev.Next) > time.Second {
			t.Errorf("the next attempt is at %v, in %v", ev.Next, time.Until(ev.Next))
		}
		if e.count() != 1 {
			t.Errorf("%d events, want one", e.count())
		}
		pass(time.Second)
		e.want(t, ca.Available)
	}, webEntry)
	t.Run("renewed", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			agent := spireagent.New(t, spireagent.Config{})
			agent.AddEntry(webEntry)
			p, err := NewDelegated(DelegatedConfig{Common: Common{Dial: agent.Dial}})
			if err != nil {
				t.Fatal(err)
			}
			lease := catest.RunManager(t, catest.Fixed{p}, ca.ManagerConfig{}).Acquire(web)
			defer lease.Release()
			pass(time.Minute)
			before, _ := lease.Current()
			agent.SetTamper(premature(t, agent, 20*time.Second))
			pass(19 * time.Second)
			if svid, ok := lease.Current(); !ok || svid != before {
				t.Errorf("got %v, want the SVID from before", svid)
			}
			pass(2 * time.Second)
			if svid, ok := lease.Current(); !ok || svid.Cert == before.Cert {
				t.Errorf("got %v, want the new SVID", svid)
			}
		})
	})
	inBubble(t, "taken back before", func(t *testing.T, w *world) {
		w.agent.SetTamper(premature(t, w.agent, 20*time.Second))
		e := watch(t, w.provider, web)
		pass(10 * time.Second)
		w.agent.SetEntries()
		pass(time.Hour)
		e.want(t, ca.Pending, "no SPIRE entry")
	}, webEntry)
}
