package istio_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/ca/catest/istiod"
	"github.com/ztunnel-go/ztunnel/ca/istio"
)

// TestID_CA01_EmptyChain: and a chain without a root.
func TestID_CA01_EmptyChain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, istiod.Config{}, nil)
		m := w.manager()
		w.server.SetReply(func(istiod.Request) *istiod.Reply { return &istiod.Reply{} })
		err := fails(t, w.lease(m, "web"), time.Minute)
		if want := "chain returned from CA is empty for: " + webID.String(); err.Error() != want || !errors.Is(err, ca.ErrRejected) {
			t.Errorf("got %q, want %q", err, want)
		}
		leaf := istiod.PEM(w.ca.Root())
		w.server.SetReply(func(istiod.Request) *istiod.Reply { return &istiod.Reply{Chain: []string{leaf}} })
		err = fails(t, w.lease(m, "other"), time.Minute)
		if want := "failed to create CSR: invalid root certificate: no root certificate present"; err.Error() != want || !errors.Is(err, ca.ErrRejected) {
			t.Errorf("got %q, want %q", err, want)
		}
	})
}

func TestID_CA02_WrongIdentity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, istiod.Config{}, nil)
		w.server.SetReply(func(istiod.Request) *istiod.Reply {
			return &istiod.Reply{Identity: catest.ID("spiffe://cluster.local/ns/a/sa/other")}
		})
		err := fails(t, w.lease(w.manager(), "web"), time.Minute)
		if want := "did not find expected SAN: " + webID.String(); err.Error() != want || !errors.Is(err, ca.ErrRejected) {
			t.Errorf("got %q, want %q", err, want)
		}
	})
}

// TestID_CA03_FetchCertificate: what is sent, and what is made of the answer.
func TestID_CA03_FetchCertificate(t *testing.T) {
	type want struct {
		impersonated  bool
		authorization string
		clusterID     string
		metadata      map[string]any
		headers       map[string][]string
	}
	for _, tt := range []struct {
		name   string
		server istiod.Config
		change func(*istio.Config)
		want   want
	}{
		{
			name:   "shared mode",
			change: func(c *istio.Config) { c.Token = "jwt"; c.TTL = 0 },
			want: want{impersonated: true, authorization: "Bearer jwt", clusterID: "Kubernetes",
				metadata: map[string]any{"ImpersonatedIdentity": webID.String(), "ClusterID": "Kubernetes"}},
		},
		{
			name:   "shared mode without a token",
			change: nil,
			want:   want{impersonated: true, metadata: map[string]any{"ImpersonatedIdentity": webID.String(), "ClusterID": "Kubernetes"}},
		},
		{
			name: "a signer, and headers",
			change: func(c *istio.Config) {
				c.ClusterID, c.CertSigner = "", "clusterissuers.example/x"
				c.Headers = []istio.Header{{Name: "X-One", Value: "1"}, {Name: "x-two", Value: "a"}, {Name: "X-TWO", Value: "b"}}
			},
			want: want{impersonated: true, metadata: map[string]any{"ImpersonatedIdentity": webID.String(), "CertSigner": "clusterissuers.example/x"},
				headers: map[string][]string{"x-one": {"1"}, "x-two": {"a", "b"}}},
		},
		{
			name:   "dedicated mode",
			change: func(c *istio.Config) { c.Impersonate = false; c.Token = " jwt\n" },
			want:   want{authorization: "Bearer jwt", clusterID: "Kubernetes"},
		},
		{
			name:   "istio-csr",
			server: istiod.Config{Personality: istiod.IstioCSR, Token: "jwt"},
			change: func(c *istio.Config) { c.Token = "jwt"; c.ClusterID = "" },
			want: want{impersonated: true, authorization: "Bearer jwt",
				metadata: map[string]any{"ImpersonatedIdentity": webID.String()}},
		},
		{
			name:   "cilium",
			server: istiod.Config{Personality: istiod.Cilium},
			change: func(c *istio.Config) { c.ClusterID = "" },
			want:   want{metadata: map[string]any{"ImpersonatedIdentity": webID.String()}},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, tt.server, tt.change)
				svid := get(t, w.lease(w.manager(), "web"), time.Minute, nil)
				if svid.ID != webID || svid.Provider != "istio" {
					t.Errorf("got %v", svid)
				}
				if got := anchors(svid); len(got) != 1 || !got[0].Equal(w.server.Root()) {
					t.Errorf("%d anchors, want the root of the answer", len(got))
				}
				r := w.server.Requests()[0]
				headers := make(map[string][]string)
				for name, v := range r.Headers {
					if strings.HasPrefix(name, "x-") {
						headers[name] = v
					}
				}
				got := want{r.Impersonated, r.Authorization, r.ClusterID, r.Metadata, headers}
				if tt.want.headers == nil {
					tt.want.headers = map[string][]string{}
				}
				if d := cmp.Diff(tt.want, got, cmp.AllowUnexported(want{})); d != "" {
					t.Errorf("request (-want +got):\n%s", d)
				}
				wantTTL := time.Hour
				if tt.name == "shared mode" {
					wantTTL = 24 * time.Hour
				}
				if r.Validity != wantTTL {
					t.Errorf("asked for %v, want %v", r.Validity, wantTTL)
				}
			})
		})
	}
}

