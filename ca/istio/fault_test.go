package istio_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/ca/catest/istiod"
	"github.com/ztunnel-go/ztunnel/ca/istio"
)

// TestFault_096_DownAtStartAndLater: the provider starts without its CA, keeps
// what it has when the CA goes, fails closed at NotAfter, and recovers by itself.
func TestFault_096_DownAtStartAndLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, istiod.Config{}, nil)
		w.setDown(true)
		m := w.manager()
		l := w.lease(m, "web")
		err := fails(t, l, 11*time.Second)
		if want := "signing gRPC error (The service is currently unavailable): "; !strings.HasPrefix(err.Error(), want) || !strings.Contains(err.Error(), "connection refused") {
			t.Errorf("got %q, want %q and the reason", err, want)
		}
		sleep(30 * time.Minute)
		if n := w.outcome("error"); n < 10 || n > 20 {
			t.Errorf("%v requests in 30 minutes without a CA, want a dozen or so", n)
		}
		w.mu.Lock()
		dials := w.dials
		w.mu.Unlock()
		if dials > 300 {
			t.Errorf("%d attempts to connect in 30 minutes, want one in 10 s at most", dials)
		}
		w.setDown(false)
		first := get(t, l, 3*time.Minute, nil)

		w.setDown(true)
		sleep(time.Until(first.NotAfter) - time.Second)
		if svid, err := l.SVID(t.Context()); err != nil || svid.Cert != first.Cert {
			t.Errorf("a second before NotAfter: %v, %v, want the last good one", svid, err)
		}
		if s := m.Snapshot()[0]; s.State != ca.Available || s.Err == nil {
			t.Errorf("state %v with error %v, want Available with the failure of the renewal", s.State, s.Err)
		}
		sleep(2 * time.Second)
		if svid, err := l.SVID(t.Context()); err == nil {
			t.Errorf("past NotAfter: %v", svid)
		}
		w.setDown(false)
		get(t, l, 3*time.Minute, nil)
	})
}

// TestFault_097_SlowCA: a call has its deadline, and stands in nobody's way.
func TestFault_097_SlowCA(t *testing.T) {
	for _, tt := range []struct {
		name  string
		reply istiod.Reply
		took  time.Duration
		want  string
	}{
		{"hangs after the headers", istiod.Reply{Hang: true}, 10 * time.Second, "no certificate within 10s: signing gRPC error (Deadline expired before operation could complete)"},
		{"takes 30 seconds", istiod.Reply{Delay: 30 * time.Second, Sign: true}, 10 * time.Second, "no certificate within 10s: signing gRPC error (Deadline expired before operation could complete)"},
		{"closes mid-response", istiod.Reply{Break: true}, 0, "signing gRPC error (The service is currently unavailable)"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, istiod.Config{}, nil)
				w.server.SetReply(func(r istiod.Request) *istiod.Reply {
					if strings.Contains(r.Identity.Path(), "bad") {
						return &tt.reply
					}
					return nil
				})
				m := w.manager()
				start := time.Now()
				var bad, good []*ca.Lease
				for i := range 7 { // one slot is left
					bad = append(bad, w.lease(m, fmt.Sprint("bad", i)))
				}
				synctest.Wait()
				for i := range 20 {
					good = append(good, w.lease(m, fmt.Sprint("good", i)))
				}
				for _, l := range good {
					get(t, l, 5*time.Second, nil)
				}
				for _, l := range bad {
					err := fails(t, l, time.Minute)
					if !strings.HasPrefix(err.Error(), tt.want) {
						t.Errorf("got %q, want %q", err, tt.want)
					}
				}
				if took := time.Since(start); took < tt.took || took > tt.took+6*time.Second {
					t.Errorf("it took %v, want about %v", took, tt.took)
				}
				w.server.SetReply(nil)
				for _, l := range bad {
					get(t, l, 5*time.Minute, nil)
				}
			})
		})
	}
}

// mintFunc is what a CA answers to a request.
type mintFunc func(t *testing.T, authority *catest.CA, pub crypto.PublicKey) []string

func leafOf(opts ...catest.Option) mintFunc {
	return func(t *testing.T, authority *catest.CA, pub crypto.PublicKey) []string {
		return []string{istiod.PEM(sign(t, authority, pub, webID.String(), opts...)), istiod.PEM(authority.Cert)}
	}
}

