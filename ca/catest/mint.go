// Package catest has what tests of certificates need: chains with and without
// defects, a provider with setters, and the conformance suite of providers. It
// never reaches the binary.
package catest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
)

// CA signs certificates of one trust domain. It checks nothing: it will sign
// whatever a test wants refused.
type CA struct {
	TrustDomain spiffeid.TrustDomain
	Cert        *x509.Certificate
	Key         crypto.Signer
	// Above are the certificates between this CA and its root, nearest first.
	Above []*x509.Certificate
	// Root is the certificate that ends its chains.
	Root *x509.Certificate
}

// Option changes a certificate before it is signed.
type Option func(*x509.Certificate)

// NewCA makes a root for the trust domain named td.
func NewCA(tb testing.TB, td string, opts ...Option) *CA {
	tb.Helper()
	domain := spiffeid.RequireTrustDomainFromString(td)
	template := caTemplate("root of "+td, opts)
	key := newKey(tb)
	cert := sign(tb, template, template, key.Public(), key)
	return &CA{TrustDomain: domain, Cert: cert, Key: key, Root: cert}
}

// Intermediate makes a CA below c.
func (c *CA) Intermediate(tb testing.TB, opts ...Option) *CA {
	tb.Helper()
	key := newKey(tb)
	cert := sign(tb, caTemplate("intermediate of "+c.TrustDomain.Name(), opts), c.Cert, key.Public(), c.Key)
	return &CA{TrustDomain: c.TrustDomain, Cert: cert, Key: key, Above: slices.Concat([]*x509.Certificate{cert}, c.Above), Root: c.Root}
}

// Cross signs the key and the name of other, whose chains then also lead to c.
func (c *CA) Cross(tb testing.TB, other *CA) *x509.Certificate {
	tb.Helper()
	template := *other.Cert
	template.SerialNumber = nil
	return sign(tb, &template, c.Cert, other.Key.Public(), c.Key)
}

// Renewed is c with a new key and the same name: a rotated root.
func (c *CA) Renewed(tb testing.TB) *CA {
	tb.Helper()
	return NewCA(tb, c.TrustDomain.Name())
}

// Leaf makes a certificate for the SPIFFE ID in the form that Istio and SPIRE
// issue, valid for an hour, and returns its chain with its key.
func (c *CA) Leaf(tb testing.TB, id string, opts ...Option) ([]*x509.Certificate, crypto.Signer) {
	tb.Helper()
	key := newKey(tb)
	now := time.Now()
	template := &x509.Certificate{
		NotBefore:             now,
		NotAfter:              now.Add(time.Hour),
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	URIs(id)(template)
	for _, o := range opts {
		o(template)
	}
	return slices.Concat([]*x509.Certificate{sign(tb, template, c.Cert, key.Public(), c.Key)}, c.Above), key
}

// SVID makes an SVID for id whose bundles are the CA's root, judged strictly.
func (c *CA) SVID(tb testing.TB, id spiffeid.ID, opts ...Option) *ca.SVID {
	tb.Helper()
	return c.SVIDWith(tb, id, c.Bundles(ca.Strict), opts...)
}

// SVIDWith makes an SVID for id that judges peers by bundles.
func (c *CA) SVIDWith(tb testing.TB, id spiffeid.ID, bundles *ca.Bundles, opts ...Option) *ca.SVID {
	tb.Helper()
	chain, key := c.Leaf(tb, id.String(), opts...)
	svid, err := ca.NewSVID("test", chain, key, bundles)
	if err != nil {
		tb.Fatalf("make an SVID for %s: %v", id, err)
	}
	return svid
}

// Bundles are the CA's root for its trust domain.
func (c *CA) Bundles(mode ca.Mode) *ca.Bundles {
	return ca.NewBundles(map[spiffeid.TrustDomain][]ca.Anchor{c.TrustDomain: {c.Anchor(mode)}})
}

// Anchor is the CA's root.
func (c *CA) Anchor(mode ca.Mode) ca.Anchor {
	return ca.Anchor{Cert: c.Root, Provider: "test", Mode: mode}
}

// Life makes a certificate valid for d from now.
func Life(d time.Duration) Option {
	return func(t *x509.Certificate) {
		t.NotBefore = time.Now()
		t.NotAfter = t.NotBefore.Add(d)
	}
}

// Between makes a certificate valid from from to to, relative to now.
func Between(from, to time.Duration) Option {
	return func(t *x509.Certificate) {
		now := time.Now()
		t.NotBefore, t.NotAfter = now.Add(from), now.Add(to)
	}
}

// URIs sets the subject alternative name to exactly these URIs, in a critical
// extension, written as they are.
func URIs(uris ...string) Option {
	return func(t *x509.Certificate) { setSAN(t, true, uris, nil) }
}

// NonCriticalURIs is URIs in an extension that is not critical.
func NonCriticalURIs(uris ...string) Option {
	return func(t *x509.Certificate) { setSAN(t, false, uris, nil) }
}

// URIsAndDNS sets URIs and DNS names.
func URIsAndDNS(uris, names []string) Option {
	return func(t *x509.Certificate) { setSAN(t, true, uris, names) }
}

// setSAN writes the extension by hand: url.URL would repair hostile URIs.
func setSAN(t *x509.Certificate, critical bool, uris, names []string) {
	oid := asn1.ObjectIdentifier{2, 5, 29, 17}
	t.ExtraExtensions = slices.DeleteFunc(t.ExtraExtensions, func(e pkix.Extension) bool { return e.Id.Equal(oid) })
	var values []asn1.RawValue
	for _, u := range uris {
		values = append(values, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(u)})
	}
	for _, n := range names {
		values = append(values, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 2, Bytes: []byte(n)})
	}
	if len(values) == 0 {
		return
	}
	der, err := asn1.Marshal(values)
	if err != nil {
		panic(err) // raw values always marshal
	}
	t.ExtraExtensions = append(t.ExtraExtensions, pkix.Extension{Id: oid, Critical: critical, Value: der})
}

func caTemplate(name string, opts []Option) *x509.Certificate {
	now := time.Now()
	t := &x509.Certificate{
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             now.Add(-time.Hour),
		NotAfter:              now.Add(10 * 365 * 24 * time.Hour),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	for _, o := range opts {
		o(t)
	}
	return t
}

func newKey(tb testing.TB) *ecdsa.PrivateKey {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatalf("generate a key: %v", err)
	}
	return key
}

func sign(tb testing.TB, template, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	tb.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, key)
	if err != nil {
		tb.Fatalf("sign a certificate: %v", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatalf("parse a certificate: %v", err)
	}
	return cert
}

// ID parses a SPIFFE ID that a test wrote down.
func ID(s string) spiffeid.ID { return spiffeid.RequireFromString(s) }

// TrustDomain parses a trust domain that a test wrote down.
func TrustDomain(s string) spiffeid.TrustDomain { return spiffeid.RequireTrustDomainFromString(s) }
