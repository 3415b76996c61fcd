package proxy

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/local"
	"github.com/ztunnel-go/ztunnel/internal/zlog"
	"github.com/ztunnel-go/ztunnel/proxy/hbone"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/proxy/netns/memnet"
	"github.com/ztunnel-go/ztunnel/state"
)

// mesh is a few nodes in memory, each with one pod and one proxy, the embedded
// CA, and applications. It lives in a synctest bubble: its end is the proof that
// nothing was leaked.
type mesh struct {
	t        testing.TB
	net      *memnet.Internet
	root     *local.CA
	ca       ca.Provider
	ctx      context.Context
	parts    sync.WaitGroup
	policies []*state.Policy
	services []*state.Service // beside those that the nodes' endpoints imply
	nodes    []*node
}

// node is one pod and its proxy.
type node struct {
	m        *mesh
	w        *state.Workload
	services map[state.NamespacedHostname][]state.Port
	host     *memnet.Host
	addr     netip.Addr
	onDemand bool
	store    *state.Store
	proxy    *Proxy
	registry *prometheus.Registry
	logs     logBook
	cut      context.CancelCauseFunc
	done     chan struct{} // closed when the proxy has ended
}

const echoPort = 8080

// inMesh runs test with a mesh in a bubble.
func inMesh(t *testing.T, test func(t *testing.T, m *mesh)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		m, end := newMesh(t)
		defer end()
		test(t, m)
	})
}

// newMesh is for those who need no bubble. end stops everything and waits for it.
func newMesh(t testing.TB) (m *mesh, end func()) {
	t.Helper()
	root, err := local.Open(local.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("cluster.local")})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	m = &mesh{t: t, net: memnet.New(memnet.Config{Transparent: true}), root: root, ca: root.Provider(), ctx: ctx}
	return m, func() {
		for _, n := range m.nodes {
			n.stop(nil)
		}
		stop()
		m.parts.Wait()
	}
}

// one is a Router to a single provider.
type one struct{ ca.Provider }

func (r one) For(ca.WorkloadRef) ca.Provider { return r.Provider }
func (r one) All() []ca.Provider             { return []ca.Provider{r.Provider} }

// nodeOption changes what a node is made of.
type nodeOption func(*nodeParts)

type nodeParts struct {
	cfg      Config
	provider ca.Provider
	workload state.Workload
	captured bool
	world    state.Config // with OnDemand the node is told of itself alone, until it asks
}

func withWorkload(change func(*state.Workload)) nodeOption {
	return func(p *nodeParts) { change(&p.workload) }
}

func withConfig(change func(*Config)) nodeOption { return func(p *nodeParts) { change(&p.cfg) } }

// inNetwork puts a node into a network.
func inNetwork(id string) nodeOption {
	return func(p *nodeParts) { p.workload.Network, p.cfg.NetworkID, p.world.Network = id, id, id }
}

// uncaptured makes a pod without a proxy.
func uncaptured(p *nodeParts) {
	p.captured = false
	p.workload.Protocol = state.TCP
}

