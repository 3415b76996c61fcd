package ca_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
)

// rule is the rule of a refusal, "" for none.
func rule(t *testing.T, err error) string {
	t.Helper()
	if err == nil {
		return ""
	}
	var v *ca.VerifyError
	if !errors.As(err, &v) {
		t.Fatalf("error %v (%T) is no *VerifyError", err, err)
	}
	return v.Rule
}

// TestFaults_55_Matrix is case 55: every hostile certificate, presented by a client
// and by a server, under both modes.
func TestFaults_55_Matrix(t *testing.T) {
	w := catest.NewWorld(t)
	cases := w.Cases(t)
	refused := 0
	for _, c := range cases {
		if c.Strict != "" {
			refused++
		}
	}
	if len(cases) < 55 || refused < 44 {
		t.Fatalf("%d cases with %d refusals, want at least 55 with 44", len(cases), refused)
	}
	for _, c := range cases {
		t.Run(c.Name, func(t *testing.T) {
			for _, run := range []struct {
				name  string
				mode  ca.Mode
				usage ca.Usage
				want  string
			}{
				{"strict client", ca.Strict, ca.Client, c.Strict},
				{"strict server", ca.Strict, ca.Server, c.Strict},
				{"compatible client", ca.Compatible, ca.Client, c.Client},
				{"compatible server", ca.Compatible, ca.Server, c.Server},
			} {
				_, err := ca.VerifySVID(c.Chain, w.Bundles(run.mode), ca.VerifyOptions{Usage: run.usage})
				if got := rule(t, err); got != run.want {
					t.Errorf("%s: refused by %q (%v), want %q", run.name, got, err, run.want)
				}
				if err := handshake(t, w, c, run.mode, run.usage); rule(t, err) != run.want {
					t.Errorf("%s: handshake: %v, want refusal by %q", run.name, err, run.want)
				}
			}
		})
	}
}

// handshake presents the case's chain to one of our configurations over TLS,
// and returns what ours says.
func handshake(t *testing.T, w *catest.World, c catest.Case, mode ca.Mode, usage ca.Usage) error {
	t.Helper()
	ours := w.Own.SVIDWith(t, catest.ID("spiffe://td.test/ns/us/sa/us"), w.Bundles(mode))
	cert := tls.Certificate{PrivateKey: c.Key}
	for _, x := range c.Chain {
		cert.Certificate = append(cert.Certificate, x.Raw)
	}
	theirs := &tls.Config{
		Certificates: []tls.Certificate{cert}, InsecureSkipVerify: true, NextProtos: []string{"h2"}, ClientAuth: tls.RequestClientCert,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil },
	}
	// The federated and the odd trust domains are ours as well: this test is
	// about certificates.
	opts := ca.TLSOptions{Aliases: []spiffeid.TrustDomain{catest.TrustDomain("other.test"), catest.TrustDomain("10.0.0.1")}}
	if usage == ca.Client {
		_, err := connect(t, theirs, ca.ServerTLS(ours, opts))
		return err
	}
	expected := []spiffeid.ID{catest.ID(catest.GoodID)}
	if len(c.Chain[0].URIs) == 1 {
		if id, err := spiffeid.FromURI(c.Chain[0].URIs[0]); err == nil && id.Path() != "" {
			expected = append(expected, id)
		}
	}
	conf, err := ca.ClientTLS(ours, expected, opts)
	if err != nil {
		t.Fatal(err)
	}
	err, _ = connect(t, conf, theirs)
	return err
}

// loopback is a connected pair of sockets. A net.Pipe would not do: without a
// buffer, a refusal and the rest of the peer's flight wait for each other.
func loopback(t testing.TB) (client, server net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err = net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	server, err = l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return client, server
}

// connect shakes hands and returns what each side says. A refused
// side learns of it by reading.
func connect(t *testing.T, client, server *tls.Config) (clientErr, serverErr error) {
	t.Helper()
	_, _, clientErr, serverErr = connectStates(t, client, server)
	return clientErr, serverErr
}

func connectStates(t *testing.T, client, server *tls.Config) (cs, ss tls.ConnectionState, clientErr, serverErr error) {
	t.Helper()
	a, b := loopback(t)
	deadline := time.Now().Add(20 * time.Second)
	for _, c := range []net.Conn{a, b} {
		if err := c.SetDeadline(deadline); err != nil {
			t.Fatal(err)
		}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn := tls.Server(b, server)
		if serverErr = conn.Handshake(); serverErr == nil {
			_, serverErr = conn.Write([]byte("x"))
		}
		ss = conn.ConnectionState()
		b.Close()
	}()
	conn := tls.Client(a, client)
	if clientErr = conn.Handshake(); clientErr == nil {
		_, clientErr = conn.Read(make([]byte, 1))
	}
	cs = conn.ConnectionState()
	a.Close()
	<-done
	return cs, ss, clientErr, serverErr
}

