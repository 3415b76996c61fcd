package netns

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Conn has to be usable as the socket of a tunnel, which asks for no more than
// these.
var _ interface {
	net.Conn
	CloseWrite() error
	Abort() error
	TryWrite([]byte) (int, error)
} = Conn(nil)

var localhost = netip.MustParseAddrPort("127.0.0.1:0")

func listen(t testing.TB, n Network, addr netip.AddrPort) Listener {
	t.Helper()
	ln, err := n.Listen(t.Context(), addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return ln
}

// connect returns both ends of a connection to ln.
func connect(t testing.TB, n Network, src netip.Addr, ln Listener, dst netip.AddrPort) (client, server Conn) {
	t.Helper()
	client, err := n.Dial(t.Context(), src, dst)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	server, err = ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Close() })
	deadline := time.Now().Add(20 * time.Second)
	if err := errors.Join(client.SetDeadline(deadline), server.SetDeadline(deadline)); err != nil {
		t.Fatal(err)
	}
	return client, server
}

func hostPair(t testing.TB) (client, server Conn) {
	n := NewHost(HostConfig{OriginalSource: OriginalSourceOff})
	ln := listen(t, n, localhost)
	return connect(t, n, netip.Addr{}, ln, ln.Addr())
}

func TestHostAddresses(t *testing.T) {
	for _, tc := range []struct {
		name       string
		ipv6       bool
		listen     string
		dial       string // its IP
		wantListen string
	}{
		{"v4", false, "127.0.0.1:0", "127.0.0.1", "127.0.0.1"},
		{"dual stack takes v4 unmapped", true, "[::]:0", "127.0.0.1", "::"},
		{"dual stack takes v6", true, "[::]:0", "::1", "::"},
		{"wildcard without v6 is v4", false, "[::]:0", "127.0.0.1", "0.0.0.0"},
		{"mapped address", true, "[::ffff:127.0.0.1]:0", "::ffff:127.0.0.1", "127.0.0.1"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := NewHost(HostConfig{IPv6Enabled: tc.ipv6, OriginalSource: OriginalSourceOff})
			ln := listen(t, n, netip.MustParseAddrPort(tc.listen))
			if got := ln.Addr().Addr().String(); got != tc.wantListen {
				t.Errorf("listen address: got %v, want %v", got, tc.wantListen)
			}
			if ln.Transparent() {
				t.Error("transparent although the original source is off")
			}
			dst := netip.AddrPortFrom(netip.MustParseAddr(tc.dial), ln.Addr().Port())
			client, server := connect(t, n, netip.Addr{}, ln, dst)
			want := unmap(dst)
			if client.Remote() != want || server.Local() != want {
				t.Errorf("got %v and %v, want %v", client.Remote(), server.Local(), want)
			}
			if server.Remote() != client.Local() {
				t.Errorf("server sees %v, client is %v", server.Remote(), client.Local())
			}
			if got := client.RemoteAddr().String(); got != want.String() {
				t.Errorf("RemoteAddr: got %v, want %v", got, want)
			}
			for _, c := range []Conn{client, server} {
				if got, err := c.OriginalDst(); err != nil || got != c.Local() {
					t.Errorf("original destination: got %v, %v, want %v", got, err, c.Local())
				}
			}
		})
	}
}

func TestHostListenErrors(t *testing.T) {
	n := NewHost(HostConfig{OriginalSource: OriginalSourceOff})
	taken := listen(t, n, localhost)
	_, err := n.Listen(t.Context(), taken.Addr())
	if !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("got %v, want %v", err, syscall.EADDRINUSE)
	}
	if want := "failed to bind to address " + taken.Addr().String() + ": "; err == nil || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("got %v, want prefix %q", err, want)
	}
	if _, err := n.Listen(t.Context(), netip.AddrPort{}); err == nil {
		t.Error("listening on no address succeeded")
	}
	if _, err := n.ListenPacket(t.Context(), netip.AddrPort{}); err == nil {
		t.Error("listening on no address succeeded")
	}
	if err := taken.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := taken.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept on a closed listener: got %v, want %v", err, net.ErrClosed)
	}
	pc, err := n.ListenPacket(t.Context(), localhost)
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	addr := netip.MustParseAddrPort(pc.LocalAddr().String())
	_, err = n.ListenPacket(t.Context(), addr)
	if want := "failed to bind to address " + addr.String() + ": "; err == nil || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("got %v, want prefix %q", err, want)
	}
}

func TestHostDialErrors(t *testing.T) {
	n := NewHost(HostConfig{ConnectTimeout: 50 * time.Millisecond})
	ln := listen(t, n, localhost)
	refused := ln.Addr()
	_ = ln.Close()
	if _, err := n.Dial(t.Context(), netip.Addr{}, refused); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("got %v, want %v", err, syscall.ECONNREFUSED)
	}
	if _, err := n.Dial(t.Context(), netip.Addr{}, netip.AddrPort{}); err == nil {
		t.Error("dialling no address succeeded")
	}
	if _, err := n.Dial(t.Context(), netip.MustParseAddr("::1"), refused); err == nil || !strings.Contains(err.Error(), "family") {
		t.Errorf("source of the other family: got %v", err)
	}
	cause := errors.New("gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	if _, err := n.Dial(ctx, netip.Addr{}, refused); !errors.Is(err, cause) {
		t.Errorf("got %v, want %v", err, cause)
	}
	if _, err := n.Listen(ctx, localhost); !errors.Is(err, cause) {
		t.Errorf("got %v, want %v", err, cause)
	}
}

