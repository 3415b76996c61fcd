package ca_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"maps"
	"net"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
)

func clientTLS(t testing.TB, svid *ca.SVID, opts ca.TLSOptions, expected ...spiffeid.ID) *tls.Config {
	t.Helper()
	conf, err := ca.ClientTLS(svid, expected, opts)
	if err != nil {
		t.Fatal(err)
	}
	return conf
}

// TestTLSIdentities is the matrix of identities and aliases (design D2; cases
// 60 and 61): the client's expectation, and the server's trust domain.
func TestTLSIdentities(t *testing.T) {
	td := func(s string) spiffeid.TrustDomain { return catest.TrustDomain(s) }
	id := func(s string) spiffeid.ID { return catest.ID("spiffe://" + s) }
	const mesh, alias, foreign = "mesh.test", "old.test", "foreign.test"
	aliased := ca.TLSOptions{DefaultTrustDomain: td(mesh), Aliases: []spiffeid.TrustDomain{td(alias)}}
	root := catest.NewCA(t, mesh)
	all := map[spiffeid.TrustDomain][]ca.Anchor{}
	for _, name := range []string{mesh, alias, foreign, "far.test"} {
		all[td(name)] = []ca.Anchor{root.Anchor(ca.Strict)} // whom to trust is not the question here
	}
	bundles := ca.NewBundles(all)
	tests := []struct {
		name           string
		client, server string
		expected       []string
		opts           ca.TLSOptions
		wantClient     string
		wantServer     string
	}{
		{"exact", mesh + "/ns/a/sa/c", mesh + "/ns/a/sa/s", []string{mesh + "/ns/a/sa/s"}, ca.TLSOptions{}, "", ""},
		{"one of several", mesh + "/ns/a/sa/c", mesh + "/ns/a/sa/s", []string{mesh + "/ns/a/sa/x", mesh + "/ns/a/sa/s"}, ca.TLSOptions{}, "", ""},
		{"other service account", mesh + "/ns/a/sa/c", mesh + "/ns/a/sa/s", []string{mesh + "/ns/a/sa/x", mesh + "/ns/a/sa/y"}, ca.TLSOptions{},
			"identity verification error: peer did not present the expected SAN (spiffe://mesh.test/ns/a/sa/x,spiffe://mesh.test/ns/a/sa/y), got spiffe://mesh.test/ns/a/sa/s", "-"},
		{"alias at the server", mesh + "/ns/a/sa/c", alias + "/ns/a/sa/s", []string{mesh + "/ns/a/sa/s"}, aliased, "", ""},
		{"alias expected", mesh + "/ns/a/sa/c", mesh + "/ns/a/sa/s", []string{alias + "/ns/a/sa/s"}, aliased, "", ""},
		{"alias, other path", mesh + "/ns/a/sa/c", alias + "/ns/a/sa/s", []string{mesh + "/ns/a/sa/x"}, aliased, "expected SAN", "-"},
		{"no alias configured", mesh + "/ns/a/sa/c", alias + "/ns/a/sa/s", []string{mesh + "/ns/a/sa/s"}, ca.TLSOptions{}, "expected SAN", "-"},
		{"alias at the client", alias + "/ns/a/sa/c", mesh + "/ns/a/sa/s", []string{mesh + "/ns/a/sa/s"}, aliased, "", ""},
		{"federated client", foreign + "/ns/a/sa/c", mesh + "/ns/a/sa/s", []string{mesh + "/ns/a/sa/s"}, aliased, "", ""},
		{"federated server", mesh + "/ns/a/sa/c", foreign + "/ns/a/sa/s", []string{foreign + "/ns/a/sa/s"}, aliased, "", ""},
		{"federated is no alias", foreign + "/ns/a/sa/c", foreign + "/ns/a/sa/s", []string{mesh + "/ns/a/sa/s"}, aliased, "expected SAN", "-"},
		{"aliases of others", foreign + "/ns/a/sa/c", alias + "/ns/a/sa/s", []string{mesh + "/ns/a/sa/s"}, aliased, "expected SAN", "-"},
		{"both in one foreign domain", foreign + "/ns/a/sa/c", foreign + "/ns/a/sa/s", []string{foreign + "/ns/a/sa/s"}, aliased, "", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var expected []spiffeid.ID
			for _, e := range tt.expected {
				expected = append(expected, id(e))
			}
			client := root.SVIDWith(t, id(tt.client), bundles)
			server := root.SVIDWith(t, id(tt.server), bundles)
			cs, ss, clientErr, serverErr := connectStates(t, clientTLS(t, client, tt.opts, expected...), ca.ServerTLS(server, tt.opts))
			for _, side := range []struct {
				name, want string
				err        error
			}{{"client", tt.wantClient, clientErr}, {"server", tt.wantServer, serverErr}} {
				switch {
				case side.want == "" && side.err != nil:
					t.Errorf("%s: %v, want success", side.name, side.err)
				case side.want == "-" && side.err == nil && side.name == "client":
					t.Errorf("%s succeeded, though its peer refused", side.name)
				case side.want != "" && side.want != "-":
					var peer *ca.PeerError
					if !errors.As(side.err, &peer) || !strings.Contains(side.err.Error(), side.want) {
						t.Errorf("%s: %v, want %q", side.name, side.err, side.want)
					}
				}
			}
			if tt.wantClient != "" || tt.wantServer != "" {
				return
			}
			if got, err := ca.PeerID(cs); err != nil || got != id(tt.server) {
				t.Errorf("the client's PeerID is %v, %v", got, err)
			}
			if got, err := ca.PeerID(ss); err != nil || got != id(tt.client) {
				t.Errorf("the server's PeerID is %v, %v", got, err)
			}
		})
	}
}

