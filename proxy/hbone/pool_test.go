package hbone

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// poolCase runs a pool test in a bubble, which also finds leaked goroutines.
func poolCase(t *testing.T, wc worldConfig, fn func(t *testing.T, w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, wc)
		fn(t, w)
		w.close()
	})
}

func (w *world) counts(dialed, closed int64) {
	w.t.Helper()
	synctest.Wait()
	if d, c := w.dialed.Load(), w.closed.Load(); d != dialed || c != closed {
		w.t.Errorf("%d connections, %d closed, want %d and %d", d, c, dialed, closed)
	}
}

// openN opens n streams concurrently.
func (w *world) openN(key string, n int) []Stream {
	w.t.Helper()
	streams := make([]Stream, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			var err error
			if streams[i], err = w.pool.Open(context.Background(), key, "a:1"); err != nil {
				w.t.Errorf("Open: %v", err)
			}
		})
	}
	wg.Wait()
	return streams
}

func closeAll(streams []Stream) {
	for _, st := range streams {
		if st != nil {
			st.Close()
		}
	}
}

func capped(n int) worldConfig {
	return worldConfig{pool: PoolConfig[string]{MaxStreams: n}}
}

func TestP01_ConnectionsReused(t *testing.T) {
	poolCase(t, capped(3), func(t *testing.T, w *world) {
		for range 2 {
			closeAll(w.openN("a", 2))
			synctest.Wait()
		}
		w.counts(1, 0)
		w.pool.Close()
		w.counts(1, 1)
	})
}

func TestP02_ReadBuffering(t *testing.T) {
	wc := worldConfig{handler: func(_ context.Context, r *Request) {
		st, _ := r.Accept()
		_, _ = st.Write([]byte("poolsrv\n"))
		_, _ = st.Read(make([]byte, 1)) // until the end
		st.Close()
	}}
	poolCase(t, wc, func(t *testing.T, w *world) {
		st := w.open("a")
		for _, want := range []string{"pool", "srv"} {
			b := make([]byte, len(want))
			if _, err := io.ReadFull(st, b); err != nil || string(b) != want {
				t.Fatalf("Read = %q, %v, want %q", b, err, want)
			}
		}
		synctest.Wait()
		w.pool.Close()
		b := make([]byte, 8)
		if n, err := st.Read(b); n != 1 || b[0] != '\n' || err != nil {
			t.Fatalf("Read = %q, %v, want the rest", b[:n], err)
		}
		if n, err := st.Read(b); n != 0 || !errors.Is(err, ErrPoolClosed) {
			t.Fatalf("Read = %d, %v, want ErrPoolClosed", n, err)
		}
		st.Close()
	})
}

func TestP03_UniqueKeys(t *testing.T) {
	poolCase(t, capped(3), func(t *testing.T, w *world) {
		closeAll(append(w.openN("a", 1), w.openN("b", 1)...))
		w.counts(2, 0)
		w.pool.Close()
		w.counts(2, 2)
	})
}

// As decision D9 amends it: capped tunnels return to the pool.
func TestP04_ConnectionLimits(t *testing.T) {
	poolCase(t, capped(2), func(t *testing.T, w *world) {
		closeAll(w.openN("a", 4))
		w.counts(2, 0)
		closeAll(w.openN("a", 5))
		w.counts(3, 0)
		w.pool.Close()
		w.counts(3, 3)
	})
}

func TestP05_ServerGoAway(t *testing.T) {
	poolCase(t, capped(2), func(t *testing.T, w *world) {
		held := w.open("a")
		w.srv.Drain()
		synctest.Wait()
		w.srv.mu.Lock()
		w.srv.draining = false // a server that only recycles its old tunnels
		w.srv.mu.Unlock()
		st := w.open("a")
		w.counts(2, 0)
		if _, err := held.Write([]byte("x")); err != nil {
			t.Errorf("stream of the old tunnel: %v", err)
		}
		if _, err := held.Read(make([]byte, 1)); err != nil {
			t.Errorf("stream of the old tunnel: %v", err)
		}
		held.Close()
		w.counts(2, 1)
		if err := <-w.closedCh; err != nil {
			t.Errorf("ServeConn = %v, want nil", err)
		}
		st.Close()
	})
}

