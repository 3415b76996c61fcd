//lint:file-ignore SA1019 golang.org/x/net/http2 is the reference codec of these tests

package hbone

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/nettest"
)

// A stream in pull mode is a net.Conn like any other.
func TestNetConn(t *testing.T) {
	for _, tcp := range []bool{false, true} {
		nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
			accepted := make(chan Stream, 1)
			w := newWorld(t, worldConfig{tcp: tcp, handler: func(ctx context.Context, r *Request) {
				st, err := r.Accept()
				if err != nil {
					t.Error(err)
				}
				accepted <- st
			}})
			c1 = w.open("a")
			c2 = <-accepted
			return c1, c2, func() { c1.Close(); c2.Close(); w.close() }, nil
		})
	}
}

// The end of the server's context ends handlers and streams with its cause.
func TestServerForced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cause := errors.New("deadline of the drain")
		got := make(chan error, 2)
		w := newWorld(t, worldConfig{handler: func(ctx context.Context, r *Request) {
			if r.Authority == "wait" {
				<-ctx.Done()
				got <- context.Cause(ctx)
				return
			}
			st, _ := r.Accept()
			_, err := st.Read(make([]byte, 1))
			got <- err
			st.Close()
		}})
		st := w.open("a")
		go func() { _, _ = w.pool.Open(context.Background(), "a", "wait") }()
		synctest.Wait()
		w.cancel(cause)
		for range 2 {
			if err := <-got; !errors.Is(err, cause) {
				t.Errorf("handler saw %v, want %v", err, cause)
			}
		}
		if err := <-w.closedCh; err != cause {
			t.Errorf("ServeConn = %v, want %v", err, cause)
		}
		st.Close()
		w.close()
	})
}

// A handler's context ends when its client gives up before the answer.
func TestHandlerContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		got := make(chan error, 1)
		w := newWorld(t, worldConfig{handler: func(ctx context.Context, r *Request) {
			<-ctx.Done()
			got <- context.Cause(ctx)
			if _, err := r.Accept(); err == nil {
				t.Error("Accept succeeded on a stream that has ended")
			}
		}})
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if _, err := w.pool.Open(ctx, "a", "a:1"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Open = %v", err)
		}
		var se *StreamError
		if err := <-got; !errors.As(err, &se) || se.Code != ErrCancel || !se.Remote {
			t.Errorf("cause %v, want CANCEL", err)
		}
		w.close()
	})
}

// D21: a panic ends one stream; one without an answer does too.
func TestHandlerPanic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, worldConfig{handler: func(ctx context.Context, r *Request) {
			switch r.Authority {
			case "panic":
				panic("boom")
			case "nothing":
				return
			}
			echoHandler(ctx, r)
		}})
		canary := w.open("a")
		for _, authority := range []string{"panic", "nothing"} {
			_, err := w.pool.Open(context.Background(), "a", authority)
			var se *StreamError
			if !errors.As(err, &se) || se.Code != ErrInternal {
				t.Errorf("Open(%q) = %v, want INTERNAL_ERROR", authority, err)
			}
		}
		if n := w.stats.Panics.Load(); n != 1 {
			t.Errorf("Panics = %d, want 1", n)
		}
		if _, err := canary.Write([]byte("x")); err != nil {
			t.Error(err)
		}
		canary.Close()
		w.counts(1, 0)
		w.close()
	})
}

// D10: at 75 % no credit and 503, at 100 % the longest queue is reset.
func TestBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		budget := NewBudget(1 << 20)
		streams := make(chan Stream, 10)
		w := newWorld(t, worldConfig{plain: true, server: Config{Budget: budget, InitialWindow: 512 << 10},
			handler: func(ctx context.Context, r *Request) {
				if st, err := r.Accept(); err == nil {
					streams <- st
				}
			}})
		a, b := w.open("a"), w.open("a")
		sa, sb := <-streams, <-streams
		_, _ = a.Write(make([]byte, 500<<10))
		_, _ = b.Write(make([]byte, 320<<10))
		synctest.Wait()
		if !budget.Tight() {
			t.Fatalf("used %d, want it tight", budget.Used())
		}
		_, err := w.pool.Open(context.Background(), "a", "a:1")
		var se *StatusError
		if !errors.As(err, &se) || se.Code != 503 {
			t.Errorf("Open = %v, want 503", err)
		}
		if n := w.stats.BudgetRefused.Load(); n != 1 {
			t.Errorf("BudgetRefused = %d", n)
		}
		// Reading all of it must bring the withheld credit back.
		if _, err := io.ReadFull(sb, make([]byte, 320<<10)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(sa, make([]byte, 500<<10)); err != nil {
			t.Fatal(err)
		}
		if n := budget.Used(); n != 0 {
			t.Errorf("used %d, want 0", n)
		}
		c := w.open("a")
		sc := <-streams
		for _, st := range []Stream{a, b, c} {
			go func() { _, _ = st.Write(make([]byte, 512<<10)) }()
		}
		synctest.Wait()
		if n := w.stats.BudgetResets.Load(); n == 0 {
			t.Error("no stream was reset")
		}
		if n := budget.Used(); n > 1<<20 {
			t.Errorf("used %d, more than the budget", n)
		}
		for _, st := range []Stream{a, b, c, sa, sb, sc} {
			st.Close()
		}
		synctest.Wait()
		if n := budget.Used(); n != 0 {
			t.Errorf("used %d after all streams ended, want 0", n)
		}
		w.close()
	})
}

