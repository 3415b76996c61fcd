//go:build e2e

package netns

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/cni/agent"
	"github.com/ztunnel-go/ztunnel/e2e/netlab"
	"github.com/ztunnel-go/ztunnel/e2e/world"
)

// fleetTime bounds all that a test does with a fleet.
const fleetTime = 10 * time.Minute

// fleet is one node full of pods, with its CNI agent and, from start on, its
// proxy. It is less than a [world.World], and has more pods.
type fleet struct {
	tb    testing.TB
	ctx   context.Context
	dir   string
	lan   *netlab.Namespace // bridges the pods
	home  *netlab.Namespace // of the proxy
	pods  []*fleetPod
	path  string // of the agent's socket
	agent *agent.Agent
	proxy *netlab.Process // nil before start
}

// fleetPod is a pod with a service account of its own.
type fleetPod struct {
	name string
	addr netip.Addr
	lab  *netlab.Namespace
}

// newFleet makes n pods, and an agent that knows of none of them.
func newFleet(tb testing.TB, n int) *fleet {
	tb.Helper()
	world.RequireRoot(tb)
	ctx, cancel := context.WithTimeout(context.Background(), fleetTime)
	tb.Cleanup(cancel)
	dir, err := world.Dir()
	if err != nil {
		tb.Fatal(err)
	}
	f := &fleet{tb: tb, ctx: ctx, dir: dir, path: filepath.Join(dir, "zds.sock")}
	f.lan = f.namespace("lan")
	f.ip(f.lan, "link add pods address 02:00:00:00:00:01 type bridge", "addr add 10.9.0.1/16 dev pods", "link set pods up")
	f.home = f.join("ztunnel", netip.MustParseAddr("10.9.255.2"))
	for i := range n {
		p := &fleetPod{name: fmt.Sprintf("p%d", i), addr: netip.AddrFrom4([4]byte{10, 9, byte((i + 2) >> 8), byte(i + 2)})}
		p.lab = f.join(p.name, p.addr)
		f.pods = append(f.pods, p)
	}
	f.writeConfig()
	f.serveAgent()
	return f
}

func (f *fleet) namespace(name string) *netlab.Namespace {
	f.tb.Helper()
	n, err := netlab.New(f.ctx, "fleet-"+name)
	if err != nil {
		f.tb.Fatal(err)
	}
	f.tb.Cleanup(func() { _ = n.Close() })
	return n
}

// join makes a namespace with an address on the bridge.
func (f *fleet) join(name string, addr netip.Addr) *netlab.Namespace {
	f.tb.Helper()
	n := f.namespace(name)
	f.ip(f.lan, "link add v-"+name+" type veth peer name eth0 netns "+n.Name, "link set v-"+name+" master pods up")
	f.ip(n, fmt.Sprintf("addr add %v/16 dev eth0", addr), "link set eth0 up", "route add default via 10.9.0.1")
	return n
}

// ip is that of the namespace, in one go.
func (f *fleet) ip(n *netlab.Namespace, lines ...string) {
	f.tb.Helper()
	if _, err := netlab.Command(f.ctx, strings.Join(lines, "\n")+"\n", "ip", "-n", n.Name, "-batch", "-"); err != nil {
		f.tb.Fatal(err)
	}
}

func (f *fleet) writeConfig() {
	f.tb.Helper()
	var b strings.Builder
	b.WriteString("services: []\npolicies: []\nworkloads:\n")
	for _, p := range f.pods {
		fmt.Fprintf(&b, "- {uid: u/%[1]s, name: %[1]s, namespace: default, serviceAccount: %[1]s, workloadIps: [%[2]v], protocol: HBONE, node: node1, services: {}}\n", p.name, p.addr)
	}
	if err := os.WriteFile(filepath.Join(f.dir, "config.yaml"), []byte(b.String()), 0o600); err != nil {
		f.tb.Fatal(err)
	}
}

// serveAgent runs Istio's agent until the test ends.
func (f *fleet) serveAgent() {
	f.tb.Helper()
	var err error
	if f.agent, err = agent.New(agent.Config{Path: f.path}); err != nil {
		f.tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(f.ctx)
	done := make(chan error, 1)
	go func() { done <- f.agent.Run(ctx) }()
	f.tb.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			f.tb.Errorf("CNI agent: %v", err)
		}
		for _, v := range f.agent.Status().Violations {
			f.tb.Errorf("CNI agent: %s", v)
		}
	})
}

// put lets the next snapshot have the pods.
func (f *fleet) put(pods ...*fleetPod) {
	for _, p := range pods {
		f.agent.Put(p.forAgent(p.name))
	}
}

// forAgent is what the agent tells of the pod, under a UID.
func (p *fleetPod) forAgent(uid string) agent.Pod {
	return agent.Pod{UID: uid, Name: p.name, Namespace: "default", ServiceAccount: p.name, NetNS: p.lab.File}
}

