//go:build e2e

package netns

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/cni/rules"
	"github.com/ztunnel-go/ztunnel/e2e/world"
)

// podState is what a shared proxy says of a pod in /config_dump.
type podState struct {
	Name, State, Reason string
	Retries             int
}

// podStates are the pods of a proxy, by name.
func podStates(s *world.Proxy) (map[string]podState, error) {
	raw, err := s.Pod.Get("http://127.0.0.1:15000/config_dump")
	if err != nil {
		return nil, err
	}
	var dump struct {
		Ours struct {
			Pods []podState `json:"pods"`
		} `json:"ztunnelGo"`
	}
	if err := json.Unmarshal([]byte(raw), &dump); err != nil {
		return nil, err
	}
	out := map[string]podState{}
	for _, p := range dump.Ours.Pods {
		out[p.Name] = p
	}
	return out, nil
}

// expectPod waits until a proxy has a pod in a state, for a reason that contains
// some words.
func expectPod(t *testing.T, s *world.Proxy, p *world.Pod, state, reason string) {
	t.Helper()
	world.Eventually(t, p.W.Ctx, 10*time.Second, func() error {
		pods, err := podStates(s)
		if err != nil {
			return err
		}
		if got := pods[p.Name]; got.State != state || !strings.Contains(got.Reason, reason) {
			return fmt.Errorf("%s has %s as %+v, want %s: %s", s.Name, p.Name, got, state, reason)
		}
		return nil
	})
}

// exchange is one message from a pod, with its answer.
func exchange(from *world.Pod, dst netip.AddrPort, send, want string) error {
	c, err := from.Net.Dial(from.W.Ctx, netip.Addr{}, dst)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	return world.Exchange(c, send, want)
}

// expectRefused tries a connection that nobody may serve: what must not come is
// an answer, or a wait without end.
func expectRefused(t *testing.T, from *world.Pod, dst netip.AddrPort) {
	t.Helper()
	if err := exchange(from, dst, "unserved", "unserved"); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%s to %v: got %v, want a refusal or a reset", from.Name, dst, err)
	}
}

// heldNamespaces counts the descriptors by which a proxy holds the network
// namespace of a pod.
func heldNamespaces(t *testing.T, s *world.Proxy, namespace os.FileInfo) int {
	t.Helper()
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", s.PID()))
	if err != nil || len(fds) == 0 {
		t.Fatalf("descriptors of %s: %d, %v", s.Name, len(fds), err)
	}
	n := 0
	for _, fd := range fds {
		if info, err := os.Stat(fd); err == nil && os.SameFile(info, namespace) {
			n++
		}
	}
	return n
}

// expectLetGo waits until a proxy has nothing any more of a pod and its namespace.
func expectLetGo(t *testing.T, s *world.Proxy, p *world.Pod, namespace os.FileInfo) {
	t.Helper()
	world.Eventually(t, p.W.Ctx, 5*time.Second, func() error {
		pods, err := podStates(s)
		if _, still := pods[p.Name]; err == nil && still {
			err = fmt.Errorf("the proxy still has the pod: %+v", pods)
		}
		if n := heldNamespaces(t, s, namespace); err == nil && n > 0 {
			err = fmt.Errorf("the proxy still holds %d descriptors of the namespace", n)
		}
		return err
	})
}

// N-18, LC-10: a pod is deleted. Its connections end at once, new ones to it get
// nothing, its namespace is let go of, and the pod beside it notices nothing.
func TestDP_N18_PodDeleted(t *testing.T) { in(t, sharedModes, checkPodDeleted) }

