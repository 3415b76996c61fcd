package proxy

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/local"
	"github.com/ztunnel-go/ztunnel/proxy/hbone"
	"github.com/ztunnel-go/ztunnel/state"
)

// svid makes a certificate of the mesh's CA.
func (m *mesh) svid(id string) *ca.SVID {
	m.t.Helper()
	svid, err := m.root.Fetch(m.ctx, spiffeid.RequireFromString(id))
	if err != nil {
		m.t.Fatal(err)
	}
	return svid
}

// identity is that of n's pod.
func (n *node) identity() spiffeid.ID {
	return spiffeid.RequireFromString("spiffe://cluster.local/ns/" + n.w.Namespace + "/sa/" + n.w.ServiceAccount)
}

// handmade opens HBONE tunnels to n with a certificate of the caller's choice.
func (m *mesh) handmade(n *node, svid *ca.SVID) *hbone.Pool[string] {
	m.t.Helper()
	config, err := ca.ClientTLS(svid, []spiffeid.ID{n.identity()}, ca.TLSOptions{})
	if err != nil {
		m.t.Fatal(err)
	}
	pool := hbone.NewPool(hbone.PoolConfig[string]{
		Config: hbone.Config{PingInterval: -1},
		Dial:   m.dialer(n, config),
	})
	m.t.Cleanup(pool.Close)
	return pool
}

// N-20 and the check order of §6.2: exact statuses, one log line and one count each.
func TestDP_N20_RefusedRequests(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		server := m.add("server", "10.0.2.2")
		other := m.add("other", "10.0.3.2")
		pool := m.handmade(server, m.svid("spiffe://cluster.local/ns/default/sa/client"))
		defer pool.Close()
		for _, tt := range []struct {
			name, authority, reason, text string
			status                        int
		}{
			{"another pod", "10.0.3.2:8080", "destination", "ip mismatch: 10.0.2.2 != 10.0.3.2", 400},
			{"loopback", "127.0.0.1:8080", "destination", "ip mismatch: 10.0.2.2 != 127.0.0.1", 400},
			{"mapped loopback", "[::ffff:127.0.0.1]:8080", "destination", "ip mismatch: 10.0.2.2 != 127.0.0.1", 400},
			{"unspecified", "0.0.0.0:8080", "destination", "ip mismatch: 10.0.2.2 != 0.0.0.0", 400},
			{"metadata service", "169.254.169.254:80", "destination", "ip mismatch: 10.0.2.2 != 169.254.169.254", 400},
			{"no port", "10.0.2.2", "authority", "no valid authority pseudo header: 10.0.2.2 (want IP:port, [IPv6]:port or host:port)", 400},
			{"zone", "[fe80::1%eth0]:80", "authority", "no valid authority pseudo header: [fe80::1%eth0]:80 (an address with a zone is not allowed)", 400},
			{"unknown host", "nowhere.example.com:80", "no_route", "no service or workload for hostname: nowhere.example.com", 503},
			{"outbound listener", "10.0.2.2:15001", "self_call", "attempted recursive call to ourselves", 503},
			{"plaintext listener", "10.0.2.2:15006", "self_call", "attempted recursive call to ourselves", 503},
			{"HBONE listener", "10.0.2.2:15008", "self_call", "attempted recursive call to ourselves", 503},
		} {
			before := server.metric("istio_tcp_connections_rejected", map[string]string{"reason": tt.reason})
			_, err := pool.Open(t.Context(), "", tt.authority)
			var status *hbone.StatusError
			if !errors.As(err, &status) || status.Code != tt.status {
				t.Errorf("%s: Open = %v, want status %d", tt.name, err, tt.status)
			}
			if len(server.logs.find(map[string]string{"message": "connection failed", "level": "warn", "direction": "inbound", "dst.addr": "10.0.2.2:15008", "error": tt.text})) == 0 {
				t.Errorf("%s: no log line with %q in\n%s", tt.name, tt.text, server.logs.text("access"))
			}
			server.wantMetric(before+1, "istio_tcp_connections_rejected", map[string]string{"reporter": "destination", "reason": tt.reason})
		}
		server.wantMetric(0, "istio_tcp_connections_opened", nil)
		// §6.2 7: nothing listens there. From here on it counts.
		_, err := pool.Open(t.Context(), "", "10.0.2.2:1")
		var status *hbone.StatusError
		if !errors.As(err, &status) || status.Code != 503 {
			t.Errorf("Open to a closed port = %v, want status 503", err)
		}
		server.wantLog(map[string]string{"scope": "access", "message": "connection complete", "error": "connection failed: dial tcp 10.0.2.2:1: connect: connection refused"})
		server.wantMetric(1, "istio_tcp_connections_failed", map[string]string{"response_flags": "CONNECT"})
		_ = other
	})
}

