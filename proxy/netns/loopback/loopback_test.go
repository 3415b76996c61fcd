package loopback

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	ipA = netip.MustParseAddr("10.0.0.1")
	ipB = netip.MustParseAddr("10.0.0.2")
	b80 = netip.MustParseAddrPort("10.0.0.2:80")
)

func listen(t *testing.T, n netns.Network, addr string) netns.Listener {
	t.Helper()
	ln, err := n.Listen(t.Context(), netip.MustParseAddrPort(addr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return ln
}

func TestRedirection(t *testing.T) {
	f := New()
	a, b := f.Host(ipA), f.Host(ipB)
	a.Capture(true)
	b.Capture(true)
	lns := map[string]netns.Listener{
		"a outbound":  listen(t, a.Proxy(), "[::]:15001"),
		"b outbound":  listen(t, b.Proxy(), "[::]:15001"),
		"b plaintext": listen(t, b.Proxy(), "[::]:15006"),
		"b hbone":     listen(t, b.Proxy(), "[::]:15008"),
		"b app":       listen(t, b.App(), "0.0.0.0:80"),
		"b local":     listen(t, b.App(), "127.0.0.1:81"),
	}
	for _, tc := range []struct {
		name          string
		from          netns.Network
		src           netip.Addr
		dst           string
		want          string
		remote, local string
	}{
		{"application is captured", a.App(), netip.Addr{}, "10.0.0.2:80", "a outbound", "10.0.0.1", "127.0.0.1:15001"},
		{"so is what nobody has", a.App(), netip.Addr{}, "240.0.0.1:80", "a outbound", "10.0.0.1", "127.0.0.1:15001"},
		{"proxy to captured host", a.Proxy(), netip.Addr{}, "10.0.0.2:80", "b plaintext", "10.0.0.1", "10.0.0.2:15006"},
		{"proxy to HBONE port", a.Proxy(), netip.Addr{}, "10.0.0.2:15008", "b hbone", "10.0.0.1", "10.0.0.2:15008"},
		{"proxy to its application, original source", b.Proxy(), ipA, "10.0.0.2:80", "b app", "10.0.0.1", "10.0.0.2:80"},
		{"application to itself", b.App(), netip.Addr{}, "10.0.0.2:80", "b app", "10.0.0.2", "10.0.0.2:80"},
		{"loopback", b.App(), netip.Addr{}, "127.0.0.1:81", "b local", "127.0.0.1", "127.0.0.1:81"},
		{"mapped address", b.Proxy(), ipA, "[::ffff:10.0.0.2]:80", "b app", "10.0.0.1", "10.0.0.2:80"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dst := netip.MustParseAddrPort(tc.dst)
			client, err := tc.from.Dial(t.Context(), tc.src, dst)
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			server, err := lns[tc.want].Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer server.Close()
			dst = netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())
			if orig, err := server.OriginalDst(); err != nil || orig != dst {
				t.Errorf("original destination: got %v, %v, want %v", orig, err, dst)
			}
			if got := server.Local().String(); got != tc.local {
				t.Errorf("local: got %v, want %v", got, tc.local)
			}
			if got := server.Remote(); got.Addr().String() != tc.remote || got != client.Local() {
				t.Errorf("remote: got %v and %v, want %v", got, client.Local(), tc.remote)
			}
			if client.Remote() != dst || client.RemoteAddr().String() != dst.String() || server.RemoteAddr().String() != client.LocalAddr().String() {
				t.Errorf("got %v, %v, %v", client.Remote(), client.RemoteAddr(), server.RemoteAddr())
			}
		})
	}
	for _, ln := range lns {
		if n := len(ln.(*listener).dials); n != 0 {
			t.Errorf("%v: %d connections not forgotten", ln.Addr(), n)
		}
	}
}

func TestErrors(t *testing.T) {
	f := New()
	a, b := f.Host(ipA), f.Host(ipB)
	ln := listen(t, b.Proxy(), "[::]:80")
	for addr, want := range map[string]error{
		"0.0.0.0:80": syscall.EADDRINUSE, "10.0.0.2:80": syscall.EADDRINUSE, "10.0.0.1:80": syscall.EADDRNOTAVAIL,
	} {
		_, err := b.App().Listen(t.Context(), netip.MustParseAddrPort(addr))
		if !errors.Is(err, want) || !strings.HasPrefix(err.Error(), "failed to bind to address "+addr+": ") {
			t.Errorf("%s: got %v, want %v", addr, err, want)
		}
	}
	for dst, want := range map[string]error{"10.0.0.2:81": syscall.ECONNREFUSED, "10.0.0.9:80": syscall.EHOSTUNREACH, "127.0.0.1:80": syscall.ECONNREFUSED} {
		if _, err := a.Proxy().Dial(t.Context(), netip.Addr{}, netip.MustParseAddrPort(dst)); !errors.Is(err, want) {
			t.Errorf("%s: got %v, want %v", dst, err, want)
		}
	}
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := ln.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v, want %v", err, net.ErrClosed)
	}
	if _, err := a.Proxy().Dial(t.Context(), netip.Addr{}, b80); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("after Close: got %v, want %v", err, syscall.ECONNREFUSED)
	}
	listen(t, b.Proxy(), "[::]:80")
}

