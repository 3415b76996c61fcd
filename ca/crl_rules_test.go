package ca_test

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
)

// §3.8: which of several lists of one issuer counts.
func TestCRLNumbers(t *testing.T) {
	root := catest.NewCA(t, "td.test")
	path, second := pathOf(t, root), pathOf(t, root)
	first, newer := root.CRL(t, 9, path[:1]), root.CRL(t, 10, second[:1])
	for name, content := range map[string][][]byte{"newest last": {first, newer}, "newest first": {newer, first}} {
		c := mustLoad(t, content...)
		if err := c.Check(path); err != nil {
			t.Errorf("%s: a certificate of the older list: %v", name, err)
		}
		if err := c.Check(second); !isRevoked(err) {
			t.Errorf("%s: a certificate of the newest list: %v", name, err)
		}
	}
	later := func(l *x509.RevocationList) { l.ThisUpdate = l.ThisUpdate.Add(time.Second) }
	if err := mustLoad(t, root.CRL(t, 1, path[:1], later), root.CRL(t, 1, nil)).Check(path); !isRevoked(err) {
		t.Errorf("of two with one number the later should count: %v", err)
	}
}

// §3.8: a list past its nextUpdate is used.
func TestCRLExpired(t *testing.T) {
	root := catest.NewCA(t, "td.test")
	path := pathOf(t, root)
	c := mustLoad(t, root.CRL(t, 1, path[:1], func(l *x509.RevocationList) {
		l.ThisUpdate, l.NextUpdate = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
	}))
	if err := c.Check(path); !isRevoked(err) {
		t.Errorf("got %v", err)
	}
}

// §3.8: whose signature a list must bear. The DN alone proves nothing, and the
// same DN may be another CA's.
func TestCRLSignature(t *testing.T) {
	root := catest.NewCA(t, "td.test")
	renewed := root.Renewed(t) // same name, another key
	path, sibling := pathOf(t, root), pathOf(t, renewed)
	own := root.CRL(t, 1, path[:1])

	t.Run("a list of a CA of the same name is not ours", func(t *testing.T) {
		c := mustLoad(t, own)
		if err := c.Check(path); !isRevoked(err) {
			t.Errorf("under the issuer: %v", err)
		}
		same := pathOf(t, renewed, func(x *x509.Certificate) { x.SerialNumber = path[0].SerialNumber })
		if err := c.Check(same); err != nil {
			t.Errorf("the same number under the CA of the same name: %v", err)
		}
	})
	t.Run("each its own", func(t *testing.T) {
		c := mustLoad(t, own, renewed.CRL(t, 7, sibling[:1]))
		if err := c.Check(path); !isRevoked(err) {
			t.Errorf("a higher number of another CA hid the list: %v", err)
		}
		if err := c.Check(sibling); !isRevoked(err) {
			t.Errorf("under the other: %v", err)
		}
	})
	t.Run("a damaged list is no proof of innocence", func(t *testing.T) {
		der := root.CRLDER(t, 1, nil)
		der[len(der)-1] ^= 1
		err := mustLoad(t, der).Check(path)
		if err == nil || isRevoked(err) || !strings.Contains(err.Error(), "does not bear the signature") {
			t.Errorf("got %v, want a refusal for the signature", err)
		}
		if err := mustLoad(t, der).Check(sibling); err != nil {
			t.Errorf("under the CA of the same name: %v", err)
		}
		if err := mustLoad(t, pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der}), own).Check(path); !isRevoked(err) {
			t.Errorf("beside a good one: %v", err)
		}
		if err := mustLoad(t, pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der}), own).Check(pathOf(t, root)); err != nil {
			t.Errorf("beside a good one that spares it: %v", err)
		}
	})
	t.Run("without a key identifier it may be meant as ours", func(t *testing.T) {
		der := bytes.Replace(root.CRLDER(t, 1, nil), []byte{6, 3, 0x55, 0x1d, 35}, []byte{6, 3, 0x55, 0x1d, 98}, 1)
		if err := mustLoad(t, der).Check(sibling); err == nil || isRevoked(err) {
			t.Errorf("got %v, want a refusal for the signature", err)
		}
	})
}

