//lint:file-ignore SA1019 golang.org/x/net/http2 is the reference codec of these tests

package hbone

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// until waits for what other goroutines bring about and no channel tells.
func until(t testing.TB, what string, met func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !met(); runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("still waiting for: %s", what)
		}
	}
}

// slowPair is a connection whose buffers hold little: an application that does
// not read makes its pipe queue.
func slowPair(t testing.TB) (app, ours *net.TCPConn) {
	t.Helper()
	app, ours = tcpPair(t)
	_ = app.SetReadBuffer(4096)
	_ = ours.SetWriteBuffer(4096)
	return app, ours
}

// slowPipe is a stream that has ended in order both ways while its pipe still
// delivers to an application that does not read.
func slowPipe(t *testing.T, ctx context.Context, sent []byte) (w *world, app *net.TCPConn, results <-chan Result) {
	t.Helper()
	apps, streams, done := make(chan *net.TCPConn, 1), make(chan *stream, 1), make(chan Result, 1)
	w = newWorld(t, worldConfig{tcp: true, handler: func(hctx context.Context, r *Request) {
		st, err := r.Accept()
		if err != nil {
			t.Errorf("Accept: %v", err)
			return
		}
		app, ours := slowPair(t)
		apps <- app
		streams <- st.(*stream)
		if ctx != nil {
			hctx = ctx
		}
		done <- st.Pipe(hctx, sock{ours}, nil)
	}})
	st := w.open("k")
	app, ss := <-apps, <-streams
	_ = app.CloseWrite() // the server's answer is over
	if _, err := io.ReadAll(st); err != nil {
		t.Fatal(err)
	}
	if _, err := st.Write(sent); err != nil {
		t.Fatal(err)
	}
	_ = st.Close()
	until(t, "both ends of the stream", func() bool { return ss.state.Load() == recvClosed|sendClosed })
	return w, app, done
}

// D6: what was received in order is delivered, also when the tunnel goes away
// meanwhile.
func TestTunnelEndKeepsTheQueue(t *testing.T) {
	data := make([]byte, 240<<10)
	_, _ = rand.Read(data)
	w, app, results := slowPipe(t, nil, data)
	defer w.close()
	defer app.Close()
	w.pool.Close() // the client's proxy goes away, with no stream open
	got, err := io.ReadAll(app)
	if err != nil || !reflect.DeepEqual(got, data) {
		t.Errorf("the application got %d of %d bytes, %v", len(got), len(data), err)
	}
	if res := wait(t, results); res.Err != nil || res.ToSocket != uint64(len(data)) {
		t.Errorf("result = %+v", res)
	}
}

// The end of the context is the cause of a pipe that still delivers.
func TestPipeCutWhileDelivering(t *testing.T) {
	cause := errors.New("policy changed")
	ctx, cancel := context.WithCancelCause(t.Context())
	w, app, results := slowPipe(t, ctx, make([]byte, 240<<10))
	defer w.close()
	defer app.Close()
	cancel(cause)
	if res := wait(t, results); !errors.Is(res.Err, cause) {
		t.Errorf("result = %+v, want the cause %v", res, cause)
	}
}

// An Open must not join a dial that its last waiter has cancelled.
func TestOpenDoesNotJoinACancelledDial(t *testing.T) {
	release, dialing := make(chan struct{}), make(chan struct{}, 2)
	second := errors.New("second dial")
	var dials atomic.Int64
	p := NewPool(PoolConfig[string]{Dial: func(ctx context.Context, k string) (net.Conn, Handshake, error) {
		dialing <- struct{}{}
		if dials.Add(1) == 1 {
			<-ctx.Done()
			<-release
			return nil, Handshake{}, context.Cause(ctx)
		}
		return nil, Handshake{}, second
	}})
	defer p.Close()
	defer close(release)
	gaveUp := errors.New("the first client gave up")
	ctx, cancel := context.WithCancelCause(t.Context())
	first := make(chan error, 1)
	go func() { _, err := p.Open(ctx, "k", "a:1"); first <- err }()
	<-dialing
	cancel(gaveUp)
	if err := wait(t, first); !errors.Is(err, gaveUp) {
		t.Errorf("first Open = %v, want its own cause", err)
	}
	if _, err := p.Open(t.Context(), "k", "a:1"); !errors.Is(err, second) {
		t.Errorf("second Open = %v, want the error of its own dial", err)
	}
}

// D11: a handler counts until it returns, also when its stream was answered and
// then reset.
func TestAnsweredHandlersCount(t *testing.T) {
	var running, most, refused atomic.Int64
	started := make(chan *net.TCPConn, 100)
	sc := newServerCase(t, Config{MaxStreams: 2}, func(ctx context.Context, r *Request) {
		st, err := r.Accept()
		if err != nil {
			return
		}
		app, ours := slowPair(t)
		most.Store(max(most.Load(), running.Add(1)))
		defer running.Add(-1)
		started <- app
		st.Pipe(ctx, sock{ours}, nil)
	})
	sc.hello()
	var apps []*net.TCPConn
	for i := range 30 {
		id := uint32(2*i + 1)
		if err := sc.headers(id, false, connectFields...); err != nil {
			t.Fatal(err)
		}
		for f := range sc.in {
			if strings.HasPrefix(f, "RST") {
				refused.Add(1)
				break
			}
			if strings.HasPrefix(f, "HEADERS") {
				apps = append(apps, wait(t, started))
				for range 10 {
					if err := sc.fr.WriteData(id, false, make([]byte, 16000)); err != nil {
						t.Fatal(err)
					}
				}
				if err := sc.fr.WriteRSTStream(id, http2.ErrCodeCancel); err != nil {
					t.Fatal(err)
				}
				break
			}
		}
	}
	if most.Load() > 3 || refused.Load() == 0 {
		t.Errorf("%d handlers at once and %d refusals, want at most MaxStreams and one", most.Load(), refused.Load())
	}
	sc.cancel(errors.New("over"))
	sc.nc.Close()
	wait(t, sc.result)
	for _, app := range apps {
		app.Close()
	}
}

