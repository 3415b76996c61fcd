package inpod

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ztunnel-go/ztunnel/admin"
	"github.com/ztunnel-go/ztunnel/proxy/inpod/zdspb"
)

// The rows IP-09 to IP-23 of spec/identity-admin-inpod.md §8.7 whose subject is
// the Manager.

func TestID_IP09_AddStartsAProxy(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t)
		accept(t, c.add("a", w.ns("1")))
		w.wantStates("a active")
		if p := w.last("a"); !p.isListening() {
			t.Error("the proxy does not listen")
		}
		w.wantCounts(1, 0, 1, 0)
		w.m.Drain()
		<-w.ended
		if w.err != nil {
			t.Errorf("Run: %v", w.err)
		}
		if err := w.last("a").cutBy(); err != nil {
			t.Errorf("cut by %v instead of drained", err)
		}
		w.wantCounts(0, 0, 1, 1)
		w.wantStates("")
	})
}

func TestID_IP10_AddTwiceStartsOneProxy(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t)
		accept(t, c.add("a", w.ns("1")), c.add("a", w.ns("1")))
		w.wantCounts(1, 0, 1, 0)
		if open := openFiles(t, w.dir); len(open) != 1 {
			t.Errorf("open namespaces: %v, want one", open)
		}
	})
}

// A second pod in the namespace of another one would get connections of that one.
func TestFault_122_OneNamespaceOnePod(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t)
		accept(t, c.add("a", w.ns("1")), c.sent())
		const want = "its network namespace is that of pod default/a, UID a"
		if got := c.add("b", w.ns("1")); got != "failure to start proxy : "+want {
			t.Errorf("answer: got %q, want that %q", got, want)
		}
		time.Sleep(3 * retryEvery)
		w.wantStates("a active, b failed")
		if n := len(w.proxies("b")); n != 0 {
			t.Errorf("%d proxies were made for b, want none", n)
		}
		accept(t, c.del("a"))
		time.Sleep(retryEvery)
		w.wantStates("b active")
		w.wantCounts(1, 0, 2, 1)
	})
}

func TestID_IP11_FailsAndIsTriedAgain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t)
		free := w.occupy("1")
		if got := c.add("a", w.ns("1")); got != "failure to start proxy : "+errTaken.Error() {
			t.Errorf("answer: got %q", got)
		}
		w.wantCounts(0, 1, 0, 0)
		w.wantStates("a failed")
		if s := w.m.Snapshot()[0]; s.Reason != errTaken.Error() || s.Retries != 1 {
			t.Errorf("got reason %q and %d retries, want %q and 1", s.Reason, s.Retries, errTaken)
		}
		time.Sleep(retryEvery)
		w.wantCounts(0, 1, 0, 0)
		free()
		time.Sleep(retryEvery)
		w.wantCounts(1, 0, 1, 0)
		w.wantStates("a active")
		if s := w.m.Snapshot()[0]; s.Reason != "" || s.Retries != 0 {
			t.Errorf("got reason %q and %d retries, want none", s.Reason, s.Retries)
		}
	})
}

func TestID_IP12_AddedElsewhereWhilePending(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t)
		w.occupy("1")
		if c.add("a", w.ns("1")) == "" {
			t.Error("accepted, although the ports are taken")
		}
		accept(t, c.add("a", w.ns("2")))
		w.wantCounts(1, 0, 1, 0)
		if open := openFiles(t, w.dir); len(open) != 1 || !strings.HasSuffix(open[0], "/2") {
			t.Errorf("open namespaces: %v, want the second one", open)
		}
		time.Sleep(2 * retryEvery)
		w.wantCounts(1, 0, 1, 0)
	})
}

func TestID_IP13_FailsAndIsDeleted(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t)
		accept(t, c.sent())
		w.occupy("1")
		if c.add("a", w.ns("1")) == "" {
			t.Error("accepted, although the ports are taken")
		}
		accept(t, c.del("a"))
		w.wantCounts(0, 0, 0, 0)
		w.wantStates("")
		if open := openFiles(t, w.dir); len(open) != 0 {
			t.Errorf("open namespaces: %v, want none", open)
		}
	})
}

