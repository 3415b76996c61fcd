package proxy

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"

	"github.com/ztunnel-go/ztunnel/proxy/hbone"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/state"
)

const tunnelPort = 15088

// readProxyHeader is what an application behind an application tunnel does first.
func readProxyHeader(r io.Reader) (src, dst netip.AddrPort, identity string, err error) {
	head := make([]byte, 16)
	if _, err := io.ReadFull(r, head); err != nil {
		return src, dst, "", err
	}
	if string(head[:12]) != proxySignature || head[12] != 0x21 {
		return src, dst, "", fmt.Errorf("not a PROXY header: %x", head)
	}
	body := make([]byte, binary.BigEndian.Uint16(head[14:]))
	if _, err := io.ReadFull(r, body); err != nil {
		return src, dst, "", err
	}
	if size := map[byte]int{0x11: 4, 0x21: 16}[head[13]]; size > 0 {
		a, _ := netip.AddrFromSlice(body[:size])
		b, _ := netip.AddrFromSlice(body[size : 2*size])
		ports := body[2*size:]
		src, dst = netip.AddrPortFrom(a, binary.BigEndian.Uint16(ports)), netip.AddrPortFrom(b, binary.BigEndian.Uint16(ports[2:]))
		body = ports[4:]
	}
	if len(body) >= 3 && body[0] == 0xd0 && len(body) == 3+int(binary.BigEndian.Uint16(body[1:])) {
		identity = string(body[3:])
	}
	return src, dst, identity, nil
}

// join forwards both directions of two connections until both have ended.
func join(a, b netns.Conn) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(a, b)
		_ = a.CloseWrite()
	}()
	_, _ = io.Copy(b, a)
	_ = b.CloseWrite()
	<-done
	a.Close()
	b.Close()
}

// N-08: traffic to a pod with a waypoint goes there, by HBONE, and asks for what
// the client dialled. The waypoint here is none of our proxies.
func TestDP_N08_WorkloadWaypoint(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		const id = "spiffe://cluster.local/ns/default/sa/waypoint"
		client := m.add("client", "10.0.1.2")
		server := m.add("server", "10.0.2.2", uncaptured)
		waypoint := m.peer("10.0.3.2:15008", m.svid(id), to(server.echoAddr()))
		m.add("waypoint", "10.0.3.2", uncaptured, withWorkload(func(w *state.Workload) { w.Protocol = state.HBONE }))
		server.w.Waypoint = byAddress("", waypoint.at)
		m.push()
		if err := client.request(server.echoAddr(), "hello world"); err != nil {
			t.Fatal(err)
		}
		client.wantLog(map[string]string{
			"message": "connection complete", "level": "info", "dst.workload": "waypoint", "dst.namespace": "default", "dst.hbone_addr": "10.0.2.2:8080",
			"dst.addr": "10.0.3.2:15008", "src.identity": clientID, "dst.identity": id, "dst.service": "",
		})
		requests := waypoint.got()
		if len(requests) != 1 || requests[0].Authority != "10.0.2.2:8080" {
			t.Fatalf("the waypoint got %v", requests)
		}
		forwarded, _ := fieldValue(requests[0].Fields, fieldForwarded)
		if _, there := fieldValue(requests[0].Fields, fieldNetwork); there || !strings.HasPrefix(forwarded, `for="10.0.1.2:`) {
			t.Errorf("forwarded %q, network there: %v", forwarded, there)
		}
	})
}

// N-11, N-12: a service's waypoint gets the VIP as authority.
func TestDP_N11_ServiceWaypoint(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		client := m.add("client", "10.0.1.2")
		server := m.add("server", "10.0.2.2")
		waypoint := m.peer("10.0.3.2:15008", m.svid("spiffe://cluster.local/ns/default/sa/waypoint"), to(server.echoAddr()))
		m.add("waypoint", "10.0.3.2", uncaptured, withWorkload(func(w *state.Workload) { w.Protocol = state.HBONE }))
		svc := &state.Service{
			Name: "echo", Namespace: "default", Hostname: "echo.example", Ports: []state.Port{{Service: 80, Target: echoPort}},
			VIPs: []state.NetworkAddress{{Addr: remoteVIP.Addr()}}, Waypoint: byAddress("", waypoint.at),
		}
		m.services = append(m.services, svc)
		server.services = map[state.NamespacedHostname][]state.Port{svc.Key(): svc.Ports}
		m.push()
		if err := client.request(remoteVIP, "hello"); err != nil {
			t.Fatal(err)
		}
		client.wantLog(map[string]string{
			"message": "connection complete", "dst.workload": "waypoint", "dst.hbone_addr": remoteVIP.String(), "dst.addr": "10.0.3.2:15008", "dst.service": "echo.example",
		})
		if got := waypoint.got(); len(got) != 1 || got[0].Authority != remoteVIP.String() {
			t.Errorf("the waypoint got %v", got)
		}
	})
}

