package istio_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/ca/catest/istiod"
	"github.com/ztunnel-go/ztunnel/ca/istio"
)

// volume is a directory as Kubernetes mounts it: the names are links through
// ..data, which is swapped.
type volume struct {
	t   *testing.T
	dir string
	n   int
}

func newVolume(t *testing.T) *volume { return &volume{t: t, dir: t.TempDir()} }

func (v *volume) path(name string) string { return filepath.Join(v.dir, name) }

// put makes files the content of the volume, at once.
func (v *volume) put(files map[string]string) {
	v.t.Helper()
	v.n++
	version := filepath.Join(v.dir, "..v"+string(rune('0'+v.n)))
	check := func(err error) {
		if err != nil {
			v.t.Fatal(err)
		}
	}
	check(os.Mkdir(version, 0o700))
	for name, text := range files {
		check(os.WriteFile(filepath.Join(version, name), []byte(text), 0o600))
		if _, err := os.Lstat(v.path(name)); err != nil {
			check(os.Symlink(filepath.Join("..data", name), v.path(name)))
		}
	}
	next := filepath.Join(v.dir, "..data_tmp")
	check(os.Symlink(filepath.Base(version), next))
	check(os.Rename(next, filepath.Join(v.dir, "..data")))
}

// TestFault_103_TokenFile: rotated by a swap, missing, empty, too large, not
// readable. The certificate stays, the reason is shown.
func TestFault_103_TokenFile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newVolume(t)
		w := newWorld(t, istiod.Config{Token: "one"}, func(c *istio.Config) { c.TokenFile = v.path("token") })
		m := w.manager()
		l := w.lease(m, "web")
		if err := fails(t, l, time.Minute); !errors.Is(err, ca.ErrConfig) || !strings.Contains(err.Error(), v.path("token")) {
			t.Errorf("without a file: %v, want an error with its path", err)
		}
		if n := len(w.server.Requests()); n != 0 {
			t.Errorf("%d requests without the token", n)
		}
		v.put(map[string]string{"token": "one\n"})
		svid := get(t, l, 5*time.Minute, nil)
		w.server.SetToken("two")
		v.put(map[string]string{"token": "two"})
		svid = get(t, l, time.Hour, func(s *ca.SVID) bool { return s.Cert != svid.Cert })
		for _, tt := range []struct{ name, text, want string }{
			{"empty", "", "token file exists, but was empty"},
			{"too large", strings.Repeat("a", 100_000), "more than 65536 bytes"},
			{"two tokens", "two\ntwo", "not allowed in a header"},
		} {
			v.put(map[string]string{"token": tt.text})
			sleep(time.Until(svid.NotAfter) - 10*time.Minute) // past the renewal
			if got, err := l.SVID(t.Context()); err != nil || got.Cert != svid.Cert {
				t.Errorf("%s: %v, %v, want the last good certificate", tt.name, got, err)
			}
			if err := m.Snapshot()[0].Err; err == nil || !strings.Contains(err.Error(), tt.want) || !errors.Is(err, ca.ErrConfig) {
				t.Errorf("%s: the status says %v, want %q", tt.name, err, tt.want)
			}
			v.put(map[string]string{"token": "two"})
			svid = get(t, l, 10*time.Minute, func(s *ca.SVID) bool { return s.Cert != svid.Cert })
		}
		if err := os.Remove(v.path("token")); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(v.path("token"), 0o700); err != nil {
			t.Fatal(err)
		}
		sleep(time.Until(svid.NotAfter) + time.Second)
		if err := fails(t, l, time.Second); !strings.Contains(err.Error(), "no regular file") {
			t.Errorf("past NotAfter: %v, want the reason", err)
		}
	})
}

// TestFault_104_RootFile: missing at start, rotated, garbage, empty, gone.
func TestFault_104_RootFile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newVolume(t)
		w := newWorld(t, istiod.Config{}, func(c *istio.Config) { c.RootPEM, c.RootFile = "", v.path("root-cert.pem") })
		m := w.manager()
		l := w.lease(m, "web")
		err := fails(t, l, time.Minute)
		if want := "failed to create CSR: invalid root certificate: "; !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), v.path("root-cert.pem")) || !errors.Is(err, ca.ErrConfig) {
			t.Errorf("without a file: %v, want %q and its path", err, want)
		}
		sleep(time.Minute)
		if n := strings.Count(w.log.String(), "root certificates cannot be read"); n != 1 {
			t.Errorf("the missing file is logged %d times, want once", n)
		}
		v.put(map[string]string{"root-cert.pem": istiod.PEM(w.ca.Root())})
		svid := get(t, l, 5*time.Minute, nil)

		// The CA gets another server certificate, and we are told later.
		next := openCA(t, time.Hour)
		if err := w.server.SetServerCA(next); err != nil {
			t.Fatal(err)
		}
		w.server.DropConnections()
		sleep(time.Until(svid.NotAfter) - 10*time.Minute)
		if err := m.Snapshot()[0].Err; err == nil || !strings.Contains(err.Error(), "certificate signed by unknown authority") {
			t.Errorf("the status says %v, want that the CA is not trusted", err)
		}
		v.put(map[string]string{"root-cert.pem": istiod.PEM(next.Root())})
		svid = get(t, l, 10*time.Minute, func(s *ca.SVID) bool { return s.Cert != svid.Cert })

		for name, text := range map[string]string{"garbage": "garbage", "empty": "", "key": "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"} {
			v.put(map[string]string{"root-cert.pem": text})
			w.server.DropConnections()
			before := strings.Count(w.log.String(), "those read before stay in use")
			svid = get(t, l, time.Hour, func(s *ca.SVID) bool { return s.Cert != svid.Cert })
			if after := strings.Count(w.log.String(), "those read before stay in use"); after > before+1 {
				t.Errorf("%s: %d warnings, want one", name, after-before)
			}
		}
		if err := os.RemoveAll(v.dir); err != nil {
			t.Fatal(err)
		}
		w.server.DropConnections()
		get(t, l, time.Hour, func(s *ca.SVID) bool { return s.Cert != svid.Cert })
	})
}

