package proxy

import (
	"crypto/x509"
	"errors"
	"io"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/state"
)

const (
	gatewayID  = "spiffe://cluster.local/ns/istio-system/sa/gateway"
	remoteHost = "echo.default.svc.cluster.local"
)

var remoteVIP = netip.MustParseAddrPort("10.96.0.9:80")

// twoNetworks is a client in one network, a server in another, and the gateway
// of that one between them.
type twoNetworks struct {
	*mesh
	root           *catest.CA
	client, server *certified
	gateway        *peer
	pod            *node // of the gateway
	service        *state.Service
	gatewaySVID    *ca.SVID
}

func (m *mesh) twoNetworks(options ...nodeOption) *twoNetworks {
	m.t.Helper()
	w := m.makeNetworks(options...)
	synctest.Wait()
	return w
}

// makeNetworks is twoNetworks for those who need no bubble.
func (m *mesh) makeNetworks(options ...nodeOption) *twoNetworks {
	m.t.Helper()
	w := &twoNetworks{mesh: m, root: catest.NewCA(m.t, meshTD)}
	w.service = &state.Service{
		Name: "echo", Namespace: "default", Hostname: remoteHost, Ports: []state.Port{{Service: 80, Target: echoPort}},
		VIPs: []state.NetworkAddress{{Network: "near", Addr: remoteVIP.Addr()}}, SubjectAltNames: []string{serverID},
	}
	m.services = append(m.services, w.service)
	w.gatewaySVID = w.root.SVID(m.t, catest.ID(gatewayID))
	w.gateway = m.peer("10.0.8.1:15009", w.gatewaySVID, to(netip.MustParseAddrPort("10.0.2.2:15008")))
	w.client = m.certify("client", "10.0.1.2", w.root, true, append(options, inNetwork("near"))...)
	w.server = m.certify("server", "10.0.2.2", w.root, false, inNetwork("far"), withWorkload(func(w *state.Workload) {
		w.NetworkGateway = byAddress("far", netip.MustParseAddrPort("10.0.8.1:15009"))
	}))
	w.server.services = map[state.NamespacedHostname][]state.Port{w.service.Key(): w.service.Ports}
	w.pod = m.add("gateway", "10.0.8.1", uncaptured, inNetwork("far"), withWorkload(func(w *state.Workload) {
		w.Namespace, w.ServiceAccount, w.Protocol = "istio-system", "gateway", state.HBONE
	}))
	return w
}

// hold is a connection of the client to the service that stays open.
func (w *twoNetworks) hold() netns.Conn {
	w.t.Helper()
	c := w.client.mustDial(remoteVIP)
	if err := roundTrip(c, "held"); err != nil {
		w.t.Fatalf("%v\n%s", err, w.client.logs.text("access"))
	}
	return c
}

func (w *twoNetworks) wantDialled(outer, inner uint64) {
	w.t.Helper()
	synctest.Wait()
	if o, i := w.client.proxy.pool.Stats(), w.client.proxy.inner.Stats(); o.Dialed != outer || i.Dialed != inner {
		w.t.Errorf("dialled %d outer and %d inner tunnels, want %d and %d", o.Dialed, i.Dialed, outer, inner)
	}
}