// TestID_CA08_CSR: a P-256 key of its own for each request, an empty subject, and
// a single critical SAN with one URI.
func TestID_CA08_CSR(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, istiod.Config{}, nil)
		l := w.lease(w.manager(), "web")
		get(t, l, time.Minute, nil)
		sleep(time.Hour)
		requests := w.server.Requests()
		if len(requests) < 2 {
			t.Fatalf("%d requests in an hour, want a renewal", len(requests))
		}
		var keys []*ecdsa.PublicKey
		for _, r := range requests {
			csr := r.CSR // the server checked its signature
			key, ok := csr.PublicKey.(*ecdsa.PublicKey)
			if !ok || key.Curve != elliptic.P256() || csr.SignatureAlgorithm != x509.ECDSAWithSHA256 {
				t.Fatalf("key %T, signature %v, want P-256 and ECDSA with SHA-256", csr.PublicKey, csr.SignatureAlgorithm)
			}
			if slices.ContainsFunc(keys, func(k *ecdsa.PublicKey) bool { return k.Equal(key) }) {
				t.Error("two requests have the same key")
			}
			keys = append(keys, key)
			if len(csr.Subject.Names) != 0 || len(csr.RawSubject) != 2 {
				t.Errorf("subject %v, want an empty one", csr.Subject)
			}
			san := asn1.ObjectIdentifier{2, 5, 29, 17}
			if len(csr.Extensions) != 1 || !csr.Extensions[0].Id.Equal(san) || !csr.Extensions[0].Critical {
				t.Errorf("extensions %v, want one critical SAN", csr.Extensions)
			}
			if len(csr.URIs) != 1 || csr.URIs[0].String() != webID.String() || len(csr.DNSNames)+len(csr.IPAddresses)+len(csr.EmailAddresses) != 0 {
				t.Errorf("names %v %v, want one URI", csr.URIs, csr.DNSNames)
			}
		}
	})
}

// TestID_TL01_Answer: leaf and three more certificates are two intermediates
// and one root.
func TestID_TL01_Answer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, istiod.Config{}, nil)
		root := catest.NewCA(t, "cluster.local")
		upper := root.Intermediate(t)
		lower := upper.Intermediate(t)
		w.server.SetReply(func(r istiod.Request) *istiod.Reply {
			leaf := sign(t, lower, r.CSR.PublicKey, webID.String())
			return &istiod.Reply{Chain: []string{istiod.PEM(leaf), istiod.PEM(lower.Cert), istiod.PEM(upper.Cert), istiod.PEM(root.Cert)}}
		})
		svid := get(t, w.lease(w.manager(), "web"), time.Minute, nil)
		chain, err := svid.Chain()
		if err != nil {
			t.Fatal(err)
		}
		if len(chain) != 3 || !chain[1].Equal(lower.Cert) || !chain[2].Equal(upper.Cert) {
			t.Errorf("%d certificates are presented, want the leaf and two intermediates in the order of the answer", len(chain))
		}
		if got := anchors(svid); len(got) != 1 || !got[0].Equal(root.Cert) {
			t.Errorf("%d anchors, want the root", len(got))
		}
	})
}

