// Package istiod is a fake Istio CA: istio.v1.auth.IstioCertificateService over
// TLS, with the embedded CA of ca/local behind it. It behaves as istiod, as
// istio-csr or as the agent of Cilium does ([Personality]), and misbehaves as told
// ([Reply]). Unless a token is set it authenticates nobody. It is for tests of our
// client, and for interoperability tests, where another implementation gets its
// certificates from the root that our side uses too.
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
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	securityapi "istio.io/api/security/v1alpha1"

	"github.com/ztunnel-go/ztunnel/ca/local"
)

// Config configures a [Server].
type Config struct {
	CA *local.CA
	// Hosts are further names and addresses of the server's certificate, beside
	// localhost, 127.0.0.1, ::1 and istiod.istio-system.svc.
	Hosts []string
	// DefaultIdentity is issued to requests that name none. Zero refuses them.
	DefaultIdentity spiffeid.ID
	// Personality is whose behaviour it has. Default Istiod.
	Personality Personality
	// AgentTTL is the life of Cilium's certificates. Default 30 days.
	AgentTTL time.Duration
	// Token is the bearer token that every request needs, "" for none.
	Token string
	// Plaintext serves without TLS, as on a unix socket.
	Plaintext bool
}

// Request is one request as the server saw it.
type Request struct {
	Identity      spiffeid.ID
	Impersonated  bool // the identity came in the metadata
	Authorization string
	ClusterID     string
	Headers       metadata.MD
	Metadata      map[string]any // the field of the message; nil when it is absent
	Validity      time.Duration
	CSR           *x509.CertificateRequest
}

// Reply overrides what the server does with one request.
type Reply struct {
	Err      error         // a gRPC status
	Chain    []string      // the answer as it is
	Identity spiffeid.ID   // issue this identity, not the requested one
	Delay    time.Duration // before anything else
	Hang     bool          // send the headers, and nothing more until the client leaves
	Break    bool          // send the headers, and close all connections
	Sign     bool          // answer as without a Reply, after Delay
}

// Server is the fake CA. The setters may be called at any time.
type Server struct {
	securityapi.UnimplementedIstioCertificateServiceServer
	cfg  Config
	grpc *grpc.Server

	mu       sync.Mutex // guards what follows
	ca       *local.CA
	agent    *agentCA // Cilium only
	reply    func(Request) *Reply
	requests []Request
	token    string
	pods     map[spiffeid.ID]bool // nil: all
	distrust bool
	extra    []*x509.Certificate
	conns    map[net.Conn]struct{}
	cert     *tls.Certificate // of the server; nil without TLS
}

// New makes a server whose own certificate is signed by cfg.CA.
func New(cfg Config) (*Server, error) {
	if cfg.CA == nil {
		return nil, errors.New("fake istiod: no CA")
	}
	s := &Server{cfg: cfg, ca: cfg.CA, token: cfg.Token, conns: make(map[net.Conn]struct{})}
	if cfg.AgentTTL == 0 {
		s.cfg.AgentTTL = 30 * 24 * time.Hour
	}
	if cfg.Personality == Cilium {
		var err error
		if s.agent, err = newAgentCA(); err != nil {
			return nil, fmt.Errorf("fake istiod: %w", err)
		}
	}
	if cfg.Plaintext {
		s.grpc = grpc.NewServer()
	} else {
		if err := s.SetServerCA(cfg.CA); err != nil {
			return nil, err
		}
		s.grpc = grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{
			GetCertificate: s.certificate,
			MinVersion:     tls.VersionTLS12,
			NextProtos:     []string{"h2"},
		})))
	}
	securityapi.RegisterIstioCertificateServiceServer(s.grpc, s)
	return s, nil
}

// SetServerCA gives the server a certificate of c, for connections from now on.
func (s *Server) SetServerCA(c *local.CA) error {
	cert, err := serverCertificate(c, s.cfg.Hosts)
	if err != nil {
		return fmt.Errorf("fake istiod: %w", err)
	}
	s.set(func() { s.cert = cert })
	return nil
}

func (s *Server) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cert, nil
}

func serverCertificate(authority *local.CA, hosts []string) (*tls.Certificate, error) {
	names := []string{"localhost", "istiod.istio-system.svc", "istiod.istio-system"}
	addrs := []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}
	for _, h := range hosts {
		if a, err := netip.ParseAddr(h); err == nil {
			addrs = append(addrs, a)
		} else {
			names = append(names, h)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	leaf, err := authority.SignServer(key.Public(), names, addrs)
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}, nil
}

// Serve accepts on l until Stop, be it before; it closes l.
func (s *Server) Serve(l net.Listener) error {
	if err := s.grpc.Serve(&listener{l, s}); !errors.Is(err, grpc.ErrServerStopped) {
		return err
	}
	return nil
}

// Stop closes the listener and all connections, and waits for the requests.
func (s *Server) Stop() { s.grpc.Stop() }

