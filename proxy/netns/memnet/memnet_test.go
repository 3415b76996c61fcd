package memnet_test

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
	"testing/synctest"
	"time"

	"golang.org/x/net/nettest"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/proxy/netns/memnet"
)

var (
	ipA = netip.MustParseAddr("10.0.0.1")
	ipB = netip.MustParseAddr("10.0.0.2")
	ipC = netip.MustParseAddr("10.0.0.3")

	any80 = netip.MustParseAddrPort("[::]:80")
	b80   = netip.MustParseAddrPort("10.0.0.2:80")
)

func listen(t testing.TB, n netns.Network, addr netip.AddrPort) netns.Listener {
	t.Helper()
	ln, err := n.Listen(t.Context(), addr)
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

func memPair(t testing.TB) (client, server netns.Conn) {
	t.Helper()
	n := memnet.New(memnet.Config{})
	ln := listen(t, n.Host(ipB), any80)
	defer ln.Close()
	return dialAccept(t, n.Host(ipA), ln, b80)
}

func hostPair(t testing.TB) (client, server netns.Conn) {
	t.Helper()
	n := netns.NewHost(netns.HostConfig{OriginalSource: netns.OriginalSourceOff})
	ln := listen(t, n, netip.MustParseAddrPort("127.0.0.1:0"))
	defer ln.Close()
	return dialAccept(t, n, ln, ln.Addr())
}

func dialAccept(t testing.TB, n netns.Network, ln netns.Listener, dst netip.AddrPort) (client, server netns.Conn) {
	t.Helper()
	client, err := n.Dial(t.Context(), netip.Addr{}, dst)
	if err != nil {
		t.Fatal(err)
	}
	server, err = ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return client, server
}

func TestConnNettest(t *testing.T) {
	nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
		a, b := memPair(t)
		return a, b, func() { _ = a.Close(); _ = b.Close() }, nil
	})
}

// TestSameAsKernel runs one script per case over the memory and over real
// sockets: what it observes must be equal, and what is wanted.
func TestSameAsKernel(t *testing.T) {
	read := func(c netns.Conn) string {
		b := make([]byte, 100)
		n, err := c.Read(b)
		return string(b[:n]) + outcome(err)
	}
	readAll := func(c netns.Conn) string {
		b, err := io.ReadAll(c)
		return string(b) + outcome(err)
	}
	write := func(c netns.Conn, s string) string { _, err := c.Write([]byte(s)); return outcome(err) }
	try := func(c netns.Conn, s string) string { _, err := c.TryWrite([]byte(s)); return outcome(err) }
	for _, tc := range []struct {
		name string
		run  func(a, b netns.Conn) []string
		want string
	}{
		{"half close", func(a, b netns.Conn) []string {
			return []string{outcome(a.CloseWrite()), read(b), write(b, "x"), outcome(b.Close()), readAll(a), write(a, "y")}
		}, "ok|EOF|ok|ok|xok|EPIPE"},
		{"data outlives a reset", func(a, b netns.Conn) []string {
			return []string{write(a, "abc"), outcome(a.Abort()), read(b), read(b), read(b), write(b, "x"), outcome(b.CloseWrite())}
		}, "ok|ok|abcok|ECONNRESET|EOF|EPIPE|ENOTCONN"},
		{"write meets a reset", func(a, b netns.Conn) []string {
			return []string{outcome(a.Abort()), write(b, "x"), write(b, "x"), read(b)}
		}, "ok|ECONNRESET|EPIPE|EOF"},
		{"try meets a reset", func(a, b netns.Conn) []string {
			return []string{outcome(a.Abort()), try(b, "x"), try(b, "x"), read(b)}
		}, "ok|ECONNRESET|EPIPE|EOF"},
		{"reset after half close", func(a, b netns.Conn) []string {
			return []string{outcome(a.CloseWrite()), read(b), outcome(a.Abort()), write(b, "x"), read(b)}
		}, "ok|EOF|ok|EPIPE|EOF"},
		{"closing with unread data resets", func(a, b netns.Conn) []string {
			return []string{write(b, "unread"), outcome(a.Close()), read(b)}
		}, "ok|ok|ECONNRESET"},
		{"writing to a closed peer", func(a, b netns.Conn) []string {
			return []string{outcome(a.Close()), read(b), write(b, "x"), write(b, "x"), read(b)}
		}, "ok|EOF|ok|EPIPE|EOF"},
		{"closed", func(a, b netns.Conn) []string {
			return []string{outcome(a.Close()), read(a), write(a, "x"), try(a, "x"), outcome(a.CloseWrite()),
				outcome(a.Close()), outcome(a.Abort()), outcome(a.SetDeadline(time.Time{}))}
		}, "ok|closed|closed|closed|closed|closed|closed|closed"},
		{"both closed, then abort", func(a, b netns.Conn) []string {
			return []string{outcome(a.CloseWrite()), outcome(b.CloseWrite()), read(a), read(b), outcome(a.Abort()), read(b)}
		}, "ok|ok|EOF|EOF|ok|EOF"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for name, mk := range map[string]func(testing.TB) (netns.Conn, netns.Conn){"memory": memPair, "kernel": hostPair} {
				a, b := mk(t)
				defer a.Close()
				defer b.Close()
				_ = a.SetDeadline(time.Now().Add(10 * time.Second))
				_ = b.SetDeadline(time.Now().Add(10 * time.Second))
				if got := strings.Join(tc.run(a, b), "|"); got != tc.want {
					t.Errorf("%s: got %v, want %v", name, got, tc.want)
				}
			}
		})
	}
}