// A port that is held takes no connection, and nobody else gets it (design D13).
func TestBind(t *testing.T) {
	f := New()
	a, b := f.Host(ipA).Proxy(), f.Host(ipB).Proxy()
	any80 := netip.MustParseAddrPort("[::]:80")
	held, err := b.Bind(t.Context(), any80)
	if err != nil {
		t.Fatal(err)
	}
	if held.Addr() != any80 {
		t.Errorf("got %v, want %v", held.Addr(), any80)
	}
	if _, err := a.Dial(t.Context(), netip.Addr{}, b80); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("before Listen: got %v, want %v", err, syscall.ECONNREFUSED)
	}
	if _, err := b.Bind(t.Context(), any80); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("a second holder: got %v, want %v", err, syscall.EADDRINUSE)
	}
	ln, err := held.Listen(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if _, err := held.Listen(t.Context()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("second Listen: got %v, want %v", err, net.ErrClosed)
	}
	if err := held.Close(); err != nil {
		t.Errorf("Close after Listen: %v", err)
	}
	client, err := a.Dial(t.Context(), netip.Addr{}, b80)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	server, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	_ = ln.(netns.DeadlineSetter).SetDeadline(time.Now())
	if _, err := ln.Accept(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("got %v, want %v", err, os.ErrDeadlineExceeded)
	}
	if !ln.(netns.Checker).Listening() {
		t.Error("says that it doesn't listen")
	}
	ln.Close()
	if ln.(netns.Checker).Listening() {
		t.Error("says that it listens, closed")
	}
}

// A port that is not held any more is free.
func TestBoundGivesUp(t *testing.T) {
	b := New().Host(ipB).Proxy()
	any80 := netip.MustParseAddrPort("[::]:80")
	again, err := b.Bind(t.Context(), any80)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(again.Close(), again.Close()); err != nil {
		t.Error(err)
	}
	if _, err := again.Listen(t.Context()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Listen after Close: got %v, want %v", err, net.ErrClosed)
	}
	held, err := b.Bind(t.Context(), any80)
	if err != nil {
		t.Fatal(err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := held.Listen(ended); !errors.Is(err, context.Canceled) {
		t.Errorf("Listen too late: got %v, want %v", err, context.Canceled)
	}
	listen(t, b, "[::]:80")
}

// A program of the machine that happens to connect is not let in.
func TestStrangersAreClosed(t *testing.T) {
	f := New()
	b := f.Host(ipB)
	ln := listen(t, b.Proxy(), "[::]:80")
	stranger, err := net.Dial("tcp4", b.listeners[netip.MustParseAddrPort("[::]:80")].at.String())
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	client, err := f.Host(ipA).App().Dial(t.Context(), netip.Addr{}, b80)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	server, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	if server.Remote() != client.Local() {
		t.Errorf("got %v, want %v", server.Remote(), client.Local())
	}
	_ = stranger.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := stranger.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("got %v, want %v", err, io.EOF)
	}
}

// What is known of a connection that nobody accepts goes with its listener.
func TestUnacceptedIsDropped(t *testing.T) {
	f := New()
	a, b := f.Host(ipA), f.Host(ipB)
	ln := listen(t, b.App(), "0.0.0.0:80").(*listener)
	client, err := a.App().Dial(t.Context(), netip.Addr{}, b80)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	from := netip.AddrPortFrom(realIP, client.Local().Port())
	waiting := ln.dials
	if waiting[from] == nil {
		t.Fatalf("the listener does not expect %v: %v", from, waiting)
	}
	late := &flow{}
	ln.forget(from, late)
	if waiting[from] == nil {
		t.Error("another dial has taken back the announcement")
	}
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	if err := ln.announce(from, late); !errors.Is(err, syscall.ECONNREFUSED) || len(ln.dials) != 0 {
		t.Errorf("a dial that is late: %v, %d expected", err, len(ln.dials))
	}
	if got := ln.take(from); got != nil {
		t.Errorf("after Close a connection from %v is taken for %v", from, got.src)
	}
	// Another listener knows nothing of it, and is not harmed by a second Close.
	again := listen(t, b.App(), "0.0.0.0:80").(*listener)
	if got := again.take(from); got != nil {
		t.Errorf("the next listener takes %v for %v", from, got.src)
	}
	if err := ln.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("second Close: %v", err)
	}
	if b.listeners[netip.MustParseAddrPort("0.0.0.0:80")] != again {
		t.Error("the second Close has removed the next listener")
	}
}

