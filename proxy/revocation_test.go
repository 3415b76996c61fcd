package proxy

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// certified is a node whose certificate and revocation lists a test sets.
type certified struct {
	*node
	provider *catest.Provider
	crl      string
	crls     *ca.CRLs
}

// certify makes a node with a certificate of c. With lists it looks at a file of
// them, which is not there yet.
func (m *mesh) certify(name, addr string, c *catest.CA, lists bool, options ...nodeOption) *certified {
	m.t.Helper()
	n := &certified{provider: catest.NewProvider("test")}
	if lists {
		n.crl = filepath.Join(m.t.TempDir(), "crl.pem")
		n.crls = ca.NewCRLs(ca.CRLConfig{Path: n.crl})
		m.parts.Go(func() { _ = n.crls.Run(m.ctx) }) // returns why ctx ended
	}
	id := catest.ID("spiffe://cluster.local/ns/default/sa/" + name)
	n.provider.Set(ca.Key{Provider: "test", ID: id}, ca.Event{State: ca.Available, SVID: c.SVID(m.t, id)})
	n.node = m.add(name, addr, append(options, withConfig(func(cfg *Config) { cfg.CRLs = n.crls }), func(p *nodeParts) { p.provider = n.provider })...)
	return n
}

// become gives the node another certificate.
func (n *certified) become(svid *ca.SVID) {
	n.provider.Set(ca.Key{Provider: "test", ID: svid.ID}, ca.Event{State: ca.Available, SVID: svid})
	synctest.Wait()
}

func (n *certified) leaf() *x509.Certificate {
	n.m.t.Helper()
	svid, ok := n.proxy.identity.current().Current()
	if !ok {
		n.m.t.Fatalf("%s has no certificate", n.w.Name)
	}
	return svid.Cert.Leaf
}

// revoke writes the node's file and returns when that has had its effect.
func (n *certified) revoke(list []byte) {
	n.m.t.Helper()
	if err := os.WriteFile(n.crl, list, 0o600); err != nil {
		n.m.t.Fatal(err)
	}
	time.Sleep(time.Second)
	synctest.Wait()
}

const rejections = "istio_crl_policy_rejections"

// E2-04, N-27: the server refuses a client that is revoked.
func TestID_E204_InboundRejectsRevoked(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		root := catest.NewCA(t, meshTD)
		client, server := m.certify("client", "10.0.1.2", root, false), m.certify("server", "10.0.2.2", root, true)
		synctest.Wait()
		server.revoke(root.CRL(t, 1, []*x509.Certificate{client.leaf()}))
		start := time.Now()
		if err := client.request(server.echoAddr(), "x"); err == nil {
			t.Error("a revoked client was served")
		}
		if d := time.Since(start); d > 5*time.Second {
			t.Errorf("refused after %v", d)
		}
		server.wantMetric(1, rejections, map[string]string{"reporter": "destination"})
		client.wantMetric(0, rejections, nil)
		lines := server.logs.find(map[string]string{"message": "connection failed", "direction": "inbound"})
		if len(lines) != 1 || !strings.HasPrefix(fmt.Sprint(lines[0]["error"]), "tls handshake error: certificate revoked: serial number ") {
			t.Errorf("logged %v", lines)
		}
		client.wantMetric(1, "istio_tcp_connections_failed", map[string]string{"response_flags": "CONNECT"}) // an alert says little
	})
}

// E2-05, N-28: the client refuses a server that is revoked, here by its
// intermediate.
func TestID_E205_OutboundRejectsRevoked(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		root := catest.NewCA(t, meshTD)
		ia := root.Intermediate(t)
		client, server := m.certify("client", "10.0.1.2", root, true), m.certify("server", "10.0.2.2", ia, false)
		client.revoke(root.CRL(t, 1, []*x509.Certificate{ia.Cert}))
		if err := client.request(server.echoAddr(), "x"); err == nil {
			t.Error("a revoked server got bytes")
		}
		client.wantMetric(1, rejections, map[string]string{"reporter": "source"})
		client.wantMetric(1, "istio_tcp_connections_failed", map[string]string{"response_flags": "CERT_REVOKED"})
		lines := client.logs.find(map[string]string{"message": "connection complete", "level": "error"})
		if len(lines) != 1 || !strings.HasPrefix(fmt.Sprint(lines[0]["error"]), "io error: tls handshake: intermediate certificate revoked: ") {
			t.Errorf("logged %v", lines)
		}
		server.wantMetric(0, rejections, nil)
	})
}

