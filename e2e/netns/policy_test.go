//go:build e2e

package netns

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/world"
)

const denyChat = `- name: deny-chat
  namespace: default
  scope: Namespace
  action: Deny
  dryRun: false
  rules:
  - - - destinationPorts: [8084]
`

// A policy that comes while a connection is open ends it with a reset; new ones
// get 401 until the policy is gone.
func TestPolicyChange(t *testing.T) { in(t, []mode{dedicated, shared}, checkPolicyChange) }

func checkPolicyChange(t *testing.T, m mode) {
	p := newPair(t, m.pair(world.BothCaptured))
	c := p.Dial(world.ChatPort)
	if err := world.Exchange(c, "before", "before"); err != nil {
		t.Fatal(err)
	}
	p.Policies = denyChat
	p.WriteConfig()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("open connection: got %v, want %v", err, syscall.ECONNRESET)
	}
	p.Dest.Expect(p.Ctx, world.Fields{"message": "connection complete", "direction": "inbound", "error": "connection closed due to policy change"})

	c = p.Dial(world.ChatPort)
	if err := world.Exchange(c, "denied", "denied"); err == nil {
		t.Error("a denied connection works")
	}
	p.Dest.Expect(p.Ctx, world.Fields{
		"message": "connection complete", "direction": "inbound",
		"error": "connection closed due to policy rejection: explicitly denied by: default/deny-chat",
	})
	p.Source.Expect(p.Ctx, world.Fields{"message": "connection complete", "direction": "outbound", "error": "http status: 401 Unauthorized"})
	// Another port is not meant.
	if c := p.Dial(world.DoublePort); world.Exchange(c, greeting, greeting+greeting) != nil {
		t.Error("the policy denies another port")
	}

	p.Policies = ""
	p.WriteConfig()
	world.Eventually(t, p.Ctx, 10*time.Second, func() error { return world.Exchange(p.Dial(world.ChatPort), "again", "again") })
}

// Policies hold for plaintext too, where the source has no identity.
func TestPolicyPlaintext(t *testing.T) { in(t, allModes, checkPolicyPlaintext) }

func checkPolicyPlaintext(t *testing.T, m mode) {
	p := newPair(t, m.pair(world.PairOptions{CaptureServ: true, Policies: denyChat}))
	if err := world.Exchange(p.Dial(world.ChatPort), "denied", "denied"); err == nil {
		t.Error("a denied connection works")
	}
	if err := world.Exchange(p.Dial(world.DoublePort), greeting, greeting+greeting); err != nil {
		t.Error(err)
	}
	p.Dest.Expect(p.Ctx, world.Fields{
		"message": "connection complete", "direction": "inbound",
		"error": "connection closed due to policy rejection: explicitly denied by: default/deny-chat",
	})
}

const allowPrincipal = `- name: allow-other
  namespace: default
  scope: Namespace
  action: Allow
  dryRun: false
  rules:
  - - - principals: [!Exact "%s"]
`

const strangerID = "spiffe://cluster.local/ns/istio-system/sa/ztunnel"

// N-19: a client made by hand meets an ALLOW policy that is not for it.
// Principals are written without a scheme: one that has it matches nobody.
func TestDP_N19_Policy(t *testing.T) { inBoth(t, checkPrincipals) }

func checkPrincipals(t *testing.T, dest world.ProxyOptions) {
	const allowed = "cluster.local/ns/default/sa/other"
	for _, tc := range []struct {
		name, principal, id string
		want                int
	}{
		{"not the client's", allowed, strangerID, 401},
		{"the client's", allowed, "spiffe://" + allowed, 200},
		{"with scheme", "spiffe://" + allowed, "spiffe://" + allowed, 401},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := newPair(t, world.PairOptions{CaptureServ: true, Dest: dest, Policies: fmt.Sprintf(allowPrincipal, tc.principal)})
			expectStatus(t, p.Client, p.Server, tc.id, p.Server.At(world.ChatPort).String(), tc.want)
			if tc.want == 401 {
				p.Dest.Expect(p.Ctx, world.Fields{
					"error":        "connection closed due to policy rejection: allow policies exist, but none allowed",
					"src.identity": tc.id,
				})
			}
		})
	}
}

// D11: ten thousand denied connections over one tunnel are no flood; a stream
// beside them is not harmed.
func TestD11_ManyDenied(t *testing.T) {
	t.Parallel()
	o := world.BothCaptured
	o.Policies = denyChat
	newPair(t, o).checkManyDenied()
}

func (p *pair) checkManyDenied() {
	t := p.T
	t.Helper()
	canary := p.Dial(world.DoublePort)
	if err := world.Exchange(canary, greeting, greeting+greeting); err != nil {
		t.Fatal(err)
	}
	const clients, each = 20, 500
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			for range each {
				c, err := p.Client.Net.Dial(p.Ctx, netip.Addr{}, p.Server.At(world.ChatPort))
				if err != nil {
					t.Errorf("dial: %v", err)
					return
				}
				_ = c.SetDeadline(time.Now().Add(20 * time.Second))
				err = world.Exchange(c, "denied", "denied")
				c.Close()
				if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("a denied connection: %v, want its end", err)
					return
				}
			}
		})
	}
	wg.Wait()
	if err := world.Exchange(canary, greeting, greeting+greeting); err != nil {
		t.Errorf("the stream beside them: %v", err)
	}
	p.Dest.ExpectMetric(p.Ctx, "istio_tcp_connections_failed_total", map[string]string{"response_flags": "DENY"}, clients*each)
}

