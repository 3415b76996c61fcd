package ca

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// The limits on a presented chain, checked before any signature: path building
// and name constraints cost more than linear time (faults §A2, V15).
const (
	maxChainCerts = 10
	maxChainBytes = 64 << 10
)

// Usage is the role in which a certificate is judged.
type Usage uint8

// A peer acts as a client or as a server; Own is a certificate of ours, which
// does both.
const (
	Client Usage = iota
	Server
	Own
)

// Validation overrides the mode of the anchors (SVID_VALIDATION).
type Validation uint8

// PerAnchor judges a chain by the mode of the anchor that ends it.
const (
	PerAnchor Validation = iota
	AlwaysStrict
	AlwaysCompatible
)

// ParseValidation reads the value of SVID_VALIDATION; "" is PerAnchor.
func ParseValidation(s string) (Validation, error) {
	switch s {
	case "":
		return PerAnchor, nil
	case "strict":
		return AlwaysStrict, nil
	case "compatible":
		return AlwaysCompatible, nil
	}
	return PerAnchor, fmt.Errorf("SVID validation %q: want strict or compatible", s)
}

func (v Validation) mode(anchor Mode) Mode {
	switch v {
	case AlwaysStrict:
		return Strict
	case AlwaysCompatible:
		return Compatible
	}
	return anchor
}

// VerifyError is the refusal of a certificate.
type VerifyError struct {
	Rule   string // R1 to R30 of the SPIFFE standards, V15 for the limits on size, FIPS for keys
	Reason string
}

// Error is the reason with the rule.
func (e *VerifyError) Error() string {
	return fmt.Sprintf("certificate refused by %s: %s", e.Rule, e.Reason)
}

func refuse(rule, format string, args ...any) error {
	return &VerifyError{Rule: rule, Reason: fmt.Sprintf(format, args...)}
}

// VerifyOptions say how [VerifySVID] judges.
type VerifyOptions struct {
	Usage      Usage
	Validation Validation
	// Now is the time at which the chain must be valid. Default: the time of
	// the call.
	Now time.Time
	// Tolerated, if not nil, is called with each rule that a chain breaks and
	// that compatible mode forgives (R20, R22, R23, R25), once per accepted
	// chain and rule. It must not block.
	Tolerated func(rule string)
	// Revoked, if not nil, is asked about every path that would be accepted,
	// leaf first and anchor last; an error refuses that path.
	Revoked func(path []*x509.Certificate) error
}

// Verified is an accepted chain.
type Verified struct {
	ID     spiffeid.ID
	Path   []*x509.Certificate // the verified path: leaf first, the anchor last
	Anchor Anchor
	Mode   Mode      // the mode under which it was accepted
	At     time.Time // at which it was valid
}

// VerifySVID judges a presented chain, leaf first, by the bundle of the leaf's
// own trust domain, and returns the one identity in it. Further presented
// certificates may stand in any order, and may be superfluous. The error is a
// *[VerifyError], or of opts.Revoked. DNS names, IP addresses and other names in
// the leaf are ignored (R18). Several paths may lead to anchors: one that is
// accepted suffices, those to strict anchors are asked first.
func VerifySVID(chain []*x509.Certificate, bundles *Bundles, opts VerifyOptions) (Verified, error) {
	id, err := checkLeaf(chain, opts.Usage)
	if err != nil {
		return Verified{}, err
	}
	if opts.Now.IsZero() {
		opts.Now = time.Now()
	}
	td := id.TrustDomain()
	if len(bundles.Anchors(td)) == 0 {
		return Verified{}, refuse("R29", "no bundle for trust domain %q", td.Name())
	}
	paths, err := verifyPaths(chain, bundles.pools[td], opts)
	if err != nil {
		return Verified{}, err
	}
	return choosePath(id, paths, bundles.Anchors(td), opts)
}

// checkLeaf holds what both modes demand of a presented chain before a path is
// looked for.
func checkLeaf(chain []*x509.Certificate, usage Usage) (spiffeid.ID, error) {
	if err := checkSize(chain); err != nil {
		return spiffeid.ID{}, err
	}
	leaf := chain[0]
	id, err := leafID(leaf)
	if err != nil {
		return spiffeid.ID{}, err
	}
	if leaf.IsCA {
		return spiffeid.ID{}, refuse("R21", "a CA certificate must not authenticate")
	}
	return id, checkLeafUsage(leaf, usage)
}

func checkSize(chain []*x509.Certificate) error {
	if len(chain) == 0 {
		return refuse("R24", "no certificate was presented")
	}
	if len(chain) > maxChainCerts {
		return refuse("V15", "%d certificates were presented, at most %d are allowed", len(chain), maxChainCerts)
	}
	size := 0
	for _, c := range chain {
		size += len(c.Raw)
	}
	if size > maxChainBytes {
		return refuse("V15", "the presented chain has %d bytes, at most %d are allowed", size, maxChainBytes)
	}
	return nil
}