// add makes a node with the pod name at addr, and tells every proxy of it.
func (m *mesh) add(name, addr string, options ...nodeOption) *node {
	m.t.Helper()
	n := &node{m: m, addr: netip.MustParseAddr(addr), registry: prometheus.NewRegistry(), done: make(chan struct{})}
	n.host = m.net.Host(n.addr)
	parts := nodeParts{
		world:    state.Config{NodeName: "node-" + name},
		provider: m.ca,
		captured: true,
		workload: state.Workload{
			UID: "cluster//Pod/default/" + name, Name: name, Namespace: "default", ServiceAccount: name,
			TrustDomain: "cluster.local", Node: "node-" + name, IPs: []netip.Addr{n.addr}, Protocol: state.HBONE, Capacity: 1,
			WorkloadName: name, WorkloadType: "deployment", CanonicalName: name, CanonicalRevision: "v1", ClusterID: "Kubernetes",
		},
		cfg: Config{
			Network:      n.host,
			Local:        state.Ref{Namespace: "default", Name: name, ServiceAccount: name},
			OutboundAddr: netip.MustParseAddrPort("[::]:15001"), InboundAddr: netip.MustParseAddrPort("[::]:15008"),
			PassthroughAddr: netip.MustParseAddrPort("[::]:15006"), IllegalPorts: []uint16{15001, 15006, 15008},
			ResponseBaggage: true, Metrics: NewMetrics(n.registry, MetricsConfig{}),
			HBONE: hbone.Config{PingInterval: -1}, MaxHandshakes: 4,
		},
	}
	for _, o := range options {
		o(&parts)
	}
	n.w, n.store, n.onDemand = &parts.workload, state.New(parts.world), parts.world.OnDemand
	parts.cfg.Store = n.store
	m.nodes = append(m.nodes, n)
	m.push()
	m.echo(n.host, netip.AddrPortFrom(n.addr, echoPort))
	if !parts.captured {
		close(n.done)
		return n
	}
	log, err := zlog.New(zlog.Config{Out: &n.logs, JSON: true, Filter: "debug", Sync: true})
	if err != nil {
		m.t.Fatal(err)
	}
	parts.cfg.Log = log.Logger()
	certs := ca.NewManager(one{parts.provider}, ca.ManagerConfig{Logger: parts.cfg.Log})
	parts.cfg.Certs = certs
	if n.proxy, err = New(parts.cfg); err != nil {
		m.t.Fatal(err)
	}
	if err := n.proxy.Listen(m.ctx); err != nil {
		m.t.Fatal(err)
	}
	ctx, cut := context.WithCancelCause(m.ctx)
	n.cut = cut
	m.parts.Go(func() {
		certsCtx, stopCerts := context.WithCancel(context.WithoutCancel(ctx))
		var certsDone sync.WaitGroup
		certsDone.Go(func() {
			if err := certs.Run(certsCtx); err != nil {
				m.t.Errorf("certificates: %v", err)
			}
		})
		if err := n.proxy.Run(ctx); err != nil {
			m.t.Errorf("proxy: %v", err)
		}
		stopCerts()
		certsDone.Wait()
		close(n.done)
	})
	return n
}

// stop cuts the proxy and waits for its end.
func (n *node) stop(cause error) {
	if n.cut != nil {
		n.cut(cause)
	}
	<-n.done
}

// push gives every store the whole world.
func (m *mesh) push() {
	m.t.Helper()
	u := state.Update{Policies: m.policies, Services: slices.Clone(m.services)}
	seen := map[state.NamespacedHostname]bool{}
	for _, svc := range m.services {
		seen[svc.Key()] = true
	}
	for i, n := range m.nodes {
		u.Workloads = append(u.Workloads, state.WorkloadUpdate{Workload: n.w, Endpoints: n.services})
		for key, ports := range n.services {
			if !seen[key] {
				seen[key] = true
				u.Services = append(u.Services, &state.Service{
					Name: strings.Split(key.Hostname, ".")[0], Namespace: key.Namespace, Hostname: key.Hostname, Ports: ports,
					VIPs: []state.NetworkAddress{{Addr: netip.AddrFrom4([4]byte{10, 96, 0, byte(i)})}},
				})
			}
		}
	}
	for _, n := range m.nodes {
		told := u
		if n.onDemand {
			told.Services, told.Workloads = nil, []state.WorkloadUpdate{{Workload: n.w}}
		}
		if err := n.store.Replace(told); err != nil {
			m.t.Fatal(err)
		}
	}
}

// echo is an application: it sends back what it gets, and ends when its peer does.
func (m *mesh) echo(host *memnet.Host, addr netip.AddrPort) {
	m.t.Helper()
	m.serve(host, addr, func(c netns.Conn) {
		_, _ = io.Copy(c, c)
		c.Close()
	})
}

// serve runs an application that handles one connection after another in
// goroutines of their own.
func (m *mesh) serve(host *memnet.Host, addr netip.AddrPort, handle func(netns.Conn)) {
	m.t.Helper()
	ln, err := host.Listen(m.ctx, addr)
	if err != nil {
		m.t.Fatal(err)
	}
	context.AfterFunc(m.ctx, func() { ln.Close() })
	m.parts.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			stop := context.AfterFunc(m.ctx, func() { _ = c.Abort() })
			m.parts.Go(func() { defer stop(); handle(c) })
		}
	})
}

// dial is the application of n connecting to dst: through the proxy's outbound
// listener if n is captured, as the redirection rules would have it. A
// destination without HBONE that is captured gets it on 15006.
func (n *node) dial(dst netip.AddrPort) (netns.Conn, error) {
	if n.proxy != nil {
		return n.host.DialVia(n.m.ctx, netip.AddrPortFrom(n.addr, 15001), n.addr, dst)
	}
	for _, other := range n.m.nodes {
		if other.addr == dst.Addr() && other.proxy != nil && dst.Port() != 15008 {
			return n.host.DialVia(n.m.ctx, netip.AddrPortFrom(other.addr, 15006), n.addr, dst)
		}
	}
	return n.host.Dial(n.m.ctx, netip.Addr{}, dst)
}

