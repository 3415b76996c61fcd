//go:build e2e

package netns

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/world"
)

// E2-06 and E2-07, N-29 and N-30, and after them E2-04 and E2-05: the file of
// revocation lists comes while a connection is up. Metric and teardown take at
// most 10 s, and the next handshake is refused.
func TestID_E206_InboundRevocation(t *testing.T) {
	in(t, []mode{dedicated, shared}, func(t *testing.T, m mode) { checkRevocation(t, m, "destination") })
}
func TestID_E207_OutboundRevocation(t *testing.T) {
	in(t, []mode{dedicated, shared}, func(t *testing.T, m mode) { checkRevocation(t, m, "source") })
}

func checkRevocation(t *testing.T, m mode, reporter string) {
	lists := filepath.Join(t.TempDir(), "crl.pem")
	o := m.pair(world.BothCaptured)
	if reporter == "destination" {
		o.Dest.Env = []string{"CRL_PATH=" + lists}
	} else {
		o.Source.Env = []string{"CRL_PATH=" + lists}
	}
	p := newPair(t, o)
	judge, judged, identity := p.Dest, p.Source, p.Client.Identity()
	if reporter == "source" {
		judge, judged, identity = p.Source, p.Dest, p.Server.Identity()
	}
	c := p.Dial(world.ChatPort)
	if err := world.Exchange(c, "before", "before"); err != nil {
		t.Fatal(err)
	}
	bystander, _ := new(big.Int).SetString("1234567890", 10)
	writeCRL(t, p.CADir(), lists, 1, bystander)
	judge.Expect(p.Ctx, world.Fields{"message": "certificate revocation lists loaded", "lists": "1", "revoked": "1"})
	if err := world.Exchange(c, "during", "during"); err != nil {
		t.Fatalf("with another certificate on the list: %v", err)
	}

	writeCRL(t, p.CADir(), lists, 2, serialOf(t, judged, identity))
	start := time.Now()
	_, err := c.Read(make([]byte, 1))
	if took := time.Since(start); took > 10*time.Second || !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the connection ended after %v with %v, want a reset within 10 s", took, err)
	} else {
		t.Logf("the connection ended after %v", took)
	}
	labels := map[string]string{"reporter": reporter}
	judge.ExpectMetric(p.Ctx, "istio_crl_policy_rejections_total", labels, 1)
	judge.ExpectMetric(p.Ctx, "istio_tcp_connections_failed_total", map[string]string{"reporter": reporter, "response_flags": "CERT_REVOKED"}, 1)
	judge.Expect(p.Ctx, world.Fields{"message": "connection complete", "error": "connection closed: peer certificate revoked by CRL"})

	fresh := p.Dial(world.ChatPort)
	if err := world.Exchange(fresh, "after", "after"); err == nil {
		t.Error("a new connection was served")
	}
	judge.ExpectMetric(p.Ctx, "istio_crl_policy_rejections_total", labels, 2)
}

// serialOf is the serial number of the certificate that a proxy has for an
// identity.
func serialOf(t *testing.T, s *world.Proxy, identity string) *big.Int {
	t.Helper()
	body, err := s.Pod.Get("http://127.0.0.1:15000/config_dump")
	if err != nil {
		t.Fatal(err)
	}
	var dump struct {
		Certificates []struct {
			Identity  string `json:"identity"`
			CertChain []struct {
				SerialNumber string `json:"serialNumber"`
			} `json:"certChain"`
		} `json:"certificates"`
	}
	if err := json.Unmarshal([]byte(body), &dump); err != nil {
		t.Fatal(err)
	}
	for _, c := range dump.Certificates {
		if len(c.CertChain) == 0 || c.Identity != identity {
			continue
		}
		if n, ok := new(big.Int).SetString(c.CertChain[0].SerialNumber, 10); ok {
			return n
		}
	}
	t.Fatalf("no serial number of %s in %s", identity, body)
	return nil
}

// writeCRL signs a list with the root of the embedded CA and puts it in place at
// once.
func writeCRL(t *testing.T, caDir, path string, number int64, serial *big.Int) {
	t.Helper()
	root, key, err := readCA(filepath.Join(caDir, "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
		Number: big.NewInt(number), ThisUpdate: now, NextUpdate: now.Add(time.Hour),
		RevokedCertificateEntries: []x509.RevocationListEntry{{SerialNumber: serial, RevocationTime: now}},
	}, root, key)
	if err != nil {
		t.Fatal(err)
	}
	content := pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})
	if err := errors.Join(os.WriteFile(path+".new", content, 0o644), os.Rename(path+".new", path)); err != nil {
		t.Fatal(err)
	}
}

func readCA(path string) (root *x509.Certificate, key crypto.Signer, err error) {
	rest, err := os.ReadFile(path)
	if err != nil {
		return nil, nil, err
	}
	for len(rest) > 0 {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		switch block.Type {
		case "CERTIFICATE":
			root, err = x509.ParseCertificate(block.Bytes)
		case "PRIVATE KEY":
			var k any
			k, err = x509.ParsePKCS8PrivateKey(block.Bytes)
			key, _ = k.(crypto.Signer)
		}
		if err != nil {
			return nil, nil, err
		}
	}
	if root == nil || key == nil {
		return nil, nil, fmt.Errorf("%s: no certificate and key", path)
	}
	root.KeyUsage |= x509.KeyUsageCRLSign // anchors are not asked whether they may
	return root, key, nil
}