// TestFault_057_Federation: a server takes clients of the trust domains of which
// it holds a bundle, each by that bundle: without one, or signed by another
// domain's root, they are refused. The grant is the provider's, so that taking
// it back is a change of the bundles.
func TestFault_057_Federation(t *testing.T) {
	const mesh, foreign = "mesh.test", "foreign.test"
	meshRoot, foreignRoot := catest.NewCA(t, mesh), catest.NewCA(t, foreign)
	server, client := catest.ID("spiffe://"+mesh+"/ns/a/sa/s"), catest.ID("spiffe://"+foreign+"/ns/a/sa/c")
	own := map[spiffeid.TrustDomain][]ca.Anchor{catest.TrustDomain(mesh): {meshRoot.Anchor(ca.Strict)}}
	both := maps.Clone(own)
	both[catest.TrustDomain(foreign)] = []ca.Anchor{foreignRoot.Anchor(ca.Strict)}
	for _, tt := range []struct {
		name    string
		client  *ca.SVID
		granted map[spiffeid.TrustDomain][]ca.Anchor
		want    string // the rule that the client breaks
	}{
		{"granted", foreignRoot.SVIDWith(t, client, ca.NewBundles(both)), both, ""},
		{"not granted", foreignRoot.SVIDWith(t, client, ca.NewBundles(both)), own, "R29"},
		{"the root of the mesh signs for the other domain", meshRoot.SVIDWith(t, client, ca.NewBundles(both)), both, "R29"},
		{"the root of the other domain signs for the mesh", foreignRoot.SVIDWith(t, server, ca.NewBundles(both)), both, "R29"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			conf := ca.ServerTLS(meshRoot.SVIDWith(t, server, ca.NewBundles(tt.granted)), ca.TLSOptions{})
			_, _, _, err := connectStates(t, clientTLS(t, tt.client, ca.TLSOptions{}, server), conf)
			if tt.want == "" && err != nil {
				t.Errorf("%v, want success", err)
			}
			if tt.want != "" && rule(t, err) != tt.want {
				t.Errorf("%v, want %s", err, tt.want)
			}
		})
	}
}

func TestClientTLSErrors(t *testing.T) {
	svid := catest.NewCA(t, "td.test").SVID(t, web)
	if _, err := ca.ClientTLS(svid, nil, ca.TLSOptions{}); err == nil {
		t.Error("an empty expected set is no error")
	}
	if _, err := ca.ClientTLS(nil, []spiffeid.ID{web}, ca.TLSOptions{}); err == nil {
		t.Error("no SVID is no error")
	}
	for _, cs := range []tls.ConnectionState{{}, {HandshakeComplete: true}, {PeerCertificates: []*x509.Certificate{svid.Cert.Leaf}}} {
		if id, err := ca.PeerID(cs); err == nil {
			t.Errorf("PeerID of an unauthenticated peer is %v", id)
		}
	}
}

