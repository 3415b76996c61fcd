package ca

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// SVID is a certificate with its key, and the bundles by which its holder
// judges peers. It is immutable.
type SVID struct {
	ID        spiffeid.ID
	Cert      *tls.Certificate // leaf (parsed, in Leaf) and intermediates, never roots
	Bundles   *Bundles
	NotBefore time.Time
	NotAfter  time.Time
	Provider  string
}

// Mode is how strictly a chain is judged (design D1).
type Mode uint8

// Compatible tolerates what Istio CAs in the field leave out; Strict is SPIFFE
// to the letter.
const (
	Strict Mode = iota
	Compatible
)

// String is strict or compatible.
func (m Mode) String() string {
	if m == Compatible {
		return "compatible"
	}
	return "strict"
}

// Anchor is one certificate that may end a peer's chain.
type Anchor struct {
	Cert     *x509.Certificate
	Provider string
	Mode     Mode

	// origin is set in the bundle of an alias: the trust domain whose bundle it
	// is, which intermediates may name too.
	origin spiffeid.TrustDomain
}

// Bundles is a snapshot: trust domain → anchors. It is immutable. Bundles of
// different trust domains are never merged (SPIFFE Federation §4.2).
type Bundles struct {
	Generation uint64 // grows with every change of the content, within one process
	domains    map[spiffeid.TrustDomain][]Anchor
	pools      map[spiffeid.TrustDomain]*x509.CertPool // the same, as crypto/x509 wants them
	digest     digest
}

// NewSVID makes an SVID of a chain, leaf first, and its key. It takes the
// identity from the leaf, and drops presented roots. The key must be the
// leaf's; whether the chain leads to the bundles is judged by [VerifySVID].
func NewSVID(provider string, chain []*x509.Certificate, key crypto.Signer, bundles *Bundles) (*SVID, error) {
	if len(chain) == 0 {
		return nil, errors.New("the certificate chain is empty")
	}
	leaf := chain[0]
	id, err := leafID(leaf)
	if err != nil {
		return nil, err
	}
	if key == nil {
		return nil, fmt.Errorf("no private key for %s", id)
	}
	if !sameKey(leaf.PublicKey, key.Public()) {
		return nil, fmt.Errorf("the private key is not the key of the certificate for %s", id)
	}
	cert := &tls.Certificate{Leaf: leaf, PrivateKey: key, Certificate: [][]byte{leaf.Raw}}
	for _, c := range chain[1:] {
		if !isAnchor(bundles, c) {
			cert.Certificate = append(cert.Certificate, c.Raw)
		}
	}
	return &SVID{
		ID:        id,
		Cert:      cert,
		Bundles:   bundles,
		NotBefore: leaf.NotBefore,
		NotAfter:  leaf.NotAfter,
		Provider:  provider,
	}, nil
}

func isAnchor(b *Bundles, c *x509.Certificate) bool {
	if b == nil {
		return false
	}
	for _, as := range b.domains {
		for _, a := range as {
			if bytes.Equal(a.Cert.Raw, c.Raw) {
				return true
			}
		}
	}
	return false
}

func sameKey(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}

// Epoch tells an ordinary renewal from a change of trust. It is comparable, and
// it changes when the provider, the issuer's name or key, or the bundles
// change, but not when only the leaf does. A tunnel takes no new streams once
// its side's Epoch has changed (design §3, Tunnels and certificates), so it
// belongs in the key of a pool.
type Epoch struct {
	provider string
	issuer   digest
	bundles  digest
}

// Epoch is the SVID's epoch.
func (s *SVID) Epoch() Epoch {
	e := Epoch{provider: s.Provider}
	if s.Bundles != nil {
		e.bundles = s.Bundles.digest
	}
	if s.Cert == nil || s.Cert.Leaf == nil {
		return e
	}
	h := sha256.New()
	h.Write(s.Cert.Leaf.RawIssuer)
	if len(s.Cert.Leaf.AuthorityKeyId) > 0 {
		h.Write(s.Cert.Leaf.AuthorityKeyId)
	} else if len(s.Cert.Certificate) > 1 {
		h.Write(s.Cert.Certificate[1]) // no key identifier: the issuer as it was presented
	}
	h.Sum(e.issuer[:0])
	return e
}

