// Package istiod is a fake Istio CA: istio.v1.auth.IstioCertificateService over
// TLS, with the embedded CA of ca/local behind it. It authenticates nobody: any
// bearer token will do. It is for tests of our client, and for interoperability
// tests, where another implementation gets its certificates from the root that
// our side uses too.
package istiod

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	securityapi "istio.io/api/security/v1alpha1"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/local"
)

// impersonated is the key of the request's metadata that names another
// workload than the caller.
const impersonated = "ImpersonatedIdentity"

// Config configures a [Server].
type Config struct {
	CA *local.CA
	// Hosts are further names and addresses of the server's certificate, beside
	// localhost, 127.0.0.1, ::1 and istiod.istio-system.svc.
	Hosts []string
	// DefaultIdentity is issued to requests that name none. Zero refuses them.
	DefaultIdentity spiffeid.ID
}

// Request is one request as the server saw it.
type Request struct {
	Identity      spiffeid.ID
	Impersonated  bool // the identity came in the metadata
	Authorization string
	ClusterID     string
	Validity      time.Duration
	CSR           *x509.CertificateRequest
}

// Reply overrides what the server does with one request.
type Reply struct {
	Err      error       // a gRPC status
	Chain    []string    // the answer as it is
	Identity spiffeid.ID // issue this identity, not the requested one
}

// Server is the fake CA. The setters may be called at any time.
type Server struct {
	securityapi.UnimplementedIstioCertificateServiceServer
	cfg  Config
	grpc *grpc.Server

	mu       sync.Mutex // guards what follows
	ca       *local.CA
	reply    func(Request) *Reply
	requests []Request
}

// New makes a server whose own certificate is signed by cfg.CA.
func New(cfg Config) (*Server, error) {
	if cfg.CA == nil {
		return nil, errors.New("fake istiod: no CA")
	}
	cert, err := serverCertificate(cfg)
	if err != nil {
		return nil, fmt.Errorf("fake istiod: %w", err)
	}
	s := &Server{cfg: cfg, ca: cfg.CA}
	s.grpc = grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{cert},
		MinVersion:   tls.VersionTLS12,
		NextProtos:   []string{"h2"},
	})))
	securityapi.RegisterIstioCertificateServiceServer(s.grpc, s)
	return s, nil
}

func serverCertificate(cfg Config) (tls.Certificate, error) {
	names := []string{"localhost", "istiod.istio-system.svc", "istiod.istio-system"}
	addrs := []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}
	for _, h := range cfg.Hosts {
		if a, err := netip.ParseAddr(h); err == nil {
			addrs = append(addrs, a)
		} else {
			names = append(names, h)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	leaf, err := cfg.CA.SignServer(key.Public(), names, addrs)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}, nil
}

// Serve accepts on l until Stop; it closes l.
func (s *Server) Serve(l net.Listener) error { return s.grpc.Serve(l) }

// Stop closes the listener and all connections, and waits for the requests.
func (s *Server) Stop() { s.grpc.Stop() }

// SetCA changes the CA that signs from now on; the server's own certificate
// stays.
func (s *Server) SetCA(c *local.CA) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ca = c
}

// SetReply sets a function that may override the answer to a request; it
// returns nil to leave it. A nil function ends that.
func (s *Server) SetReply(f func(Request) *Reply) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reply = f
}

// Requests are the well-formed requests so far.
func (s *Server) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Request(nil), s.requests...)
}

// CreateCertificate implements the service.
func (s *Server) CreateCertificate(ctx context.Context, in *securityapi.IstioCertificateRequest) (*securityapi.IstioCertificateResponse, error) {
	req, err := s.read(ctx, in)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.requests = append(s.requests, req)
	authority, reply := s.ca, s.reply
	s.mu.Unlock()
	id := req.Identity
	if reply != nil {
		if r := reply(req); r != nil {
			switch {
			case r.Err != nil:
				return nil, r.Err
			case r.Identity.IsZero():
				return &securityapi.IstioCertificateResponse{CertChain: r.Chain}, nil
			}
			id = r.Identity
		}
	}
	leaf, err := authority.Sign(req.CSR.PublicKey, id, req.Validity)
	if errors.Is(err, ca.ErrDenied) {
		return nil, status.Error(codes.PermissionDenied, err.Error())
	}
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &securityapi.IstioCertificateResponse{CertChain: []string{PEM(leaf), PEM(authority.Root())}}, nil
}

// read checks the request, and finds the identity: the impersonated one, that
// of the certificate request, or the default.
func (s *Server) read(ctx context.Context, in *securityapi.IstioCertificateRequest) (Request, error) {
	headers, _ := metadata.FromIncomingContext(ctx)
	first := func(key string) string {
		if v := headers.Get(key); len(v) > 0 {
			return v[0]
		}
		return ""
	}
	block, _ := pem.Decode([]byte(in.GetCsr()))
	if block == nil || block.Type != "CERTIFICATE REQUEST" {
		return Request{}, status.Error(codes.InvalidArgument, "the CSR is no PEM block CERTIFICATE REQUEST")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err == nil {
		err = csr.CheckSignature()
	}
	if err != nil {
		return Request{}, status.Errorf(codes.InvalidArgument, "the CSR is invalid: %v", err)
	}
	req := Request{
		Authorization: first("authorization"),
		ClusterID:     first("clusterid"),
		Validity:      time.Duration(in.GetValidityDuration()) * time.Second,
		CSR:           csr,
		Identity:      s.cfg.DefaultIdentity,
	}
	text := ""
	if v, ok := in.GetMetadata().GetFields()[impersonated]; ok {
		text, req.Impersonated = v.GetStringValue(), true
	} else if len(csr.URIs) > 0 {
		text = csr.URIs[0].String()
	}
	if text != "" || req.Impersonated {
		if req.Identity, err = spiffeid.FromString(text); err != nil {
			return Request{}, status.Errorf(codes.InvalidArgument, "identity %q: %v", text, err)
		}
	}
	if req.Identity.IsZero() {
		return Request{}, status.Error(codes.PermissionDenied, "the request names no identity, and there is no default")
	}
	return req, nil
}

// PEM encodes a certificate.
func PEM(c *x509.Certificate) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
}
