package local_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/ca/local"
)

var webID = catest.ID("spiffe://cluster.local/ns/a/sa/web")

// gate stands before an embedded CA, and can be told to misbehave.
type gate struct {
	mu       sync.Mutex // guards what follows
	ca       *local.CA
	requests int
	denied   bool
	down     bool
	impostor bool
}

func (g *gate) Fetch(ctx context.Context, id spiffeid.ID) (*ca.SVID, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.requests++
	switch {
	case g.down:
		return nil, errors.New("unreachable")
	case g.denied:
		return nil, fmt.Errorf("%w: %s", ca.ErrDenied, id)
	case g.impostor:
		id = catest.ID("spiffe://cluster.local/ns/a/sa/impostor")
	}
	return g.ca.Fetch(ctx, id)
}

func (g *gate) set(f func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	f()
}

func TestProviderConformance(t *testing.T) {
	catest.TestProvider(t, catest.Harness{
		Impersonates: true,
		Denies:       true,
		Start: func(t *testing.T) *catest.Backend {
			open := func() *local.CA {
				c, err := local.Open(local.Config{TTL: time.Hour})
				if err != nil {
					t.Fatal(err)
				}
				return c
			}
			g := &gate{ca: open()}
			return &catest.Backend{
				Provider: ca.Poll("local", g, ca.PollConfig{}),
				Workload: ca.WorkloadRef{ID: webID, Namespace: "a", ServiceAccount: "web"},
				Life:     time.Hour,
				Rotate:   func() { next := open(); g.set(func() { g.ca = next }) },
				Deny:     func(b bool) { g.set(func() { g.denied = b }) },
				Down:     func(b bool) { g.set(func() { g.down = b }) },
				Impostor: func(b bool) { g.set(func() { g.impostor = b }) },
				Traffic: func() int {
					g.mu.Lock()
					defer g.mu.Unlock()
					return g.requests
				},
			}
		},
	})
}

func TestLeafForm(t *testing.T) {
	c, err := local.Open(local.Config{})
	if err != nil {
		t.Fatal(err)
	}
	svid, err := c.Fetch(t.Context(), webID)
	if err != nil {
		t.Fatal(err)
	}
	// Strict mode asks for everything that SPIFFE asks for.
	if _, err := ca.VerifySVID([]*x509.Certificate{svid.Cert.Leaf}, c.Bundles(), ca.VerifyOptions{Usage: ca.Own, Validation: ca.AlwaysStrict}); err != nil {
		t.Error(err)
	}
	if s := svid.Cert.Leaf.Subject.String(); s != "" {
		t.Errorf("subject %q, want none", s)
	}
	if got := time.Until(svid.NotAfter); got > 24*time.Hour || got < 24*time.Hour-time.Minute {
		t.Errorf("life %v, want 24h", got)
	}
}

func TestTrustDomains(t *testing.T) {
	alias := catest.TrustDomain("old.example")
	c, err := local.Open(local.Config{TrustDomain: catest.TrustDomain("mesh.example"), Aliases: []spiffeid.TrustDomain{alias}})
	if err != nil {
		t.Fatal(err)
	}
	for id, ok := range map[string]bool{
		"spiffe://mesh.example/ns/a/sa/b":  true,
		"spiffe://old.example/ns/a/sa/b":   true,
		"spiffe://cluster.local/ns/a/sa/b": false,
		"spiffe://mesh.example":            false,
	} {
		_, err := c.Fetch(t.Context(), catest.ID(id))
		if ok && err != nil || !ok && !errors.Is(err, ca.ErrDenied) {
			t.Errorf("%s: got %v, want granted %v", id, err, ok)
		}
	}
	if len(c.Bundles().Anchors(alias)) != 1 {
		t.Error("no bundle for the alias")
	}
}

func TestSignServer(t *testing.T) {
	c, err := local.Open(local.Config{})
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := c.SignServer(key.Public(), []string{"istiod.test"}, []netip.Addr{netip.MustParseAddr("192.0.2.1")})
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(c.Root())
	for _, name := range []string{"istiod.test", "192.0.2.1"} {
		if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, DNSName: name}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := ca.VerifySVID([]*x509.Certificate{cert}, c.Bundles(), ca.VerifyOptions{}); err == nil {
		t.Error("a server certificate passed for a workload's")
	}
}

