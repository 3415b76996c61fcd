package xds_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ztunnel-go/ztunnel/state"
	"github.com/ztunnel-go/ztunnel/xds"
	"github.com/ztunnel-go/ztunnel/xds/discoverypb"
	"github.com/ztunnel-go/ztunnel/xds/xdstest"
)

// authority is a CA for servers.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{t: t, key: key}
	a.cert = a.sign(&x509.Certificate{IsCA: true, BasicConstraintsValid: true, Subject: pkix.Name{CommonName: "root"}}, nil, key)
	return a
}

func (a *authority) sign(template, parent *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	a.t.Helper()
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(1000*time.Hour)
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert
}

func (a *authority) pem() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw}))
}

// leaf is a server certificate for names.
func (a *authority) leaf(names ...string) *tls.Certificate {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	cert := a.sign(&x509.Certificate{DNSNames: names, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}, a.cert, key)
	return &tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}
}

// tlsServer presents the certificate that set has set, and remembers the names that
// were asked for and the TLS versions.
type tlsServer struct {
	mu       sync.Mutex // guards what follows
	cert     *tls.Certificate
	names    []string
	versions []uint16
	max      uint16
}

func (s *tlsServer) set(c *tls.Certificate) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cert = c
}

func (s *tlsServer) config() *tls.Config {
	return &tls.Config{
		NextProtos: []string{"h2"}, MaxVersion: s.max,
		GetCertificate: func(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.names = append(s.names, h.ServerName)
			return s.cert, nil
		},
		VerifyConnection: func(cs tls.ConnectionState) error {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.versions = append(s.versions, cs.Version)
			return nil
		},
	}
}

const tlsAddress = "https://istiod.istio-system.svc:15012"

// restart ends the stream and waits for the next attempts.
func (w *world) restart() {
	w.server.Disconnect(status.Error(codes.Unavailable, "transport is closing"))
	sleep(time.Minute)
}

func replace(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path+".next", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".next", path); err != nil {
		t.Fatal(err)
	}
}

// TestST_XDS15_Names: the URL's host is in the handshake; the certificate needs it,
// or the alternative name.
func TestST_XDS15_Names(t *testing.T) {
	for _, tt := range []struct {
		name, alt string
		leaf      []string
		ok        bool
		text      string
	}{
		{name: "host", leaf: []string{"istiod.istio-system.svc"}, ok: true},
		{name: "host, with an alternative", alt: "other.example", leaf: []string{"istiod.istio-system.svc"}, ok: true},
		{name: "alternative", alt: "other.example", leaf: []string{"other.example"}, ok: true},
		{name: "neither", alt: "other.example", leaf: []string{"third.example"}, text: "ALT_XDS_HOSTNAME"},
		{name: "alternative that is not configured", leaf: []string{"other.example"}, text: "ALT_XDS_HOSTNAME"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := newAuthority(t)
				s := &tlsServer{cert: a.leaf(tt.leaf...)}
				w := newWorld(t, xdstest.Config{TLS: s.config()}, func(c *xds.Config) {
					c.Address, c.RootPEM, c.AltHostname = tlsAddress, a.pem(), tt.alt
				})
				sleep(5 * time.Second)
				if w.synced() != tt.ok || !strings.Contains(w.client.Status().LastError, tt.text) {
					t.Errorf("synced %t, status %+v", w.synced(), w.client.Status())
				}
				if len(s.names) == 0 || s.names[0] != "istiod.istio-system.svc" {
					t.Errorf("names in the handshake: %q", s.names)
				}
			})
		})
	}
}

