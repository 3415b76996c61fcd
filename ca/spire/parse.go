package spire

import (
	"cmp"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
)

// grant is one SVID of a message, not yet looked into.
type grant struct {
	id    string // as the message names it
	chain []byte // DER certificates one behind the other, leaf first
	key   []byte // PKCS #8 DER
}

// candidate is a grant of the identity that we want, with its certificate and its
// key.
type candidate struct {
	id    spiffeid.ID
	chain []*x509.Certificate
	key   crypto.Signer
}

// choose picks, of the grants of one message, the one for want: by exact
// identity, then by the latest expiry, then the first. It returns nil when none
// is of want, with the others' identities for the log. One that is of want and
// cannot be read makes the message useless (R43). A zero want takes the first
// grant, which is the default (R45).
func choose(provider string, grants []grant, want spiffeid.ID) (best *candidate, others []string, err error) {
	if want.IsZero() && len(grants) > 0 {
		grants = grants[:1]
		if want, err = spiffeid.FromString(grants[0].id); err != nil {
			return nil, nil, fmt.Errorf("%w: SPIFFE ID %.300q: %w", ca.ErrRejected, grants[0].id, err)
		}
	}
	text := want.String()
	for _, g := range grants {
		if g.id != text {
			others = append(others, g.id)
			continue
		}
		c, err := parseGrant(provider, g, want)
		if err != nil {
			return nil, nil, fmt.Errorf("%w: of %s: %w", ca.ErrRejected, want, err)
		}
		if best == nil || c.chain[0].NotAfter.After(best.chain[0].NotAfter) {
			best = c
		}
	}
	slices.Sort(others)
	return best, others, nil
}

// parseGrant reads a grant, whose certificate must be of want and of its key.
func parseGrant(provider string, g grant, want spiffeid.ID) (*candidate, error) {
	chain, err := x509.ParseCertificates(g.chain)
	if err != nil {
		return nil, fmt.Errorf("parse the certificates: %w", err)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(g.key)
	if err != nil {
		return nil, errors.New("the private key is no PKCS #8 key") // the cause may quote bytes of it
	}
	key, ok := parsed.(crypto.Signer)
	if !ok {
		return nil, errors.New("the private key cannot sign")
	}
	c := &candidate{want, chain, key}
	svid, err := c.svid(provider, nil)
	if err != nil {
		return nil, err
	}
	if svid.ID != want {
		return nil, fmt.Errorf("the certificate is of %s", svid.ID)
	}
	return c, nil
}

// svid makes the SVID of a candidate.
func (c *candidate) svid(provider string, bundles *ca.Bundles) (*ca.SVID, error) {
	return ca.NewSVID(provider, c.chain, c.key, bundles)
}

// parseAnchors reads the bundle of one trust domain: DER certificates one behind
// the other. An empty one is a bundle that trusts nobody (R31).
func parseAnchors(provider string, der []byte) ([]ca.Anchor, error) {
	certs, err := x509.ParseCertificates(der)
	if err != nil {
		return nil, err
	}
	anchors := make([]ca.Anchor, len(certs))
	for i, c := range certs {
		anchors[i] = ca.Anchor{Cert: c, Provider: provider, Mode: ca.Strict}
	}
	return anchors, nil
}

// parseBundles reads a message's map of bundles, by trust domain name or ID. A
// bundle that cannot be read makes the message useless: what it replaces may be
// what we trust too much (R43).
func parseBundles(provider string, m map[string][]byte) (map[spiffeid.TrustDomain][]ca.Anchor, error) {
	out := make(map[spiffeid.TrustDomain][]ca.Anchor, len(m))
	for name, der := range m {
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			return nil, fmt.Errorf("%w: bundle of %.300q: %w", ca.ErrRejected, name, err)
		}
		if _, twice := out[td]; twice {
			return nil, fmt.Errorf("%w: there are two bundles of trust domain %q", ca.ErrRejected, td.Name())
		}
		if out[td], err = parseAnchors(provider, der); err != nil {
			return nil, fmt.Errorf("%w: bundle of trust domain %q: %w", ca.ErrRejected, td.Name(), err)
		}
	}
	return out, nil
}

// joinDER puts DER certificates one behind the other.
func joinDER(certs [][]byte) []byte { return slices.Concat(certs...) }

var errNoMessage = errors.New("the agent sent no message")

// byName orders trust domains.
func byName(a, b spiffeid.TrustDomain) int { return cmp.Compare(a.Name(), b.Name()) }