// mustDial is dial for connections that must come about.
func (n *node) mustDial(dst netip.AddrPort) netns.Conn {
	n.m.t.Helper()
	c, err := n.dial(dst)
	if err != nil {
		n.m.t.Fatalf("dial %v: %v", dst, err)
	}
	return c
}

// roundTrip sends text and wants it back.
func roundTrip(c io.ReadWriter, text string) error {
	if _, err := c.Write([]byte(text)); err != nil {
		return err
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(c, got); err != nil {
		return fmt.Errorf("read: %w", err)
	}
	if string(got) != text {
		return fmt.Errorf("got %q, want %q", got, text)
	}
	return nil
}

// request is one connection from n to dst with one round trip.
func (n *node) request(dst netip.AddrPort, text string) error {
	n.m.t.Helper()
	c, err := n.dial(dst)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := roundTrip(c, text); err != nil {
		return err
	}
	if err := c.CloseWrite(); err != nil {
		return err
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		return fmt.Errorf("after the request: %v, want EOF", err)
	}
	return nil
}

// echoAddr is where n's application listens.
func (n *node) echoAddr() netip.AddrPort { return n.at(echoPort) }

// at is an address of n's pod.
func (n *node) at(port uint16) netip.AddrPort { return netip.AddrPortFrom(n.addr, port) }

// logBook keeps JSON log lines.
type logBook struct {
	mu    sync.Mutex // guards lines
	lines []map[string]any
}

func (b *logBook) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for line := range bytes.Lines(p) {
		var fields map[string]any
		if err := json.Unmarshal(line, &fields); err != nil {
			return 0, fmt.Errorf("log line %q: %w", line, err)
		}
		b.lines = append(b.lines, fields)
	}
	return len(p), nil
}

// find returns the lines in which every wanted field has its value; "" wants
// the field absent.
func (b *logBook) find(want map[string]string) (found []map[string]any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, line := range b.lines {
		match := true
		for k, v := range want {
			got, ok := line[k]
			if v == "" && ok || v != "" && fmt.Sprint(got) != v {
				match = false
			}
		}
		if match {
			found = append(found, line)
		}
	}
	return found
}

// wantLog asserts that exactly one line has the fields. What happens in the
// background has happened when the bubble is idle.
func (n *node) wantLog(want map[string]string) map[string]any {
	n.m.t.Helper()
	synctest.Wait()
	found := n.logs.find(want)
	if len(found) != 1 {
		n.m.t.Errorf("%d log lines of %s with %v, want 1; access lines:\n%s", len(found), n.w.Name, want, n.logs.text("access"))
		return nil
	}
	return found[0]
}

// text renders the lines of one scope.
func (b *logBook) text(scope string) string {
	var sb strings.Builder
	for _, line := range b.find(map[string]string{"scope": scope}) {
		out, _ := json.Marshal(line)
		sb.Write(append(out, '\n'))
	}
	return sb.String()
}

// metric is the sum of a counter or gauge over the series that have the labels.
func (n *node) metric(name string, labels map[string]string) float64 {
	n.m.t.Helper()
	families, err := n.registry.Gather()
	if err != nil {
		n.m.t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		if strings.TrimSuffix(f.GetName(), "_total") != name {
			continue
		}
		for _, m := range f.GetMetric() {
			have := map[string]string{}
			for _, l := range m.GetLabel() {
				have[l.GetName()] = l.GetValue()
			}
			match := true
			for k, v := range labels {
				match = match && have[k] == v
			}
			if match {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return sum
}

func (n *node) wantMetric(want float64, name string, labels map[string]string) {
	n.m.t.Helper()
	synctest.Wait()
	if got := n.metric(name, labels); got != want {
		n.m.t.Errorf("%s: %s%v = %v, want %v", n.w.Name, name, labels, got, want)
	}
}

// dialer connects to n's HBONE listener from an address of no node.
func (m *mesh) dialer(n *node, config *tls.Config) func(context.Context, string) (net.Conn, hbone.Handshake, error) {
	host := m.net.Host(netip.MustParseAddr("10.0.9.1"))
	return func(ctx context.Context, _ string) (net.Conn, hbone.Handshake, error) {
		c, err := host.Dial(ctx, netip.Addr{}, netip.AddrPortFrom(n.addr, 15008))
		return c, hbone.Handshake{TLS: config}, err
	}
}