// N-09 and OB-21: both requests carry the service's name, only the inner one
// x-forwarded-network, and the destination is who answered: by its certificate
// and its own words. Twenty connections share one inner tunnel, that is, one
// outer stream.
func TestDP_N09_OB21_DoubleHBONE(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		w := m.twoNetworks()
		const connections = 20
		var held []netns.Conn
		for range connections {
			held = append(held, w.hold())
		}
		requests := w.gateway.got()
		if len(requests) != 1 {
			t.Fatalf("the gateway got %d requests, want 1", len(requests))
		}
		w.wantDialled(1, 1)
		if r := requests[0]; r.Authority != remoteHost+":80" {
			t.Errorf("outer authority %s", r.Authority)
		}
		if _, there := fieldValue(requests[0].Fields, fieldNetwork); there {
			t.Error("the outer request names our network")
		}
		for _, c := range held {
			c.Close()
		}
		synctest.Wait()
		if n := len(w.client.logs.find(map[string]string{
			"message": "connection complete", "level": "info", "error": "", "src.identity": clientID, "dst.identity": serverID,
			"dst.addr": "10.0.8.1:15009", "dst.hbone_addr": remoteHost + ":80", "dst.service": remoteHost, "dst.workload": "server",
			"dst.namespace": "default", "bytes_sent": "4", "bytes_recv": "4",
		})); n != connections {
			t.Errorf("%d such lines in\n%s", n, w.client.logs.text("access"))
		}
		w.client.wantMetric(connections, "istio_tcp_connections_opened", map[string]string{
			"destination_workload": "server", "destination_principal": serverID, "destination_service": remoteHost, "destination_cluster": "Kubernetes",
			"connection_security_policy": "mutual_tls",
		})
		// The server sees the gateway's address, which is not the client's workload.
		w.server.wantMetric(connections, "istio_tcp_connections_opened", map[string]string{
			"source_workload": "client", "source_principal": clientID, "source_workload_namespace": "default", "destination_service": remoteHost,
		})
		if n := len(w.server.logs.find(map[string]string{"message": "connection complete", "src.workload": "client", "src.identity": clientID, "dst.hbone_addr": remoteHost + ":80"})); n != connections {
			t.Errorf("%d such lines in\n%s", n, w.server.logs.text("access"))
		}
	})
}

// OB-21: what the inner request carries, seen by a server that is not ours.
func TestDP_OB21_InnerRequest(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		w := m.twoNetworks()
		// The gateway's choice is another workload of the service than the one that we know.
		const other = "spiffe://cluster.local/ns/other/sa/echo"
		w.service.SubjectAltNames = append(w.service.SubjectAltNames, other)
		m.push()
		inner := m.peer("10.0.8.2:15008", w.root.SVID(t, catest.ID(other)), to(w.server.echoAddr()))
		w.gateway.next = to(inner.at)
		for _, tt := range []struct {
			name, told, workload string
			metric               map[string]string
		}{
			{"full baggage", "k8s.cluster.name=far,k8s.namespace.name=kube-system,k8s.deployment.name=echo,service.name=svc", "echo",
				map[string]string{"destination_cluster": "far", "destination_workload": "echo", "destination_canonical_service": "svc", "destination_workload_namespace": "other"}},
			{"no workload in it", "service.name=svc2", "", map[string]string{"destination_workload": "unknown", "destination_canonical_service": "svc2"}},
			{"no baggage", "", "", map[string]string{"destination_workload": "unknown", "destination_canonical_service": "unknown", "destination_principal": other}},
		} {
			inner.told = tt.told
			c := w.hold()
			synctest.Wait()
			requests := inner.got()
			r := requests[len(requests)-1]
			network, _ := fieldValue(r.Fields, fieldNetwork)
			forwarded, _ := fieldValue(r.Fields, fieldForwarded)
			if r.Authority != remoteHost+":80" || network != "near" || !strings.HasSuffix(forwarded, ";host="+remoteHost) || !strings.HasPrefix(forwarded, `for="10.0.1.2:`) {
				t.Errorf("inner request %s, %s %q, %s %q", r.Authority, fieldNetwork, network, fieldForwarded, forwarded)
			}
			c.Close()
			w.client.wantMetric(1, "istio_tcp_connections_closed", tt.metric)
			if n := len(w.client.logs.find(map[string]string{"message": "connection complete", "dst.workload": tt.workload})); n == 0 {
				t.Errorf("%s: no line with dst.workload %q in\n%s", tt.name, tt.workload, w.client.logs.text("access"))
			}
		}
	})
}