func outcome(err error) string {
	switch {
	case err == nil:
		return "ok"
	case err == io.EOF:
		return "EOF"
	case errors.Is(err, net.ErrClosed):
		return "closed"
	case errors.Is(err, syscall.ECONNRESET):
		return "ECONNRESET"
	case errors.Is(err, syscall.EPIPE):
		return "EPIPE"
	case errors.Is(err, syscall.ENOTCONN):
		return "ENOTCONN"
	}
	return err.Error()
}

func TestTryWriteIsBounded(t *testing.T) {
	n := memnet.New(memnet.Config{Buffer: 10})
	ln := listen(t, n.Host(ipB), any80)
	client, server := dialAccept(t, n.Host(ipA), ln, b80)
	for _, step := range []struct{ send, want int }{{4, 4}, {8, 6}, {1, 0}} {
		if got, err := client.TryWrite(make([]byte, step.send)); got != step.want || err != nil {
			t.Errorf("%d bytes: got %d, %v, want %d", step.send, got, err, step.want)
		}
	}
	if n, err := server.Read(make([]byte, 3)); n != 3 || err != nil {
		t.Fatalf("got %d, %v", n, err)
	}
	if got, err := client.TryWrite(make([]byte, 8)); got != 3 || err != nil {
		t.Errorf("after reading: got %d, %v, want 3", got, err)
	}
}

func TestAddressesAndRedirection(t *testing.T) {
	n := memnet.New(memnet.Config{Transparent: true})
	a, b := n.Host(ipA, netip.MustParseAddr("::ffff:10.0.0.9"), netip.MustParseAddr("fd00::1")), n.Host(ipB)
	ln := listen(t, b, any80)
	if !ln.Transparent() || ln.Addr() != any80 {
		t.Errorf("got %v, transparent %v", ln.Addr(), ln.Transparent())
	}

	client, server := dialAccept(t, a, ln, b80)
	if client.Remote() != b80 || server.Local() != b80 || client.Local().Addr() != ipA || server.Remote() != client.Local() {
		t.Errorf("got %v→%v and %v→%v", client.Local(), client.Remote(), server.Remote(), server.Local())
	}
	if dst, err := server.OriginalDst(); dst != b80 || err != nil {
		t.Errorf("got %v, %v, want %v", dst, err, b80)
	}

	spoofed, err := a.Dial(t.Context(), ipC, b80)
	if err != nil {
		t.Fatal(err)
	}
	if server, err = ln.Accept(); err != nil || server.Remote().Addr() != ipC || spoofed.Local().Addr() != ipC {
		t.Errorf("original source: got %v, %v, want %v", server.Remote(), err, ipC)
	}

	outbound := listen(t, a, netip.MustParseAddrPort("[::]:15001"))
	client, err = a.DialVia(t.Context(), netip.MustParseAddrPort("127.0.0.1:15001"), ipA, b80)
	if err != nil {
		t.Fatal(err)
	}
	if server, err = outbound.Accept(); err != nil {
		t.Fatal(err)
	}
	if dst, err := server.OriginalDst(); dst != b80 || err != nil {
		t.Errorf("got %v, %v, want %v", dst, err, b80)
	}
	if client.Remote() != b80 || server.Local().Port() != 15001 || server.Remote().Addr() != ipA {
		t.Errorf("got %v, %v, %v", client.Remote(), server.Local(), server.Remote())
	}
}

