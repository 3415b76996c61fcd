package proxy

import (
	"errors"
	"io"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztunnel-go/ztunnel/state"
)

// The main job: captured on both sides, one tunnel, both identities, all
// counters and both access log lines (the checks of N-01 in memory).
func TestTwoNodes(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		client := m.add("client", "10.0.1.2")
		server := m.add("server", "10.0.2.2")
		if err := client.request(server.echoAddr(), "hello world"); err != nil {
			t.Fatal(err)
		}
		const clientID, serverID = "spiffe://cluster.local/ns/default/sa/client", "spiffe://cluster.local/ns/default/sa/server"
		line := client.wantLog(map[string]string{
			"scope": "access", "message": "connection complete", "level": "info",
			"src.workload": "client", "src.namespace": "default", "src.identity": clientID, "src.cluster": "Kubernetes",
			"dst.addr": "10.0.2.2:15008", "dst.hbone_addr": "10.0.2.2:8080", "dst.workload": "server",
			"dst.namespace": "default", "dst.identity": serverID, "dst.cluster": "Kubernetes",
			"direction": "outbound", "bytes_sent": "11", "bytes_recv": "11", "error": "", "reset": "", "dst.service": "",
		})
		if line != nil && !strings.HasPrefix(line["src.addr"].(string), "10.0.1.2:") {
			t.Errorf("src.addr = %v", line["src.addr"])
		}
		server.wantLog(map[string]string{
			"scope": "access", "message": "connection complete",
			"src.workload": "client", "src.identity": clientID, "dst.addr": "10.0.2.2:15008", "dst.hbone_addr": "10.0.2.2:8080",
			"dst.workload": "server", "dst.identity": serverID, "direction": "inbound", "bytes_sent": "11", "bytes_recv": "11", "error": "",
		})
		for _, n := range []*node{client, server} {
			labels := map[string]string{
				"reporter": map[*node]string{client: "source", server: "destination"}[n], "source_principal": clientID,
				"destination_principal": serverID, "connection_security_policy": "mutual_tls", "request_protocol": "tcp",
				"source_workload": "client", "destination_workload": "server", "response_flags": "-",
				"source_canonical_revision": "v1", "destination_cluster": "Kubernetes", "source_region": "unknown",
			}
			n.wantMetric(1, "istio_tcp_connections_opened", labels)
			n.wantMetric(1, "istio_tcp_connections_closed", labels)
			n.wantMetric(0, "istio_tcp_connections_failed", nil)
			n.wantMetric(11, "istio_tcp_received_bytes", labels)
			n.wantMetric(11, "istio_tcp_sent_bytes", labels)
		}
		client.wantMetric(0, "istio_tcp_sockets_open", map[string]string{"reporter": "source"})
		server.wantMetric(1, "istio_tcp_sockets_open", map[string]string{"reporter": "destination"}) // the pooled tunnel
		if c := client.proxy.Connections(); len(c.Inbound)+len(c.Outbound) != 0 {
			t.Errorf("connections after the end: %+v", c)
		}
	})
}

// A destination without HBONE gets plain TCP; a client without a proxy reaches a
// captured server on 15006, without identity (N-02, N-03 in memory).
func TestPlaintext(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		client := m.add("client", "10.0.1.2")
		bare := m.add("bare", "10.0.3.2", uncaptured)
		server := m.add("server", "10.0.2.2")
		if err := client.request(bare.echoAddr(), "hello world"); err != nil {
			t.Fatal(err)
		}
		client.wantLog(map[string]string{
			"scope": "access", "message": "connection complete", "dst.addr": "10.0.3.2:8080", "dst.hbone_addr": "", "dst.workload": "bare",
			"src.identity": "", "dst.identity": "", "bytes_sent": "11", "bytes_recv": "11", "error": "",
		})
		client.wantMetric(11, "istio_tcp_sent_bytes", map[string]string{
			"connection_security_policy": "unknown", "source_principal": "unknown", "destination_principal": "spiffe://cluster.local/ns/default/sa/bare",
		})
		if err := bare.request(server.echoAddr(), "hello world"); err != nil {
			t.Fatal(err)
		}
		server.wantLog(map[string]string{
			"scope": "access", "message": "connection complete", "src.workload": "bare", "src.identity": "", "dst.addr": "10.0.2.2:8080", "dst.hbone_addr": "", "direction": "inbound", "error": "",
		})
	})
}

