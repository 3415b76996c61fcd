package inpod

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/state"
)

// world is a node: a Manager whose agent, namespaces and proxies are the test's.
// A file takes the place of a network namespace, whose ID is as unique.
type world struct {
	t        testing.TB
	m        *Manager
	store    *state.Store
	registry *prometheus.Registry
	log      syncBuffer
	dir      string
	cut      context.CancelCauseFunc
	ended    chan struct{} // closed when Run has returned
	err      error         // of Run

	mu         sync.Mutex
	refuse     error                                     // of the agent: nobody listens
	conns      []*fakeConn                               // all that were made
	dialled    []time.Time                               // all tries
	ready      []string                                  // all calls of Config.Ready
	namespaces map[netns.NamespaceID]*fakeNamespace      // by ID
	hostile    map[string]func(context.Context) error    // Bind of a pod, by UID
	made       map[string][]*fakeProxy                   // of a UID, in order
	holders    map[netns.NamespaceID]map[*fakeProxy]bool // who has the ports
	shared     bool                                      // ports may be had by several
}

func newWorld(t testing.TB, change ...func(*Config)) *world {
	t.Helper()
	w := &world{
		t: t, store: state.New(state.Config{}), registry: prometheus.NewRegistry(), dir: t.TempDir(), ended: make(chan struct{}),
		namespaces: map[netns.NamespaceID]*fakeNamespace{}, hostile: map[string]func(context.Context) error{},
		made: map[string][]*fakeProxy{}, holders: map[netns.NamespaceID]map[*fakeProxy]bool{},
	}
	cfg := Config{
		Path: "/var/run/ztunnel/ztunnel.sock", Store: w.store, Metrics: NewMetrics(w.registry),
		Network: w.network, New: w.newProxy, Ready: func(why string) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.ready = append(w.ready, why)
		},
		Logger: slog.New(slog.NewTextHandler(&w.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	for _, f := range change {
		f(&cfg)
	}
	m, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	m.dial = w.dial
	w.m = m
	return w
}

// syncBuffer is a log that can be read while it is written.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(b)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// run starts the Manager; the end of the test cuts it and waits.
func (w *world) run() {
	ctx, cut := context.WithCancelCause(context.Background())
	w.cut = cut
	go func() {
		defer close(w.ended)
		w.err = w.m.Run(ctx)
	}()
	w.t.Cleanup(func() {
		cut(errors.New("end of the test"))
		<-w.ended
		w.closeFiles()
	})
}

// start is run for a Manager that is open and connected.
func start(t testing.TB, change ...func(*Config)) (*world, *fakeConn) {
	t.Helper()
	w := newWorld(t, change...)
	w.m.Open()
	w.run()
	return w, w.conn()
}

// bubble runs f in one.
func bubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, f)
}

// conn is the connection that there is now. Its hello has been read.
func (w *world) conn() *fakeConn {
	w.t.Helper()
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.conns) == 0 {
		w.t.Fatal("there is no connection")
	}
	c := w.conns[len(w.conns)-1]
	if c.isClosed() {
		w.t.Fatal("the connection is closed")
	}
	if !c.greeted {
		c.greeted = true
		if b := <-c.out; !bytes.Equal(b, []byte{8, 1}) {
			c.t.Fatalf("hello: got %x, want 0801", b)
		}
		synctest.Wait()
	}
	return c
}

func (w *world) dial(ctx context.Context) (agentConn, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.dialled = append(w.dialled, time.Now())
	if w.refuse != nil {
		return nil, w.refuse
	}
	c := &fakeConn{t: w.t, in: make(chan packet), out: make(chan []byte, 1), closed: make(chan struct{}), gone: make(chan struct{})}
	w.conns = append(w.conns, c)
	return c, nil
}

func (w *world) tries() []time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]time.Time(nil), w.dialled...)
}

// pending is what Config.Ready was told last.
func (w *world) pending() string {
	w.t.Helper()
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.ready) == 0 {
		return "never told"
	}
	return w.ready[len(w.ready)-1]
}

func (w *world) wantReady(want string) {
	w.t.Helper()
	if got := w.pending(); got != want && (want == "" || !strings.Contains(got, want)) {
		w.t.Errorf("readiness: got %q, want %q", got, want)
	}
}

