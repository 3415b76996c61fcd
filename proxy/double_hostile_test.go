package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/proxy/hbone"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/state"
)

// behind puts handle behind the gateway, in place of the server.
func (w *twoNetworks) behind(handle func(netns.Conn)) {
	at := netip.MustParseAddrPort("10.0.8.3:15008")
	w.serve(w.net.Host(at.Addr()), at, handle)
	w.gateway.next = to(at)
}

// innerTLS is the server's side of the inner handshake, and the client's preface.
func (w *twoNetworks) innerTLS(c netns.Conn) (*tls.Conn, error) {
	tc := tls.Server(c, ca.ServerTLS(w.root.SVID(w.t, catest.ID(serverID)), ca.TLSOptions{}))
	_, err := io.ReadFull(tc, make([]byte, len(http2.ClientPreface)))
	return tc, err
}

// wantNothingLeft asserts that the client has ended what it has opened.
func (w *twoNetworks) wantNothingLeft(opened float64) {
	w.t.Helper()
	time.Sleep(innerIdle + 2*time.Second)
	synctest.Wait()
	w.client.wantMetric(opened, "istio_tcp_connections_opened", nil)
	w.client.wantMetric(opened, "istio_tcp_connections_closed", nil)
	w.client.wantMetric(0, "istio_tcp_sockets_open", nil)
	if n := len(w.client.logs.find(map[string]string{"message": "connection complete"})); n != int(opened) {
		w.t.Errorf("%d complete lines, want %v", n, opened)
	}
	if o, i := w.client.proxy.pool.Stats(), w.client.proxy.inner.Stats(); o.Streams != 0 || i.Streams != 0 || i.Tunnels != 0 || i.Keys != 0 {
		w.t.Errorf("left: outer %+v, inner %+v", o, i)
	}
	if out := w.client.proxy.Connections().Outbound; len(out) != 0 {
		w.t.Errorf("tracked %v", out)
	}
}

// What stands behind a gateway can break every step of the inner tunnel. Each
// failure is bounded in time, told as an inner one, and leaves nothing behind.
func TestInnerPeerMisbehaves(t *testing.T) {
	drain := func(c io.Reader) { _, _ = io.Copy(io.Discard, c) }
	for _, tt := range []struct {
		name   string
		handle func(w *twoNetworks, c netns.Conn)
		text   string
		after  time.Duration
	}{
		{"no ServerHello", func(w *twoNetworks, c netns.Conn) { drain(c); c.Close() }, "inner tunnel: io error: tls handshake: ", 10 * time.Second},
		{"half-close at once", func(w *twoNetworks, c netns.Conn) { _ = c.CloseWrite(); drain(c); c.Close() }, "inner tunnel: io error: tls handshake: EOF", 0},
		{"garbage", func(w *twoNetworks, c netns.Conn) {
			_, _ = c.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n"))
			drain(c)
			c.Close()
		}, "inner tunnel: io error: tls handshake: ", 0},
		{"no SETTINGS", func(w *twoNetworks, c netns.Conn) {
			tc, _ := w.innerTLS(c)
			drain(tc)
			c.Close()
		}, "inner tunnel: http2 handshake failed: no SETTINGS from peer: context deadline exceeded", 10 * time.Second},
		{"gone before SETTINGS", func(w *twoNetworks, c netns.Conn) {
			_, _ = w.innerTLS(c)
			_ = c.Abort()
		}, "inner tunnel: http2 handshake failed: ", 0},
		{"flood of SETTINGS", func(w *twoNetworks, c netns.Conn) {
			tc, err := w.innerTLS(c)
			fr := http2.NewFramer(tc, tc)
			for err == nil {
				err = fr.WriteSettings()
			}
			c.Close()
		}, "inner tunnel: h2 failed: ", 0},
		{"no answer", func(w *twoNetworks, c netns.Conn) {
			tc, _ := w.innerTLS(c)
			_ = http2.NewFramer(tc, tc).WriteSettings()
			drain(tc)
			c.Close()
		}, "inner tunnel: h2 failed: no answer to CONNECT: context deadline exceeded", 20 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inMesh(t, func(t *testing.T, m *mesh) {
				w := m.twoNetworks()
				w.behind(func(c netns.Conn) { tt.handle(w, c) })
				start := time.Now()
				if err := w.client.request(remoteVIP, "x"); err == nil {
					t.Error("a request succeeded")
				}
				if d := time.Since(start); d != tt.after {
					t.Errorf("failed after %v, want %v", d, tt.after)
				}
				line := w.client.wantLog(map[string]string{"message": "connection complete", "level": "error"})
				if text, _ := line["error"].(string); !strings.HasPrefix(text, tt.text) {
					t.Errorf("error %q, want %q…", text, tt.text)
				}
				w.wantNothingLeft(1)
			})
		})
	}
}

