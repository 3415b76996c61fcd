package ca

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// alpn is the only protocol of workload TLS.
const alpn = "h2"

// TLSOptions are what the TLS configurations of all workloads have in common.
// The zero value is the default.
type TLSOptions struct {
	TLS12 bool // also allow TLS 1.2 (TLS12_ENABLED)
	PQC   bool // only X25519MLKEM768, hence only TLS 1.3 (COMPLIANCE_POLICY=pqc); see [HasPostQuantum]

	// DefaultTrustDomain is the trust domain of this mesh, and Aliases are its
	// other names (design D2). They compare equal when our own SVID is in one
	// of them. Zero: the trust domain of our SVID.
	DefaultTrustDomain spiffeid.TrustDomain
	Aliases            []spiffeid.TrustDomain

	Validation Validation // overrides the mode of the anchors

	// Tolerated, if not nil, counts the rules that compatible mode forgave.
	Tolerated func(rule string)
	// Revoked, if not nil, is asked about every path that would be accepted,
	// leaf first and anchor last; the peer is refused when no path is left. It
	// must not block for long. [CRLs.Check] is such a function.
	Revoked func(path []*x509.Certificate) error
	// Judged, if not nil, is told of each peer: what was verified, or why it is
	// refused. It runs within the handshake and must not block.
	Judged func(Verified, error)
}

// PeerError is a peer with a valid certificate of another identity than the
// connection allows.
type PeerError struct {
	Want string // the part of the text that says what was expected
	Got  spiffeid.ID
}

// Error has the words of the reference implementation.
func (e *PeerError) Error() string {
	return fmt.Sprintf("identity verification error: peer did not present the expected %s, got %s", e.Want, e.Got)
}

// ServerTLS is the configuration with which svid accepts one peer or many. The
// peer's certificate is mandatory, and is verified in VerifyConnection with the
// bundle of its own trust domain: svid's bundles hold ours, the aliases and
// those that the provider federates us with, and no others (design D2). What
// such a peer may do is up to the policies (D18). A peer without ALPN is
// accepted.
// svid must not be nil. The configuration must not be changed, and is out of
// date when the lease's SVID changes.
func ServerTLS(svid *SVID, opts TLSOptions) *tls.Config {
	conf := baseTLS(svid, opts)
	conf.ClientAuth = tls.RequireAnyClientCert
	conf.VerifyConnection = verifyConnection(svid, Client, opts, func(spiffeid.ID) error { return nil })
	return conf
}

// ClientTLS is the configuration with which svid connects to a peer that must
// present one of expected, or an alias of one. It sends no server name. An
// empty expected set is an error: nobody could be accepted.
func ClientTLS(svid *SVID, expected []spiffeid.ID, opts TLSOptions) (*tls.Config, error) {
	if svid == nil || svid.Cert == nil {
		return nil, errors.New("no SVID to connect with")
	}
	if len(expected) == 0 {
		return nil, errors.New("no identity is expected of the peer: the set is empty")
	}
	expected = slices.Clone(expected)
	conf := baseTLS(svid, opts)
	// No server name is sent or checked; VerifyConnection judges instead.
	conf.InsecureSkipVerify = true
	own := svid.ID.TrustDomain()
	conf.VerifyConnection = verifyConnection(svid, Server, opts, func(peer spiffeid.ID) error {
		for _, e := range expected {
			if opts.SameIdentity(own, e, peer) {
				return nil
			}
		}
		return &PeerError{Want: fmt.Sprintf("SAN (%s)", join(expected)), Got: peer}
	})
	return conf, nil
}