// SetCA changes the CA that signs from now on; the server's own certificate
// stays. Cilium has [Server.RotateAgent] instead.
func (s *Server) SetCA(c *local.CA) { s.set(func() { s.ca = c }) }

// SetToken changes the bearer token that requests need; "" is none.
func (s *Server) SetToken(token string) { s.set(func() { s.token = token }) }

// SetPods are the identities that have a pod on the client's node; others are
// refused. Without any, all have.
func (s *Server) SetPods(ids ...spiffeid.ID) {
	s.set(func() {
		s.pods = nil
		for _, id := range ids {
			if s.pods == nil {
				s.pods = make(map[spiffeid.ID]bool)
			}
			s.pods[id] = true
		}
	})
}

// SetDistrust refuses all impersonation: the client's account is not among the
// trusted ones.
func (s *Server) SetDistrust(b bool) { s.set(func() { s.distrust = b }) }

// SetExtraRoots puts further anchors before the root in the last element of
// answers.
func (s *Server) SetExtraRoots(certs ...*x509.Certificate) { s.set(func() { s.extra = certs }) }

// Root is the root of the certificates that are issued now.
func (s *Server) Root() *x509.Certificate {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.agent != nil {
		return s.agent.root
	}
	return s.ca.Root()
}

func (s *Server) set(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

// SetReply sets a function that may override the answer to a request; it
// returns nil to leave it. A nil function ends that.
func (s *Server) SetReply(f func(Request) *Reply) { s.set(func() { s.reply = f }) }

// Requests are the well-formed requests so far.
func (s *Server) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Request(nil), s.requests...)
}

// Forget forgets the requests so far.
func (s *Server) Forget() { s.set(func() { s.requests = nil }) }

// CreateCertificate implements the service.
func (s *Server) CreateCertificate(ctx context.Context, in *securityapi.IstioCertificateRequest) (*securityapi.IstioCertificateResponse, error) {
	req, err := s.read(ctx, in)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.requests = append(s.requests, req)
	reply := s.reply
	s.mu.Unlock()
	if reply != nil {
		if r := reply(req); r != nil {
			if done, out, err := s.override(ctx, r); done {
				return out, err
			}
			if !r.Identity.IsZero() {
				req.Identity = r.Identity
			}
		}
	}
	return s.issue(req)
}

// override does what r says; done is false when a certificate is to be issued.
func (s *Server) override(ctx context.Context, r *Reply) (done bool, out *securityapi.IstioCertificateResponse, err error) {
	if r.Delay > 0 {
		timer := time.NewTimer(r.Delay)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
			return true, nil, status.FromContextError(ctx.Err()).Err()
		}
	}
	switch {
	case r.Hang || r.Break:
		if err := grpc.SendHeader(ctx, nil); err != nil {
			return true, nil, err
		}
		if r.Break {
			s.DropConnections()
		}
		<-ctx.Done()
		return true, nil, status.FromContextError(ctx.Err()).Err()
	case r.Err != nil:
		return true, nil, r.Err
	case r.Identity.IsZero() && !r.Sign:
		return true, &securityapi.IstioCertificateResponse{CertChain: r.Chain}, nil
	}
	return false, nil, nil
}

// Connections is the number of open connections.
func (s *Server) Connections() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

// DropConnections closes all connections.
func (s *Server) DropConnections() {
	s.mu.Lock()
	conns := slices.Collect(maps.Keys(s.conns))
	s.mu.Unlock()
	for _, c := range conns {
		c.Close()
	}
}

// listener knows its open connections.
type listener struct {
	net.Listener
	s *Server
}

func (l *listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	t := &conn{c, l.s}
	l.s.set(func() { l.s.conns[t] = struct{}{} })
	return t, nil
}

type conn struct {
	net.Conn
	s *Server
}

func (c *conn) Close() error {
	c.s.set(func() { delete(c.s.conns, c) })
	return c.Conn.Close()
}

// read checks what all personalities check: the token and the form of the
// request.
func (s *Server) read(ctx context.Context, in *securityapi.IstioCertificateRequest) (Request, error) {
	headers, _ := metadata.FromIncomingContext(ctx)
	first := func(key string) string {
		if v := headers.Get(key); len(v) > 0 {
			return v[0]
		}
		return ""
	}
	s.mu.Lock()
	token := s.token
	s.mu.Unlock()
	if token != "" && first("authorization") != "Bearer "+token {
		return Request{}, status.Error(codes.Unauthenticated, "request authenticate failure")
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
		Headers:       headers,
		Validity:      time.Duration(in.GetValidityDuration()) * time.Second,
		CSR:           csr,
	}
	if in.Metadata != nil {
		req.Metadata = in.Metadata.AsMap()
	}
	return req, s.identify(&req)
}

// PEM encodes a certificate.
func PEM(c *x509.Certificate) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
}