// Requests that the engine refuses by itself leave nothing behind.
func TestRefusedRequestsLeaveNoContext(t *testing.T) {
	sc := newServerCase(t, Config{}, nil)
	sc.hello()
	fields := append([]string{}, connectFields...)
	for range 70 {
		fields = append(fields, "a", "b")
	}
	for i := range 500 {
		if err := sc.headers(uint32(2*i+1), false, fields...); err != nil {
			t.Fatal(err)
		}
		sc.wait("HEADERS")
	}
	// The answer comes before its request is done with; that to a PING after it.
	if err := sc.fr.WritePing(false, [8]byte{}); err != nil {
		t.Fatal(err)
	}
	sc.wait("PING")
	sc.srv.mu.Lock()
	for c := range sc.srv.conns {
		if n := reflect.ValueOf(c.ctx).Elem().FieldByName("children").Len(); n > 10 {
			t.Errorf("%d contexts of refused requests are still held", n)
		}
	}
	sc.srv.mu.Unlock()
	sc.cancel(errors.New("over"))
	sc.nc.Close()
	wait(t, sc.result)
}

// A peer that returns credit in small steps, as x/net's server does for a handler
// that reads little at a time, floods nobody.
func TestSmallCreditIsNoFlood(t *testing.T) {
	for name, reference := range map[string]*http2.Server{
		"default windows": {},
		"large windows":   {MaxUploadBufferPerConnection: 16 << 20, MaxUploadBufferPerStream: 4 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			const size = 16 << 20
			clientTLS, serverTLS := tlsPair(t)
			var wg sync.WaitGroup
			got := make(chan int64, 1)
			pool := NewPool(PoolConfig[string]{Dial: func(context.Context, string) (net.Conn, Handshake, error) {
				a, b := tcpPair(t)
				wg.Go(func() {
					tc := tls.Server(b, serverTLS)
					if err := tc.Handshake(); err != nil {
						t.Errorf("handshake: %v", err)
						return
					}
					reference.ServeConn(tc, &http2.ServeConnOpts{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
						w.WriteHeader(http.StatusOK)
						w.(http.Flusher).Flush()
						n, _ := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{r.Body}, make([]byte, 4096))
						got <- n
					})})
				})
				return a, Handshake{TLS: clientTLS}, nil
			}})
			st, err := pool.Open(t.Context(), "a", "1.2.3.4:80")
			if err != nil {
				t.Fatal(err)
			}
			if n, err := st.Write(make([]byte, size)); err != nil {
				t.Errorf("Write = %d of %d, %v", n, size, err)
			}
			_ = st.CloseWrite()
			if n := wait(t, got); n != size {
				t.Errorf("the peer got %d of %d bytes", n, size)
			}
			st.Close()
			pool.Close()
			wg.Wait()
		})
	}
}

// SETTINGS come first (RFC 9113 §3.4), whenever Drain is called.
func TestDrainAfterSettings(t *testing.T) {
	for range 500 {
		srv := NewServer(Config{})
		c, s := net.Pipe()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { _ = srv.ServeConn(ctx, s, nil, echoHandler); close(done) }()
		drained := make(chan struct{})
		go func() {
			defer close(drained)
			until(t, "the tunnel", func() bool {
				srv.mu.Lock()
				defer srv.mu.Unlock()
				return len(srv.conns) == 1 || ctx.Err() != nil
			})
			srv.Drain()
		}()
		frame := make([]byte, frameHeaderLen)
		if _, err := io.ReadFull(c, frame); err != nil || frame[3] != frameSettings {
			t.Fatalf("first frame has type %d, %v, want SETTINGS", frame[3], err)
		}
		cancel()
		c.Close()
		<-done
		<-drained
	}
}

// Of several initial windows in one SETTINGS frame the last one counts.
func TestLastInitialWindowCounts(t *testing.T) {
	streams := make(chan *stream, 1)
	sc := newServerCase(t, Config{}, func(ctx context.Context, r *Request) {
		st, err := r.Accept()
		if err != nil {
			return
		}
		streams <- st.(*stream)
		_, _ = st.Read(make([]byte, 1))
	})
	sc.hello()
	if err := sc.headers(1, false, connectFields...); err != nil {
		t.Fatal(err)
	}
	sc.wait("HEADERS")
	st := wait(t, streams)
	var payload []byte
	for _, v := range []uint32{maxWindow, 1, 70000} {
		payload = binary.BigEndian.AppendUint16(payload, settingInitialWindowSize)
		payload = binary.BigEndian.AppendUint32(payload, v)
	}
	if _, err := sc.nc.Write(append(appendFrameHeader(nil, len(payload), frameSettings, 0, 0), payload...)); err != nil {
		t.Fatal(err)
	}
	sc.wait("SETTINGS ack=true")
	st.c.mu.Lock()
	if got := st.c.peerInitial; got != 70000 {
		t.Errorf("initial window = %d, want 70000", got)
	}
	st.c.mu.Unlock()
	sc.cancel(errors.New("over"))
	sc.nc.Close()
	wait(t, sc.result)
}
