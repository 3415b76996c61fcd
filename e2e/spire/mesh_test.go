//go:build e2e

package spire

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/world"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
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

const greeting = "hello world"

// try is one new connection from the client's application to the server's.
func (m *mesh) try() error {
	c, err := m.Client.Net.Dial(m.Ctx, netip.Addr{}, m.Server.At(world.ChatPort))
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(15 * time.Second)); err != nil {
		return err
	}
	return world.Exchange(c, greeting, greeting)
}

// works waits until new connections work.
func (m *mesh) works() {
	m.T.Helper()
	world.Eventually(m.T, m.Ctx, 20*time.Second, m.try)
}

// refuses waits until new connections fail: by an end, not by silence.
func (m *mesh) refuses() {
	m.T.Helper()
	world.Eventually(m.T, m.Ctx, 20*time.Second, func() error {
		switch err := m.try(); {
		case err == nil:
			return errors.New("a connection works")
		case errors.Is(err, os.ErrDeadlineExceeded):
			return fmt.Errorf("a connection hangs: %w", err)
		}
		return nil
	})
}

// checkTraffic sends traffic and looks at what both proxies say of who spoke
// with whom.
func (m *mesh) checkTraffic() {
	t := m.T
	t.Helper()
	c := m.Dial(world.DoublePort)
	if err := world.Exchange(c, greeting, greeting+greeting); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	line := world.Fields{
		"message": "connection complete", "scope": "access", "error": "",
		"src.identity": m.Client.Identity(), "dst.identity": m.Server.Identity(),
		"dst.hbone_addr": m.Server.At(world.DoublePort).String(),
	}
	line["direction"] = "outbound"
	m.Source.Expect(m.Ctx, line)
	line["direction"] = "inbound"
	m.Dest.Expect(m.Ctx, line)
	labels := map[string]string{"connection_security_policy": "mutual_tls", "reporter": "destination", "source_principal": m.Client.Identity()}
	if n, err := m.Dest.Metric("istio_tcp_connections_opened_total", labels); err != nil || n == 0 {
		t.Errorf("no connection of %s is counted as mutual TLS: %v, %v", m.Client.Identity(), n, err)
	}
}

// fleet are connections that say something and hear it back, again and again.
type fleet struct {
	m     *mesh
	stop  chan struct{}
	tasks sync.WaitGroup

	mu     sync.Mutex // guards what follows
	rounds []int
	lost   []error
}

// openFleet opens n connections, which all live until checkFleet.
func (m *mesh) openFleet(n int, pause time.Duration) *fleet {
	m.T.Helper()
	f := &fleet{m: m, stop: make(chan struct{}), rounds: make([]int, n)}
	conns := make([]netns.Conn, n)
	for i := range conns {
		c, err := m.Client.Net.Dial(m.Ctx, netip.Addr{}, m.Server.At(world.ChatPort))
		if err != nil {
			m.T.Fatal(err)
		}
		m.T.Cleanup(func() { _ = c.Close() })
		conns[i] = c
	}
	for i, c := range conns {
		f.tasks.Go(func() { f.sail(i, c, pause) })
	}
	m.T.Cleanup(f.end)
	world.Eventually(m.T, m.Ctx, 30*time.Second, func() error { return f.heard(1) })
	return f
}

// sail is one connection.
func (f *fleet) sail(i int, c netns.Conn, pause time.Duration) {
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for n := 1; ; n++ {
		text := fmt.Sprintf("%d/%d.", i, n)
		err := c.SetDeadline(time.Now().Add(20 * time.Second))
		if err == nil {
			err = world.Exchange(c, text, text)
		}
		f.mu.Lock()
		if err != nil {
			f.lost = append(f.lost, fmt.Errorf("connection %d, message %d, at %s: %w", i, n, time.Now().UTC().Format(time.TimeOnly), err))
		} else {
			f.rounds[i] = n
		}
		f.mu.Unlock()
		if err != nil {
			return
		}
		select {
		case <-tick.C:
		case <-f.stop:
			return
		}
	}
}

// heard says whether every connection has had n answers, counted from the start,
// and none was lost.
func (f *fleet) heard(n int) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.lost) > 0 {
		return fmt.Errorf("%d of %d connections lost, first %w", len(f.lost), len(f.rounds), f.lost[0])
	}
	for i, r := range f.rounds {
		if r < n {
			return fmt.Errorf("connection %d has heard %d answers, want %d", i, r, n)
		}
	}
	return nil
}

// leastRounds is what the slowest connection has heard.
func (f *fleet) leastRounds() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	least := f.rounds[0]
	for _, r := range f.rounds {
		least = min(least, r)
	}
	return least
}

// check has every connection speak once more and fails the test if one was lost.
func (f *fleet) check() {
	f.m.T.Helper()
	world.Eventually(f.m.T, f.m.Ctx, 30*time.Second, func() error { return f.heard(f.leastRounds()) })
	goal := 0
	f.mu.Lock()
	for _, r := range f.rounds {
		goal = max(goal, r+1)
	}
	f.mu.Unlock()
	world.Eventually(f.m.T, f.m.Ctx, 30*time.Second, func() error { return f.heard(goal) })
}

// allLost waits until every connection has ended.
func (f *fleet) allLost(limit time.Duration) {
	f.m.T.Helper()
	world.Eventually(f.m.T, f.m.Ctx, limit, func() error {
		f.mu.Lock()
		defer f.mu.Unlock()
		if len(f.lost) < len(f.rounds) {
			return fmt.Errorf("%d of %d connections still live", len(f.rounds)-len(f.lost), len(f.rounds))
		}
		return nil
	})
}

func (f *fleet) end() {
	select {
	case <-f.stop:
	default:
		close(f.stop)
	}
	f.tasks.Wait()
}

// stream are new connections, one after the other, at a bounded rate.
type arrivals struct {
	m    *mesh
	stop chan struct{}
	done chan struct{}

	mu     sync.Mutex // guards what follows
	number int
	failed []error
}

// arrive begins.
func (m *mesh) arrive(pause time.Duration) *arrivals {
	a := &arrivals{m: m, stop: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(a.done)
		tick := time.NewTicker(pause)
		defer tick.Stop()
		for {
			err := m.try()
			a.mu.Lock()
			a.number++
			if err != nil {
				a.failed = append(a.failed, fmt.Errorf("connection %d, at %s: %w", a.number, time.Now().UTC().Format(time.TimeOnly), err))
			}
			a.mu.Unlock()
			select {
			case <-tick.C:
			case <-a.stop:
				return
			}
		}
	}()
	m.T.Cleanup(func() { _ = a.end() })
	return a
}

func (a *arrivals) end() int {
	select {
	case <-a.stop:
	default:
		close(a.stop)
	}
	<-a.done
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.number
}

// check ends the arrivals and fails the test if one did not work.
func (a *arrivals) check() {
	a.m.T.Helper()
	n := a.end()
	if len(a.failed) > 0 {
		a.m.T.Errorf("%d of %d new connections failed, first %v", len(a.failed), n, a.failed[0])
	}
	a.m.T.Logf("%d new connections, all good", n-len(a.failed))
}
