package ca_test

import (
	"bufio"
	"bytes"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
)

// handshakePatience bounds a handshake with a peer in another process, the
// peer's start included.
const handshakePatience = 30 * time.Second

// cryptoJob tells the other process what to do.
type cryptoJob struct {
	Addr   string // to connect to
	Client bool   // whether it is the TLS client
	TLS12  bool
	PQC    bool
	Limits peerLimits
	Chain  [][]byte
	Key    []byte // PKCS #8
	Root   []byte
}

// cryptoReport is what it says then, on one line behind reportMark.
type cryptoReport struct {
	Provider string
	Got      negotiated
	Err      string
}

const reportMark = "crypto report: "

// TestID_TL03_CryptoInterop: nodes of different builds meet. The peers are test
// binaries of this package, built for each provider by make test-crypto
// (ZTUNNEL_CRYPTO_PEERS, separated by spaces); without them, this binary.
func TestID_TL03_CryptoInterop(t *testing.T) {
	peers := strings.Fields(os.Getenv("ZTUNNEL_CRYPTO_PEERS"))
	if len(peers) == 0 {
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		peers = []string{self}
	}
	seen := map[string]bool{}
	root := catest.NewCA(t, "td.test")
	for _, peer := range peers {
		for _, tt := range cryptoCases() {
			for _, client := range []bool{true, false} {
				seen[interop(t, root, peer, tt, client)] = true
			}
		}
	}
	if len(seen) != len(peers) {
		t.Errorf("%d peers are of the builds %v: want one each", len(peers), seen)
	}
}

// interop shakes hands with the test binary peer, and returns its provider.
func interop(t *testing.T, root *catest.CA, peer string, tt cryptoCase, client bool) (provider string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	cmd := exec.CommandContext(t.Context(), peer, "-test.run=^TestCryptoPeer$")
	cmd.Env = append(os.Environ(), "ZTUNNEL_CRYPTO_PEER=1")
	cmd.Stdin = bytes.NewReader(newCryptoJob(t, root, tt, l.Addr().String(), !client))
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ours := root.SVID(t, web)
	var conf *tls.Config
	if client {
		conf = clientTLS(t, ours, tt.ours, web)
	} else {
		conf = ca.ServerTLS(ours, tt.ours)
	}
	if err := l.(*net.TCPListener).SetDeadline(time.Now().Add(handshakePatience)); err != nil {
		t.Fatal(err)
	}
	conn, err := l.Accept()
	if err != nil {
		_ = cmd.Process.Kill()
		t.Fatalf("%s did not connect: %v, %v\n%s", peer, err, cmd.Wait(), out.String())
	}
	got, oursErr := shake(conn, conf, client)
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%s: %v\n%s", peer, err, out.String())
	}
	report := readReport(t, out.String())
	want := tt.want(factsOf(t, ca.CryptoProvider()), factsOf(t, report.Provider))
	theirs := report.Got
	if oursErr != nil {
		got = negotiated{}
	}
	if report.Err != "" {
		theirs = negotiated{}
	}
	if got != want || theirs != want {
		t.Errorf("%s, we as client: %t, with %s: we negotiated %+v (%v), the peer %+v (%s); want %+v",
			tt.name, client, report.Provider, got, oursErr, theirs, report.Err, want)
	}
	return report.Provider
}

func newCryptoJob(t *testing.T, root *catest.CA, tt cryptoCase, addr string, client bool) []byte {
	t.Helper()
	chain, key := root.Leaf(t, web.String())
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	job := cryptoJob{Addr: addr, Client: client, TLS12: tt.peer.TLS12, PQC: tt.peer.PQC, Limits: tt.change, Key: pkcs8, Root: root.Root.Raw}
	for _, c := range chain {
		job.Chain = append(job.Chain, c.Raw)
	}
	b, err := json.Marshal(job)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func readReport(t *testing.T, out string) (r cryptoReport) {
	t.Helper()
	for line := range strings.Lines(out) {
		if text, ok := strings.CutPrefix(line, reportMark); ok {
			if err := json.Unmarshal([]byte(text), &r); err != nil {
				t.Fatal(err)
			}
			return r
		}
	}
	t.Fatalf("the peer reports nothing:\n%s", out)
	return r
}

// shake shakes hands on conn, sends a byte, waits for one, and closes conn: a
// refusal reaches the other side at the latest then.
func shake(conn net.Conn, conf *tls.Config, client bool) (negotiated, error) {
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(handshakePatience)); err != nil {
		return negotiated{}, err
	}
	c := tls.Server(conn, conf)
	if client {
		c = tls.Client(conn, conf)
	}
	if err := c.Handshake(); err != nil {
		return negotiated{}, err
	}
	if _, err := c.Write([]byte("x")); err != nil {
		return negotiated{}, err
	}
	if _, err := c.Read(make([]byte, 1)); err != nil {
		return negotiated{}, err
	}
	return outcome(c.ConnectionState()), nil
}

// TestCryptoPeer is the other process of the interop test.
func TestCryptoPeer(t *testing.T) {
	if os.Getenv("ZTUNNEL_CRYPTO_PEER") == "" {
		t.Skip("started by the interop test only")
	}
	var job cryptoJob
	if err := json.NewDecoder(bufio.NewReader(os.Stdin)).Decode(&job); err != nil {
		t.Fatal(err)
	}
	conf := job.config(t)
	job.Limits.apply(conf)
	conn, err := (&net.Dialer{Timeout: handshakePatience}).DialContext(t.Context(), "tcp", job.Addr)
	if err != nil {
		t.Fatal(err)
	}
	r := cryptoReport{Provider: ca.CryptoProvider()}
	if r.Got, err = shake(conn, conf, job.Client); err != nil {
		r.Err = err.Error()
	}
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stdout.WriteString(reportMark + string(b) + "\n"); err != nil {
		t.Fatal(err)
	}
}

func (j cryptoJob) config(t *testing.T) *tls.Config {
	t.Helper()
	var chain []*x509.Certificate
	for _, der := range append(j.Chain, j.Root) {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		chain = append(chain, c)
	}
	key, err := x509.ParsePKCS8PrivateKey(j.Key)
	if err != nil {
		t.Fatal(err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		t.Fatalf("a %T cannot sign", key)
	}
	root := chain[len(chain)-1]
	bundles := ca.NewBundles(map[spiffeid.TrustDomain][]ca.Anchor{web.TrustDomain(): {{Cert: root, Provider: "test", Mode: ca.Strict}}})
	svid, err := ca.NewSVID("test", chain[:len(chain)-1], signer, bundles)
	if err != nil {
		t.Fatal(err)
	}
	opts := ca.TLSOptions{TLS12: j.TLS12, PQC: j.PQC}
	if j.Client {
		return clientTLS(t, svid, opts, web)
	}
	return ca.ServerTLS(svid, opts)
}