// ns opens the namespace of a name, as the agent does for each Add. The Manager
// has to close it.
func (w *world) ns(name string) *os.File {
	w.t.Helper()
	f, err := os.OpenFile(filepath.Join(w.dir, name), os.O_CREATE|os.O_RDONLY, 0o600)
	if err != nil {
		w.t.Fatal(err)
	}
	id, err := netns.ID(f)
	if err != nil {
		w.t.Fatal(err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.namespaces[id] == nil {
		w.namespaces[id] = &fakeNamespace{path: f.Name(), id: id}
	}
	return f
}

// namespace is what ns refers to.
func (w *world) namespace(name string) *fakeNamespace {
	w.t.Helper()
	f := w.ns(name)
	defer f.Close()
	id, err := netns.ID(f)
	if err != nil {
		w.t.Fatal(err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.namespaces[id]
}

func (w *world) network(f *os.File) (Namespace, error) {
	id, err := netns.ID(f)
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.namespaces[id], nil
}

// closeFiles fails the test if a namespace is still open.
func (w *world) closeFiles() {
	if open := openFiles(w.t, w.dir); len(open) > 0 {
		w.t.Errorf("namespaces that are still open: %v", open)
	}
}

// openFiles are the open files of this process below dir.
func openFiles(t testing.TB, dir string) (open []string) {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip("needs /proc")
	}
	for _, fd := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(to, dir+"/") {
			open = append(open, to)
		}
	}
	return open
}

// proxies are those that were made for a UID.
func (w *world) proxies(uid string) []*fakeProxy {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]*fakeProxy(nil), w.made[uid]...)
}

func (w *world) last(uid string) *fakeProxy {
	w.t.Helper()
	all := w.proxies(uid)
	if len(all) == 0 {
		w.t.Fatalf("no proxy was made for %s", uid)
	}
	return all[len(all)-1]
}

func (p *fakeProxy) isListening() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.listening
}

func (p *fakeProxy) cutBy() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cause
}

// fail makes Bind of a pod fail; nil mends it.
func (w *world) fail(uid string, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err == nil {
		delete(w.hostile, uid)
		return
	}
	w.hostile[uid] = func(context.Context) error { return err }
}

// occupy takes the ports of a namespace, as an application might.
func (w *world) occupy(name string) (free func()) {
	n := w.namespace(name)
	w.mu.Lock()
	defer w.mu.Unlock()
	p := &fakeProxy{w: w, ns: n.id}
	w.holders[n.id] = map[*fakeProxy]bool{p: true}
	return p.free
}

// states are those of the pods, "uid state" each, with the failures.
func (w *world) states() string {
	w.t.Helper()
	synctest.Wait()
	var all []string
	for _, s := range w.m.Snapshot() {
		all = append(all, s.UID+" "+string(s.State))
	}
	return strings.Join(all, ", ")
}

func (w *world) wantStates(want string) {
	w.t.Helper()
	if got := w.states(); got != want {
		w.t.Errorf("pods: got %q, want %q", got, want)
	}
}

// value is that of a metric with these label values.
func (w *world) value(name string, labels ...string) float64 {
	w.t.Helper()
	families, err := w.registry.Gather()
	if err != nil {
		w.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			var have []string
			for _, l := range m.GetLabel() {
				have = append(have, l.GetValue())
			}
			if slices.Equal(have, labels) {
				return m.GetGauge().GetValue() + m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	return 0
}

// wantCounts checks the metrics of spec/identity-admin-inpod.md §7.10.
func (w *world) wantCounts(active, pending, started, stopped int) {
	w.t.Helper()
	synctest.Wait()
	var got []int
	for _, name := range []string{"active_proxy_count", "pending_proxy_count", "proxies_started_total", "proxies_stopped_total"} {
		got = append(got, int(w.value("workload_manager_"+name)))
	}
	if diff := cmp.Diff([]int{active, pending, started, stopped}, got); diff != "" {
		w.t.Errorf("active, pending, started, stopped (-want +got):\n%s", diff)
	}
}

func mustMarshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func files(f ...*os.File) []*os.File { return f }

// tempFiles opens n files, that of a number always the same.
func tempFiles(t testing.TB, dir string, n int) (all []*os.File) {
	t.Helper()
	for i := range n {
		f, err := os.OpenFile(filepath.Join(dir, fmt.Sprint("f", i)), os.O_CREATE|os.O_RDONLY, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, f)
	}
	return all
}
