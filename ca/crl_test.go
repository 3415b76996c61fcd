package ca_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
)

// crlFile is a revocation list on disk.
type crlFile struct {
	t    testing.TB
	path string
}

func newCRLFile(t testing.TB) crlFile { return crlFile{t, filepath.Join(t.TempDir(), "crl.pem")} }

// write replaces the file at once.
func (f crlFile) write(parts ...[]byte) {
	f.t.Helper()
	tmp := f.path + ".new"
	if err := os.WriteFile(tmp, bytes.Join(parts, nil), 0o600); err != nil {
		f.t.Fatal(err)
	}
	if err := os.Rename(tmp, f.path); err != nil {
		f.t.Fatal(err)
	}
}

// loaded are the lists in the given content.
func loaded(t testing.TB, content ...[]byte) (*ca.CRLs, error) {
	t.Helper()
	f := newCRLFile(t)
	f.write(content...)
	c := ca.NewCRLs(ca.CRLConfig{Path: f.path})
	return c, c.Load()
}

func mustLoad(t testing.TB, content ...[]byte) *ca.CRLs {
	t.Helper()
	c, err := loaded(t, content...)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// pathOf is the one verified path of a chain to the root of its CA.
func pathOf(t testing.TB, c *catest.CA, opts ...catest.Option) []*x509.Certificate {
	t.Helper()
	chain, _ := c.Leaf(t, catest.GoodID, opts...)
	v, err := ca.VerifySVID(chain, c.Bundles(ca.Strict), ca.VerifyOptions{Usage: ca.Own})
	if err != nil {
		t.Fatal(err)
	}
	return v.Path
}

func isRevoked(err error) bool {
	var revoked *ca.RevokedError
	return errors.As(err, &revoked)
}

func TestID_CR01_MissingFile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newCRLFile(t)
		root := catest.NewCA(t, "td.test")
		path := pathOf(t, root)
		c := ca.NewCRLs(ca.CRLConfig{Path: f.path})
		if err := c.Load(); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("Load() = %v, want that there is no file", err)
		}
		if err := c.Check(path); err != nil || c.Generation() != 0 {
			t.Errorf("without a file: %v, generation %d", err, c.Generation())
		}
		run(t, c)
		synctest.Wait()
		changed := c.Changed()
		f.write(root.CRL(t, 1, path[:1]))
		start := time.Now()
		<-changed
		if took := time.Since(start); took > time.Second {
			t.Errorf("loaded after %v, want at most 1s", took)
		}
		if err := c.Check(path); !isRevoked(err) {
			t.Errorf("once the file has come: %v", err)
		}
		if err := os.Remove(f.path); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if err := c.Check(path); !isRevoked(err) {
			t.Errorf("once the file has gone: %v", err)
		}
	})
}

// run follows the file until the test ends.
func run(t *testing.T, c *ca.CRLs) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run = %v", err)
		}
	})
}