// TestFault_098_BadCertificates: each is rejected and counted as such, the last
// good one stays, the retries back off, and the next good one is taken.
func TestFault_098_BadCertificates(t *testing.T) {
	const other = "spiffe://cluster.local/ns/a/sa/other"
	strange := catest.NewCA(t, "cluster.local")
	for _, tt := range []struct {
		name string
		mint mintFunc
		want string
	}{
		{"wrong SAN", leafOf(catest.URIs(other)), "did not find expected SAN: " + webID.String()},
		{"no SAN", leafOf(catest.URIs()), "did not find expected SAN: " + webID.String()},
		{"two SANs", leafOf(catest.URIs(webID.String(), other)), "did not find expected SAN: " + webID.String()},
		{"wrong key", func(t *testing.T, a *catest.CA, _ crypto.PublicKey) []string {
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				t.Error(err)
			}
			return leafOf()(t, a, key.Public())
		}, "the private key is not the key of the certificate"},
		{"expired", leafOf(catest.Between(-2*time.Hour, -time.Hour)), "expired"},
		{"not yet valid", leafOf(catest.Between(time.Hour, 2*time.Hour)), "R24"},
		{"CA certificate", leafOf(func(c *x509.Certificate) { c.IsCA = true }), "R21"},
		{"signs certificates", leafOf(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }), "R22"},
		{"empty chain", func(*testing.T, *catest.CA, crypto.PublicKey) []string { return nil }, "chain returned from CA is empty for: " + webID.String()},
		{"no root", func(t *testing.T, a *catest.CA, pub crypto.PublicKey) []string { return leafOf()(t, a, pub)[:1] }, "no root certificate present"},
		{"garbage PEM", func(*testing.T, *catest.CA, crypto.PublicKey) []string { return []string{"garbage", "garbage"} }, "failed to create CSR: certificate parse: element 0"},
		{"garbage DER", func(_ *testing.T, a *catest.CA, _ crypto.PublicKey) []string {
			return []string{"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", istiod.PEM(a.Cert)}
		}, "failed to create CSR: certificate parse: element 0"},
		{"garbage root", func(t *testing.T, a *catest.CA, pub crypto.PublicKey) []string {
			return []string{leafOf()(t, a, pub)[0], "garbage"}
		}, "failed to create CSR: invalid root certificate"},
		{"root for leaf", func(_ *testing.T, a *catest.CA, _ crypto.PublicKey) []string {
			return []string{istiod.PEM(a.Cert), istiod.PEM(a.Cert)}
		}, "did not find expected SAN"},
		{"another kind of block", func(t *testing.T, a *catest.CA, pub crypto.PublicKey) []string {
			return []string{strings.ReplaceAll(leafOf()(t, a, pub)[0], "CERTIFICATE", "PUBLIC KEY"), istiod.PEM(a.Cert)}
		}, "PUBLIC KEY"},
		{"chain not ending at the root", func(t *testing.T, a *catest.CA, pub crypto.PublicKey) []string {
			return []string{leafOf()(t, a, pub)[0], istiod.PEM(strange.Cert)}
		}, "R29"},
		{"too many certificates", func(t *testing.T, a *catest.CA, pub crypto.PublicKey) []string {
			chain := leafOf()(t, a, pub)
			for range 10 {
				chain = append(chain[:1], append([]string{istiod.PEM(a.Intermediate(t).Cert)}, chain[1:]...)...)
			}
			return chain
		}, "V15"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { badCertificate(t, tt.mint, tt.want) })
		})
	}
}

func badCertificate(t *testing.T, mint mintFunc, want string) {
	w := newWorld(t, istiod.Config{}, nil)
	m := w.manager()
	l := w.lease(m, "web")
	first := get(t, l, time.Minute, nil)
	authority := catest.NewCA(t, "cluster.local")
	var asked requests
	w.server.SetReply(func(r istiod.Request) *istiod.Reply {
		asked.note(webID)
		return &istiod.Reply{Chain: mint(t, authority, r.CSR.PublicKey)}
	})
	sleep(50 * time.Minute) // past the renewal, before NotAfter
	if svid, err := l.SVID(t.Context()); err != nil || svid.Cert != first.Cert {
		t.Errorf("got %v, %v, want the last good one", svid, err)
	}
	s := m.Snapshot()[0]
	if s.State != ca.Available || !errors.Is(s.Err, ca.ErrRejected) || !strings.Contains(s.Err.Error(), want) {
		t.Errorf("state %v with error %v, want Available with a rejection that says %q", s.State, s.Err, want)
	}
	at := asked.of(webID)
	if len(at) < 5 || len(at) > 20 || w.outcome("rejected") != float64(len(at)) {
		t.Errorf("%d requests, %v counted as rejected, want all of a dozen or so", len(at), w.outcome("rejected"))
	}
	if gap := at[len(at)-1].Sub(at[len(at)-2]); gap < 100*time.Second {
		t.Errorf("%v between the last two requests, want them to back off", gap)
	}
	sleep(15 * time.Minute)
	if err := fails(t, l, time.Second); !strings.Contains(err.Error(), want) {
		t.Errorf("past NotAfter: %v, want the reason", err)
	}
	w.server.SetReply(nil)
	get(t, l, 3*time.Minute, nil)
}

