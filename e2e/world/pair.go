//go:build e2e

package world

import (
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/cni/rules"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/xds/xdstest"
)

// Pair is a client and a server pod with the application "server" and, where
// captured, a proxy.
type Pair struct {
	*World
	Client, Server   *Pod
	Source, Dest     *Proxy // nil = uncaptured
	App              *Process
	OtherImplemented bool // a peer takes part
}

// PairOptions are what tests vary.
type PairOptions struct {
	SameNode                   bool
	CaptureClient, CaptureServ bool
	Source, Dest               ProxyOptions
	Policies                   string
	Rules                      rules.Config // of the captured ones

	Personality xdstest.Personality // as World.Personality
	XDSSocket   bool                // as World.XDSSocket
}

// BothCaptured is the pair with a tunnel between its pods.
var BothCaptured = PairOptions{CaptureClient: true, CaptureServ: true}

// NewPair makes a world with the two pods and waits until all is ready.
func NewPair(t *testing.T, o PairOptions) *Pair {
	t.Helper()
	p := NewPods(t, o)
	p.WriteConfig()
	if o.Source.XDS || o.Dest.XDS {
		p.PublishPods()
	}
	if o.CaptureServ {
		p.Dest = p.Server.StartProxy(o.Dest)
	}
	if o.CaptureClient {
		p.Source = p.Client.StartProxy(o.Source)
	}
	return p
}

// NewPods makes the pair without its proxies and their configuration.
func NewPods(t *testing.T, o PairOptions) *Pair {
	t.Helper()
	p := &Pair{World: New(t), OtherImplemented: o.Source.Peer || o.Dest.Peer}
	p.Policies = o.Policies
	p.Personality, p.XDSSocket = o.Personality, o.XDSSocket
	p.Client = p.AddPod("client", 1)
	serverNode := 2
	if o.SameNode {
		serverNode = 1
	}
	p.Server = p.AddPod("server", serverNode)
	p.App = p.Server.StartApp()
	if o.CaptureClient {
		p.Client.RedirectBy(o.Rules)
	}
	if o.CaptureServ {
		p.Server.RedirectBy(o.Rules)
	}
	return p
}

// Dial connects an application in the client pod to a port of the server, for
// 20 s.
func (p *Pair) Dial(port uint16) netns.Conn {
	p.T.Helper()
	c, err := p.Client.Net.Dial(p.Ctx, netip.Addr{}, p.Server.At(port))
	if err != nil {
		p.T.Fatal(err)
	}
	p.T.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		p.T.Fatal(err)
	}
	return c
}

// Exchange connects an application in the pod to dst for one message and its
// answer.
func (p *Pod) Exchange(dst netip.AddrPort, send, want string) {
	t := p.W.T
	t.Helper()
	c, err := p.Net.Dial(p.W.Ctx, netip.Addr{}, dst)
	if err != nil {
		t.Fatalf("%s to %v: %v", p.Name, dst, err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if err := Exchange(c, send, want); err != nil {
		t.Fatalf("%s to %v: %v", p.Name, dst, err)
	}
}

// Exchange sends and expects an answer.
func Exchange(c netns.Conn, send, want string) error {
	if _, err := io.WriteString(c, send); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	buf := make([]byte, len(want))
	if n, err := io.ReadFull(c, buf); err != nil {
		return fmt.Errorf("receive: %w after %d bytes", err, n)
	}
	if string(buf) != want {
		return fmt.Errorf("got %q, want %q", buf, want)
	}
	return nil
}

// StartApp runs the application "server" in the pod.
func (p *Pod) StartApp() *Process {
	p.W.T.Helper()
	return p.startSelf("server")
}

// StartRelay runs what stands in for a proxy where the namespaces and the rules
// are themselves under test.
func (p *Pod) StartRelay() *Process {
	p.W.T.Helper()
	return p.startSelf("relay")
}

// startSelf runs one of this binary's applications and waits for it.
func (p *Pod) startSelf(mode string) *Process {
	p.W.T.Helper()
	self, err := os.Executable()
	if err != nil {
		p.W.T.Fatal(err)
	}
	s := p.Start(mode, []string{appEnv + "=" + mode}, self)
	if _, err := s.Find(p.W.Ctx, 10*time.Second, Fields{"event": "ready"}.Match); err != nil {
		p.W.T.Fatalf("%s: %v", mode, err)
	}
	return s
}

// Curl is the real one.
func (p *Pod) Curl(args ...string) (string, error) {
	return Command(p.W.Ctx, "", p.In(append([]string{"curl", "-sS", "--max-time", "10"}, args...)...)...)
}

// ExpectHello asks the application "server" at dst for the address that it sees
// the client at.
func (p *Pod) ExpectHello(want netip.Addr, dst netip.AddrPort) {
	p.W.T.Helper()
	got, err := p.Curl(fmt.Sprintf("http://%v/", dst))
	if want := "hello " + want.String(); err != nil || strings.TrimSpace(got) != want {
		p.W.T.Errorf("curl %v: got %q, %v, want %q", dst, got, err, want)
	}
}
