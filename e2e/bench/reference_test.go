//go:build linux

package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// startServer serves loopback connections until the test ends and waits for the end.
func startServer(t *testing.T, handle func(context.Context, *net.TCPConn)) netip.AddrPort {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- serveConns(ctx, ln, handle) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("server: %v", err)
		}
	})
	return ln.Addr().(*net.TCPAddr).AddrPort()
}

// startPair starts both halves of a reference mode in front of app and returns where the outbound half listens.
func startPair(t *testing.T, mode string, app netip.AddrPort) netip.AddrPort {
	t.Helper()
	if mode == modeDirect {
		return app
	}
	text, err := newCredentials()
	if err != nil {
		t.Fatal(err)
	}
	creds, err := parseCredentials(text)
	if err != nil {
		t.Fatal(err)
	}
	in, err := newReference(mode, creds, 0)
	if err != nil {
		t.Fatal(err)
	}
	in.target = app
	out, err := newReference(mode, creds, 0)
	if err != nil {
		t.Fatal(err)
	}
	out.peerPort = startServer(t, in.inbound).Port()
	out.dest = func(*net.TCPConn) (netip.AddrPort, error) { return app, nil }
	if out.tunnels != nil {
		t.Cleanup(out.tunnels.close)
	}
	return startServer(t, out.outbound)
}

func dialTest(t *testing.T, to netip.AddrPort) *net.TCPConn {
	t.Helper()
	conn, err := net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(to))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return conn
}

func forEachMode(t *testing.T, f func(t *testing.T, mode string)) {
	for _, mode := range []string{modeDirect, modeRelay, modeRelayBuf, modeTLS, modeH2} {
		t.Run(mode, func(t *testing.T) { f(t, mode) })
	}
}

func TestReference_BytesArriveBothWays(t *testing.T) {
	forEachMode(t, func(t *testing.T, mode string) {
		conn := dialTest(t, startPair(t, mode, startServer(t, new(application).handle)))
		if err := order(conn, []byte{cmdEcho}); err != nil {
			t.Fatal(err)
		}
		if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
			t.Fatal(err)
		}
		const size = 5<<20 + 17
		sent := make(chan [32]byte, 1)
		go func() {
			digest := sha256.New()
			random := rand.NewChaCha8([32]byte{7})
			_, err := io.CopyN(io.MultiWriter(digest, conn), random, size)
			if err != nil {
				t.Errorf("send: %v", err)
			}
			if err := conn.CloseWrite(); err != nil {
				t.Errorf("half-close: %v", err)
			}
			sent <- [32]byte(digest.Sum(nil))
		}()
		digest := sha256.New()
		n, err := io.Copy(digest, conn)
		if err != nil || n != size {
			t.Fatalf("echo: got %d bytes, %v, want %d", n, err, size)
		}
		if got, want := [32]byte(digest.Sum(nil)), <-sent; got != want {
			t.Errorf("digest of the echo: got %x, want %x", got, want)
		}
	})
}

// The request side ends first and the answer still comes: half-close reaches the application.
func TestReference_HalfClose(t *testing.T) {
	forEachMode(t, func(t *testing.T, mode string) {
		app := startServer(t, func(_ context.Context, c *net.TCPConn) {
			defer c.Close()
			text, err := io.ReadAll(c)
			if err != nil {
				t.Errorf("application read: %v", err)
			}
			_, _ = c.Write(append([]byte("heard "), text...))
		})
		conn := dialTest(t, startPair(t, mode, app))
		if _, err := conn.Write([]byte("all of this")); err != nil {
			t.Fatal(err)
		}
		if err := conn.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(conn); err != nil || string(got) != "heard all of this" {
			t.Errorf("answer after half-close: got %q, %v", got, err)
		}
	})
}

func TestReference_EveryKindOfLoad(t *testing.T) {
	specs := []loadSpec{
		{Kind: loadProbe},
		{Kind: loadUpload, Streams: 3, Bytes: 6 << 20, Limit: 10 * time.Second},
		{Kind: loadDownload, Streams: 3, Bytes: 6 << 20, Limit: 10 * time.Second},
		{Kind: loadPing, Streams: 3, MessageSize: 1 << 10, Duration: 50 * time.Millisecond},
		{Kind: loadConnect, Streams: 4, Count: 20},
		{Kind: loadIdle, Streams: 4, Count: 20},
	}
	forEachMode(t, func(t *testing.T, mode string) {
		target := startPair(t, mode, startServer(t, new(application).handle))
		for _, spec := range specs {
			spec.Target = target
			got := runLoad(t, spec)
			switch spec.Kind {
			case loadUpload, loadDownload:
				if got.Bytes != spec.Bytes {
					t.Errorf("%s: got %d bytes, want %d", spec.Kind, got.Bytes, spec.Bytes)
				}
			case loadPing:
				if got.Ops < 3 || got.P50 <= 0 || got.P99 < got.P50 {
					t.Errorf("%s: got %d messages, p50 %v µs, p99 %v µs", spec.Kind, got.Ops, got.P50, got.P99)
				}
			case loadConnect, loadIdle:
				if got.Ops != int64(spec.Count) {
					t.Errorf("%s: got %d connections, want %d", spec.Kind, got.Ops, spec.Count)
				}
			}
			if got.Congestion == "" && spec.Kind != loadProbe {
				t.Errorf("%s: congestion control is not reported", spec.Kind)
			}
		}
	})
}