// TestFaults_56_ConfusedIdentity is case 56.
func TestFaults_56_ConfusedIdentity(t *testing.T) {
	w := catest.NewWorld(t)
	good, victim := "spiffe://td.test/ns/a/sa/good", "spiffe://td.test/ns/a/sa/victim"
	for _, uris := range [][]string{{good, victim}, {victim, good}, {good, good}} {
		chain, _ := w.Own.Leaf(t, good, catest.URIs(uris...))
		for _, mode := range []ca.Mode{ca.Strict, ca.Compatible} {
			_, err := ca.VerifySVID(chain, w.Bundles(mode), ca.VerifyOptions{})
			if got := rule(t, err); got != "R17" {
				t.Errorf("%v, %v: refused by %q, want R17", uris, mode, got)
			}
		}
		state := tls.ConnectionState{HandshakeComplete: true, PeerCertificates: chain}
		if id, err := ca.PeerID(state); err == nil {
			t.Errorf("%v: PeerID = %v, want an error", uris, id)
		}
	}
}

// TestFaults_57_BundlePerTrustDomain is case 57: a federated root cannot speak for
// our trust domain, nor for a third one.
func TestFaults_57_BundlePerTrustDomain(t *testing.T) {
	w := catest.NewWorld(t)
	for _, id := range []string{"spiffe://td.test/ns/a/sa/b", "spiffe://nobody.test/ns/a/sa/b"} {
		chain, _ := w.Other.Leaf(t, id)
		_, err := ca.VerifySVID(chain, w.Bundles(ca.Compatible), ca.VerifyOptions{})
		if got := rule(t, err); got != "R29" {
			t.Errorf("%s by the CA of other.test: refused by %q, want R29", id, got)
		}
	}
}

// TestFaults_58_SharedKey is case 58: one CA key in two bundles signs for both
// trust domains, and each certificate counts for the one that it names.
func TestFaults_58_SharedKey(t *testing.T) {
	w := catest.NewWorld(t)
	a, b := catest.TrustDomain("td.test"), catest.TrustDomain("twin.test")
	both := ca.NewBundles(map[spiffeid.TrustDomain][]ca.Anchor{a: {w.Own.Anchor(ca.Strict)}, b: {w.Own.Anchor(ca.Strict)}})
	only := w.Own.Bundles(ca.Strict)
	chain, _ := w.Own.Leaf(t, "spiffe://twin.test/ns/a/sa/b")
	v, err := ca.VerifySVID(chain, both, ca.VerifyOptions{})
	if err != nil || v.ID.TrustDomain() != b {
		t.Errorf("got %v, %v, want an identity of twin.test", v.ID, err)
	}
	if _, err := ca.VerifySVID(chain, only, ca.VerifyOptions{}); rule(t, err) != "R29" {
		t.Errorf("without a bundle for twin.test: %v, want R29", err)
	}
}

