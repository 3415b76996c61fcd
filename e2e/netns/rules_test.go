//go:build e2e

package netns

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"
)

// startApp runs the application "server" in the pod.
func (p *pod) startApp() *process {
	p.w.t.Helper()
	return p.startSelf("server")
}

// startSelf runs one of this binary's applications and waits for it.
func (p *pod) startSelf(mode string) *process {
	p.w.t.Helper()
	self, err := os.Executable()
	if err != nil {
		p.w.t.Fatal(err)
	}
	s := p.start(mode, []string{appEnv + "=" + mode}, self)
	if _, err := s.find(p.w.ctx, 10*time.Second, fields{"event": "ready"}.match); err != nil {
		p.w.t.Fatalf("%s: %v", mode, err)
	}
	return s
}

// curl is the real one.
func (p *pod) curl(args ...string) (string, error) {
	return command(p.w.ctx, "", p.in(append([]string{"curl", "-sS", "--max-time", "10"}, args...)...)...)
}

// expectHello asks the application "server" at dst for the address that it sees
// the client at.
func (p *pod) expectHello(want netip.Addr, dst netip.AddrPort) {
	p.w.t.Helper()
	got, err := p.curl(fmt.Sprintf("http://%v/", dst))
	if want := "hello " + want.String(); err != nil || strings.TrimSpace(got) != want {
		p.w.t.Errorf("curl %v: got %q, %v, want %q", dst, got, err, want)
	}
}

// TestRedirection checks namespaces, rules and sockets without a tunnel, so
// that a failure here says that the machine, not the proxy, is at fault.
func TestRedirection(t *testing.T) {
	for _, tc := range []struct{ client, server bool }{{false, false}, {true, false}, {false, true}, {true, true}} {
		t.Run(fmt.Sprintf("client=%v,server=%v", tc.client, tc.server), func(t *testing.T) {
			w := newWorld(t)
			client, server := w.addPod("client", 1), w.addPod("server", 2)
			server.startApp()
			for p, captured := range map[*pod]bool{client: tc.client, server: tc.server} {
				if captured {
					p.redirect()
					p.startSelf("relay")
				}
			}
			client.expectHello(client.addr, netip.AddrPortFrom(server.addr, httpPort))
			client.expectHello(client.addr6, netip.AddrPortFrom(server.addr6, httpPort))
		})
	}
}
