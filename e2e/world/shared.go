//go:build e2e

package world

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/cni/agent"
	"github.com/ztunnel-go/ztunnel/e2e/cni/rules"
	"github.com/ztunnel-go/ztunnel/e2e/netlab"
)

// Shared mode: one proxy for all pods of a node, in a pod of its own, which the
// node's CNI agent tells of the pods. For example
//
//	w := world.New(t)
//	client, server := w.AddPod("client", 1), w.AddPod("server", 2)
//	server.StartApp()
//	for _, n := range w.Nodes {
//		n.StartProxy(world.ProxyOptions{})
//	}
//	for _, p := range w.Pods[:2] {
//		p.Enroll(rules.Config{})
//	}
//	client.Exchange(server.At(world.DoublePort), "a", "aa")

// proxyTime is how long a proxy may take to start or to answer an agent.
const proxyTime = 20 * time.Second

// Agent is the CNI agent of the node: Istio's, unless AgentOf was called first.
func (n *Node) Agent() *agent.Agent { return n.AgentOf(agent.Istio) }

// AgentOf is the CNI agent of the node, with the personality of the first call.
// It lives until the test ends, which fails if a proxy breaks the protocol.
func (n *Node) AgentOf(personality agent.Personality) *agent.Agent {
	t := n.W.T
	t.Helper()
	if n.agent != nil {
		return n.agent
	}
	dir, err := agentDir(personality)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	n.zds = filepath.Join(dir, "zds.sock")
	if n.agent, err = agent.New(agent.Config{Path: n.zds, Personality: personality, Idle: time.Second}); err != nil {
		t.Fatal(err)
	}
	n.personality = personality
	ctx, cancel := context.WithCancel(n.W.Ctx)
	done := make(chan struct{})
	var runErr error
	go func() {
		defer close(done)
		runErr = n.agent.Run(ctx)
	}()
	n.StopAgent = func() { cancel(); <-done }
	t.Cleanup(func() {
		n.StopAgent()
		if runErr != nil {
			t.Errorf("CNI agent of %s: %v", n.Name, runErr)
		}
		for _, v := range n.agent.Status().Violations {
			t.Errorf("CNI agent of %s: %s", n.Name, v)
		}
	})
	return n.agent
}

// ciliumDir is where Cilium's agent has its sockets.
const ciliumDir = "/var/run/cilium"

// agentDir is a new directory for the socket of an agent. By that of Cilium a
// proxy knows whose agent it is.
func agentDir(personality agent.Personality) (string, error) {
	if personality != agent.Cilium {
		return Dir()
	}
	if err := os.MkdirAll(ciliumDir, 0o755); err != nil {
		return "", err
	}
	return os.MkdirTemp(ciliumDir, fmt.Sprintf("%s%d-run-", netlab.Prefix, os.Getpid()))
}

// Host is the node itself as a place for programs: what the kubelet does, and a
// proxy on the host network.
func (n *Node) Host() *Pod {
	if n.host == nil {
		n.host = &Pod{
			W: n.W, Name: n.Name, Namespace: "kube-system", SA: "ztunnel-cilium", TrustDomain: "cluster.local", Node: n,
			Addr: netip.AddrFrom4([4]byte{172, 172, 0, byte(n.Num)}), Addr6: netip.MustParseAddr(fmt.Sprintf("fd17::%d", n.Num)),
			NS: n.NS, Net: n.lab.Net, lab: n.lab,
		}
	}
	return n.host
}

// StartProxy starts a proxy in shared mode and waits until it is ready.
func (n *Node) StartProxy(o ProxyOptions) *Proxy {
	n.W.T.Helper()
	s := n.LaunchProxy(o)
	s.AwaitReady(proxyTime)
	return s
}

// LaunchProxy starts a proxy in shared mode and does not wait for it. Each has a
// pod of its own, unless it is on the host network. The configuration is written
// anew, or the pod published.
func (n *Node) LaunchProxy(o ProxyOptions) *Proxy {
	n.W.T.Helper()
	home := n.Host()
	if !o.HostNetwork {
		home = n.W.AddPod(fmt.Sprintf("ztunnel%d-%d", n.Num, len(n.Proxies)+1), n.Num)
		home.Namespace, home.SA = "istio-system", "ztunnel"
		if o.ResolvConf != "" {
			home.ResolvConf(o.ResolvConf)
		}
		home.Captured = true // it takes HBONE; no rules are set in it
		if o.XDS {
			n.W.Publish(home.Workload())
		}
	}
	if !o.XDS {
		n.W.WriteConfig()
	}
	s := home.launch(o, n.sharedEnv(home, o))
	n.Proxies = append(n.Proxies, s)
	return s
}

