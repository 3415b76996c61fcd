//go:build e2e

package netns

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/world"
)

// What the applications do while proxies are replaced.
const (
	rollingRate  = 100 // new connections per second
	rollingTime  = 60 * time.Second
	rollingGrace = 10 * time.Second // CONNECTION_TERMINATION_DEADLINE of the proxies
	// unsynced is how long a new proxy that has no state yet stands beside the old
	// one. On a host network that one has been told to end: it waits for half of
	// its deadline, in which the new one also has to find the control plane again.
	unsynced, unsyncedOnHost = 4 * time.Second, time.Second
	unsyncedGrace            = 2 * rollingGrace
)

// rollingRuns is how often each row of the rolling pair runs, one after the
// other: ZTUNNEL_ROLLING_RUNS, 1 if empty.
func rollingRuns(t *testing.T) int {
	t.Helper()
	text := os.Getenv("ZTUNNEL_ROLLING_RUNS")
	if text == "" {
		return 1
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("ZTUNNEL_ROLLING_RUNS=%s: want a number from 1", text)
	}
	return n
}

// faults row 124, D14: proxies are replaced as a DaemonSet with a surge does it, on
// the server's node and then on the client's. The new one becomes ready, the old
// one is told to end. No connection of the applications fails, and those that are
// open go on until the old proxy's deadline.
func TestFault_124_RollingPair(t *testing.T) {
	in(t, sharedModes, func(t *testing.T, m mode) {
		for range rollingRuns(t) {
			t.Run("run", func(t *testing.T) { checkRolling(t, m, false) })
		}
	})
}

// The same, with a control plane that is away when a new proxy starts: it takes no
// connection until it knows where connections go.
func TestFault_124_RollingPairUnsynced(t *testing.T) {
	in(t, sharedModes, func(t *testing.T, m mode) {
		for range rollingRuns(t) {
			t.Run("run", func(t *testing.T) { checkRolling(t, m, true) })
		}
	})
}

func checkRolling(t *testing.T, m mode, away bool) {
	m.proxy.XDS = away
	o := m.pair(world.BothCaptured)
	o.Source.XDS, o.Dest.XDS = away, away
	grace := rollingGrace
	if away && m.proxy.HostNetwork {
		grace = unsyncedGrace
	}
	env := []string{"CONNECTION_TERMINATION_DEADLINE=" + grace.String()}
	m.proxy.Env, o.Source.Env, o.Dest.Env = env, env, env
	p := newPair(t, o)
	for _, n := range p.Nodes { // both are told of whoever will run there
		n.Agent()
	}
	f := startFlow(t, p.Client.Net, p.Server.At(world.ChatPort), rollingRate, "rolling")
	for _, n := range []*world.Node{p.Server.Node, p.Client.Node} {
		replaceProxy(t, f, n, m, grace)
	}
	f.await(t, p.Ctx, rollingTime)
	trials := f.stopped()
	if failed := failures(trials); len(failed) > 0 {
		t.Errorf("%d of %d connections failed:%s", len(failed), len(trials), f.describe(failed))
	}
	if want := rollingRate * int(rollingTime/time.Second) * 95 / 100; len(trials) < want {
		t.Errorf("%d connections, want about %d a second", len(trials), rollingRate)
	}
	took := times(trials)
	t.Logf("%d connections, p50 %v, p99 %v, most %v", len(trials), quantile(took, 0.5), quantile(took, 0.99), quantile(took, 1))
}

// await waits until the flow has run for d.
func (f *flow) await(t *testing.T, ctx context.Context, d time.Duration) {
	t.Helper()
	timer := time.NewTimer(time.Until(f.begun.Add(d)))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		t.Fatal(ctx.Err())
	}
}

