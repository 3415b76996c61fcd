//go:build e2e

package netns

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
)

var worlds atomic.Int32

// world is two nodes on one bridge. Nodes have 172.172.0.<node> and fd17::<node>,
// pods 10.0.<node>.<pod> and fd10:<node>::<pod>. The bridge has a namespace of its own, so that nothing is
// added to the namespace of the machine.
type world struct {
	t   *testing.T
	ctx context.Context
	id  string // first part of the name of every namespace
	dir string // shared by all: the CA's files, the configuration
	lan string // namespace of the bridge

	nodes []*node
	pods  []*pod

	policies string // YAML list items of the local configuration, in block style
	services string // the same in flow style
}

type node struct {
	name string
	ns   string
	num  int
}

// pod is one network namespace with one workload.
type pod struct {
	w        *world
	name     string
	sa       string // service account
	node     *node
	ns       string
	addr     netip.Addr
	addr6    netip.Addr
	services string // YAML flow mapping of the services that the pod serves
	captured bool
	net      *netns.Pod // sockets of an application in the pod
}

func newWorld(t *testing.T) *world {
	t.Helper()
	requireRoot(t)
	w := &world{t: t, ctx: testContext(t), dir: t.TempDir()}
	w.id = fmt.Sprintf("%s%d-%d", prefix, os.Getpid(), worlds.Add(1))
	w.lan = w.namespace("lan")
	w.ip("", "-n "+w.lan+" link add br0 type bridge", "-n "+w.lan+" addr add 172.172.0.254/16 dev br0", "-n "+w.lan+" link set br0 up")
	for num := 1; num <= 2; num++ {
		w.addNode(num)
	}
	for _, a := range w.nodes {
		for _, b := range w.nodes {
			if a != b {
				w.ip(a.ns, fmt.Sprintf("route add 10.0.%d.0/24 via 172.172.0.%d", b.num, b.num),
					fmt.Sprintf("-6 route add fd10:%d::/64 via fd17::%d", b.num, b.num))
			}
		}
	}
	if err := os.Mkdir(filepath.Join(w.dir, "ca"), 0o700); err != nil {
		t.Fatal(err)
	}
	return w
}

// namespace makes one that ends with the test.
func (w *world) namespace(name string) string {
	w.t.Helper()
	ns := w.id + "-" + name
	if _, err := command(w.ctx, "", "ip", "netns", "add", ns); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { removeNamespace(ns) })
	// A router does not look for neighbours before its link-local address has
	// been checked for duplicates, which takes seconds.
	w.sysctl(ns, map[string]string{"net/ipv6/conf/default/accept_dad": "0"})
	w.ip(ns, "link set lo up")
	return ns
}

// ip runs commands of iproute2, inside ns if it is not empty.
func (w *world) ip(ns string, lines ...string) {
	w.t.Helper()
	for _, line := range lines {
		args := []string{"ip"}
		if ns != "" {
			args = append(args, "-n", ns)
		}
		if _, err := command(w.ctx, "", append(args, strings.Fields(line)...)...); err != nil {
			w.t.Fatal(err)
		}
	}
}

func (w *world) addNode(num int) {
	n := &node{name: fmt.Sprintf("node%d", num), num: num}
	n.ns = w.namespace(n.name)
	w.sysctl(n.ns, map[string]string{"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1"})
	w.ip("", fmt.Sprintf("-n %s link add v%d type veth peer name eth0 netns %s", w.lan, num, n.ns),
		fmt.Sprintf("-n %s link set v%d master br0 up", w.lan, num))
	w.ip(n.ns, fmt.Sprintf("addr add 172.172.0.%d/16 dev eth0", num), fmt.Sprintf("addr add fd17::%d/64 dev eth0 nodad", num),
		"link set eth0 up", "link add pods type bridge", fmt.Sprintf("addr add 10.0.%d.1/24 dev pods", num),
		fmt.Sprintf("addr add fd10:%d::1/64 dev pods nodad", num), "link set pods up")
	w.nodes = append(w.nodes, n)
}