// N-20: the authority names another pod.
func TestDP_N20_IPMismatch(t *testing.T) {
	in(t, allModes, func(t *testing.T, m mode) { newPair(t, m.pair(world.PairOptions{CaptureServ: true})).checkIPMismatch() })
}

func (p *pair) checkIPMismatch() {
	p.T.Helper()
	expectStatus(p.T, p.Client, p.Server, strangerID, p.Client.At(world.ChatPort).String(), 400)
	p.Dest.Expect(p.Ctx, world.Fields{"error": fmt.Sprintf("ip mismatch: %v != %v", p.Server.Addr, p.Client.Addr)})
	expectStatus(p.T, p.Client, p.Server, strangerID, p.Server.At(world.ChatPort).String(), 200)
}

// N-24, E2-02: a certificate of another trust domain, though of the same root.
func TestDP_N24_TrustDomain(t *testing.T) {
	in(t, []mode{dedicated, shared}, func(t *testing.T, m mode) {
		newPair(t, m.pair(world.PairOptions{CaptureServ: true})).checkTrustDomain()
	})
}

func (p *pair) checkTrustDomain() {
	p.T.Helper()
	tun, err := openTunnel(p.Client, p.Server, "spiffe://other.domain/ns/default/sa/client")
	if err == nil { // TLS 1.3: the client is done before the server has judged
		var status int
		if status, err = tun.connect(p.Server.At(world.ChatPort).String()); err == nil {
			p.T.Errorf("got status %d, want a refused handshake", status)
		}
	}
	// A write after the reset is EPIPE.
	reset := errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, io.EOF)
	if err != nil && !strings.Contains(err.Error(), "tls:") && !reset {
		p.T.Errorf("got %v, want a TLS alert or a reset", err)
	}
}

// faults rows 84 to 87: what a peer with a valid certificate may not reach.
func TestFault84_87_ForbiddenAuthorities(t *testing.T) { in(t, allModes, checkForbidden) }

func checkForbidden(t *testing.T, m mode) {
	p := newPair(t, m.pair(world.PairOptions{CaptureServ: true}))
	for _, host := range []string{
		"127.0.0.1", "[::1]", "0.0.0.0", "[::]", "[::ffff:127.0.0.1]", "127.0.0.53",
		"169.254.169.254", "[fe80::1]", "[fd00:ec2::254]", "172.172.0.2", "10.0.2.1", "10.96.0.1",
		"224.0.0.1", "255.255.255.255", "240.0.0.1", p.Client.Addr.String(),
	} {
		for _, port := range []int{world.ChatPort, 15000} {
			expectStatus(t, p.Client, p.Server, strangerID, fmt.Sprintf("%s:%d", host, port), 400)
		}
	}
	// Ports of the proxy itself are refused before connecting, what listens on
	// 127.0.0.1 only is refused by the kernel.
	for _, port := range []uint16{15001, 15006, 15008, 15000, 15053, 15080} {
		expectStatus(t, p.Client, p.Server, strangerID, p.Server.At(port).String(), 503)
	}
}

// N-23 in dedicated mode, where a proxy and its ports are in the pod itself.
func TestDP_N23_MaliciousCalls(t *testing.T) {
	t.Parallel()
	w := world.New(t)
	captured, other, plain := w.AddPod("captured", 1), w.AddPod("other", 2), w.AddPod("plain", 1)
	for _, p := range []*world.Pod{captured, other} {
		p.Redirect()
	}
	w.WriteConfig()
	for _, p := range []*world.Pod{captured, other} {
		p.StartProxy(world.ProxyOptions{})
	}
	checkPorts(t, []portRow{
		{"captured pod to itself", captured, captured.Addr, "RRRCCHHC"},
		{"captured pod to 127.0.0.1", captured, netip.MustParseAddr("127.0.0.1"), "RRRCHHHR"},
		{"captured pod to another captured pod", captured, other.Addr, "RRRRRHHR"},
		{"uncaptured pod to captured pod", plain, captured.Addr, "RRRRRHHR"},
		{"captured pod to uncaptured pod", captured, plain.Addr, "RRRRRRRR"},
	})
}

func probe(p *world.Pod, dst netip.AddrPort) byte {
	c, err := p.Net.Dial(p.W.Ctx, netip.Addr{}, dst)
	if err != nil {
		return 'C'
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.WriteString(c, "nonsense\r\n\r\n"); err != nil {
		return 'R'
	}
	buf := make([]byte, 16)
	n, _ := io.ReadFull(c, buf)
	if strings.HasPrefix(string(buf[:n]), "HTTP/1.1 400") {
		return 'H'
	}
	if n > 0 && buf[0] != 0x15 { // a TLS alert is a refusal
		return '?'
	}
	return 'R'
}