// A full accept queue drops SYNs: the peer that never answers.
func TestHostConnectTimeout(t *testing.T) {
	n := NewHost(HostConfig{ConnectTimeout: 200 * time.Millisecond, Backlog: 1, OriginalSource: OriginalSourceOff})
	ln := listen(t, n, localhost)
	var err error
	for range 10 {
		var c Conn
		if c, err = n.Dial(t.Context(), netip.Addr{}, ln.Addr()); err != nil {
			break
		}
		defer c.Close()
	}
	var ne net.Error
	if err == nil || err.Error() != "deadline has elapsed" || !errors.Is(err, os.ErrDeadlineExceeded) ||
		!errors.As(err, &ne) || !ne.Timeout() {
		t.Errorf("got %v, want a timeout that says %q", err, "deadline has elapsed")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := n.Dial(ctx, netip.Addr{}, ln.Addr()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want %v", err, context.DeadlineExceeded)
	}
}

func TestConnHalfClose(t *testing.T) {
	client, server := hostPair(t)
	if err := client.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(server); err != nil || len(b) != 0 {
		t.Fatalf("got %q, %v, want end of file", b, err)
	}
	if _, err := server.Write([]byte("after")); err != nil {
		t.Fatal(err)
	}
	if err := server.Close(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(client); err != nil || string(b) != "after" {
		t.Fatalf("got %q, %v", b, err)
	}
}

func TestConnAbort(t *testing.T) {
	for _, half := range []bool{false, true} {
		client, server := hostPair(t)
		if half {
			if err := client.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if _, err := server.Read(make([]byte, 1)); err != io.EOF {
				t.Fatalf("got %v, want %v", err, io.EOF)
			}
		}
		if err := client.Abort(); err != nil {
			t.Fatal(err)
		}
		// After a FIN, a reset shows when writing.
		var err error
		if half {
			for err == nil {
				_, err = server.Write([]byte("x"))
			}
		} else {
			_, err = server.Read(make([]byte, 1))
		}
		if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) || !half && errors.Is(err, syscall.EPIPE) {
			t.Errorf("half closed %v: got %v, want a reset", half, err)
		}
		if err := client.Abort(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("second abort: got %v, want %v", err, net.ErrClosed)
		}
	}
}

func TestConnTryWrite(t *testing.T) {
	client, server := hostPair(t)
	if n, err := client.TryWrite(nil); n != 0 || err != nil {
		t.Errorf("empty: got %d, %v", n, err)
	}
	chunk := bytes.Repeat([]byte("0123456789abcdef"), 4096)
	sent := 0
	for {
		n, err := client.TryWrite(chunk)
		if err != nil {
			t.Fatal(err)
		}
		sent += n
		if n < len(chunk) {
			break
		}
	}
	if n, err := client.TryWrite(chunk); n != 0 || err != nil {
		t.Errorf("full socket: got %d, %v, want 0, nil", n, err)
	}
	if err := client.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, server); err != nil || n != int64(sent) {
		t.Errorf("received %d, %v, want %d", n, err, sent)
	}
	if _, err := client.TryWrite(chunk); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("after CloseWrite: got %v, want %v", err, syscall.EPIPE)
	}
	_ = client.Close()
	if _, err := client.TryWrite(chunk); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: got %v, want %v", err, net.ErrClosed)
	}
	if _, err := client.OriginalDst(); err != nil {
		t.Errorf("original destination of a dialled connection: %v", err)
	}
}

func TestConnOriginalDstClosed(t *testing.T) {
	_, server := hostPair(t)
	_ = server.Close()
	if _, err := server.OriginalDst(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v, want %v", err, net.ErrClosed)
	}
}

func TestConnReadFrom(t *testing.T) {
	const total = 3 << 20
	for _, limit := range []bool{false, true} {
		fromClient, fromServer := hostPair(t)
		toClient, toServer := hostPair(t)
		wrote := make(chan error, 1)
		go func() {
			_, err := fromClient.Write(make([]byte, total))
			wrote <- errors.Join(err, fromClient.CloseWrite())
		}()
		copied := make(chan error, 1)
		go func() {
			var r io.Reader = fromServer
			lr := &io.LimitedReader{R: fromServer, N: total}
			if limit {
				r = lr
			}
			n, err := io.Copy(toClient, r)
			if n != total || limit && lr.N != 0 {
				t.Errorf("limit %v: copied %d, %d left, want %d", limit, n, lr.N, total)
			}
			copied <- errors.Join(err, toClient.CloseWrite())
		}()
		if n, err := io.Copy(io.Discard, toServer); n != total || err != nil {
			t.Errorf("got %d, %v, want %d", n, err, total)
		}
		if err := errors.Join(<-wrote, <-copied); err != nil {
			t.Error(err)
		}
	}
	client, server := hostPair(t)
	if n, err := client.(io.ReaderFrom).ReadFrom(strings.NewReader("plain")); n != 5 || err != nil {
		t.Errorf("got %d, %v", n, err)
	}
	_ = client.Close()
	if b, err := io.ReadAll(server); string(b) != "plain" || err != nil {
		t.Errorf("got %q, %v", b, err)
	}
}

func BenchmarkTryWrite(b *testing.B) {
	client, server := hostPair(b)
	_ = client.SetDeadline(time.Time{})
	_ = server.SetDeadline(time.Time{})
	done := make(chan struct{})
	go func() { defer close(done); _, _ = io.Copy(io.Discard, server) }()
	p := make([]byte, 1024)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := client.TryWrite(p); err != nil {
			b.Fatal(err)
		}
	}
	_ = client.Close()
	<-done
}