// TestFault_099_Lives: renewal follows the life that the CA grants, between a floor
// and a ceiling.
func TestFault_099_Lives(t *testing.T) {
	for _, tt := range []struct {
		name     string
		life     time.Duration
		watch    time.Duration
		from, to int // requests within watch
	}{
		{"30 seconds", 30 * time.Second, 10 * time.Minute, 33, 45},
		{"one day", 24 * time.Hour, 3 * 24 * time.Hour, 5, 8},
		{"ten years", 3650 * 24 * time.Hour, 21 * 24 * time.Hour, 3, 4},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				authority := catest.NewCA(t, "cluster.local", catest.Between(-time.Hour, 20*365*24*time.Hour))
				w := newWorld(t, istiod.Config{}, nil)
				w.server.SetReply(func(r istiod.Request) *istiod.Reply {
					return &istiod.Reply{Chain: leafOf(catest.Between(0, tt.life))(t, authority, r.CSR.PublicKey)}
				})
				l := w.lease(w.manager(), "web")
				get(t, l, time.Minute, nil)
				end := time.Now().Add(tt.watch)
				for time.Now().Before(end) {
					sleep(tt.watch / 500)
					if svid, err := l.SVID(t.Context()); err != nil || !time.Now().Before(svid.NotAfter) {
						t.Fatalf("got %v, %v, want a valid certificate at all times", svid, err)
					}
				}
				if n := len(w.server.Requests()); n < tt.from || n > tt.to {
					t.Errorf("%d requests in %v, want %d to %d", n, tt.watch, tt.from, tt.to)
				}
			})
		})
	}
}

// TestFault_100_Denied: the cause is shown, the retries are slow, and other pods
// are not affected.
func TestFault_100_Denied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, istiod.Config{Token: "jwt"}, func(c *istio.Config) { c.Token = "jwt" })
		w.server.SetPods(workload("good").ID)
		m := w.manager()
		bad, good := w.lease(m, "bad"), w.lease(m, "good")
		start := time.Now()
		get(t, good, time.Second, nil)
		err := fails(t, bad, time.Second)
		if !errors.Is(err, ca.ErrDenied) {
			t.Errorf("got %v, want a denial", err)
		}
		var text string
		for _, s := range m.Snapshot() {
			if s.ID == workload("bad").ID {
				text = s.Text
			}
		}
		for _, part := range []string{"Unavailable: signing gRPC error (", "request impersonation authentication failure", "CA_TRUSTED_NODE_ACCOUNTS"} {
			if !strings.Contains(text, part) {
				t.Errorf("the status %q does not say %q", text, part)
			}
		}
		sleep(time.Second)
		if n := w.outcome("denied"); n != 1 {
			t.Errorf("%v requests were denied within 1 s, want one", n)
		}
		sleep(time.Minute)
		if n := w.outcome("denied"); n < 3 || n > 5 {
			t.Errorf("%v requests were denied within a minute, want 4", n)
		}
		w.server.SetPods()
		get(t, bad, 3*time.Minute, nil)
		if svid := get(t, good, 0, nil); svid.NotBefore.After(start) {
			t.Error("the good one was asked for again")
		}
	})
}

// TestNoEndpoints: Cilium's agent does not know the pod yet. It will in a moment.
func TestNoEndpoints(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, istiod.Config{Personality: istiod.Cilium}, nil)
		w.server.SetPods(workload("other").ID)
		l := w.lease(w.manager(), "web")
		if err := fails(t, l, time.Second); errors.Is(err, ca.ErrDenied) || !strings.Contains(err.Error(), "no endpoints found for service account") {
			t.Errorf("got %v, want no denial", err)
		}
		w.server.SetPods()
		svid := get(t, l, 2*time.Second, nil)
		leaf := svid.Cert.Leaf
		if life := time.Until(leaf.NotAfter).Round(time.Hour); life != 30*24*time.Hour || leaf.KeyUsage != 0 || leaf.SignatureAlgorithm != x509.SHA256WithRSA {
			t.Errorf("leaf of %v with key usage %v by %v, want Cilium's", life, leaf.KeyUsage, leaf.SignatureAlgorithm)
		}
	})
}

