package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ztunnel-go/ztunnel/admin"
	"github.com/ztunnel-go/ztunnel/ca/local"
	"github.com/ztunnel-go/ztunnel/internal/zlog"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/proxy/netns/loopback"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The fixture of the direct tests (spec/datapath.md §16.1) on virtual hosts:
// clients reach the outbound listener by the fabric's redirection.
const (
	directWorld = `
workloads:
- {uid: u/local, name: local, namespace: default, serviceAccount: default, workloadIps: [10.1.0.2], protocol: HBONE, node: %[1]s, services: {}}
- uid: u/hbone
  name: hbone
  namespace: default
  serviceAccount: default
  workloadIps: [10.1.0.3]
  protocol: HBONE
  node: %[1]s
  services: {default/local-vip.default.svc.cluster.local: {80: 8080}}
- {uid: u/tcp, name: tcp, namespace: default, serviceAccount: default, workloadIps: [10.1.0.4], protocol: TCP, node: %[1]s, services: {}}
services:
- {name: local-vip, namespace: default, hostname: local-vip.default.svc.cluster.local, vips: [/10.96.0.1], ports: {80: 8080}}
`
	directPatience = 20 * time.Second
)

var (
	directClient = netip.MustParseAddr("10.1.0.2")
	directHBONE  = netip.MustParseAddrPort("10.1.0.3:8080")
	directTCP    = netip.MustParseAddrPort("10.1.0.4:8080")
	directVIP    = netip.MustParseAddrPort("10.96.0.1:80")
)

// direct is two nodes and an uncaptured host, in process.
type direct struct {
	t              *testing.T
	ctx            context.Context
	fabric         *loopback.Fabric
	client, server *running
	app            netns.Network
}

// running is a node that runs.
type running struct {
	*node
	stop func() // begins the drain
	done chan struct{}
	err  error // of run, after done
	logs *syncBuffer
}

type syncBuffer struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// directConfig is the configuration of a node, with free ports for the admin servers.
func directConfig(t *testing.T, workload, nodeName string, env ...string) *Config {
	t.Helper()
	world := filepath.Join(t.TempDir(), "world.yaml")
	if err := os.WriteFile(world, fmt.Appendf(nil, directWorld, nodeName), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, _, err := Load(append([]string{
		"PROXY_MODE=dedicated", "PROXY_WORKLOAD_INFO=default/" + workload + "/default", "NODE_NAME=" + nodeName,
		"XDS_ADDRESS=", "LOCAL_XDS_PATH=" + world, "CA_PROVIDER=local", "LOG_FORMAT=json",
	}, env...), os.ReadFile)
	if err != nil {
		t.Fatal(err)
	}
	free := BindAddr{Addr: netip.MustParseAddrPort("127.0.0.1:0")}
	cfg.Listeners.Admin, cfg.Listeners.Stats, cfg.Listeners.Readiness = free, free, free
	return cfg
}

func newDirectNode(t *testing.T, cfg *Config, network netns.Network, root *local.CA) (*node, *syncBuffer) {
	t.Helper()
	logs := new(syncBuffer)
	log, err := zlog.New(zlog.Config{Out: logs, JSON: true, Filter: "info", Sync: true})
	if err != nil {
		t.Fatal(err)
	}
	n, err := newNode(cfg, nodeParts{network: network, provider: root.Provider(), log: log})
	if err != nil {
		t.Fatal(err)
	}
	return n, logs
}

// startDirect starts both nodes with the given environment on top.
func startDirect(t *testing.T, nodeName string, env ...string) *direct {
	t.Helper()
	root, err := local.Open(local.Config{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), directPatience)
	d := &direct{t: t, ctx: ctx, fabric: loopback.New()}
	d.client = d.start(directConfig(t, "local", nodeName, env...), directClient, root)
	d.server = d.start(directConfig(t, "hbone", nodeName, env...), directHBONE.Addr(), root)
	d.app = d.fabric.Host(directClient).App()
	t.Cleanup(func() {
		cancel()
		for _, r := range []*running{d.client, d.server} {
			r.stop()
			<-r.done
		}
	})
	for _, addr := range []netip.AddrPort{directHBONE, directTCP} {
		d.echo(addr)
	}
	return d
}

func (d *direct) start(cfg *Config, addr netip.Addr, root *local.CA) *running {
	d.t.Helper()
	host := d.fabric.Host(addr)
	host.Capture(true)
	n, logs := newDirectNode(d.t, cfg, host.Proxy(), root)
	if err := n.listen(d.ctx); err != nil {
		d.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(d.ctx)
	r := &running{node: n, stop: stop, done: make(chan struct{}), logs: logs}
	go func() {
		defer close(r.done)
		r.err = n.run(ctx)
	}()
	return r
}

// echo is an application that sends back what it gets.
func (d *direct) echo(addr netip.AddrPort) {
	d.t.Helper()
	ln, err := d.fabric.Host(addr.Addr()).App().Listen(d.ctx, addr)
	if err != nil {
		d.t.Fatal(err)
	}
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			stop := context.AfterFunc(d.ctx, func() { _ = c.Abort() })
			conns.Go(func() {
				defer stop()
				defer c.Close()
				_, _ = io.Copy(c, c)
			})
		}
	})
	d.t.Cleanup(func() { ln.Close(); conns.Wait() })
}