func TestID_IP14_DeletedBeforeTheSnapshot(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t)
		free := w.occupy("1")
		if c.add("a", w.ns("1")) == "" {
			t.Error("accepted, although the ports are taken")
		}
		accept(t, c.del("a"))
		w.wantCounts(0, 0, 0, 0)
		// One that is served stays until the snapshot is complete.
		accept(t, c.add("b", w.ns("2")), c.del("b"))
		w.wantCounts(1, 0, 1, 0)
		accept(t, c.sent())
		w.wantCounts(0, 0, 1, 1)
		w.wantReady("")
		free()
	})
}

func TestID_IP15_AddDeleteAdd(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t)
		accept(t, c.sent(), c.add("a", w.ns("1")), c.del("a"))
		w.wantCounts(0, 0, 1, 1)
		if err := w.last("a").cutBy(); !errors.Is(err, errDeleted) {
			t.Errorf("cut by %v, want %v", err, errDeleted)
		}
		// At once: the ports are those of the proxy that is about to end.
		accept(t, c.add("a", w.ns("1")), c.del("a"), c.add("a", w.ns("1")))
		w.wantCounts(1, 0, 3, 2)
	})
}

func TestID_IP16_KeptWithANewSnapshot(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t)
		accept(t, c.add("a", w.ns("1")), c.sent())
		c.eof()
		c = w.conn()
		accept(t, c.keep("a"), c.keep("unknown"), c.sent())
		w.wantStates("a active")
		w.wantCounts(1, 0, 1, 0)
		w.wantReady("")
	})
}

func TestID_IP17_OtherNamespaceKeepsTheLatest(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t)
		accept(t, c.add("a", w.ns("1")))
		w.wantStates("a active")
		accept(t, c.add("a", w.ns("2")))
		w.wantCounts(1, 0, 2, 1)
		w.wantStates("a active")
		if err := w.proxies("a")[0].cutBy(); !errors.Is(err, errReplaced) {
			t.Errorf("cut by %v, want %v", err, errReplaced)
		}
	})
}

// The replaced proxy may end long after its successor has started: nothing of it
// shows then.
func TestID_IP17_ReplacedProxyEndsLate(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t)
		release := make(chan struct{})
		w.m.cfg.New = func(pod Pod) (Proxy, error) {
			p, err := w.newProxy(pod)
			if len(w.proxies("a")) == 1 {
				return &slowProxy{p.(*fakeProxy), release}, err
			}
			return p, err
		}
		w.m.Open()
		w.run()
		c := w.conn()
		accept(t, c.add("a", w.ns("1")))
		w.wantStates("a active")
		accept(t, c.add("a", w.ns("2")))
		w.wantCounts(1, 0, 2, 0)
		w.wantStates("a active")
		if got := w.value("workload_manager_pods", "draining"); got != 1 {
			t.Errorf("draining: got %v, want 1", got)
		}
		accept(t, c.sent(), c.del("a"))
		w.wantStates("a draining") // the first one
		close(release)
		w.wantCounts(0, 0, 2, 2)
		w.wantStates("")
	})
}

// slowProxy ends when it may.
type slowProxy struct {
	*fakeProxy
	release chan struct{}
}

func (p *slowProxy) Run(ctx context.Context) error {
	defer func() { <-p.release }()
	return p.fakeProxy.Run(ctx)
}

func TestID_IP18_NoWorkloadInfo(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t)
		r := &zdspb.WorkloadRequest{Payload: &zdspb.WorkloadRequest_Add{Add: &zdspb.AddWorkload{Uid: "a"}}}
		if got, want := c.ask(r, w.ns("1")), "failure to process message : workload_info is required but not present"; got != want {
			t.Errorf("answer: got %q, want %q", got, want)
		}
		w.wantProtocolError("workload_info is required but not present")
	})
}