func TestDirIsShared(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new", "ca")
	const nodes = 8
	roots := make([]*x509.Certificate, nodes)
	var wg sync.WaitGroup
	for i := range nodes {
		wg.Go(func() {
			c, err := local.Open(local.Config{Dir: dir})
			if err != nil {
				t.Error(err)
				return
			}
			roots[i] = c.Root()
		})
	}
	wg.Wait()
	for i, r := range roots {
		if !r.Equal(roots[0]) {
			t.Errorf("node %d has another root", i)
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Fatalf("%v, %v, want one file", entries, err)
	}
	info, err := entries[0].Info()
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v (%v), want 0600", info.Mode(), err)
	}
}

// private is a new directory that passes for a CA's, whatever the umask.
func private(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestDirOfOthers(t *testing.T) {
	tests := []struct {
		name string
		mode os.FileMode // of the directory
		uid  int         // of the directory, if not 0
		file int         // owner of the file, if not 0
		want string      // "" for none
	}{
		{name: "private", mode: 0o700},
		{name: "readable", mode: 0o755},
		{name: "sticky", mode: 0o777 | os.ModeSticky},
		{name: "writable by all", mode: 0o777, want: "others may write the directory (mode 0777)"},
		{name: "writable by the group", mode: 0o770, want: "others may write the directory (mode 0770)"},
		{name: "of another user", mode: 0o700, uid: 1234, want: "the directory belongs to user 1234"},
		{name: "sticky, of another user", mode: 0o777 | os.ModeSticky, uid: 1234, want: "the directory belongs to user 1234"},
		{name: "file of another user", mode: 0o777 | os.ModeSticky, file: 1234, want: "the file belongs to user 1234"},
	}
	for _, tt := range tests {
		for _, exists := range []bool{true, false} {
			if !exists && tt.file != 0 {
				continue
			}
			t.Run(fmt.Sprintf("%s, exists %t", tt.name, exists), func(t *testing.T) {
				if (tt.uid != 0 || tt.file != 0) && os.Geteuid() != 0 {
					t.Skip("only root can give files away")
				}
				dir := private(t)
				path := filepath.Join(dir, "ca.pem")
				if exists {
					if _, err := local.Open(local.Config{Dir: dir}); err != nil {
						t.Fatal(err)
					}
				}
				err := os.Chmod(dir, tt.mode)
				if tt.uid != 0 {
					err = errors.Join(err, os.Chown(dir, tt.uid, -1))
				}
				if tt.file != 0 {
					err = errors.Join(err, os.Chown(path, tt.file, -1))
				}
				if err != nil {
					t.Fatal(err)
				}
				_, err = local.Open(local.Config{Dir: dir})
				if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
					t.Errorf("got %v, want %q", err, tt.want)
				}
				if _, serr := os.Stat(path); err != nil && !exists && serr == nil {
					t.Error("a root was stored nevertheless")
				}
			})
		}
	}
}

func TestDirLinks(t *testing.T) {
	target := private(t)
	c, err := local.Open(local.Config{Dir: target})
	if err != nil {
		t.Fatal(err)
	}
	dir := private(t)
	path := filepath.Join(dir, "ca.pem")
	if err := os.Symlink(filepath.Join(target, "ca.pem"), path); err != nil {
		t.Fatal(err)
	}
	if linked, err := local.Open(local.Config{Dir: dir}); err != nil || !linked.Root().Equal(c.Root()) {
		t.Errorf("through a link: got %v, want its root", err)
	}
	if err := os.Remove(filepath.Join(target, "ca.pem")); err != nil {
		t.Fatal(err)
	}
	_, err = local.Open(local.Config{Dir: dir})
	if want := path + ": it is a symbolic link to " + filepath.Join(target, "ca.pem") + ", which does not exist"; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want %q", err, want)
	}
}

