package catest

import (
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
)

// Case is one presented chain, and what becomes of it.
type Case struct {
	Name  string
	Chain []*x509.Certificate
	Key   crypto.Signer
	// Strict is the rule that refuses the chain in strict mode, "" when it is
	// accepted. Client and Server are the same for compatible mode, presented
	// by a client and by a server.
	Strict, Client, Server string
}

// World is the setting of the cases: trust domain td.test with this CA, and a
// federated one.
type World struct {
	Own, Other *CA
	expired    *CA
}

// GoodID is the identity in the cases, unless their defect is there.
const GoodID = "spiffe://td.test/ns/a/sa/b"

// NewWorld makes the setting.
func NewWorld(tb testing.TB) *World {
	tb.Helper()
	return &World{
		Own:     NewCA(tb, "td.test"),
		Other:   NewCA(tb, "other.test"),
		expired: NewCA(tb, "old.test", Between(-48*time.Hour, -time.Hour)),
	}
}

// Bundles are those of td.test, of the federated other.test, of 10.0.0.1
// (which is a trust domain like any other), and the expired root of old.test,
// all judged by mode.
func (w *World) Bundles(mode ca.Mode) *ca.Bundles {
	return ca.NewBundles(map[spiffeid.TrustDomain][]ca.Anchor{
		w.Own.TrustDomain:       {w.Own.Anchor(mode)},
		w.Other.TrustDomain:     {w.Other.Anchor(mode)},
		w.expired.TrustDomain:   {w.expired.Anchor(mode)},
		TrustDomain("10.0.0.1"): {w.Own.Anchor(mode)},
	})
}

// Cases is the matrix of SPIFFE rules R1 to R30, and of the limits on size.
func (w *World) Cases(tb testing.TB) []Case {
	tb.Helper()
	return append(append(append(w.accepted(tb), w.uriCases(tb)...), w.leafCases(tb)...), w.pathCases(tb)...)
}

type caseList struct {
	tb    testing.TB
	cases []Case
}

// add appends a case that all modes judge alike.
func (l *caseList) add(name, rule string, issuer *CA, opts ...Option) {
	l.addModes(name, rule, rule, rule, issuer, opts...)
}

func (l *caseList) addModes(name, strict, client, server string, issuer *CA, opts ...Option) {
	l.tb.Helper()
	chain, key := issuer.Leaf(l.tb, GoodID, opts...)
	l.cases = append(l.cases, Case{name, chain, key, strict, client, server})
}

func (w *World) accepted(tb testing.TB) []Case {
	tb.Helper()
	l := &caseList{tb: tb}
	l.add("ordinary", "", w.Own)
	l.add("R18 DNS names beside the URI", "", w.Own, URIsAndDNS([]string{GoodID}, []string{"victim.example"}))
	l.add("R20 subject and non-critical SAN", "", w.Own, NonCriticalURIs(GoodID), func(t *x509.Certificate) { t.Subject.CommonName = "web" })
	l.add("R22 keyAgreement", "", w.Own, func(t *x509.Certificate) { t.KeyUsage |= x509.KeyUsageKeyAgreement })
	l.add("R10 trust domain like an IPv4 address", "", w.Own, URIs("spiffe://10.0.0.1/ns/a/sa/b"))
	l.add("R14 upper case in the path", "", w.Own, URIs("spiffe://td.test/NS/a_b-c.D"))
	l.add("R15 2048 bytes", "", w.Own, URIs("spiffe://td.test/"+strings.Repeat("a", 2048-len("spiffe://td.test/"))))
	l.add("R19 one segment", "", w.Own, URIs("spiffe://td.test/x"))
	l.add("federated", "", w.Other, URIs("spiffe://other.test/ns/a/sa/b"))
	l.add("intermediate", "", w.Own.Intermediate(tb))
	l.add("R26 intermediate names its trust domain", "", w.Own.Intermediate(tb, URIs("spiffe://td.test")))
	l.add("R24 two intermediates", "", w.Own.Intermediate(tb).Intermediate(tb))
	chain, key := w.Own.Intermediate(tb).Intermediate(tb).Leaf(tb, GoodID)
	chain[1], chain[2] = chain[2], chain[1]
	chain = append(chain, w.Other.Root, w.Own.Root)
	l.cases = append(l.cases, Case{Name: "R24 any order and superfluous certificates", Chain: chain, Key: key})
	return l.cases
}