// wantProtocolError waits for the end that a breach of the protocol brings.
func (w *world) wantProtocolError(want string) {
	w.t.Helper()
	<-w.ended
	var wrong *ProtocolError
	if !errors.As(w.err, &wrong) || wrong.Err.Error() != want {
		w.t.Errorf("Run: got %v, want a protocol error: %s", w.err, want)
	}
	w.wantReady("not connected to the node agent at ")
	w.wantStates("")
}

func TestID_IP19_EndOfTheConnection(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t)
		accept(t, c.add("a", w.ns("1")))
		w.wantReady("waiting for the ZDS snapshot since 2000-01-01T00:00:00Z")
		w.mu.Lock()
		w.refuse = errors.New("connection refused")
		w.mu.Unlock()
		c.eof()
		w.wantReady("not connected to the node agent at /var/run/ztunnel/ztunnel.sock: connection refused")
		w.wantStates("a active")
	})
}

func TestID_IP20_HelloFails(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t)
		dial := w.m.dial
		w.m.dial = func(ctx context.Context) (agentConn, error) {
			c, err := dial(ctx)
			c.(*fakeConn).eof()
			return c, err
		}
		w.m.Open()
		w.run()
		w.wantReady("not connected to the node agent at /var/run/ztunnel/ztunnel.sock: send hello: broken pipe")
	})
}

func TestID_IP21_FailsInTheSnapshot(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t)
		free := w.occupy("1")
		if c.add("a", w.ns("1")) == "" {
			t.Error("accepted, although the ports are taken")
		}
		accept(t, c.sent())
		w.wantReady("1 of 1 pods not tried: default/a failed: " + errTaken.Error())
		w.wantCounts(0, 1, 0, 0)
		free()
		time.Sleep(retryEvery)
		w.wantReady("")
		w.wantCounts(1, 0, 1, 0)
	})
}

func TestID_IP22_AddAndDelete(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t)
		accept(t, c.add("a", w.ns("1")), c.sent())
		w.wantStates("a active")
		accept(t, c.del("a"), c.del("a"), c.del("unknown"))
		w.wantCounts(0, 0, 1, 1)
		w.wantReady("")
	})
}

func TestID_IP23_MissingInTheNextSnapshot(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t)
		accept(t, c.add("uid0", w.ns("0")), c.add("uid1", w.ns("1")), c.sent())
		c.eof()
		c = w.conn()
		accept(t, c.add("uid1", w.ns("1")))
		w.wantStates("uid0 active, uid1 active") // until the snapshot is complete
		accept(t, c.sent())
		w.wantStates("uid1 active")
		w.wantCounts(1, 0, 2, 1)
		w.wantReady("")
		if err := w.last("uid0").cutBy(); !errors.Is(err, errMissing) {
			t.Errorf("cut by %v, want %v", err, errMissing)
		}
	})
}

// IP-24: messages out of order end the process, and are refused before.
func TestID_IP24_OutOfOrder(t *testing.T) {
	for name, tt := range map[string]struct {
		request *zdspb.WorkloadRequest
		want    string
	}{
		"keep after the snapshot": {keepRequest("a"), "pod keep received after snapshot"},
		"second snapshot":         {sentRequest(), "pod snapshot received already"},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w, c := start(t)
				accept(t, c.add("a", w.ns("1")), c.sent())
				w.wantStates("a active")
				if got, want := c.ask(tt.request), "failure to process message : "+tt.want; got != want {
					t.Errorf("answer: got %q, want %q", got, want)
				}
				w.wantProtocolError(tt.want)
				var wrong *ProtocolError
				if err := w.last("a").cutBy(); !errors.As(err, &wrong) {
					t.Errorf("cut by %v: a breach of the protocol does not drain", err)
				}
			})
		})
	}
}

