package xds_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"google.golang.org/grpc/test/bufconn"

	"github.com/ztunnel-go/ztunnel/state"
	"github.com/ztunnel-go/ztunnel/xds"
	"github.com/ztunnel-go/ztunnel/xds/securitypb"
	"github.com/ztunnel-go/ztunnel/xds/workloadpb"
	"github.com/ztunnel-go/ztunnel/xds/xdstest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is a control plane behind an in-memory network, and our client before it.
type world struct {
	t        *testing.T
	server   *xdstest.Server
	store    *state.Store
	client   *xds.Client
	registry *prometheus.Registry
	log      *logBuffer
	stop     func() // ends the client

	mu    sync.Mutex // guards what follows
	down  error
	dials []time.Time
	conns []net.Conn
}

// newWorld starts a server and a client for it, whose configuration change may
// change. Both end with the test. It is for bubbles.
func newWorld(t *testing.T, server xdstest.Config, change func(*xds.Config)) *world {
	t.Helper()
	w := &world{t: t, server: xdstest.New(server), registry: prometheus.NewRegistry(), log: new(logBuffer)}
	l := bufconn.Listen(1 << 20)
	served := make(chan error, 1)
	go func() { served <- w.server.Serve(l) }()
	cfg := xds.Config{
		Address: "unix:///run/xds.sock",
		Metrics: xds.NewMetrics(w.registry),
		Logger:  slog.New(slog.NewTextHandler(w.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Node:    xds.Node{PodName: "ztunnel-1", PodNamespace: "istio-system", NodeName: "node-1"},
		Dial:    func(ctx context.Context, _, _ string) (net.Conn, error) { return w.dial(ctx, l) },
	}
	if change != nil {
		change(&cfg)
	}
	if cfg.Store == nil {
		cfg.Store = state.New(state.Config{OnDemand: cfg.OnDemand})
	}
	w.store = cfg.Store
	var err error
	if w.client, err = xds.New(cfg); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ran := make(chan error, 1)
	w.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ran; !errors.Is(err, context.Canceled) {
			t.Errorf("Run: %v, want the cause of the context", err)
		}
	})
	go func() { ran <- w.client.Run(ctx) }()
	t.Cleanup(func() {
		w.stop()
		w.server.Stop()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
		for _, v := range w.server.Violations() {
			t.Errorf("against the protocol: %s", v)
		}
	})
	return w
}

func (w *world) dial(ctx context.Context, l *bufconn.Listener) (net.Conn, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.dials = append(w.dials, time.Now())
	if w.down != nil {
		return nil, w.down
	}
	c, err := l.DialContext(ctx)
	if err == nil {
		w.conns = append(w.conns, c)
	}
	return c, err
}

// setDown takes the control plane off the network with err, or puts it back.
func (w *world) setDown(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.down = err
	for _, c := range w.conns {
		c.Close()
	}
	w.conns = nil
}

// dialed is when connections were made, since it was called last.
func (w *world) dialed() []time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	out := w.dials
	w.dials = nil
	return out
}

// settle waits until the client has all that the server has to say.
func (w *world) settle() {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), time.Minute)
	defer cancel()
	if err := w.server.Settle(ctx); err != nil {
		w.t.Fatalf("the client has not settled: %v\n%+v", err, w.client.Status())
	}
	synctest.Wait()
}

// last is the latest request of a type that want accepts.
func (w *world) last(typeURL string, want func(xdstest.Request) bool) (xdstest.Request, bool) {
	var out xdstest.Request
	found := false
	for _, r := range w.server.Requests() {
		if r.GetTypeUrl() == typeURL && (want == nil || want(r)) {
			out, found = r, true
		}
	}
	return out, found
}

// initial is the first request of a type on the latest stream.
func (w *world) initial(typeURL string) xdstest.Request {
	w.t.Helper()
	r, ok := w.last(typeURL, func(r xdstest.Request) bool { return r.GetNode() != nil })
	if !ok {
		w.t.Fatalf("there was no first request for %s", typeURL)
	}
	return r
}

func (w *world) has(uid string) bool {
	_, ok := w.store.WorkloadByUID(uid)
	return ok
}

// status is that of one type.
func (w *world) status(typeURL string) xds.TypeStatus {
	w.t.Helper()
	for _, s := range w.client.Status().Types {
		if s.TypeURL == typeURL {
			return s
		}
	}
	w.t.Fatalf("no status of %s", typeURL)
	return xds.TypeStatus{}
}

func (w *world) synced() bool {
	select {
	case <-w.client.Synced():
		return true
	default:
		return false
	}
}

// sleep lets time pass, and everything happen that happens until then.
func sleep(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

func workload(uid, ip string) *workloadpb.Workload {
	w := &workloadpb.Workload{Uid: uid, Name: uid, Namespace: "ns", ServiceAccount: "sa", TunnelProtocol: workloadpb.TunnelProtocol_HBONE}
	if ip != "" {
		w.Addresses = [][]byte{netip.MustParseAddr(ip).AsSlice()}
	}
	return w
}

// badWorkload decodes, and is refused.
func badWorkload(uid string) xdstest.Resource {
	w := workload(uid, "")
	w.Addresses = [][]byte{{1, 2, 3}}
	return xdstest.Workload(w)
}

// denyPort is a global policy that denies a port.
func denyPort(name string, port uint32) *securitypb.Authorization {
	return &securitypb.Authorization{
		Name: name, Namespace: "istio-system", Scope: securitypb.Scope_GLOBAL, Action: securitypb.Action_DENY,
		Rules: []*securitypb.Rule{{Clauses: []*securitypb.Clause{{Matches: []*securitypb.Match{{DestinationPorts: []uint32{port}}}}}}},
	}
}

// logBuffer is a log that may be read while it is written.
type logBuffer struct {
	mu  sync.Mutex
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
