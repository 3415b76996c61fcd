package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"io"

	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/net/http2"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/proxy/hbone"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/state"
)

// dialHook is a network whose Dial is another function.
type dialHook struct {
	netns.Network
	dial func(context.Context, netip.Addr, netip.AddrPort) (netns.Conn, error)
}

func (n dialHook) Dial(ctx context.Context, src netip.Addr, dst netip.AddrPort) (netns.Conn, error) {
	return n.dial(ctx, src, dst)
}

// D21 and §14.4: a panic ends one connection, which is counted and logged as any other.
func TestPanicEndsOneConnection(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		bare := m.add("bare", "10.0.3.2", uncaptured)
		server := m.add("server", "10.0.2.2", withConfig(func(c *Config) {
			c.Network = dialHook{c.Network, func(context.Context, netip.Addr, netip.AddrPort) (netns.Conn, error) { panic("injected") }}
		}))
		client := m.add("client", "10.0.1.2")
		for _, from := range []*node{bare, client} { // 15006 and 15008
			if err := from.request(server.echoAddr(), "x"); err == nil {
				t.Errorf("a request from %s whose handler panicked succeeded", from.w.Name)
			}
		}
		server.wantMetric(2, "istio_tcp_connections_opened", nil)
		server.wantMetric(2, "istio_tcp_connections_closed", map[string]string{"response_flags": "-"})
		if n := len(server.logs.find(map[string]string{"message": "connection complete", "level": "error", "error": "connection abandoned"})); n != 2 {
			t.Errorf("%d lines of abandoned connections, want 2", n)
		}
		server.wantMetric(1, "istio_panics", nil) // the other one is hbone's to count
		if c := server.proxy.Connections(); len(c.Inbound) != 0 {
			t.Errorf("still tracked: %+v", c.Inbound)
		}
	})
}

// Cases 88 and 90 of spec/faults.md: a connection to our own outbound listener
// by the pod's address ends at once.
func TestOwnAddressIsNoLoop(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		var dials atomic.Int64
		client := m.add("client", "10.0.1.2", withConfig(func(c *Config) {
			inner := c.Network
			c.Network = dialHook{inner, func(ctx context.Context, src netip.Addr, dst netip.AddrPort) (netns.Conn, error) {
				if dials.Add(1) > 10 {
					return nil, errors.New("that is a loop")
				}
				return inner.Dial(ctx, src, dst)
			}}
		}), withWorkload(func(w *state.Workload) { w.Protocol = state.TCP }))
		direct, err := client.host.Dial(m.ctx, netip.Addr{}, netip.AddrPortFrom(client.addr, 15001))
		if err != nil {
			t.Fatal(err)
		}
		defer direct.Close()
		captured := client.mustDial(netip.AddrPortFrom(client.addr, 15008))
		defer captured.Close()
		client.wantMetric(2, "istio_tcp_connections_rejected", map[string]string{"reporter": "source", "reason": "self_call"})
		if n := dials.Load(); n != 0 {
			t.Errorf("%d dials, want none", n)
		}
	})
}

// Cases 42 and 43: what fails between TLS and HTTP/2 is one line and one count.
func TestBadPreface(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		server := m.add("server", "10.0.2.2")
		config, err := ca.ClientTLS(m.svid("spiffe://cluster.local/ns/default/sa/client"), []spiffeid.ID{server.identity()}, ca.TLSOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for i, hello := range []string{"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "", http2.ClientPreface} {
			conn, _, err := m.dialer(server, config)(t.Context(), "")
			if err != nil {
				t.Fatal(err)
			}
			tc := tls.Client(conn, config)
			start := time.Now()
			_, _ = io.WriteString(tc, hello)
			_, _ = io.Copy(io.Discard, tc)
			conn.Close()
			if d := time.Since(start); d > 11*time.Second {
				t.Errorf("%q: held for %v", hello, d)
			}
			server.wantMetric(float64(i+1), "istio_tcp_connections_rejected", map[string]string{"reason": "preface"})
			if n := len(server.logs.find(map[string]string{"message": "connection failed"})); n != i+1 {
				t.Errorf("%q: %d lines so far, want %d", hello, n, i+1)
			}
		}
	})
}

