package inpod

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ztunnel-go/ztunnel/proxy"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/state"
)

// requireRoot skips without root, except where such a skip would hide that a
// test never runs.
func requireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") != "" || os.Getenv("ZTUNNEL_REQUIRE_ROOT") == "1" {
		t.Fatal("needs root, and CI or ZTUNNEL_REQUIRE_ROOT=1 forbids to skip")
	}
	t.Skip("needs root")
}

// newNamespaces makes network namespaces that end with the test.
func newNamespaces(t testing.TB, n int) (all []*os.File) {
	t.Helper()
	requireRoot(t)
	for range n {
		ns, err := newNamespace()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = ns.Close() })
		loopbackUp(t, ns)
		all = append(all, ns)
	}
	return all
}

func newNamespace() (*os.File, error) {
	runtime.LockOSThread()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, err
	}
	defer home.Close()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return nil, fmt.Errorf("unshare: %w", err)
	}
	ns, err := os.Open("/proc/thread-self/ns/net")
	if err := errors.Join(err, unix.Setns(int(home.Fd()), unix.CLONE_NEWNET)); err != nil {
		return nil, err // the thread stays locked and ends
	}
	runtime.UnlockOSThread()
	return ns, nil
}

// dup is a descriptor of its own, as the agent has one.
func dup(t testing.TB, f *os.File) *os.File {
	t.Helper()
	again, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	return again
}

// dnsAddrs and podAddrs are those of a pod's listeners: over UDP and TCP, over TCP.
var (
	dnsAddrs = []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:15053"), netip.MustParseAddrPort("[::1]:15053")}
	podAddrs = append(slices.Clip(dnsAddrs),
		netip.MustParseAddrPort("[::]:15008"), netip.MustParseAddrPort("[::]:15006"), netip.MustParseAddrPort("[::]:15001"))
)

// socketProxy has the listeners of a proxy, and serves nobody.
type socketProxy struct {
	network Namespace
	drained chan struct{}
	once    sync.Once

	mu      sync.Mutex
	bounds  []netns.Bound
	closers []io.Closer
}

func newSocketProxy(pod Pod) (Proxy, error) {
	return &socketProxy{network: pod.Network, drained: make(chan struct{})}, nil
}

func (p *socketProxy) Bind(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, addr := range podAddrs {
		b, err := p.network.Bind(ctx, addr)
		if err != nil {
			return err
		}
		p.bounds = append(p.bounds, b)
	}
	return nil
}

func (p *socketProxy) Listen(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, b := range p.bounds {
		ln, err := b.Listen(ctx)
		if err != nil {
			return err
		}
		p.closers = append(p.closers, ln)
	}
	for _, addr := range dnsAddrs {
		pc, err := p.network.ListenPacket(ctx, addr)
		if err != nil {
			return err
		}
		p.closers = append(p.closers, pc)
	}
	return nil
}

func (p *socketProxy) Run(ctx context.Context) error {
	select {
	case <-ctx.Done():
	case <-p.drained:
	}
	p.close()
	return nil
}

func (p *socketProxy) Drain() {
	p.once.Do(func() { close(p.drained) })
	p.close()
}

func (p *socketProxy) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, b := range p.bounds {
		_ = b.Close()
	}
	for _, c := range p.closers {
		_ = c.Close()
	}
}

func (p *socketProxy) Check() error                   { return nil }
func (p *socketProxy) Connections() proxy.Connections { return proxy.Connections{} }

// realWorld is a Manager over real sockets and namespaces.
type realWorld struct {
	m     *Manager
	agent *realAgent
	ready chan string
	end   func()
}

func startReal(t testing.TB, open bool) *realWorld {
	t.Helper()
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Net: "unixpacket", Name: filepath.Join(t.TempDir(), "z.sock")})
	if err != nil {
		t.Fatal(err)
	}
	w := &realWorld{ready: make(chan string, 1000)}
	w.m, err = New(Config{
		Path: ln.Addr().String(), Store: state.New(state.Config{}), New: newSocketProxy,
		Network: func(ns *os.File) (Namespace, error) {
			return netns.NewPod(ns, netns.PodConfig{Mark: 1337, PortReuse: true, IPv6Enabled: true})
		},
		Ready: func(why string) { w.ready <- why },
	})
	if err != nil {
		t.Fatal(err)
	}
	if open {
		w.m.Open()
	}
	ended := make(chan error, 1)
	go func() { ended <- w.m.Run(t.Context()) }()
	w.agent = acceptAgent(t, ln)
	w.end = func() {
		w.m.Drain()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
		_ = ln.Close()
	}
	return w
}

// awaitReady waits until the node is ready.
func (w *realWorld) awaitReady(t testing.TB) {
	t.Helper()
	late := time.After(20 * time.Second)
	for {
		select {
		case why := <-w.ready:
			if why == "" {
				return
			}
		case <-late:
			t.Fatal("not ready")
		}
	}
}