func TestListenAndDialErrors(t *testing.T) {
	n := memnet.New(memnet.Config{})
	a, b := n.Host(ipA), n.Host(ipB)
	ln := listen(t, b, any80)
	for _, tc := range []struct {
		name, addr string
		want       error
	}{
		{"same", "[::]:80", syscall.EADDRINUSE},
		{"specific under wildcard", "10.0.0.2:80", syscall.EADDRINUSE},
		{"of another host", "10.0.0.1:80", syscall.EADDRNOTAVAIL},
	} {
		_, err := b.Listen(t.Context(), netip.MustParseAddrPort(tc.addr))
		if !errors.Is(err, tc.want) || !strings.HasPrefix(err.Error(), "failed to bind to address "+tc.addr+": ") {
			t.Errorf("%s: got %v, want %v", tc.name, err, tc.want)
		}
	}
	listen(t, b, netip.MustParseAddrPort("127.0.0.1:81"))
	if _, err := b.Listen(t.Context(), netip.MustParseAddrPort("[::]:81")); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("wildcard over specific: got %v", err)
	}
	for _, tc := range []struct {
		name, dst string
		want      error
	}{
		{"no listener", "10.0.0.2:443", syscall.ECONNREFUSED},
		{"loopback of another host", "127.0.0.1:81", syscall.ECONNREFUSED},
		{"no host", "10.9.9.9:80", syscall.EHOSTUNREACH},
	} {
		if _, err := a.Dial(t.Context(), netip.Addr{}, netip.MustParseAddrPort(tc.dst)); !errors.Is(err, tc.want) {
			t.Errorf("%s: got %v, want %v", tc.name, err, tc.want)
		}
	}
	client, err := a.Dial(t.Context(), netip.Addr{}, b80)
	if err != nil {
		t.Fatal(err)
	}
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("not accepted: got %v, want %v", err, syscall.ECONNRESET)
	}
	if _, err := ln.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v, want %v", err, net.ErrClosed)
	}
	if _, err := a.Dial(t.Context(), netip.Addr{}, b80); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("after Close: got %v, want %v", err, syscall.ECONNREFUSED)
	}
}

func TestSilentPeerTimesOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := memnet.New(memnet.Config{})
		a, ln := n.Host(ipA), listen(t, n.Host(ipB), any80)
		n.Blackhole(ipB, true)
		start := time.Now()
		_, err := a.Dial(t.Context(), netip.Addr{}, b80)
		if !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) != netns.DefaultConnectTimeout {
			t.Errorf("got %v after %v", err, time.Since(start))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := a.Dial(ctx, netip.Addr{}, b80); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want %v", err, context.DeadlineExceeded)
		}
		n.Blackhole(ipB, false)
		for range netns.DefaultBacklog {
			if _, err := a.Dial(t.Context(), netip.Addr{}, b80); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := a.Dial(t.Context(), netip.Addr{}, b80); err != netns.ErrConnectTimeout {
			t.Errorf("full accept queue: got %v, want %v", err, netns.ErrConnectTimeout)
		}
		_ = ln.Close()
	})
}

func TestBlockedCallsInBubble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := memnet.New(memnet.Config{Buffer: 4})
		ln := listen(t, n.Host(ipB), any80)
		client, server := dialAccept(t, n.Host(ipA), ln, b80)
		_ = client.SetReadDeadline(time.Now().Add(time.Hour))
		start := time.Now()
		if _, err := client.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) != time.Hour {
			t.Errorf("got %v after %v", err, time.Since(start))
		}
		_ = client.SetWriteDeadline(time.Now().Add(time.Minute))
		if n, err := client.Write(make([]byte, 10)); n != 4 || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("got %d, %v, want 4 and a timeout", n, err)
		}
		_ = client.SetDeadline(time.Time{})
		errs := make(chan error)
		go func() { _, err := client.Write(make([]byte, 10)); errs <- err }()
		synctest.Wait()
		_ = server.Abort()
		if err := <-errs; !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("blocked write: got %v, want %v", err, syscall.ECONNRESET)
		}
	})
}

func TestPackets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := memnet.New(memnet.Config{})
		server, err := n.Host(ipB).ListenPacket(t.Context(), netip.MustParseAddrPort("[::]:53"))
		if err != nil {
			t.Fatal(err)
		}
		client, err := n.Host(ipA).ListenPacket(t.Context(), netip.MustParseAddrPort("0.0.0.0:0"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := n.Host(ipB).ListenPacket(t.Context(), netip.MustParseAddrPort("[::]:53")); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("got %v, want %v", err, syscall.EADDRINUSE)
		}
		buf := make([]byte, 10)
		if _, err := client.WriteTo([]byte("query"), &net.UDPAddr{IP: ipB.AsSlice(), Port: 53}); err != nil {
			t.Fatal(err)
		}
		c, from, err := server.ReadFrom(buf)
		if err != nil || string(buf[:c]) != "query" || !strings.HasPrefix(from.String(), "10.0.0.1:") {
			t.Fatalf("got %q from %v, %v", buf[:c], from, err)
		}
		if _, err := server.WriteTo([]byte("answer"), from); err != nil {
			t.Fatal(err)
		}
		if c, from, err = client.ReadFrom(buf); err != nil || !bytes.Equal(buf[:c], []byte("answer")) || from.String() != "10.0.0.2:53" {
			t.Errorf("got %q from %v, %v", buf[:c], from, err)
		}
		_ = client.SetReadDeadline(time.Now().Add(time.Second))
		if _, _, err := client.ReadFrom(buf); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("got %v, want %v", err, os.ErrDeadlineExceeded)
		}
		_ = client.Close()
		if _, _, err := client.ReadFrom(buf); !errors.Is(err, net.ErrClosed) {
			t.Errorf("got %v, want %v", err, net.ErrClosed)
		}
		_ = server.Close()
	})
}
