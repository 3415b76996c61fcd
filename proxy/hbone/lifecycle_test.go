package hbone

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// lifecycle is a server and a pool whose handshakes tell of their tunnels.
type lifecycle struct {
	pool   *Pool[string]
	server *Server

	mu         sync.Mutex
	up         map[string][]*ConnInfo // by "client" and "server"
	ended      map[string]int
	atOnce     func(*ConnInfo) // called with each tunnel of the client, before it has streams
	serveCalls sync.WaitGroup
}

func newLifecycle(t *testing.T, atOnce func(*ConnInfo)) *lifecycle {
	t.Helper()
	l := &lifecycle{up: map[string][]*ConnInfo{}, ended: map[string]int{}, atOnce: atOnce}
	client, server := tlsPair(t)
	l.server = NewServer(Config{PingInterval: -1})
	track := func(who string, conf *tls.Config) Handshake {
		return Handshake{TLS: conf, Established: func(info *ConnInfo) func() {
			l.mu.Lock()
			l.up[who] = append(l.up[who], info)
			l.mu.Unlock()
			if who == "client" && l.atOnce != nil {
				l.atOnce(info)
			}
			return func() {
				l.mu.Lock()
				defer l.mu.Unlock()
				l.ended[who]++
			}
		}}
	}
	l.pool = NewPool(PoolConfig[string]{Config: Config{PingInterval: -1}, Dial: func(context.Context, string) (net.Conn, Handshake, error) {
		c, s := net.Pipe()
		l.serveCalls.Go(func() {
			_ = l.server.ServeConn(context.Background(), s, func(context.Context) (Handshake, error) { return track("server", server), nil }, echoHandler)
		})
		return c, track("client", client), nil
	}})
	return l
}

func (l *lifecycle) close() {
	l.pool.Close()
	l.serveCalls.Wait()
}

func (l *lifecycle) counts(who string) (up, ended int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.up[who]), l.ended[who]
}

// Established is called once for each tunnel of either role, with the result of
// the handshake, and its result once after the end.
func TestEstablished(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLifecycle(t, nil)
		defer l.close()
		for range 3 {
			st, err := l.pool.Open(t.Context(), "a", "a:1")
			if err != nil {
				t.Fatal(err)
			}
			defer st.Close()
		}
		for _, who := range []string{"client", "server"} {
			if up, ended := l.counts(who); up != 1 || ended != 0 {
				t.Errorf("%s: %d tunnels, %d ended, want one that lives", who, up, ended)
			}
			if info := l.up[who][0]; len(info.TLS.PeerCertificates) != 1 {
				t.Errorf("%s: told of a tunnel without its peer's certificate", who)
			}
		}
		l.pool.Close()
		synctest.Wait()
		for _, who := range []string{"client", "server"} {
			if up, ended := l.counts(who); up != 1 || ended != 1 {
				t.Errorf("%s: %d tunnels, %d ended, want one that has", who, up, ended)
			}
		}
	})
}

// Terminate resets the streams with CANCEL, in both roles, and leaves nothing
// that could carry new ones. It may be called again, and by many.
func TestTerminate(t *testing.T) {
	for _, who := range []string{"client", "server"} {
		t.Run(who, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newLifecycle(t, nil)
				defer l.close()
				var streams []Stream
				for range 3 {
					st, err := l.pool.Open(t.Context(), "a", "a:1")
					if err != nil {
						t.Fatal(err)
					}
					streams = append(streams, st)
				}
				cause := errors.New("revoked")
				start := time.Now()
				var calls sync.WaitGroup
				for range 3 {
					calls.Go(func() { l.up[who][0].Terminate(cause) })
				}
				calls.Wait()
				for _, st := range streams {
					_, err := st.Read(make([]byte, 1))
					var reset *StreamError
					switch {
					case who == "client" && !errors.Is(err, cause):
						t.Errorf("our stream ended with %v, want %v", err, cause)
					case who == "server" && (!errors.As(err, &reset) || !reset.Remote || reset.Code != ErrCancel):
						t.Errorf("the peer's stream ended with %v, want CANCEL", err)
					}
				}
				synctest.Wait()
				for _, side := range []string{"client", "server"} {
					if _, ended := l.counts(side); ended != 1 {
						t.Errorf("%s: %d tunnels ended, want 1", side, ended)
					}
				}
				if d := time.Since(start); d > 2*closeGrace {
					t.Errorf("the end took %v", d)
				}
				st, err := l.pool.Open(t.Context(), "a", "a:1")
				if err != nil {
					t.Fatalf("Open after the end: %v", err)
				}
				st.Close()
			})
		})
	}
}

// A tunnel that is terminated as it is established carries nothing, and whoever
// waited for it dials anew.
func TestTerminateWhenEstablished(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first := true
		l := newLifecycle(t, func(info *ConnInfo) {
			if first {
				first = false
				info.Terminate(errors.New("revoked meanwhile"))
			}
		})
		defer l.close()
		st, err := l.pool.Open(t.Context(), "a", "a:1")
		if err != nil {
			t.Fatal(err)
		}
		st.Close()
		synctest.Wait()
		if up, ended := l.counts("client"); up != 2 || ended != 1 {
			t.Errorf("%d tunnels, %d ended, want the second to live", up, ended)
		}
	})
}

// Drain lets the streams go on and makes the pool dial anew, whichever side asks
// for it.
func TestDrainOfOneTunnel(t *testing.T) {
	for _, who := range []string{"client", "server"} {
		t.Run(who, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newLifecycle(t, nil)
				defer l.close()
				old, err := l.pool.Open(t.Context(), "a", "a:1")
				if err != nil {
					t.Fatal(err)
				}
				l.up[who][0].Drain()
				for range 3 { // also while the GOAWAY is on its way
					st, err := l.pool.Open(t.Context(), "a", "a:1")
					if err != nil {
						t.Fatal(err)
					}
					st.Close()
				}
				synctest.Wait()
				if up, ended := l.counts("client"); up != 2 || ended != 0 {
					t.Errorf("%d tunnels, %d ended, want two", up, ended)
				}
				if _, err := old.Write([]byte("x")); err != nil {
					t.Errorf("the old stream: %v", err)
				}
				if _, err := old.Read(make([]byte, 1)); err != nil {
					t.Errorf("the old stream: %v", err)
				}
				old.Close()
				time.Sleep(2 * closeGrace)
				if _, ended := l.counts("client"); ended != 1 {
					t.Errorf("%d tunnels ended after their last stream, want 1", ended)
				}
			})
		})
	}
}