func (d *direct) dial(dst netip.AddrPort) (netns.Conn, error) {
	c, err := d.app.Dial(d.ctx, netip.Addr{}, dst)
	if err == nil {
		d.t.Cleanup(func() { c.Close() })
		err = c.SetDeadline(time.Now().Add(directPatience))
	}
	return c, err
}

func helloWorld(c netns.Conn) error {
	const text = "hello world"
	if _, err := io.WriteString(c, text); err != nil {
		return err
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if string(got) != text {
		return fmt.Errorf("got %q, want %q", got, text)
	}
	return nil
}

// open makes a connection with one round trip and leaves it open.
func (d *direct) open(dst netip.AddrPort) netns.Conn {
	d.t.Helper()
	c, err := d.dial(dst)
	if err == nil {
		err = helloWorld(c)
	}
	if err != nil {
		d.t.Fatalf("request to %v: %v\nclient log:\n%s\nserver log:\n%s", dst, err, d.client.logs, d.server.logs)
	}
	return c
}

// within fails the test unless the node has ended in time, without an error.
func (r *running) within(t *testing.T, limit time.Duration) {
	t.Helper()
	select {
	case <-r.done:
		if r.err != nil {
			t.Errorf("run: %v", r.err)
		}
	case <-time.After(limit):
		t.Fatalf("the node did not end within %v; log:\n%s", limit, r.logs)
	}
}

// eventually waits until check is nil, and fails the test with its last error.
func (d *direct) eventually(check func() error) {
	d.t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-d.ctx.Done():
			d.t.Fatal(err)
		}
	}
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: directPatience}
	resp, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

// sample sums the lines of the exposition whose name and labels are wanted.
func (r *running) sample(t *testing.T, name string, labels ...string) float64 {
	t.Helper()
	_, body := get(t, "http://"+r.statsAddr()+"/metrics")
	sum := 0.0
	for line := range strings.Lines(body) {
		have, rest, _ := strings.Cut(line, "{")
		if have != name && !strings.HasPrefix(line, name+" ") {
			continue
		}
		match := true
		for _, l := range labels {
			match = match && strings.Contains(rest, l)
		}
		var v float64
		if _, err := fmt.Sscan(line[strings.LastIndex(line, " ")+1:], &v); match && err == nil {
			sum += v
		}
	}
	return sum
}

// D-01, LC-01.
func TestD01_ShutdownLifecycle(t *testing.T) {
	d := startDirect(t, "n")
	d.client.stop()
	d.client.within(t, 5*time.Second)
}

// D-02…D-05, LC-03…LC-06: an occupied port ends the start.
func TestD02_ConflictingBind(t *testing.T) {
	root, err := local.Open(local.Config{})
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		id, name string
		port     uint16
		admin    bool
	}{
		{"D-02", "inbound", 15008, false},
		{"D-03", "inbound plaintext", 15006, false},
		{"D-04", "outbound", 15001, false},
		{"D-05", "admin", 0, true},
	} {
		t.Run(tt.id+" "+tt.name, func(t *testing.T) {
			host := loopback.New().Host(directClient)
			cfg := directConfig(t, "local", "n")
			n, _ := newDirectNode(t, cfg, host.Proxy(), root)
			if tt.admin {
				ln, err := netns.NewHost(netns.HostConfig{}).Listen(t.Context(), netip.MustParseAddrPort("127.0.0.1:0"))
				if err != nil {
					t.Fatal(err)
				}
				defer ln.Close()
				cfg.Listeners.Admin.Addr = ln.Addr()
			} else {
				ln, err := host.Proxy().Listen(t.Context(), netip.AddrPortFrom(netip.IPv6Unspecified(), tt.port))
				if err != nil {
					t.Fatal(err)
				}
				defer ln.Close()
			}
			err := n.listen(t.Context())
			if err == nil || !strings.Contains(err.Error(), tt.name) || !strings.Contains(err.Error(), "failed to bind to address") {
				t.Errorf("listen = %v, want a bind error of %s", err, tt.name)
			}
		})
	}
}

