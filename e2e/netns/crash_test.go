//go:build e2e

package netns

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/netlab"
	"github.com/ztunnel-go/ztunnel/e2e/world"
)

const (
	crashRate = 50 // new connections per second
	crashGone = 2 * time.Second
	// crashLine is in every byte that the applications say.
	crashLine = "nobody on the wire may read this"
)

// faults row 124: proxies are killed while connections come, on the server's node,
// on the client's, and on both at once. While one is away connections fail, soon
// and closed: nothing of what the applications say is on the wire, and not even a
// segment of TCP from pod to pod that is not HBONE. The next proxy gets the pods
// from the snapshot and serves them.
func TestFault_124_Killed(t *testing.T) { in(t, sharedModes, checkKilled) }

func checkKilled(t *testing.T, m mode) {
	p := newPair(t, m.pair(world.BothCaptured))
	taps := map[*world.Pod]*netlab.Tap{p.Client: p.Client.Tap(crashLine), p.Server: p.Server.Tap(crashLine)}
	f := startFlow(t, p.Client.Net, p.Server.At(world.ChatPort), crashRate, crashLine)
	for _, nodes := range [][]*world.Node{{p.Server.Node}, {p.Client.Node}, {p.Client.Node, p.Server.Node}} {
		crash(t, f, m, nodes)
	}
	trials := f.stopped()
	if failed := failures(trials); len(failed) == len(trials) {
		t.Errorf("all of %d connections failed: %s", len(trials), f.describe(failed))
	}
	for pod, tap := range taps {
		expectHBONEOnly(t, tap, pod, p)
	}
}

// crash kills the proxies of some nodes, and starts others after a while.
func crash(t *testing.T, f *flow, m mode, nodes []*world.Node) {
	t.Helper()
	w := nodes[0].W
	f.await(t, w.Ctx, time.Since(f.begun)+time.Second)
	open := keepOpen(t, f, crashLine)
	f.await(t, w.Ctx, time.Since(f.begun)+500*time.Millisecond)
	for _, n := range nodes {
		n.Proxy().Kill()
	}
	killed := time.Now()
	if lasted := open.end().Sub(killed); lasted > 2*time.Second {
		t.Errorf("a connection that was open ended %v after the crash, want its end at once", lasted)
	}
	f.await(t, w.Ctx, killed.Sub(f.begun)+crashGone)
	launched := time.Now()
	for _, n := range nodes {
		n.LaunchProxy(m.proxy)
	}
	for _, n := range nodes {
		n.Proxy().AwaitReady(20 * time.Second)
		expectPod(t, n.Proxy(), w.Pods[n.Num-1], "active", "")
	}
	ready := time.Now()
	world.Eventually(t, w.Ctx, 10*time.Second, func() error {
		_, err := connectOnce(f.from, f.to, crashLine+"\n")
		return err
	})
	t.Logf("%d proxies killed, others ready %v after their start, connections %v later",
		len(nodes), ready.Sub(launched).Round(time.Millisecond), time.Since(ready).Round(time.Millisecond))
	expectOutage(t, f, killed, launched)
}

// expectOutage looks at the connections that began while there was no proxy: none
// succeeds, and none is kept waiting.
func expectOutage(t *testing.T, f *flow, from, to time.Time) {
	t.Helper()
	n := 0
	for _, trial := range f.until() {
		if trial.began.Before(from) || trial.began.After(to) {
			continue
		}
		n++
		switch {
		case trial.err == nil && trial.began.Add(trial.took).Before(to):
			t.Errorf("a connection succeeded %v after the crash", trial.began.Sub(from))
		case errors.Is(trial.err, os.ErrDeadlineExceeded), trial.took > 5*time.Second:
			t.Errorf("a connection that began %v after the crash was kept waiting: %s after %v: %v", trial.began.Sub(from), trial.step, trial.took, trial.err)
		}
	}
	if want := int(to.Sub(from).Seconds()*crashRate) / 2; n < want {
		t.Errorf("%d connections during the outage, want at least %d: the check proves nothing", n, want)
	}
}

// expectHBONEOnly fails if the tap of a pod saw a segment between the two pods,
// with payload or without, that has nothing to do with port 15008, or what the
// applications say.
func expectHBONEOnly(t *testing.T, tap *netlab.Tap, at *world.Pod, p *pair) {
	t.Helper()
	expectNoPlaintext(t, tap, at)
	r, err := tap.Report()
	if err != nil {
		t.Fatal(err)
	}
	pods := map[netip.Addr]bool{p.Client.Addr: true, p.Server.Addr: true, p.Client.Addr6: true, p.Server.Addr6: true}
	var tunnels int64
	for flow, bytes := range r.TCP {
		if !pods[flow.Src.Addr()] || !pods[flow.Dst.Addr()] {
			continue
		}
		if flow.Src.Port() == 15008 || flow.Dst.Port() == 15008 {
			tunnels += bytes
			continue
		}
		t.Errorf("%v -> %v with %d bytes on the link of %s: somebody tried without a tunnel", flow.Src, flow.Dst, bytes, at.Name)
	}
	if tunnels == 0 {
		t.Errorf("no tunnel on the link of %s: the check proves nothing", at.Name)
	}
	t.Logf("%s: %d packets, %d bytes in tunnels, %s", at.Name, r.Packets, tunnels, fmt.Sprint(r.Seen))
}