// The inner tunnels are bounded in age and idleness, so that what the gateway
// has picked once does not last (see innerMaxAge).
func TestInnerTunnelsAreShortLived(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		w := m.twoNetworks()
		old := w.hold()
		w.hold().Close()
		w.wantDialled(1, 1)
		time.Sleep(innerMaxAge + time.Second)
		w.hold().Close()
		w.wantDialled(1, 2) // a second outer stream over the same tunnel
		if err := roundTrip(old, "still"); err != nil {
			t.Errorf("the connection of an old tunnel: %v", err)
		}
		old.Close()
		time.Sleep(innerIdle + time.Second)
		synctest.Wait()
		if s := w.client.proxy.inner.Stats(); s.Tunnels != 0 || s.Closed != 2 {
			t.Errorf("inner tunnels after the idle time: %+v", s)
		}
		if s := w.client.proxy.pool.Stats(); s.Tunnels != 1 || s.Streams != 0 {
			t.Errorf("outer tunnels after the idle time: %+v", s)
		}
		for range innerMaxStreams + 1 {
			defer w.hold().Close()
		}
		w.wantDialled(1, 4)
	})
}

// Somebody else answers behind the gateway: refused before any byte, and told
// apart from a failure of the gateway.
func TestInnerIdentityMismatch(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		w := m.twoNetworks()
		impostor := m.peer("10.0.8.2:15008", w.root.SVID(t, catest.ID("spiffe://cluster.local/ns/default/sa/impostor")), to(w.server.echoAddr()))
		w.gateway.next = to(impostor.at)
		if err := w.client.request(remoteVIP, "secret"); err == nil {
			t.Error("a request to somebody else succeeded")
		}
		line := w.client.wantLog(map[string]string{"message": "connection complete", "level": "error", "dst.addr": "10.0.8.1:15009", "dst.workload": "server", "bytes_sent": "0"})
		text, _ := line["error"].(string)
		if !strings.HasPrefix(text, "inner tunnel: io error: tls handshake: identity verification error: peer did not present the expected SAN ("+serverID+")") {
			t.Errorf("error %q", text)
		}
		w.client.wantMetric(1, "istio_tcp_connections_failed", map[string]string{"response_flags": "CONNECT"})
		if n := len(impostor.got()); n != 0 {
			t.Errorf("the impostor got %d requests", n)
		}
		if s := w.client.proxy.pool.Stats(); s.Streams != 0 || s.Tunnels != 1 {
			t.Errorf("outer tunnels: %+v, want one without streams", s)
		}

		// The same at the gateway itself, which is not an inner failure.
		w.gateway.stop()
		synctest.Wait()
		w.gateway.start(w.root.SVID(t, catest.ID("spiffe://cluster.local/ns/default/sa/impostor")))
		if err := w.client.request(remoteVIP, "secret"); err == nil {
			t.Error("a request by way of somebody else succeeded")
		}
		synctest.Wait()
		lines := w.client.logs.find(map[string]string{"message": "connection complete"})
		if text, _ := lines[len(lines)-1]["error"].(string); !strings.HasPrefix(text, "io error: tls handshake: identity verification error: peer did not present the expected SAN ("+gatewayID) {
			t.Errorf("error %q", text)
		}
	})
}

// The failures beyond the gateway's TLS: what it answers, nothing behind it, and
// nobody at its address.
func TestGatewayFailures(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		w := m.twoNetworks()
		last := func() string {
			t.Helper()
			if err := w.client.request(remoteVIP, "x"); err == nil {
				t.Error("a request succeeded")
			}
			synctest.Wait()
			lines := w.client.logs.find(map[string]string{"message": "connection complete"})
			text, _ := lines[len(lines)-1]["error"].(string)
			return text
		}
		w.gateway.next = to(netip.MustParseAddrPort("10.0.8.1:1"))
		if got, want := last(), "http status: 503 Service Unavailable"; got != want {
			t.Errorf("the gateway refuses: %s, want %s", got, want)
		}
		m.serve(w.pod.host, w.pod.at(1), func(c netns.Conn) { _ = c.Abort() })
		if got, want := last(), "inner tunnel: io error: tls handshake: "; !strings.HasPrefix(got, want) {
			t.Errorf("nothing behind the gateway: %s, want %s…", got, want)
		}
		w.gateway.stop()
		synctest.Wait()
		if got, want := last(), "io error: dial tcp 10.0.8.1:15009: connect: connection refused"; got != want {
			t.Errorf("no gateway: %s, want %s", got, want)
		}
		m.net.Blackhole(w.gateway.at.Addr(), true)
		if got, want := last(), "connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008: "; !strings.HasPrefix(got, want) {
			t.Errorf("silent gateway: %s, want %s…", got, want)
		}
	})
}