// TestAliasOfIntermediate is R26 for aliases: an intermediate that names the
// mesh's trust domain also signs for its aliases. It is the only further name.
func TestAliasOfIntermediate(t *testing.T) {
	root := catest.NewCA(t, "td.test")
	plain := root.Bundles(ca.Strict)
	aliased := plain.WithAliases(root.TrustDomain, catest.TrustDomain("alias.test"), catest.TrustDomain("other-alias.test"))
	alias := catest.TrustDomain("alias.test")
	delivered := ca.NewBundles(map[spiffeid.TrustDomain][]ca.Anchor{root.TrustDomain: {root.Anchor(ca.Strict)}, alias: {root.Anchor(ca.Strict)}})
	tests := []struct {
		name              string
		bundles           *ca.Bundles
		intermediate, own string
		want              string
	}{
		{"alias below the mesh's", aliased, "spiffe://td.test", "spiffe://alias.test/ns/a/sa/b", ""},
		{"after a union", ca.Union(aliased, catest.NewCA(t, "x.test").Bundles(ca.Strict)), "spiffe://td.test", "spiffe://alias.test/ns/a/sa/b", ""},
		{"alias below its own", aliased, "spiffe://alias.test", "spiffe://alias.test/ns/a/sa/b", ""},
		{"the mesh's own", aliased, "spiffe://td.test", "spiffe://td.test/ns/a/sa/b", ""},
		{"the mesh below an alias", aliased, "spiffe://alias.test", "spiffe://td.test/ns/a/sa/b", "R26"},
		{"alias below another alias", aliased, "spiffe://other-alias.test", "spiffe://alias.test/ns/a/sa/b", "R26"},
		{"alias below a stranger", aliased, "spiffe://x.test", "spiffe://alias.test/ns/a/sa/b", "R26"},
		{"alias below a workload of the mesh", aliased, "spiffe://td.test/ns/a/sa/ca", "spiffe://alias.test/ns/a/sa/b", "R26"},
		{"a trust domain of its own", delivered, "spiffe://td.test", "spiffe://alias.test/ns/a/sa/b", "R26"},
		{"no alias", plain, "spiffe://td.test", "spiffe://alias.test/ns/a/sa/b", "R29"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			inter := root.Intermediate(t, catest.URIs(tt.intermediate), func(c *x509.Certificate) {
				c.KeyUsage = x509.KeyUsageCertSign
			})
			chain, _ := inter.Leaf(t, tt.own)
			_, err := ca.VerifySVID(chain, tt.bundles, ca.VerifyOptions{})
			if tt.want == "" && err != nil || tt.want != "" && rule(t, err) != tt.want {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

// TestAliasKeepsItsOwnBundle: an alias for which there is a bundle, be it empty, does
// not get that of the mesh (design D2).
func TestAliasKeepsItsOwnBundle(t *testing.T) {
	mesh, old := catest.NewCA(t, "td.test"), catest.NewCA(t, "old.test")
	empty, none := catest.TrustDomain("empty.test"), catest.TrustDomain("none.test")
	b := ca.NewBundles(map[spiffeid.TrustDomain][]ca.Anchor{
		mesh.TrustDomain: {mesh.Anchor(ca.Strict)}, old.TrustDomain: {old.Anchor(ca.Strict)}, empty: nil,
	}).WithAliases(mesh.TrustDomain, old.TrustDomain, empty, none)
	for td, want := range map[spiffeid.TrustDomain][]*catest.CA{mesh.TrustDomain: {mesh}, old.TrustDomain: {old}, empty: nil, none: {mesh}} {
		as := b.Anchors(td)
		if len(as) != len(want) || len(want) > 0 && !as[0].Cert.Equal(want[0].Cert) {
			t.Errorf("%s: %d anchors, want %d of its own", td, len(as), len(want))
		}
	}
}

func TestEmptyBundleRefusesAll(t *testing.T) { // R31
	w := catest.NewWorld(t)
	chain, _ := w.Own.Leaf(t, catest.GoodID)
	empty := ca.NewBundles(map[spiffeid.TrustDomain][]ca.Anchor{w.Own.TrustDomain: nil})
	for _, b := range []*ca.Bundles{nil, empty} {
		if _, err := ca.VerifySVID(chain, b, ca.VerifyOptions{}); rule(t, err) != "R29" {
			t.Errorf("got %v, want R29", err)
		}
	}
	if _, err := ca.VerifySVID(nil, w.Bundles(ca.Strict), ca.VerifyOptions{}); rule(t, err) != "R24" {
		t.Errorf("no certificate: got %v, want R24", err)
	}
}

// TestToleratedIsCounted holds that compatible mode counts what it forgives,
// and that the mode of the anchor decides, unless overridden.
func TestToleratedIsCounted(t *testing.T) {
	w := catest.NewWorld(t)
	bare := w.Own.Intermediate(t, func(c *x509.Certificate) { c.KeyUsage = 0 })
	chain, _ := bare.Leaf(t, catest.GoodID, catest.NonCriticalURIs(catest.GoodID), func(c *x509.Certificate) {
		c.KeyUsage, c.ExtKeyUsage = 0, nil
	})
	tests := []struct {
		name       string
		anchor     ca.Mode
		validation ca.Validation
		refused    string
		tolerated  []string
	}{
		{"compatible anchor", ca.Compatible, ca.PerAnchor, "", []string{"R20", "R22", "R23", "R25"}},
		{"strict anchor", ca.Strict, ca.PerAnchor, "R20", nil},
		{"always strict", ca.Compatible, ca.AlwaysStrict, "R20", nil},
		{"always compatible", ca.Strict, ca.AlwaysCompatible, "", []string{"R20", "R22", "R23", "R25"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var tolerated []string
			_, err := ca.VerifySVID(chain, w.Bundles(tt.anchor), ca.VerifyOptions{
				Validation: tt.validation, Tolerated: func(r string) { tolerated = append(tolerated, r) },
			})
			if got := rule(t, err); got != tt.refused {
				t.Errorf("refused by %q (%v), want %q", got, err, tt.refused)
			}
			slices.Sort(tolerated)
			if d := cmp.Diff(tt.tolerated, tolerated); d != "" {
				t.Errorf("tolerated (-want +got):\n%s", d)
			}
		})
	}
}

// TestSharedAnchorOfTwoModes: one root may stand behind a strict and a
// compatible provider; a certificate needs to please one of them.
func TestSharedAnchorOfTwoModes(t *testing.T) {
	w := catest.NewWorld(t)
	chain, _ := w.Own.Leaf(t, catest.GoodID, func(c *x509.Certificate) { c.ExtKeyUsage = nil })
	strict, compatible := w.Own.Anchor(ca.Strict), w.Own.Anchor(ca.Compatible)
	b := ca.NewBundles(map[spiffeid.TrustDomain][]ca.Anchor{w.Own.TrustDomain: {strict, compatible}})
	v, err := ca.VerifySVID(chain, b, ca.VerifyOptions{})
	if err != nil || v.Mode != ca.Compatible {
		t.Errorf("without EKU: mode %v, %v, want compatible", v.Mode, err)
	}
	good, _ := w.Own.Leaf(t, catest.GoodID)
	if v, err := ca.VerifySVID(good, b, ca.VerifyOptions{}); err != nil || v.Mode != ca.Strict {
		t.Errorf("ordinary: mode %v, %v, want strict", v.Mode, err)
	}
}

// TestAnchorMustNotAuthenticate: crypto/x509 accepts a leaf that is itself in
// the pool of roots.
func TestAnchorMustNotAuthenticate(t *testing.T) {
	w := catest.NewWorld(t)
	chain, _ := w.Own.Leaf(t, catest.GoodID)
	b := ca.NewBundles(map[spiffeid.TrustDomain][]ca.Anchor{w.Own.TrustDomain: {{Cert: chain[0]}}})
	if _, err := ca.VerifySVID(chain, b, ca.VerifyOptions{}); rule(t, err) != "R27" {
		t.Errorf("got %v, want R27", err)
	}
}

// TestVerifyAtATime: a chain can be judged at the time of its handshake.
func TestVerifyAtATime(t *testing.T) {
	w := catest.NewWorld(t)
	chain, _ := w.Own.Leaf(t, catest.GoodID, catest.Between(-2*time.Minute, -time.Minute))
	if _, err := ca.VerifySVID(chain, w.Bundles(ca.Strict), ca.VerifyOptions{}); rule(t, err) != "R24" {
		t.Errorf("now: %v, want R24", err)
	}
	then := time.Now().Add(-90 * time.Second)
	if _, err := ca.VerifySVID(chain, w.Bundles(ca.Strict), ca.VerifyOptions{Now: then}); err != nil {
		t.Errorf("while it was valid: %v", err)
	}
}

func TestParseValidation(t *testing.T) {
	for in, want := range map[string]ca.Validation{"": ca.PerAnchor, "strict": ca.AlwaysStrict, "compatible": ca.AlwaysCompatible} {
		if got, err := ca.ParseValidation(in); err != nil || got != want {
			t.Errorf("ParseValidation(%q) = %v, %v, want %v", in, got, err, want)
		}
	}
	if _, err := ca.ParseValidation("lax"); err == nil || !strings.Contains(err.Error(), "strict or compatible") {
		t.Errorf("ParseValidation(lax): %v, want an error that names the choices", err)
	}
}

// FuzzVerifySVID feeds DER certificates (several may follow each other), and
// holds what must be true of anything that is accepted.
func FuzzVerifySVID(f *testing.F) {
	w := catest.NewWorld(f)
	for _, c := range w.Cases(f) {
		var der []byte
		for _, x := range c.Chain {
			der = append(der, x.Raw...)
		}
		f.Add(der)
	}
	f.Fuzz(func(t *testing.T, der []byte) {
		chain, err := x509.ParseCertificates(der)
		if err != nil {
			return
		}
		for _, mode := range []ca.Mode{ca.Strict, ca.Compatible} {
			v, err := ca.VerifySVID(chain, w.Bundles(mode), ca.VerifyOptions{})
			if err != nil {
				rule(t, err)
				continue
			}
			leaf := v.Path[0]
			if leaf.IsCA || len(leaf.URIs) != 1 || leaf.URIs[0].String() != v.ID.String() {
				t.Errorf("accepted %v with URIs %v, CA %v", v.ID, leaf.URIs, leaf.IsCA)
			}
			id, err := ca.PeerID(tls.ConnectionState{HandshakeComplete: true, PeerCertificates: chain})
			if err != nil || id != v.ID {
				t.Errorf("PeerID = %v, %v, verified was %v", id, err, v.ID)
			}
		}
	})
}