// TestST_XDS15_OtherRoot: a server of another root is refused, whatever its name.
func TestST_XDS15_OtherRoot(t *testing.T) {
	for _, alt := range []string{"", "other.example"} {
		synctest.Test(t, func(t *testing.T) {
			s := &tlsServer{cert: newAuthority(t).leaf("istiod.istio-system.svc", "other.example")}
			w := newWorld(t, xdstest.Config{TLS: s.config()}, func(c *xds.Config) {
				c.Address, c.RootPEM, c.AltHostname, c.Token = tlsAddress, newAuthority(t).pem(), alt, "secret"
			})
			sleep(5 * time.Second)
			if w.synced() || !strings.Contains(w.client.Status().LastError, "XDS_ROOT_CA") {
				t.Errorf("synced %t, status %+v", w.synced(), w.client.Status())
			}
			if n, _ := w.server.Streams(); n != 0 {
				t.Error("there was a stream")
			}
		})
	}
}

// TestTLSVersions: 1.3 unless 1.2 is allowed.
func TestTLSVersions(t *testing.T) {
	for _, tls12 := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			a := newAuthority(t)
			s := &tlsServer{cert: a.leaf("istiod.istio-system.svc"), max: tls.VersionTLS12}
			w := newWorld(t, xdstest.Config{TLS: s.config()}, func(c *xds.Config) {
				c.Address, c.RootPEM, c.TLS12 = tlsAddress, a.pem(), tls12
			})
			sleep(5 * time.Second)
			if w.synced() != tls12 {
				t.Errorf("TLS 1.2 allowed %t, used %t", tls12, w.synced())
			}
		})
	}
}

// TestST_XDS15_Token: read for each stream, trimmed; without one that can be used
// there is no stream. Nothing of it is in the log.
func TestST_XDS15_Token(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "token")
		w := newWorld(t, xdstest.Config{}, func(c *xds.Config) {
			c.TokenFile, c.ClusterID = path, "cluster-1"
			c.Headers = []xds.Header{{Name: "X-Team", Value: "a"}}
		})
		sleep(time.Minute)
		if got := w.client.Status(); w.synced() || !strings.Contains(got.LastError, path) || w.terminations("ConnectionError") == 0 {
			t.Errorf("without a token: status %+v", got)
		}
		if !strings.Contains(w.log.String(), "correct the file that the error names") || !strings.Contains(w.log.String(), "AUTH_TOKEN") {
			t.Errorf("the log does not say what to do:\n%s", w.log)
		}
		if n := w.terminations("ConnectionError"); n > 20 {
			t.Errorf("%v attempts in a minute", n)
		}
		for i, token := range []string{"secret-1\n", "  secret-2"} {
			replace(t, path, token)
			w.restart()
			w.settle()
			headers := w.initial(xdstest.AddressType).Headers
			for name, want := range map[string]string{"authorization": "Bearer secret-" + []string{"1", "2"}[i], "clusterid": "cluster-1", "x-team": "a"} {
				if got := headers.Get(name); len(got) != 1 || got[0] != want {
					t.Errorf("%s: %q, want %q", name, got, want)
				}
			}
		}
		replace(t, path, "")
		w.restart()
		if got := w.client.Status(); got.Connected || !strings.Contains(got.LastError, "empty") {
			t.Errorf("with an empty token: status %+v", got)
		}
		if strings.Contains(w.log.String(), "secret") {
			t.Error("the token is in the log")
		}
	})
}

// TestNoAuthorization: without a token neither it nor the cluster is told.
func TestNoAuthorization(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{}, func(c *xds.Config) { c.ClusterID = "c" })
		w.settle()
		if h := w.initial(xdstest.AddressType).Headers; len(h.Get("authorization"))+len(h.Get("clusterid")) != 0 {
			t.Errorf("headers %v", h)
		}
	})
}

