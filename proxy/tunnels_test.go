package proxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/proxy/hbone"
	"github.com/ztunnel-go/ztunnel/state"
)

const (
	meshTD   = "cluster.local"
	clientID = "spiffe://cluster.local/ns/default/sa/client"
	serverID = "spiffe://cluster.local/ns/default/sa/server"
)

// registry is the part of a proxy that keeps records of tunnels, and a file of
// revocation lists. It has no network: the tunnels only note what becomes of them.
type registry struct {
	*node
	root *catest.CA
	crls *ca.CRLs
	path string
}

func newRegistry(t testing.TB) *registry {
	t.Helper()
	r := &registry{root: catest.NewCA(t, meshTD), path: filepath.Join(t.TempDir(), "crl.pem")}
	r.crls = ca.NewCRLs(ca.CRLConfig{Path: r.path})
	reg := prometheus.NewRegistry()
	p := &Proxy{log: slog.New(slog.DiscardHandler), cfg: Config{
		CRLs: r.crls, TLS: ca.TLSOptions{Revoked: r.crls.Check}, Metrics: NewMetrics(reg, MetricsConfig{}), Store: state.New(state.Config{}),
	}}
	p.identity.cfg, p.tracker = &p.cfg, newConntrack()
	p.pool, p.inner = hbone.NewPool(hbone.PoolConfig[poolKey]{}), hbone.NewPool(hbone.PoolConfig[innerKey]{})
	running, _ := t.(*testing.T) // benchmarks read no metrics
	r.node = &node{m: &mesh{t: running}, w: &state.Workload{Name: "registry"}, proxy: p, registry: reg}
	return r
}

// fakeTunnel is a tunnel without a connection.
type fakeTunnel struct {
	cause   error
	drained bool
	end     func()
}

// handshake judges chain as a handshake would, and returns how to establish the
// tunnel afterwards.
func (r *registry) handshake(t testing.TB, reporter string, chain []*x509.Certificate) func() *fakeTunnel {
	t.Helper()
	record := r.proxy.newTunnel(reporter, r.root.SVID(t, catest.ID(serverID)))
	v, err := ca.VerifySVID(chain, record.svid.Bundles, ca.VerifyOptions{Usage: record.usage, Revoked: r.crls.Check})
	record.judged(v, err)
	if err != nil {
		t.Fatal(err)
	}
	return func() *fakeTunnel {
		f := new(fakeTunnel)
		f.end = record.established(&hbone.ConnInfo{
			TLS: tls.ConnectionState{PeerCertificates: chain}, Remote: netip.MustParseAddrPort("10.0.0.1:1"),
			Terminate: func(cause error) { f.cause = cause },
			Drain:     func() { f.drained = true },
		})
		return f
	}
}

// tunnel is an established one.
func (r *registry) tunnel(t testing.TB, chain []*x509.Certificate) *fakeTunnel {
	t.Helper()
	return r.handshake(t, reporterDestination, chain)()
}

// reload writes lists, loads them, and judges as the watch would.
func (r *registry) reload(t testing.TB, lists ...[]byte) {
	t.Helper()
	r.load(t, lists...)
	r.proxy.judgeTunnels(t.Context(), r.proxy.trust())
}