func checkPodDeleted(t *testing.T, m mode) {
	p := newPair(t, m.pair(world.BothCaptured))
	beside := p.AddPod("beside", 2)
	beside.StartApp()
	p.WriteConfig()
	beside.Enroll(m.rules)
	open := p.Dial(world.ChatPort)
	if err := world.Exchange(open, "before", "before"); err != nil {
		t.Fatal(err)
	}
	kept, err := p.Client.Net.Dial(p.Ctx, netip.Addr{}, beside.At(world.ChatPort))
	if err != nil {
		t.Fatal(err)
	}
	defer kept.Close()
	if err := world.Exchange(kept, "before", "before"); err != nil {
		t.Fatal(err)
	}
	namespace, err := os.Stat("/run/netns/" + p.Server.NS)
	if err != nil {
		t.Fatal(err)
	}
	if n := heldNamespaces(t, p.Dest, namespace); n == 0 {
		t.Error("the proxy holds no descriptor of the pod's namespace: the check below proves nothing")
	}
	start := time.Now()
	p.Server.DeleteAtAgent()
	if _, err := open.Read(make([]byte, 1)); err == nil || time.Since(start) > 2*time.Second {
		t.Errorf("the open connection ended after %v with %v, want its end at once", time.Since(start), err)
	}
	if _, err := p.Dest.Find(p.Ctx, 5*time.Second, func(line string) bool {
		return world.Fields{"message": "connection complete", "direction": "inbound"}.Match(line) && strings.Contains(line, "connection closed: the pod was deleted")
	}); err != nil {
		t.Errorf("no line says why the connection ended: %v", err)
	}
	// The client is captured, and so its own connection is accepted all the same.
	fresh := p.Dial(world.ChatPort)
	if err := world.Exchange(fresh, "after", "after"); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a new connection: got %v, want its end", err)
	}
	expectLetGo(t, p.Dest, p.Server, namespace)
	if err := world.Exchange(kept, "after", "after"); err != nil {
		t.Errorf("the pod beside it: %v", err)
	}
	p.Client.Exchange(beside.At(world.DoublePort), greeting, greeting+greeting)
	p.Dest.ExpectMetric(p.Ctx, "workload_manager_active_proxy_count", nil, 1)
	p.Dest.ExpectMetric(p.Ctx, "workload_manager_proxies_started_total", nil, 2)
	p.Dest.ExpectMetric(p.Ctx, "workload_manager_proxies_stopped_total", nil, 1)

	// Its namesake, with another namespace, is another pod.
	p.Server.Remove()
	again := p.AddPod("server", 2)
	again.StartApp()
	p.WriteConfig()
	again.Enroll(m.rules)
	world.Eventually(t, p.Ctx, 10*time.Second, func() error {
		return exchange(p.Client, again.At(world.DoublePort), greeting, greeting+greeting)
	})
}

// A pod leaves the mesh and lives on: what it has open ends, and from then on it
// speaks for itself.
func TestShared_PodLeaves(t *testing.T) { in(t, sharedModes, checkPodLeaves) }

func checkPodLeaves(t *testing.T, m mode) {
	p := newPair(t, m.pair(world.BothCaptured))
	tap := p.Server.Tap()
	p.Server.Leave()
	p.WriteConfig() // it takes no HBONE any more
	world.Eventually(t, p.Ctx, 10*time.Second, func() error {
		return exchange(p.Client, p.Server.At(world.DoublePort), greeting, greeting+greeting)
	})
	p.Source.Expect(p.Ctx, world.Fields{"message": "connection complete", "direction": "outbound", "dst.addr": p.Server.At(world.DoublePort).String(), "dst.hbone_addr": "", "error": ""})
	flows, err := tap.Report()
	if err != nil {
		t.Fatal(err)
	}
	if len(flows.TCP) == 0 {
		t.Error("nothing was seen on the link of the pod")
	}
}

// The agent restarts: it comes back with all pods, and their connections notice
// nothing.
func TestShared_AgentRestart(t *testing.T) { in(t, sharedModes, checkAgentRestart) }

func checkAgentRestart(t *testing.T, m mode) {
	p := newPair(t, m.pair(world.BothCaptured))
	c := p.Dial(world.ChatPort)
	if err := world.Exchange(c, "before", "before"); err != nil {
		t.Fatal(err)
	}
	nextSnapshot(t, p, p.Server.Node.Agent())
	if err := world.Exchange(c, "after", "after"); err != nil {
		t.Errorf("open connection: %v", err)
	}
	p.Client.Exchange(p.Server.At(world.DoublePort), greeting, greeting+greeting)
	p.Dest.ExpectMetric(p.Ctx, "workload_manager_proxies_started_total", nil, 1)
	p.Dest.AwaitReady(5 * time.Second)

	// Without an agent: not ready, and nothing else.
	ctx, cancel := context.WithTimeout(p.Ctx, 10*time.Second)
	defer cancel()
	p.Server.Node.StopAgent()
	world.Eventually(t, ctx, 5*time.Second, func() error {
		if err := p.Dest.Ready(); err == nil || !strings.Contains(err.Error(), "workload proxy manager") {
			return fmt.Errorf("readiness without an agent: %v", err)
		}
		return nil
	})
	if err := world.Exchange(c, "without", "without"); err != nil {
		t.Errorf("open connection without an agent: %v", err)
	}
	p.Client.Exchange(p.Server.At(world.DoublePort), greeting, greeting+greeting)
}

// Two proxies on one node: the old one ends, and nobody notices. The newer one
// gets the pods from the agent; on a network of their own it is ready before the
// old one is told to end.
func TestShared_Surge(t *testing.T) { in(t, sharedModes, checkSurge) }

