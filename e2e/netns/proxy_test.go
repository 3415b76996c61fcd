//go:build e2e

package netns

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// proxyOptions are what tests vary.
type proxyOptions struct {
	bin  string
	peer bool     // another implementation: its certificates come from fakeistiod
	env  []string // wins over the rest
}

// proxy is a running ztunnel.
type proxy struct {
	*process
	pod  *pod
	peer bool
}

// configFile is the local configuration, which all proxies share.
func (w *world) configFile() string { return filepath.Join(w.dir, "config.yaml") }

// writeConfig publishes the pods and policies of now; running proxies of ours
// read the file again.
func (w *world) writeConfig() {
	w.t.Helper()
	var b strings.Builder
	b.WriteString("workloads:\n")
	for _, p := range w.pods {
		protocol := "TCP"
		if p.captured {
			protocol = "HBONE"
		}
		fmt.Fprintf(&b, `- uid: Kubernetes//v1/Pod/default/%[1]s
  name: %[1]s
  namespace: default
  serviceAccount: %[2]s
  trustDomain: cluster.local
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
`, p.name, p.sa, p.addr, protocol, p.node.name, p.services, p.addr6)
	}
	b.WriteString("services: [" + w.services + "]\n")
	if w.policies == "" {
		b.WriteString("policies: []\n")
	} else {
		b.WriteString("policies:\n" + w.policies)
	}
	tmp := w.configFile() + ".new"
	if err := os.WriteFile(tmp, []byte(b.String()), 0o644); err != nil {
		w.t.Fatal(err)
	}
	if err := os.Rename(tmp, w.configFile()); err != nil {
		w.t.Fatal(err)
	}
}

// startProxy starts a proxy in the pod, whose rules are set, and waits until it
// is ready. The configuration must have been written.
func (p *pod) startProxy(o proxyOptions) *proxy {
	t := p.w.t
	t.Helper()
	if o.bin == "" {
		o.bin = binary(t, "ZTUNNEL_BIN")
	}
	env := []string{
		"PROXY_MODE=dedicated",
		"PROXY_WORKLOAD_INFO=default/" + p.name + "/" + p.sa,
		"PACKET_MARK=1337",
		"ENABLE_ORIG_SRC=true",
		"IPV6_ENABLED=true",
		"XDS_ADDRESS=",
		"LOCAL_XDS_PATH=" + p.w.configFile(),
		"NODE_NAME=" + p.node.name,
		"CLUSTER_ID=Kubernetes",
		"LOG_FORMAT=json",
		"RUST_LOG=info",
		"CONNECTION_TERMINATION_DEADLINE=10s",
		"ZTUNNEL_WORKER_THREADS=2",
	}
	if o.peer {
		env = append(env, p.startIstiod()...)
	} else {
		env = append(env, "CA_PROVIDER=local", "CA_LOCAL_DIR="+p.w.caDir())
	}
	s := &proxy{process: p.start("ztunnel", append(env, o.env...), o.bin, "proxy"), pod: p, peer: o.peer}
	eventually(t, p.w.ctx, 20*time.Second, func() error {
		select {
		case <-s.done:
			t.Fatalf("%s has ended: %v", s.name, s.err)
		default:
		}
		_, err := p.get("http://127.0.0.1:15021/healthz/ready")
		return err
	})
	return s
}

func (w *world) caDir() string { return filepath.Join(w.dir, "ca") }