// The gateway dies: its connections end by reset and are told, and the next ones
// go through its successor.
func TestGatewayDies(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		w := m.twoNetworks()
		held := w.hold()
		w.gateway.stop()
		if _, err := held.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("the held connection read %v, want a reset", err)
		}
		line := w.client.wantLog(map[string]string{"message": "connection complete", "level": "error"})
		if text, _ := line["error"].(string); !strings.Contains(text, "tunnel lost") {
			t.Errorf("error %q", text)
		}
		w.client.wantMetric(1, "istio_tcp_connections_failed", map[string]string{"response_flags": "CONNECT"})
		for name, s := range map[string]int{"outer": w.client.proxy.pool.Len(), "inner": w.client.proxy.inner.Len()} {
			if s != 0 {
				t.Errorf("%d %s tunnels are left", s, name)
			}
		}
		w.gateway.start(w.gatewaySVID)
		w.hold().Close()
		w.wantDialled(2, 2)
	})
}

// D8: when the gateway cannot be reached, an endpoint that needs none is taken.
func TestGatewayRetried(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		w := m.twoNetworks()
		near := m.certify("near", "10.0.4.2", w.root, false, inNetwork("near"))
		near.services = w.server.services
		m.push()
		w.gateway.stop()
		synctest.Wait()
		for range 20 {
			if err := w.client.request(remoteVIP, "hello"); err != nil {
				t.Fatalf("%v\n%s", err, w.client.logs.text("access"))
			}
		}
		w.client.wantMetric(20, "istio_tcp_connections_closed", map[string]string{"destination_workload": "near", "response_flags": "-"})
	})
}

// N-30 through a gateway: revoking the server ends the inner tunnel and leaves the
// gateway alone; revoking the gateway ends both.
func TestDP_N30_RevokedBehindGateway(t *testing.T) {
	for _, who := range []string{"server", "gateway"} {
		t.Run(who, func(t *testing.T) {
			inMesh(t, func(t *testing.T, m *mesh) {
				w := m.twoNetworks()
				held := w.hold()
				leaf, outer := w.server.leaf(), 1
				if who == "gateway" {
					leaf, outer = w.gatewaySVID.Cert.Leaf, 0
				}
				w.client.revoke(w.root.CRL(t, 1, []*x509.Certificate{leaf}))
				if _, err := held.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
					t.Errorf("the held connection read %v, want a reset", err)
				}
				w.client.wantLog(map[string]string{"message": "connection complete", "level": "error", "error": ErrCertificateRevoked.Error()})
				w.client.wantMetric(1, "istio_tcp_connections_failed", map[string]string{"response_flags": "CERT_REVOKED"})
				w.client.wantMetric(1, rejections, map[string]string{"reporter": "source"})
				if o, i := w.client.proxy.pool.Len(), w.client.proxy.inner.Len(); o != outer || i != 0 {
					t.Errorf("%d outer and %d inner tunnels are left, want %d and 0", o, i, outer)
				}
				if n := len(w.client.proxy.tunnels.list()); n != outer {
					t.Errorf("%d tunnels are on record, want %d", n, outer)
				}
				if err := w.client.request(remoteVIP, "x"); err == nil {
					t.Error("a new connection succeeded")
				}
			})
		})
	}
}

