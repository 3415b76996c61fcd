package hbone

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// pipeWorld joins two TCP applications through a tunnel: src dials, dst accepts.
type pipeWorld struct {
	*world
	results chan Result // of the server's pipes
	dsts    chan *net.TCPConn
}

func newPipeWorld(t testing.TB, wc worldConfig) *pipeWorld {
	p := &pipeWorld{results: make(chan Result, 256), dsts: make(chan *net.TCPConn, 256)}
	wc.tcp = true
	wc.handler = func(ctx context.Context, r *Request) {
		st, err := r.Accept()
		if err != nil {
			return
		}
		app, ours := tcpPair(t)
		p.dsts <- app
		p.results <- st.Pipe(ctx, sock{ours}, nil)
	}
	p.world = newWorld(t, wc)
	return p
}

// connect returns both applications' ends and the client's result.
func (p *pipeWorld) connect(ctx context.Context) (src, dst *net.TCPConn, result chan Result) {
	p.t.Helper()
	st := p.open("k")
	app, ours := tcpPair(p.t)
	result = make(chan Result, 1)
	go func() { result <- st.Pipe(ctx, sock{ours}, nil) }()
	dst = <-p.dsts
	p.t.Cleanup(func() { app.Close(); dst.Close() })
	return app, dst, result
}

func wait[T any](t testing.TB, ch <-chan T) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(15 * time.Second):
		t.Fatal("timeout")
		panic("unreachable")
	}
}

func TestPipeBothWays(t *testing.T) {
	for _, plain := range []bool{true, false} {
		w := newPipeWorld(t, worldConfig{plain: plain})
		src, dst, result := w.connect(context.Background())
		up, down := make([]byte, 9<<20), make([]byte, 7<<20)
		_, _ = rand.Read(up)
		_, _ = rand.Read(down)
		send := func(c *net.TCPConn, b []byte) {
			_, err := c.Write(b)
			if err = errors.Join(err, c.CloseWrite()); err != nil {
				t.Error(err)
			}
		}
		go send(src, up)
		go send(dst, down)
		gotDown := make(chan []byte, 1)
		go func() {
			b, err := io.ReadAll(src)
			if err != nil {
				t.Error(err)
			}
			gotDown <- b
		}()
		gotUp, err := io.ReadAll(dst)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(gotUp, up) || !bytes.Equal(wait(t, gotDown), down) {
			t.Fatal("bytes differ")
		}
		if got, want := wait(t, result), (Result{FromSocket: uint64(len(up)), ToSocket: uint64(len(down))}); got != want {
			t.Errorf("client result %+v, want %+v", got, want)
		}
		if got, want := wait(t, w.results), (Result{FromSocket: uint64(len(down)), ToSocket: uint64(len(up))}); got != want {
			t.Errorf("server result %+v, want %+v", got, want)
		}
		w.close()
	}
}

// Half-close, cases 37: each direction ends on its own.
func TestI37_HalfClose(t *testing.T) {
	for _, name := range []string{"source first", "destination first"} {
		t.Run(name, func(t *testing.T) {
			w := newPipeWorld(t, worldConfig{})
			defer w.close()
			a, b, result := w.connect(context.Background())
			if name == "destination first" {
				a, b = b, a
			}
			if err := a.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if n, err := b.Read(make([]byte, 1)); err != io.EOF {
				t.Fatalf("Read = %d, %v, want EOF", n, err)
			}
			want := bytes.Repeat([]byte("reply"), 1<<20)
			go func() { _, _ = b.Write(want); _ = b.CloseWrite() }()
			got, err := io.ReadAll(a)
			if err != nil || !bytes.Equal(got, want) {
				t.Fatalf("got %d bytes, %v, want %d", len(got), err, len(want))
			}
			if res := wait(t, result); res.Err != nil || res.Reset != ResetByNone {
				t.Errorf("result %+v", res)
			}
			if res := wait(t, w.results); res.Err != nil {
				t.Errorf("server result %+v", res)
			}
		})
	}
}

