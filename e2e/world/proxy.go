//go:build e2e

package world

import (
	"fmt"
	"net/http"
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
	// Shared makes Pod.StartProxy take the proxy of the node, which it starts if
	// there is none.
	Shared      bool
	ResolvConf  string // of a shared proxy that has a pod of its own; empty: the machine's
	HostNetwork bool   // a shared proxy on the node's own network, beside Cilium's agent
	// Credentials is the environment that leads to the certificates of a pod; nil
	// = the embedded CA, with the world's directory.
	Credentials func(*Pod) []string
	Env         []string // wins over the rest
}

// Proxy is a running ztunnel.
type Proxy struct {
	*Process
	Pod  *Pod // where it runs
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
// is ready. The configuration must have been written. In shared mode it is that
// of the node, which is told of the pod.
func (p *Pod) StartProxy(o ProxyOptions) *Proxy {
	p.W.T.Helper()
	if o.Shared {
		if len(p.Node.Proxies) == 0 {
			p.Node.StartProxy(o)
		}
		p.tellProxy()
		return p.Node.Proxy()
	}
	s := p.LaunchProxy(o)
	s.AwaitReady(proxyTime)
	return s
}

// LaunchProxy starts a proxy of the pod's own and does not wait for it.
func (p *Pod) LaunchProxy(o ProxyOptions) *Proxy {
	p.W.T.Helper()
	return p.launch(o, []string{"PROXY_MODE=dedicated", "PROXY_WORKLOAD_INFO=" + p.Namespace + "/" + p.Name + "/" + p.SA})
}

// launch starts a proxy in the pod; mode is the environment of its mode.
func (p *Pod) launch(o ProxyOptions, mode []string) *Proxy {
	t := p.W.T
	t.Helper()
	if o.Bin == "" {
		o.Bin = Binary(t, "ZTUNNEL_BIN")
	}
	env := []string{
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
	env = append(env, mode...)
	return &Proxy{Process: p.Start("ztunnel", append(env, o.Env...), o.Bin, "proxy"), Pod: p, Peer: o.Peer}
}

// AwaitReady waits for the proxy's own word.
func (s *Proxy) AwaitReady(limit time.Duration) {
	s.t.Helper()
	Eventually(s.t, s.Pod.W.Ctx, limit, func() error {
		select {
		case <-s.Done:
			s.t.Fatalf("%s has ended: %v", s.Name, s.Err())
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
func (p *Pod) Client() *http.Client { return p.lab.Client() }

// Get returns the body of a 200.
func (p *Pod) Get(url string) (string, error) { return p.lab.Get(url) }