// TestAnchorsOfAnswer: those of the last element, whatever stands before it, but
// for damaged ones.
func TestAnchorsOfAnswer(t *testing.T) {
	next, third := catest.NewCA(t, "cluster.local"), catest.NewCA(t, "cluster.local")
	damaged := "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
	torn := "-----BEGIN CERTIFICATE-----\n!!!!\n-----END CERTIFICATE-----\n"
	for _, tt := range []struct {
		name  string
		chain func(leaf, root string) []string
		want  int
		warns int
		err   string
	}{
		{name: "several in the last element", want: 3, chain: func(leaf, root string) []string {
			return []string{leaf, istiod.PEM(next.Cert) + "\n# a comment\n" + root + istiod.PEM(third.Cert)}
		}},
		{name: "roots in the chain are not in the bundle", want: 1, chain: func(leaf, root string) []string {
			return []string{leaf, istiod.PEM(next.Cert), istiod.PEM(third.Cert), root}
		}},
		{name: "damaged ones are skipped", want: 1, warns: 2, chain: func(leaf, root string) []string {
			return []string{leaf, damaged + root + torn}
		}},
		{name: "only damaged ones", err: "no root certificate present", chain: func(leaf, _ string) []string {
			return []string{leaf, damaged}
		}},
		{name: "another kind of block", err: `PEM block 1 is a "PRIVATE KEY", want CERTIFICATE`, chain: func(leaf, root string) []string {
			return []string{leaf, "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n" + root}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, istiod.Config{}, nil)
				w.server.SetReply(func(r istiod.Request) *istiod.Reply {
					leaf, err := w.ca.Sign(r.CSR.PublicKey, r.Identity, time.Hour)
					if err != nil {
						t.Error(err)
					}
					return &istiod.Reply{Chain: tt.chain(istiod.PEM(leaf), istiod.PEM(w.ca.Root()))}
				})
				l := w.lease(w.manager(), "web")
				if tt.err != "" {
					err := fails(t, l, time.Minute)
					if !strings.Contains(err.Error(), tt.err) || !errors.Is(err, ca.ErrRejected) {
						t.Errorf("got %q, want %q", err, tt.err)
					}
					return
				}
				svid := get(t, l, time.Minute, nil)
				if got := anchors(svid); len(got) != tt.want {
					t.Errorf("%d anchors, want %d", len(got), tt.want)
				}
				if n := len(svid.Cert.Certificate); n != 1 {
					t.Errorf("%d certificates are presented, want only the leaf", n)
				}
				if got := strings.Count(w.log.String(), "was skipped"); got != tt.warns {
					t.Errorf("%d warnings, want %d:\n%s", got, tt.warns, w.log)
				}
			})
		})
	}
}

// TestAnchorsAreShared: by all SVIDs, as long as the CA names the same ones, in
// whatever words.
func TestAnchorsAreShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, istiod.Config{}, nil)
		m := w.manager()
		first := get(t, w.lease(m, "web"), time.Minute, nil)
		w.server.SetReply(func(r istiod.Request) *istiod.Reply {
			leaf, err := w.ca.Sign(r.CSR.PublicKey, r.Identity, time.Hour)
			if err != nil {
				t.Error(err)
			}
			return &istiod.Reply{Chain: []string{istiod.PEM(leaf), "# the root\n" + istiod.PEM(w.ca.Root())}}
		})
		second := get(t, w.lease(m, "other"), time.Minute, nil)
		if first.Bundles != second.Bundles {
			t.Error("two SVIDs have bundles of their own")
		}
	})
}

// TestAliases: one CA for a trust domain and its other names.
func TestAliases(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, istiod.Config{}, func(c *istio.Config) { c.Aliases = append(c.Aliases, catest.TrustDomain("old.test")) })
		m := w.manager()
		svid := get(t, w.lease(m, "web"), time.Minute, nil)
		if got := svid.Bundles.Anchors(catest.TrustDomain("old.test")); len(got) != 1 || got[0].Mode != ca.Compatible {
			t.Errorf("anchors of the alias %v, want the CA's root", got)
		}
		if svid.Bundles.Has(catest.TrustDomain("foreign.test")) {
			t.Error("there are anchors for a trust domain that nobody listed")
		}
		foreign := m.Acquire(ca.WorkloadRef{ID: catest.ID("spiffe://foreign.test/ns/a/sa/web")})
		defer foreign.Release()
		err := fails(t, foreign, time.Minute)
		if !errors.Is(err, ca.ErrConfig) || !strings.Contains(err.Error(), "DEFAULT_TRUST_DOMAIN") {
			t.Errorf("got %v, want an error of the configuration", err)
		}
		if n := len(w.server.Requests()); n != 1 {
			t.Errorf("the CA was asked %d times, want once", n)
		}
	})
}