// CR-02, and the deviation of §9: an error at the start does not end the watch.
// Every bad file leaves the lists from before in force.
func TestID_CR02_InvalidFile(t *testing.T) {
	root := catest.NewCA(t, "td.test")
	path := pathOf(t, root)
	good := root.CRL(t, 1, path[:1])
	der := root.CRLDER(t, 1, path[:1])
	extension := func(oid asn1.ObjectIdentifier, critical bool, value ...byte) catest.CRLOption {
		return func(l *x509.RevocationList) {
			l.ExtraExtensions = append(l.ExtraExtensions, pkix.Extension{Id: oid, Critical: critical, Value: value})
		}
	}
	entry := func(oid asn1.ObjectIdentifier) catest.CRLOption {
		return func(l *x509.RevocationList) {
			l.RevokedCertificateEntries[0].ExtraExtensions = []pkix.Extension{{Id: oid, Critical: true, Value: []byte{5, 0}}}
		}
	}
	idp, private := asn1.ObjectIdentifier{2, 5, 29, 28}, asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 55555, 1}
	version1 := bytes.Replace(der, []byte{2, 1, 1, 0x30}, []byte{2, 1, 0, 0x30}, 1)
	big160 := new(big.Int).Lsh(big.NewInt(1), 159)
	for _, tt := range []struct {
		name, want string
		content    []byte
	}{
		{"text", "should be DER", []byte("this is no CRL")},
		{"truncated DER", "should be DER", der[:len(der)/2]},
		{"version 1", "unsupported crl version", version1},
		{"bytes after the DER", "1 bytes after the list", append(bytes.Clone(der), 0)},
		{"two DER", "bytes after the list", append(bytes.Clone(der), der...)},
		{"PEM of garbage", "block 1", pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: []byte("garbage")})},
		{"the second block is bad", "block 2", append(bytes.Clone(good), pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der[:100]})...)},
		{"cut short", "2 blocks begin and 1 can be read", append(bytes.Clone(good), good[:len(good)/2]...)},
		{"bad base64", "1 blocks begin and 0 can be read", bytes.Replace(good, []byte("\nM"), []byte("\n*"), 1)},
		{"no nextUpdate", "no nextUpdate", withoutNextUpdate(t, der)},
		{"delta CRL", "delta CRLs", root.CRL(t, 1, path[:1], extension(asn1.ObjectIdentifier{2, 5, 29, 27}, true, 2, 1, 1))},
		{"unknown critical extension", "critical extension 1.3.6.1.4.1.55555.1", root.CRL(t, 1, path[:1], extension(private, true, 5, 0))},
		{"unknown critical extension of an entry", "of an entry", root.CRL(t, 1, path[:1], entry(private))},
		{"indirect, by an entry", "indirect CRLs", root.CRL(t, 1, path[:1], entry(asn1.ObjectIdentifier{2, 5, 29, 29}))},
		{"indirect", "indirect CRLs", root.CRL(t, 1, path[:1], extension(idp, true, 0x30, 3, 0x84, 1, 0xff))},
		{"attribute certificates", "attribute certificates", root.CRL(t, 1, path[:1], extension(idp, true, 0x30, 3, 0x85, 1, 0xff))},
		{"some reasons", "some reasons", root.CRL(t, 1, path[:1], extension(idp, true, 0x30, 4, 0x83, 2, 1, 2))},
		{"scope that cannot be read", "issuing distribution point", root.CRL(t, 1, path[:1], extension(idp, true, 0x30, 9))},
		{"number of 21 bytes", "more than 20 bytes", patchNumber(t, root, path[:1], new(big.Int).Lsh(big160, 8))},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := loaded(t, tt.content); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Load() = %v, want %q", err, tt.want)
			}
			synctest.Test(t, func(t *testing.T) {
				f := newCRLFile(t)
				f.write(tt.content)
				var outcomes []bool
				c := ca.NewCRLs(ca.CRLConfig{Path: f.path, Loaded: func(err error) { outcomes = append(outcomes, err == nil) }})
				if c.Load() == nil {
					t.Error("the file was loaded")
				}
				run(t, c)
				f.write(good)
				time.Sleep(time.Second)
				if err := c.Check(path); !isRevoked(err) {
					t.Errorf("the good file after it: %v", err)
				}
				f.write(tt.content)
				time.Sleep(time.Second)
				if err := c.Check(path); !isRevoked(err) {
					t.Errorf("the bad file after the good one: %v", err)
				}
				synctest.Wait()
				if want := []bool{false, true, false}; len(outcomes) != 3 || outcomes[0] != want[0] || outcomes[1] != want[1] || outcomes[2] != want[2] {
					t.Errorf("told of %v, want %v: a bad file is tried once", outcomes, want)
				}
			})
		})
	}
}

// withoutNextUpdate takes the field out of a list; the signature is not looked
// at when a list is loaded.
func withoutNextUpdate(t *testing.T, der []byte) []byte {
	t.Helper()
	list, err := x509.ParseRevocationList(der)
	if err != nil {
		t.Fatal(err)
	}
	next := append([]byte{0x17, 13}, list.NextUpdate.UTC().Format("060102150405Z")...)
	at := bytes.LastIndex(list.RawTBSRevocationList[:len(list.RawTBSRevocationList)], next)
	if at < 0 {
		t.Fatal("no nextUpdate in the list")
	}
	type signed struct {
		TBS       asn1.RawValue
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}
	var s signed
	if _, err := asn1.Unmarshal(der, &s); err != nil {
		t.Fatal(err)
	}
	head := len(s.TBS.FullBytes) - len(s.TBS.Bytes)
	body := append(bytes.Clone(s.TBS.Bytes[:at-head]), s.TBS.Bytes[at-head+len(next):]...)
	s.TBS = asn1.RawValue{Tag: asn1.TagSequence, IsCompound: true, Bytes: body}
	out, err := asn1.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// patchNumber makes a list whose number crypto/x509 would not sign: it lengthens
// the one of a good list.
func patchNumber(t *testing.T, c *catest.CA, revoked []*x509.Certificate, number *big.Int) []byte {
	t.Helper()
	value, err := asn1.Marshal(number)
	if err != nil {
		t.Fatal(err)
	}
	// The generator puts its own number first, with an object identifier of the
	// same length as the one that is made of it here.
	der := c.CRLDER(t, 1, revoked, func(l *x509.RevocationList) {
		l.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 99}, Value: value}}
	})
	der = bytes.Replace(der, []byte{6, 3, 0x55, 0x1d, 20}, []byte{6, 3, 0x55, 0x1d, 98}, 1)
	return bytes.Replace(der, []byte{6, 3, 0x55, 0x1d, 99}, []byte{6, 3, 0x55, 0x1d, 20}, 1)
}

