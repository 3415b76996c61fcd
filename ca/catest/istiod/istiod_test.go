package istiod_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"net"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	securityapi "istio.io/api/security/v1alpha1"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/ca/catest/istiod"
	"github.com/ztunnel-go/ztunnel/ca/local"
)

const web = "spiffe://cluster.local/ns/a/sa/web"

// dial starts a server and a client that trusts its root.
func dial(t *testing.T, cfg istiod.Config, serverName string) (*istiod.Server, securityapi.IstioCertificateServiceClient) {
	t.Helper()
	server, err := istiod.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	roots := x509.NewCertPool()
	roots.AddCert(cfg.CA.Root())
	conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: roots, ServerName: serverName})))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		server.Stop()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return server, securityapi.NewIstioCertificateServiceClient(conn)
}

func openCA(t *testing.T) *local.CA {
	t.Helper()
	c, err := local.Open(local.Config{})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// request makes a CSR in the form of ztunnel: empty subject, critical URI SAN.
func request(t *testing.T, uri string) (*securityapi.IstioCertificateRequest, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.CertificateRequest{}
	if uri != "" {
		san, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(uri)}})
		if err != nil {
			t.Fatal(err)
		}
		template.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: san}}
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	csr := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
	return &securityapi.IstioCertificateRequest{Csr: string(csr), ValidityDuration: 3600}, key
}

func impersonate(t *testing.T, id string) *structpb.Struct {
	t.Helper()
	s, err := structpb.NewStruct(map[string]any{"ImpersonatedIdentity": id})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestIdentityOfRequest(t *testing.T) {
	const def = "spiffe://cluster.local/ns/a/sa/default"
	tests := []struct {
		name, csr, impersonated, deflt, want string
		code                                 codes.Code
	}{
		{name: "dedicated mode: the CSR's", csr: web, deflt: def, want: web},
		{name: "shared mode: the impersonated", csr: web, impersonated: "spiffe://cluster.local/ns/b/sa/other", want: "spiffe://cluster.local/ns/b/sa/other"},
		{name: "neither: the default", deflt: def, want: def},
		{name: "neither, no default", code: codes.PermissionDenied},
		{name: "foreign trust domain", csr: "spiffe://else.test/ns/a/sa/b", code: codes.PermissionDenied},
		{name: "no SPIFFE ID", csr: "https://cluster.local/x", code: codes.InvalidArgument},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cfg := istiod.Config{CA: openCA(t)}
			if tt.deflt != "" {
				cfg.DefaultIdentity = catest.ID(tt.deflt)
			}
			_, client := dial(t, cfg, "istiod.istio-system.svc")
			in, key := request(t, tt.csr)
			if tt.impersonated != "" {
				in.Metadata = impersonate(t, tt.impersonated)
			}
			out, err := client.CreateCertificate(t.Context(), in)
			if got := status.Code(err); got != tt.code {
				t.Fatalf("status %v (%v), want %v", got, err, tt.code)
			}
			if tt.code != codes.OK {
				return
			}
			if len(out.CertChain) != 2 {
				t.Fatalf("%d elements in the chain, want leaf and root", len(out.CertChain))
			}
			leaf, root := parse(t, out.CertChain[0]), parse(t, out.CertChain[1])
			if !root.Equal(cfg.CA.Root()) {
				t.Error("the last element is not the root")
			}
			svid, err := ca.NewSVID("istio", []*x509.Certificate{leaf, root}, key, cfg.CA.Bundles())
			if err != nil {
				t.Fatal(err)
			}
			v, err := ca.VerifySVID([]*x509.Certificate{leaf}, svid.Bundles, ca.VerifyOptions{Validation: ca.AlwaysStrict})
			if err != nil || v.ID.String() != tt.want {
				t.Errorf("issued %v, %v, want %s", v.ID, err, tt.want)
			}
			if life := time.Until(leaf.NotAfter); life > time.Hour || life < 59*time.Minute {
				t.Errorf("life %v, want the requested hour", life)
			}
		})
	}
}

func parse(t *testing.T, text string) *x509.Certificate {
	t.Helper()
	block, rest := pem.Decode([]byte(text))
	if block == nil || len(rest) > 0 {
		t.Fatalf("not one PEM block: %q", text)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestSettersAndRequests(t *testing.T) {
	server, client := dial(t, istiod.Config{CA: openCA(t), Hosts: []string{"ca.example", "192.0.2.1"}}, "ca.example")
	ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer x", "clusterid", "Kubernetes")
	in, _ := request(t, web)
	server.SetReply(func(r istiod.Request) *istiod.Reply {
		if r.ClusterID != "Kubernetes" || r.Authorization != "Bearer x" || r.Impersonated {
			t.Errorf("request %+v", r)
		}
		return &istiod.Reply{Err: status.Error(codes.Unavailable, "down")}
	})
	if _, err := client.CreateCertificate(ctx, in); status.Code(err) != codes.Unavailable {
		t.Errorf("overridden error: got %v, want Unavailable", err)
	}
	server.SetReply(func(istiod.Request) *istiod.Reply { return &istiod.Reply{} })
	if out, err := client.CreateCertificate(ctx, in); err != nil || len(out.CertChain) != 0 {
		t.Errorf("overridden chain: got %v, %v, want an empty one", out, err)
	}
	victim := catest.ID("spiffe://cluster.local/ns/a/sa/victim")
	server.SetReply(func(istiod.Request) *istiod.Reply { return &istiod.Reply{Identity: victim} })
	out, err := client.CreateCertificate(ctx, in)
	if err != nil || parse(t, out.CertChain[0]).URIs[0].String() != victim.String() {
		t.Errorf("overridden identity: got %v, %v", out, err)
	}
	server.SetReply(nil)
	next := openCA(t)
	server.SetCA(next)
	out, err = client.CreateCertificate(ctx, in)
	if err != nil || !parse(t, out.CertChain[1]).Equal(next.Root()) {
		t.Errorf("after SetCA: got %v, %v, want the new root", out, err)
	}
	if got := len(server.Requests()); got != 4 {
		t.Errorf("%d requests were recorded, want 4", got)
	}
}

func TestBadCSR(t *testing.T) {
	server, client := dial(t, istiod.Config{CA: openCA(t), DefaultIdentity: catest.ID(web)}, "localhost")
	good, _ := request(t, web)
	block, _ := pem.Decode([]byte(good.Csr))
	block.Bytes[len(block.Bytes)-1] ^= 1 // the signature
	for name, csr := range map[string]string{
		"empty":         "",
		"no PEM":        "CSR",
		"other block":   "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
		"bad signature": string(pem.EncodeToMemory(block)),
		"truncated DER": string(pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: block.Bytes[:20]})),
	} {
		if _, err := client.CreateCertificate(context.Background(), &securityapi.IstioCertificateRequest{Csr: csr}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: got %v, want InvalidArgument", name, err)
		}
	}
	if got := server.Requests(); len(got) != 0 {
		t.Errorf("malformed requests were recorded: %v", got)
	}
}