// addPod makes a pod without a proxy. Node and pod numbers are those of its
// address.
func (w *world) addPod(name string, nodeNum int) *pod {
	w.t.Helper()
	n := w.nodes[nodeNum-1]
	num := 2
	for _, p := range w.pods {
		if p.node == n {
			num++
		}
	}
	p := &pod{
		w: w, name: name, sa: name, node: n,
		addr:  netip.AddrFrom4([4]byte{10, 0, byte(nodeNum), byte(num)}),
		addr6: netip.MustParseAddr(fmt.Sprintf("fd10:%d::%d", nodeNum, num)),
	}
	p.ns = w.namespace(name)
	w.sysctl(p.ns, map[string]string{"net/ipv4/conf/all/rp_filter": "0", "net/ipv4/conf/default/rp_filter": "0"})
	w.ip("", fmt.Sprintf("-n %s link add v%d type veth peer name eth0 netns %s", n.ns, num, p.ns),
		fmt.Sprintf("-n %s link set v%d master pods up", n.ns, num))
	w.ip(p.ns, fmt.Sprintf("addr add %v/24 dev eth0", p.addr), fmt.Sprintf("addr add %v/64 dev eth0 nodad", p.addr6), "link set eth0 up",
		fmt.Sprintf("route add default via 10.0.%d.1", nodeNum), fmt.Sprintf("-6 route add default via fd10:%d::1", nodeNum))
	f, err := os.Open("/run/netns/" + p.ns)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = f.Close() })
	if p.net, err = netns.NewPod(f, netns.PodConfig{OriginalSource: netns.OriginalSourceOff}); err != nil {
		w.t.Fatal(err)
	}
	w.pods = append(w.pods, p)
	return p
}

// sysctl sets what /proc/sys shows of a namespace to a thread that is there.
func (w *world) sysctl(ns string, values map[string]string) {
	w.t.Helper()
	f, err := os.Open("/run/netns/" + ns)
	if err != nil {
		w.t.Fatal(err)
	}
	defer f.Close()
	p, err := netns.NewPod(f, netns.PodConfig{})
	if err != nil {
		w.t.Fatal(err)
	}
	for name, value := range values {
		if err := p.Do(func() error { return os.WriteFile("/proc/sys/"+name, []byte(value), 0o644) }); err != nil {
			w.t.Fatal(err)
		}
	}
}

// in is the command line that runs a program in the pod.
func (p *pod) in(args ...string) []string {
	return append([]string{"ip", "netns", "exec", p.ns}, args...)
}

// at is an address of the pod.
func (p *pod) at(port uint16) netip.AddrPort { return netip.AddrPortFrom(p.addr, port) }

func (p *pod) identity() string { return "spiffe://cluster.local/ns/default/sa/" + p.sa }

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

// redirect sets the rules of both families, with whichever iptables works on
// this kernel.
func (p *pod) redirect() {
	p.w.t.Helper()
	rules6 := strings.NewReplacer("169.254.7.127/32", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff/128", "127.0.0.1/32", "::1/128").Replace(redirection)
	p.restore("iptables", redirection)
	p.restore("ip6tables", rules6)
	p.w.ip(p.ns, "route add local 0.0.0.0/0 dev lo table 100", "rule add fwmark 0x111/0xfff pref 32764 lookup 100",
		"-6 route add local ::/0 dev lo table 100", "-6 rule add fwmark 0x111/0xfff pref 32764 lookup 100")
	p.captured = true
}

func (p *pod) restore(program, rules string) {
	p.w.t.Helper()
	_, err := command(p.w.ctx, rules, p.in(program+"-restore", "-w", "10")...)
	if err == nil {
		return
	}
	p.w.t.Logf("%v; trying the legacy program", err)
	if _, err = command(p.w.ctx, rules, p.in(program+"-legacy-restore", "-w", "10")...); err != nil {
		p.w.t.Fatal(err)
	}
}