func (r *registry) load(t testing.TB, lists ...[]byte) {
	t.Helper()
	var content []byte
	for _, l := range lists {
		content = append(content, l...)
	}
	if err := os.WriteFile(r.path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := r.crls.Load(); err != nil {
		t.Fatal(err)
	}
}

func (r *registry) wantCounts(t *testing.T, revoked, untracked float64) {
	t.Helper()
	for name, want := range map[string]float64{"istio_crl_policy_rejections": revoked, "istio_crl_untracked_connections": untracked} {
		if got := r.metric(name, nil); got != want {
			t.Errorf("%s = %v, want %v", name, got, want)
		}
	}
}

// A tunnel takes no new streams once we are somebody else, also when issuer and
// bundles stay the same.
func TestOtherIdentityRetiresTunnels(t *testing.T) {
	r := newRegistry(t)
	peer, _ := r.root.Leaf(t, clientID)
	f := r.tunnel(t, peer)
	for _, c := range []struct {
		id      string
		drained bool
	}{{serverID, false}, {"spiffe://cluster.local/ns/default/sa/other", true}} {
		svid := r.root.SVID(t, catest.ID(c.id))
		r.proxy.judgeTunnels(t.Context(), trust{svid: svid})
		if f.drained != c.drained || f.cause != nil {
			t.Errorf("as %s: drained %v, ended by %v, want %v and no end", c.id, f.drained, f.cause, c.drained)
		}
	}
}

// CR-06: nothing is said before the reload; after it the chain is revoked as of
// its handshake, though by the wall clock it has expired.
func TestID_CR06_RevokedAsOfTheHandshake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRegistry(t)
		chain, _ := r.root.Leaf(t, clientID, catest.Life(time.Hour))
		f := r.tunnel(t, chain)
		r.reload(t, r.root.CRL(t, 1, nil))
		if f.cause != nil {
			t.Fatalf("ended by an empty list: %v", f.cause)
		}
		time.Sleep(2 * time.Hour)
		var verify *ca.VerifyError
		if _, err := ca.VerifySVID(chain, r.root.Bundles(ca.Strict), ca.VerifyOptions{}); !errors.As(err, &verify) {
			t.Errorf("by the wall clock: %v, want that it has expired", err)
		}
		r.reload(t, r.root.CRL(t, 2, chain[:1]))
		if !errors.Is(f.cause, ErrCertificateRevoked) {
			t.Errorf("ended by %v, want %v", f.cause, ErrCertificateRevoked)
		}
		r.wantCounts(t, 1, 0)
		r.reload(t, r.root.CRL(t, 3, chain[:1]))
		r.wantCounts(t, 1, 0) // once per tunnel
	})
}

// CR-07: from the change of the file to the end of the tunnel, at most 2 s; ours
// takes at most one (faults §A1, P3).
func TestID_CR07_ReloadEndsTunnels(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRegistry(t)
		chain, _ := r.root.Leaf(t, clientID)
		ended := make(chan struct{})
		record := r.proxy.newTunnel(reporterSource, r.root.SVID(t, catest.ID(serverID)))
		v, err := ca.VerifySVID(chain, record.svid.Bundles, ca.VerifyOptions{Usage: ca.Server})
		record.judged(v, err)
		record.established(&hbone.ConnInfo{TLS: tls.ConnectionState{PeerCertificates: chain}, Terminate: func(error) { close(ended) }})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go func() { _ = r.crls.Run(ctx) }()
		go r.proxy.watch(ctx, func(f func()) { f() })
		time.Sleep(time.Minute)
		if err := os.WriteFile(r.path, r.root.CRL(t, 1, chain[:1]), 0o600); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		<-ended
		if took := time.Since(start); took > time.Second {
			t.Errorf("ended after %v, want at most 1s", took)
		}
		if n := r.metric("istio_crl_policy_rejections", map[string]string{"reporter": "source"}); n != 1 {
			t.Errorf("counted %v, want 1", n)
		}
	})
}

// CR-09, CR-10 and CR-18: what changes between the verification and the entry
// counts; nothing else does.
func TestID_CR09_CR10_CR18_RevokedWhileRegistering(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(t *testing.T, r *registry, chain []*x509.Certificate)
		want   bool
	}{
		{"no change", func(*testing.T, *registry, []*x509.Certificate) {}, false},
		{"revoked meanwhile", func(t *testing.T, r *registry, chain []*x509.Certificate) { r.load(t, r.root.CRL(t, 1, chain[:1])) }, true},
		{"another one is revoked meanwhile", func(t *testing.T, r *registry, _ []*x509.Certificate) {
			other, _ := r.root.Leaf(t, clientID)
			r.load(t, r.root.CRL(t, 1, other[:1]))
		}, false},
		{"a list of an unrelated CA", func(t *testing.T, r *registry, chain []*x509.Certificate) {
			r.load(t, catest.NewCA(t, "other.test").CRL(t, 1, chain[:1]))
		}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRegistry(t)
			chain, _ := r.root.Leaf(t, clientID)
			establish := r.handshake(t, reporterDestination, chain)
			tt.change(t, r, chain)
			f := establish()
			if got := errors.Is(f.cause, ErrCertificateRevoked); got != tt.want {
				t.Errorf("ended by %v, want revoked %v", f.cause, tt.want)
			}
			r.wantCounts(t, map[bool]float64{true: 1}[tt.want], 0)
		})
	}
}