// sandwich is a waypoint that has one of our proxies before it and behind it.
type sandwich struct {
	*mesh
	client, waypoint, server *node
}

func (m *mesh) sandwich(tunnel state.ApplicationTunnel, options ...nodeOption) *sandwich {
	m.t.Helper()
	s := &sandwich{mesh: m, client: m.add("client", "10.0.1.2"), server: m.add("server", "10.0.2.2")}
	s.waypoint = m.add("waypoint", "10.0.3.2", append(options, withWorkload(func(w *state.Workload) { w.ApplicationTunnel = &tunnel }))...)
	s.server.w.Waypoint = byAddress("", s.waypoint.at(15008))
	m.push()
	return s
}

// N-14: an application tunnel without a header: the waypoint gets the bytes, on
// its own address and the port that the client asked for, from the client's.
func TestDP_N14_SandwichPlain(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		s := m.sandwich(state.ApplicationTunnel{})
		m.serve(s.waypoint.host, s.waypoint.at(9090), func(c netns.Conn) {
			if c.Remote().Addr() != s.client.addr || c.Local() != s.waypoint.at(9090) {
				t.Errorf("the waypoint got %v->%v", c.Remote(), c.Local())
			}
			up, err := s.waypoint.dial(s.server.echoAddr())
			if err != nil {
				t.Error(err)
				return
			}
			join(c, up)
		})
		if err := s.client.request(s.server.at(9090), "hello"); err != nil {
			t.Fatal(err)
		}
		// The waypoint's own connection to the server is the waypoint's.
		s.server.wantLog(map[string]string{"message": "connection complete", "src.workload": "waypoint", "dst.hbone_addr": "10.0.2.2:8080",
			"src.identity": "spiffe://cluster.local/ns/default/sa/waypoint", "error": ""})
	})
}

// N-15: a PROXY header tells the waypoint who connects and where to, over
// loopback; its bytes are not counted, and policies see the tunnel's port.
func TestDP_N15_SandwichProxyProtocol(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		s := m.sandwich(state.ApplicationTunnel{Proxy: true, Port: tunnelPort}, withConfig(func(c *Config) { c.LocalhostAppTunnel = true }))
		m.serve(s.waypoint.host, netip.MustParseAddrPort("127.0.0.1:15088"), func(c netns.Conn) {
			if c.Remote().Addr() != netip.MustParseAddr("127.0.0.1") {
				t.Errorf("the waypoint's application was connected to from %v", c.Remote())
			}
			src, dst, identity, err := readProxyHeader(c)
			if err != nil || src.Addr() != s.client.addr || dst != s.server.echoAddr() || identity != clientID {
				t.Errorf("header %v -> %v of %q, %v", src, dst, identity, err)
				_ = c.Abort()
				return
			}
			up, err := s.waypoint.dial(dst)
			if err != nil {
				t.Error(err)
				return
			}
			join(c, up)
		})
		held := s.client.mustDial(s.server.echoAddr())
		if err := roundTrip(held, "hello"); err != nil {
			t.Fatal(err)
		}
		s.waypoint.wantMetric(5, "istio_tcp_received_bytes", map[string]string{"reporter": "destination"})

		// A policy of another port changes nothing, one of the tunnel's ends it.
		m.policies = []*state.Policy{denyPort(echoPort)}
		m.policies[0].Namespace = "waypoints"
		s.waypoint.w.AuthorizationPolicies, m.policies[0].Scope = []string{"waypoints/deny"}, state.PolicySelector
		m.push()
		if err := roundTrip(held, "still"); err != nil {
			t.Errorf("after a policy of the requested port: %v", err)
		}
		m.policies[0].Rules = denyPort(tunnelPort).Rules
		m.push()
		if _, err := held.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("after a policy of the tunnel's port: %v, want a reset", err)
		}
		s.waypoint.wantLog(map[string]string{"message": "connection complete", "direction": "inbound", "level": "error", "error": "connection closed due to policy change"})
		if err := s.client.request(s.server.echoAddr(), "x"); err == nil {
			t.Error("a new connection succeeded")
		}
		s.waypoint.wantMetric(2, "istio_tcp_connections_failed", map[string]string{"reporter": "destination", "response_flags": "DENY"})
	})
}