// N-19: an ALLOW policy whose principal has the prefix spiffe:// matches nobody.
func TestDP_N19_PolicyWithPrefixedPrincipal(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		const id = "spiffe://cluster.local/ns/istio-system/sa/ztunnel"
		allow := func(principal string) []*state.Policy {
			return []*state.Policy{{
				Name: "allow", Namespace: "default", Scope: state.PolicyNamespace, Action: state.Allow,
				Rules: []state.Rule{{{{Principals: []state.StringMatch{{Kind: state.Exact, Value: principal}}}}}},
			}}
		}
		m.policies = allow(id)
		server := m.add("server", "10.0.2.2")
		pool := m.handmade(server, m.svid(id))
		defer pool.Close()
		_, err := pool.Open(t.Context(), "", "10.0.2.2:8080")
		var status *hbone.StatusError
		if !errors.As(err, &status) || status.Code != 401 {
			t.Errorf("Open = %v, want status 401", err)
		}
		server.wantLog(map[string]string{"message": "connection complete",
			"error": "connection closed due to policy rejection: allow policies exist, but none allowed"})

		m.policies = allow(strings.TrimPrefix(id, "spiffe://"))
		m.push()
		stream, err := pool.Open(t.Context(), "", "10.0.2.2:8080")
		if err != nil {
			t.Fatalf("Open with the right principal: %v", err)
		}
		stream.Close()
	})
}

// N-24 and TLS failures on 15008: one line and one count each, nothing served.
func TestDP_N24_BadPeers(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		server := m.add("server", "10.0.2.2")
		addr := netip.AddrPortFrom(server.addr, 15008)
		stranger, err := local.Open(local.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("other.test")})
		if err != nil {
			t.Fatal(err)
		}
		foreign, err := stranger.Fetch(t.Context(), spiffeid.RequireFromString("spiffe://other.test/ns/default/sa/client"))
		if err != nil {
			t.Fatal(err)
		}
		insecure := func(certs ...tls.Certificate) *tls.Config {
			return &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, Certificates: certs} // the peer is the subject of the test
		}
		handshake := func(config *tls.Config) func(net.Conn) {
			return func(c net.Conn) {
				tc := tls.Client(c, config)
				_, _ = io.WriteString(tc, http2.ClientPreface)
				_, _ = io.Copy(io.Discard, tc) // until the server has closed
			}
		}
		for _, tt := range []struct {
			name string
			peer func(net.Conn)
		}{
			{"plain HTTP", func(c net.Conn) { _, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n") }},
			{"random bytes", func(c net.Conn) { _, _ = c.Write(bytes.Repeat([]byte{0xff, 0x16, 3}, 2000)) }},
			{"SSH banner", func(c net.Conn) { _, _ = io.WriteString(c, "SSH-2.0-OpenSSH_9.6\r\n") }},
			{"nothing", func(net.Conn) {}},
			{"no certificate", handshake(insecure())},
			{"another trust domain", handshake(insecure(*foreign.Cert))},
			{"other ALPN", handshake(&tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}})},
			{"TLS 1.2", handshake(&tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12})},
		} {
			before := server.metric("istio_tcp_connections_rejected", map[string]string{"reason": "tls"})
			lines := len(server.logs.find(map[string]string{"message": "connection failed"}))
			c, err := m.net.Host(netip.MustParseAddr("10.0.9.9")).Dial(t.Context(), netip.Addr{}, addr)
			if err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			tt.peer(c)
			_, _ = io.Copy(io.Discard, c) // until the server has closed
			if d := time.Since(start); d > 10*time.Second {
				t.Errorf("%s: the server held the connection for %v", tt.name, d)
			}
			c.Close()
			server.wantMetric(before+1, "istio_tcp_connections_rejected", map[string]string{"reporter": "destination", "reason": "tls"})
			if got := len(server.logs.find(map[string]string{"message": "connection failed"})); got != lines+1 {
				t.Errorf("%s: %d log lines, want 1", tt.name, got-lines)
			}
		}
		server.wantMetric(0, "istio_tcp_sockets_open", nil)
		server.wantMetric(0, "istio_tcp_connections_opened", nil)

		// The proxy still serves.
		client := m.add("client", "10.0.1.2")
		if err := client.request(server.echoAddr(), "fine"); err != nil {
			t.Error(err)
		}
	})
}