// Chain is the presented chain, leaf first, parsed.
func (s *SVID) Chain() ([]*x509.Certificate, error) {
	if s.Cert == nil || len(s.Cert.Certificate) == 0 {
		return nil, errors.New("the certificate chain is empty")
	}
	chain := make([]*x509.Certificate, len(s.Cert.Certificate))
	for i, der := range s.Cert.Certificate {
		if i == 0 && s.Cert.Leaf != nil && bytes.Equal(s.Cert.Leaf.Raw, der) {
			chain[0] = s.Cert.Leaf
			continue
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("parse certificate %d of %s: %w", i, s.ID, err)
		}
		chain[i] = c
	}
	return chain, nil
}

// sameLeaf reports whether both present one and the same certificate.
func (s *SVID) sameLeaf(o *SVID) bool {
	return o != nil && s.Cert != nil && o.Cert != nil && len(s.Cert.Certificate) > 0 && len(o.Cert.Certificate) > 0 &&
		bytes.Equal(s.Cert.Certificate[0], o.Cert.Certificate[0])
}

// withBundles is a copy of s that judges peers by b.
func (s *SVID) withBundles(b *Bundles) *SVID {
	if s.Bundles == b {
		return s
	}
	c := *s
	c.Bundles = b
	return &c
}

// expired reports whether s may no longer be used at now.
func (s *SVID) expired(now time.Time) bool { return !now.Before(s.NotAfter) }

// String names the SVID without its key.
func (s *SVID) String() string {
	if s == nil {
		return "no SVID"
	}
	return fmt.Sprintf("%s (provider %s, serial %s, until %s)", s.ID, s.Provider, s.serial(), s.NotAfter.Format(time.RFC3339))
}

// GoString is String: %#v must not print the key either.
func (s *SVID) GoString() string { return s.String() }

// MarshalText is String: encoders must not reach the key.
func (s *SVID) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// LogValue is what logs may know of an SVID.
func (s *SVID) LogValue() slog.Value {
	if s == nil {
		return slog.StringValue("no SVID")
	}
	return slog.GroupValue(
		slog.String("id", s.ID.String()),
		slog.String("provider", s.Provider),
		slog.String("serial", s.serial()),
		slog.Time("not_after", s.NotAfter),
	)
}

func (s *SVID) serial() string {
	if s.Cert == nil || s.Cert.Leaf == nil || s.Cert.Leaf.SerialNumber == nil {
		return "?"
	}
	return s.Cert.Leaf.SerialNumber.String()
}

// Rejected makes an [ErrRejected] of err, with the text of err alone.
func Rejected(err error) error { return rejected{err} }

type rejected struct{ error }

// Unwrap gives the reason and the class.
func (r rejected) Unwrap() []error { return []error{r.error, ErrRejected} }

// check judges an SVID that a provider delivered for want, before it is
// published: every error is an [ErrRejected]. With anyID the certificate's own identity stands, whatever was
// asked for. Wrong parts are named by the texts of the identity spec §1.11.
func (s *SVID) check(want spiffeid.ID, anyID bool, validation Validation, now time.Time) error {
	if err := s.judge(want, anyID, validation, now); err != nil {
		return Rejected(err)
	}
	return nil
}

func (s *SVID) judge(want spiffeid.ID, anyID bool, validation Validation, now time.Time) error {
	if s == nil || s.Cert == nil || s.Cert.Leaf == nil || len(s.Cert.Certificate) == 0 {
		return fmt.Errorf("chain returned from CA is empty for: %s", want)
	}
	chain, err := s.Chain()
	if err != nil {
		return err
	}
	key, ok := s.Cert.PrivateKey.(crypto.Signer)
	if !ok || !sameKey(chain[0].PublicKey, key.Public()) {
		return fmt.Errorf("the private key is not the key of the certificate for %s", want)
	}
	id, err := leafID(chain[0])
	if err != nil {
		return fmt.Errorf("did not find expected SAN: %s: %w", want, err)
	}
	if id != s.ID || !anyID && id != want {
		return fmt.Errorf("did not find expected SAN: %s", want)
	}
	if s.expired(now) {
		return fmt.Errorf("%w: %s, at %s", ErrExpired, id, s.NotAfter.UTC().Format(time.RFC3339))
	}
	if _, err := VerifySVID(chain, s.Bundles, VerifyOptions{Usage: Own, Validation: validation, Now: now}); err != nil {
		return fmt.Errorf("verify the certificate for %s: %w", id, err)
	}
	return nil
}