// checkLeafUsage holds what both modes demand of usages that are present.
func checkLeafUsage(leaf *x509.Certificate, usage Usage) error {
	if leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0 {
		return refuse("R22", "the key usage allows signing certificates or CRLs")
	}
	if hasExtension(leaf, oidKeyUsage) && leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return refuse("R22", "the key usage lacks digitalSignature")
	}
	if !hasExtension(leaf, oidExtKeyUsage) {
		return nil
	}
	fits := func(want x509.ExtKeyUsage) bool {
		return slices.Contains(leaf.ExtKeyUsage, want) || slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageAny)
	}
	client, server := fits(x509.ExtKeyUsageClientAuth), fits(x509.ExtKeyUsageServerAuth)
	switch {
	case usage == Client && !client:
		return refuse("R23", "the extended key usage lacks clientAuth")
	case usage == Server && !server:
		return refuse("R23", "the extended key usage lacks serverAuth")
	case usage == Own && !client && !server:
		return refuse("R23", "the extended key usage has neither clientAuth nor serverAuth")
	}
	return nil
}

func verifyPaths(chain []*x509.Certificate, roots *x509.CertPool, opts VerifyOptions) ([][]*x509.Certificate, error) {
	var intermediates *x509.CertPool
	if len(chain) > 1 {
		intermediates = x509.NewCertPool()
		for _, c := range chain[1:] {
			intermediates.AddCert(c)
		}
	}
	usages := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	switch opts.Usage {
	case Server:
		usages[0] = x509.ExtKeyUsageServerAuth
	case Own:
		usages = append(usages, x509.ExtKeyUsageServerAuth)
	}
	paths, err := chain[0].Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: intermediates, CurrentTime: opts.Now, KeyUsages: usages,
	})
	if err == nil {
		return paths, nil
	}
	var unknown x509.UnknownAuthorityError
	var invalid x509.CertificateInvalidError
	switch {
	case errors.As(err, &unknown):
		return nil, refuse("R29", "%v", err)
	case errors.As(err, &invalid) && invalid.Reason == x509.IncompatibleUsage:
		return nil, refuse("R28", "%v", err) // the leaf's own usages fitted
	}
	return nil, refuse("R24", "%v", err)
}

// choosePath accepts the first path that its anchor's mode allows and of which
// nothing is revoked. That something is revoked outweighs the other reasons.
func choosePath(id spiffeid.ID, paths [][]*x509.Certificate, anchors []Anchor, opts VerifyOptions) (Verified, error) {
	err := refuse("R29", "no anchor ends the chain")
	var revoked *RevokedError
	for _, want := range []Mode{Strict, Compatible} {
		for _, path := range paths {
			if len(path) < 2 { // crypto/x509 trusts a leaf that stands among the roots
				err = refuse("R27", "an anchor must not authenticate")
				continue
			}
			for _, a := range anchors {
				if opts.Validation.mode(a.Mode) != want || !bytes.Equal(a.Cert.Raw, path[len(path)-1].Raw) {
					continue
				}
				var tolerated []string
				if tolerated, err = judge(path[0], path[1:len(path)-1], id, a.origin, want); err != nil {
					continue
				}
				if err = checkKeys(path); err != nil {
					continue
				}
				if opts.Revoked != nil {
					if err = opts.Revoked(path); err != nil {
						errors.As(err, &revoked)
						continue
					}
				}
				opts.tolerate(tolerated)
				return Verified{ID: id, Path: path, Anchor: a, Mode: want, At: opts.Now}, nil
			}
		}
	}
	if revoked != nil {
		err = revoked
	}
	return Verified{}, err
}

func (o VerifyOptions) tolerate(rules []string) {
	if o.Tolerated == nil {
		return
	}
	for _, rule := range rules {
		o.Tolerated(rule)
	}
}

// judge applies the rules that depend on the mode, and those for signing
// certificates, which may name the trust domain of id or its origin, if it is an
// alias. It returns the rules that compatible mode forgave.
func judge(leaf *x509.Certificate, signers []*x509.Certificate, id spiffeid.ID, origin spiffeid.TrustDomain, mode Mode) (tolerated []string, err error) {
	for _, b := range leafBreaches(leaf) {
		if mode == Strict || !b.forgivable {
			return nil, refuse(b.rule, "%s", b.reason)
		}
		tolerated = append(tolerated, b.rule)
	}
	for _, c := range signers {
		if err := checkSignerID(c, id.TrustDomain(), origin); err != nil {
			return nil, err
		}
		switch critical, present := extension(c, oidKeyUsage); {
		case present && critical:
		case mode == Strict && present:
			return nil, refuse("R25", "an intermediate's key usage is not critical")
		case mode == Strict:
			return nil, refuse("R25", "an intermediate has no key usage")
		default:
			tolerated = append(tolerated, "R25")
		}
	}
	slices.Sort(tolerated)
	return slices.Compact(tolerated), nil
}

