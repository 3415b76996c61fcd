package istio_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	"google.golang.org/grpc/test/bufconn"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/ca/catest/istiod"
	"github.com/ztunnel-go/ztunnel/ca/istio"
	"github.com/ztunnel-go/ztunnel/ca/local"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var webID = catest.ID("spiffe://cluster.local/ns/a/sa/web")

func workload(name string) ca.WorkloadRef {
	return ca.WorkloadRef{ID: catest.ID("spiffe://cluster.local/ns/a/sa/" + name), Namespace: "a", ServiceAccount: name}
}

// world is a fake CA behind an in-memory network, and our provider before it.
type world struct {
	t        *testing.T
	ca       *local.CA
	server   *istiod.Server
	provider ca.Provider
	registry *prometheus.Registry
	log      *logBuffer

	mu    sync.Mutex // guards what follows
	down  bool
	dials int
	conns []net.Conn
}

func openCA(t *testing.T, ttl time.Duration) *local.CA {
	t.Helper()
	c, err := local.Open(local.Config{TTL: ttl})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// newWorld starts a server, and makes a provider for it, whose configuration
// change may change. The server ends with the test.
func newWorld(t *testing.T, server istiod.Config, change func(*istio.Config)) *world {
	t.Helper()
	w := &world{t: t, ca: openCA(t, time.Hour), registry: prometheus.NewRegistry(), log: new(logBuffer)}
	server.CA = w.ca
	var err error
	if w.server, err = istiod.New(server); err != nil {
		t.Fatal(err)
	}
	l := bufconn.Listen(1 << 16)
	served := make(chan error, 1)
	go func() { served <- w.server.Serve(l) }()
	t.Cleanup(func() {
		w.server.Stop()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	cfg := istio.Config{
		Address:     "https://istiod.istio-system.svc:15012",
		RootPEM:     istiod.PEM(w.ca.Root()),
		Impersonate: true,
		ClusterID:   "Kubernetes",
		TTL:         time.Hour,
		Metrics:     ca.NewMetrics(w.registry).Provider("istio"),
		Logger:      slog.New(slog.NewTextHandler(w.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return w.dial(ctx, l)
		},
	}
	if change != nil {
		change(&cfg)
	}
	if w.provider, err = istio.New(cfg); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) dial(ctx context.Context, l *bufconn.Listener) (net.Conn, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.dials++
	if w.down {
		return nil, errors.New("connection refused")
	}
	c, err := l.DialContext(ctx)
	if err == nil {
		w.conns = append(w.conns, c)
	}
	return c, err
}

// setDown takes the CA off the network, or puts it back.
func (w *world) setDown(down bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.down = down
	for _, c := range w.conns {
		c.Close()
	}
	w.conns = nil
}

// manager runs a manager over the provider until the test ends.
func (w *world) manager() *ca.Manager {
	return catest.RunManager(w.t, catest.Fixed{w.provider}, ca.ManagerConfig{Linger: -1})
}

// lease acquires a lease until the test ends.
func (w *world) lease(m *ca.Manager, name string) *ca.Lease {
	l := m.Acquire(workload(name))
	w.t.Cleanup(l.Release)
	return l
}

// requests are the times, by identity, at which the server was asked. The caller
// samples them in the server's reply function.
type requests struct {
	mu sync.Mutex // guards at
	at map[spiffeid.ID][]time.Time
}

func (r *requests) note(id spiffeid.ID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.at == nil {
		r.at = make(map[spiffeid.ID][]time.Time)
	}
	r.at[id] = append(r.at[id], time.Now())
}

func (r *requests) of(id spiffeid.ID) []time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]time.Time(nil), r.at[id]...)
}

// outcome is the counter of finished requests.
func (w *world) outcome(name string) float64 {
	w.t.Helper()
	families, err := w.registry.Gather()
	if err != nil {
		w.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != "istio_ca_requests_total" {
			continue
		}
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if l.GetName() == "outcome" && l.GetValue() == name {
					return m.GetCounter().GetValue()
				}
			}
		}
	}
	w.t.Fatalf("no counter of outcome %s", name)
	return 0
}

// logBuffer is safe for concurrent use.
type logBuffer struct {
	mu  sync.Mutex // guards buf
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// sleep lets time pass inside a bubble.
func sleep(d time.Duration) {
	timer := time.NewTimer(d)
	<-timer.C
	synctest.Wait()
}

// get waits at most d for an SVID, through errors.
func get(t *testing.T, l *ca.Lease, d time.Duration, want func(*ca.SVID) bool) *ca.SVID {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	for {
		changed := l.Changed()
		svid, err := l.SVID(ctx)
		if err == nil && (want == nil || want(svid)) {
			return svid
		}
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatalf("no such SVID within %v; last %v, %v", d, svid, err)
		}
	}
}

// fails waits at most d for an error.
func fails(t *testing.T, l *ca.Lease, d time.Duration) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	for {
		changed := l.Changed()
		svid, err := l.SVID(ctx)
		if err != nil {
			if ctx.Err() != nil {
				t.Fatalf("no answer within %v", d)
			}
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatalf("still %v after %v, want an error", svid, d)
		}
	}
}

// anchors are the certificates of the bundle for cluster.local.
func anchors(svid *ca.SVID) (certs []*x509.Certificate) {
	for _, a := range svid.Bundles.Anchors(catest.TrustDomain("cluster.local")) {
		certs = append(certs, a.Cert)
	}
	return certs
}