// An address that nobody knows is passed through (rule C), and a service VIP
// leads to its endpoint with the service's labels (rule F).
func TestUnknownAndService(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		client := m.add("client", "10.0.1.2")
		server := m.add("server", "10.0.2.2")
		stranger := netip.MustParseAddr("192.0.2.1")
		m.echo(m.net.Host(stranger), netip.AddrPortFrom(stranger, 80))
		if err := client.request(netip.AddrPortFrom(stranger, 80), "out"); err != nil {
			t.Fatal(err)
		}
		client.wantLog(map[string]string{"scope": "access", "message": "connection complete", "dst.addr": "192.0.2.1:80", "dst.workload": "", "dst.hbone_addr": "", "bytes_sent": "3"})

		server.services = map[state.NamespacedHostname][]state.Port{
			{Namespace: "default", Hostname: "echo.default.svc.cluster.local"}: {{Service: 80, Target: echoPort}},
		}
		m.push()
		vip := netip.MustParseAddrPort("10.96.0.1:80")
		if err := client.request(vip, "hello"); err != nil {
			t.Fatal(err)
		}
		client.wantLog(map[string]string{"scope": "access", "message": "connection complete", "dst.service": "echo.default.svc.cluster.local", "dst.addr": "10.0.2.2:15008", "dst.hbone_addr": "10.0.2.2:8080"})
		server.wantLog(map[string]string{"scope": "access", "message": "connection complete", "dst.service": "echo.default.svc.cluster.local"})
		server.wantMetric(5, "istio_tcp_received_bytes", map[string]string{
			"destination_service": "echo.default.svc.cluster.local", "destination_service_name": "echo", "destination_service_namespace": "default",
		})
		// Rule B: a port that the service lacks has no healthy upstream.
		if err := client.request(netip.AddrPortFrom(vip.Addr(), 81), "x"); err == nil {
			t.Error("a request to a port without endpoints succeeded")
		}
		client.wantLog(map[string]string{"scope": "access", "message": "connection failed", "level": "warn", "direction": "outbound", "error": "no healthy upstream: 10.96.0.1:81"})
		client.wantMetric(1, "istio_tcp_connections_rejected", map[string]string{"reporter": "source", "reason": "no_route"})
	})
}

func denyPort(port uint16) *state.Policy {
	return &state.Policy{
		Name: "deny", Namespace: "default", Scope: state.PolicyNamespace, Action: state.Deny,
		Rules: []state.Rule{{{{DestinationPorts: []uint16{port}}}}},
	}
}

// A denied request gets 401: the client's log says so, the server's names the
// policy, the application sees its socket closed.
func TestPolicyDenies(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		m.policies = []*state.Policy{denyPort(echoPort)}
		client := m.add("client", "10.0.1.2")
		server := m.add("server", "10.0.2.2")
		bare := m.add("bare", "10.0.3.2", uncaptured)
		if err := client.request(server.echoAddr(), "x"); err == nil {
			t.Error("a denied request succeeded")
		}
		client.wantLog(map[string]string{"scope": "access", "message": "connection complete", "level": "error", "error": "http status: 401 Unauthorized"})
		const text = "connection closed due to policy rejection: explicitly denied by: default/deny"
		server.wantLog(map[string]string{"scope": "access", "message": "connection complete", "level": "error", "error": text})
		server.wantMetric(1, "istio_tcp_connections_opened", map[string]string{"response_flags": "-"})
		server.wantMetric(1, "istio_tcp_connections_closed", map[string]string{"response_flags": "DENY"})
		server.wantMetric(1, "istio_tcp_connections_failed", map[string]string{"response_flags": "DENY"})
		client.wantMetric(1, "istio_tcp_connections_failed", map[string]string{"response_flags": "CONNECT"})
		if err := bare.request(server.echoAddr(), "x"); err == nil {
			t.Error("a denied plaintext request succeeded")
		}
		server.wantMetric(1, "istio_tcp_connections_failed", map[string]string{"response_flags": "DENY", "connection_security_policy": "unknown"})
	})
}

