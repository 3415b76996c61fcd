//go:build e2e

package world

import (
	"fmt"
	"net/netip"

	"github.com/ztunnel-go/ztunnel/e2e/cni/rules"
	"github.com/ztunnel-go/ztunnel/e2e/netlab"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// Pod is one network namespace with one workload.
type Pod struct {
	W           *World
	Name        string
	Namespace   string // of Kubernetes
	SA          string // service account
	TrustDomain string
	Node        *Node
	NS          string // of the network
	Addr        netip.Addr
	Addr6       netip.Addr
	Services    string // YAML flow mapping of the services that the pod serves
	Captured    bool
	Net         *netns.Pod // sockets of an application in the pod

	lab      *netlab.Namespace
	rules    *rules.Config // that are set; nil: none
	attached bool          // to the control plane
}

// AddPod makes a pod without a proxy. Node and pod numbers are those of its
// address.
func (w *World) AddPod(name string, nodeNum int) *Pod {
	w.T.Helper()
	n := w.Nodes[nodeNum-1]
	n.made++
	num := n.made + 1
	p := &Pod{
		W: w, Name: name, Namespace: "default", SA: name, TrustDomain: "cluster.local", Node: n,
		Addr:  netip.AddrFrom4([4]byte{10, 0, byte(nodeNum), byte(num)}),
		Addr6: netip.MustParseAddr(fmt.Sprintf("fd10:%d::%x", nodeNum, num)),
	}
	p.lab = w.namespace(name)
	p.NS, p.Net = p.lab.Name, p.lab.Net
	w.sysctl(p.lab, map[string]string{"net/ipv4/conf/all/rp_filter": "0", "net/ipv4/conf/default/rp_filter": "0"})
	veth := fmt.Sprintf("v%d", num)
	w.link(n.lab, veth, p.lab)
	w.ip(n.lab, "link set "+veth+" master pods")
	w.ip(p.lab, fmt.Sprintf("addr add %v/24 dev eth0", p.Addr), fmt.Sprintf("addr add %v/64 dev eth0 nodad", p.Addr6),
		fmt.Sprintf("route add default via 10.0.%d.1", nodeNum), fmt.Sprintf("-6 route add default via fd10:%d::1", nodeNum))
	w.Pods = append(w.Pods, p)
	return p
}

// Sysctl sets what /proc/sys shows in the pod.
func (p *Pod) Sysctl(values map[string]string) {
	p.W.T.Helper()
	p.W.sysctl(p.lab, values)
}

// In is the command line that runs a program in the pod.
func (p *Pod) In(args ...string) []string { return p.lab.In(args...) }

// At is an address of the pod.
func (p *Pod) At(port uint16) netip.AddrPort { return netip.AddrPortFrom(p.Addr, port) }

// At6 is the same in IPv6.
func (p *Pod) At6(port uint16) netip.AddrPort { return netip.AddrPortFrom(p.Addr6, port) }

// Identity is that of the workload in the pod.
func (p *Pod) Identity() string {
	return fmt.Sprintf("spiffe://%s/ns/%s/sa/%s", p.TrustDomain, p.Namespace, p.SA)
}

// Redirect captures the pod with Istio's rules, without DNS.
func (p *Pod) Redirect() {
	p.W.T.Helper()
	p.RedirectBy(rules.Config{})
}

// RedirectBy captures the pod with the given rules.
func (p *Pod) RedirectBy(cfg rules.Config) {
	p.W.T.Helper()
	if err := rules.Apply(p.W.Ctx, p.lab.File, cfg); err != nil {
		p.W.T.Fatal(err)
	}
	p.rules, p.Captured = &cfg, true
}
