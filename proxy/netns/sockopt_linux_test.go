package netns

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func getInt(t testing.TB, c any, level, name int) int {
	t.Helper()
	raw, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var v int
	if err := control(raw, func(fd int) (err error) {
		v, err = unix.GetsockoptInt(fd, level, name)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return v
}

// every listener's connections have keepalive and user timeout, 15008's too.
func TestDP_X04_KeepaliveOptions(t *testing.T) {
	k := Keepalive{Enabled: true, Time: 17 * time.Second, Interval: 7 * time.Second, Retries: 3}
	for _, tc := range []struct {
		name string
		cfg  HostConfig
		want map[[2]int]int
	}{
		{"set", HostConfig{Keepalive: k, UserTimeout: 38 * time.Second}, map[[2]int]int{
			{unix.SOL_SOCKET, unix.SO_KEEPALIVE}:      1,
			{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE}:     17,
			{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL}:    7,
			{unix.IPPROTO_TCP, unix.TCP_KEEPCNT}:      3,
			{unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT}: 38_000,
			{unix.IPPROTO_TCP, unix.TCP_NODELAY}:      1,
			{unix.SOL_SOCKET, unix.SO_PROTOCOL}:       unix.IPPROTO_TCP, // not MPTCP
		}},
		{"default", HostConfig{Keepalive: DefaultKeepalive()}, map[[2]int]int{
			{unix.SOL_SOCKET, unix.SO_KEEPALIVE}:      1,
			{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE}:     180,
			{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL}:    180,
			{unix.IPPROTO_TCP, unix.TCP_KEEPCNT}:      9,
			{unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT}: 0,
		}},
		{"off", HostConfig{Keepalive: Keepalive{Time: time.Second}}, map[[2]int]int{
			{unix.SOL_SOCKET, unix.SO_KEEPALIVE}: 0,
			{unix.IPPROTO_TCP, unix.TCP_NODELAY}: 1,
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.cfg.OriginalSource = OriginalSourceOff
			n := NewHost(tc.cfg)
			ln := listen(t, n, localhost)
			client, server := connect(t, n, netip.Addr{}, ln, ln.Addr())
			for opt, want := range tc.want {
				for name, c := range map[string]Conn{"dialled": client, "accepted": server} {
					if got := getInt(t, c, opt[0], opt[1]); got != want {
						t.Errorf("%s: option %d/%d: got %d, want %d", name, opt[0], opt[1], got, want)
					}
				}
			}
		})
	}
}

// X-08, the half that needs no root: dedicated listeners share no port.
func TestDP_X08_DedicatedListenersShareNoPort(t *testing.T) {
	n := NewHost(HostConfig{OriginalSource: OriginalSourceOff})
	ln := listen(t, n, localhost)
	client, _ := connect(t, n, netip.Addr{}, ln, ln.Addr())
	pc, err := n.ListenPacket(t.Context(), localhost)
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	for name, c := range map[string]any{"listener": ln, "dialled": client, "packet": pc} {
		if got := getInt(t, c, unix.SOL_SOCKET, unix.SO_REUSEPORT); got != 0 {
			t.Errorf("%s: SO_REUSEPORT is %d, want 0", name, got)
		}
	}
	if got := getInt(t, ln, unix.SOL_SOCKET, unix.SO_REUSEADDR); got != 1 {
		t.Errorf("SO_REUSEADDR is %d, want 1", got)
	}
}

// A bound socket has its port and takes no connection (design D13).
func TestBoundDoesNotListen(t *testing.T) {
	n := NewHost(HostConfig{OriginalSource: OriginalSourceOff})
	b, err := n.Bind(t.Context(), localhost)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.Dial(t.Context(), netip.Addr{}, b.Addr()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("before Listen: got %v, want %v", err, syscall.ECONNREFUSED)
	}
	ln, err := b.Listen(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	if ln.Addr() != b.Addr() {
		t.Errorf("got %v, want %v", ln.Addr(), b.Addr())
	}
	if _, err := n.Bind(t.Context(), ln.Addr()); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("bind to a port in use: got %v, want %v", err, syscall.EADDRINUSE)
	}
	connect(t, n, netip.Addr{}, ln, ln.Addr())
	if _, err := b.Listen(t.Context()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("second Listen: got %v, want %v", err, net.ErrClosed)
	}
	if err := b.Close(); err != nil {
		t.Errorf("Close after Listen: %v", err)
	}
	if !ln.(Checker).Listening() {
		t.Error("says that it doesn't listen")
	}
	_ = ln.(DeadlineSetter).SetDeadline(time.Now())
	if _, err := ln.Accept(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("got %v, want %v", err, os.ErrDeadlineExceeded)
	}
	// Whoever may administer the namespace destroys sockets without a word.
	raw, err := ln.(syscall.Conn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := control(raw, func(fd int) error { return unix.Shutdown(fd, unix.SHUT_RDWR) }); err != nil {
		t.Fatal(err)
	}
	if ln.(Checker).Listening() {
		t.Error("says that it listens, shut down")
	}
}

// A Listen that fails holds nothing, and leaves nobody in a queue that is not
// served.
func TestBoundListenFails(t *testing.T) {
	n := NewHost(HostConfig{OriginalSource: OriginalSourceOff})
	cause := errors.New("gone")
	ended, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	setLimit := func(n uint64) {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: n, Max: limit.Max}); err != nil {
			t.Fatal(err)
		}
	}
	for want, listen := range map[error]func(Bound) (Listener, error){
		cause: func(b Bound) (Listener, error) { return b.Listen(ended) },
		syscall.EMFILE: func(b Bound) (Listener, error) {
			setLimit(3)
			defer setLimit(limit.Cur)
			return b.Listen(t.Context())
		},
	} {
		b, err := n.Bind(t.Context(), localhost)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := listen(b); !errors.Is(err, want) {
			t.Errorf("got %v, want %v", err, want)
		}
		if _, err := b.Listen(t.Context()); !errors.Is(err, net.ErrClosed) {
			t.Errorf("second Listen: got %v, want %v", err, net.ErrClosed)
		}
		again, err := n.Bind(t.Context(), b.Addr())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := n.Dial(t.Context(), netip.Addr{}, b.Addr()); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("got %v, want %v", err, syscall.ECONNREFUSED)
		}
		_ = again.Close()
	}
}