// Case 38: an application's RST travels, after the bytes before it.
func TestI38_Reset(t *testing.T) {
	for _, name := range []string{"source", "destination"} {
		t.Run(name, func(t *testing.T) {
			w := newPipeWorld(t, worldConfig{})
			defer w.close()
			a, b, result := w.connect(context.Background())
			near, far := result, w.results
			if name == "destination" {
				a, b, near, far = b, a, w.results, result
			}
			if _, err := a.Write([]byte("last words")); err != nil {
				t.Fatal(err)
			}
			buf := make([]byte, 10)
			if _, err := io.ReadFull(b, buf); err != nil {
				t.Fatal(err)
			}
			if err := (sock{a}).Abort(); err != nil {
				t.Fatal(err)
			}
			if _, err := b.Read(buf); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("Read = %v, want ECONNRESET", err)
			}
			if res := wait(t, near); res.Reset != ResetBySocket || res.Err != nil {
				t.Errorf("near result %+v", res)
			}
			if res := wait(t, far); res.Reset != ResetByPeer || res.Err != nil {
				t.Errorf("far result %+v", res)
			}
		})
	}
}

// Loss of the tunnel becomes RST at both applications; a context's end too, with its cause.
func TestPipeTunnelLost(t *testing.T) {
	w := newPipeWorld(t, worldConfig{})
	defer w.close()
	src, dst, result := w.connect(context.Background())
	cause := errors.New("revoked")
	w.pool.Abort(func(string, *ConnInfo) bool { return true }, cause)
	for _, c := range []net.Conn{src, dst} {
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("Read = %v, want ECONNRESET", err)
		}
	}
	var ce *ConnError
	if res := wait(t, result); !errors.Is(res.Err, cause) || !errors.As(res.Err, &ce) {
		t.Errorf("client result %+v", res)
	}
	if res := wait(t, w.results); !errors.As(res.Err, &ce) {
		t.Errorf("server result %+v", res)
	}
}

func TestPipeContext(t *testing.T) {
	w := newPipeWorld(t, worldConfig{})
	defer w.close()
	ctx, cancel := context.WithCancelCause(context.Background())
	src, dst, result := w.connect(ctx)
	cause := errors.New("policy changed")
	cancel(cause)
	for _, c := range []net.Conn{src, dst} {
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("Read = %v, want ECONNRESET", err)
		}
	}
	if res := wait(t, result); res.Err != cause {
		t.Errorf("client result %+v, want cause", res)
	}
	var se *StreamError
	if res := wait(t, w.results); !errors.As(res.Err, &se) || se.Code != ErrCancel || !se.Remote {
		t.Errorf("server result %+v, want CANCEL", res)
	}
}

// Case 32: streams whose applications do not read stop nobody else, and cost
// their window at most.
func TestI32_StalledReaders(t *testing.T) {
	budget := NewBudget(1 << 30)
	w := newPipeWorld(t, worldConfig{server: Config{Budget: budget}})
	defer w.close()
	const stalled = 20
	for range stalled {
		src, _, _ := w.connect(context.Background())
		go func() { _, _ = io.Copy(struct{ io.Writer }{src}, zeros{}) }()
	}
	src, dst, _ := w.connect(context.Background())
	go func() { _, _ = io.Copy(dst, dst) }()
	buf := make([]byte, 1024)
	for range 500 {
		if _, err := src.Write(buf); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(src, buf); err != nil {
			t.Fatal(err)
		}
	}
	if got, limit := budget.Used(), int64(stalled*5<<20); got > limit {
		t.Errorf("queued %d bytes, want at most %d", got, limit)
	}
	if w.pool.Len() != 1 {
		t.Errorf("%d tunnels, want 1", w.pool.Len())
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

func TestPipeTwice(t *testing.T) {
	w := newPipeWorld(t, worldConfig{})
	defer w.close()
	st := w.open("k")
	app, ours := tcpPair(t)
	defer app.Close()
	done := make(chan Result, 1)
	go func() { done <- st.Pipe(context.Background(), sock{ours}, &Meter{FromSocket: new(atomic.Uint64)}) }()
	dst := <-w.dsts
	defer dst.Close()
	_, _ = app.Write([]byte("x"))
	_, _ = io.ReadFull(dst, make([]byte, 1)) // the pipe runs
	if _, err := st.Read(make([]byte, 1)); err != ErrPiped {
		t.Errorf("Read = %v, want ErrPiped", err)
	}
	if _, err := st.Write(make([]byte, 1)); err != ErrPiped {
		t.Errorf("Write = %v, want ErrPiped", err)
	}
	a2, b2 := tcpPair(t)
	defer a2.Close()
	if res := st.Pipe(context.Background(), sock{b2}, nil); res.Err != ErrPiped {
		t.Errorf("Pipe = %+v, want ErrPiped", res)
	}
	app.Close()
	dst.Close()
	wait(t, done)
}
