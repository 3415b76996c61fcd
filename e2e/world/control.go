//go:build e2e

package world

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"encoding/pem"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"

	"google.golang.org/protobuf/proto"

	"github.com/ztunnel-go/ztunnel/ca/local"
	"github.com/ztunnel-go/ztunnel/xds/securitypb"
	"github.com/ztunnel-go/ztunnel/xds/workloadpb"
	"github.com/ztunnel-go/ztunnel/xds/xdstest"
)

// ControlPlane serves what the test publishes to the proxies of a world: over TLS
// on 127.0.0.1 of each pod, or on a unix socket. It outlives a restart.
type ControlPlane struct {
	w *World

	mu     sync.Mutex // guards the fields below
	server *xdstest.Server
	listen []func() (net.Listener, error) // one for each proxy
	serves sync.WaitGroup                 // of server
}

// Control is the control plane of the world, which starts when it is first asked
// for.
func (w *World) Control() *ControlPlane {
	w.T.Helper()
	if w.control == nil {
		w.control = &ControlPlane{w: w}
		w.control.Start()
		w.T.Cleanup(w.control.Stop)
		w.T.Cleanup(w.control.expectNoViolations)
	}
	return w.control
}

// Start serves again after Stop, with all that was published until now. The
// server knows nothing of the one before.
func (c *ControlPlane) Start() {
	c.w.T.Helper()
	cfg := xdstest.Config{Personality: c.w.Personality}
	if !c.w.XDSSocket {
		cert, err := c.w.serverCert()
		if err != nil {
			c.w.T.Fatal(err)
		}
		cfg.TLS = &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{*cert}}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	server := xdstest.New(cfg)
	if c.server != nil {
		for _, typeURL := range []string{xdstest.AddressType, xdstest.AuthorizationType} {
			server.Set(c.server.World(typeURL)...)
		}
	}
	c.server = server
	for _, listen := range c.listen {
		c.serve(listen)
	}
}

// serve opens one listener. The caller holds mu.
func (c *ControlPlane) serve(listen func() (net.Listener, error)) {
	c.w.T.Helper()
	ln, err := listen()
	if err != nil {
		c.w.T.Fatal(err)
	}
	server := c.server
	c.serves.Go(func() { _ = server.Serve(ln) })
}

// Stop ends all streams and serves no more. What is published meanwhile is there
// after the next Start.
func (c *ControlPlane) Stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.server.Stop()
	c.serves.Wait()
}

// expectNoViolations fails the test if a proxy broke the protocol.
func (c *ControlPlane) expectNoViolations() {
	for _, v := range c.Server().Violations() {
		c.w.T.Errorf("control plane: %s", v)
	}
}

// Server is the server of now.
func (c *ControlPlane) Server() *xdstest.Server {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.server
}

// NACKs are the texts of all rejections since the last Start.
func (c *ControlPlane) NACKs() []string {
	var out []string
	for _, r := range c.Server().Requests() {
		if e := r.GetErrorDetail(); e != nil {
			out = append(out, e.GetMessage())
		}
	}
	return out
}

// xdsPort is where a proxy finds the control plane, on 127.0.0.1 of its pod.
const xdsPort = 15010

// attach lets a proxy in the pod reach the control plane, and returns the
// environment that leads there.
func (c *ControlPlane) attach(p *Pod) []string {
	t := p.W.T
	t.Helper()
	token := filepath.Join(p.W.Dir, "xds-token")
	if err := os.WriteFile(token, []byte("token"), 0o600); err != nil {
		t.Fatal(err)
	}
	env := []string{"AUTH_TOKEN=" + token, "POD_NAME=ztunnel-" + p.Name, "POD_NAMESPACE=istio-system", "INSTANCE_IP=" + p.Addr.String()}
	listen := func() (net.Listener, error) {
		ln, err := p.Net.Listen(p.W.Ctx, netip.MustParseAddrPort(fmt.Sprintf("127.0.0.1:%d", xdsPort)))
		if err != nil {
			return nil, err
		}
		return NetListener(ln), nil
	}
	if p.W.XDSSocket {
		dir, err := Dir()
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, "xds.sock")
		listen = func() (net.Listener, error) { return net.Listen("unix", path) }
		env = append(env, "XDS_ADDRESS=unix://"+path)
	} else {
		env = append(env, fmt.Sprintf("XDS_ADDRESS=https://127.0.0.1:%d", xdsPort), "XDS_ROOT_CA="+p.W.rootFile())
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !p.attached {
		p.attached = true
		c.listen = append(c.listen, listen)
		c.serve(listen)
	}
	return env
}

// rootFile is the root of the embedded CA as a file of its own.
func (w *World) rootFile() string { return filepath.Join(w.Dir, "xds-root.pem") }

// serverCert mints the certificate of the control plane, and writes the root by
// which proxies know it.
func (w *World) serverCert() (*tls.Certificate, error) {
	ca, err := local.Open(local.Config{Dir: w.CADir()})
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	leaf, err := ca.SignServer(key.Public(), []string{"localhost"}, []netip.Addr{netip.MustParseAddr("127.0.0.1")})
	if err != nil {
		return nil, err
	}
	root := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Root().Raw})
	if err := os.WriteFile(w.rootFile(), root, 0o644); err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}, nil
}

// Publish tells the proxies of workloads, services and policies, or of their new
// content.
func (w *World) Publish(resources ...proto.Message) {
	w.T.Helper()
	set := make([]xdstest.Resource, 0, len(resources))
	for _, r := range resources {
		switch r := r.(type) {
		case *workloadpb.Workload:
			set = append(set, xdstest.Workload(r))
		case *workloadpb.Service:
			set = append(set, xdstest.Service(r))
		case *securitypb.Authorization:
			set = append(set, xdstest.Authorization(r))
		default:
			w.T.Fatalf("publish a %T", r)
		}
	}
	w.Control().Server().Set(set...)
}

// PublishPods publishes the workloads of all pods: as given, otherwise as
// [Pod.Workload] makes them.
func (w *World) PublishPods(given ...*workloadpb.Workload) {
	w.T.Helper()
	uids := map[string]bool{}
	var all []proto.Message
	for _, wl := range given {
		uids[wl.GetUid()] = true
		all = append(all, wl)
	}
	for _, p := range w.Pods {
		if !uids[p.UID()] {
			all = append(all, p.Workload())
		}
	}
	w.Publish(all...)
}

// Withdraw takes workloads (UIDs) and services (namespace/hostname) back.
func (w *World) Withdraw(names ...string) { w.Control().Server().Remove(xdstest.AddressType, names...) }

// WithdrawPolicies takes policies (namespace/name) back.
func (w *World) WithdrawPolicies(names ...string) {
	w.Control().Server().Remove(xdstest.AuthorizationType, names...)
}