// §6.6: an application that does not take the header ends the connection, after
// the 200, with an error of its own.
func TestProxyHeaderRefused(t *testing.T) {
	a, b := netns.Conn(nil), netns.Conn(nil)
	inMesh(t, func(t *testing.T, m *mesh) {
		server := m.add("server", "10.0.2.2")
		m.serve(server.host, server.at(1), func(c netns.Conn) { b = c })
		var err error
		if a, err = server.host.Dial(m.ctx, netip.Addr{}, server.at(1)); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if err := b.Abort(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		err = sendProxyHeader(a, []byte("header"))
		if text, flag := reason(err); !strings.HasPrefix(text, "io error: ") || flag != flagConnect {
			t.Errorf("reason %q, %s", text, flag)
		}
		a.Close()
	})
}

// deafApps is a network whose applications accept and take nothing.
type deafApps struct{ netns.Network }

func (d deafApps) Dial(ctx context.Context, src netip.Addr, dst netip.AddrPort) (netns.Conn, error) {
	c, err := d.Network.Dial(ctx, src, dst)
	if err != nil {
		return nil, err
	}
	return deafApp{c}, nil
}

type deafApp struct{ netns.Conn }

func (deafApp) Write([]byte) (int, error) { return 0, syscall.EPIPE }

// The client learns by a reset that its connection did not come about, although
// it has the 200, and the connection is told and counted once.
func TestProxyHeaderRefusedResetsStream(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		server := m.add("server", "10.0.2.2", withConfig(func(c *Config) { c.Network = deafApps{c.Network} }),
			withWorkload(func(w *state.Workload) { w.ApplicationTunnel = &state.ApplicationTunnel{Proxy: true, Port: tunnelPort} }))
		var app netns.Conn
		m.serve(server.host, server.at(tunnelPort), func(c netns.Conn) { app = c })
		pool := m.handmade(server, m.svid(clientID))
		defer pool.Close()
		stream, err := pool.Open(m.ctx, "", "10.0.2.2:8080")
		if err != nil {
			t.Fatal(err)
		}
		var reset *hbone.StreamError
		if _, err := stream.Read(make([]byte, 1)); !errors.As(err, &reset) || reset.Code != hbone.ErrConnect || !reset.Remote {
			t.Errorf("the client read %v, want RST_STREAM(CONNECT_ERROR)", err)
		}
		synctest.Wait()
		if _, err := app.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the application read %v, want a reset", err)
		}
		server.wantLog(map[string]string{"message": "connection complete", "level": "error", "error": "io error: broken pipe", "bytes_sent": "0"})
		server.wantMetric(1, "istio_tcp_connections_opened", nil)
		server.wantMetric(1, "istio_tcp_connections_closed", map[string]string{"response_flags": "CONNECT"})
		if in := server.proxy.Connections().Inbound; len(in) != 0 {
			t.Errorf("tracked %v", in)
		}
	})
}