func TestP06_SinglePool(t *testing.T) {
	poolCase(t, capped(1), func(t *testing.T, w *world) {
		closeAll(w.openN("a", 2))
		w.counts(2, 0)
		w.pool.Close()
		w.counts(2, 2)
	})
	poolCase(t, capped(1), func(t *testing.T, w *world) {
		for range 2 {
			w.open("a").Close()
			synctest.Wait()
		}
		w.counts(1, 0)
	})
}

func TestP07_StressSingleSource(t *testing.T) {
	poolCase(t, capped(101), func(t *testing.T, w *world) {
		closeAll(w.openN("a", 100))
		w.counts(1, 0)
		w.pool.Close()
		w.counts(1, 1)
	})
}

func TestP08_StressMultipleSource(t *testing.T) {
	wc := capped(100)
	wc.plain = true // a hundred handshakes prove nothing here
	poolCase(t, wc, func(t *testing.T, w *world) {
		var streams []Stream
		for i := range 100 {
			streams = append(streams, w.openN(fmt.Sprint(i), 1)...)
		}
		closeAll(streams)
		w.counts(100, 0)
		w.pool.Close()
		w.counts(100, 100)
		if s := w.pool.Stats(); s.Keys != 0 || s.Tunnels != 0 || s.Streams != 0 || s.Closed != 100 {
			t.Errorf("Stats = %+v, want nothing left", s)
		}
	})
}

func TestP09_ManyClientsManySources(t *testing.T) {
	wc := capped(100)
	poolCase(t, wc, func(t *testing.T, w *world) {
		var wg sync.WaitGroup
		for i := range 3 {
			wg.Go(func() { closeAll(w.openN(fmt.Sprint(i), 100)) })
		}
		wg.Wait()
		w.counts(3, 0)
		w.pool.Close()
		w.counts(3, 3)
	})
}

func TestP10_IdleEviction(t *testing.T) {
	wc := capped(3)
	wc.pool.IdleTimeout = 100 * time.Millisecond
	poolCase(t, wc, func(t *testing.T, w *world) {
		closeAll(w.openN("a", 1))
		w.counts(1, 0)
		time.Sleep(99 * time.Millisecond)
		w.counts(1, 0)
		time.Sleep(2 * time.Millisecond)
		w.counts(1, 1)
		if err := <-w.closedCh; err != nil {
			t.Errorf("ServeConn = %v, want nil", err)
		}
		if s := w.pool.Stats(); s.Keys != 0 {
			t.Errorf("Stats = %+v, want no keys", s)
		}
	})
}

func TestP11_IdleEvictionWithPersistent(t *testing.T) {
	wc := capped(4)
	wc.pool.IdleTimeout = 100 * time.Millisecond
	poolCase(t, wc, func(t *testing.T, w *world) {
		persistent := w.openN("a", 1)
		closeAll(w.openN("a", 4)) // one more than fits
		w.counts(2, 0)
		time.Sleep(200 * time.Millisecond)
		w.counts(2, 1)
		closeAll(persistent)
		time.Sleep(200 * time.Millisecond)
		w.counts(2, 2)
	})
}

// D9: one dial for many, one error for all.
func TestDialErrorShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		boom := errors.New("no route")
		var dials atomic.Int64
		gate := make(chan struct{})
		w := newWorld(t, worldConfig{onDial: func() error { dials.Add(1); <-gate; return boom }})
		errs := make(chan error, 10)
		for range 10 {
			go func() {
				_, err := w.pool.Open(context.Background(), "a", "a:1")
				errs <- err
			}()
		}
		synctest.Wait()
		if s := w.pool.Stats(); s.Dialing != 1 {
			t.Errorf("Stats = %+v, want one dial", s)
		}
		close(gate)
		for range 10 {
			if err := <-errs; err != boom {
				t.Errorf("Open = %v, want the dial's error as it is", err)
			}
		}
		if n := dials.Load(); n != 1 {
			t.Errorf("%d dials, want 1", n)
		}
		if s := w.pool.Stats(); s.Keys != 0 {
			t.Errorf("Stats = %+v, want no keys", s)
		}
		w.close()
	})
}

