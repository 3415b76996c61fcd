//go:build e2e

package world

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca/local"
	"github.com/ztunnel-go/ztunnel/e2e/netlab"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// WaypointPrefix is what EchoTunnel says before all else.
const WaypointPrefix = "waypoint\n"

// TunnelHandler serves one CONNECT request: it reads what comes out of the
// tunnel and writes what goes back. The stream ends when it returns.
type TunnelHandler func(ctx context.Context, authority string, in io.ReadCloser, out io.Writer) error

// EchoTunnel stands in for a waypoint: it returns its input after a word that
// tells who was asked.
func EchoTunnel(_ context.Context, _ string, in io.ReadCloser, out io.Writer) error {
	if _, err := io.WriteString(out, WaypointPrefix); err != nil {
		return err
	}
	_, err := io.Copy(out, in)
	return err
}

// HBONEServer ends tunnels in a pod that has no proxy. It is made of net/http and
// shares no code with the implementation under test.
type HBONEServer struct {
	mu       sync.Mutex // guards requests
	requests []TunnelRequest
}

// TunnelRequest is a CONNECT that came.
type TunnelRequest struct {
	Authority string
	Peer      string // SPIFFE ID
	Network   string // x-forwarded-network
}

// Requests are those that came until now.
func (s *HBONEServer) Requests() []TunnelRequest {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.requests)
}

// Expect fails the test unless want are the requests until now.
func (s *HBONEServer) Expect(t *testing.T, want ...TunnelRequest) {
	t.Helper()
	if got := s.Requests(); !slices.Equal(got, want) {
		t.Errorf("requests for tunnels: got %+v, want %+v", got, want)
	}
}

// StartHBONE serves tunnels on a port of the pod, under its identity, until the
// test ends. With the 200 comes the baggage of the pod.
func (p *Pod) StartHBONE(port uint16, handle TunnelHandler) *HBONEServer {
	t := p.W.T
	t.Helper()
	id, err := spiffeid.FromString(p.Identity())
	if err != nil {
		t.Fatal(err)
	}
	cert, roots, err := p.W.issue(id)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := p.Net.Listen(p.W.Ctx, netip.AddrPortFrom(netip.IPv6Unspecified(), port))
	if err != nil {
		t.Fatal(err)
	}
	s := &HBONEServer{}
	srv := &http.Server{
		ReadHeaderTimeout: 10 * time.Second,
		Handler:           http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { s.serve(p, handle, w, r) }),
		TLSConfig: &tls.Config{
			MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{*cert},
			ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: roots,
		},
	}
	done := make(chan error, 1)
	go func() { done <- srv.ServeTLS(NetListener(ln), "", "") }()
	t.Cleanup(func() {
		_ = srv.Close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("HBONE server of %s: %v", p.Name, err)
		}
	})
	return s
}

func (s *HBONEServer) serve(p *Pod, handle TunnelHandler, w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodConnect || r.ProtoMajor != 2 {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	peer := ""
	if uris := r.TLS.PeerCertificates[0].URIs; len(uris) == 1 {
		peer = uris[0].String()
	}
	s.mu.Lock()
	s.requests = append(s.requests, TunnelRequest{r.Host, peer, r.Header.Get("x-forwarded-network")})
	s.mu.Unlock()
	w.Header().Set("baggage", fmt.Sprintf("k8s.cluster.name=Kubernetes,k8s.namespace.name=%s,k8s.deployment.name=%s,service.name=%s,service.version=v1,cloud.region=r1,cloud.availability_zone=z1",
		p.Namespace, p.Name, p.Name))
	w.WriteHeader(http.StatusOK)
	out := &flushing{w: w, c: http.NewResponseController(w)}
	if out.c.Flush() != nil {
		return
	}
	if err := handle(r.Context(), r.Host, r.Body, out); err != nil && r.Context().Err() == nil {
		panic(http.ErrAbortHandler) // a reset, not a clean end
	}
}

// flushing sends each write at once.
type flushing struct {
	w io.Writer
	c *http.ResponseController
}

// Write sends b.
func (f *flushing) Write(b []byte) (int, error) {
	n, err := f.w.Write(b)
	if err == nil {
		err = f.c.Flush()
	}
	return n, err
}

// ForwardTunnel stands in for a network gateway: whatever is asked for, the bytes
// go to one address, from the pod.
func (p *Pod) ForwardTunnel(dst netip.AddrPort) TunnelHandler {
	return func(ctx context.Context, _ string, in io.ReadCloser, out io.Writer) error {
		c, err := p.Net.Dial(ctx, netip.Addr{}, dst)
		if err != nil {
			return err
		}
		defer c.Close()
		sent := make(chan error, 1)
		go func() {
			_, err := io.Copy(c, in)
			sent <- errors.Join(err, c.CloseWrite())
		}()
		_, err = io.Copy(out, c)
		_, _ = c.Close(), in.Close() // ends the other direction, too
		<-sent
		return err
	}
}

// issue mints a certificate of the mesh's CA.
func (w *World) issue(id spiffeid.ID) (*tls.Certificate, *x509.CertPool, error) {
	ca, err := local.Open(local.Config{Dir: w.CADir()})
	if err != nil {
		return nil, nil, err
	}
	svid, err := ca.Fetch(w.Ctx, id)
	if err != nil {
		return nil, nil, err
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca.Root())
	return svid.Cert, roots, nil
}

// NetListener makes what package net and its users take of a pod's listener.
func NetListener(ln netns.Listener) net.Listener { return netlab.NetListener(ln) }
