package hbone

import (
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// Drain serves what crossed the first GOAWAY and ends when all streams have.
func TestServerDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sc := newServerCase(t, Config{PingInterval: -1}, nil)
		sc.hello()
		_ = sc.headers(1, false, connectFields...)
		sc.wait("HEADERS 1 200")
		sc.srv.Drain()
		sc.wait("GOAWAY 2147483647 NO_ERROR")
		_ = sc.headers(3, false, connectFields...) // crosses
		sc.wait("PING \"drain")
		sc.wait("HEADERS 3 200")
		_ = sc.fr.WritePing(true, drainData)
		sc.wait("GOAWAY 3 NO_ERROR")
		_ = sc.headers(5, false, connectFields...) // too late
		sc.wait("RST 5 REFUSED_STREAM")
		_ = sc.fr.WriteData(1, true, []byte("x"))
		sc.wait(`DATA 1 "x"`)
		_ = sc.fr.WriteData(3, true, nil)
		sc.wait("GOAWAY 5 NO_ERROR")
		if err := <-sc.result; err != nil {
			t.Errorf("ServeConn = %v, want nil", err)
		}
		sc.nc.Close()
		sc.cancel(nil)
	})
}

// A tunnel that comes during a drain, or has just come, has a second for its first
// stream: no GOAWAY stands before the answer. Then it drains as the others.
func TestDrainBeforeFirstStream(t *testing.T) {
	for _, late := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			begin := time.Now()
			sc := newServerCase(t, Config{PingInterval: -1}, nil)
			defer sc.nc.Close()
			if late { // ServeConn has not begun: it is not durably blocked
				sc.srv.Drain()
			}
			sc.hello()
			synctest.Wait()
			if !late {
				sc.srv.Drain()
			}
			synctest.Wait()
			_ = sc.headers(1, false, connectFields...)
			sc.wait("HEADERS 1 200")
			sc.wait("GOAWAY 2147483647 NO_ERROR")
			if d := time.Since(begin); d != firstStreamWait {
				t.Errorf("drained after %v, want %v", d, firstStreamWait)
			}
			sc.wait("PING \"drain")
			_ = sc.fr.WritePing(true, drainData)
			sc.wait("GOAWAY 1 NO_ERROR")
			_ = sc.fr.WriteData(1, true, nil)
			sc.wait("GOAWAY 1 NO_ERROR")
			want := map[bool]error{true: ErrServerDraining}[late]
			if err := <-sc.result; err != want {
				t.Errorf("late %v: ServeConn = %v, want %v", late, err, want)
			}
		})
	}
}

// One that never has a stream ends, too.
func TestDrainWithoutStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sc := newServerCase(t, Config{PingInterval: -1}, nil)
		defer sc.nc.Close()
		sc.hello()
		synctest.Wait()
		sc.srv.Drain()
		sc.srv.Drain() // twice is once
		sc.wait("GOAWAY 2147483647 NO_ERROR")
		sc.wait("PING \"drain")
		_ = sc.fr.WritePing(true, drainData)
		sc.wait("GOAWAY 0 NO_ERROR")
		if err := <-sc.result; err != nil {
			t.Errorf("ServeConn = %v, want nil", err)
		}
	})
}

// GoAway is for the tunnels that are there; those that come are served until Drain.
func TestServerGoAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sc := newServerCase(t, Config{PingInterval: -1}, nil)
		sc.hello()
		_ = sc.headers(1, false, connectFields...)
		sc.wait("HEADERS 1 200")
		sc.srv.GoAway()
		sc.wait("GOAWAY 2147483647 NO_ERROR")
		sc.end()

		c, s := net.Pipe()
		next := newRawPeer(t, c)
		result := make(chan error, 1)
		go func() { result <- sc.srv.ServeConn(t.Context(), s, nil, echoHandler) }()
		go next.read()
		_, _ = io.WriteString(c, clientPreface)
		_ = next.fr.WriteSettings()
		_ = next.headers(1, false, connectFields...)
		next.wait("HEADERS 1 200")
		sc.srv.GoAway()
		next.wait("GOAWAY 2147483647 NO_ERROR") // by now it is one that is there
		c.Close()
		<-result
	})
}

// A client whose streams cross a drain, again and again, sees none fail: refused
// ones are tried on another tunnel, and one that it has just made takes them.
func TestPoolSurvivesDrains(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLifecycle(t, nil)
		defer l.close()
		var clients sync.WaitGroup
		stop := make(chan struct{})
		for range 5 {
			clients.Go(func() {
				for !isClosed(stop) {
					st, err := l.pool.Open(t.Context(), "a", "a:1")
					if err != nil {
						t.Error(err)
						return
					}
					_ = st.CloseWrite()
					if _, err := io.ReadAll(st); err != nil {
						t.Error(err)
					}
					st.Close()
					time.Sleep(5 * time.Millisecond)
				}
			})
		}
		for range 50 {
			time.Sleep(7 * time.Millisecond)
			l.server.GoAway()
		}
		l.server.Drain() // also every one to come
		time.Sleep(3 * time.Second)
		close(stop)
		clients.Wait()
	})
}

// A drain under load loses no stream.
func TestDrainRace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, worldConfig{plain: true})
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				for range 20 {
					st := w.open("a")
					if _, err := st.Write([]byte("x")); err != nil {
						t.Error(err)
					}
					_ = st.CloseWrite()
					if b, err := io.ReadAll(st); string(b) != "x" || err != nil {
						t.Errorf("read %q, %v", b, err)
					}
					st.Close()
				}
			})
		}
		for range 5 {
			w.srv.mu.Lock()
			var conns []*conn
			for c := range w.srv.conns {
				conns = append(conns, c)
			}
			w.srv.mu.Unlock()
			for _, c := range conns {
				c.drain()
			}
		}
		wg.Wait()
		w.close()
	})
}