// CR-10 under the race detector: reloads and registrations at once lose nobody.
func TestID_CR10_Race(t *testing.T) {
	r := newRegistry(t)
	chain, _ := r.root.Leaf(t, clientID)
	ended := make(chan struct{}, 1000)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range cap(ended) {
			record := r.proxy.newTunnel(reporterDestination, r.root.SVID(t, catest.ID(serverID)))
			v, err := ca.VerifySVID(chain, record.svid.Bundles, ca.VerifyOptions{})
			record.judged(v, err)
			record.established(&hbone.ConnInfo{TLS: tls.ConnectionState{PeerCertificates: chain}, Terminate: func(error) { ended <- struct{}{} }})
		}
	}()
	r.reload(t, r.root.CRL(t, 1, nil))
	r.reload(t, r.root.CRL(t, 2, chain[:1]))
	<-done
	if len(ended) != cap(ended) {
		t.Errorf("%d of %d tunnels of a revoked peer ended", len(ended), cap(ended))
	}
}

// CR-11 and CR-15: what ends leaves nothing behind, and takes nothing from others
// under the same intermediate.
func TestID_CR11_CR15_EndedTunnelsAreForgotten(t *testing.T) {
	r := newRegistry(t)
	ia := r.root.Intermediate(t)
	first, _ := ia.Leaf(t, clientID)
	second, _ := ia.Leaf(t, clientID)
	gone, stays := r.tunnel(t, first), r.tunnel(t, second)
	gone.end()
	if n := len(r.proxy.tunnels.list()); n != 1 {
		t.Errorf("%d tunnels are known, want 1", n)
	}
	r.reload(t, r.root.CRL(t, 1, first[1:2]))
	if gone.cause != nil || !errors.Is(stays.cause, ErrCertificateRevoked) {
		t.Errorf("ended: %v and %v, want only the second", gone.cause, stays.cause)
	}
	r.wantCounts(t, 1, 0)
	stays.end()
	if n := len(r.proxy.tunnels.list()); n != 0 {
		t.Errorf("%d tunnels are known, want none", n)
	}
}

