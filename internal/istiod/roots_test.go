package istiod

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func write(t *testing.T, path, text string) {
	t.Helper()
	// Replaced and not rewritten: two contents within one tick of the file system's
	// clock have the same time.
	next := path + ".next"
	if err := os.WriteFile(next, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(next, path); err != nil {
		t.Fatal(err)
	}
}

func rootPEM(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// TestID_CA04_CA06_CA07_FileRoots: what the reference does with a dirty flag. A
// file starts clean, a change is seen once, and what cannot be read is tried
// again although it has not changed.
func TestID_CA04_CA06_CA07_FileRoots(t *testing.T) {
	var log strings.Builder
	path := filepath.Join(t.TempDir(), "root-cert.pem")
	first, second := rootPEM(t), rootPEM(t)
	write(t, path, first)
	r := FileRoots(path, slog.New(slog.NewTextHandler(&log, nil)))
	if r.set != nil {
		t.Fatal("the file was read by the constructor")
	}
	look := func() *RootSet {
		t.Helper()
		set, err := r.Look(t.Context(), 0)
		if err != nil {
			t.Fatal(err)
		}
		return set
	}
	clean := look()
	if look() != clean {
		t.Error("an unchanged file was taken for another one")
	}
	write(t, path, second)
	changed := look()
	if changed == clean || changed.Certs[0].Equal(clean.Certs[0]) {
		t.Error("the change was not seen")
	}
	if look() != changed {
		t.Error("one change was seen twice")
	}
	write(t, path, second+"# as before\n")
	if look() != changed {
		t.Error("the same certificates in another text were taken for a change")
	}
	for _, bad := range []string{"garbage", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", ""} {
		log.Reset()
		write(t, path, bad)
		if look() != changed {
			t.Errorf("after %q the last good roots are gone", bad)
		}
		if look(); strings.Count(log.String(), "stay in use") != 1 || !strings.Contains(log.String(), path) {
			t.Errorf("after %q the log is %q, want one warning", bad, log.String())
		}
	}
	// What failed is read again even if it looks as before: the right to read it
	// may have come since.
	write(t, path, first)
	if _, err := r.watcher.Check(); err != nil {
		t.Fatal(err)
	}
	if set := look(); !set.Certs[0].Equal(clean.Certs[0]) {
		t.Error("the mended file was not read")
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if set := look(); !set.Certs[0].Equal(clean.Certs[0]) {
		t.Error("with the file the last good roots are gone")
	}
}

// TestID_CA05_StaticRoots: a text never changes, and has no watcher. Neither do
// the system's roots, which are not ours to list.
func TestID_CA05_StaticRoots(t *testing.T) {
	r, err := TextRoots(rootPEM(t), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	set, err := r.Look(t.Context(), 0)
	if err != nil || set.Pool == nil || len(set.Certs) != 1 || r.watcher != nil {
		t.Errorf("%+v, %v, want one root and no watcher", set, err)
	}
	if again, err := r.Look(t.Context(), 0); again != set || err != nil {
		t.Errorf("a text has changed: %v, %v", again, err)
	}
	system, err := TextRoots("", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if set, err := system.Look(t.Context(), 0); err != nil || set.Pool != nil || set.Certs != nil {
		t.Errorf("the system's roots: %+v, %v, want no pool and no certificates", set, err)
	}
}

// TestRootsMaxAge: those who only watch share one look.
func TestRootsMaxAge(t *testing.T) {
	path := filepath.Join(t.TempDir(), "root-cert.pem")
	r := FileRoots(path, slog.New(slog.DiscardHandler))
	if _, err := r.Look(t.Context(), time.Hour); err == nil {
		t.Error("a missing file is no error")
	}
	write(t, path, rootPEM(t))
	if _, err := r.Look(t.Context(), time.Hour); err == nil {
		t.Error("the file was looked at within the age that was allowed")
	}
	set, err := r.Look(t.Context(), 0)
	if err != nil || len(set.Certs) != 1 {
		t.Errorf("the file that came later: %v", err)
	}
}