// TestRootsChangeDuringRequest: a request ends on the connection on which it
// began, which is closed after it.
func TestRootsChangeDuringRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newVolume(t)
		w := newWorld(t, istiod.Config{}, func(c *istio.Config) { c.RootPEM, c.RootFile = "", v.path("root-cert.pem") })
		root := istiod.PEM(w.ca.Root())
		v.put(map[string]string{"root-cert.pem": root})
		w.server.SetReply(func(r istiod.Request) *istiod.Reply {
			if r.Identity == workload("slow").ID {
				return &istiod.Reply{Delay: 5 * time.Second, Sign: true}
			}
			return nil
		})
		m := w.manager()
		slow := w.lease(m, "slow")
		sleep(time.Second)
		v.put(map[string]string{"root-cert.pem": root + istiod.PEM(openCA(t, time.Hour).Root())})
		get(t, w.lease(m, "quick"), time.Second, nil)
		if n := w.server.Connections(); n != 2 {
			t.Errorf("%d connections while a request runs on the old one, want 2", n)
		}
		get(t, slow, 5*time.Second, nil)
		synctest.Wait()
		if n := w.server.Connections(); n != 1 {
			t.Errorf("%d connections afterwards, want 1", n)
		}
		if n := w.outcome("error"); n != 0 {
			t.Errorf("%v requests failed", n)
		}
	})
}

// TestWatchRoots: the file contributes anchors for others' SVIDs as long as the
// CA was not asked, and is watched.
func TestWatchRoots(t *testing.T) {
	for _, field := range []string{"RootFile", "Roots"} {
		t.Run(field, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				v := newVolume(t)
				w := newWorld(t, istiod.Config{}, func(c *istio.Config) {
					if field == "RootFile" {
						c.RootPEM, c.RootFile = "", v.path("roots.pem")
					} else {
						c.Roots = v.path("roots.pem")
					}
				})
				ctx, cancel := context.WithCancel(t.Context())
				var seen []*ca.Bundles
				watched := make(chan error, 1)
				go func() {
					watched <- w.provider.WatchBundles(ctx, workload("web"), func(b *ca.Bundles) { seen = append(seen, b) })
				}()
				sleep(time.Minute)
				if len(seen) != 0 {
					t.Errorf("%d reports without a file", len(seen))
				}
				a, b := catest.NewCA(t, "cluster.local"), catest.NewCA(t, "cluster.local")
				for i, text := range []string{istiod.PEM(a.Cert), istiod.PEM(a.Cert) + istiod.PEM(b.Cert), "garbage", istiod.PEM(b.Cert)} {
					v.put(map[string]string{"roots.pem": text})
					sleep(2 * time.Second)
					want := []int{1, 2, 2, 1}[i]
					if got := len(seen[len(seen)-1].Anchors(catest.TrustDomain("cluster.local"))); got != want {
						t.Errorf("step %d: %d anchors, want %d", i, got, want)
					}
				}
				if len(seen) != 3 {
					t.Errorf("%d reports, want one for each good change", len(seen))
				}
				cancel()
				if err := <-watched; !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
			})
		})
	}
}

// TestSystemRootsContributeNothing: whoever is in the system's store does not sign
// for the mesh.
func TestSystemRootsContributeNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, istiod.Config{}, func(c *istio.Config) { c.RootPEM = "" })
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		err := w.provider.WatchBundles(ctx, workload("web"), func(b *ca.Bundles) { t.Errorf("reported %v", b.Domains()) })
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	})
}

