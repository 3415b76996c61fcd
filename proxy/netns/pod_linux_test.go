package netns

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The first thread of a process can't end, and a test that strands threads must
// not get it: it stays with the goroutine that waits for the tests.
func init() { runtime.LockOSThread() }

// podSockets are the sockets of a pod in a namespace that is not ours, and what
// connects to them.
type podSockets struct {
	pod              *Pod
	ln               Listener
	packet           net.PacketConn
	client, accepted []Conn // over IPv4 and IPv6
}

func newPodSockets(t *testing.T, reuse bool) podSockets {
	t.Helper()
	p := newPod(t, newNamespace(t), PodConfig{Mark: 123, PortReuse: reuse, IPv6Enabled: true})
	s := podSockets{pod: p, ln: listen(t, p, netip.MustParseAddrPort("[::]:15008"))}
	var err error
	if s.packet, err = p.ListenPacket(t.Context(), netip.MustParseAddrPort("127.0.0.1:15053")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.packet.Close() })
	for _, ip := range []string{"10.1.0.1", "fd00::1"} {
		client, server := connect(t, p, netip.Addr{}, s.ln, netip.AddrPortFrom(netip.MustParseAddr(ip), 15008))
		s.client, s.accepted = append(s.client, client), append(s.accepted, server)
	}
	return s
}

func wantOption(t *testing.T, name string, sock any, option, want int) {
	t.Helper()
	if got := getInt(t, sock, unix.SOL_SOCKET, option); got != want {
		t.Errorf("%s: socket option %d is %d, want %d", name, option, got, want)
	}
}

// IP-01, X-08: the sockets that wait for others carry the mark, and so do accepted
// ones: replies must not be redirected.
func TestID_IP01_NoPortReuse(t *testing.T) { testListening(t, false) }

// IP-02, X-08: with reuse of ports, others can have them as well.
func TestID_IP02_PortReuse(t *testing.T) { testListening(t, true) }

func testListening(t *testing.T, reuse bool) {
	s := newPodSockets(t, reuse)
	want := 0
	if reuse {
		want = 1
	}
	for name, sock := range map[string]any{
		"listener": s.ln, "packet": s.packet, "accepted IPv4": s.accepted[0], "accepted IPv6": s.accepted[1],
	} {
		wantOption(t, name, sock, unix.SO_MARK, 123)
		wantOption(t, name, sock, unix.SO_REUSEPORT, want)
	}
	if s.ln.Addr().String() != "[::]:15008" || s.packet.LocalAddr().String() != "127.0.0.1:15053" {
		t.Errorf("bound to %v and %v", s.ln.Addr(), s.packet.LocalAddr())
	}
	second, err := s.pod.Listen(t.Context(), s.ln.Addr())
	packet, perr := s.pod.ListenPacket(t.Context(), netip.MustParseAddrPort("127.0.0.1:15053"))
	if !reuse {
		if !errors.Is(err, syscall.EADDRINUSE) || !errors.Is(perr, syscall.EADDRINUSE) {
			t.Errorf("a second one: got %v and %v, want %v", err, perr, syscall.EADDRINUSE)
		}
		return
	}
	if err != nil || perr != nil {
		t.Fatalf("a second one: %v, %v", err, perr)
	}
	_, _ = second.Close(), packet.Close()
}

// IP-03, X-08: outgoing sockets carry the mark and share nothing.
func TestID_IP03_OutboundSockets(t *testing.T) {
	s := newPodSockets(t, true)
	for i, family := range []string{"IPv4", "IPv6"} {
		wantOption(t, family, s.client[i], unix.SO_MARK, 123)
		wantOption(t, family, s.client[i], unix.SO_REUSEPORT, 0)
	}
	pc, err := s.pod.ListenPacket(t.Context(), netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	wantOption(t, "outgoing packets", pc, unix.SO_MARK, 123)
}

// IP-04: code runs in the pod's namespace and no thread stays there.
func TestID_IP04_DoEntersAndLeaves(t *testing.T) {
	p := newPod(t, newNamespace(t), PodConfig{})
	own, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			var inside string
			err := p.Do(func() (err error) {
				inside, err = os.Readlink("/proc/thread-self/ns/net")
				return err
			})
			if err != nil || inside == own {
				t.Errorf("inside %s, outside %s, %v", inside, own, err)
			}
		})
	}
	wg.Wait()
	for _, thread := range directory("/proc/self/task") {
		in, err := os.Readlink("/proc/self/task/" + thread + "/ns/net")
		if err == nil && in != own { // a thread may have ended
			t.Errorf("thread %s is in %s, want %s", thread, in, own)
		}
	}
	failure := errors.New("inside")
	if err := p.Do(func() error { return failure }); err != failure {
		t.Errorf("got %v, want %v", err, failure)
	}
	if _, err := NewPod(nil, PodConfig{}); err == nil {
		t.Error("a pod without a namespace")
	}
	file, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := newPod(t, file, PodConfig{}).Do(func() error { return nil }); err == nil {
		t.Error("entered something that is no namespace")
	}
}

// Visits leave no threads behind.
func TestThreadsOfVisits(t *testing.T) {
	p := newPod(t, newNamespace(t), PodConfig{IPv6Enabled: true})
	visits := func(n int) {
		for range n {
			if err := p.Do(func() error { return nil }); err != nil {
				t.Fatal(err)
			}
		}
	}
	visits(100) // after which the runtime has those that it wants
	before := len(directory("/proc/self/task"))
	visits(2000)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 100 {
				b, err := p.Bind(t.Context(), netip.MustParseAddrPort("[::]:0"))
				if err != nil {
					t.Error(err)
					return
				}
				_ = b.Close()
			}
		})
	}
	wg.Wait()
	if after := len(directory("/proc/self/task")); after > before+6 {
		t.Errorf("%d threads, %d before", after, before)
	}
}