// TestDedicatedAnyID: the CA alone decides who we are.
func TestDedicatedAnyID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, istiod.Config{}, func(c *istio.Config) { c.Impersonate = false })
		other := catest.ID("spiffe://cluster.local/ns/a/sa/other")
		w.server.SetReply(func(istiod.Request) *istiod.Reply { return &istiod.Reply{Identity: other} })
		if svid := get(t, w.lease(w.manager(), "web"), time.Minute, nil); svid.ID != other {
			t.Errorf("got %v, want the identity that the CA gave", svid.ID)
		}
	})
}

// TestStatusCodes: what becomes of each code, and what the operator reads.
func TestStatusCodes(t *testing.T) {
	for _, tt := range []struct {
		code        codes.Code
		message     string
		token       string
		impersonate bool
		class       error
		outcome     string
		want        []string
	}{
		{codes.Unauthenticated, "request impersonation authentication failure", "jwt", true, ca.ErrDenied, "denied", []string{
			"signing gRPC error (The request does not have valid authentication credentials): request impersonation authentication failure", "CA_TRUSTED_NODE_ACCOUNTS", "--ca-trusted-node-accounts", "audience"}},
		{codes.PermissionDenied, "no", "jwt", false, ca.ErrDenied, "denied", []string{
			"signing gRPC error (The caller does not have permission to execute the specified operation): no", "audience"}},
		{codes.Unauthenticated, "request authenticate failure", "", true, ca.ErrDenied, "denied", []string{"no token was sent", "AUTH_TOKEN"}},
		{codes.Unimplemented, "unknown service", "", true, ca.ErrConfig, "config", []string{"signing gRPC error (Operation is not implemented or not supported): unknown service", "CA_ADDRESS"}},
		{codes.InvalidArgument, "bad CSR", "", true, ca.ErrConfig, "config", []string{"signing gRPC error (Client specified an invalid argument): bad CSR"}},
		{codes.Unknown, "no endpoints found for service account", "", true, nil, "error", []string{"signing gRPC error (Unknown error): no endpoints found for service account"}},
		{codes.Unavailable, "starting", "", true, nil, "error", []string{"signing gRPC error (The service is currently unavailable): starting"}},
		{codes.NotFound, "mock not set", "", true, nil, "error", []string{"signing gRPC error (Some requested entity was not found): mock not set"}},
		{codes.DeadlineExceeded, "signer is slow", "", true, nil, "timeout", []string{"signing gRPC error (Deadline expired before operation could complete): signer is slow"}},
		{codes.Code(77), "odd", "", true, nil, "error", []string{"signing gRPC error (", "odd"}},
	} {
		t.Run(tt.code.String()+" "+tt.message, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, istiod.Config{}, func(c *istio.Config) { c.Token, c.Impersonate = tt.token, tt.impersonate })
				w.server.SetReply(func(istiod.Request) *istiod.Reply { return &istiod.Reply{Err: status.Error(tt.code, tt.message)} })
				l := w.lease(w.manager(), "web")
				err := fails(t, l, time.Minute)
				for _, c := range []error{ca.ErrDenied, ca.ErrConfig, ca.ErrRejected} {
					if got, want := errors.Is(err, c), c == tt.class; got != want {
						t.Errorf("%v is %q: %v, want %v", err, c, got, want)
					}
				}
				for _, part := range tt.want {
					if !strings.Contains(err.Error(), part) {
						t.Errorf("%q does not say %q", err, part)
					}
				}
				if n := w.outcome(tt.outcome); n < 1 {
					t.Errorf("%v requests with outcome %s, want some", n, tt.outcome)
				}
				w.server.SetReply(nil)
				get(t, l, 10*time.Minute, nil)
			})
		})
	}
}