// Case 51: connections that say nothing take no place, and one source address
// cannot take all of them.
func TestHandshakePlaces(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		server := m.add("server", "10.0.2.2") // four places
		client := m.add("client", "10.0.1.2")
		for range 20 {
			c, err := m.net.Host(netip.MustParseAddr("10.0.9.9")).Dial(t.Context(), netip.Addr{}, netip.AddrPortFrom(server.addr, 15008))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
		}
		synctest.Wait()
		if err := client.request(server.echoAddr(), "x"); err != nil {
			t.Errorf("a request beside silent connections: %v", err)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		h := newHandshakes(4) // one per source
		a, b := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
		leave, err := h.enter(t.Context(), a)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := h.enter(ctx, a); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "10.0.0.1") {
			t.Errorf("the second place of one source = %v, want a timeout that names it", err)
		}
		leaveB, err := h.enter(t.Context(), b)
		if err != nil {
			t.Fatal(err)
		}
		leave()
		leaveB()
		if len(h.sources) != 0 || len(h.places) != 0 {
			t.Errorf("left behind: %d sources, %d places", len(h.sources), len(h.places))
		}
	})
}

// A connection that still holds the workload of before a change of identity
// must not take the new certificate from the others.
func TestStaleWorkloadDoesNotMoveTheLease(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		client := m.add("client", "10.0.1.2")
		server := m.add("server", "10.0.2.2")
		if err := client.request(server.echoAddr(), "x"); err != nil {
			t.Fatal(err)
		}
		old, _ := client.store.Local(client.proxy.cfg.Local)
		other := *client.w
		other.ServiceAccount = "other"
		client.w = &other
		client.proxy.identity.mu.Lock()
		before := client.proxy.identity.lease
		client.proxy.identity.mu.Unlock()
		m.push() // the pod that we stand in for is gone from the store
		synctest.Wait()
		if _, err := client.proxy.svid(t.Context(), old); err != nil {
			t.Errorf("the lease of connections that are open: %v", err)
		}
		stale := *old
		stale.Identity = spiffeid.RequireFromString("spiffe://cluster.local/ns/default/sa/stale")
		if _, err := client.proxy.svid(t.Context(), &stale); err == nil {
			t.Error("a workload that the store does not have got a certificate")
		}
		client.proxy.identity.mu.Lock()
		defer client.proxy.identity.mu.Unlock()
		if client.proxy.identity.lease != before {
			t.Error("a stale workload moved the lease")
		}
	})
}

// D6: a client that gives up while we dial its destination has done nothing wrong.
func TestClientGivesUpDuringDial(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		server := m.add("server", "10.0.2.2")
		pool := m.handmade(server, m.svid("spiffe://cluster.local/ns/default/sa/client"))
		defer pool.Close()
		stream, err := pool.Open(t.Context(), "", "10.0.2.2:8080")
		if err != nil {
			t.Fatal(err)
		}
		defer stream.Close()
		m.net.Blackhole(server.addr, true)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err = pool.Open(ctx, "", "10.0.2.2:8081"); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("Open = %v, want a timeout", err)
		}
		server.wantLog(map[string]string{"message": "connection complete", "level": "info", "reset": "src", "dst.hbone_addr": "10.0.2.2:8081", "error": ""})
		server.wantMetric(0, "istio_tcp_connections_failed", nil)
	})
}

// Listen and Drain may come in any order; a drained proxy does not serve.
func TestListenAfterDrain(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		server := m.add("server", "10.0.2.2")
		cfg := server.proxy.cfg
		cfg.Network = m.net.Host(netip.MustParseAddr("10.0.7.7"))
		p, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Run(t.Context()); err == nil {
			t.Error("Run without Listen succeeded")
		}
		done := make(chan struct{})
		go func() { p.Drain(); close(done) }()
		_ = p.Listen(t.Context()) // before or after: the race detector looks
		<-done
		if err := p.Listen(t.Context()); !errors.Is(err, ErrDraining) {
			t.Errorf("Listen after Drain = %v, want %v", err, ErrDraining)
		}
	})
}