// The destination presents another identity than the route expects (case 59):
// no application byte leaves, the application sees its socket closed.
func TestWrongServerIdentity(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		client := m.add("client", "10.0.1.2")
		server := m.add("server", "10.0.2.2")
		server.w.ServiceAccount = "impostor" // in the client's world only
		m.policies = nil
		if err := client.store.Replace(state.Update{Workloads: []state.WorkloadUpdate{{Workload: client.w}, {Workload: server.w}}}); err != nil {
			t.Fatal(err)
		}
		if err := client.request(server.echoAddr(), "secret"); err == nil {
			t.Fatal("a request to the wrong identity succeeded")
		}
		line := client.wantLog(map[string]string{"scope": "access", "message": "connection complete", "level": "error"})
		if line != nil && !strings.Contains(line["error"].(string), "peer did not present the expected SAN (spiffe://cluster.local/ns/default/sa/impostor), got spiffe://cluster.local/ns/default/sa/server") {
			t.Errorf("error = %v", line["error"])
		}
		client.wantMetric(1, "istio_tcp_connections_failed", map[string]string{"response_flags": "CONNECT"})
		server.wantMetric(0, "istio_tcp_connections_opened", nil)
		server.wantMetric(1, "istio_tcp_connections_rejected", map[string]string{"reason": "tls"})
	})
}

// Design D20: a method other than CONNECT gets 400 with a short text.
func TestMethod(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		server := m.add("server", "10.0.2.2")
		config, err := ca.ClientTLS(m.svid("spiffe://cluster.local/ns/default/sa/client"), []spiffeid.ID{server.identity()}, ca.TLSOptions{})
		if err != nil {
			t.Fatal(err)
		}
		conn, _, err := m.dialer(server, config)(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		tc := tls.Client(conn, config)
		defer conn.Close()
		if _, err := io.WriteString(tc, http2.ClientPreface); err != nil {
			t.Fatal(err)
		}
		framer := http2.NewFramer(tc, tc)
		framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
		var block bytes.Buffer
		encoder := hpack.NewEncoder(&block)
		for _, f := range []hpack.HeaderField{{Name: ":method", Value: "GET"}, {Name: ":scheme", Value: "http"}, {Name: ":authority", Value: "10.0.2.2:8080"}, {Name: ":path", Value: "/"}} {
			if err := encoder.WriteField(f); err != nil {
				t.Fatal(err)
			}
		}
		if err := errors.Join(framer.WriteSettings(), framer.WriteHeaders(http2.HeadersFrameParam{
			StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: true,
		})); err != nil {
			t.Fatal(err)
		}
		for {
			f, err := framer.ReadFrame()
			if err != nil {
				t.Fatal(err)
			}
			if h, ok := f.(*http2.MetaHeadersFrame); ok {
				if got := h.PseudoValue("status"); got != "400" {
					t.Errorf("status = %s, want 400", got)
				}
			}
			if d, ok := f.(*http2.DataFrame); ok {
				if body := string(d.Data()); len(body) == 0 || len(body) > 64 || !d.StreamEnded() {
					t.Errorf("body = %q, ended %t", body, d.StreamEnded())
				}
				break
			}
		}
		server.wantLog(map[string]string{"scope": "access", "message": "connection failed", "error": "expected method CONNECT, got GET"})
	})
}