// E2-06 and E2-07, N-29 and N-30: the file changes while a connection is up. It
// ends within a second; the other side sees a reset, as do both applications;
// nothing else is harmed, and the next handshake is refused.
func TestID_E206_E207_ExistingConnectionsEnd(t *testing.T) {
	for _, reporter := range []string{reporterDestination, reporterSource} {
		t.Run(reporter, func(t *testing.T) {
			inMesh(t, func(t *testing.T, m *mesh) {
				root := catest.NewCA(t, meshTD)
				inbound := reporter == reporterDestination
				client, server := m.certify("client", "10.0.1.2", root, !inbound), m.certify("server", "10.0.2.2", root, inbound)
				bystander := m.certify("bystander", "10.0.3.2", root, false)
				applications := make(chan error, 1)
				m.serve(server.host, server.at(9090), func(c netns.Conn) {
					_, _ = c.Write([]byte("hello"))
					_, err := c.Read(make([]byte, 1))
					applications <- err
					c.Close()
				})
				held := client.mustDial(server.at(9090))
				if _, err := held.Read(make([]byte, 5)); err != nil {
					t.Fatal(err)
				}
				other := bystander.mustDial(server.echoAddr())
				if err := roundTrip(other, "x"); err != nil {
					t.Fatal(err)
				}
				judge, judged := server, client
				if !inbound {
					judge, judged = client, server
				}
				judge.revoke(root.CRL(t, 1, []*x509.Certificate{judged.leaf()}))
				if _, err := held.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("the client's application read %v, want a reset", err)
				}
				if err := <-applications; !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("the server's application read %v, want a reset", err)
				}
				judge.wantMetric(1, rejections, map[string]string{"reporter": reporter})
				judge.wantMetric(1, "istio_tcp_connections_failed", map[string]string{"response_flags": "CERT_REVOKED", "reporter": reporter})
				judge.wantLog(map[string]string{"scope": "access", "message": "connection complete", "level": "error",
					"error": "connection closed: peer certificate revoked by CRL", "direction": direction(reporter)})
				judged.wantMetric(1, "istio_tcp_connections_failed", map[string]string{"response_flags": "CONNECT"})
				if err := roundTrip(other, "still here"); err != nil {
					t.Errorf("a connection between others: %v", err)
				}
				other.Close()
				if err := client.request(server.echoAddr(), "x"); err == nil {
					t.Error("a new connection was served")
				}
				judge.wantMetric(2, rejections, map[string]string{"reporter": reporter})
				judge.wantMetric(0, "istio_crl_untracked_connections", nil)
			})
		})
	}
}

// A list that names nobody on a tunnel leaves it alone, and so does an ordinary
// renewal on either side (design §3).
func TestRenewalLeavesTunnelsAlone(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		root := catest.NewCA(t, meshTD)
		client, server := m.certify("client", "10.0.1.2", root, true), m.certify("server", "10.0.2.2", root, true)
		held := client.hold(server)
		stranger, _ := root.Leaf(t, clientID)
		client.revoke(root.CRL(t, 1, stranger[:1]))
		server.revoke(root.CRL(t, 1, stranger[:1]))
		client.become(root.SVID(t, catest.ID(clientID)))
		server.become(root.SVID(t, catest.ID(serverID)))
		if err := client.request(server.echoAddr(), "x"); err != nil {
			t.Error(err)
		}
		server.wantMetric(1, "istio_tcp_sockets_open", map[string]string{"reporter": "destination"})
		held.check("after the renewals")
	})
}

// held is a connection that stays open.
type held struct {
	t testing.TB
	c netns.Conn
}

// hold opens one to the echo of another node.
func (n *certified) hold(other *certified) held {
	n.m.t.Helper()
	h := held{n.m.t, n.mustDial(other.echoAddr())}
	h.check("the first bytes")
	return h
}

func (h held) check(when string) {
	h.t.Helper()
	if err := roundTrip(h.c, "x"); err != nil {
		h.t.Errorf("%s: %v", when, err)
	}
}

// reset wants the connection to have been cut.
func (h held) reset(when string) {
	h.t.Helper()
	if err := h.c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		h.t.Fatal(err)
	}
	if _, err := h.c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		h.t.Errorf("%s: read %v, want a reset", when, err)
	}
}