// start starts the proxy, which ends with the test, and does not wait for it.
func (f *fleet) start(env ...string) {
	f.tb.Helper()
	var err error
	f.proxy, err = netlab.Start("ztunnel", f.dir, append([]string{
		"PROXY_MODE=shared", "INPOD_UDS=" + f.path, "NODE_NAME=node1", "CLUSTER_ID=Kubernetes", "INSTANCE_IP=10.9.255.2",
		"PACKET_MARK=1337", "ENABLE_ORIG_SRC=true", "IPV6_ENABLED=true", "LOG_FORMAT=json", "RUST_LOG=info",
		"XDS_ADDRESS=", "LOCAL_XDS_PATH=" + filepath.Join(f.dir, "config.yaml"),
		"CA_PROVIDER=local", "CA_LOCAL_DIR=" + f.caDir(), "CONNECTION_TERMINATION_DEADLINE=1s",
	}, env...), f.home.In(world.Binary(f.tb, "ZTUNNEL_BIN"), "proxy")...)
	if err != nil {
		f.tb.Fatal(err)
	}
	f.tb.Cleanup(f.end)
}

func (f *fleet) caDir() string {
	dir := filepath.Join(f.dir, "ca")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		f.tb.Fatal(err)
	}
	return dir
}

// end kills the proxy.
func (f *fleet) end() {
	if f.proxy == nil {
		return
	}
	f.proxy.Kill()
	if f.tb.Failed() {
		f.tb.Logf("--- last output of the proxy:\n%s", f.proxy.Tail(30))
	}
	f.proxy = nil
}

// awaitReady waits for the proxy's own word.
func (f *fleet) awaitReady() {
	f.tb.Helper()
	if _, err := f.proxy.Find(f.ctx, 30*time.Second, func(line string) bool { return strings.Contains(line, "marking server ready") }); err != nil {
		f.tb.Fatalf("the proxy does not become ready: %v", err)
	}
}

// add tells the proxy of a pod, and returns how long its answer took.
func (f *fleet) add(p *fleetPod, uid string) time.Duration {
	f.tb.Helper()
	begin := time.Now()
	if err := f.agent.Add(f.ctx, p.forAgent(uid)); err != nil {
		f.tb.Fatalf("add %s: %v after %v", uid, err, time.Since(begin))
	}
	return time.Since(begin)
}

// del tells it that the pod is gone.
func (f *fleet) del(uid string) {
	f.tb.Helper()
	if err := f.agent.Delete(f.ctx, uid); err != nil {
		f.tb.Fatalf("delete %s: %v", uid, err)
	}
}

// get asks the proxy's admin server.
func (f *fleet) get(path string) string {
	f.tb.Helper()
	body, err := f.home.Get("http://127.0.0.1:15000" + path)
	if err != nil {
		f.tb.Fatal(err)
	}
	return body
}

// states are the pods of the proxy, by name.
func (f *fleet) states() map[string]podState {
	f.tb.Helper()
	var dump struct {
		Ours struct {
			Pods []podState `json:"pods"`
		} `json:"ztunnelGo"`
	}
	if err := json.Unmarshal([]byte(f.get("/config_dump")), &dump); err != nil {
		f.tb.Fatal(err)
	}
	out := map[string]podState{}
	for _, p := range dump.Ours.Pods {
		out[p.Name] = p
	}
	return out
}

// held is what the proxy has of the system.
type held struct{ FDs, Goroutines, Threads int }

// held counts it now.
func (f *fleet) held() held {
	f.tb.Helper()
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", f.proxy.PID()))
	if err != nil {
		f.tb.Fatal(err)
	}
	// The first line ends with the total.
	first, _, _ := strings.Cut(f.get("/debug/pprof/goroutine?debug=1"), "\n")
	goroutines, err := strconv.Atoi(first[strings.LastIndexByte(first, ' ')+1:])
	if err != nil {
		f.tb.Fatalf("goroutine profile begins with %q", first)
	}
	return held{len(fds), goroutines, f.status("Threads")}
}

// status is a number of /proc/PID/status.
func (f *fleet) status(key string) int {
	f.tb.Helper()
	file, err := os.Open(fmt.Sprintf("/proc/%d/status", f.proxy.PID()))
	if err != nil {
		f.tb.Fatal(err)
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		if name, value, _ := strings.Cut(lines.Text(), ":"); name == key {
			n, err := strconv.Atoi(strings.Fields(value)[0])
			if err != nil {
				f.tb.Fatal(err)
			}
			return n
		}
	}
	f.tb.Fatalf("/proc/PID/status has no %s", key)
	return 0
}

// eventually repeats check until it is content.
func (f *fleet) eventually(limit time.Duration, check func() error) {
	f.tb.Helper()
	world.Eventually(f.tb, f.ctx, limit, check)
}

// each does something with every pod, a few at a time.
func (f *fleet) each(do func(*fleetPod) error) error {
	var parts sync.WaitGroup
	errs := make([]error, len(f.pods))
	turns := make(chan struct{}, 4)
	for i, p := range f.pods {
		turns <- struct{}{}
		parts.Go(func() {
			defer func() { <-turns }()
			if err := do(p); err != nil {
				errs[i] = fmt.Errorf("%s: %w", p.name, err)
			}
		})
	}
	parts.Wait()
	return errors.Join(errs...)
}