// TestFault_102_PodsComeAndGo: ten times a second, for a minute.
func TestFault_102_PodsComeAndGo(t *testing.T) {
	for _, tt := range []struct {
		name   string
		linger time.Duration
		most   int // requests
	}{{"with linger", 0, 1}, {"without", -1, 600}} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, istiod.Config{}, nil)
				m := catest.RunManager(t, catest.Fixed{w.provider}, ca.ManagerConfig{Linger: tt.linger})
				for range 600 {
					l := m.Acquire(workload("web"))
					get(t, l, time.Second, nil)
					sleep(50 * time.Millisecond)
					l.Release()
					sleep(50 * time.Millisecond)
				}
				if n := len(w.server.Requests()); n > tt.most {
					t.Errorf("%d requests, want %d at most", n, tt.most)
				}
				sleep(5*time.Minute + time.Second)
				if s := m.Snapshot(); len(s) != 0 {
					t.Errorf("%d certificates are held after the last pod left", len(s))
				}
				n := len(w.server.Requests())
				sleep(24 * time.Hour)
				if got := len(w.server.Requests()); got != n {
					t.Errorf("%d requests a day after the last pod left", got-n)
				}
			})
		})
	}
}

// TestFault_106_OtherRootThanBootstrap: the file by which the CA is judged is the
// anchor until the first answer; then the answer's alone. The two are never
// joined: an operator who wants both lists both in Roots.
func TestFault_106_OtherRootThanBootstrap(t *testing.T) {
	for _, tt := range []struct {
		name        string
		personality istiod.Personality
		same        bool
	}{{"istiod: the same root", istiod.Istiod, true}, {"istio-csr: another root", istiod.IstioCSR, false}} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, istiod.Config{Personality: tt.personality}, nil)
				bootstrap := w.ca.Root()
				if !tt.same {
					w.server.SetCA(openCA(t, time.Hour))
				}
				var seen []*ca.Bundles
				ctx, cancel := context.WithCancel(t.Context())
				watched := make(chan error, 1)
				go func() {
					watched <- w.provider.WatchBundles(ctx, workload("web"), func(b *ca.Bundles) { seen = append(seen, b) })
				}()
				sleep(time.Minute)
				svid := get(t, w.lease(w.manager(), "web"), time.Minute, nil)
				sleep(time.Second)
				cancel()
				<-watched
				if got := anchors(svid); len(got) != 1 || !got[0].Equal(w.server.Root()) {
					t.Errorf("%d anchors of the SVID, want the answer's root alone", len(got))
				}
				if len(seen) != 2 || !seen[0].Anchors(svid.ID.TrustDomain())[0].Cert.Equal(bootstrap) || !seen[1].Equal(svid.Bundles) {
					t.Errorf("%d reports, want the bootstrap root, then the answer's", len(seen))
				}
			})
		})
	}
}

// TestCanceledWhileFetching: the provider ends while the CA hangs.
func TestCanceledWhileFetching(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, istiod.Config{}, nil)
		w.server.SetReply(func(istiod.Request) *istiod.Reply { return &istiod.Reply{Hang: true} })
		ctx, cancel := context.WithCancel(t.Context())
		ran := make(chan error, 1)
		go func() { ran <- w.provider.Run(ctx) }()
		go func() { ran <- w.provider.Watch(ctx, workload("web"), func(ca.Event) {}) }()
		sleep(time.Second)
		start := time.Now()
		cancel()
		<-ran
		<-ran
		if took := time.Since(start); took > time.Second {
			t.Errorf("Run returned after %v", took)
		}
		if n := w.outcome("error") + w.outcome("timeout"); n != 0 {
			t.Errorf("%v failures were counted, the end of Run is none", n)
		}
	})
}

// TestErrorsKeepTheServersText is about a message with every kind of character.
func TestErrorsKeepTheServersText(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, istiod.Config{}, nil)
		w.server.SetReply(func(istiod.Request) *istiod.Reply {
			return &istiod.Reply{Err: status.Error(codes.Internal, "50% of \"x\"\n%!d(string=é)")}
		})
		err := fails(t, w.lease(w.manager(), "web"), time.Minute)
		if want := "signing gRPC error (Internal error): 50% of \"x\"\n%!d(string=é)"; err.Error() != want {
			t.Errorf("got %q, want %q", err, want)
		}
	})
}
