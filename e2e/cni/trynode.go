//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/netlab"
)

const (
	demoNamespace = "demo"
	demoService   = "web"
	demoVIP       = "10.96.0.10"
	// demoDNS is where the pods believe their nameserver to be. Nobody is there:
	// the rules lead to the proxy.
	demoDNS = "10.96.0.53"
)

// demoPod is a namespace with one workload.
type demoPod struct {
	name string
	addr netip.Addr
	ns   *netlab.Namespace
}

// makeNode makes a bridge with three pods and the proxy on it.
func (d *demo) makeNode(ctx context.Context) error {
	var err error
	if d.node, err = d.namespace(ctx, "node"); err != nil {
		return err
	}
	if err := d.node.IP(ctx, "link add br0 type bridge", "addr add 10.0.0.1/24 dev br0", "link set br0 up"); err != nil {
		return err
	}
	d.title("Three pods and a place for the proxy, each a network namespace on one bridge:")
	for i, name := range []string{"client", "web", "outsider", "ztunnel"} {
		p := &demoPod{name: name, addr: netip.AddrFrom4([4]byte{10, 0, 0, byte(i + 2)})}
		if p.ns, err = d.namespace(ctx, name); err != nil {
			return err
		}
		veth := fmt.Sprintf("veth%d", i)
		if err := netlab.Link(ctx, d.node, veth, p.ns); err != nil {
			return err
		}
		if err := d.node.IP(ctx, "link set "+veth+" master br0"); err != nil {
			return err
		}
		if err := p.ns.IP(ctx, fmt.Sprintf("addr add %v/24 dev eth0", p.addr), "route add default via 10.0.0.1"); err != nil {
			return err
		}
		d.say("  ", "%-8s %-10v %s", name, p.addr, p.ns.Name)
		if name == "ztunnel" {
			d.home = p.ns
			continue
		}
		d.pods[name] = p
		if err := p.ns.WriteEtc("resolv.conf", fmt.Sprintf("nameserver %s\nsearch %s.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n", demoDNS, demoNamespace)); err != nil {
			return err
		}
	}
	return d.startWeb(ctx)
}

// namespace makes one, which goes at the end with all that runs in it.
func (d *demo) namespace(ctx context.Context, name string) (*netlab.Namespace, error) {
	n, err := netlab.New(ctx, name)
	if err == nil {
		d.ends = append(d.ends, func() error { _ = n.File.Close(); return nil })
	}
	return n, err
}

// startWeb runs the application of the pod web: it answers with the address that
// it sees its client at.
func (d *demo) startWeb(ctx context.Context) error {
	web := d.pods["web"]
	ln, err := web.ns.Net.Listen(ctx, netip.AddrPortFrom(netip.IPv4Unspecified(), 8080))
	if err != nil {
		return err
	}
	srv := &http.Server{
		ReadHeaderTimeout: 10 * time.Second,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			host, _, _ := strings.Cut(r.RemoteAddr, ":")
			fmt.Fprintf(w, "hello %s, you say %q\n", host, r.URL.Query().Get("say"))
		}),
	}
	var running sync.WaitGroup
	var runErr error
	running.Go(func() { runErr = srv.Serve(netlab.NetListener(ln)) })
	d.ends = append(d.ends, func() error {
		_ = srv.Close()
		running.Wait()
		if errors.Is(runErr, http.ErrServerClosed) {
			return nil
		}
		return runErr
	})
	return nil
}

// meshConfig is what a control plane would tell: who there is.
func (d *demo) meshConfig() string {
	var b strings.Builder
	b.WriteString("workloads:\n")
	for _, name := range []string{"client", "web", "outsider"} {
		protocol, services := "HBONE", "{}"
		switch name {
		case "outsider":
			protocol = "TCP"
		case "web":
			services = fmt.Sprintf("{%q: {80: 8080}}", demoNamespace+"/"+hostname(demoService))
		}
		fmt.Fprintf(&b, "- {uid: cluster//v1/Pod/%[1]s/%[2]s, name: %[2]s, namespace: %[1]s, serviceAccount: %[2]s, workloadIps: [%[3]v], node: node, protocol: %[4]s, services: %[5]s}\n",
			demoNamespace, name, d.pods[name].addr, protocol, services)
	}
	fmt.Fprintf(&b, "services:\n- {name: %[1]s, namespace: %[2]s, hostname: %[3]s, vips: [\"/%[4]s\"], ports: {80: 8080}}\npolicies: []\n",
		demoService, demoNamespace, hostname(demoService), demoVIP)
	return b.String()
}

func hostname(service string) string { return service + "." + demoNamespace + ".svc.cluster.local" }
