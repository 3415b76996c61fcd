//go:build e2e

package spire

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/world"
)

// mesh is a world.Pair with a SPIRE agent on each of its nodes. It has no
// proxies until a test launches them.
type mesh struct {
	*world.Pair
	client, server *side
}

// side is one node: its pod, its agent, and its own copy of the binary, by whose
// path the agent tells the proxy.
type side struct {
	*agent
	m   *mesh
	pod *world.Pod
	uid string
	bin string
}

// meshOptions are what tests vary.
type meshOptions struct {
	agent agentOptions                    // of both nodes
	other func() (*server, error)         // server of the server's node; nil: the mesh's
	pods  func(client, server *world.Pod) // changes what the configuration says of them
}

func newMesh(t *testing.T, o meshOptions) *mesh {
	t.Helper()
	t.Parallel()
	serverOf := map[string]*server{"client": needServer(t, meshServer)}
	serverOf["server"] = serverOf["client"]
	if o.other != nil {
		serverOf["server"] = needServer(t, o.other)
	}
	m := &mesh{Pair: world.NewPods(t, world.BothCaptured)}
	m.Server.TrustDomain = serverOf["server"].domain
	if o.pods != nil {
		o.pods(m.Client, m.Server)
	}
	m.WriteConfig()
	m.client, m.server = m.side(m.Client), m.side(m.Server)
	for _, s := range []*side{m.client, m.server} {
		s.agent = newAgent(t, serverOf[s.pod.Name], o.agent)
		s.kubelet.set(podFacts{namespace: s.pod.Namespace, name: s.pod.Name, uid: s.uid, serviceAccount: s.pod.SA})
	}
	return m
}

func (m *mesh) side(p *world.Pod) *side {
	m.T.Helper()
	s := &side{m: m, pod: p, uid: fmt.Sprintf("0d4f2c1e-7c1b-4a50-8000-%012x", p.Node.Num)}
	dir, err := world.Dir()
	if err != nil {
		m.T.Fatal(err)
	}
	s.bin = filepath.Join(dir, "ztunnel")
	copyFile(m.T, world.Binary(m.T, "ZTUNNEL_BIN"), s.bin)
	return s
}

func (m *mesh) sides() []*side { return []*side{m.client, m.server} }

// proxySelectors are those of the proxy of the node.
func (s *side) proxySelectors() []string { return []string{"unix:uid:0", "unix:path:" + s.bin} }

// podSelectors are those of the workload, as the k8s attestor has them.
func (s *side) podSelectors() []string {
	return []string{"k8s:ns:" + s.pod.Namespace, "k8s:sa:" + s.pod.SA, "k8s:pod-uid:" + s.uid}
}

// proxyEntry registers the proxy itself, as delegate or broker.
func (s *side) proxyEntry() entry {
	return entry{path: proxyPath, selectors: s.proxySelectors()}
}

// podEntry registers the workload.
func (s *side) podEntry() entry {
	return entry{path: "/ns/" + s.pod.Namespace + "/sa/" + s.pod.SA, selectors: s.podSelectors()}
}

// entries registers the proxies and the workloads of both nodes.
func (m *mesh) entries() {
	m.T.Helper()
	for _, s := range m.sides() {
		s.entry(s.proxyEntry())
		s.entry(s.podEntry())
	}
}

// delegated is the environment of the Delegated Identity API.
func (s *side) delegated(env ...string) []string {
	return append([]string{
		"CA_PROVIDER=spire-delegated", "SPIRE_ADMIN_ENDPOINT_SOCKET=unix://" + s.adminSocket(),
		"POD_UID=" + s.uid, "DEFAULT_TRUST_DOMAIN=" + s.domain,
	}, env...)
}

// broker is the environment of the SPIFFE Broker API.
func (s *side) broker(env ...string) []string {
	return append([]string{
		"CA_PROVIDER=spire-broker", "SPIFFE_BROKER_SOCKET=" + s.brokerSocket(),
		"SPIFFE_BROKER_WORKLOAD_API_SOCKET=" + s.workloadSocket(),
		"SPIFFE_BROKER_WORKLOAD_API_SPIFFE_ID=spiffe://" + s.domain + proxyPath,
		"POD_UID=" + s.uid, "DEFAULT_TRUST_DOMAIN=" + s.domain,
	}, env...)
}

// workload is the environment of the Workload API.
func (s *side) workload(env ...string) []string {
	return append([]string{
		"CA_PROVIDER=spire-workload", "SPIFFE_ENDPOINT_SOCKET=unix://" + s.workloadSocket(), "DEFAULT_TRUST_DOMAIN=" + s.domain,
	}, env...)
}

// selfEntry registers the proxy as its workload: what the Workload API gives.
func (s *side) selfEntry() entry {
	e := s.podEntry()
	e.selectors = s.proxySelectors()
	return e
}

// launch starts the proxy of the node and waits until its data path stands,
// which does not say that it has a certificate.
func (s *side) launch(env []string) *world.Proxy {
	s.m.T.Helper()
	p := s.pod.StartProxy(world.ProxyOptions{Bin: s.bin, Credentials: func(*world.Pod) []string { return env }})
	if s == s.m.client {
		s.m.Source = p
	} else {
		s.m.Dest = p
	}
	return p
}

// proxy is the one that was launched last.
func (s *side) proxy() *world.Proxy {
	if s == s.m.client {
		return s.m.Source
	}
	return s.m.Dest
}

// launchDelegated starts both proxies and waits for their certificates.
func (m *mesh) launchDelegated(env ...string) {
	m.T.Helper()
	m.launch((*side).delegated, env...)
	m.awaitAvailable()
}