// startIstiod runs a certificate authority beside a proxy that can't read the
// directory of ours, over the same root, and returns the environment that
// leads there.
func (p *pod) startIstiod() []string {
	t := p.w.t
	t.Helper()
	root := filepath.Join(p.w.dir, p.name+"-istiod-root.pem")
	token := filepath.Join(p.w.dir, p.name+"-token")
	if err := os.WriteFile(token, []byte("token"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := p.start("istiod", nil, fakeIstiod(t), "--listen", "127.0.0.1:15012", "--dir", p.w.caDir(), "--root-out", root,
		"--default-identity", p.identity()) // a dedicated proxy asks for its own
	if _, err := s.find(p.w.ctx, 20*time.Second, func(line string) bool { return strings.Contains(line, "127.0.0.1:15012") }); err != nil {
		t.Fatalf("fakeistiod prints no address: %v", err)
	}
	return []string{"CA_ADDRESS=https://127.0.0.1:15012", "CA_ROOT_CA=" + root, "AUTH_TOKEN=" + token}
}

// buildDir is where TestMain lets programs be built.
var buildDir string

var builtIstiod = sync.OnceValues(func() (string, error) {
	path := filepath.Join(buildDir, "fakeistiod")
	ctx, cancel := context.WithTimeout(context.Background(), testTime)
	defer cancel()
	out, err := exec.CommandContext(ctx, "go", "build", "-o", path, "../../ca/catest/fakeistiod").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build fakeistiod: %w: %s", err, out)
	}
	return path, nil
})

func fakeIstiod(t *testing.T) string {
	t.Helper()
	if os.Getenv("ZTUNNEL_FAKEISTIOD") != "" {
		return binary(t, "ZTUNNEL_FAKEISTIOD")
	}
	path, err := builtIstiod()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// client speaks HTTP from inside the pod, past any proxy if it stays on
// 127.0.0.1.
func (p *pod) client() *http.Client {
	return &http.Client{
		Timeout: 10 * time.Second,
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
				return p.dial(ctx, addr)
			},
		},
	}
}

func (p *pod) dial(ctx context.Context, addr string) (net.Conn, error) {
	dst, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, err
	}
	return p.net.Dial(ctx, netip.Addr{}, dst)
}

// get returns the body of a 200.
func (p *pod) get(url string) (string, error) {
	resp, err := p.client().Get(url)
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

// metric sums the series of a sample whose labels include want. A sample
// without HELP and TYPE of its family does not count.
func (s *proxy) metric(name string, want map[string]string) (float64, error) {
	body, err := s.pod.get("http://127.0.0.1:15020/metrics")
	if err != nil {
		return 0, err
	}
	return metricSum(body, name, want)
}

var sampleLine = regexp.MustCompile(`^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)`)
var labelPair = regexp.MustCompile(`([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"`)

func metricSum(body, name string, want map[string]string) (float64, error) {
	family := strings.TrimSuffix(name, "_total")
	for _, meta := range []string{"# HELP ", "# TYPE "} {
		if !strings.Contains(body, "\n"+meta+family+" ") && !strings.HasPrefix(body, meta+family+" ") {
			return 0, fmt.Errorf("no %s%s", meta, family)
		}
	}
	var sum float64
	found := false
lines:
	for line := range strings.Lines(body) {
		m := sampleLine.FindStringSubmatch(line)
		if m == nil || m[1] != name {
			continue
		}
		labels := make(map[string]string)
		for _, pair := range labelPair.FindAllStringSubmatch(m[2], -1) {
			labels[pair[1]] = pair[2]
		}
		for k, v := range want {
			if labels[k] != v {
				continue lines
			}
		}
		v, err := strconv.ParseFloat(m[3], 64)
		if err != nil {
			return 0, fmt.Errorf("sample %q: %w", line, err)
		}
		sum += v
		found = true
	}
	if !found {
		return 0, fmt.Errorf("no sample of %s with %v", name, want)
	}
	return sum, nil
}

// expectMetrics waits until the four counters of one connection have the given
// values for a reporter: the check "M" of the row.
func (s *proxy) expectMetrics(ctx context.Context, reporter string, labels map[string]string, received, sent float64) {
	s.t.Helper()
	want := map[string]string{"reporter": reporter}
	for k, v := range labels {
		want[k] = v
	}
	for name, value := range map[string]float64{
		"istio_tcp_connections_opened_total": 1,
		"istio_tcp_connections_closed_total": 1,
		"istio_tcp_received_bytes_total":     received,
		"istio_tcp_sent_bytes_total":         sent,
	} {
		s.expectMetric(ctx, name, want, value)
	}
}

// expectMetric waits until the series with these labels sum up to value.
func (s *proxy) expectMetric(ctx context.Context, name string, labels map[string]string, value float64) {
	s.t.Helper()
	eventually(s.t, ctx, 10*time.Second, func() error {
		got, err := s.metric(name, labels)
		if err == nil && got != value {
			err = fmt.Errorf("%s of %s with %v: got %v, want %v", name, s.name, labels, got, value)
		}
		return err
	})
}