// A waiter that leaves does not end the dial for others; the last one does.
func TestDialWaitersLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var ended atomic.Bool
		p := NewPool(PoolConfig[string]{Dial: func(ctx context.Context, _ string) (net.Conn, Handshake, error) {
			<-ctx.Done()
			ended.Store(true)
			return nil, Handshake{}, context.Cause(ctx)
		}})
		cause := errors.New("left")
		var cancels []context.CancelCauseFunc
		errs := make(chan error, 2)
		for range 2 {
			ctx, cancel := context.WithCancelCause(context.Background())
			cancels = append(cancels, cancel)
			go func() {
				_, err := p.Open(ctx, "a", "a:1")
				errs <- err
			}()
		}
		synctest.Wait()
		cancels[0](cause)
		if err := <-errs; err != cause {
			t.Errorf("Open = %v, want %v", err, cause)
		}
		synctest.Wait()
		if ended.Load() {
			t.Error("dial ended though somebody waits")
		}
		cancels[1](cause)
		<-errs
		synctest.Wait()
		if !ended.Load() {
			t.Error("dial goes on though nobody waits")
		}
		p.Close()
		if _, err := p.Open(context.Background(), "a", "a:1"); err != ErrPoolClosed {
			t.Errorf("Open = %v, want ErrPoolClosed", err)
		}
	})
}

func TestPoolRetire(t *testing.T) {
	poolCase(t, capped(10), func(t *testing.T, w *world) {
		old := w.open("a")
		other := w.open("b")
		w.pool.Retire(func(k string, info *ConnInfo) bool { return k == "a" && len(info.TLS.PeerCertificates) == 1 }, errors.New("rotated"))
		next := w.open("a")
		w.counts(3, 0)
		if _, err := old.Write([]byte("x")); err != nil {
			t.Errorf("stream of a retired tunnel: %v", err)
		}
		old.Close()
		w.counts(3, 1)
		closeAll([]Stream{other, next})
	})
}

// Retire judges a dial that is in progress when it is done.
func TestPoolRetireWhileDialling(t *testing.T) {
	wc := worldConfig{}
	var once sync.Once
	var w *world
	wc.onDial = func() error {
		once.Do(func() { w.pool.Retire(func(string, *ConnInfo) bool { return true }, errors.New("rotated")) })
		return nil
	}
	synctest.Test(t, func(t *testing.T) {
		w = newWorld(t, wc)
		w.open("a").Close()
		w.counts(2, 1)
		w.close()
	})
}

func TestPoolDrain(t *testing.T) {
	poolCase(t, capped(10), func(t *testing.T, w *world) {
		st := w.open("a")
		w.pool.Drain()
		if _, err := w.pool.Open(context.Background(), "a", "a:1"); err != ErrPoolClosed {
			t.Errorf("Open = %v, want ErrPoolClosed", err)
		}
		w.counts(1, 0)
		st.Close()
		w.counts(1, 1)
		if err := <-w.closedCh; err != nil {
			t.Errorf("ServeConn = %v, want nil", err)
		}
	})
}

// Case 23: a server that allows fewer streams than the pool would use.
func TestI23_PeerLimit(t *testing.T) {
	wc := capped(100)
	wc.server.MaxStreams = 2
	poolCase(t, wc, func(t *testing.T, w *world) {
		closeAll(w.openN("a", 6))
		w.counts(3, 0)
		if n := w.stats.Refused.Load(); n != 0 {
			t.Errorf("%d streams refused, want none", n)
		}
	})
}