// C-03 and §12.2: a policy that arrives later ends the connections that it
// denies, by RST, and no other; the watcher ends with the proxy.
func TestDP_C03_PolicyChangeMidStream(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		client := m.add("client", "10.0.1.2")
		server := m.add("server", "10.0.2.2")
		m.echo(server.host, netip.AddrPortFrom(server.addr, 9090))
		denied := client.mustDial(server.echoAddr())
		allowed := client.mustDial(netip.AddrPortFrom(server.addr, 9090))
		for _, c := range []io.ReadWriter{denied, allowed} {
			if _, err := c.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
		}
		if n := len(server.proxy.Connections().Inbound); n != 2 {
			t.Errorf("tracked inbound connections = %d, want 2", n)
		}
		m.policies = []*state.Policy{denyPort(echoPort)}
		m.push()
		if _, err := denied.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the denied connection read %v, want a reset", err)
		}
		if err := roundTrip(allowed, "still here"); err != nil {
			t.Errorf("the allowed connection: %v", err)
		}
		server.wantLog(map[string]string{"scope": "access", "message": "connection complete", "level": "error", "error": "connection closed due to policy change"})
		server.wantMetric(1, "istio_tcp_connections_failed", map[string]string{"response_flags": "DENY"})
		if n := len(server.proxy.Connections().Inbound); n != 1 {
			t.Errorf("tracked inbound connections = %d, want 1", n)
		}
		allowed.Close()
		start := time.Now()
		server.proxy.Drain()
		client.proxy.Drain()
		<-client.done
		<-server.done
		if d := time.Since(start); d > time.Second {
			t.Errorf("the proxies needed %v to end", d)
		}
	})
}

// A workload that names another policy is as a policy that has changed.
func TestPolicyListChangesMidStream(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		deny := denyPort(echoPort)
		deny.Scope = state.PolicySelector
		m.policies = []*state.Policy{deny}
		client, server := m.add("client", "10.0.1.2"), m.add("server", "10.0.2.2")
		c := client.mustDial(server.echoAddr())
		defer c.Close()
		if err := roundTrip(c, "x"); err != nil {
			t.Fatal(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(time.Minute))
		now := *server.w
		now.AuthorizationPolicies = []string{"default/deny"}
		if err := server.store.Apply(state.Update{Workloads: []state.WorkloadUpdate{{Workload: &now}}}); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the denied connection read %v, want a reset", err)
		}
		server.wantLog(map[string]string{"scope": "access", "message": "connection complete", "level": "error", "error": "connection closed due to policy change"})
	})
}

// D6: an application's reset travels through the tunnel, and is no error.
func TestResetTravels(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		client := m.add("client", "10.0.1.2")
		server := m.add("server", "10.0.2.2")
		c := client.mustDial(server.echoAddr())
		if err := roundTrip(c, "x"); err != nil {
			t.Fatal(err)
		}
		if err := c.Abort(); err != nil {
			t.Fatal(err)
		}
		for _, n := range []*node{client, server} {
			n.wantLog(map[string]string{"scope": "access", "message": "connection complete", "level": "info", "reset": "src", "error": ""})
			n.wantMetric(1, "istio_tcp_resets", map[string]string{"reset": "src"})
			n.wantMetric(0, "istio_tcp_connections_failed", nil)
		}
	})
}

// Loop protection (§3.5): loopback and an illegal port outbound, an illegal port
// on 15006 at any address, and on 15008 by authority.
func TestSelfCall(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		client := m.add("client", "10.0.1.2")
		server := m.add("server", "10.0.2.2")
		for _, port := range []uint16{15001, 15006, 15008} {
			if err := client.request(netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port), "x"); err == nil {
				t.Errorf("a connection to our own port %d succeeded", port)
			}
			if err := client.request(netip.AddrPortFrom(server.addr, port), "x"); err == nil {
				t.Errorf("a connection to the peer's own port %d succeeded", port)
			}
		}
		client.wantMetric(3, "istio_tcp_connections_rejected", map[string]string{"reporter": "source", "reason": "self_call"})
		server.wantMetric(3, "istio_tcp_connections_rejected", map[string]string{"reporter": "destination", "reason": "self_call"})
	})
}