// D-06, LC-07: a live connection holds the shutdown up, its end lets it through.
func TestD06_ShutdownDrain(t *testing.T) {
	d := startDirect(t, "n")
	c := d.open(directHBONE)
	d.client.stop()
	if err := helloWorld(c); err != nil {
		t.Errorf("during the drain: %v", err)
	}
	select {
	case <-d.client.done:
		t.Error("the node ended with a live connection")
	default:
	}
	c.Close()
	d.client.within(t, time.Second)
}

// D-07, LC-08: a client that never closes is cut at the deadline.
func TestD07_ShutdownForcedDrain(t *testing.T) {
	d := startDirect(t, "n", "CONNECTION_TERMINATION_DEADLINE=200ms")
	c := d.open(directHBONE)
	d.client.stop()
	d.client.within(t, time.Second)
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("the connection outlived its proxy")
	}
	if !strings.Contains(d.client.logs.String(), "drain duration expired with pending connections, forcefully shutting down") {
		t.Errorf("no word of the forced end in the log:\n%s", d.client.logs)
	}
}

// D-08, LC-02.
func TestD08_QuitLifecycle(t *testing.T) {
	d := startDirect(t, "n")
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Post("http://"+d.client.adminAddr()+"/quitquitquit", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("status = %d, want 200", resp.StatusCode)
	}
	d.client.within(t, 5*time.Second)
}

// D-09…D-11, and D-13…D-15 with the node named local.
func TestD09_Requests(t *testing.T) {
	for i, nodeName := range []string{"n", "local"} {
		d := startDirect(t, nodeName)
		for _, tt := range []struct {
			ids  [2]string
			name string
			dst  netip.AddrPort
		}{
			{[2]string{"D-09", "D-13"}, "hbone", directHBONE},
			{[2]string{"D-10", "D-14"}, "tcp", directTCP},
			{[2]string{"D-11", "D-15"}, "vip", directVIP},
		} {
			t.Run(tt.ids[i]+" "+tt.name+"_request", func(t *testing.T) { d.open(tt.dst).Close() })
		}
		for _, name := range []string{"process_open_fds", "process_max_fds"} {
			_, body := get(t, "http://"+d.client.statsAddr()+"/stats/prometheus")
			if n := strings.Count(body, "\n"+name+" "); n != 1 || d.client.sample(t, name) <= 0 {
				t.Errorf("%s: %d samples, value %v", name, n, d.client.sample(t, name))
			}
		}
	}
}

// D-17, AD-06: istio_build is there, and the help texts tell stable from unstable.
func TestD17_StatsExist(t *testing.T) {
	d := startDirect(t, "n")
	d.open(directHBONE).Close()
	if got := d.client.sample(t, "istio_build", `component="ztunnel"`); got != 1 {
		t.Errorf("istio_build = %v, want 1", got)
	}
	if err := admin.CheckHelp(d.client.registry); err != nil {
		t.Error(err)
	}
}

// D-19: opened while open, closed soon after the end.
func TestD19_TCPConnectionsMetrics(t *testing.T) {
	d := startDirect(t, "n")
	c := d.open(directTCP)
	if opened, closed := d.client.sample(t, "istio_tcp_connections_opened_total"), d.client.sample(t, "istio_tcp_connections_closed_total"); opened != 1 || closed != 0 {
		t.Errorf("while open: opened %v, closed %v, want 1 and 0", opened, closed)
	}
	c.Close()
	d.eventually(func() error {
		if got := d.client.sample(t, "istio_tcp_connections_closed_total"); got != 1 {
			return fmt.Errorf("closed = %v, want 1", got)
		}
		return nil
	})
}

// D-20.
func TestD20_TCPBytesMetrics(t *testing.T) {
	d := startDirect(t, "n")
	d.open(directTCP).Close()
	for _, name := range []string{"istio_tcp_received_bytes_total", "istio_tcp_sent_bytes_total"} {
		d.eventually(func() error {
			if got := d.client.sample(t, name); got != float64(len("hello world")) {
				return fmt.Errorf("%s = %v, want 11", name, got)
			}
			return nil
		})
	}
}