// AllowProbes gives what the node itself sends to a pod the source that Istio's
// rules let pass.
func (n *Node) AllowProbes(p *Pod) {
	n.W.T.Helper()
	if err := rules.ApplyHost(n.W.Ctx, n.lab.File, p.Addr, p.Addr6); err != nil {
		n.W.T.Fatal(err)
	}
}

// Proxy is the one that was started last.
func (n *Node) Proxy() *Proxy {
	n.W.T.Helper()
	if len(n.Proxies) == 0 {
		n.W.T.Fatalf("no proxy was started on %s", n.Name)
	}
	return n.Proxies[len(n.Proxies)-1]
}

func (n *Node) sharedEnv(home *Pod, o ProxyOptions) []string {
	personality := agent.Istio
	if o.HostNetwork {
		personality = agent.Cilium
	}
	n.AgentOf(personality)
	env := []string{"PROXY_MODE=shared", "INPOD_UDS=" + n.zds}
	if o.HostNetwork { // Cilium names no pod, and captures no DNS
		return append(env, "ISTIO_META_DNS_CAPTURE=false", "INSTANCE_IP="+home.Addr.String())
	}
	return append(env, "POD_NAME="+home.Name, "POD_NAMESPACE="+home.Namespace, "SERVICE_ACCOUNT="+home.SA, "INSTANCE_IP="+home.Addr.String())
}

// Enroll captures the pod by the node's agent, which sets the rules and tells the
// proxy, and waits for its ack.
func (p *Pod) Enroll(cfg rules.Config) {
	p.W.T.Helper()
	if err := p.TryEnroll(cfg); err != nil {
		p.W.T.Fatal(err)
	}
}

// TryEnroll returns what became of it: an *agent.RefusedError if the proxy said
// no.
func (p *Pod) TryEnroll(cfg rules.Config) error {
	ctx, cancel := context.WithTimeout(p.W.Ctx, proxyTime)
	defer cancel()
	p.rules, p.Captured = &cfg, true
	return p.Node.Agent().Add(ctx, p.ForAgent())
}

// tellProxy enrolls a pod whose rules are set already.
func (p *Pod) tellProxy() {
	p.W.T.Helper()
	if p.rules == nil {
		p.W.T.Fatalf("%s is not captured", p.Name)
	}
	p.Enroll(*p.rules)
}

// ForAgent is what the agent tells of the pod.
func (p *Pod) ForAgent() agent.Pod {
	return agent.Pod{
		UID: p.PodUID(), Name: p.Name, Namespace: p.Namespace, ServiceAccount: p.SA, NetNS: p.lab.File, Rules: p.rules,
	}
}

// PodUID is that of Kubernetes. Cilium's control plane calls the workload so;
// istiod does not.
func (p *Pod) PodUID() string {
	if p.Node.personality == agent.Cilium {
		return p.UID()
	}
	return fmt.Sprintf("%08x-0000-4000-8000-%s.%s", p.Addr.As4(), p.Namespace, p.Name)
}

// Leave takes the pod, which lives on, out of the mesh.
func (p *Pod) Leave() {
	p.W.T.Helper()
	ctx, cancel := context.WithTimeout(p.W.Ctx, proxyTime)
	defer cancel()
	if err := p.Node.Agent().Leave(ctx, p.PodUID()); err != nil {
		p.W.T.Fatal(err)
	}
	p.rules, p.Captured = nil, false
}

// DeleteAtAgent tells the proxies that the pod is gone, as it will be.
func (p *Pod) DeleteAtAgent() {
	p.W.T.Helper()
	ctx, cancel := context.WithTimeout(p.W.Ctx, proxyTime)
	defer cancel()
	if err := p.Node.Agent().Delete(ctx, p.PodUID()); err != nil {
		p.W.T.Fatal(err)
	}
}

// Vanish ends the pod's programs and its namespace's name and links, and tells
// nobody. Whoever still has a descriptor of the namespace holds a dead one.
func (p *Pod) Vanish() {
	p.W.T.Helper()
	p.W.ip(p.lab, "link del eth0")
	if err := netlab.Remove(p.NS); err != nil {
		p.W.T.Fatal(err)
	}
}

// Remove ends the pod, as a cluster does: the agent tells of it, it is gone, and
// the next configuration does not know it.
func (p *Pod) Remove() {
	p.W.T.Helper()
	p.DeleteAtAgent()
	p.Vanish()
	p.W.Pods = slices.DeleteFunc(p.W.Pods, func(o *Pod) bool { return o == p })
}

// Tap looks at the packets of the pod's link, until the test ends.
func (p *Pod) Tap(secrets ...string) *netlab.Tap {
	t := p.W.T
	t.Helper()
	tap, err := p.lab.NewTap("eth0", secrets...)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- tap.Run() }()
	t.Cleanup(func() {
		_ = tap.Close()
		if err := <-done; err != nil {
			t.Errorf("tap of %s: %v", p.Name, err)
		}
	})
	return tap
}