// §3.8: an intermediate with a key usage must be allowed to sign lists; an anchor
// need not be.
func TestCRLIssuerKeyUsage(t *testing.T) {
	usage := func(u x509.KeyUsage) catest.Option { return func(c *x509.Certificate) { c.KeyUsage = u } }
	root := catest.NewCA(t, "td.test", usage(x509.KeyUsageCertSign))
	path := pathOf(t, root)
	if err := mustLoad(t, root.CRL(t, 1, path[:1])).Check(path); !isRevoked(err) {
		t.Errorf("a list by an anchor without cRLSign: %v", err)
	}
	mute := root.Intermediate(t, usage(x509.KeyUsageCertSign))
	below := pathOf(t, mute)
	err := mustLoad(t, mute.CRL(t, 1, below[:1])).Check(below)
	if err == nil || isRevoked(err) || !strings.Contains(err.Error(), "key usage") {
		t.Errorf("a list by an intermediate without cRLSign: %v", err)
	}
	if err := mustLoad(t, root.CRL(t, 1, nil)).Check(below); err != nil {
		t.Errorf("without a list by it: %v", err)
	}
}

// §3.8: the scope of a list.
func TestCRLScope(t *testing.T) {
	const here, there = "http://crl.test/here", "http://crl.test/there"
	root := catest.NewCA(t, "td.test")
	ia := root.Intermediate(t)
	leaf, below := pathOf(t, root), pathOf(t, ia)
	points := func(uris ...string) catest.Option {
		return func(c *x509.Certificate) { c.CRLDistributionPoints = uris }
	}
	at := pathOf(t, root, points(here))
	scope := func(value ...byte) catest.CRLOption {
		return func(l *x509.RevocationList) {
			l.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 28}, Critical: true, Value: value}}
		}
	}
	uri := func(u string) catest.CRLOption {
		n := byte(len(u))
		return scope(append([]byte{0x30, n + 6, 0xa0, n + 4, 0xa0, n + 2, 0x86, n}, u...)...)
	}
	user, caOnly := scope(0x30, 3, 0x81, 1, 0xff), scope(0x30, 3, 0x82, 1, 0xff)
	for _, tt := range []struct {
		name string
		path []*x509.Certificate
		list []byte
		want bool
	}{
		{"users, a leaf", leaf, root.CRL(t, 1, leaf[:1], user), true},
		{"users, an intermediate", below, root.CRL(t, 1, below[1:2], user), false},
		{"CAs, a leaf", leaf, root.CRL(t, 1, leaf[:1], caOnly), false},
		{"CAs, an intermediate", below, root.CRL(t, 1, below[1:2], caOnly), true},
		{"a point, a certificate without", leaf, root.CRL(t, 1, leaf[:1], uri(here)), true},
		{"a point, its certificate", at, root.CRL(t, 1, at[:1], uri(here)), true},
		{"a point, the certificate of another", at, root.CRL(t, 1, at[:1], uri(there)), false},
		{"no point, a certificate with one", at, root.CRL(t, 1, at[:1]), true},
		{"two parts", at, append(root.CRL(t, 1, at[:1], uri(here)), root.CRL(t, 2, nil, uri(there))...), true},
	} {
		if got := isRevoked(mustLoad(t, tt.list).Check(tt.path)); got != tt.want {
			t.Errorf("%s: revoked %v, want %v", tt.name, got, tt.want)
		}
	}
}

// TestVerifyRevoked: one path that is good suffices; the leaf's revocation falls
// on all of them.
func TestVerifyRevoked(t *testing.T) {
	first, second := catest.NewCA(t, "td.test"), catest.NewCA(t, "td.test", func(c *x509.Certificate) { c.Subject.CommonName = "second" })
	ia := first.Intermediate(t)
	crossed := second.Cross(t, ia)
	chain, _ := ia.Leaf(t, catest.GoodID)
	chain = append(chain, crossed)
	bundles := ca.NewBundles(map[spiffeid.TrustDomain][]ca.Anchor{first.TrustDomain: {first.Anchor(ca.Strict), second.Anchor(ca.Strict)}})
	verify := func(lists ...[]byte) error {
		_, err := ca.VerifySVID(chain, bundles, ca.VerifyOptions{Usage: ca.Own, Revoked: mustLoad(t, lists...).Check})
		return err
	}
	for _, tt := range []struct {
		name string
		list [][]byte
		want bool
	}{
		{"one intermediate", [][]byte{first.CRL(t, 1, chain[1:2])}, false},
		{"the other", [][]byte{second.CRL(t, 1, chain[2:3])}, false},
		{"both", [][]byte{first.CRL(t, 1, chain[1:2]), second.CRL(t, 1, chain[2:3])}, true},
		{"the leaf", [][]byte{ia.CRL(t, 1, chain[:1])}, true},
	} {
		if err := verify(tt.list...); isRevoked(err) != tt.want || !tt.want && err != nil {
			t.Errorf("%s: %v, want revoked %v", tt.name, err, tt.want)
		}
	}
}