func TestID_CR03_EmptyFile(t *testing.T) {
	root := catest.NewCA(t, "td.test")
	path := pathOf(t, root)
	certificate := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Cert.Raw})
	for name, content := range map[string][]byte{"empty": nil, "blank": []byte("\n \n"), "other blocks": certificate} {
		c, err := loaded(t, content)
		if err != nil || c.Check(path) != nil || c.Generation() != 1 {
			t.Errorf("%s: %v, %v, generation %d", name, err, c.Check(path), c.Generation())
		}
	}
	var none *ca.CRLs
	if none.Check(path) != nil || none.Generation() != 0 || none.Changed() != nil {
		t.Error("nil lists revoke something")
	}
}

func TestID_CR04_ValidCRL(t *testing.T) {
	root, other := catest.NewCA(t, "td.test"), catest.NewCA(t, "other.test")
	path, spared := pathOf(t, root), pathOf(t, root)
	certificate := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Cert.Raw})
	for name, content := range map[string][]byte{
		"PEM": root.CRL(t, 1, path[:1]),
		"DER": root.CRLDER(t, 1, path[:1]),
		"PEM among others, with Windows line ends": bytes.ReplaceAll(bytes.Join([][]byte{certificate, other.CRL(t, 1, nil), root.CRL(t, 1, path[:1])}, nil), []byte("\n"), []byte("\r\n")),
	} {
		c := mustLoad(t, content)
		var revoked *ca.RevokedError
		if err := c.Check(path); !errors.As(err, &revoked) || revoked.CA || revoked.Serial.Cmp(path[0].SerialNumber) != 0 ||
			!strings.HasPrefix(err.Error(), "certificate revoked: ") || !strings.Contains(err.Error(), "root of td.test") {
			t.Errorf("%s: %v", name, err)
		}
		if err := c.Check(spared); err != nil {
			t.Errorf("%s: a certificate that is not listed: %v", name, err)
		}
	}
}

// CR-05: names and serial numbers are the same bytes in certificates and lists,
// whatever their first bit is; only the listed number matches.
func TestID_CR05_Encoding(t *testing.T) {
	root := catest.NewCA(t, "td.test", func(c *x509.Certificate) {
		c.Subject = pkix.Name{Organization: []string{"Zürich"}, CommonName: "root"}
	})
	serial := func(n *big.Int) catest.Option { return func(c *x509.Certificate) { c.SerialNumber = n } }
	long := new(big.Int).SetBytes(bytes.Repeat([]byte{0x7f}, 20))
	for _, n := range []*big.Int{big.NewInt(1), big.NewInt(0x7f), big.NewInt(0x80), big.NewInt(0xff), big.NewInt(0x100), big.NewInt(0x8000), long} {
		path := pathOf(t, root, serial(n))
		c := mustLoad(t, root.CRL(t, 1, path[:1]))
		if err := c.Check(path); !isRevoked(err) {
			t.Errorf("serial number %x: %v", n, err)
		}
		for _, other := range []*big.Int{new(big.Int).Add(n, big.NewInt(1)), new(big.Int).Lsh(n, 8)} {
			if other.BitLen() > 159 {
				continue
			}
			if err := c.Check(pathOf(t, root, serial(other))); err != nil {
				t.Errorf("serial number %x with %x on the list: %v", other, n, err)
			}
		}
	}
}

// A file that is being written is not taken for a short one.
func TestCRLWrittenInPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root := catest.NewCA(t, "td.test")
		path := pathOf(t, root)
		f := newCRLFile(t)
		f.write(root.CRL(t, 1, path[:1]))
		c := ca.NewCRLs(ca.CRLConfig{Path: f.path})
		if err := c.Load(); err != nil {
			t.Fatal(err)
		}
		run(t, c)
		content := root.CRL(t, 2, path[:1])
		time.Sleep(300 * time.Millisecond)
		w, err := os.Create(f.path) // empty when it is looked at first
		if err != nil {
			t.Fatal(err)
		}
		for len(content) > 0 {
			time.Sleep(300 * time.Millisecond)
			if err := c.Check(path); !isRevoked(err) {
				t.Fatalf("%d bytes before the end: %v", len(content), err)
			}
			n := min(40, len(content))
			if _, err := w.Write(content[:n]); err != nil {
				t.Fatal(err)
			}
			content = content[n:]
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if c.Generation() != 2 {
			t.Errorf("generation %d, want 2", c.Generation())
		}
	})
}

func TestCRLTooLarge(t *testing.T) {
	root := catest.NewCA(t, "td.test")
	f := newCRLFile(t)
	f.write(root.CRL(t, 1, nil))
	c := ca.NewCRLs(ca.CRLConfig{Path: f.path, MaxBytes: 100})
	if err := c.Load(); err == nil || !strings.Contains(err.Error(), "more than 100 bytes") {
		t.Errorf("Load() = %v", err)
	}
}
