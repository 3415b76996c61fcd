//go:build e2e

package netns

import (
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/cni/agent"
	"github.com/ztunnel-go/ztunnel/e2e/cni/rules"
	"github.com/ztunnel-go/ztunnel/e2e/world"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// nextSnapshot has a proxy lose its agent, and waits until it has heard of all
// pods again.
func nextSnapshot(t *testing.T, p *pair, a *agent.Agent) {
	t.Helper()
	before := a.Status().Snapshots
	a.Disconnect()
	if err := a.Wait(p.Ctx, func(s agent.Status) bool { return s.Snapshots > before }); err != nil {
		t.Fatal(err)
	}
}

// IP-10: the agent names a pod again that is served: nothing happens to it.
func TestID_IP10_NamedAgain(t *testing.T) { in(t, sharedModes, checkNamedAgain) }

func checkNamedAgain(t *testing.T, m mode) {
	p := newPair(t, m.pair(world.BothCaptured))
	c := p.Dial(world.ChatPort)
	if err := world.Exchange(c, "before", "before"); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		p.Server.Enroll(m.rules)
	}
	if err := world.Exchange(c, "after", "after"); err != nil {
		t.Errorf("open connection: %v", err)
	}
	p.Dest.ExpectMetric(p.Ctx, "workload_manager_proxies_started_total", nil, 1)
	p.Dest.ExpectMetric(p.Ctx, "workload_manager_proxies_stopped_total", nil, 0)
}

// IP-12, IP-13: a pod that cannot be served is named with another namespace, in
// which it can, or is deleted: nobody tries the old one any more.
func TestID_IP12_IP13_WhilePending(t *testing.T) { in(t, sharedModes, checkWhilePending) }

func checkWhilePending(t *testing.T, m mode) {
	w := world.New(t)
	moved, deleted, fresh := w.AddPod("moved", 1), w.AddPod("deleted", 1), w.AddPod("fresh", 1)
	for _, p := range []*world.Pod{moved, deleted} {
		p.Captured = true
		ln, err := p.Net.Listen(w.Ctx, netip.MustParseAddrPort("[::]:15001"))
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
	}
	fresh.StartApp()
	s := moved.Node.StartProxy(m.proxy)
	for _, p := range []*world.Pod{moved, deleted} {
		if err := p.TryEnroll(m.rules); err == nil && !m.proxy.HostNetwork {
			t.Errorf("%s: got an ack, want a refusal", p.Name)
		}
		expectPod(t, s, p, "failed", ":15001")
	}
	s.ExpectMetric(w.Ctx, "workload_manager_pending_proxy_count", nil, 2)
	deleted.Remove()
	s.ExpectMetric(w.Ctx, "workload_manager_pending_proxy_count", nil, 1)

	pod := moved.ForAgent()
	pod.NetNS = fresh.ForAgent().NetNS
	moved.Addr, moved.Addr6 = fresh.Addr, fresh.Addr6
	fresh.Addr = netip.MustParseAddr("10.0.1.250") // no longer its own
	fresh.Addr6 = netip.MustParseAddr("fd10:1::250")
	w.WriteConfig()
	if err := moved.Node.Agent().Add(w.Ctx, pod); err != nil {
		t.Fatal(err)
	}
	expectPod(t, s, moved, "active", "")
	s.ExpectMetric(w.Ctx, "workload_manager_pending_proxy_count", nil, 0)
	s.ExpectMetric(w.Ctx, "workload_manager_active_proxy_count", nil, 1)
	pods, err := podStates(s)
	if err != nil || len(pods) != 1 {
		t.Errorf("the proxy has %+v, %v, want one pod", pods, err)
	}
}

// IP-16: an agent that came back without the namespace of a pod has it kept.
func TestID_IP16_Kept(t *testing.T) {
	t.Parallel()
	p := newPair(t, shared.pair(world.BothCaptured))
	c := p.Dial(world.ChatPort)
	if err := world.Exchange(c, "before", "before"); err != nil {
		t.Fatal(err)
	}
	kept := p.Server.ForAgent()
	kept.NetNS, kept.Rules = nil, nil
	cni := p.Server.Node.Agent()
	cni.Put(kept)
	nextSnapshot(t, p, cni)
	if err := world.Exchange(c, "after", "after"); err != nil {
		t.Errorf("open connection: %v", err)
	}
	p.Client.Exchange(p.Server.At(world.DoublePort), greeting, greeting+greeting)
	p.Dest.ExpectMetric(p.Ctx, "workload_manager_proxies_started_total", nil, 1)
	p.Dest.ExpectMetric(p.Ctx, "workload_manager_proxies_stopped_total", nil, 0)
}

