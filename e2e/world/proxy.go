//go:build e2e

package world

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// ProxyOptions are what tests vary.
type ProxyOptions struct {
	Bin  string // empty: ZTUNNEL_BIN
	Peer bool   // another implementation: less can be asserted of it
	XDS  bool   // the state comes from the world's control plane, not from the local file
	// Credentials is the environment that leads to the certificates of a pod; nil
	// = the embedded CA, with the world's directory.
	Credentials func(*Pod) []string
	Env         []string // wins over the rest
}

// Proxy is a running ztunnel.
type Proxy struct {
	*Process
	Pod  *Pod
	Peer bool
}

// ConfigFile is the local configuration, which all proxies share.
func (w *World) ConfigFile() string { return filepath.Join(w.Dir, "config.yaml") }

// WriteConfig publishes the pods and policies of now; running proxies of ours
// read the file again.
func (w *World) WriteConfig() {
	w.T.Helper()
	var b strings.Builder
	b.WriteString("workloads:\n")
	for _, p := range w.Pods {
		protocol := "TCP"
		if p.Captured {
			protocol = "HBONE"
		}
		fmt.Fprintf(&b, `- uid: Kubernetes//v1/Pod/%[8]s/%[1]s
  name: %[1]s
  namespace: %[8]s
  serviceAccount: %[2]s
  trustDomain: %[9]s
  clusterId: Kubernetes
  workloadIps: ["%[3]v", "%[7]v"]
  workloadName: %[1]s
  workloadType: deployment
  canonicalName: %[1]s
  canonicalRevision: v1
  protocol: %[4]s
  node: %[5]s
  network: ""
  services: {%[6]s}
`, p.Name, p.SA, p.Addr, protocol, p.Node.Name, p.Services, p.Addr6, p.Namespace, p.TrustDomain)
	}
	b.WriteString("services: [" + w.Services + "]\n")
	if w.Policies == "" {
		b.WriteString("policies: []\n")
	} else {
		b.WriteString("policies:\n" + w.Policies)
	}
	tmp := w.ConfigFile() + ".new"
	if err := os.WriteFile(tmp, []byte(b.String()), 0o644); err != nil {
		w.T.Fatal(err)
	}
	if err := os.Rename(tmp, w.ConfigFile()); err != nil {
		w.T.Fatal(err)
	}
}

// StartProxy starts a proxy in the pod, whose rules are set, and waits until it
// is ready. The configuration must have been written.
func (p *Pod) StartProxy(o ProxyOptions) *Proxy {
	p.W.T.Helper()
	s := p.LaunchProxy(o)
	s.AwaitReady(20 * time.Second)
	return s
}

// LaunchProxy starts a proxy and does not wait for it.
func (p *Pod) LaunchProxy(o ProxyOptions) *Proxy {
	t := p.W.T
	t.Helper()
	if o.Bin == "" {
		o.Bin = Binary(t, "ZTUNNEL_BIN")
	}
	env := []string{
		"PROXY_MODE=dedicated",
		"PROXY_WORKLOAD_INFO=" + p.Namespace + "/" + p.Name + "/" + p.SA,
		"PACKET_MARK=1337",
		"ENABLE_ORIG_SRC=true",
		"IPV6_ENABLED=true",
		"NODE_NAME=" + p.Node.Name,
		"CLUSTER_ID=Kubernetes",
		"LOG_FORMAT=json",
		"RUST_LOG=info",
		"CONNECTION_TERMINATION_DEADLINE=10s",
		"ZTUNNEL_WORKER_THREADS=2",
	}
	if o.XDS {
		env = append(env, p.W.Control().attach(p)...)
	} else {
		env = append(env, "XDS_ADDRESS=", "LOCAL_XDS_PATH="+p.W.ConfigFile())
	}
	if o.Credentials != nil {
		env = append(env, o.Credentials(p)...)
	} else {
		env = append(env, "CA_PROVIDER=local", "CA_LOCAL_DIR="+p.W.CADir())
	}
	return &Proxy{Process: p.Start("ztunnel", append(env, o.Env...), o.Bin, "proxy"), Pod: p, Peer: o.Peer}
}

// AwaitReady waits for the proxy's own word.
func (s *Proxy) AwaitReady(limit time.Duration) {
	s.t.Helper()
	Eventually(s.t, s.Pod.W.Ctx, limit, func() error {
		select {
		case <-s.Done:
			s.t.Fatalf("%s has ended: %v", s.Name, s.err)
		default:
		}
		return s.Ready()
	})
}

// Ready is nil when the proxy says that it is ready, else what it says instead.
func (s *Proxy) Ready() error {
	_, err := s.Pod.Get("http://127.0.0.1:15021/healthz/ready")
	return err
}

// CADir is the directory of the embedded CA, which all proxies share.
func (w *World) CADir() string { return filepath.Join(w.Dir, "ca") }

// Client speaks HTTP from inside the pod, past any proxy if it stays on
// 127.0.0.1.
func (p *Pod) Client() *http.Client {
	return &http.Client{
		Timeout: 10 * time.Second,
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
				return p.Dial(ctx, addr)
			},
		},
	}
}

// Dial connects an application in the pod.
func (p *Pod) Dial(ctx context.Context, addr string) (net.Conn, error) {
	dst, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, err
	}
	return p.Net.Dial(ctx, netip.Addr{}, dst)
}

// Get returns the body of a 200.
func (p *Pod) Get(url string) (string, error) {
	resp, err := p.Client().Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", url, resp.Status, body)
	}
	return string(body), err
}