// §16.4 of spec/datapath.md, the second run: the whole request, to where it is
// connected and with what in front. The tunnel listens on the pod's address here.
func TestDP_IN01_IN12_InboundRequests(t *testing.T) {
	const (
		none = iota
		workloadByPod
		workloadByVIP
		serviceByPod
		serviceByVIP
	)
	proxied := &state.ApplicationTunnel{Proxy: true, Port: tunnelPort}
	for _, tt := range []struct {
		id        string
		attach    int
		tunnel    *state.ApplicationTunnel
		to        string // server or waypoint
		authority string
		want      string // the local address of the application that got it
		target    string // of the PROXY header
	}{
		{"IN01", none, nil, "server", "10.0.0.2:8080", "10.0.0.2:8080", ""},
		{"IN02", none, nil, "server", "server.default.svc.cluster.local:80", "10.0.0.2:8080", ""},
		{"IN03", workloadByPod, nil, "waypoint", "10.0.0.2:8080", "10.0.0.3:8080", ""},
		{"IN04", workloadByVIP, nil, "waypoint", "10.0.0.2:8080", "10.0.0.3:8080", ""},
		{"IN05", workloadByVIP, proxied, "waypoint", "10.0.0.2:8080", "10.0.0.3:15088", "10.0.0.2:8080"},
		{"IN06", serviceByPod, nil, "waypoint", "10.10.0.1:8080", "10.0.0.3:8080", ""},
		{"IN07", serviceByVIP, nil, "waypoint", "10.10.0.1:8080", "10.0.0.3:8080", ""},
		{"IN08", serviceByVIP, proxied, "waypoint", "10.10.0.1:8080", "10.0.0.3:15088", "10.10.0.1:8080"},
		{"IN09", none, nil, "server", "10.0.0.1:8080", "", ""},
		{"IN10", none, nil, "waypoint", "10.0.0.1:8080", "", ""},
		{"IN11", serviceByVIP, nil, "waypoint", "10.0.0.2:8080", "", ""},
		{"IN12", workloadByVIP, nil, "waypoint", "10.10.0.1:8080", "", ""},
	} {
		t.Run(tt.id, func(t *testing.T) {
			inMesh(t, func(t *testing.T, m *mesh) {
				pod := m.add("server", "10.0.0.2")
				waypoint := m.add("waypoint", "10.0.0.3", withWorkload(func(w *state.Workload) { w.ApplicationTunnel = tt.tunnel }))
				vip := netip.MustParseAddrPort("10.10.0.2:15008")
				service := &state.Service{Name: "server", Namespace: "default", Hostname: "server.default.svc.cluster.local",
					Ports: []state.Port{{Service: 80, Target: 8080}}, VIPs: []state.NetworkAddress{{Addr: netip.MustParseAddr("10.10.0.1")}}}
				entry := &state.Service{Name: "waypoint", Namespace: "default", Hostname: "waypoint.default.svc.cluster.local",
					Ports: []state.Port{{Service: 15008, Target: 15008}}, VIPs: []state.NetworkAddress{{Addr: vip.Addr()}}}
				m.services = []*state.Service{service, entry}
				pod.services = map[state.NamespacedHostname][]state.Port{service.Key(): service.Ports}
				waypoint.services = map[state.NamespacedHostname][]state.Port{entry.Key(): entry.Ports}
				switch tt.attach {
				case workloadByPod:
					pod.w.Waypoint = byAddress("", waypoint.at(15008))
				case workloadByVIP:
					pod.w.Waypoint = byAddress("", vip)
				case serviceByPod:
					service.Waypoint = byAddress("", waypoint.at(15008))
				case serviceByVIP:
					service.Waypoint = byAddress("", vip)
				}
				m.push()
				m.serve(waypoint.host, waypoint.at(tunnelPort), tellHeader)
				n := map[string]*node{"server": pod, "waypoint": waypoint}[tt.to]
				pool := m.handmade(n, m.svid(clientID))
				defer pool.Close()
				stream, err := pool.Open(m.ctx, "", tt.authority)
				var status *hbone.StatusError
				switch {
				case tt.want == "" && (!errors.As(err, &status) || status.Code != 400):
					t.Fatalf("Open: %v, want status 400", err)
				case tt.want == "":
					return
				case err != nil:
					t.Fatalf("%v\n%s", err, n.logs.text("access"))
				}
				defer stream.Close()
				if in := n.proxy.Connections().Inbound; len(in) != 1 || in[0].ActualDst.String() != tt.want {
					t.Errorf("tracked %+v, want one to %s", in, tt.want)
				}
				if tt.tunnel == nil {
					if err := roundTrip(stream, "x"); err != nil {
						t.Errorf("the application at %s: %v", tt.want, err)
					}
					return
				}
				line, err := bufio.NewReader(stream).ReadString('\n')
				if want := "from 10.0.9.1, 10.0.9.1 for " + tt.target + " by " + clientID + "\n"; err != nil || line != want {
					t.Errorf("got %q, %v, want %q", line, err, want)
				}
			})
		})
	}
}

// tellHeader is an application that answers with whom it was connected from and
// what the PROXY header says.
func tellHeader(c netns.Conn) {
	defer c.Close()
	src, dst, identity, err := readProxyHeader(c)
	if err == nil {
		_, _ = fmt.Fprintf(c, "from %v, %v for %v by %s\n", c.Remote().Addr(), src.Addr(), dst, identity)
	}
}