// TestFault_104_Roots: missing at the start, rotated, spoilt, gone. What was good
// last stays in use, each stream looks again, and nothing is tried in a hot loop.
func TestFault_104_Roots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "root-cert.pem")
		one, two := newAuthority(t), newAuthority(t)
		s := &tlsServer{cert: one.leaf("istiod.istio-system.svc")}
		w := newWorld(t, xdstest.Config{TLS: s.config()}, func(c *xds.Config) { c.Address, c.RootFile = tlsAddress, path })
		sleep(time.Minute)
		if got := w.client.Status(); w.synced() || !strings.Contains(got.LastError, path) || !strings.Contains(got.LastError, "XDS_ROOT_CA") {
			t.Errorf("without the file: status %+v", got)
		}
		if n := w.terminations("Error"); n < 5 || n > 20 || len(w.dialed()) != 0 {
			t.Errorf("%v attempts in a minute", n)
		}
		replace(t, path, one.pem())
		sleep(30 * time.Second)
		if !w.synced() {
			t.Fatalf("the file came, but %+v", w.client.Status())
		}
		for _, text := range []string{"garbage", "", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"} {
			replace(t, path, text)
			if w.restart(); !w.client.Status().Connected {
				t.Errorf("after %q: %+v", text, w.client.Status())
			}
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if w.restart(); !w.client.Status().Connected {
			t.Errorf("without the file: %+v", w.client.Status())
		}
		s.set(two.leaf("istiod.istio-system.svc"))
		if w.restart(); w.client.Status().Connected {
			t.Error("a server of another root was taken")
		}
		replace(t, path, two.pem())
		if sleep(time.Minute); !w.client.Status().Connected {
			t.Errorf("rotated: %+v", w.client.Status())
		}
	})
}

// TestUnixAndTCP: the real dialer, over a unix socket and over TCP with TLS; one
// connection for each attempt, closed with the client.
func TestUnixAndTCP(t *testing.T) {
	a := newAuthority(t)
	for _, tt := range []struct{ network, address, url string }{
		{network: "unix", address: filepath.Join(t.TempDir(), "xds.sock")},
		{network: "tcp", address: "127.0.0.1:0"},
	} {
		t.Run(tt.network, func(t *testing.T) {
			l, err := net.Listen(tt.network, tt.address)
			if err != nil {
				t.Fatal(err)
			}
			cfg := xds.Config{Store: state.New(state.Config{}), Address: "unix://" + tt.address}
			var server xdstest.Config
			if tt.network == "tcp" {
				_, port, _ := net.SplitHostPort(l.Addr().String())
				cfg.Address, cfg.RootPEM = "https://localhost:"+port, a.pem()
				server.TLS = (&tlsServer{cert: a.leaf("localhost")}).config()
			}
			s := xdstest.New(server)
			served := make(chan error, 1)
			go func() { served <- s.Serve(l) }()
			s.Set(xdstest.Workload(workload("uid1", "1.2.3.4")))
			c, err := xds.New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			ran := make(chan error, 1)
			go func() { ran <- c.Run(ctx) }()
			if err := s.Settle(ctx); err != nil {
				t.Errorf("%v: %+v", err, c.Status())
			}
			if _, ok := cfg.Store.WorkloadByUID("uid1"); !ok {
				t.Error("the workload is not there")
			}
			cancel()
			<-ran
			s.Stop()
			if err := <-served; err != nil {
				t.Error(err)
			}
		})
	}
}

// TestLargeResponse: Cilium sends everything in one message.
func TestLargeResponse(t *testing.T) {
	if testing.Short() {
		t.Skip("it moves 40 MB")
	}
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{}, func(c *xds.Config) { c.Logger = nil })
		w.settle()
		large := workload("large", "1.2.3.4")
		large.CanonicalName = strings.Repeat("x", 40<<20)
		w.server.Inject(&discoverypb.DeltaDiscoveryResponse{TypeUrl: xdstest.AddressType, Resources: []*discoverypb.Resource{{
			Name: "large", Resource: xdsAnyOf(large),
		}}})
		sleep(time.Second)
		w.settle()
		if opened, _ := w.server.Streams(); !w.has("large") || opened != 1 {
			t.Errorf("there %t, %d streams, %+v", w.has("large"), opened, w.client.Status())
		}
	})
}