// MemberTLS is the configuration with which svid connects to a server of its own
// trust domain, an alias of it not counting, that accept takes by its identity: a
// backend that is reached with a certificate of ours. It sends no server name.
func MemberTLS(svid *SVID, accept func(spiffeid.ID) error, opts TLSOptions) (*tls.Config, error) {
	if svid == nil || svid.Cert == nil {
		return nil, errors.New("no SVID to connect with")
	}
	conf := baseTLS(svid, opts)
	conf.InsecureSkipVerify = true // VerifyConnection judges instead
	own := svid.ID.TrustDomain()
	conf.VerifyConnection = verifyConnection(svid, Server, opts, func(peer spiffeid.ID) error {
		if peer.TrustDomain() != own {
			return &PeerError{Want: fmt.Sprintf("trustdomain (%s)", own.Name()), Got: peer}
		}
		return accept(peer)
	})
	return conf, nil
}

func join(ids []spiffeid.ID) string {
	var b strings.Builder
	for i, id := range ids {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString(id.String())
	}
	return b.String()
}

// PeerID is the identity of a peer that one of our configurations has accepted.
// It parses the one URI SAN as strictly as the verification did.
func PeerID(cs tls.ConnectionState) (spiffeid.ID, error) {
	if !cs.HandshakeComplete || len(cs.PeerCertificates) == 0 {
		return spiffeid.ID{}, errors.New("the peer is not authenticated")
	}
	return leafID(cs.PeerCertificates[0])
}

// verifyConnection judges a peer in the given role: first its certificate, then
// whether it is one of those that the connection allows.
func verifyConnection(svid *SVID, usage Usage, opts TLSOptions, allowed func(spiffeid.ID) error) func(tls.ConnectionState) error {
	return func(cs tls.ConnectionState) error {
		v, err := VerifySVID(cs.PeerCertificates, svid.Bundles, VerifyOptions{
			Usage: usage, Validation: opts.Validation, Tolerated: opts.Tolerated, Revoked: opts.Revoked,
		})
		if err == nil {
			err = allowed(v.ID)
		}
		if opts.Judged != nil {
			opts.Judged(v, err)
		}
		return err
	}
}

// SameIdentity reports whether a and b are one identity for the holder of a
// certificate of own: the same, or the same but for trust domains that are aliases
// of each other (design D2).
func (o TLSOptions) SameIdentity(own spiffeid.TrustDomain, a, b spiffeid.ID) bool {
	return a == b || a.Path() == b.Path() && o.sameDomain(own, a.TrustDomain(), b.TrustDomain())
}

// sameDomain reports whether a and b name one trust domain for the holder of a
// certificate of own.
func (o TLSOptions) sameDomain(own, a, b spiffeid.TrustDomain) bool {
	if a == b {
		return true
	}
	mesh := o.DefaultTrustDomain
	if mesh.IsZero() {
		mesh = own
	}
	local := func(td spiffeid.TrustDomain) bool { return td == mesh || slices.Contains(o.Aliases, td) }
	return local(own) && local(a) && local(b)
}

func baseTLS(svid *SVID, opts TLSOptions) *tls.Config {
	cert := svid.Cert
	conf := &tls.Config{
		Certificates: []tls.Certificate{*cert},
		// The authorities that a peer hints at do not matter: there is one
		// certificate, and without it the peer could only refuse.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil },
		NextProtos:           []string{alpn},
		MinVersion:           tls.VersionTLS13,
		// A resumed session would not be verified anew (CVE-2025-68121), and
		// configurations live too short to resume anything.
		SessionTicketsDisabled: true,
		// What the module of this build does not do, crypto/tls leaves out. P-256
		// is in each: nodes of different builds meet there at the latest.
		CurvePreferences: []tls.CurveID{tls.X25519MLKEM768, tls.X25519, tls.CurveP256, tls.CurveP384},
		// Tunnels carry bulk data: always the largest record.
		DynamicRecordSizingDisabled: true,
	}
	if opts.PQC {
		conf.CurvePreferences = []tls.CurveID{tls.X25519MLKEM768}
		return conf
	}
	if opts.TLS12 {
		conf.MinVersion = tls.VersionTLS12
		conf.CipherSuites = []uint16{
			tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
			tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
			tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
			tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
		}
	}
	return conf
}