// Of those who wait for an inner tunnel one gives up, and the gateway moves: the
// others get it.
func TestInnerDialIsShared(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		w := m.twoNetworks()
		server := netip.MustParseAddrPort("10.0.2.2:15008")
		release := make(chan struct{})
		w.behind(func(c netns.Conn) {
			<-release
			up, err := w.pod.host.Dial(m.ctx, netip.Addr{}, server)
			if err != nil {
				t.Error(err)
				return
			}
			join(c, up)
		})
		local, _ := w.client.store.Local(w.client.proxy.cfg.Local)
		route, err := w.client.proxy.route(m.ctx, state.Query{Source: local, SourceIP: w.client.addr, Dst: remoteVIP})
		if err != nil {
			t.Fatal(err)
		}
		first, leave := context.WithCancelCause(m.ctx)
		m.parts.Go(func() {
			if up, err := w.client.proxy.connect(first, w.client.at(1), local, route); up.stream != nil || !errors.Is(err, errClientReset) {
				t.Errorf("the first got %v, %v", up, err)
			}
		})
		synctest.Wait()
		conns := []netns.Conn{w.client.mustDial(remoteVIP), w.client.mustDial(remoteVIP)}
		synctest.Wait()
		leave(errClientReset)
		synctest.Wait()
		w.pod.w.UID = "cluster//Pod/istio-system/gateway-2"
		m.push()
		synctest.Wait()
		close(release)
		for _, c := range conns {
			if err := roundTrip(c, "hello"); err != nil {
				t.Errorf("%v\n%s", err, w.client.logs.text("access"))
			}
			c.Close()
		}
		w.wantDialled(2, 2)
		w.wantNothingLeft(2)
	})
}

// The outer tunnel dies in the middle of an inner handshake.
func TestOuterTunnelDiesDuringInnerHandshake(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		w := m.twoNetworks()
		w.behind(func(c netns.Conn) { _, _ = io.Copy(io.Discard, c); c.Close() })
		c := w.client.mustDial(remoteVIP)
		time.Sleep(time.Second)
		start := time.Now()
		w.gateway.stop()
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Error("the connection came about")
		}
		if d := time.Since(start); d != 0 {
			t.Errorf("told after %v", d)
		}
		c.Close()
		w.wantNothingLeft(1)
	})
}

// Two windows, one within the other: connections that are not read hold their
// own and nobody else's, and bulk flows both ways over the same inner tunnel.
func TestInnerWindows(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		w := m.twoNetworks()
		const firehose = 8081
		w.service.Ports = append(w.service.Ports, w.service.Ports[0])
		w.service.Ports[1].Service, w.service.Ports[1].Target = firehose, firehose
		w.server.services[w.service.Key()] = w.service.Ports
		m.push()
		m.serve(w.server.host, w.server.at(firehose), pour)
		stalled := make([]netns.Conn, 4)
		for i := range stalled {
			stalled[i] = w.client.mustDial(netip.AddrPortFrom(remoteVIP.Addr(), firehose))
		}
		pushing := w.client.mustDial(remoteVIP) // the echo waits for us to read
		var parts sync.WaitGroup
		parts.Go(func() {
			_, err := pushing.Write(make([]byte, 64<<20))
			if err == nil {
				t.Error("64 MiB fitted into nobody's hands")
			}
		})
		time.Sleep(time.Second)
		const size = 2 << 20
		for range 4 {
			c := w.client.mustDial(remoteVIP)
			parts.Go(func() {
				_, _ = c.Write(make([]byte, size))
				_ = c.CloseWrite()
			})
			if n, err := io.Copy(io.Discard, c); n != size || err != nil {
				t.Errorf("%d of %d bytes, %v", n, size, err)
			}
			c.Close()
		}
		for _, c := range append(stalled, pushing) {
			_ = c.Abort()
		}
		parts.Wait()
		w.wantNothingLeft(9)
	})
}