// A graceful drain without a successor: what is in the queue is served for a
// moment, new connections fail after that, the open one goes on, and the end comes
// within a second after its end (N-17 and LC-07 in memory).
func TestID_LC09_Drain(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		client := m.add("client", "10.0.1.2")
		server := m.add("server", "10.0.2.2")
		c := client.mustDial(server.echoAddr())
		if err := roundTrip(c, "before"); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		server.proxy.Drain()
		synctest.Wait() // GOAWAY has arrived
		if err := client.request(server.echoAddr(), "x"); err != nil || client.proxy.pool.Stats().Dialed != 2 {
			t.Errorf("a connection during the drain: %v, with %d tunnels; want it over a second one", err, client.proxy.pool.Stats().Dialed)
		}
		for client.request(server.echoAddr(), "x") == nil {
			if time.Since(begin) > 2*time.Second {
				t.Fatal("new connections still succeed")
			}
			time.Sleep(10 * time.Millisecond)
		}
		if d := time.Since(begin); d < drainAlone || d >= drainQuiet {
			t.Errorf("new connections fail after %v, want %v", d, drainAlone)
		}
		if err := roundTrip(c, "during"); err != nil {
			t.Errorf("the open connection: %v", err)
		}
		select {
		case <-server.done:
			t.Error("the proxy ended with an open connection")
		default:
		}
		end := time.Now()
		c.Close()
		<-server.done
		if d := time.Since(end); d > time.Second {
			t.Errorf("the proxy ended %v after its last connection", d)
		}
	})
}

// The drain deadline cuts what is left: ERROR, flag "-", not counted as failed (§10.6).
func TestDrainDeadline(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		client := m.add("client", "10.0.1.2")
		server := m.add("server", "10.0.2.2")
		c := client.mustDial(server.echoAddr())
		if err := roundTrip(c, "before"); err != nil {
			t.Fatal(err)
		}
		server.proxy.Drain()
		server.stop(ErrDraining)
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the cut connection read %v, want a reset", err)
		}
		server.wantLog(map[string]string{"scope": "access", "message": "connection complete", "level": "error", "error": "connection closed due to connection drain"})
		server.wantMetric(1, "istio_tcp_connections_closed", map[string]string{"response_flags": "-"})
		server.wantMetric(0, "istio_tcp_connections_failed", nil)
		client.wantMetric(1, "istio_tcp_connections_failed", map[string]string{"response_flags": "CONNECT"})
	})
}

// D8: a service endpoint that cannot be reached is replaced by another, once.
func TestRetryOtherEndpoint(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		client := m.add("client", "10.0.1.2")
		key := state.NamespacedHostname{Namespace: "default", Hostname: "echo.default.svc.cluster.local"}
		ports := map[state.NamespacedHostname][]state.Port{key: {{Service: 80, Target: echoPort}}}
		good := m.add("good", "10.0.2.2")
		dead := m.add("dead", "10.0.3.2", uncaptured, withWorkload(func(w *state.Workload) { w.Protocol = state.HBONE }))
		good.services, dead.services = ports, ports
		m.push()
		for range 20 {
			if err := client.request(netip.MustParseAddrPort("10.96.0.1:80"), "hello"); err != nil {
				t.Fatalf("a request to a service with one good endpoint: %v", err)
			}
		}
		client.wantMetric(20, "istio_tcp_connections_opened", map[string]string{"destination_workload": "good"})
		client.wantMetric(0, "istio_tcp_connections_failed", nil)
	})
}

// A blackholed 15008 is told as what it most likely is (§10.6, flag NETWORK_POLICY).
func TestNetworkPolicyHint(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		client := m.add("client", "10.0.1.2")
		server := m.add("server", "10.0.2.2")
		m.net.Blackhole(server.addr, true)
		start := time.Now()
		if err := client.request(server.echoAddr(), "x"); err == nil {
			t.Error("a request into the void succeeded")
		}
		if d := time.Since(start); d != 10*time.Second {
			t.Errorf("gave up after %v, want 10s", d)
		}
		client.wantLog(map[string]string{"scope": "access", "message": "connection complete",
			"error": "connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008: deadline has elapsed"})
		client.wantMetric(1, "istio_tcp_connections_failed", map[string]string{"response_flags": "NETWORK_POLICY"})
	})
}