func (w *World) uriCases(tb testing.TB) []Case {
	tb.Helper()
	l := &caseList{tb: tb}
	l.add("R17 no URI", "R17", w.Own, URIs())
	l.add("R17 only a DNS name", "R17", w.Own, URIsAndDNS(nil, []string{"td.test"}))
	l.add("R17 two URIs, the victim's last", "R17", w.Own, URIs(GoodID, "spiffe://td.test/ns/a/sa/victim"))
	l.add("R17 two URIs, the victim's first", "R17", w.Own, URIs("spiffe://td.test/ns/a/sa/victim", GoodID))
	l.add("R17 SPIFFE and https URI", "R17", w.Own, URIs(GoodID, "https://td.test/x"))
	for _, c := range []struct{ name, rule, uri string }{
		{"https", "R1", "https://td.test/ns/a/sa/b"},
		{"upper-case scheme", "R1", "SPIFFE://td.test/ns/a/sa/b"},
		{"empty trust domain", "R2", "spiffe:///ns/a/sa/b"},
		{"empty query", "R3", GoodID + "?"},
		{"query", "R3", GoodID + "?q"},
		{"empty fragment", "R4", GoodID + "#"},
		{"fragment", "R4", GoodID + "#f"},
		{"user", "R5", "spiffe://u@td.test/ns/a/sa/b"},
		{"empty user", "R5", "spiffe://@td.test/ns/a/sa/b"},
		{"port", "R6", "spiffe://td.test:8080/ns/a/sa/b"},
		{"empty port", "R6", "spiffe://td.test:/ns/a/sa/b"},
		{"upper-case trust domain", "R7", "spiffe://TD.test/ns/a/sa/b"},
		{"foreign character in the trust domain", "R8", "spiffe://td~test/ns/a/sa/b"},
		{"IPv6 trust domain", "R10", "spiffe://[2001:db8::1]/ns/a/sa/b"},
		{"percent in the path", "R11", "spiffe://td.test/ns/a/sa/%62"},
		{"empty segment", "R12", "spiffe://td.test/ns//sa/b"},
		{"dot segment", "R12", "spiffe://td.test/ns/./sa/b"},
		{"dot-dot segment", "R12", "spiffe://td.test/ns/../sa/b"},
		{"trailing slash", "R13", GoodID + "/"},
		{"foreign character in the path", "R14", "spiffe://td.test/ns/a~/sa/b"},
		{"too long", "R15", "spiffe://td.test/" + strings.Repeat("a", 2049-len("spiffe://td.test/"))},
		{"no path", "R19", "spiffe://td.test"},
		{"only a slash", "R19", "spiffe://td.test/"},
	} {
		if _, err := url.Parse(c.uri); err == nil {
			l.add(c.rule+" "+c.name, c.rule, w.Own, URIs(c.uri))
		}
	}
	return l.cases
}

func (w *World) leafCases(tb testing.TB) []Case {
	tb.Helper()
	l := &caseList{tb: tb}
	eku := func(us ...x509.ExtKeyUsage) Option {
		return func(t *x509.Certificate) { t.ExtKeyUsage = us }
	}
	l.addModes("R20 empty subject and non-critical SAN", "R20", "", "", w.Own, NonCriticalURIs(GoodID))
	l.add("R21 CA as leaf", "R21", w.Own, func(t *x509.Certificate) { t.IsCA = true })
	l.addModes("R22 no key usage", "R22", "", "", w.Own, func(t *x509.Certificate) { t.KeyUsage = 0 })
	l.addModes("R22 key usage not critical", "R22", "", "", w.Own, nonCriticalKeyUsage)
	l.add("R22 no digitalSignature", "R22", w.Own, func(t *x509.Certificate) { t.KeyUsage = x509.KeyUsageKeyEncipherment })
	l.add("R22 keyCertSign", "R22", w.Own, func(t *x509.Certificate) { t.KeyUsage |= x509.KeyUsageCertSign })
	l.add("R22 cRLSign", "R22", w.Own, func(t *x509.Certificate) { t.KeyUsage |= x509.KeyUsageCRLSign })
	l.addModes("R23 no extended key usage", "R23", "", "", w.Own, eku())
	l.addModes("R23 serverAuth only", "R23", "R23", "", w.Own, eku(x509.ExtKeyUsageServerAuth))
	l.addModes("R23 clientAuth only", "R23", "", "R23", w.Own, eku(x509.ExtKeyUsageClientAuth))
	l.addModes("R23 any", "R23", "", "", w.Own, eku(x509.ExtKeyUsageAny))
	l.add("R23 codeSigning only", "R23", w.Own, eku(x509.ExtKeyUsageCodeSigning))
	l.add("R24 expired", "R24", w.Own, Between(-2*time.Hour, -time.Hour))
	l.add("R24 not yet valid", "R24", w.Own, Between(time.Hour, 2*time.Hour))
	l.add("R24 unknown critical extension", "R24", w.Own, func(t *x509.Certificate) {
		t.ExtraExtensions = append(t.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 55555, 1}, Critical: true, Value: []byte{5, 0}})
	})
	return l.cases
}

