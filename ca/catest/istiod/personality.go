package istiod

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	securityapi "istio.io/api/security/v1alpha1"

	"github.com/ztunnel-go/ztunnel/ca"
)

// Personality is whose behaviour the fake has.
type Personality uint8

// The CAs of the field.
const (
	// Istiod takes the identity from the metadata; without one (dedicated mode,
	// where the real one takes the token's) from the certificate request.
	Istiod Personality = iota
	// IstioCSR also wants the certificate request to name that identity and
	// nothing else, and grants an hour at most.
	IstioCSR
	// Cilium is the CA in Cilium's agent: it takes the identity from the only URI
	// in the certificate request, ignores metadata and requested life, and grants
	// 30 days by an RSA key, without any usages.
	Cilium
)

var personalities = map[string]Personality{"istiod": Istiod, "istio-csr": IstioCSR, "cilium": Cilium}

// ParsePersonality reads istiod, istio-csr or cilium.
func ParsePersonality(name string) (Personality, error) {
	p, ok := personalities[name]
	if !ok {
		return 0, fmt.Errorf("personality %q: want istiod, istio-csr or cilium", name)
	}
	return p, nil
}

// impersonated is the key of the request's metadata that names another
// workload than the caller.
const impersonated = "ImpersonatedIdentity"

// identify finds for whom the certificate is, and whether the client may have
// it.
func (s *Server) identify(req *Request) error {
	switch s.cfg.Personality {
	case IstioCSR:
		if err := s.identifyCaller(req); err != nil {
			return err
		}
		return matchCSR(req)
	case Cilium:
		return s.identifyCSR(req)
	}
	return s.identifyCaller(req)
}

// identifyCaller takes the impersonated identity, that of the certificate
// request, or the default.
func (s *Server) identifyCaller(req *Request) error {
	req.Identity = s.cfg.DefaultIdentity
	text := ""
	if v, ok := req.Metadata[impersonated]; ok {
		text, _ = v.(string)
		req.Impersonated = true
	} else if len(req.CSR.URIs) > 0 {
		text = req.CSR.URIs[0].String()
	}
	if text != "" || req.Impersonated {
		id, err := spiffeid.FromString(text)
		if err != nil {
			return status.Errorf(codes.InvalidArgument, "identity %q: %v", text, err)
		}
		req.Identity = id
	}
	if req.Identity.IsZero() {
		return status.Error(codes.PermissionDenied, "the request names no identity, and there is no default")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if req.Impersonated && (s.distrust || s.pods != nil && !s.pods[req.Identity]) {
		return status.Error(codes.Unauthenticated, "request impersonation authentication failure")
	}
	return nil
}

// matchCSR wants nothing in the certificate request but the identity.
func matchCSR(req *Request) error {
	csr := req.CSR
	if len(csr.URIs) != 1 || csr.URIs[0].String() != req.Identity.String() ||
		len(csr.DNSNames)+len(csr.IPAddresses)+len(csr.EmailAddresses) > 0 || csr.Subject.CommonName != "" || len(csr.Extensions) != 1 {
		return status.Error(codes.Unauthenticated, "request authenticate failure")
	}
	return nil
}

// identifyCSR takes the only URI in the certificate request.
func (s *Server) identifyCSR(req *Request) error {
	if len(req.CSR.URIs) != 1 {
		return status.Errorf(codes.Unknown, "expected exactly one URI SAN, got %d", len(req.CSR.URIs))
	}
	text := req.CSR.URIs[0].String()
	id, err := spiffeid.FromString(text)
	if err != nil || strings.Count(text, "/") != 6 {
		return status.Errorf(codes.Unknown, "invalid SPIFFE ID %q", text)
	}
	req.Identity = id
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pods != nil && !s.pods[id] {
		return status.Error(codes.Unknown, "no endpoints found for service account")
	}
	return nil
}

// issue makes the answer.
func (s *Server) issue(req Request) (*securityapi.IstioCertificateResponse, error) {
	s.mu.Lock()
	authority, agent, roots := s.ca, s.agent, ""
	for _, c := range s.extra {
		roots += PEM(c)
	}
	s.mu.Unlock()
	var leaf *x509.Certificate
	var err error
	switch s.cfg.Personality {
	case Cilium:
		leaf, err = agent.sign(req, s.cfg.AgentTTL)
		roots += PEM(agent.root)
	case IstioCSR:
		leaf, err = authority.Sign(req.CSR.PublicKey, req.Identity, min(req.Validity, time.Hour))
		roots += PEM(authority.Root())
	default:
		leaf, err = authority.Sign(req.CSR.PublicKey, req.Identity, req.Validity)
		roots += PEM(authority.Root())
	}
	if errors.Is(err, ca.ErrDenied) {
		return nil, status.Error(codes.PermissionDenied, err.Error())
	}
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &securityapi.IstioCertificateResponse{CertChain: []string{PEM(leaf), roots}}, nil
}

// agentCA is the CA in Cilium's agent.
type agentCA struct {
	key  *rsa.PrivateKey
	root *x509.Certificate
}

func newAgentCA() (*agentCA, error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	root := &x509.Certificate{
		SerialNumber:          big.NewInt(now.UnixNano()),
		Subject:               pkix.Name{CommonName: "Cilium CA"},
		NotBefore:             now.Add(-time.Hour),
		NotAfter:              now.Add(3 * 365 * 24 * time.Hour),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, root, root, key.Public(), key)
	if err != nil {
		return nil, err
	}
	if root, err = x509.ParseCertificate(der); err != nil {
		return nil, err
	}
	return &agentCA{key, root}, nil
}

// RotateAgent makes a new root for Cilium, which signs from now on.
func (s *Server) RotateAgent() error {
	next, err := newAgentCA()
	if err != nil {
		return fmt.Errorf("fake istiod: %w", err)
	}
	s.set(func() { s.agent = next })
	return nil
}

// sign copies subject and names of the request, and sets no usages.
func (a *agentCA) sign(req Request, ttl time.Duration) (*x509.Certificate, error) {
	now := time.Now()
	leaf := &x509.Certificate{
		Subject:        req.CSR.Subject,
		NotBefore:      now,
		NotAfter:       now.Add(ttl),
		DNSNames:       req.CSR.DNSNames,
		IPAddresses:    req.CSR.IPAddresses,
		EmailAddresses: req.CSR.EmailAddresses,
		URIs:           []*url.URL{req.Identity.URL()}, // the request's, unless a Reply named another
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, a.root, req.CSR.PublicKey, a.key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}