// Stalled streams on connections of their own cannot disturb the ping; the load must say so and release them.
func TestLoad_Stall(t *testing.T) {
	app := new(application)
	target := startPair(t, modeRelayBuf, startServer(t, app.handle))
	got := runLoad(t, loadSpec{Kind: loadStall, Target: target, Streams: 2, MessageSize: 64, Duration: 50 * time.Millisecond})
	if got.AloneRate <= 0 || got.BesideRate <= 0 || got.Stuck == 0 {
		t.Errorf("stall: got %+v, want two rates and stuck bytes", got)
	}
	app.mu.Lock()
	defer app.mu.Unlock()
	if len(app.stalled) != 0 {
		t.Errorf("%d connections are still stalled after the release", len(app.stalled))
	}
}

// Connections start no faster than they are told to.
func TestLoad_Pace(t *testing.T) {
	target := startServer(t, new(application).handle)
	const count, every = 5, 20 * time.Millisecond
	got := runLoad(t, loadSpec{Kind: loadConnect, Target: target, Streams: 3, Count: count, Every: every})
	if least := (count * every).Seconds(); got.Ops != count || got.Seconds < least {
		t.Errorf("paced load: got %d connections in %.3f s, want %d in at least %.3f s", got.Ops, got.Seconds, count, least)
	}
}

func runLoad(t *testing.T, spec loadSpec) loadResult {
	t.Helper()
	l := &loader{spec: spec}
	defer l.close()
	if err := l.prepare(t.Context()); err != nil {
		t.Fatalf("prepare %s: %v", spec.Kind, err)
	}
	result, err := l.run(t.Context())
	if err != nil {
		t.Fatalf("run %s: %v", spec.Kind, err)
	}
	return result
}

func TestNewReference_UnknownMode(t *testing.T) {
	if _, err := newReference("quic", nil, 0); err == nil {
		t.Error("newReference(\"quic\") succeeded, want an error that names the choices")
	}
}

func TestBatchConn_RecordsAndCork(t *testing.T) {
	near, far := net.Pipe()
	defer near.Close()
	record := func(n int) []byte { return append([]byte{23, 3, 3, byte(n >> 8), byte(n)}, make([]byte, n)...) }
	written := make(chan error, 1)
	go func() {
		_, err := far.Write(append(append(record(100), record(7)...), 23, 3)) // the third record is torn
		written <- errors.Join(err, far.Close())
	}()
	conn := &batchConn{Conn: near}
	buf := make([]byte, 1<<10)
	if n, err := conn.Read(buf[:50]); n != 50 || err != nil {
		t.Fatalf("first part: got %d, %v, want 50", n, err)
	}
	if conn.buffered() {
		t.Error("buffered is true in the middle of a record")
	}
	if n, err := conn.Read(buf); n != 55 || err != nil {
		t.Fatalf("rest of the first record: got %d, %v, want 55", n, err)
	}
	if !conn.buffered() {
		t.Error("buffered is false with a whole record read ahead")
	}
	if n, err := conn.Read(buf); n != 12 || err != nil {
		t.Fatalf("second record: got %d, %v, want 12", n, err)
	}
	if n, err := conn.Read(buf); n != 0 || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("torn record: got %d, %v, want %v", n, err, io.ErrUnexpectedEOF)
	}
	if err := <-written; err != nil {
		t.Fatal(err)
	}

	counter := &countingConn{}
	out := &batchConn{Conn: counter}
	out.cork()
	for range 8 {
		if n, err := out.Write(record(100)); n != 105 || err != nil {
			t.Fatalf("corked write: got %d, %v", n, err)
		}
	}
	if counter.writes != 0 {
		t.Errorf("%d writes while corked, want none", counter.writes)
	}
	if err := out.uncork(); err != nil {
		t.Fatal(err)
	}
	if counter.writes != 1 || counter.bytes != 8*105 {
		t.Errorf("after uncork: got %d writes of %d bytes, want 1 of %d", counter.writes, counter.bytes, 8*105)
	}
}

type countingConn struct {
	net.Conn
	writes, bytes int
}

func (c *countingConn) Write(p []byte) (int, error) {
	c.writes++
	c.bytes += len(p)
	return len(p), nil
}