func nonCriticalKeyUsage(t *x509.Certificate) {
	t.KeyUsage = 0
	t.ExtraExtensions = append(t.ExtraExtensions, pkix.Extension{
		Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Value: []byte{3, 2, 5, 0xa0}, // BIT STRING: digitalSignature, keyEncipherment
	})
}

func (w *World) pathCases(tb testing.TB) []Case {
	tb.Helper()
	l := &caseList{tb: tb}
	own := w.Own
	l.add("R25 intermediate is no CA", "R29", own.Intermediate(tb, func(t *x509.Certificate) {
		t.IsCA = false
		t.KeyUsage = x509.KeyUsageDigitalSignature
	}))
	l.add("R24 expired intermediate", "R24", own.Intermediate(tb, Between(-2*time.Hour, -time.Hour)))
	l.add("R24 expired root", "R24", w.expired, URIs("spiffe://old.test/ns/a/sa/b"))
	l.add("R24 path length", "R24", own.Intermediate(tb, func(t *x509.Certificate) { t.MaxPathLenZero = true }).Intermediate(tb))
	l.add("R24 name constraints forbid", "R24", own.Intermediate(tb, func(t *x509.Certificate) {
		t.PermittedURIDomains = []string{"elsewhere.test"}
		t.PermittedDNSDomainsCritical = true
	}))
	l.addModes("R25 intermediate without key usage", "R25", "", "", own.Intermediate(tb, func(t *x509.Certificate) { t.KeyUsage = 0 }))
	l.add("R25 intermediate may not sign", "R29", own.Intermediate(tb, func(t *x509.Certificate) { t.KeyUsage = x509.KeyUsageDigitalSignature }))
	l.add("R26 intermediate names a workload", "R26", own.Intermediate(tb, URIs("spiffe://td.test/x")))
	l.add("R26 intermediate of another trust domain", "R26", own.Intermediate(tb, URIs("spiffe://other.test")))
	l.add("R28 intermediate for code signing", "R28", own.Intermediate(tb, func(t *x509.Certificate) {
		t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}
	}))
	l.add("R29 foreign identity by our CA", "R29", own, URIs("spiffe://other.test/ns/a/sa/b"))
	l.add("R29 our identity by the federated CA", "R29", w.Other)
	l.add("R29 trust domain without a bundle", "R29", own, URIs("spiffe://nobody.test/ns/a/sa/b"))
	l.add("R29 unknown CA of the same name", "R29", own.Renewed(tb))
	missing := own.Intermediate(tb)
	missing.Above = nil
	l.add("R29 missing intermediate", "R29", missing)
	chain, key := own.Leaf(tb, GoodID)
	many := chain
	for len(many) <= 10 {
		many = append(many, own.Root)
	}
	l.cases = append(l.cases, Case{"V15 eleven certificates", many, key, "V15", "V15", "V15"})
	l.add("V15 70 KiB", "V15", own, func(t *x509.Certificate) {
		t.ExtraExtensions = append(t.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 55555, 2}, Value: make([]byte, 70<<10)})
	})
	return l.cases
}