func TestDirHostile(t *testing.T) {
	good := private(t)
	if _, err := local.Open(local.Config{Dir: good}); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(filepath.Join(good, "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	cert, key, ok := strings.Cut(string(content), "-----BEGIN PRIVATE KEY-----")
	if !ok {
		t.Fatal("no key in the file")
	}
	key = "-----BEGIN PRIVATE KEY-----" + key
	second := private(t)
	if _, err := local.Open(local.Config{Dir: second}); err != nil {
		t.Fatal(err)
	}
	foreign, err := os.ReadFile(filepath.Join(second, "ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	_, foreignKey, _ := strings.Cut(string(foreign), "-----BEGIN PRIVATE KEY-----")
	tests := []struct {
		name, content, domain, want string
		mode                        os.FileMode
	}{
		{name: "empty", want: "no CERTIFICATE block"},
		{name: "partial: no key", content: cert, want: "no PRIVATE KEY block"},
		{name: "partial: no certificate", content: key, want: "no CERTIFICATE block"},
		{name: "truncated", content: string(content[:len(content)-60]), want: "no PRIVATE KEY block"},
		{name: "twice", content: cert + cert + key, want: "unexpected PEM block"},
		{name: "other block", content: cert + "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n" + key, want: "unexpected PEM block"},
		{name: "garbage certificate", content: "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n" + key, want: "cannot be parsed"},
		{name: "garbage key", content: cert + "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", want: "cannot be parsed"},
		{name: "key of another", content: cert + "-----BEGIN PRIVATE KEY-----" + foreignKey, want: "not the key"},
		{name: "huge", content: string(content) + strings.Repeat("x", 64<<10), want: "more than"},
		{name: "writable by others", content: string(content), mode: 0o666, want: "others may write"},
		{name: "readable by others", content: string(content), mode: 0o604, want: "others may read"},
		{name: "readable by the group", content: string(content), mode: 0o640, want: "others may read"},
		{name: "text before", content: "x\n" + string(content), want: "besides the two PEM blocks"},
		{name: "text between", content: cert + "x\n" + key, want: "besides the two PEM blocks"},
		{name: "text behind", content: string(content) + "x", want: "besides the two PEM blocks"},
		{name: "damaged block between", content: cert + "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n" + key, want: "besides the two PEM blocks"},
		{name: "other trust domain", content: string(content), domain: "mesh.example", want: "configured is spiffe://mesh.example"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := private(t)
			path := filepath.Join(dir, "ca.pem")
			if err := os.WriteFile(path, []byte(tt.content), 0o600); err != nil {
				t.Fatal(err)
			}
			if tt.mode != 0 {
				if err := os.Chmod(path, tt.mode); err != nil {
					t.Fatal(err)
				}
			}
			cfg := local.Config{Dir: dir}
			if tt.domain != "" {
				cfg.TrustDomain = catest.TrustDomain(tt.domain)
			}
			_, err := local.Open(cfg)
			if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), path) {
				t.Errorf("got %v, want an error about %q that names the file", err, tt.want)
			}
			if err != nil && strings.Contains(err.Error(), "PRIVATE KEY-----\n") {
				t.Error("the error shows content of the file")
			}
			after, err := os.ReadFile(path)
			if err != nil || string(after) != tt.content {
				t.Errorf("the file was changed (%v)", err)
			}
		})
	}
	t.Run("FIFO", func(t *testing.T) {
		dir := private(t)
		if err := syscall.Mkfifo(filepath.Join(dir, "ca.pem"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := local.Open(local.Config{Dir: dir}); err == nil || !strings.Contains(err.Error(), "no regular file") {
			t.Errorf("got %v, want an error about the file's kind", err)
		}
	})
	t.Run("directory is a file", func(t *testing.T) {
		if _, err := local.Open(local.Config{Dir: filepath.Join(good, "ca.pem")}); err == nil {
			t.Error("got no error")
		}
	})
}

func TestConfigErrors(t *testing.T) {
	if _, err := local.New(local.Config{TTL: time.Millisecond}); err == nil || !strings.Contains(err.Error(), "1ms") {
		t.Errorf("TTL 1ms: %v, want an error that names it", err)
	}
	p, err := local.New(local.Config{})
	if err != nil || p.Name() != "local" {
		t.Errorf("New: %v, %v, want provider local", p, err)
	}
}

// TestWatchBundles: the root is known before the first certificate.
func TestWatchBundles(t *testing.T) {
	c, err := local.Open(local.Config{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	got := make(chan *ca.Bundles, 1)
	done := make(chan error, 1)
	go func() {
		done <- c.Provider().WatchBundles(ctx, ca.WorkloadRef{ID: webID}, func(b *ca.Bundles) { got <- b })
	}()
	if b := <-got; !b.Equal(c.Bundles()) {
		t.Errorf("got %v, want the root", b.Domains())
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("WatchBundles: %v, want the end of the context", err)
	}
}