// TestID_TL09_Rules is TL-09 as design D1 amends it.
func TestID_TL09_Rules(t *testing.T) {
	td := catest.NewCA(t, "td.test")
	svid := td.SVID(t, web)

	t.Run("expired root is refused", func(t *testing.T) { // unlike the reference
		w := catest.NewWorld(t)
		for _, c := range w.Cases(t) {
			if c.Name == "R24 expired root" {
				if _, err := ca.VerifySVID(c.Chain, w.Bundles(ca.Compatible), ca.VerifyOptions{}); rule(t, err) != "R24" {
					t.Errorf("got %v, want R24", err)
				}
				return
			}
		}
		t.Error("no such case")
	})
	t.Run("CA as leaf is refused", func(t *testing.T) {
		chain, _ := td.Leaf(t, web.String(), func(c *x509.Certificate) { c.IsCA = true })
		if _, err := ca.VerifySVID(chain, svid.Bundles, ca.VerifyOptions{}); rule(t, err) != "R21" {
			t.Errorf("got %v, want R21", err)
		}
	})
	t.Run("client without ALPN is accepted", func(t *testing.T) {
		client := clientTLS(t, svid, ca.TLSOptions{}, web)
		client.NextProtos = nil
		if c, s := connect(t, client, ca.ServerTLS(svid, ca.TLSOptions{})); c != nil || s != nil {
			t.Errorf("client %v, server %v", c, s)
		}
	})
	t.Run("no SNI, h2, no session", func(t *testing.T) {
		var hello *tls.ClientHelloInfo
		server := ca.ServerTLS(svid, ca.TLSOptions{})
		server.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) { hello = h; return nil, nil }
		client := clientTLS(t, svid, ca.TLSOptions{}, web)
		client.ClientSessionCache = tls.NewLRUClientSessionCache(8)
		for range 2 {
			cs, ss, c, s := connectStates(t, client, server)
			if c != nil || s != nil {
				t.Fatalf("client %v, server %v", c, s)
			}
			if hello.ServerName != "" || len(hello.SupportedProtos) != 1 || hello.SupportedProtos[0] != "h2" {
				t.Errorf("hello has name %q, protocols %v", hello.ServerName, hello.SupportedProtos)
			}
			if cs.DidResume || ss.DidResume || cs.NegotiatedProtocol != "h2" || cs.Version != tls.VersionTLS13 {
				t.Errorf("state %+v", cs)
			}
		}
	})
}

// TestTLSAlerts is design D3: which alert the peer sees. Case 50 is among them.
func TestTLSAlerts(t *testing.T) {
	td := catest.NewCA(t, "td.test")
	svid := td.SVID(t, web)
	stranger := catest.NewCA(t, "td.test").SVIDWith(t, web, svid.Bundles)
	plain := func(c *tls.Config) *tls.Config { return c }
	tests := []struct {
		name   string
		client *tls.Config
		want   string
	}{
		{"unknown CA", clientTLS(t, stranger, ca.TLSOptions{}, web), "bad certificate"},
		{"no certificate", plain(&tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}), "certificate required"},
		// crypto/tls treats a peer that offers only http/1.1 as one without ALPN;
		// it fails at the HTTP/2 preface.
		{"other protocol", plain(&tls.Config{InsecureSkipVerify: true, NextProtos: []string{"spdy/3"}, Certificates: []tls.Certificate{*svid.Cert}}), "no application protocol"},
		{"TLS 1.2", plain(&tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12, Certificates: []tls.Certificate{*svid.Cert}}), "protocol version not supported"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			clientErr, serverErr := connect(t, tt.client, ca.ServerTLS(svid, ca.TLSOptions{}))
			if serverErr == nil || clientErr == nil || !strings.Contains(clientErr.Error(), tt.want) {
				t.Errorf("the client sees %v (server: %v), want %q", clientErr, serverErr, tt.want)
			}
		})
	}
}

// TestTLSOptions: versions, suites and groups.
// TestID_TL01_Chain is TL-01: the leaf and two intermediates are presented, the
// root is not.
func TestID_TL01_Chain(t *testing.T) {
	td := catest.NewCA(t, "td.test")
	below := td.Intermediate(t).Intermediate(t)
	chain, key := below.Leaf(t, web.String())
	svid, err := ca.NewSVID("istio", append(chain, td.Root), key, td.Bundles(ca.Strict))
	if err != nil {
		t.Fatal(err)
	}
	if n := len(svid.Cert.Certificate); n != 3 {
		t.Errorf("%d certificates are presented, want 3", n)
	}
	if n := len(svid.Bundles.Anchors(svid.ID.TrustDomain())); n != 1 {
		t.Errorf("%d anchors, want 1", n)
	}
	if c, s := connect(t, clientTLS(t, svid, ca.TLSOptions{}, web), ca.ServerTLS(svid, ca.TLSOptions{})); c != nil || s != nil {
		t.Errorf("client %v, server %v", c, s)
	}
}

