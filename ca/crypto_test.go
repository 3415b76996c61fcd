package ca_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/cpu"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
)

// cryptoFacts is what TLS can do with one crypto provider.
type cryptoFacts struct {
	hybrid, x25519, chacha bool
}

var allCrypto = map[string]cryptoFacts{
	ca.CryptoGo:     {hybrid: true, x25519: true, chacha: true},
	ca.CryptoFIPS:   {hybrid: true},
	ca.CryptoBoring: {},
}

// factsOf looks up a provider by its name, which may carry a version.
func factsOf(t *testing.T, provider string) cryptoFacts {
	t.Helper()
	name, _, _ := strings.Cut(provider, " ")
	facts, ok := allCrypto[name]
	if !ok {
		t.Fatalf("unknown crypto provider %q", provider)
	}
	return facts
}

// hasAES tells whether crypto/tls takes the machine for one with AES
// instructions. Without them it prefers ChaCha20.
func hasAES() bool {
	return cpu.X86.HasAES && cpu.X86.HasPCLMULQDQ && cpu.X86.HasSSE41 && cpu.X86.HasSSSE3 ||
		cpu.ARM64.HasAES && cpu.ARM64.HasPMULL ||
		cpu.S390X.HasAES && cpu.S390X.HasAESCTR && cpu.S390X.HasGHASH
}

// suite13 is the suite of TLS 1.3 between the two.
func suite13(a, b cryptoFacts) uint16 {
	if a.chacha && b.chacha && !hasAES() {
		return tls.TLS_CHACHA20_POLY1305_SHA256
	}
	return tls.TLS_AES_128_GCM_SHA256
}

// group is the key exchange of TLS 1.3 between the two.
func group(a, b cryptoFacts) tls.CurveID {
	if a.hybrid && b.hybrid {
		return tls.X25519MLKEM768
	}
	return classicGroup(a, b)
}

func classicGroup(a, b cryptoFacts) tls.CurveID {
	if a.x25519 && b.x25519 {
		return tls.X25519
	}
	return tls.CurveP256
}

// TestID_TL03_CryptoProvider: the build is the one that was asked for
// (ZTUNNEL_CRYPTO, set by make test-crypto), and says so.
func TestID_TL03_CryptoProvider(t *testing.T) {
	got := ca.CryptoProvider()
	facts := factsOf(t, got)
	if ca.FIPS() == facts.chacha || ca.HasPostQuantum() != facts.hybrid {
		t.Errorf("%s: FIPS %t, post-quantum %t", got, ca.FIPS(), ca.HasPostQuantum())
	}
	want, ok := map[string]string{"": got, "go": "go-crypto", "fips140": "go-fips140-3 v1.0.0", "boring": "go-boringcrypto"}[os.Getenv("ZTUNNEL_CRYPTO")]
	if !ok || got != want {
		t.Errorf("CRYPTO=%s: the provider is %q, want %q", os.Getenv("ZTUNNEL_CRYPTO"), got, want)
	}
}

// TestCryptoOffered is the whole offer of our client.
func TestCryptoOffered(t *testing.T) {
	facts := factsOf(t, ca.CryptoProvider())
	svid := catest.NewCA(t, "td.test").SVID(t, web)
	suites := []uint16{tls.TLS_AES_128_GCM_SHA256, tls.TLS_AES_256_GCM_SHA384}
	if facts.chacha { // crypto/tls cannot leave it out (design D3)
		suites = append(suites, tls.TLS_CHACHA20_POLY1305_SHA256)
	}
	four := []uint16{
		tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
		tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
	}
	var groups, pqc []tls.CurveID
	if facts.hybrid {
		groups, pqc = append(groups, tls.X25519MLKEM768), append(pqc, tls.X25519MLKEM768)
	}
	if facts.x25519 {
		groups = append(groups, tls.X25519)
	}
	groups = append(groups, tls.CurveP256, tls.CurveP384)
	only13, both := []uint16{tls.VersionTLS13}, []uint16{tls.VersionTLS13, tls.VersionTLS12}
	tests := []struct {
		name     string
		opts     ca.TLSOptions
		versions []uint16
		suites   []uint16
		groups   []tls.CurveID
	}{
		{"plain", ca.TLSOptions{}, only13, suites, groups},
		{"pqc", ca.TLSOptions{PQC: true}, only13, suites, pqc},
		{"TLS12_ENABLED", ca.TLSOptions{TLS12: true}, both, slices.Concat(suites, four), groups},
		{"TLS12_ENABLED and pqc", ca.TLSOptions{TLS12: true, PQC: true}, only13, suites, pqc},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var hello *tls.ClientHelloInfo
			server := ca.ServerTLS(svid, ca.TLSOptions{})
			server.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) { hello = h; return nil, nil }
			clientErr, _ := connect(t, clientTLS(t, svid, tt.opts, web), server)
			if len(tt.groups) == 0 {
				if clientErr == nil || hello != nil {
					t.Errorf("offered %+v, want an error before the first byte", hello)
				}
				return
			}
			if clientErr != nil {
				t.Fatal(clientErr)
			}
			slices.Sort(tt.suites)
			slices.Sort(hello.CipherSuites)
			for _, d := range []string{
				cmp.Diff(tt.versions, hello.SupportedVersions), cmp.Diff(tt.suites, hello.CipherSuites), cmp.Diff(tt.groups, hello.SupportedCurves),
			} {
				if d != "" {
					t.Error(d)
				}
			}
		})
	}
}

