//go:build e2e

package netns

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/cni/agent"
	"github.com/ztunnel-go/ztunnel/e2e/netlab"
	"github.com/ztunnel-go/ztunnel/e2e/world"
)

// faults row 95 in shared mode: an application has taken a port of the proxy in
// its pod. The pod is shown with the owner and refused (not to Cilium's agent, to
// which that would be a black hole), its neighbour is served, and the pod is once
// the port is free.
func TestFault_95_PortTakenInPod(t *testing.T) { in(t, sharedModes, checkPortTaken) }

func checkPortTaken(t *testing.T, m mode) {
	p := newPair(t, m.pair(world.BothCaptured))
	bad := p.AddPod("bad", 2)
	bad.StartApp()
	squatter, err := bad.Net.Listen(p.Ctx, netip.MustParseAddrPort("[::]:15008"))
	if err != nil {
		t.Fatal(err)
	}
	defer squatter.Close()
	var accepting sync.WaitGroup
	accepting.Go(func() { // it has no use for tunnels
		for c, err := squatter.Accept(); err == nil; c, err = squatter.Accept() {
			_ = c.Close()
		}
	})
	bad.Captured = true
	p.WriteConfig()
	start := time.Now()
	err = bad.TryEnroll(m.rules)
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("the answer took %v", took)
	}
	owner := fmt.Sprintf("pid %d (", os.Getpid())
	var refused *agent.RefusedError
	switch {
	case m.proxy.HostNetwork && err != nil:
		t.Errorf("Cilium's agent got %v, want an ack", err)
	case !m.proxy.HostNetwork && (!errors.As(err, &refused) || !strings.Contains(refused.Text, owner) || !strings.Contains(refused.Text, ":15008")):
		t.Errorf("Istio's agent got %v, want a refusal that names port 15008 and %s", err, owner)
	}
	expectPod(t, p.Dest, bad, "failed", owner)
	p.Dest.ExpectMetric(p.Ctx, "workload_manager_pending_proxy_count", nil, 1)
	expectRefused(t, p.Client, bad.At(world.DoublePort))
	p.Client.Exchange(p.Server.At(world.DoublePort), greeting, greeting+greeting)

	if err := squatter.Close(); err != nil {
		t.Fatal(err)
	}
	accepting.Wait()
	expectPod(t, p.Dest, bad, "active", "")
	p.Client.Exchange(bad.At(world.DoublePort), greeting, greeting+greeting)
}

// reachable tells whether somebody in the pod listens on a port.
func reachable(p *world.Pod, port uint16) error {
	c, err := p.Net.Dial(p.W.Ctx, netip.Addr{}, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port))
	if err == nil {
		_ = c.Close()
	}
	return err
}

// faults row 121: the snapshot has a pod whose namespace is dead. It fails, the
// others are served, and the node is ready.
func TestFault_121_NamespaceGone(t *testing.T) { in(t, sharedModes, checkNamespaceGone) }

func checkNamespaceGone(t *testing.T, m mode) {
	w := world.New(t)
	client, server, gone := w.AddPod("client", 1), w.AddPod("server", 2), w.AddPod("gone", 2)
	server.StartApp()
	for _, p := range w.Pods {
		p.RedirectBy(m.rules)
	}
	w.WriteConfig()
	cni := server.Node.AgentOf(m.personality())
	gone.Vanish()
	for _, p := range []*world.Pod{gone, server} { // the bad one first
		cni.Put(p.ForAgent())
	}
	s := server.Node.LaunchProxy(m.proxy)
	s.AwaitReady(10 * time.Second)
	client.StartProxy(m.proxy)
	client.Exchange(server.At(world.DoublePort), greeting, greeting+greeting)
	expectPod(t, s, gone, "failed", "")
	expectPod(t, s, server, "active", "")
}

// faults row 122: the agent gives the namespace of another pod. Nobody gets the
// identity of the pod that was named.
func TestFault_122_NamespaceOfAnother(t *testing.T) { in(t, sharedModes, checkNamespaceOfAnother) }

func checkNamespaceOfAnother(t *testing.T, m mode) {
	p := newPair(t, m.pair(world.BothCaptured))
	victim, thief := p.AddPod("victim", 1), p.AddPod("thief", 1)
	for _, q := range []*world.Pod{victim, thief} {
		q.StartApp()
		q.RedirectBy(m.rules)
	}
	p.WriteConfig()
	wrong := victim.ForAgent()
	wrong.NetNS = thief.ForAgent().NetNS
	if err := victim.Node.Agent().Add(p.Ctx, wrong); err != nil {
		t.Fatalf("the check comes after the ack: %v", err)
	}
	expectPod(t, p.Source, victim, "failed", "it may be that of another pod")
	expectRefused(t, thief, p.Server.At(world.DoublePort)) // outbound, as the victim
	expectRefused(t, p.Client, thief.At(world.DoublePort)) // inbound
	for _, s := range []*world.Proxy{p.Source, p.Dest} {
		for _, line := range s.Lines() {
			if strings.Contains(line, `"error":""`) && strings.Contains(line, victim.Identity()) {
				t.Errorf("%s served somebody as the victim: %s", s.Name, line)
			}
		}
	}
	// The right namespace ends it.
	if err := victim.Node.Agent().Add(p.Ctx, victim.ForAgent()); err != nil {
		t.Fatal(err)
	}
	expectPod(t, p.Source, victim, "active", "")
	victim.Exchange(p.Server.At(world.DoublePort), greeting, greeting+greeting)
}