// A peer that goes away as soon as it is connected is not dialled for ever.
func TestOpenDrainingServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cc := newClientCase(t, Config{}, func(p *rawPeer) {
			_, _ = p.nc.Write(appendGoAway(appendSettings(nil), 0, ErrNo, ""))
		})
		_, err := cc.pool.Open(context.Background(), "a", "a:1")
		if err == nil {
			t.Error("Open succeeded")
		}
		synctest.Wait()
		if n := len(cc.peers); n > maxUseless+1 { // one more for a refused stream
			t.Errorf("%d dials, want at most %d (%v)", n, maxUseless+1, err)
		}
		cc.pool.Close()
	})
}

func TestConnsPerKey(t *testing.T) {
	wc := capped(10)
	wc.pool.ConnsPerKey = 2
	poolCase(t, wc, func(t *testing.T, w *world) {
		a := w.open("a")
		b := w.open("a")
		c := w.open("a")
		w.counts(2, 0)
		closeAll([]Stream{a, b, c})
	})
}

func TestStatusError(t *testing.T) {
	for _, body := range []string{"", "no such destination"} {
		wc := worldConfig{handler: func(_ context.Context, r *Request) {
			if err := r.Reject(503, body); err != nil {
				t.Errorf("Reject: %v", err)
			}
			if _, err := r.Accept(); err == nil {
				t.Error("Accept after Reject succeeded")
			}
		}}
		poolCase(t, wc, func(t *testing.T, w *world) {
			for range 3 {
				_, err := w.pool.Open(context.Background(), "a", "a:1")
				var se *StatusError
				if !errors.As(err, &se) || se.Code != 503 {
					t.Errorf("Open = %v, want status 503", err)
				}
			}
			w.counts(1, 0)
		})
	}
}

// Expired leaves take no new streams, on either side.
func TestExpiredLeaf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server := tlsPairUntil(t, time.Now().Add(time.Hour))
		fresh, freshServer := tlsPairUntil(t, time.Now().Add(24*time.Hour))
		srv := NewServer(Config{})
		var wg sync.WaitGroup
		p := NewPool(PoolConfig[string]{Dial: func(context.Context, string) (net.Conn, Handshake, error) {
			c, s := net.Pipe()
			scfg := server
			wg.Go(func() {
				if err := srv.ServeConn(context.Background(), s, func(context.Context) (Handshake, error) { return Handshake{TLS: scfg}, nil }, echoHandler); err != nil {
					t.Errorf("ServeConn = %v", err)
				}
			})
			return c, Handshake{TLS: client}, nil
		}})
		st, err := p.Open(context.Background(), "a", "a:1")
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(61 * time.Minute)
		client, server = fresh, freshServer
		st2, err := p.Open(context.Background(), "a", "a:1")
		if err != nil {
			t.Fatal(err)
		}
		if p.Len() != 2 || st.Conn() == st2.Conn() {
			t.Errorf("%d tunnels, want a new one beside the expired one", p.Len())
		}
		if _, err := st.Write([]byte("x")); err != nil {
			t.Errorf("running stream: %v", err)
		}
		st.Close()
		st2.Close()
		p.Drain()
		synctest.Wait()
		p.Close()
		wg.Wait()
	})
}