// IP-24: however long a reason is, the agent can read it.
func TestID_IP24_LongReason(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t)
		w.fail("a", errors.New(strings.Repeat("ä", 600)+"\xff"))
		got := c.add("a", w.ns("1")) // checks the length, and that it is UTF-8
		if want := "failure to start proxy : ä"; !strings.HasPrefix(got, want) || len(got) >= 900 || len(got) < 890 {
			t.Errorf("answer: %d bytes, %q", len(got), got)
		}
	})
}

func TestID_IP24_NamespaceIsClosedAfterDelete(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t)
		accept(t, c.sent(), c.add("a", w.ns("1")), c.del("a"))
		synctest.Wait()
		if open := openFiles(t, w.dir); len(open) != 0 {
			t.Errorf("open namespaces: %v, want none", open)
		}
	})
}

// What cannot be decoded is refused, and costs the connection only.
func TestID_IP24_Undecodable(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w, c := start(t)
		accept(t, c.add("a", w.ns("1")))
		if got, want := c.put(packet{data: []byte{0x0a}}), "failure to read message : decode"; !strings.HasPrefix(got, want) {
			t.Errorf("answer: got %q, want %q", got, want)
		}
		next := w.conn()
		if next == c || !c.isClosed() {
			t.Error("no new connection")
		}
		if got := w.tries(); got[1].Sub(got[0]) != 0 {
			t.Errorf("reconnected after %v, want at once", got[1].Sub(got[0]))
		}
		accept(t, next.keep("a"), next.sent())
		w.wantStates("a active")
		if got := w.value("workload_manager_zds_nacks_total", "read"); got != 1 {
			t.Errorf("nacks: got %v, want 1", got)
		}
	})
}

func TestStatus(t *testing.T) {
	bubble(t, func(t *testing.T) {
		w := newWorld(t)
		if diff := cmp.Diff(Status{Path: "/var/run/ztunnel/ztunnel.sock", Error: "no attempt yet"}, w.m.Status()); diff != "" {
			t.Errorf("before Run (-want +got):\n%s", diff)
		}
		began := time.Now()
		w.run()
		c := w.conn()
		if diff := cmp.Diff(Status{Path: "/var/run/ztunnel/ztunnel.sock", Connected: true, Since: began}, w.m.Status()); diff != "" {
			t.Errorf("connected (-want +got):\n%s", diff)
		}
		time.Sleep(time.Second)
		accept(t, c.sent())
		synctest.Wait()
		if diff := cmp.Diff(Status{Path: "/var/run/ztunnel/ztunnel.sock", Connected: true, Since: began, Snapshot: began.Add(time.Second)}, w.m.Status()); diff != "" {
			t.Errorf("after the snapshot (-want +got):\n%s", diff)
		}
		w.mu.Lock()
		w.refuse = errors.New("connection refused")
		w.mu.Unlock()
		time.Sleep(time.Second)
		c.eof()
		synctest.Wait()
		if diff := cmp.Diff(Status{Path: "/var/run/ztunnel/ztunnel.sock", Since: began.Add(2 * time.Second), Error: "connection refused"}, w.m.Status()); diff != "" {
			t.Errorf("after the end (-want +got):\n%s", diff)
		}
	})
}

// Every family says that it is unstable, and keeps the rules of the exposition.
func TestMetricsHelp(t *testing.T) {
	w := newWorld(t)
	w.m.cfg.Metrics.nacks.WithLabelValues(refusedStart).Inc()
	if err := admin.CheckHelp(w.registry); err != nil {
		t.Error(err)
	}
	families, err := w.registry.Gather()
	if err != nil || len(families) != 9 {
		t.Fatalf("got %d families, %v, want 9", len(families), err)
	}
	for _, f := range families {
		if !strings.HasSuffix(f.GetHelp(), "(unstable)") {
			t.Errorf("%s: %s", f.GetName(), f.GetHelp())
		}
	}
}