// Design §3: once the issuer or the bundle of one side has changed, a tunnel takes
// no new streams. On the inbound side that is a GOAWAY: the peer dials anew
// without losing anything, and the streams that are open go on.
func TestChangedTrustRetiresTunnels(t *testing.T) {
	for _, side := range []string{"server", "client"} {
		for _, change := range []string{"issuer", "bundle"} {
			t.Run(side+" "+change, func(t *testing.T) {
				inMesh(t, func(t *testing.T, m *mesh) {
					root, more := catest.NewCA(t, meshTD), catest.NewCA(t, meshTD)
					client, server := m.certify("client", "10.0.1.2", root, false), m.certify("server", "10.0.2.2", root, false)
					held := client.hold(server)
					who, id := server, catest.ID(serverID)
					if side == "client" {
						who, id = client, catest.ID(clientID)
					}
					if change == "issuer" {
						who.become(root.Intermediate(t).SVIDWith(t, id, root.Bundles(ca.Strict)))
					} else {
						who.become(root.SVIDWith(t, id, bundlesOf(root, more)))
					}
					tunnels := func(want float64) {
						server.wantMetric(want, "istio_tcp_sockets_open", map[string]string{"reporter": "destination"})
					}
					tunnels(1)
					for range 3 {
						if err := client.request(server.echoAddr(), "x"); err != nil {
							t.Error(err)
						}
					}
					tunnels(2)
					held.check("the stream of the old tunnel")
					held.c.Close()
					tunnels(1)
					client.wantMetric(0, "istio_tcp_connections_failed", nil)
					server.wantMetric(0, "istio_tcp_connections_failed", nil)
				})
			})
		}
	}
}

// bundlesOf are the roots of several CAs of one trust domain.
func bundlesOf(cas ...*catest.CA) *ca.Bundles {
	var anchors []ca.Anchor
	for _, c := range cas {
		anchors = append(anchors, c.Anchor(ca.Strict))
	}
	return ca.NewBundles(map[spiffeid.TrustDomain][]ca.Anchor{cas[0].TrustDomain: anchors})
}

// Design §3: a peer whose anchor has left the bundle loses its tunnels at once,
// in both roles.
func TestRemovedAnchorEndsTunnels(t *testing.T) {
	for _, side := range []string{"server", "client"} {
		t.Run(side, func(t *testing.T) {
			inMesh(t, func(t *testing.T, m *mesh) {
				root, more := catest.NewCA(t, meshTD), catest.NewCA(t, meshTD)
				client, server := m.certify("client", "10.0.1.2", root, false), m.certify("server", "10.0.2.2", root, false)
				held := client.hold(server)
				who, id := server, catest.ID(serverID)
				if side == "client" {
					who, id = client, catest.ID(clientID)
				}
				who.become(more.SVID(t, id))
				held.reset("the peer's anchor is gone")
				lines := who.logs.find(map[string]string{"message": "connection complete", "level": "error"})
				if len(lines) != 1 || !strings.HasPrefix(fmt.Sprint(lines[0]["error"]), "connection closed: no bundle of ours vouches for the peer certificate any more: certificate refused by R29") {
					t.Errorf("logged %v", lines)
				}
				who.wantMetric(1, "istio_tcp_connections_failed", map[string]string{"response_flags": "TLS_FAILURE"})
				who.wantMetric(0, rejections, nil)
			})
		})
	}
}

// A root that was issued anew with the same key keeps its tunnels: the peer's
// chain leads to it, too.
func TestReissuedAnchorKeepsTunnels(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		root := catest.NewCA(t, meshTD)
		again := *root
		again.Root = root.Cross(t, root)
		client, server := m.certify("client", "10.0.1.2", root, false), m.certify("server", "10.0.2.2", root, false)
		held := client.hold(server)
		server.become(root.SVIDWith(t, catest.ID(serverID), again.Bundles(ca.Strict)))
		held.check("the root was issued anew")
	})
}