// Each phase of a failed Open is recognisable.
func TestOpenPhases(t *testing.T) {
	serve := func(fn func(net.Conn)) func(context.Context, string) (net.Conn, Handshake, error) {
		return func(context.Context, string) (net.Conn, Handshake, error) {
			c, s := net.Pipe()
			go fn(s)
			return c, Handshake{}, nil
		}
	}
	clientTLS, serverTLS := tlsPair(t)
	_, stranger := tlsPair(t)
	withTLS := func(cfg *tls.Config) func(context.Context, string) (net.Conn, Handshake, error) {
		return func(context.Context, string) (net.Conn, Handshake, error) {
			c, s := net.Pipe()
			go func() {
				_ = NewServer(Config{}).ServeConn(context.Background(), s,
					func(context.Context) (Handshake, error) { return Handshake{TLS: cfg}, nil }, echoHandler)
			}()
			return c, Handshake{TLS: clientTLS}, nil
		}
	}
	noALPN := serverTLS.Clone()
	noALPN.NextProtos = nil
	distrust := serverTLS.Clone()
	distrust.ClientCAs = stranger.ClientCAs
	for _, tt := range []struct {
		name string
		dial func(context.Context, string) (net.Conn, Handshake, error)
		want func(error) bool
	}{
		{"server certificate not trusted", withTLS(stranger), isType[*HandshakeError]},
		{"client certificate not trusted", withTLS(distrust), isType[*HandshakeError]},
		{"no ALPN", withTLS(noALPN), isType[*PrefaceError]},
		{"HTTP/1.1 server", serve(func(s net.Conn) {
			go io.Copy(io.Discard, s)
			io.WriteString(s, "HTTP/1.1 400 Bad Request\r\n\r\n")
			s.Close()
		}), isType[*PrefaceError]},
		{"closed at once", serve(func(s net.Conn) { s.Close() }), isType[*PrefaceError]},
		{"silent", serve(func(s net.Conn) { io.Copy(io.Discard, s) }), func(err error) bool {
			return isType[*PrefaceError](err) && errors.Is(err, context.DeadlineExceeded)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := NewPool(PoolConfig[string]{Dial: tt.dial})
				start := time.Now()
				_, err := p.Open(context.Background(), "a", "a:1")
				if !tt.want(err) {
					t.Errorf("Open = %T %v", err, err)
				}
				if d := time.Since(start); d > 10*time.Second {
					t.Errorf("took %v, want at most 10s", d)
				}
				p.Close()
			})
		})
	}
}

func isType[E error](err error) bool {
	var e E
	return errors.As(err, &e)
}

func TestOpenInvalid(t *testing.T) {
	p := NewPool(PoolConfig[string]{})
	for _, tt := range []struct {
		authority string
		field     Field
	}{{"", Field{"a", "b"}}, {"a:1\r\n", Field{"a", "b"}}, {"a:1", Field{"A", "b"}}, {"a:1", Field{"a", "b\n"}}, {"a:1", Field{"connection", "close"}}} {
		if _, err := p.Open(context.Background(), "a", tt.authority, tt.field); err == nil {
			t.Errorf("Open(%q, %v) succeeded", tt.authority, tt.field)
		} else if strings.Contains(err.Error(), "\n") {
			t.Errorf("error %q is no single line", err)
		}
	}
}

// A tunnel that has reached its greatest age takes no new streams; those that it
// has go on.
func TestMaxAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := NewServer(Config{})
		var wg sync.WaitGroup
		p := NewPool(PoolConfig[string]{MaxAge: time.Hour, Dial: func(context.Context, string) (net.Conn, Handshake, error) {
			c, s := net.Pipe()
			wg.Go(func() {
				if err := srv.ServeConn(context.Background(), s, nil, echoHandler); err != nil {
					t.Errorf("ServeConn = %v", err)
				}
			})
			return c, Handshake{}, nil
		}})
		first, err := p.Open(t.Context(), "a", "a:1")
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour - time.Second)
		young, err := p.Open(t.Context(), "a", "a:1")
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		old, err := p.Open(t.Context(), "a", "a:1")
		if err != nil {
			t.Fatal(err)
		}
		if young.Conn() != first.Conn() || old.Conn() == first.Conn() {
			t.Errorf("same tunnel before the age: %t, after: %t", young.Conn() == first.Conn(), old.Conn() == first.Conn())
		}
		if _, err := first.Write([]byte("x")); err != nil {
			t.Errorf("running stream: %v", err)
		}
		for _, st := range []Stream{first, young, old} {
			st.Close()
		}
		p.Drain()
		synctest.Wait()
		p.Close()
		wg.Wait()
	})
}