// Which tunnels a list ends: CR-08, CR-12 to CR-14, CR-16, CR-17, CR-20.
func TestID_CR08_CR20_WhoEnds(t *testing.T) {
	type world struct {
		root, ia, twin, low *catest.CA // low is below ia, twin has ia's name
		leaf                func(c *catest.CA) []*x509.Certificate
	}
	for _, tt := range []struct {
		name   string
		chains func(w world) [][]*x509.Certificate
		list   func(t *testing.T, w world, chains [][]*x509.Certificate) []byte
		want   []bool
	}{
		{"CR-08 the intermediate of a chain of two",
			func(w world) [][]*x509.Certificate { return [][]*x509.Certificate{w.leaf(w.ia)} },
			func(t *testing.T, w world, _ [][]*x509.Certificate) []byte {
				return w.root.CRL(t, 1, []*x509.Certificate{w.ia.Cert})
			},
			[]bool{true}},
		{"CR-12 the leaf is not listed, its intermediate is",
			func(w world) [][]*x509.Certificate { return [][]*x509.Certificate{w.leaf(w.ia), w.leaf(w.root)} },
			func(t *testing.T, w world, _ [][]*x509.Certificate) []byte {
				other, _ := w.root.Leaf(t, clientID)
				return w.root.CRL(t, 1, []*x509.Certificate{other[0], w.ia.Cert})
			},
			[]bool{true, false}},
		{"CR-13 a list by the intermediate",
			func(w world) [][]*x509.Certificate { return [][]*x509.Certificate{w.leaf(w.ia), w.leaf(w.ia)} },
			func(t *testing.T, w world, chains [][]*x509.Certificate) []byte { return w.ia.CRL(t, 1, chains[0][:1]) },
			[]bool{true, false}},
		{"CR-14 two intermediates of one name",
			func(w world) [][]*x509.Certificate { return [][]*x509.Certificate{w.leaf(w.ia), w.leaf(w.twin)} },
			func(t *testing.T, w world, _ [][]*x509.Certificate) []byte {
				return w.root.CRL(t, 1, []*x509.Certificate{w.ia.Cert})
			},
			[]bool{true, false}},
		{"CR-14 a list by one of two of one name",
			func(w world) [][]*x509.Certificate { return [][]*x509.Certificate{w.leaf(w.ia), w.leaf(w.twin)} },
			func(t *testing.T, w world, chains [][]*x509.Certificate) []byte {
				return w.ia.CRL(t, 1, []*x509.Certificate{chains[0][0], chains[1][0]})
			},
			[]bool{true, false}},
		{"CR-16 all leaves under one",
			func(w world) [][]*x509.Certificate {
				return [][]*x509.Certificate{w.leaf(w.ia), w.leaf(w.ia), w.leaf(w.ia)}
			},
			func(t *testing.T, w world, _ [][]*x509.Certificate) []byte {
				return w.root.CRL(t, 1, []*x509.Certificate{w.ia.Cert})
			},
			[]bool{true, true, true}},
		{"CR-17 two levels up",
			func(w world) [][]*x509.Certificate { return [][]*x509.Certificate{w.leaf(w.low)} },
			func(t *testing.T, w world, _ [][]*x509.Certificate) []byte {
				return w.root.CRL(t, 1, []*x509.Certificate{w.ia.Cert})
			},
			[]bool{true}},
		{"CR-20 a superfluous intermediate in front",
			func(w world) [][]*x509.Certificate {
				junk := w.leaf(w.ia)
				return [][]*x509.Certificate{{junk[0], w.twin.Cert, w.low.Cert, w.ia.Cert}}
			},
			func(t *testing.T, w world, _ [][]*x509.Certificate) []byte {
				return w.root.CRL(t, 1, []*x509.Certificate{w.ia.Cert})
			},
			[]bool{true}},
		{"CR-20 only the superfluous one is revoked",
			func(w world) [][]*x509.Certificate {
				return [][]*x509.Certificate{append(w.leaf(w.ia), w.twin.Cert)}
			},
			func(t *testing.T, w world, _ [][]*x509.Certificate) []byte {
				return w.root.CRL(t, 1, []*x509.Certificate{w.twin.Cert})
			},
			[]bool{false}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRegistry(t)
			w := world{root: r.root, ia: r.root.Intermediate(t), twin: r.root.Intermediate(t)}
			w.low = w.ia.Intermediate(t, func(c *x509.Certificate) { c.Subject.CommonName = "low" })
			w.leaf = func(c *catest.CA) []*x509.Certificate {
				chain, _ := c.Leaf(t, clientID)
				return chain
			}
			chains := tt.chains(w)
			var tunnels []*fakeTunnel
			for _, chain := range chains {
				tunnels = append(tunnels, r.tunnel(t, chain))
			}
			r.reload(t, tt.list(t, w, chains))
			revoked := 0.0
			for i, f := range tunnels {
				if errors.Is(f.cause, ErrCertificateRevoked) != tt.want[i] {
					t.Errorf("tunnel %d: ended by %v, want revoked %v", i, f.cause, tt.want[i])
				}
				if tt.want[i] {
					revoked++
				}
			}
			r.wantCounts(t, revoked, 0)
		})
	}
}

// CR-19 and §3.9: a tunnel that the lists cannot judge goes on, is said once, and
// is counted.
func TestID_CR19_Untracked(t *testing.T) {
	r := newRegistry(t)
	record := r.proxy.newTunnel(reporterSource, r.root.SVID(t, catest.ID(serverID)))
	var cause error
	record.established(&hbone.ConnInfo{Terminate: func(err error) { cause = err }}) // no certificate was verified
	if n := r.metric("istio_crl_untracked_connections", map[string]string{"reporter": "source"}); n != 1 || cause != nil {
		t.Errorf("counted %v, ended by %v; want 1 that goes on", n, cause)
	}
	chain, _ := r.root.Leaf(t, clientID)
	f := r.tunnel(t, chain)
	forged := r.root.CRLDER(t, 1, nil)
	forged[len(forged)-1] ^= 1
	for range 2 {
		r.reload(t, forged)
		forged[len(forged)-1] ^= 2
	}
	if f.cause != nil {
		t.Errorf("ended by a list that cannot be believed: %v", f.cause)
	}
	r.wantCounts(t, 0, 2)
	r.reload(t, r.root.CRL(t, 3, chain[:1]))
	if !errors.Is(f.cause, ErrCertificateRevoked) {
		t.Errorf("ended by %v once the list is good, want %v", f.cause, ErrCertificateRevoked)
	}
}