// TestRootsOverride: Roots is what counts, whatever the CA calls its root, and a
// last element that signs but is no root is presented.
func TestRootsOverride(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newVolume(t)
		root, other := catest.NewCA(t, "cluster.local"), catest.NewCA(t, "cluster.local")
		issuer := root.Intermediate(t)
		w := newWorld(t, istiod.Config{}, func(c *istio.Config) { c.Roots = v.path("roots.pem") })
		m := w.manager()
		l := w.lease(m, "web")
		w.server.SetReply(func(r istiod.Request) *istiod.Reply {
			leaf := istiod.PEM(sign(t, issuer, r.CSR.PublicKey, webID.String()))
			return &istiod.Reply{Chain: []string{leaf, istiod.PEM(issuer.Cert)}} // as if the issuer were the root
		})
		if err := fails(t, l, time.Minute); !errors.Is(err, ca.ErrConfig) || !strings.Contains(err.Error(), "trust anchors: ") {
			t.Errorf("without the file: %v", err)
		}
		v.put(map[string]string{"roots.pem": istiod.PEM(root.Cert) + istiod.PEM(other.Cert)})
		svid := get(t, l, 5*time.Minute, nil)
		if got := anchors(svid); len(got) != 2 {
			t.Errorf("%d anchors, want the two of the file", len(got))
		}
		if chain, err := svid.Chain(); err != nil || len(chain) != 2 || !chain[1].Equal(issuer.Cert) {
			t.Errorf("presented %d certificates, %v, want leaf and issuer", len(chain), err)
		}
		v.put(map[string]string{"roots.pem": istiod.PEM(other.Cert)})
		sleep(time.Until(svid.NotAfter) - time.Minute)
		if err := m.Snapshot()[0].Err; !errors.Is(err, ca.ErrRejected) || !strings.Contains(err.Error(), "R29") {
			t.Errorf("with the root gone from the file: %v, want a rejection", err)
		}
	})
}

// TestAltHostname: the certificate may have either name, and no third one.
func TestAltHostname(t *testing.T) {
	for _, tt := range []struct {
		name, address, alt string
		ok                 bool
	}{
		{"the name", "https://istiod.istio-system.svc:15012", "", true},
		{"an address", "https://127.0.0.1:15012", "", true},
		{"another name", "https://ca.example:15012", "", false},
		{"another name and the alternative", "https://ca.example:15012", "istiod.istio-system.svc", true},
		{"the name and another alternative", "https://istiod.istio-system.svc:15012", "ca.example", true},
		{"neither", "https://ca.example:15012", "else.example", false},
		{"address as the alternative", "https://ca.example:15012", "127.0.0.1", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, istiod.Config{}, func(c *istio.Config) { c.Address, c.AltHostname = tt.address, tt.alt })
				l := w.lease(w.manager(), "web")
				if tt.ok {
					get(t, l, time.Minute, nil)
				} else if err := fails(t, l, time.Minute); !strings.Contains(err.Error(), "certificate is valid for") {
					t.Errorf("got %v, want that the name is wrong", err)
				}
			})
		})
	}
	t.Run("foreign root", func(t *testing.T) { // the alternative is no way around the chain
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, istiod.Config{}, func(c *istio.Config) {
				c.RootPEM, c.AltHostname = istiod.PEM(catest.NewCA(t, "cluster.local").Cert), "istiod.istio-system.svc"
			})
			if err := fails(t, w.lease(w.manager(), "web"), time.Minute); !strings.Contains(err.Error(), "unknown authority") {
				t.Errorf("got %v, want that the CA is not trusted", err)
			}
		})
	})
}

// TestRotationOverLoopback: real time, TCP and TLS. Root, server certificate,
// signing root and token change together; the files by one swap.
func TestRotationOverLoopback(t *testing.T) {
	first := openCA(t, time.Hour)
	server, err := istiod.New(istiod.Config{CA: first, Token: "one"})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	t.Setenv("HTTPS_PROXY", "http://127.0.0.1:1") // must not be used
	v := newVolume(t)
	v.put(map[string]string{"root-cert.pem": istiod.PEM(first.Root()), "istio-token": "one"})
	p, err := istio.New(istio.Config{
		Address: "https://" + l.Addr().String(), Impersonate: true, TTL: 2 * time.Second,
		RootFile: v.path("root-cert.pem"), TokenFile: v.path("istio-token"), Logger: slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	m := catest.RunManager(t, catest.Fixed{p}, ca.ManagerConfig{Linger: -1})
	lease := m.Acquire(workload("web"))
	t.Cleanup(lease.Release)
	svid := get(t, lease, 10*time.Second, nil)
	if got := anchors(svid); !got[0].Equal(first.Root()) {
		t.Error("the anchor is not the first root")
	}

	second := openCA(t, time.Hour)
	server.SetToken("two")
	server.SetCA(second)
	if err := server.SetServerCA(second); err != nil {
		t.Fatal(err)
	}
	v.put(map[string]string{"root-cert.pem": istiod.PEM(second.Root()), "istio-token": "two"})
	server.DropConnections()
	svid = get(t, lease, 20*time.Second, func(s *ca.SVID) bool { return anchors(s)[0].Equal(second.Root()) })
	requests := server.Requests()
	if last := requests[len(requests)-1]; last.Authorization != "Bearer two" || svid.ID != webID {
		t.Errorf("the latest request came with another token; SVID %v", svid)
	}
}