// replaceProxy replaces the proxy of a node while the flow runs.
func replaceProxy(t *testing.T, f *flow, n *world.Node, m mode, grace time.Duration) {
	t.Helper()
	w, away := n.W, m.proxy.XDS
	f.await(t, w.Ctx, time.Since(f.begun)+2*time.Second)
	old, pod := n.Proxy(), w.Pods[n.Num-1]
	kept := keepOpen(t, f, "still there")
	if away {
		w.Control().Stop()
	}
	launched := time.Now()
	heir := n.LaunchProxy(m.proxy)
	var told time.Time
	if m.proxy.HostNetwork {
		// The probe of the new pod is answered by the old one, which has the port, and
		// is told to end before the other can serve anybody.
		waitLog(t, heir, "another process has a port of ours, which is waited for")
		told = terminate(old)
		if away {
			expectIdle(t, w.Ctx, f, pod, heir, unsyncedOnHost)
			w.Control().Start()
		}
		waitLog(t, heir, "marking server ready")
	} else {
		if away {
			expectIdle(t, w.Ctx, f, pod, heir, unsynced)
			if err := heir.Ready(); err == nil {
				t.Errorf("%s is ready without a control plane", heir.Name)
			}
			w.Control().Start()
		}
		heir.AwaitReady(20 * time.Second)
		expectPod(t, heir, pod, "active", "")
		told = terminate(old)
	}
	if code := old.Wait(grace + 5*time.Second); code != 0 {
		t.Errorf("%s ended with exit code %d, want 0", old.Name, code)
	}
	ended := time.Now()
	if lasted := kept.end().Sub(told); lasted < grace-time.Second {
		t.Errorf("a connection that was open ended %v after the old proxy of %s was told to, want its deadline of %v", lasted, n.Name, grace)
	}
	t.Logf("%s: %s told to end %v after %s was launched at %.1f s, ended after %v", n.Name, old.Name, told.Sub(launched).Round(time.Millisecond),
		heir.Name, launched.Sub(f.begun).Seconds(), ended.Sub(told).Round(time.Millisecond))
}

func terminate(s *world.Proxy) time.Time {
	s.Terminate()
	return time.Now()
}

// waitLog waits until the proxy has logged a line with text in it.
func waitLog(t *testing.T, s *world.Proxy, text string) {
	t.Helper()
	if _, err := s.Find(s.Pod.W.Ctx, 20*time.Second, func(line string) bool { return strings.Contains(line, text) }); err != nil {
		t.Fatalf("%s does not say %q: %v", s.Name, text, err)
	}
}

// expectIdle fails if a proxy that knows nothing yet listens in the pod, or says
// that it has served somebody, within d.
func expectIdle(t *testing.T, ctx context.Context, f *flow, p *world.Pod, s *world.Proxy, d time.Duration) {
	t.Helper()
	for end := time.Since(f.begun) + d; time.Since(f.begun) < end; {
		f.await(t, ctx, time.Since(f.begun)+200*time.Millisecond)
		n, err := listeners(p, 15008)
		if err != nil {
			t.Fatal(err)
		}
		if n > 1 {
			t.Errorf("%d sockets listen on port 15008 of %s while %s knows nothing, want that of the old proxy", n, p.Name, s.Name)
			break
		}
	}
	for _, line := range s.Lines() {
		if strings.Contains(line, `"scope":"access"`) {
			t.Errorf("%s has served a connection before it knew anything: %s", s.Name, line)
		}
	}
}

// listeners counts the sockets that listen on a TCP port of a pod.
func listeners(p *world.Pod, port uint16) (n int, err error) {
	const listen = "0A"
	for _, file := range []string{"tcp", "tcp6"} {
		var table []byte
		if err := p.Net.Do(func() (err error) {
			table, err = os.ReadFile("/proc/thread-self/net/" + file)
			return err
		}); err != nil {
			return 0, err
		}
		for line := range strings.Lines(string(table)) {
			field := strings.Fields(line)
			if len(field) > 3 && field[3] == listen && strings.HasSuffix(field[1], fmt.Sprintf(":%04X", port)) {
				n++
			}
		}
	}
	return n, nil
}

// kept is a connection that is open when proxies change.
type kept struct {
	ended chan struct{} // closed at its end
	at    time.Time     // its end
}

// keepOpen opens one that says line ten times a second, until that fails.
func keepOpen(t *testing.T, f *flow, line string) *kept {
	t.Helper()
	ctx, cancel := context.WithTimeout(f.ctx, flowPatience)
	defer cancel()
	c, err := f.from.Dial(ctx, netip.Addr{}, f.to)
	if err != nil {
		t.Fatalf("connect: %v", err)
	}
	if err := world.Exchange(c, line, line); err != nil {
		t.Fatal(err)
	}
	k := &kept{ended: make(chan struct{})}
	stop := context.AfterFunc(f.ctx, func() { _ = c.Close() })
	f.parts.Go(func() {
		defer close(k.ended)
		defer c.Close()
		defer stop()
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for range tick.C {
			if err := errors.Join(c.SetDeadline(time.Now().Add(flowPatience)), world.Exchange(c, line, line)); err != nil {
				k.at = time.Now()
				return
			}
		}
	})
	return k
}

// end waits for it.
func (k *kept) end() time.Time {
	<-k.ended
	return k.at
}