// negotiated is the outcome of a handshake; the zero value is a refusal.
type negotiated struct {
	Version, Suite uint16
	Group          tls.CurveID
}

func outcome(cs tls.ConnectionState) negotiated {
	return negotiated{cs.Version, cs.CipherSuite, cs.CurveID}
}

// cryptoCase is a handshake of ours with a peer: an ordinary one of ours, or one
// that change limits.
type cryptoCase struct {
	name       string
	ours, peer ca.TLSOptions
	change     peerLimits
	want       func(ours, peer cryptoFacts) negotiated
}

// peerLimits are what a peer can do less than ours.
type peerLimits struct {
	MaxVersion uint16
	Groups     []tls.CurveID
	Suites     []uint16
}

func (l peerLimits) apply(c *tls.Config) {
	c.MaxVersion = l.MaxVersion // 0 is the newest
	if l.Groups != nil {
		c.CurvePreferences = l.Groups
	}
	if l.Suites != nil {
		c.CipherSuites = l.Suites
	}
}

func cryptoCases() []cryptoCase {
	plain, pqc, tls12 := ca.TLSOptions{}, ca.TLSOptions{PQC: true}, ca.TLSOptions{TLS12: true}
	old := peerLimits{MaxVersion: tls.VersionTLS12}
	refused := func(cryptoFacts, cryptoFacts) negotiated { return negotiated{} }
	usual := func(a, b cryptoFacts) negotiated { return negotiated{tls.VersionTLS13, suite13(a, b), group(a, b)} }
	hybrid := func(a, b cryptoFacts) negotiated {
		if a.hybrid && b.hybrid {
			return usual(a, b)
		}
		return negotiated{}
	}
	classic := func(a, b cryptoFacts) negotiated {
		return negotiated{tls.VersionTLS13, suite13(a, b), classicGroup(a, b)}
	}
	on12 := func(a, b cryptoFacts) negotiated {
		return negotiated{tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, classicGroup(a, b)}
	}
	onlyGroup := func(g tls.CurveID, can func(cryptoFacts) bool) func(a, b cryptoFacts) negotiated {
		return func(a, b cryptoFacts) negotiated {
			if !can(a) || !can(b) {
				return negotiated{}
			}
			return negotiated{tls.VersionTLS13, suite13(a, b), g}
		}
	}
	x25519 := func(f cryptoFacts) bool { return f.x25519 }
	every := func(cryptoFacts) bool { return true }
	return []cryptoCase{
		{"plain", plain, plain, peerLimits{}, usual},
		{"peer without the hybrid", plain, plain, peerLimits{Groups: []tls.CurveID{tls.X25519, tls.CurveP256}}, classic},
		{"peer with X25519 only", plain, plain, peerLimits{Groups: []tls.CurveID{tls.X25519}}, onlyGroup(tls.X25519, x25519)},
		{"peer with P-384 only", plain, plain, peerLimits{Groups: []tls.CurveID{tls.CurveP384}}, onlyGroup(tls.CurveP384, every)},
		{"peer with P-521 only", plain, plain, peerLimits{Groups: []tls.CurveID{tls.CurveP521}}, refused},
		{"pqc", pqc, pqc, peerLimits{}, hybrid},
		{"pqc here", pqc, plain, peerLimits{}, hybrid},
		{"pqc there", plain, pqc, peerLimits{}, hybrid},
		{"pqc, peer without the hybrid", pqc, plain, peerLimits{Groups: []tls.CurveID{tls.X25519, tls.CurveP256}}, refused},
		{"TLS12_ENABLED", tls12, tls12, peerLimits{}, usual},
		{"TLS 1.2 peer", tls12, tls12, old, on12},
		{"TLS 1.2 peer, not allowed", plain, tls12, old, refused},
		{"TLS 1.2 peer, pqc", ca.TLSOptions{TLS12: true, PQC: true}, tls12, old, refused},
		{"TLS 1.2 peer with a weak suite", tls12, tls12,
			peerLimits{MaxVersion: tls.VersionTLS12, Suites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA}}, refused},
	}
}