func checkSurge(t *testing.T, m mode) {
	p := newPair(t, m.pair(world.BothCaptured))
	c := p.Dial(world.ChatPort)
	if err := world.Exchange(c, "before", "before"); err != nil {
		t.Fatal(err)
	}
	node := p.Server.Node
	next := node.LaunchProxy(m.pair(world.BothCaptured).Dest)
	if m.proxy.HostNetwork {
		// The two share the ports of readiness: its word may be the old one's.
		if _, err := next.Find(p.Ctx, 10*time.Second, func(line string) bool { return strings.Contains(line, "the proxy of a pod has started") }); err != nil {
			t.Fatal(err)
		}
	} else {
		next.AwaitReady(10 * time.Second)
	}
	p.Dest.Terminate()
	for start := time.Now(); time.Since(start) < 3*time.Second; {
		if err := exchange(p.Client, p.Server.At(world.DoublePort), greeting, greeting+greeting); err != nil {
			t.Errorf("%v after the old proxy was told to end: %v", time.Since(start), err)
		}
	}
	if err := world.Exchange(c, "after", "after"); err != nil {
		t.Errorf("established connection: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if code := p.Dest.Wait(15 * time.Second); code != 0 {
		t.Errorf("exit code %d of the old proxy, want 0", code)
	}
	p.Client.Exchange(p.Server.At(world.DoublePort), greeting, greeting+greeting)
	world.Eventually(t, p.Ctx, 5*time.Second, next.Ready)
}

// What dialled before it was captured is cut: the kernel sends its next packet to
// the proxy, which knows of no such connection. It is not left in the clear, and
// what dials from then on goes through the tunnel.
func TestShared_DialledBeforeCapture(t *testing.T) { in(t, sharedModes, checkDialledBefore) }

func checkDialledBefore(t *testing.T, m mode) {
	w := world.New(t)
	client, server := w.AddPod("client", 1), w.AddPod("server", 2)
	server.StartApp()
	const words = "in the clear"
	tap := server.Tap(words)
	early, err := client.Net.Dial(w.Ctx, netip.Addr{}, server.At(world.ChatPort))
	if err != nil {
		t.Fatal(err)
	}
	defer early.Close()
	if err := errors.Join(early.SetDeadline(time.Now().Add(20*time.Second)), world.Exchange(early, words, words)); err != nil {
		t.Fatal(err)
	}
	for _, p := range []*world.Pod{client, server} {
		p.Captured = true
	}
	for _, p := range []*world.Pod{client, server} {
		p.Node.StartProxy(m.proxy)
		p.Enroll(m.rules)
	}
	if err := world.Exchange(early, words, words); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the connection of before: got %v, want %v", err, syscall.ECONNRESET)
	}
	client.Exchange(server.At(world.ChatPort), words, words)
	server.Node.Proxy().Expect(w.Ctx, world.Fields{"message": "connection complete", "direction": "inbound", "src.identity": client.Identity(), "error": ""})
	r, err := tap.Report()
	if err != nil {
		t.Fatal(err)
	}
	if r.Seen[words] != 2 || r.Lost > 0 {
		t.Errorf("in the clear: %d packets, %d lost, want the two of before", r.Seen[words], r.Lost)
	}
}

// The kubelet's probes reach a pod although a policy lets nobody in, because the
// node's rules give them the source that the pod's rules let pass. Beside Cilium
// there is no such rule: they arrive in the clear, like those of anybody.
func TestShared_KubeletProbe(t *testing.T) {
	t.Parallel()
	o := shared.pair(world.PairOptions{CaptureServ: true, Policies: denyAll})
	p := newPair(t, o)
	host := p.Server.Node.Host()
	expectRefused(t, host, p.Server.At(world.ChatPort))
	p.Server.Node.AllowProbes(p.Server)
	host.ExpectHello(rules.ProbeAddr, p.Server.At(world.HTTPPort))
	host.ExpectHello(rules.ProbeAddr6, p.Server.At6(world.HTTPPort))
	expectRefused(t, p.Client, p.Server.At(world.ChatPort))

	q := newPair(t, cilium.pair(world.PairOptions{CaptureServ: true}))
	q.Server.Node.Host().ExpectHello(netip.MustParseAddr("10.0.2.1"), q.Server.At(world.HTTPPort))
	q.Dest.Expect(q.Ctx, world.Fields{"message": "connection complete", "direction": "inbound", "src.identity": "", "dst.workload": "server", "error": ""})
}

const denyAll = `- name: deny-all
  namespace: default
  scope: Namespace
  action: Allow
  dryRun: false
  rules: []
`