// launch starts both proxies on one provider.
func (m *mesh) launch(provider func(*side, ...string) []string, env ...string) {
	m.T.Helper()
	for _, s := range m.sides() {
		s.launch(provider(s, env...))
	}
}

// checkProvider looks at who issued the certificates, and whose roots are
// believed: those of SPIRE alone.
func (m *mesh) checkProvider(name string) {
	m.T.Helper()
	for _, s := range m.sides() {
		if c := s.await("Available", ""); c.Provider != name || c.roots != 1 {
			m.T.Errorf("%s: provider %s with %d roots, want %s with 1", c.Identity, c.Provider, c.roots, name)
		}
	}
}

func (m *mesh) awaitAvailable() {
	m.T.Helper()
	for _, s := range m.sides() {
		s.await("Available", "")
	}
}

// certificate is what the proxy says of one.
type certificate struct {
	Identity string
	State    string // the first word of it
	Reason   string // the rest, and the latest error
	Serial   string
	NotAfter time.Time
	Provider string
	roots    int
}

// certificates asks `ztunnel certs -o json`, and the dump for what stands only
// there.
func (s *side) certificates() ([]certificate, error) {
	out, err := world.Command(s.m.Ctx, "", s.pod.In(s.bin, "certs", "-o", "json")...)
	if err != nil {
		return nil, err
	}
	var list []struct {
		Identity, State string
		CertChain       []struct {
			SerialNumber   string
			ExpirationTime time.Time
		}
		RootCerts []json.RawMessage
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		return nil, fmt.Errorf("certs -o json: %w: %s", err, out)
	}
	dump, err := s.pod.Get("http://127.0.0.1:15000/config_dump")
	if err != nil {
		return nil, err
	}
	var ours struct {
		ZtunnelGo struct {
			Certificates []struct{ Identity, Provider, LastError string }
		}
	}
	if err := json.Unmarshal([]byte(dump), &ours); err != nil {
		return nil, fmt.Errorf("config_dump: %w", err)
	}
	var certs []certificate
	for i, l := range list {
		c := certificate{Identity: l.Identity, roots: len(l.RootCerts)}
		c.State, c.Reason, _ = strings.Cut(l.State, ":")
		if len(l.CertChain) > 0 {
			c.Serial, c.NotAfter = l.CertChain[0].SerialNumber, l.CertChain[0].ExpirationTime
		}
		if o := ours.ZtunnelGo.Certificates; i < len(o) && o[i].Identity == l.Identity {
			c.Provider = o[i].Provider
			c.Reason = strings.TrimSpace(c.Reason + " " + o[i].LastError)
		}
		certs = append(certs, c)
	}
	return certs, nil
}

// own is the certificate of the side's workload.
func (s *side) own() (certificate, error) {
	certs, err := s.certificates()
	if err != nil {
		return certificate{}, err
	}
	for _, c := range certs {
		if c.Identity == s.pod.Identity() {
			return c, nil
		}
	}
	return certificate{}, fmt.Errorf("no certificate of %s among %+v", s.pod.Identity(), certs)
}

// await waits until the workload's certificate is in a state, with a reason.
func (s *side) await(state, reason string) certificate {
	s.m.T.Helper()
	return s.awaitWithin(25*time.Second, state, reason)
}

func (s *side) awaitWithin(limit time.Duration, state, reason string) (c certificate) {
	s.m.T.Helper()
	world.Eventually(s.m.T, s.m.Ctx, limit, func() (err error) {
		if c, err = s.own(); err != nil {
			return err
		}
		if c.State != state || !strings.Contains(c.Reason, reason) {
			return fmt.Errorf("%s of %s: got %s (%s), want %s (…%s…)", c.Identity, s.proxy().Name, c.State, c.Reason, state, reason)
		}
		return nil
	})
	return c
}

// awaitReason waits for a reason, whatever the state.
func (s *side) awaitReason(reason string) {
	s.m.T.Helper()
	world.Eventually(s.m.T, s.m.Ctx, 20*time.Second, func() error {
		c, err := s.own()
		if err == nil && (c.State == "Available" || !strings.Contains(c.Reason, reason)) {
			err = fmt.Errorf("%s of %s: %s (%s), want …%s…", c.Identity, s.proxy().Name, c.State, c.Reason, reason)
		}
		return err
	})
}

// awaitMetric waits until the series with these labels sum up to least or more.
func (s *side) awaitMetric(name string, labels map[string]string, least float64) {
	s.m.T.Helper()
	world.Eventually(s.m.T, s.m.Ctx, 10*time.Second, func() error {
		got, err := s.proxy().Metric(name, labels)
		if err == nil && got < least {
			err = fmt.Errorf("%s of %s with %v: got %v, want at least %v", name, s.proxy().Name, labels, got, least)
		}
		return err
	})
}

// awaitRenewal waits for another certificate than the one with this serial.
func (s *side) awaitRenewal(limit time.Duration, serial string) (c certificate) {
	s.m.T.Helper()
	world.Eventually(s.m.T, s.m.Ctx, limit, func() (err error) {
		if c, err = s.own(); err != nil {
			return err
		}
		if c.State != "Available" || c.Serial == serial {
			return fmt.Errorf("%s of %s: %s with serial %s, want another than %s (%s)", c.Identity, s.proxy().Name, c.State, c.Serial, serial, c.Reason)
		}
		return nil
	})
	return c
}

// awaitWarning waits for a line of the proxy that tells the operator something.
func (s *side) awaitWarning(text string) {
	s.m.T.Helper()
	_, err := s.proxy().Find(s.m.Ctx, 15*time.Second, func(line string) bool {
		return strings.Contains(line, `"level":"warn"`) && strings.Contains(line, text)
	})
	if err != nil {
		s.m.T.Errorf("%s warned of nothing with %q: %v", s.proxy().Name, text, err)
	}
}
