package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/ca/local"
	"github.com/ztunnel-go/ztunnel/proxy/inpod"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/proxy/netns/loopback"
)

// The node of the shared tests serves the pods local and hbone of directWorld, and
// its own; the pod tcp is not of the mesh.
const sharedWorld = `
- {uid: u/ztunnel, name: ztunnel-x, namespace: istio-system, serviceAccount: ztunnel, workloadIps: [10.1.0.9], protocol: HBONE, node: %[1]s, services: {}}
`

// sharedServices has a name that is not of the cluster.
const sharedServices = "- {name: ext, namespace: default, hostname: ext.example, vips: [/10.96.0.3], ports: {80: 8080}}\n"

// ownPod tells the node who it is.
var ownPod = []string{"POD_NAME=ztunnel-x", "POD_NAMESPACE=istio-system", "SERVICE_ACCOUNT=ztunnel"}

var sharedNode = netip.MustParseAddr("10.1.0.9")

// onNode is a node in shared mode, whose agent is the test.
type onNode struct {
	*direct
	agent *agent
	node  *running
	pods  *podNamespaces
	root  *local.CA
}

// podNamespaces are hosts of a fabric in the place of network namespaces. A file
// stands for each: its ID is as unique.
type podNamespaces struct {
	t      *testing.T
	fabric *loopback.Fabric
	dir    string

	mu    sync.Mutex // guards hosts
	hosts map[netns.NamespaceID]*loopback.Host
}

// file is the namespace of the pod with address a, which it makes if it is new.
func (p *podNamespaces) file(a netip.Addr) *os.File {
	p.t.Helper()
	f, err := os.OpenFile(filepath.Join(p.dir, a.String()), os.O_RDONLY|os.O_CREATE, 0o600)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { f.Close() })
	id, err := netns.ID(f)
	if err != nil {
		p.t.Fatal(err)
	}
	host := p.fabric.Host(a)
	host.Capture(true)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hosts[id] = host
	return f
}

// platform is what the node gets in the place of Linux.
func (p *podNamespaces) platform() podPlatform {
	return podPlatform{
		namespaces: func(*Config, *slog.Logger) func(*os.File) (inpod.Namespace, error) { return p.namespace },
		check:      func(uint32) error { return nil },
	}
}

func (p *podNamespaces) namespace(ns *os.File) (inpod.Namespace, error) {
	id, err := netns.ID(ns)
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	host := p.hosts[id]
	if host == nil {
		return nil, fmt.Errorf("no namespace %s", id)
	}
	return podNamespace{host.Proxy(), host.Addr()}, nil
}

type podNamespace struct {
	netns.Network
	addr netip.Addr
}

func (p podNamespace) Addresses() ([]netip.Addr, error) { return []netip.Addr{p.addr}, nil }
func (p podNamespace) Alive() (bool, error)             { return true, nil }
func (p podNamespace) LoopbackIPv6() (bool, error)      { return false, nil }

// newOnNode makes the node and starts nothing.
func newOnNode(t *testing.T, env ...string) *onNode {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), directPatience)
	t.Cleanup(cancel)
	s := &onNode{direct: &direct{t: t, ctx: ctx, fabric: loopback.New()}, agent: newAgent(t)}
	s.app = s.fabric.Host(directClient).App()
	s.pods = &podNamespaces{t: t, fabric: s.fabric, dir: t.TempDir(), hosts: map[netns.NamespaceID]*loopback.Host{}}
	root, err := local.Open(local.Config{})
	if err != nil {
		t.Fatal(err)
	}
	s.root = root
	s.remake(sharedConfig(t, append(slices.Clone(env), "INPOD_UDS="+s.agent.path)...))
	for _, addr := range []netip.AddrPort{directHBONE, directTCP} {
		s.echo(addr)
	}
	return s
}

// remake makes the node anew, for another configuration.
func (s *onNode) remake(cfg *Config) {
	s.t.Helper()
	parts, logs := directParts(s.t, s.fabric.Host(sharedNode).Proxy(), s.root)
	parts.pods = s.pods.platform()
	n, err := newNode(cfg, parts)
	if err != nil {
		s.t.Fatal(err)
	}
	s.node = &running{node: n, logs: logs, done: make(chan struct{})}
	s.client, s.server = s.node, s.node
}

// sharedConfig is the configuration of a node, with free ports for the servers.
func sharedConfig(t *testing.T, env ...string) *Config {
	t.Helper()
	world := filepath.Join(t.TempDir(), "world.yaml")
	text := strings.Replace(directWorld, "services:\n- {name", sharedWorld+"services:\n- {name", 1) + sharedServices
	if err := os.WriteFile(world, fmt.Appendf(nil, text, "n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg, _, err := Load(append(slices.Clone(env), // the first wins
		"NODE_NAME=n", "XDS_ADDRESS=", "LOCAL_XDS_PATH="+world, "CA_PROVIDER=local", "LOG_FORMAT=json", testDeadline), os.ReadFile)
	if err != nil {
		t.Fatal(err)
	}
	free := BindAddr{Addr: netip.MustParseAddrPort("127.0.0.1:0")}
	cfg.Listeners.Admin, cfg.Listeners.Stats, cfg.Listeners.Readiness = free, free, free
	return cfg
}

// start runs the node.
func (s *onNode) start() {
	s.t.Helper()
	if err := s.node.listen(s.ctx); err != nil {
		s.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(s.ctx)
	s.node.stop = stop
	go func() {
		defer close(s.node.done)
		s.node.err = s.node.run(ctx)
	}()
	s.t.Cleanup(func() {
		stop()
		<-s.node.done
	})
}

// startShared runs a node with the pods local and hbone, and returns what its
// agent has of it.
func startShared(t *testing.T, env ...string) (*onNode, *session) {
	t.Helper()
	s := newOnNode(t, env...)
	s.agent.serve()
	s.start()
	agent := s.agent.accept()
	agent.tell(addPod("local"), s.pods.file(directClient))
	agent.tell(addPod("hbone"), s.pods.file(directHBONE.Addr()))
	agent.tell(snapshotSent, nil)
	s.awaitReady()
	return s, agent
}

// awaitReady waits until the node says that it is ready.
func (s *onNode) awaitReady() {
	s.t.Helper()
	s.eventually(func() error {
		if s.node.httpAddr(listenReadiness) == "" {
			return errors.New("nobody listens")
		}
		if status, body := s.node.readiness(s.t); status != 200 || body != "ready\n" {
			return errors.New(body)
		}
		return nil
	})
}

// awaitText waits until readiness has all of want in its answer.
func (s *onNode) awaitText(want ...string) {
	s.t.Helper()
	s.eventually(func() error {
		_, body := s.node.readiness(s.t)
		for _, text := range want {
			if !strings.Contains(body, text) {
				return fmt.Errorf("readiness is %q, want %q in it", body, text)
			}
		}
		return nil
	})
}

// soon is a time that is short for a person, and long for a busy machine.
const soon = 5 * time.Second