// Case 31: whatever happens to streams, the connection's window comes back.
func TestI31_WindowConservation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := Config{ConnWindow: 256 << 10, InitialWindow: 64 << 10, PingInterval: -1}
		rng := rand.New(rand.NewPCG(1, 2))
		w := newWorld(t, worldConfig{plain: true, server: cfg, client: cfg, handler: func(ctx context.Context, r *Request) {
			switch r.Authority {
			case "reject":
				_ = r.Reject(403, "")
				return
			case "reset":
				st, err := r.Accept()
				if err == nil {
					_, _ = st.Read(make([]byte, 100))
					st.Reset(ErrCancel)
				}
				return
			case "close":
				if st, err := r.Accept(); err == nil {
					st.Close()
				}
				return
			}
			echoHandler(ctx, r)
		}})
		var wg sync.WaitGroup
		for i := range 300 {
			kind := []string{"reject", "reset", "close", "echo"}[i%4]
			n, mode := rng.IntN(200<<10), rng.IntN(3)
			wg.Go(func() {
				st, err := w.pool.Open(context.Background(), "a", kind)
				if err != nil {
					return
				}
				var reading sync.WaitGroup
				reading.Go(func() { _, _ = io.CopyN(io.Discard, st, int64(n)) })
				_, _ = st.Write(make([]byte, n))
				switch mode {
				case 0:
					st.Reset(ErrCancel)
				case 1:
					_ = st.CloseWrite()
					_, _ = io.Copy(io.Discard, struct{ io.Reader }{st})
				}
				st.Close()
				reading.Wait()
			})
		}
		wg.Wait()
		synctest.Wait()
		// A window that leaked would stall this.
		st := w.open("a")
		go func() { _, _ = st.Write(make([]byte, 4<<20)); _ = st.CloseWrite() }()
		if n, err := io.Copy(io.Discard, struct{ io.Reader }{st}); n != 4<<20 || err != nil {
			t.Errorf("echoed %d, %v", n, err)
		}
		st.Close()
		w.close()
	})
}

// Interop: x/net's client against our server, its server against our client.
func TestInteropServer(t *testing.T) {
	clientTLS, serverTLS := tlsPair(t)
	srv := NewServer(Config{})
	a, b := tcpPair(t)
	done := make(chan error, 1)
	go func() {
		done <- srv.ServeConn(context.Background(), b, func(context.Context) (Handshake, error) { return Handshake{TLS: serverTLS}, nil }, echoHandler)
	}()
	tr := &http2.Transport{}
	cc, err := tr.NewClientConn(tls.Client(a, clientTLS))
	if err != nil {
		t.Fatal(err)
	}
	pr, pw := io.Pipe()
	req := &http.Request{Method: "CONNECT", Host: "1.2.3.4:80", URL: nil, Header: http.Header{"Baggage": {"a=b"}}, Body: pr}
	req2 := httptest.NewRequest("CONNECT", "1.2.3.4:80", nil)
	req.URL = req2.URL
	go func() { _, _ = pw.Write(make([]byte, 1<<20)); pw.Close() }()
	resp, err := cc.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, resp.Body); n != 1<<20 || err != nil || resp.StatusCode != 200 {
		t.Errorf("echoed %d, %v, status %d", n, err, resp.StatusCode)
	}
	get := httptest.NewRequest("GET", "https://a/", nil)
	get.RequestURI = ""
	resp, err = cc.RoundTrip(get)
	if err != nil {
		t.Fatal(err)
	}
	if body, err := io.ReadAll(resp.Body); resp.StatusCode != 400 || string(body) != "CONNECT only\n" || err != nil {
		t.Errorf("GET: %d %q, %v", resp.StatusCode, body, err)
	}
	cc.Close()
	if err := <-done; err != nil {
		t.Errorf("ServeConn = %v, want nil", err)
	}
}

func TestInteropClient(t *testing.T) {
	clientTLS, serverTLS := tlsPair(t)
	reference := &http2.Server{}
	var wg sync.WaitGroup
	pool := NewPool(PoolConfig[string]{Dial: func(context.Context, string) (net.Conn, Handshake, error) {
		a, b := tcpPair(t)
		wg.Go(func() {
			tc := tls.Server(b, serverTLS)
			if err := tc.Handshake(); err != nil {
				t.Error(err)
			}
			reference.ServeConn(tc, &http2.ServeConnOpts{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Host == "deny:1" {
					w.WriteHeader(401)
					return
				}
				w.WriteHeader(200)
				w.(http.Flusher).Flush()
				_, _ = io.Copy(w, r.Body)
			})})
		})
		return a, Handshake{TLS: clientTLS}, nil
	}})
	st, err := pool.Open(context.Background(), "a", "1.2.3.4:80")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = st.Write(make([]byte, 3<<20)); _ = st.CloseWrite() }()
	if n, err := io.Copy(io.Discard, struct{ io.Reader }{st}); n != 3<<20 || err != nil {
		t.Errorf("echoed %d, %v", n, err)
	}
	st.Close()
	var se *StatusError
	if _, err := pool.Open(context.Background(), "a", "deny:1"); !errors.As(err, &se) || se.Code != 401 {
		t.Errorf("Open = %v, want 401", err)
	}
	pool.Close()
	wg.Wait()
}