// dials tells whether a connection to a port of a namespace succeeds.
func dials(t *testing.T, ns *os.File, port uint16) bool {
	t.Helper()
	p, err := netns.NewPod(ns, netns.PodConfig{})
	if err != nil {
		t.Fatal(err)
	}
	c, err := p.Dial(t.Context(), netip.Addr{}, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port))
	if err == nil {
		_ = c.Close()
	}
	return err == nil
}

// D13 in real namespaces: ports that are taken refuse connections, all pods listen
// when the gate opens, and what is deleted leaves no descriptor and no socket.
func TestPodsInNamespaces(t *testing.T) {
	const n = 5
	all := newNamespaces(t, n)
	w := startReal(t, false)
	for i, ns := range all {
		if got := w.agent.ask(addRequest(fmt.Sprint("uid", i)), dup(t, ns)); got != "" {
			t.Errorf("add %d: %s", i, got)
		}
		if dials(t, ns, 15008) {
			t.Errorf("pod %d listens before the gate", i)
		}
	}
	if got := w.agent.ask(sentRequest()); got != "" {
		t.Errorf("snapshot: %s", got)
	}
	w.m.Open()
	w.awaitReady(t)
	for i, ns := range all {
		if !dials(t, ns, 15001) {
			t.Errorf("pod %d does not listen", i)
		}
	}
	if got := w.agent.ask(delRequest("uid0")); got != "" {
		t.Errorf("del: %s", got)
	}
	for len(w.m.Snapshot()) == n {
		runtime.Gosched()
	}
	if dials(t, all[0], 15001) {
		t.Error("a deleted pod listens")
	}
	w.end()
	if dials(t, all[1], 15001) {
		t.Error("a drained pod listens")
	}
}

// loopbackUp is ip link set lo up.
func loopbackUp(t testing.TB, ns *os.File) {
	t.Helper()
	p, err := netns.NewPod(ns, netns.PodConfig{})
	if err != nil {
		t.Fatal(err)
	}
	err = p.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		r, err := unix.NewIfreq("lo")
		if err != nil {
			return err
		}
		r.SetUint16(unix.IFF_UP)
		return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, r)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// startBound is what the start of 110 pods may cost, as a multiple of their bare
// sockets.
const startBound = 2

// BenchmarkStart is how long 110 pods take from the first message of the agent
// until the node is ready, against a loop that opens the same sockets. Rounds of
// both take turns; the ratio is that of the quickest ones, which others on the
// machine have disturbed least.
func BenchmarkStart(b *testing.B) {
	all := newNamespaces(b, 110)
	bare, managed := time.Hour, time.Hour
	for b.Loop() {
		began := time.Now()
		lns := bareListeners(b, all)
		bare = min(bare, time.Since(began))
		for _, ln := range lns {
			_ = ln.Close()
		}
		w := startReal(b, true)
		var dups []*os.File
		for _, ns := range all {
			dups = append(dups, dup(b, ns))
		}
		began = time.Now()
		for i, ns := range dups {
			if got := w.agent.ask(addRequest(fmt.Sprint("uid", i)), ns); got != "" {
				b.Fatal(got)
			}
		}
		if got := w.agent.ask(sentRequest()); got != "" {
			b.Fatal(got)
		}
		w.awaitReady(b)
		managed = min(managed, time.Since(began))
		w.end()
	}
	ratio := float64(managed) / float64(bare)
	b.ReportMetric(float64(bare.Microseconds())/1000, "bare-ms")
	b.ReportMetric(float64(managed.Microseconds())/1000, "managed-ms")
	b.ReportMetric(ratio, "ratio")
	if b.N >= 5 && ratio > startBound {
		b.Errorf("the start of %d pods takes %.1f times the time for their sockets, want %d at most", len(all), ratio, startBound)
	}
}

// bareListeners opens what the pods' proxies do, one namespace after the other.
func bareListeners(b *testing.B, namespaces []*os.File) (all []io.Closer) {
	b.Helper()
	lc := net.ListenConfig{KeepAlive: -1, Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		cerr := c.Control(func(fd uintptr) {
			err = errors.Join(
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1),
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, 1337),
				unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TRANSPARENT, 1),
			)
		})
		return errors.Join(cerr, err)
	}}
	lc.SetMultipathTCP(false)
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and the thread ends with the goroutine
		for _, ns := range namespaces {
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
				b.Error(err)
				return
			}
			for _, addr := range podAddrs {
				ln, err := lc.Listen(b.Context(), "tcp", addr.String())
				if err != nil {
					b.Error(err)
					return
				}
				all = append(all, ln)
			}
			for _, addr := range dnsAddrs {
				pc, err := lc.ListenPacket(b.Context(), "udp", addr.String())
				if err != nil {
					b.Error(err)
					return
				}
				all = append(all, pc)
			}
		}
	}()
	<-done
	return all
}