// TestID_TL05_MultiRoot is TL-05: during a rotation certificates of both roots
// work together.
func TestID_TL05_MultiRoot(t *testing.T) {
	old := catest.NewCA(t, "td.test")
	next := old.Renewed(t)
	both := ca.NewBundles(map[spiffeid.TrustDomain][]ca.Anchor{old.TrustDomain: {old.Anchor(ca.Strict), next.Anchor(ca.Strict)}})
	a, b := old.SVIDWith(t, web, both), next.SVIDWith(t, other, both)
	for _, pair := range [][2]*ca.SVID{{a, b}, {b, a}} {
		c, s := connect(t, clientTLS(t, pair[0], ca.TLSOptions{}, pair[1].ID), ca.ServerTLS(pair[1], ca.TLSOptions{}))
		if c != nil || s != nil {
			t.Errorf("client %v, server %v", c, s)
		}
	}
	alone := next.SVID(t, other) // does not know the old root any more
	if _, s := connect(t, clientTLS(t, a, ca.TLSOptions{}, other), ca.ServerTLS(alone, ca.TLSOptions{})); rule(t, s) != "R29" {
		t.Errorf("old root after the rotation: %v, want R29", s)
	}
}

// TestRevokedHook: both directions ask about the verified path.
func TestRevokedHook(t *testing.T) {
	td := catest.NewCA(t, "td.test").Intermediate(t)
	svid := td.SVID(t, web)
	revoked := errors.New("revoked")
	opts := ca.TLSOptions{Revoked: func(path []*x509.Certificate) error {
		if len(path) != 3 || !path[2].Equal(td.Root) {
			return errors.New("not the verified path")
		}
		return revoked
	}}
	if c, _ := connect(t, clientTLS(t, svid, opts, web), ca.ServerTLS(svid, ca.TLSOptions{})); !errors.Is(c, revoked) {
		t.Errorf("client: %v, want revoked", c)
	}
	if _, s := connect(t, clientTLS(t, svid, ca.TLSOptions{}, web), ca.ServerTLS(svid, opts)); !errors.Is(s, revoked) {
		t.Errorf("server: %v, want revoked", s)
	}
}

// TestPlaintext is case 49, as far as TLS goes.
func TestPlaintext(t *testing.T) {
	svid := catest.NewCA(t, "td.test").SVID(t, web)
	for _, text := range []string{"GET / HTTP/1.1\r\n\r\n", "SSH-2.0-x\r\n", strings.Repeat("\x00", 64), strings.Repeat("\xff", 64)} {
		client, server := loopback(t)
		conn := tls.Server(server, ca.ServerTLS(svid, ca.TLSOptions{}))
		if _, err := io.WriteString(client, text); err != nil {
			t.Fatal(err)
		}
		if err := conn.Handshake(); err == nil {
			t.Errorf("%q: accepted", text[:4])
		}
		client.Close()
		server.Close()
	}
}

// BenchmarkHandshake compares our configurations with bare crypto/tls that
// verifies nothing, both in one run.
func BenchmarkHandshake(b *testing.B) {
	td := catest.NewCA(b, "td.test")
	client, server := td.SVID(b, web), td.SVID(b, other)
	bare := func(svid *ca.SVID) *tls.Config {
		return &tls.Config{
			Certificates: []tls.Certificate{*svid.Cert}, InsecureSkipVerify: true, ClientAuth: tls.RequireAnyClientCert,
			MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, SessionTicketsDisabled: true,
		}
	}
	run := func(c, s func() *tls.Config) func(*testing.B) {
		return func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				handshakeOnce(b, c(), s())
			}
		}
	}
	b.Run("bare", run(func() *tls.Config { return bare(client) }, func() *tls.Config { return bare(server) }))
	b.Run("verified", run(
		func() *tls.Config { return clientTLS(b, client, ca.TLSOptions{}, other) },
		func() *tls.Config { return ca.ServerTLS(server, ca.TLSOptions{}) },
	))
	chain, err := client.Chain()
	if err != nil {
		b.Fatal(err)
	}
	b.Run("VerifySVID", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := ca.VerifySVID(chain, client.Bundles, ca.VerifyOptions{}); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func handshakeOnce(b *testing.B, client, server *tls.Config) {
	x, y := net.Pipe()
	defer x.Close()
	defer y.Close()
	done := make(chan error, 1)
	go func() { done <- tls.Server(y, server).Handshake() }()
	if err := tls.Client(x, client).Handshake(); err != nil {
		b.Error(err)
	}
	if err := <-done; err != nil {
		b.Error(err)
	}
}