// A thread that can't go home ends, and takes nobody with it.
func TestStrandedThreadDies(t *testing.T) {
	p := newPod(t, newNamespace(t), PodConfig{})
	if err := p.Do(func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	nowhere, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer nowhere.Close()
	home.mu.Lock()
	real := home.file
	home.file = nowhere
	home.mu.Unlock()
	stranded := make([]int, 8)
	for i := range stranded {
		if err := p.Do(func() error { stranded[i] = unix.Gettid(); return nil }); err != nil {
			t.Error(err)
		}
	}
	home.mu.Lock()
	home.file = real
	home.mu.Unlock()
	deadline := time.Now().Add(10 * time.Second)
	for _, thread := range stranded {
		for unix.Tgkill(os.Getpid(), thread, 0) == nil {
			if time.Now().After(deadline) {
				t.Fatalf("thread %d lives in the namespace of a pod", thread)
			}
			runtime.Gosched()
		}
	}
	slices.Sort(stranded)
	if len(slices.Compact(slices.Clone(stranded))) != len(stranded) {
		t.Errorf("of the threads %v some were used again", stranded)
	}
}

// Accepted sockets wait in a queue of the length that was asked for.
func TestID_IP01_Backlog(t *testing.T) {
	ns := newNamespace(t)
	for backlog, want := range map[int]uint32{0: 128, 7: 7} {
		ln := listen(t, newPod(t, ns, PodConfig{Backlog: backlog}), netip.MustParseAddrPort("0.0.0.0:0"))
		raw, err := ln.(syscall.Conn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		if err := control(raw, func(fd int) error {
			info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
			if err == nil && info.Sacked != want { // of a listener, that is sk_max_ack_backlog
				t.Errorf("backlog %d: got %d, want %d", backlog, info.Sacked, want)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
}

// Several sockets in one visit, and none of them elsewhere when the context gets
// out of it.
func TestVisit(t *testing.T) {
	p, other := newPod(t, newNamespace(t), PodConfig{IPv6Enabled: true}), newPod(t, newNamespace(t), PodConfig{IPv6Enabled: true})
	addr := netip.MustParseAddrPort("[::]:15008")
	var kept context.Context
	var lns [3]Listener
	err := p.Visit(t.Context(), func(ctx context.Context) (err error) {
		kept = ctx
		thread := unix.Gettid()
		if err := p.inside(ctx, func() error {
			if got := unix.Gettid(); got != thread {
				t.Errorf("entered again, on thread %d", got)
			}
			return nil
		}); err != nil {
			return err
		}
		if lns[0], err = p.Listen(ctx, addr); err != nil {
			return err
		}
		if lns[1], err = other.Listen(ctx, addr); err != nil { // not the namespace that we are in
			return err
		}
		done := make(chan error, 1)
		go func() { // not the thread that is there, but it gets there
			done <- p.inside(ctx, func() error {
				at, err := os.Open("/proc/thread-self/ns/net")
				if err != nil {
					return err
				}
				defer at.Close()
				in, err := ID(at)
				if want, _ := ID(p.ns); in != want || unix.Gettid() == thread {
					t.Errorf("another goroutine is in %v, want %v, on a thread of its own", in, want)
				}
				return err
			})
		}()
		return <-done
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Listen(kept, addr); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("after the visit: got %v, want %v", err, syscall.EADDRINUSE)
	}
	if lns[2], err = p.Listen(kept, netip.MustParseAddrPort("[::]:15006")); err != nil {
		t.Fatal(err)
	}
	dst := netip.MustParseAddrPort("10.1.0.1:15008")
	for _, tc := range []struct {
		p   *Pod
		ln  Listener
		dst netip.AddrPort
	}{{p, lns[0], dst}, {other, lns[1], dst}, {p, lns[2], netip.MustParseAddrPort("10.1.0.1:15006")}} {
		defer tc.ln.Close()
		connect(t, tc.p, netip.Addr{}, tc.ln, tc.dst)
	}
	if err := p.Visit(t.Context(), func(context.Context) error { return io.ErrUnexpectedEOF }); err != io.ErrUnexpectedEOF {
		t.Errorf("got %v, want %v", err, io.ErrUnexpectedEOF)
	}
}

// A Bound port of a pod becomes a listener of the pod (design D13).
func TestPodBind(t *testing.T) {
	p := newPod(t, newNamespace(t), PodConfig{Mark: testMark, PortReuse: true, IPv6Enabled: true})
	b, err := p.Bind(t.Context(), netip.MustParseAddrPort("[::]:15008"))
	if err != nil {
		t.Fatal(err)
	}
	dst := netip.MustParseAddrPort("10.1.0.1:15008")
	if _, err := p.Dial(t.Context(), netip.Addr{}, dst); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("before Listen: got %v, want %v", err, syscall.ECONNREFUSED)
	}
	ln, err := b.Listen(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	_, server := connect(t, p, netip.Addr{}, ln, dst)
	if server.Local() != dst {
		t.Errorf("got %v, want %v", server.Local(), dst)
	}
	if _, err := net.Dial("tcp", "127.0.0.1:15008"); err == nil {
		t.Error("the listener is in our own namespace")
	}
}
