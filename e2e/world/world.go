//go:build e2e

package world

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/ztunnel-go/ztunnel/e2e/cni/agent"
	"github.com/ztunnel-go/ztunnel/e2e/netlab"
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

	id  string            // first part of the name of every namespace
	lan *netlab.Namespace // of the bridge
}

// Node is a namespace that forwards for its pods.
type Node struct {
	W    *World
	Name string
	NS   string
	Num  int

	// Proxies are those in shared mode that were started here, the newest last.
	Proxies []*Proxy
	// StopAgent ends the CNI agent before the test does; nil without one.
	StopAgent func()

	made int // pods until now
	lab  *netlab.Namespace
	host *Pod // the node itself as a place for programs

	agent       *agent.Agent
	personality agent.Personality
	zds         string // path of the agent's socket
}

// New makes the two nodes, which end with the test.
func New(t *testing.T) *World {
	t.Helper()
	RequireRoot(t)
	w := &World{T: t, Ctx: Context(t), Dir: t.TempDir()}
	w.id = fmt.Sprint(worlds.Add(1))
	w.lan = w.namespace("lan")
	w.ip(w.lan, "link add br0 address 02:00:00:00:00:fe type bridge", "addr add 172.172.0.254/16 dev br0", "link set br0 up")
	for num := 1; num <= 2; num++ {
		w.addNode(num)
	}
	for _, a := range w.Nodes {
		for _, b := range w.Nodes {
			if a != b {
				w.ip(a.lab, fmt.Sprintf("route add 10.0.%d.0/24 via 172.172.0.%d", b.Num, b.Num),
					fmt.Sprintf("-6 route add fd10:%d::/64 via fd17::%d", b.Num, b.Num))
			}
		}
	}
	if err := os.Mkdir(filepath.Join(w.Dir, "ca"), 0o700); err != nil {
		t.Fatal(err)
	}
	return w
}

// namespace makes one that ends with the test.
func (w *World) namespace(name string) *netlab.Namespace {
	w.T.Helper()
	n, err := netlab.New(w.Ctx, w.id+"-"+name)
	if err != nil {
		w.T.Fatal(err)
	}
	w.T.Cleanup(func() { _ = n.Close() }) // a pod may have gone before
	return n
}

func (w *World) ip(n *netlab.Namespace, lines ...string) {
	w.T.Helper()
	if err := n.IP(w.Ctx, lines...); err != nil {
		w.T.Fatal(err)
	}
}

func (w *World) sysctl(n *netlab.Namespace, values map[string]string) {
	w.T.Helper()
	if err := n.Sysctl(values); err != nil {
		w.T.Fatal(err)
	}
}

func (w *World) link(a *netlab.Namespace, name string, b *netlab.Namespace) {
	w.T.Helper()
	if err := netlab.Link(w.Ctx, a, name, b); err != nil {
		w.T.Fatal(err)
	}
}

func (w *World) addNode(num int) {
	n := &Node{W: w, Name: fmt.Sprintf("node%d", num), Num: num}
	n.lab = w.namespace(n.Name)
	n.NS = n.lab.Name
	w.sysctl(n.lab, map[string]string{"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1"})
	veth := fmt.Sprintf("v%d", num)
	w.link(w.lan, veth, n.lab)
	w.ip(w.lan, "link set "+veth+" master br0")
	w.ip(n.lab, fmt.Sprintf("addr add 172.172.0.%d/16 dev eth0", num), fmt.Sprintf("addr add fd17::%d/64 dev eth0 nodad", num),
		// Of its own accord a bridge takes the lowest address of its ports: each new
		// pod could change it, and neighbours would miss it for seconds.
		fmt.Sprintf("link add pods address 02:00:00:00:00:%02x type bridge", num), fmt.Sprintf("addr add 10.0.%d.1/24 dev pods", num),
		fmt.Sprintf("addr add fd10:%d::1/64 dev pods nodad", num), "link set pods up")
	w.Nodes = append(w.Nodes, n)
}
