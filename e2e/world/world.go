//go:build e2e

package world

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/xds/xdstest"
)

var worlds atomic.Int32

// World is two nodes on one bridge. Nodes have 172.172.0.<node> and fd17::<node>,
// pods 10.0.<node>.<pod> and fd10:<node>::<pod>. The bridge has a namespace of
// its own, so that nothing is added to the namespace of the machine.
type World struct {
	T   *testing.T
	Ctx context.Context // of the test
	Dir string          // shared by all: the CA's files, the configuration

	Nodes []*Node
	Pods  []*Pod

	Policies string // YAML list items of the local configuration, in block style
	Services string // the same in flow style

	// How the control plane behaves that serves proxies with ProxyOptions.XDS; it
	// must be set before the first use of Control.
	Personality xdstest.Personality
	XDSSocket   bool // on a unix socket, without TLS
	control     *ControlPlane

	id  string // first part of the name of every namespace
	lan string // namespace of the bridge
}

// Node is a namespace that forwards for its pods.
type Node struct {
	Name string
	NS   string
	Num  int
}

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
	attached    bool       // to the control plane
	Net         *netns.Pod // sockets of an application in the pod
}

// New makes the two nodes, which end with the test.
func New(t *testing.T) *World {
	t.Helper()
	RequireRoot(t)
	w := &World{T: t, Ctx: Context(t), Dir: t.TempDir()}
	w.id = fmt.Sprintf("%s%d-%d", prefix, os.Getpid(), worlds.Add(1))
	w.lan = w.Namespace("lan")
	w.IP("", "-n "+w.lan+" link add br0 type bridge", "-n "+w.lan+" addr add 172.172.0.254/16 dev br0", "-n "+w.lan+" link set br0 up")
	for num := 1; num <= 2; num++ {
		w.addNode(num)
	}
	for _, a := range w.Nodes {
		for _, b := range w.Nodes {
			if a != b {
				w.IP(a.NS, fmt.Sprintf("route add 10.0.%d.0/24 via 172.172.0.%d", b.Num, b.Num),
					fmt.Sprintf("-6 route add fd10:%d::/64 via fd17::%d", b.Num, b.Num))
			}
		}
	}
	if err := os.Mkdir(filepath.Join(w.Dir, "ca"), 0o700); err != nil {
		t.Fatal(err)
	}
	return w
}

// Namespace makes one that ends with the test.
func (w *World) Namespace(name string) string {
	w.T.Helper()
	ns := w.id + "-" + name
	if _, err := Command(w.Ctx, "", "ip", "netns", "add", ns); err != nil {
		w.T.Fatal(err)
	}
	w.T.Cleanup(func() { removeNamespace(ns) })
	// A router does not look for neighbours before its link-local address has
	// been checked for duplicates, which takes seconds.
	w.Sysctl(ns, map[string]string{"net/ipv6/conf/default/accept_dad": "0"})
	w.IP(ns, "link set lo up")
	return ns
}

// IP runs commands of iproute2, inside ns if it is not empty.
func (w *World) IP(ns string, lines ...string) {
	w.T.Helper()
	for _, line := range lines {
		args := []string{"ip"}
		if ns != "" {
			args = append(args, "-n", ns)
		}
		if _, err := Command(w.Ctx, "", append(args, strings.Fields(line)...)...); err != nil {
			w.T.Fatal(err)
		}
	}
}

func (w *World) addNode(num int) {
	n := &Node{Name: fmt.Sprintf("node%d", num), Num: num}
	n.NS = w.Namespace(n.Name)
	w.Sysctl(n.NS, map[string]string{"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1"})
	w.IP("", fmt.Sprintf("-n %s link add v%d type veth peer name eth0 netns %s", w.lan, num, n.NS),
		fmt.Sprintf("-n %s link set v%d master br0 up", w.lan, num))
	w.IP(n.NS, fmt.Sprintf("addr add 172.172.0.%d/16 dev eth0", num), fmt.Sprintf("addr add fd17::%d/64 dev eth0 nodad", num),
		"link set eth0 up", "link add pods type bridge", fmt.Sprintf("addr add 10.0.%d.1/24 dev pods", num),
		fmt.Sprintf("addr add fd10:%d::1/64 dev pods nodad", num), "link set pods up")
	w.Nodes = append(w.Nodes, n)
}