// TestCryptoNegotiated asserts version, suite and group of workload TLS in this
// build, with us as client and as server.
func TestCryptoNegotiated(t *testing.T) {
	facts := factsOf(t, ca.CryptoProvider())
	svid := catest.NewCA(t, "td.test").SVID(t, web)
	for _, tt := range cryptoCases() {
		for _, client := range []bool{true, false} {
			t.Run(tt.name+map[bool]string{true: ", client", false: ", server"}[client], func(t *testing.T) {
				var conf [2]*tls.Config // ours, theirs
				if client {
					conf[0], conf[1] = clientTLS(t, svid, tt.ours, web), ca.ServerTLS(svid, tt.peer)
				} else {
					conf[0], conf[1] = ca.ServerTLS(svid, tt.ours), clientTLS(t, svid, tt.peer, web)
				}
				tt.change.apply(conf[1])
				if !client {
					slices.Reverse(conf[:])
				}
				cs, ss, clientErr, serverErr := connectStates(t, conf[0], conf[1])
				want := tt.want(facts, facts)
				if want == (negotiated{}) {
					if clientErr == nil || serverErr == nil {
						t.Errorf("negotiated %+v, want a refusal on both sides", outcome(cs))
					}
					return
				}
				if clientErr != nil || serverErr != nil {
					t.Fatalf("client: %v, server: %v", clientErr, serverErr)
				}
				if got := outcome(cs); got != want || outcome(ss) != want {
					t.Errorf("negotiated %+v at the client, %+v at the server, want %+v", got, outcome(ss), want)
				}
			})
		}
	}
}

// TestCryptoKeys: a FIPS module refuses chains with keys that it may not use, as
// crypto/tls would if it verified them.
func TestCryptoKeys(t *testing.T) {
	facts := factsOf(t, ca.CryptoProvider())
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	short, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	long, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		key  crypto.Signer
		want bool
	}{
		{"P-224", p224, !ca.FIPS()}, {"P-384", p384, true}, {"RSA 1024", short, !ca.FIPS()}, {"RSA 2048", long, true},
		{"Ed25519", ed, facts.hybrid}, // BoringCrypto has neither
	} {
		root := catest.NewCA(t, "td.test")
		root.Key = tt.key
		now := time.Now()
		template := &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root with " + tt.name}, NotBefore: now.Add(-time.Minute), NotAfter: now.Add(time.Hour),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		}
		der, err := x509.CreateCertificate(rand.Reader, template, template, tt.key.Public(), tt.key)
		if err != nil {
			t.Fatal(err)
		}
		if root.Cert, err = x509.ParseCertificate(der); err != nil {
			t.Fatal(err)
		}
		root.Root = root.Cert
		chain, _ := root.Leaf(t, web.String())
		want := map[bool]string{true: "", false: "FIPS"}[tt.want]
		if _, err := ca.VerifySVID(chain, root.Bundles(ca.Strict), ca.VerifyOptions{}); rule(t, err) != want {
			t.Errorf("root with %s: got %v, want refusal by %q", tt.name, err, want)
		}
		if _, err := ca.VerifyForm(append(chain, root.Root), ca.VerifyOptions{}); rule(t, err) != want {
			t.Errorf("form, root with %s: got %v, want refusal by %q", tt.name, err, want)
		}
	}
}