// An inner tunnel that goes while the outer one stays takes its outer stream with
// it, whichever side ends it.
func TestInnerEndsItsOuterStream(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		w := m.twoNetworks()
		var ends []netns.Conn
		server := netip.MustParseAddrPort("10.0.2.2:15008")
		w.behind(func(c netns.Conn) {
			ends = append(ends, c)
			up, err := w.pod.host.Dial(m.ctx, netip.Addr{}, server)
			if err != nil {
				t.Error(err)
				return
			}
			join(c, up)
		})
		held := w.hold()
		_ = ends[0].CloseWrite() // the gateway's backend half-closes in the middle of the inner tunnel
		if _, err := held.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("read %v, want a reset", err)
		}
		held.Close()
		w.wantNothingLeft(1)

		held = w.hold()
		w.client.proxy.inner.Abort(func(innerKey, *hbone.ConnInfo) bool { return true }, errMoved)
		if _, err := held.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("read %v, want a reset", err)
		}
		held.Close()
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if _, err := ends[1].Read(make([]byte, 1)); err == nil {
			t.Error("the gateway's backend still reads")
		}
		w.wantNothingLeft(2)
	})
}

// D8: while the network has another gateway, the failure of one does not cost the
// endpoint that was picked, which may be the nearest.
func TestOtherGatewayBeforeOtherEndpoint(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		w := m.twoNetworks()
		entry := &state.Service{
			Name: "gateway", Namespace: "istio-system", Hostname: "gateway.istio-system.svc.cluster.local",
			Ports: []state.Port{{Service: 15009, Target: 15009}}, VIPs: []state.NetworkAddress{{Network: "far", Addr: netip.MustParseAddr("10.97.0.1")}},
		}
		m.services = append(m.services, entry)
		w.service.LoadBalancer = &state.LoadBalancer{Mode: state.LoadBalanceFailover, Preferences: []state.Scope{state.ScopeRegion}}
		w.client.w.Locality.Region, w.server.w.Locality.Region = "here", "here"
		w.server.w.NetworkGateway = &state.GatewayAddress{Hostname: entry.Key(), Port: 15009}
		w.pod.services = map[state.NamespacedHostname][]state.Port{entry.Key(): entry.Ports}
		m.peer("10.0.8.2:15009", w.gatewaySVID, to(w.server.at(15008)))
		other := m.add("gateway-2", "10.0.8.2", uncaptured, inNetwork("far"), withWorkload(func(w *state.Workload) {
			w.Namespace, w.ServiceAccount, w.Protocol = "istio-system", "gateway", state.HBONE
		}))
		other.services = w.pod.services
		distant := m.certify("distant", "10.0.4.2", w.root, false, inNetwork("near"))
		distant.services = w.server.services
		m.push()
		w.gateway.stop()
		synctest.Wait()
		for range 20 {
			if err := w.client.request(remoteVIP, "hello"); err != nil {
				t.Fatalf("%v\n%s", err, w.client.logs.text("access"))
			}
		}
		w.client.wantMetric(20, "istio_tcp_connections_closed", map[string]string{"destination_workload": "server", "response_flags": "-"})
	})
}

// D8: another endpoint behind the gateway that has just failed is no second chance,
// and would cost the time of a second failure.
func TestSameGatewayIsNotTriedAgain(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		w := m.twoNetworks()
		second := m.certify("second", "10.0.2.3", w.root, false, inNetwork("far"), withWorkload(func(s *state.Workload) {
			s.NetworkGateway = w.server.w.NetworkGateway
		}))
		second.services = w.server.services
		m.push()
		m.net.Blackhole(w.gateway.at.Addr(), true)
		start := time.Now()
		if err := w.client.request(remoteVIP, "x"); err == nil {
			t.Error("a request succeeded")
		}
		if d := time.Since(start); d >= 15*time.Second {
			t.Errorf("failed after %v, want the time of one connect", d)
		}
		w.wantNothingLeft(1)
	})
}