// Another issuer of our certificate: open connections go on, new ones have new
// tunnels of both kinds, and the old ones end with their streams.
func TestTrustChangeRetiresInnerTunnels(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		w := m.twoNetworks()
		held := w.hold()
		other := w.root.Intermediate(t)
		w.client.become(other.SVIDWith(t, catest.ID(clientID), w.root.Bundles(ca.Strict)))
		if err := roundTrip(held, "still"); err != nil {
			t.Errorf("the open connection: %v", err)
		}
		w.hold().Close()
		w.wantDialled(2, 2)
		held.Close()
		synctest.Wait()
		if o, i := w.client.proxy.pool.Stats(), w.client.proxy.inner.Stats(); o.Closed != 1 || i.Closed != 1 {
			t.Errorf("closed %d outer and %d inner tunnels, want 1 and 1", o.Closed, i.Closed)
		}
	})
}

// An identity that is taken back ends what goes through a gateway, too.
func TestWithdrawnIdentityEndsInnerTunnels(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		w := m.twoNetworks()
		held := w.hold()
		w.client.provider.Set(ca.Key{Provider: "test", ID: catest.ID(clientID)}, ca.Event{State: ca.Withdrawn, Err: ca.ErrDenied})
		if _, err := held.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("the held connection read %v, want a reset", err)
		}
		w.client.wantMetric(1, "istio_tcp_connections_failed", map[string]string{"response_flags": "IDENTITY_ERROR"})
	})
}

// D9: the gateway's address belongs to another pod now.
func TestMovedGatewayRetiresInnerTunnels(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		w := m.twoNetworks()
		held := w.hold()
		w.pod.w.UID = "cluster//Pod/istio-system/gateway-2"
		m.push()
		synctest.Wait()
		w.hold().Close()
		w.wantDialled(2, 2)
		if err := roundTrip(held, "still"); err != nil {
			t.Errorf("the open connection: %v", err)
		}
		held.Close()
		synctest.Wait()
		if o, i := w.client.proxy.pool.Stats(), w.client.proxy.inner.Stats(); o.Closed != 1 || i.Closed != 1 {
			t.Errorf("closed %d outer and %d inner tunnels, want 1 and 1", o.Closed, i.Closed)
		}
	})
}

// A graceful drain lets what goes through the gateway end by itself.
func TestDrainWithInnerTunnels(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		w := m.twoNetworks()
		held := w.hold()
		w.client.proxy.Drain()
		synctest.Wait()
		if err := roundTrip(held, "during"); err != nil {
			t.Errorf("the open connection: %v", err)
		}
		held.Close()
		start := time.Now()
		<-w.client.done
		if d := time.Since(start); d > 3*time.Second {
			t.Errorf("the proxy ended %v after its last connection", d)
		}
	})
}

// A route behind which nobody could be believed is not taken, whoever made it.
func TestDoubleHBONEWithoutFinalIdentity(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		w := m.twoNetworks()
		local, _ := w.client.store.Local(w.client.proxy.cfg.Local)
		route := state.Route{
			Protocol: state.DoubleHBONE, NextHop: w.gateway.at, Authority: state.Authority{Host: remoteHost, Port: 80},
			ExpectedIDs: []spiffeid.ID{catest.ID(gatewayID)},
		}
		up, err := w.client.proxy.connect(m.ctx, w.client.at(1), local, route)
		var config *tlsConfigError
		if up.stream != nil || !errors.As(err, &config) {
			t.Errorf("got %v, want a refusal", err)
		}
		w.wantDialled(0, 0)

		// What fails after the outer stream is open leaves none behind.
		w.hold().Close()
		svid, err := w.client.proxy.svid(m.ctx, local)
		if err != nil {
			t.Fatal(err)
		}
		key := poolKey{source: svid.ID, sourceIP: w.client.addr, dst: w.gateway.at, expected: gatewayID, epoch: svid.Epoch(), uid: w.pod.w.UID}
		if _, _, err := w.client.proxy.dialInner(m.ctx, innerKey{outer: key, authority: remoteHost + ":80"}); !errors.As(err, &config) {
			t.Errorf("got %v, want a refusal", err)
		}
		time.Sleep(innerIdle + time.Second)
		if s := w.client.proxy.pool.Stats(); s.Dialed != 1 || s.Streams != 0 {
			t.Errorf("outer tunnels: %+v, want one without streams", s)
		}
	})
}