// D13: the agent comes before the control plane. Pods are acknowledged at once,
// their connections are refused and never leave in the clear, and all are served
// once the control plane has spoken.
func TestD13_BeforeControlPlane(t *testing.T) { in(t, sharedModes, checkBeforeControlPlane) }

func checkBeforeControlPlane(t *testing.T, m mode) {
	w := world.New(t)
	client, server := w.AddPod("client", 1), w.AddPod("server", 1)
	server.StartApp()
	for _, p := range w.Pods {
		p.Captured = true
	}
	w.PublishPods()
	w.Control().Stop()
	o := m.proxy
	o.XDS = true
	tap := client.Tap(greeting)
	s := client.Node.LaunchProxy(o)
	waitConnected(t, client)
	for _, p := range []*world.Pod{client, server} {
		start := time.Now()
		p.Enroll(m.rules)
		t.Logf("%s acknowledged after %v", p.Name, time.Since(start))
	}
	if err := s.Ready(); err == nil {
		t.Error("ready without a control plane")
	}
	for _, dst := range []netip.AddrPort{server.At(world.DoublePort), server.At6(world.DoublePort)} {
		expectRefused(t, client, dst)
	}
	expectNoPlaintext(t, tap, client)
	w.Control().Start()
	s.AwaitReady(20 * time.Second)
	client.Exchange(server.At(world.DoublePort), greeting, greeting+greeting)
	s.Expect(w.Ctx, world.Fields{"message": "connection complete", "direction": "inbound", "src.identity": client.Identity(), "error": ""})
	expectNoPlaintext(t, tap, client)
}

// waitConnected waits until a proxy has come to the agent of the pod's node.
func waitConnected(t *testing.T, p *world.Pod) {
	t.Helper()
	if err := p.Node.Agent().Wait(p.W.Ctx, func(s agent.Status) bool { return s.Connected > 0 }); err != nil {
		t.Fatal(err)
	}
}

// expectNoPlaintext fails if the tap of a pod saw payload to or from it at
// another port than that of HBONE, or what the tap looks for.
func expectNoPlaintext(t *testing.T, tap *netlab.Tap, p *world.Pod) {
	t.Helper()
	r, err := tap.Report()
	if err != nil {
		t.Fatal(err)
	}
	for flow, bytes := range r.TCP {
		if bytes > 0 && flow.Src.Port() != 15008 && flow.Dst.Port() != 15008 {
			t.Errorf("%d bytes %v -> %v on the link of %s", bytes, flow.Src, flow.Dst, p.Name)
		}
	}
	for secret, n := range r.Seen {
		if n > 0 {
			t.Errorf("%q in %d packets on the link of %s", secret, n, p.Name)
		}
	}
	if r.Lost > 0 {
		t.Errorf("the tap of %s lost %d packets", p.Name, r.Lost)
	}
}

// D22: the agent has named a pod of which the control plane says nothing. It gets
// out after a second, with what the agent knows of it; nobody gets in.
func TestD22_UnknownToControlPlane(t *testing.T) { in(t, sharedModes, checkUnknownPod) }

func checkUnknownPod(t *testing.T, m mode) {
	w := world.New(t)
	client, server := w.AddPod("client", 1), w.AddPod("server", 2)
	server.StartApp()
	client.StartApp()
	server.Captured = true
	w.Publish(server.Workload())
	o := m.proxy
	o.XDS = true
	for _, p := range []*world.Pod{client, server} {
		p.RedirectBy(m.rules)
		p.StartProxy(o)
	}
	start := time.Now()
	client.Exchange(server.At(world.DoublePort), greeting, greeting+greeting)
	if took := time.Since(start); took < 900*time.Millisecond || took > 5*time.Second {
		t.Errorf("the first connection took %v, want about a second", took)
	}
	server.Node.Proxy().Expect(w.Ctx, world.Fields{"message": "connection complete", "direction": "inbound", "src.identity": client.Identity(), "error": ""})
	start = time.Now()
	err := exchange(server, client.At(world.DoublePort), "unknown", "unknownunknown")
	if took := time.Since(start); err == nil || took < 4*time.Second {
		t.Errorf("a connection to the pod: got %v after %v, want a refusal after 5 s", err, took)
	}
	// Once it is known, both ways work.
	w.PublishPods()
	world.Eventually(t, w.Ctx, 10*time.Second, func() error {
		return exchange(server, client.At(world.DoublePort), greeting, greeting+greeting)
	})
}

// A pod whose namespace has no IPv6 is served over IPv4.
func TestShared_NoIPv6(t *testing.T) { in(t, sharedModes, checkNoIPv6) }

func checkNoIPv6(t *testing.T, m mode) {
	w := world.New(t)
	client, server := w.AddPod("client", 1), w.AddPod("server", 2)
	server.StartApp()
	for _, p := range []*world.Pod{client, server} {
		p.Sysctl(map[string]string{"net/ipv6/conf/all/disable_ipv6": "1", "net/ipv6/conf/lo/disable_ipv6": "1"})
		p.RedirectBy(m.rules)
	}
	w.WriteConfig()
	for _, p := range []*world.Pod{client, server} {
		p.StartProxy(m.proxy)
	}
	client.Exchange(server.At(world.DoublePort), greeting, greeting+greeting)
	server.Node.Proxy().Expect(w.Ctx, world.Fields{"message": "connection complete", "direction": "inbound", "src.identity": client.Identity(), "error": ""})
	for _, p := range []*world.Pod{client, server} {
		expectPod(t, p.Node.Proxy(), p, "active", "")
	}
}
