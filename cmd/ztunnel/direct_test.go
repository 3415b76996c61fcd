package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/ca/local"
	"github.com/ztunnel-go/ztunnel/internal/zlog"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/proxy/netns/loopback"
)

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
	// A drain takes a second at least, unless it is cut: tests of it say so.
	testDeadline = "CONNECTION_TERMINATION_DEADLINE=100ms"
	longDeadline = "CONNECTION_TERMINATION_DEADLINE=1m"
)

var (
	directClient = netip.MustParseAddr("10.1.0.2")
	directHBONE  = netip.MustParseAddrPort("10.1.0.3:8080")
	directTCP    = netip.MustParseAddrPort("10.1.0.4:8080")
	directDNS    = netip.MustParseAddrPort("10.1.0.53:53")
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
	cfg, _, err := Load(append(slices.Clone(env), // the first wins
		"PROXY_MODE=dedicated", "PROXY_WORKLOAD_INFO=default/"+workload+"/default", "NODE_NAME="+nodeName,
		"XDS_ADDRESS=", "LOCAL_XDS_PATH="+world, "CA_PROVIDER=local", "LOG_FORMAT=json", testDeadline,
	), os.ReadFile)
	if err != nil {
		t.Fatal(err)
	}
	free := BindAddr{Addr: netip.MustParseAddrPort("127.0.0.1:0")}
	cfg.Listeners.Admin, cfg.Listeners.Stats, cfg.Listeners.Readiness = free, free, free
	return cfg
}

// newDirectNode makes a node whose certificates are of root, or of the real
// providers without one.
func newDirectNode(t *testing.T, cfg *Config, network netns.Network, root *local.CA) (*node, *syncBuffer) {
	t.Helper()
	parts, logs := directParts(t, network, root)
	n, err := newNode(cfg, parts)
	if err != nil {
		t.Fatal(err)
	}
	return n, logs
}

// directParts are those of a node with a nameserver at directDNS.
func directParts(t *testing.T, network netns.Network, root *local.CA) (nodeParts, *syncBuffer) {
	t.Helper()
	logs := new(syncBuffer)
	log, err := zlog.New(zlog.Config{Out: logs, JSON: true, Filter: "info", Sync: true})
	if err != nil {
		t.Fatal(err)
	}
	nameserver := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(nameserver, []byte("nameserver "+directDNS.Addr().String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	parts := nodeParts{network: network, log: log, resolvConf: nameserver}
	if root != nil {
		parts.backends = embedded(root)
	}
	return parts, logs
}

// startDirect starts both nodes with the given environment on top.
func startDirect(t *testing.T, nodeName string, env ...string) *direct {
	t.Helper()
	root, err := local.Open(local.Config{})
	if err != nil {
		t.Fatal(err)
	}
	return startNodes(t, directPatience, root, directConfig(t, "local", nodeName, env...), directConfig(t, "hbone", nodeName, env...))
}

func startNodes(t *testing.T, patience time.Duration, root *local.CA, client, server *Config) *direct {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	d := &direct{t: t, ctx: ctx, fabric: loopback.New()}
	d.client = d.start(client, directClient, root)
	d.server = d.start(server, directHBONE.Addr(), root)
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