// The dump has the keys that its readers know, certificates among them, and no
// private key; readiness answers; the log level changes at run time.
func TestConfigDump(t *testing.T) {
	d := startDirect(t, "n")
	c := d.open(directHBONE)
	defer c.Close()
	status, body := get(t, "http://"+d.client.adminAddr()+"/config_dump")
	if status != http.StatusOK || strings.Contains(body, "PRIVATE KEY") {
		t.Fatalf("status %d, private key: %t", status, strings.Contains(body, "PRIVATE KEY"))
	}
	var dump struct {
		Certificates []struct {
			Identity, State string
			CertChain       []any
		}
		Config       map[string]any
		Policies     []any
		Services     []any
		Workloads    []any
		StaticConfig map[string][]any
		Version      map[string]any
		ZtunnelGo    struct {
			Connections struct {
				Outbound []map[string]string
			}
		}
	}
	if err := json.Unmarshal([]byte(body), &dump); err != nil {
		t.Fatal(err)
	}
	if len(dump.Certificates) != 1 || dump.Certificates[0].State != "Available" || len(dump.Certificates[0].CertChain) != 1 ||
		dump.Certificates[0].Identity != "spiffe://cluster.local/ns/default/sa/default" {
		t.Errorf("certificates = %+v", dump.Certificates)
	}
	if dump.Config["proxyMode"] != "Dedicated" || len(dump.Workloads) != 3 || len(dump.Services) != 1 || len(dump.StaticConfig["workloads"]) != 3 || dump.Version["cryptoProvider"] == "" {
		t.Errorf("dump = %.2000s", body)
	}
	if out := dump.ZtunnelGo.Connections.Outbound; len(out) != 1 || out[0]["actualDst"] != "10.1.0.3:15008" || out[0]["originalDst"] != "10.1.0.3:8080" || out[0]["protocol"] != "HBONE" {
		t.Errorf("outbound connections = %v", out)
	}
	if status, body := get(t, "http://"+d.client.readinessLn[0].Addr().String()+"/healthz/ready"); status != 200 || body != "ready\n" {
		t.Errorf("readiness = %d %q", status, body)
	}
}

// A reload of the local file re-checks the open connections (§12.2 and the
// issue's point 3), and one that does not parse changes nothing.
func TestReload(t *testing.T) {
	d := startDirect(t, "n")
	c := d.open(directHBONE)
	path := d.server.cfg.XDS.LocalPath
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, append(good, "policies: [{name: broken}]"...), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := d.server.world.Check(); err == nil {
		t.Error("a policy without its keys was accepted")
	}
	if err := helloWorld(c); err != nil {
		t.Errorf("after a reload that failed: %v", err)
	}
	deny := "policies: [{name: deny, namespace: default, scope: Namespace, action: Deny, dryRun: false, rules: [[[{destinationPorts: [8080]}]]]}]\n"
	if err := os.WriteFile(path, append(good, deny...), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := d.server.world.Check(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the denied connection read %v, want its end", err)
	}
	c2, err := d.dial(directHBONE)
	if err == nil {
		err = helloWorld(c2)
	}
	if err == nil {
		t.Error("a denied request succeeded")
	}
}

// A state that does not parse ends the start.
func TestBadLocalState(t *testing.T) {
	cfg := directConfig(t, "local", "n")
	if err := os.WriteFile(cfg.XDS.LocalPath, []byte("workloads: [{nmae: x}]"), 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := zlog.New(zlog.Config{Out: io.Discard, Sync: true})
	if err != nil {
		t.Fatal(err)
	}
	_, err = newNode(cfg, nodeParts{network: loopback.New().Host(directClient).Proxy(), log: log})
	if err == nil || !strings.Contains(err.Error(), "nmae") || !strings.Contains(err.Error(), cfg.XDS.LocalPath) {
		t.Errorf("newNode = %v, want an error that names file and key", err)
	}
}

// The demo is the product's first impression: it must pass, and say so.
func TestDemo(t *testing.T) {
	var out bytes.Buffer
	if err := runDemo(t.Context(), &out, true, false); err != nil {
		t.Fatalf("%v\n%s", err, &out)
	}
	var report map[string]any
	if err := json.Unmarshal(out.Bytes(), &report); err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]any{
		"passed": true, "protocol": "HBONE", "sourceIdentity": demoClientID, "destinationIdentity": demoServerID,
		"denied": map[string]any{"policy": demoPolicy, "ok": true}, "rotation": map[string]any{"ok": true},
		"requests": report["ok"],
	} {
		if fmt.Sprint(report[key]) != fmt.Sprint(want) {
			t.Errorf("%s = %v, want %v", key, report[key], want)
		}
	}
}