// AddPod makes a pod without a proxy. Node and pod numbers are those of its
// address.
func (w *World) AddPod(name string, nodeNum int) *Pod {
	w.T.Helper()
	n := w.Nodes[nodeNum-1]
	num := 2
	for _, p := range w.Pods {
		if p.Node == n {
			num++
		}
	}
	p := &Pod{
		W: w, Name: name, Namespace: "default", SA: name, TrustDomain: "cluster.local", Node: n,
		Addr:  netip.AddrFrom4([4]byte{10, 0, byte(nodeNum), byte(num)}),
		Addr6: netip.MustParseAddr(fmt.Sprintf("fd10:%d::%d", nodeNum, num)),
	}
	p.NS = w.Namespace(name)
	w.Sysctl(p.NS, map[string]string{"net/ipv4/conf/all/rp_filter": "0", "net/ipv4/conf/default/rp_filter": "0"})
	w.IP("", fmt.Sprintf("-n %s link add v%d type veth peer name eth0 netns %s", n.NS, num, p.NS),
		fmt.Sprintf("-n %s link set v%d master pods up", n.NS, num))
	w.IP(p.NS, fmt.Sprintf("addr add %v/24 dev eth0", p.Addr), fmt.Sprintf("addr add %v/64 dev eth0 nodad", p.Addr6), "link set eth0 up",
		fmt.Sprintf("route add default via 10.0.%d.1", nodeNum), fmt.Sprintf("-6 route add default via fd10:%d::1", nodeNum))
	f, err := os.Open("/run/netns/" + p.NS)
	if err != nil {
		w.T.Fatal(err)
	}
	w.T.Cleanup(func() { _ = f.Close() })
	if p.Net, err = netns.NewPod(f, netns.PodConfig{OriginalSource: netns.OriginalSourceOff}); err != nil {
		w.T.Fatal(err)
	}
	w.Pods = append(w.Pods, p)
	return p
}

// Sysctl sets what /proc/sys shows of a namespace to a thread that is there.
func (w *World) Sysctl(ns string, values map[string]string) {
	w.T.Helper()
	f, err := os.Open("/run/netns/" + ns)
	if err != nil {
		w.T.Fatal(err)
	}
	defer f.Close()
	p, err := netns.NewPod(f, netns.PodConfig{})
	if err != nil {
		w.T.Fatal(err)
	}
	for name, value := range values {
		if err := p.Do(func() error { return os.WriteFile("/proc/sys/"+name, []byte(value), 0o644) }); err != nil {
			w.T.Fatal(err)
		}
	}
}

// In is the command line that runs a program in the pod.
func (p *Pod) In(args ...string) []string {
	return append([]string{"ip", "netns", "exec", p.NS}, args...)
}

// At is an address of the pod.
func (p *Pod) At(port uint16) netip.AddrPort { return netip.AddrPortFrom(p.Addr, port) }

// Identity is that of the workload in the pod.
func (p *Pod) Identity() string {
	return fmt.Sprintf("spiffe://%s/ns/%s/sa/%s", p.TrustDomain, p.Namespace, p.SA)
}

// redirection are the rules of spec/datapath.md §3.6, without DNS.
const redirection = `*mangle
:ISTIO_PRERT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_OUTPUT -m connmark --mark 0x111/0xfff -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff
-A ISTIO_PRERT -m mark --mark 0x539/0xfff -j CONNMARK --set-xmark 0x111/0xfff
COMMIT
*nat
:ISTIO_PRERT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A PREROUTING -j ISTIO_PRERT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_OUTPUT -d 169.254.7.127/32 -p tcp -j ACCEPT
-A ISTIO_OUTPUT -p tcp -m mark --mark 0x111/0xfff -j ACCEPT
-A ISTIO_OUTPUT ! -d 127.0.0.1/32 -o lo -j ACCEPT
-A ISTIO_OUTPUT ! -d 127.0.0.1/32 -p tcp -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001
-A ISTIO_PRERT -s 169.254.7.127/32 -p tcp -j ACCEPT
-A ISTIO_PRERT ! -d 127.0.0.1/32 -p tcp ! --dport 15008 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15006
COMMIT
`

// Redirect sets the rules of both families, with whichever iptables works on
// this kernel.
func (p *Pod) Redirect() {
	p.W.T.Helper()
	rules6 := strings.NewReplacer("169.254.7.127/32", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff/128", "127.0.0.1/32", "::1/128").Replace(redirection)
	p.restore("iptables", redirection)
	p.restore("ip6tables", rules6)
	p.W.IP(p.NS, "route add local 0.0.0.0/0 dev lo table 100", "rule add fwmark 0x111/0xfff pref 32764 lookup 100",
		"-6 route add local ::/0 dev lo table 100", "-6 rule add fwmark 0x111/0xfff pref 32764 lookup 100")
	p.Captured = true
}

func (p *Pod) restore(program, rules string) {
	p.W.T.Helper()
	_, err := Command(p.W.Ctx, rules, p.In(program+"-restore", "-w", "10")...)
	if err == nil {
		return
	}
	p.W.T.Logf("%v; trying the legacy program", err)
	if _, err = Command(p.W.Ctx, rules, p.In(program+"-legacy-restore", "-w", "10")...); err != nil {
		p.W.T.Fatal(err)
	}
}