// IP-17: a pod is named with another namespace, as after its sandbox was made
// anew: what was open in the old one ends, the new one is served.
func TestID_IP17_NewNamespace(t *testing.T) { in(t, sharedModes, checkNewNamespace) }

func checkNewNamespace(t *testing.T, m mode) {
	p := newPair(t, m.pair(world.BothCaptured))
	c := p.Dial(world.ChatPort)
	if err := world.Exchange(c, "before", "before"); err != nil {
		t.Fatal(err)
	}
	uid := p.Server.PodUID()
	p.Server.Name = "old" // another name in the configuration, the same pod at the agent
	again := p.AddPod("again", 2)
	again.StartApp()
	again.Name, again.SA, again.Captured = "server", "server", true
	p.Server.Captured = false
	p.WriteConfig()
	pod := again.ForAgent()
	pod.UID, pod.Rules = uid, &m.rules
	if err := p.Server.Node.Agent().Add(p.Ctx, pod); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection to the old namespace: got %v, want its end", err)
	}
	world.Eventually(t, p.Ctx, 10*time.Second, func() error {
		return exchange(p.Client, again.At(world.DoublePort), greeting, greeting+greeting)
	})
	p.Dest.ExpectMetric(p.Ctx, "workload_manager_active_proxy_count", nil, 1)
	expectPod(t, p.Dest, again, "active", "")
}

// IP-23: a pod that is not in the next snapshot is let go of, the others are not.
func TestID_IP23_NotInSnapshot(t *testing.T) { in(t, sharedModes, checkNotInSnapshot) }

func checkNotInSnapshot(t *testing.T, m mode) {
	p := newPair(t, m.pair(world.BothCaptured))
	other := p.AddPod("other", 2)
	other.StartApp()
	p.WriteConfig()
	other.Enroll(m.rules)
	lost := p.Dial(world.ChatPort)
	kept, err := p.Client.Net.Dial(p.Ctx, netip.Addr{}, other.At(world.ChatPort))
	if err != nil {
		t.Fatal(err)
	}
	defer kept.Close()
	if err := kept.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	for _, c := range []netns.Conn{lost, kept} {
		if err := world.Exchange(c, "before", "before"); err != nil {
			t.Fatal(err)
		}
	}
	cni := p.Server.Node.Agent()
	cni.Drop(p.Server.PodUID())
	nextSnapshot(t, p, cni)
	if _, err := lost.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection of the pod that is missing: got %v, want its end", err)
	}
	if err := world.Exchange(kept, "after", "after"); err != nil {
		t.Errorf("the connection of the other: %v", err)
	}
	p.Dest.ExpectMetric(p.Ctx, "workload_manager_active_proxy_count", nil, 1)
	p.Dest.AwaitReady(10 * time.Second)
}

// Pods of ingress gateways are captured in one direction only: what comes from
// outside reaches them although a policy lets nobody in, what they send goes
// through the tunnel.
func TestShared_IngressRules(t *testing.T) {
	t.Parallel()
	w := world.New(t)
	gateway, server, plain := w.AddPod("gateway", 1), w.AddPod("server", 2), w.AddPod("plain", 2)
	for _, p := range []*world.Pod{gateway, server} {
		p.StartApp()
	}
	gateway.RedirectBy(rules.Config{Ingress: true})
	server.Redirect()
	gateway.Namespace, w.Policies = "ingress", strings.Replace(denyAll, "namespace: default", "namespace: ingress", 1)
	w.WriteConfig()
	for _, p := range []*world.Pod{gateway, server} {
		p.StartProxy(shared.proxy)
	}
	plain.ExpectHello(plain.Addr, gateway.At(world.HTTPPort))
	gateway.Exchange(server.At(world.DoublePort), greeting, greeting+greeting)
	server.Node.Proxy().Expect(w.Ctx, world.Fields{"message": "connection complete", "direction": "inbound", "src.identity": gateway.Identity(), "error": ""})
	if lines := strings.Join(gateway.Node.Proxy().Lines(), "\n"); strings.Contains(lines, `"direction":"inbound"`) {
		t.Error("what came from outside went through the proxy")
	}
	// Its own HBONE port is not open to everybody for that.
	if err := reachable(gateway, 15008); err != nil {
		t.Errorf("the gateway takes no HBONE: %v", err)
	}
	if got := probe(plain, netip.AddrPortFrom(gateway.Addr, 15008)); got != 'R' {
		t.Errorf("nonsense to the HBONE port: got %c, want R", got)
	}
}