func TestBacklogDefault(t *testing.T) {
	for cfg, want := range map[int]int{0: DefaultBacklog, 7: 7} {
		if got := NewHost(HostConfig{Backlog: cfg}).opt.backlog; got != want {
			t.Errorf("%d: got %d, want %d", cfg, got, want)
		}
	}
}

func TestTryWriteDoesNotAllocate(t *testing.T) {
	client, server := hostPair(t)
	p, buf := make([]byte, 64), make([]byte, 64)
	if got := testing.AllocsPerRun(100, func() {
		n, err := client.TryWrite(p)
		if n != len(p) || err != nil {
			t.Fatalf("got %d, %v", n, err)
		}
		if _, err := server.Read(buf); err != nil {
			t.Fatal(err)
		}
	}); got != 0 {
		t.Errorf("%v allocations, want 0", got)
	}
}

// The engine waits for readability without holding a buffer.
func TestConnSyscallConn(t *testing.T) {
	client, server := hostPair(t)
	sc, ok := server.(syscall.Conn)
	if !ok {
		t.Fatalf("%T is no syscall.Conn", server)
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	ready := make(chan error, 1)
	go func() {
		ready <- raw.Read(func(fd uintptr) bool {
			var b [1]byte
			_, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK)
			return err != unix.EAGAIN
		})
	}()
	if _, err := client.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
	if n, err := server.Read(make([]byte, 8)); n != 1 || err != nil {
		t.Errorf("got %d, %v", n, err)
	}
}