// TestPersonalities: what they take, and what they grant.
func TestPersonalities(t *testing.T) {
	other := catest.ID("spiffe://cluster.local/ns/b/sa/other")
	for _, tt := range []struct {
		name              string
		personality       istiod.Personality
		csr, impersonated string
		pods              []spiffeid.ID
		distrust          bool
		code              codes.Code
		want              string
		life              time.Duration
	}{
		{name: "istio-csr", personality: istiod.IstioCSR, csr: web, impersonated: web, want: web, life: time.Hour},
		{name: "istio-csr: another identity in the CSR", personality: istiod.IstioCSR, csr: web, impersonated: other.String(), code: codes.Unauthenticated},
		{name: "istio-csr: not trusted", personality: istiod.IstioCSR, csr: web, impersonated: web, distrust: true, code: codes.Unauthenticated},
		{name: "istiod: no pod on the node", csr: web, impersonated: web, pods: []spiffeid.ID{other}, code: codes.Unauthenticated},
		{name: "istiod: a pod on the node", csr: web, impersonated: web, pods: []spiffeid.ID{catest.ID(web)}, want: web, life: 2 * time.Hour},
		{name: "cilium: the CSR's", personality: istiod.Cilium, csr: web, impersonated: other.String(), distrust: true, want: web, life: 30 * 24 * time.Hour},
		{name: "cilium: no endpoint", personality: istiod.Cilium, csr: web, pods: []spiffeid.ID{other}, code: codes.Unknown},
		{name: "cilium: no identity in the CSR", personality: istiod.Cilium, impersonated: web, code: codes.Unknown},
	} {
		t.Run(tt.name, func(t *testing.T) {
			server, client := dial(t, istiod.Config{CA: openCA(t), Personality: tt.personality}, "localhost")
			server.SetPods(tt.pods...)
			server.SetDistrust(tt.distrust)
			in, _ := request(t, tt.csr)
			in.ValidityDuration = 7200
			if tt.impersonated != "" {
				in.Metadata = impersonate(t, tt.impersonated)
			}
			out, err := client.CreateCertificate(t.Context(), in)
			if got := status.Code(err); got != tt.code {
				t.Fatalf("status %v (%v), want %v", got, err, tt.code)
			}
			if tt.code != codes.OK {
				return
			}
			leaf := parse(t, out.CertChain[0])
			if got := leaf.URIs[0].String(); got != tt.want {
				t.Errorf("issued %s, want %s", got, tt.want)
			}
			if life := time.Until(leaf.NotAfter).Round(time.Minute); life != tt.life {
				t.Errorf("life %v, want %v", life, tt.life)
			}
			if root := parse(t, out.CertChain[1]); !root.Equal(server.Root()) || leaf.CheckSignatureFrom(root) != nil {
				t.Error("the leaf is not of the root in the answer")
			}
			if tt.personality == istiod.Cilium && (leaf.SignatureAlgorithm != x509.SHA256WithRSA || leaf.KeyUsage != 0 || leaf.ExtKeyUsage != nil || leaf.BasicConstraintsValid) {
				t.Errorf("signed by %v with usages %v %v, want RSA and none", leaf.SignatureAlgorithm, leaf.KeyUsage, leaf.ExtKeyUsage)
			}
		})
	}
}

func TestTokenAndMisbehaviour(t *testing.T) {
	server, client := dial(t, istiod.Config{CA: openCA(t), Token: "s3cret"}, "localhost")
	in, _ := request(t, web)
	if _, err := client.CreateCertificate(t.Context(), in); status.Code(err) != codes.Unauthenticated {
		t.Errorf("without a token: %v", err)
	}
	ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer s3cret")
	if _, err := client.CreateCertificate(ctx, in); err != nil {
		t.Errorf("with the token: %v", err)
	}
	server.SetReply(func(istiod.Request) *istiod.Reply { return &istiod.Reply{Break: true} })
	if _, err := client.CreateCertificate(ctx, in); status.Code(err) != codes.Unavailable {
		t.Errorf("broken connection: %v, want Unavailable", err)
	}
	hctx, cancel := context.WithCancel(ctx)
	server.SetReply(func(istiod.Request) *istiod.Reply {
		cancel()
		return &istiod.Reply{Hang: true}
	})
	if _, err := client.CreateCertificate(hctx, in); status.Code(err) != codes.Canceled {
		t.Errorf("hanging server: %v, want Canceled", err)
	}
}