// Case 77: what a peer says of itself does not replace what we know of it.
func TestPeerCannotForgeItsLabels(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		server := m.add("server", "10.0.2.2")
		m.add("known", "10.0.9.1", uncaptured) // where the handmade client dials from
		pool := m.handmade(server, m.svid("spiffe://cluster.local/ns/default/sa/known"))
		defer pool.Close()
		stream, err := pool.Open(t.Context(), "", "10.0.2.2:8080", hbone.Field{Name: "x-forwarded-network", Value: "other"},
			hbone.Field{Name: "baggage", Value: "k8s.namespace.name=kube-system,k8s.pod.name=apiserver"})
		if err != nil {
			t.Fatal(err)
		}
		stream.Close()
		server.wantMetric(1, "istio_tcp_connections_opened", map[string]string{"source_workload": "known", "source_workload_namespace": "default"})
		server.wantMetric(0, "istio_tcp_connections_opened", map[string]string{"source_workload_namespace": "kube-system"})
	})
}

// A reset during a splice is charged to the side that sent it.
func TestSpliceReset(t *testing.T) {
	for range 20 {
		app, down := tcpPair(t)
		up, server := tcpPair(t)
		done := make(chan struct{})
		go func() {
			defer close(done)
			chunk := make([]byte, 64<<10)
			for {
				if _, err := app.Write(chunk); err != nil {
					return
				}
			}
		}()
		aborted := make(chan struct{})
		go func() {
			defer close(aborted)
			_, _ = io.CopyN(io.Discard, server, 3<<20)
			_ = server.Abort()
		}()
		var toUp, toDown atomic.Uint64
		if o := pipeTCP(t.Context(), down, up, &toUp, &toDown); o.reset != resetUpstream || o.err != nil {
			t.Fatalf("the destination reset, recorded as %q, %v", o.reset, o.err)
		}
		<-done
		<-aborted
		app.Close()
	}
}

// The dump names the endpoint that a connection really goes to, after a retry too.
func TestTrackAfterRetry(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		client := m.add("client", "10.0.1.2")
		key := state.NamespacedHostname{Namespace: "default", Hostname: "echo.default.svc.cluster.local"}
		ports := map[state.NamespacedHostname][]state.Port{key: {{Service: 80, Target: echoPort}}}
		good := m.add("good", "10.0.2.2")
		dead := m.add("dead", "10.0.3.2", uncaptured, withWorkload(func(w *state.Workload) { w.Protocol = state.HBONE }))
		good.services, dead.services = ports, ports
		m.push()
		for range 20 {
			c := client.mustDial(netip.MustParseAddrPort("10.96.0.1:80"))
			if err := roundTrip(c, "x"); err != nil {
				t.Fatal(err)
			}
			for _, o := range client.proxy.Connections().Outbound {
				if o.ActualDst.Addr() != good.addr {
					t.Errorf("a working connection is shown towards %v", o.ActualDst)
				}
			}
			c.Close()
			synctest.Wait()
		}
	})
}

// failingListener fails as often as it was told, as a process without file
// descriptors does, and then accepts.
type failingListener struct {
	netns.Listener
	left atomic.Int64
}

func (l *failingListener) Accept() (netns.Conn, error) {
	if l.left.Add(-1) >= 0 {
		return nil, syscall.EMFILE
	}
	return l.Listener.Accept()
}

// listenHook is a network whose outbound listener fails.
type listenHook struct {
	netns.Network
	failures int64
}

func (n listenHook) Listen(ctx context.Context, addr netip.AddrPort) (netns.Listener, error) {
	ln, err := n.Network.Listen(ctx, addr)
	if err != nil || addr.Port() != 15001 {
		return ln, err
	}
	l := &failingListener{Listener: ln}
	l.left.Store(n.failures)
	return l, nil
}

// §2.1 and weakness 6 of §19: accept errors are logged, back off, and do not end
// the listener.
func TestAcceptBacksOff(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		const failures = 12
		client := m.add("client", "10.0.1.2", withConfig(func(c *Config) { c.Network = listenHook{c.Network, failures} }))
		server := m.add("server", "10.0.2.2")
		start := time.Now()
		if err := client.request(server.echoAddr(), "hello"); err != nil {
			t.Fatal(err)
		}
		// 5, 10, 20 … 640 ms, then 1 s each, ±20 %: at least 4.2 s for twelve.
		if d := time.Since(start); d < 4*time.Second || d > 8*time.Second {
			t.Errorf("%d failures took %v, want the pauses of the back-off", failures, d)
		}
		if n := len(client.logs.find(map[string]string{"message": "accept failed", "level": "error"})); n != failures {
			t.Errorf("%d lines of failed accepts, want %d", n, failures)
		}
	})
}