func TestExpiryCutsNoStream(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		root := catest.NewCA(t, meshTD)
		client, server := m.certify("client", "10.0.1.2", root, true), m.certify("server", "10.0.2.2", root, true)
		short := catest.Life(time.Minute)
		client.become(root.SVID(t, catest.ID(clientID), short))
		server.become(root.SVID(t, catest.ID(serverID), short))
		held := client.hold(server)
		denied := ca.Event{State: ca.Unavailable, Err: fmt.Errorf("renewal: %w", ca.ErrDenied)}
		client.provider.Set(ca.Key{Provider: "test", ID: catest.ID(clientID)}, denied)
		server.provider.Set(ca.Key{Provider: "test", ID: catest.ID(serverID)}, denied)
		time.Sleep(time.Hour)
		stranger, _ := root.Leaf(t, clientID)
		client.revoke(root.CRL(t, 1, stranger[:1])) // judged as of the handshake
		held.check("an hour after the expiry of both certificates")
		if err := client.request(server.echoAddr(), "x"); err == nil {
			t.Error("a new connection succeeded with expired certificates")
		}
		// Clean up: nothing would end the tunnel otherwise.
		held.c.Close()
	})
}

// Case 105: the root is rotated under 1 000 connections a second, with leaves of
// both roots about. None fails. A stream that was opened under the old root goes
// on until that leaves the bundle.
func TestFault_105_RootRotation(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		older := catest.NewCA(t, meshTD)
		newer := older.Renewed(t) // the same name, as Istio's roots have
		client, server := m.certify("client", "10.0.1.2", older, true), m.certify("server", "10.0.2.2", older, true)
		held := client.hold(server)
		load := startLoad(client, server)
		give := func(issuer *catest.CA, bundles *ca.Bundles) {
			for _, n := range []*certified{server, client} {
				id := n.identity()
				n.become(issuer.SVIDWith(t, id, bundles))
				time.Sleep(300 * time.Millisecond) // the nodes learn of it one after the other
			}
		}
		both := bundlesOf(older, newer)
		give(older, both)
		give(newer, both)
		held.check("a stream of before the rotation")
		rotated := client.hold(server)
		give(newer, newer.Bundles(ca.Strict))
		load.stop()
		held.reset("the old root has left the bundles")
		rotated.check("a stream of the new root")
		server.wantMetric(2, "istio_tcp_sockets_open", map[string]string{"reporter": "destination"}) // that stream's, and the newest
		if load.sent < 1500 || len(load.failures) > 0 {
			t.Errorf("%d of %d connections failed, first: %v", len(load.failures), load.sent, load.failures)
		}
	})
}

// Case 105, inverse order: a leaf of the new root before its bundle, and the
// error says what is missing.
func TestFault_105_InverseOrder(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		older := catest.NewCA(t, meshTD)
		newer := older.Renewed(t)
		client, server := m.certify("client", "10.0.1.2", older, false), m.certify("server", "10.0.2.2", older, false)
		synctest.Wait()
		server.become(newer.SVIDWith(t, catest.ID(serverID), bundlesOf(older, newer)))
		if err := client.request(server.echoAddr(), "x"); err == nil {
			t.Fatal("a certificate of a root that is not in the bundle was accepted")
		}
		line := client.wantLog(map[string]string{"scope": "access", "message": "connection complete", "level": "error"})
		const want = "io error: tls handshake: certificate refused by R29: x509: certificate signed by unknown authority"
		if line != nil && !strings.HasPrefix(fmt.Sprint(line["error"]), want) {
			t.Errorf("error = %v, want %s", line["error"], want)
		}
	})
}

// connections is traffic in the background.
type connections struct {
	cancel   context.CancelFunc
	wg       sync.WaitGroup
	mu       sync.Mutex // guards what follows
	sent     int
	failures []error
}

// startLoad makes 1 000 connections a second, with one round trip each.
func startLoad(from, to *certified) *connections {
	ctx, cancel := context.WithCancel(from.m.ctx)
	l := &connections{cancel: cancel}
	for range 10 {
		l.wg.Go(func() {
			ticker := time.NewTicker(10 * time.Millisecond)
			defer ticker.Stop()
			for {
				select {
				case <-ctx.Done():
					return
				case <-ticker.C:
				}
				err := from.request(to.echoAddr(), "hello")
				l.mu.Lock()
				l.sent++
				if err != nil {
					l.failures = append(l.failures, err)
				}
				l.mu.Unlock()
			}
		})
	}
	return l
}

func (l *connections) stop() {
	l.cancel()
	l.wg.Wait()
}