type breach struct {
	rule, reason string
	forgivable   bool
}

// leafBreaches lists where a leaf that passed checkLeafUsage is not SPIFFE to
// the letter.
func leafBreaches(leaf *x509.Certificate) (breaches []breach) {
	if critical, _ := extension(leaf, oidSubjectAltName); !critical && emptyName(leaf.RawSubject) {
		breaches = append(breaches, breach{"R20", "the subject is empty and the subject alternative name is not critical", true})
	}
	switch critical, present := extension(leaf, oidKeyUsage); {
	case !present:
		breaches = append(breaches, breach{"R22", "there is no key usage", true})
	case !critical:
		breaches = append(breaches, breach{"R22", "the key usage is not critical", true})
	}
	switch {
	case !hasExtension(leaf, oidExtKeyUsage):
		breaches = append(breaches, breach{"R23", "there is no extended key usage", true})
	case !slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth) || !slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageServerAuth):
		breaches = append(breaches, breach{"R23", "the extended key usage has not both clientAuth and serverAuth", true})
	}
	return breaches
}

// checkSignerID holds R26: a signing certificate may name its trust domain,
// and nothing more. That of an alias is its own, or the one of which it is an
// alias; origin is zero otherwise.
func checkSignerID(c *x509.Certificate, td, origin spiffeid.TrustDomain) error {
	uris, err := sanURIs(c)
	if err != nil {
		return err
	}
	for _, u := range uris {
		if len(u) < len("spiffe://") || u[:len("spiffe://")] != "spiffe://" {
			continue
		}
		id, err := spiffeid.FromString(u)
		if err != nil || id.Path() != "" {
			return refuse("R26", "an intermediate's SPIFFE ID %q is not the name of a trust domain", u)
		}
		if named := id.TrustDomain(); named != td && named != origin {
			return refuse("R26", "an intermediate of trust domain %q signed for %q", id.TrustDomain().Name(), td.Name())
		}
	}
	return nil
}

var (
	oidSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidKeyUsage       = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidExtKeyUsage    = asn1.ObjectIdentifier{2, 5, 29, 37}
)

func extension(c *x509.Certificate, oid asn1.ObjectIdentifier) (critical, present bool) {
	for _, e := range c.Extensions {
		if e.Id.Equal(oid) {
			return e.Critical, true
		}
	}
	return false, false
}

func hasExtension(c *x509.Certificate, oid asn1.ObjectIdentifier) bool {
	_, present := extension(c, oid)
	return present
}

// emptyName reports whether der is a Name without attributes (an empty
// SEQUENCE).
func emptyName(der []byte) bool { return len(der) <= 2 }

// leafID is the identity in a leaf: exactly one URI SAN, which is a SPIFFE ID
// with a path.
func leafID(leaf *x509.Certificate) (spiffeid.ID, error) {
	uris, err := sanURIs(leaf)
	if err != nil {
		return spiffeid.ID{}, err
	}
	if len(uris) != 1 {
		return spiffeid.ID{}, refuse("R17", "the certificate has %d URI SANs, exactly one is allowed", len(uris))
	}
	if rule, reason := uriRule(uris[0]); rule != "" {
		return spiffeid.ID{}, refuse(rule, "%s: %.300q", reason, uris[0])
	}
	id, err := spiffeid.FromString(uris[0])
	if err != nil {
		return spiffeid.ID{}, refuse("R1", "%v: %.300q", err, uris[0])
	}
	return id, nil
}

// sanURIs reads the URIs of the subject alternative name as they were written;
// x509.Certificate.URIs went through url.Parse, which forgets an empty
// fragment. crypto/x509 already refused a second extension of the same kind.
func sanURIs(c *x509.Certificate) ([]string, error) {
	const tagURI = 6 // GeneralName.uniformResourceIdentifier, RFC 5280 §4.2.1.6
	var uris []string
	for _, e := range c.Extensions {
		if !e.Id.Equal(oidSubjectAltName) {
			continue
		}
		var names []asn1.RawValue
		if rest, err := asn1.Unmarshal(e.Value, &names); err != nil || len(rest) > 0 {
			return nil, refuse("R17", "the subject alternative name cannot be read")
		}
		for _, n := range names {
			if n.Class == asn1.ClassContextSpecific && n.Tag == tagURI {
				uris = append(uris, string(n.Bytes))
			}
		}
	}
	return uris, nil
}