// What a client sent before it closed is there for who accepts later.
func TestClosedBeforeAccept(t *testing.T) {
	f := New()
	ln := listen(t, f.Host(ipB).App(), "0.0.0.0:80")
	client, err := f.Host(ipA).App().Dial(t.Context(), netip.Addr{}, b80)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Write([]byte("last words")); err != nil {
		t.Fatal(err)
	}
	if err := client.Close(); err != nil {
		t.Fatal(err)
	}
	server, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	if got, err := io.ReadAll(server); string(got) != "last words" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
}

// Many at once: each side must find the other, and splice must carry the bytes.
func TestConcurrentDials(t *testing.T) {
	f := New()
	ln := listen(t, f.Host(ipB).App(), "0.0.0.0:80")
	const conns, size = 50, 256 << 10
	var wg sync.WaitGroup
	for range conns {
		wg.Go(func() {
			c, err := f.Host(ipA).App().Dial(t.Context(), netip.Addr{}, b80)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			wg.Go(func() { _, _ = c.Write(make([]byte, size)); _ = c.CloseWrite() })
			if n, err := io.Copy(io.Discard, c); n != size || err != nil {
				t.Errorf("echoed %d, %v, want %d", n, err, size)
			}
		})
		wg.Go(func() {
			c, err := ln.Accept()
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			if n, err := io.Copy(c, &io.LimitedReader{R: c, N: size}); n != size || err != nil {
				t.Errorf("copied %d, %v, want %d", n, err, size)
			}
		})
	}
	wg.Wait()
}

func TestConnIsPollable(t *testing.T) {
	f := New()
	ln := listen(t, f.Host(ipB).App(), "0.0.0.0:80")
	c, err := f.Host(ipA).App().Dial(t.Context(), netip.Addr{}, b80)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	raw, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	called := false
	if err := raw.Control(func(uintptr) { called = true }); err != nil || !called {
		t.Errorf("got %v, called %v", err, called)
	}
	_ = ln.Close() // not accepted: reset
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("got %v, want %v", err, syscall.ECONNRESET)
	}
}

func TestPackets(t *testing.T) {
	f := New()
	server, err := f.Host(ipB).Proxy().ListenPacket(t.Context(), netip.MustParseAddrPort("[::]:53"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Host(ipB).Proxy().ListenPacket(t.Context(), netip.MustParseAddrPort("127.0.0.1:53")); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("got %v, want %v", err, syscall.EADDRINUSE)
	}
	client, err := f.Host(ipA).App().ListenPacket(t.Context(), netip.MustParseAddrPort("0.0.0.0:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	deadline := time.Now().Add(10 * time.Second)
	_, _ = client.SetDeadline(deadline), server.SetDeadline(deadline)
	buf := make([]byte, 16)
	if _, err := client.WriteTo([]byte("query"), &net.UDPAddr{IP: ipB.AsSlice(), Port: 53}); err != nil {
		t.Fatal(err)
	}
	n, from, err := server.ReadFrom(buf)
	if err != nil || string(buf[:n]) != "query" || !strings.HasPrefix(from.String(), "10.0.0.1:") {
		t.Fatalf("got %q from %v, %v", buf[:n], from, err)
	}
	if _, err := server.WriteTo([]byte("answer"), from); err != nil {
		t.Fatal(err)
	}
	if n, from, err = client.ReadFrom(buf); err != nil || string(buf[:n]) != "answer" || from.String() != "10.0.0.2:53" {
		t.Errorf("got %q from %v, %v", buf[:n], from, err)
	}
	if n, err := client.WriteTo([]byte("lost"), &net.UDPAddr{IP: ipB.AsSlice(), Port: 54}); n != 4 || err != nil {
		t.Errorf("got %d, %v", n, err)
	}
	_ = server.SetReadDeadline(time.Now())
	if _, _, err := server.ReadFrom(buf); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("got %v, want %v", err, os.ErrDeadlineExceeded)
	}
	if err := server.Close(); err != nil {
		t.Fatal(err)
	}
	if len(f.packets) != 1 {
		t.Errorf("%d packet sockets known, want 1", len(f.packets))
	}
}