// When Run has returned, the inner tunnels have ended, whatever was left of them,
// and no new ones can be made.
func TestRunEndsInnerTunnels(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		w := m.twoNetworks()
		held := w.hold()
		w.client.stop(ErrDraining)
		if s := w.client.proxy.inner.Stats(); s.Tunnels != 0 || s.Keys != 0 {
			t.Errorf("inner tunnels after Run: %+v", s)
		}
		if n := len(w.client.proxy.tunnels.list()); n != 0 {
			t.Errorf("%d tunnels are on record", n)
		}
		if _, err := w.client.proxy.inner.Open(m.ctx, innerKey{}, "a:1"); err != hbone.ErrPoolClosed { // one that is wrapped would come from dialling
			t.Errorf("Open after Run: %v, want ErrPoolClosed", err)
		}
		held.Close()
		w.client.wantMetric(1, "istio_tcp_connections_closed", map[string]string{"response_flags": "-"})
	})
}

// The bounds of stickiness hold whatever is configured for tunnels.
func TestInnerPoolBounds(t *testing.T) {
	for _, tt := range []struct {
		name      string
		cfg       Config
		streams   int
		idle, age time.Duration
	}{
		{"defaults", Config{}, innerMaxStreams, innerIdle, innerMaxAge},
		{"larger", Config{PoolMaxStreams: 1000, PoolIdle: time.Hour, PoolMaxAge: time.Hour}, innerMaxStreams, innerIdle, innerMaxAge},
		{"smaller", Config{PoolMaxStreams: 2, PoolIdle: time.Second, PoolMaxAge: 2 * time.Second}, 2, time.Second, 2 * time.Second},
		{"not kept", Config{PoolIdle: -1}, innerMaxStreams, -1, innerMaxAge},
	} {
		if c := innerPool(&tt.cfg, nil); c.MaxStreams != tt.streams || c.IdleTimeout != tt.idle || c.MaxAge != tt.age {
			t.Errorf("%s: %d streams, idle %v, age %v", tt.name, c.MaxStreams, c.IdleTimeout, c.MaxAge)
		}
	}
}

// D10 and two windows: while slow applications hold the budget, nobody gets more
// than a window, but what an inner tunnel itself has to say goes on.
func TestInnerTunnelOutlivesTightBudget(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		const firehose, window, readers = 8081, 256 << 10, 4
		budget := hbone.NewBudget(8 << 20)
		w := m.twoNetworks(withConfig(func(c *Config) {
			c.HBONE = hbone.Config{Budget: budget, InitialWindow: window, PingInterval: 10 * time.Second}
		}))
		w.service.Ports = append(w.service.Ports, state.Port{Service: firehose, Target: firehose})
		w.server.services[w.service.Key()] = w.service.Ports
		near := m.certify("near", "10.0.4.2", w.root, false, inNetwork("near"))
		m.push()
		var first atomic.Bool // the first connection only echoes
		m.serve(w.server.host, w.server.at(firehose), func(c netns.Conn) {
			if first.CompareAndSwap(false, true) {
				_, _ = io.Copy(c, c)
				c.Close()
				return
			}
			pour(c)
		})
		m.serve(near.host, near.at(firehose), pour)
		dst := netip.AddrPortFrom(remoteVIP.Addr(), firehose)
		held := w.client.mustDial(dst)
		if err := roundTrip(held, "held"); err != nil {
			t.Fatal(err)
		}
		var slow []netns.Conn
		for !budget.Tight() {
			slow = append(slow, w.client.mustDial(near.at(firehose)))
			time.Sleep(10 * time.Millisecond)
		}
		var reading sync.WaitGroup
		var conns [readers]netns.Conn
		for i := range conns {
			conns[i] = w.client.mustDial(dst)
			reading.Go(func() {
				if n, err := io.Copy(io.Discard, conns[i]); n != window {
					t.Errorf("read %d bytes, %v, want a window of %d", n, err, window)
				}
			})
		}
		time.Sleep(time.Minute)
		if !budget.Tight() {
			t.Error("the budget is not tight")
		}
		if err := roundTrip(held, "still"); err != nil {
			t.Errorf("beside it: %v\n%s", err, w.client.logs.text("access"))
		}
		w.wantDialled(2, 1)
		held.Close()
		for _, c := range append(conns[:], slow...) { // the readers first: the others make room for more
			_ = c.Abort()
		}
		reading.Wait()
		time.Sleep(innerIdle)
		synctest.Wait()
		if n := budget.Used(); n != 0 {
			t.Errorf("%d bytes of the budget are held by nobody", n)
		}
	})
}

// pour is an application that writes as long as it can.
func pour(c netns.Conn) {
	chunk := make([]byte, 64<<10)
	for {
		if _, err := c.Write(chunk); err != nil {
			c.Close()
			return
		}
	}
}
