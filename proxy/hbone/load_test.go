package hbone

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
)

// D11: refusals and applications' resets are no abuse, however many.
func TestD11_HonestResets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, worldConfig{plain: true, handler: func(ctx context.Context, r *Request) {
			switch r.Authority {
			case "deny":
				_ = r.Reject(401, "")
			case "reset":
				if st, err := r.Accept(); err == nil {
					st.Reset(ErrConnect)
				}
			default:
				echoHandler(ctx, r)
			}
		}})
		canary := w.open("a")
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				for i := range 1000 {
					authority := []string{"deny", "reset", "echo"}[i%3]
					st, err := w.pool.Open(context.Background(), "a", authority)
					var status *StatusError
					var reset *StreamError
					switch {
					case err == nil:
						st.Reset(ErrConnect)
					case authority == "deny" && errors.As(err, &status) && status.Code == 401:
					case authority == "reset" && errors.As(err, &reset) && reset.Code == ErrConnect:
					default:
						t.Errorf("Open(%q) = %v", authority, err)
						return
					}
				}
			})
		}
		buf := make([]byte, 16)
		for range 1000 {
			if _, err := canary.Write(buf); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(canary, buf); err != nil {
				t.Fatal(err)
			}
		}
		wg.Wait()
		canary.Close()
		w.counts(1, 0)
		if n := w.stats.Floods.Load(); n != 0 {
			t.Errorf("Floods = %d, want 0", n)
		}
		w.close()
	})
}

// An idle stream holds no buffers.
func TestIdleMemory(t *testing.T) {
	if testing.Short() || raceEnabled {
		t.Skip("measures memory")
	}
	w := newPipeWorld(t, worldConfig{})
	defer w.close()
	const n = 90 // one tunnel's worth
	w.connect(context.Background())
	before := memory()
	for range n {
		w.connect(context.Background())
	}
	per := float64(memory()-before) / (2 * n) // both proxies are in this process
	t.Logf("%.1f KB per idle stream and proxy, test sockets included", per/1024)
	if per > 10<<10 {
		t.Errorf("an idle stream costs %.0f bytes, want at most 10 KB", per)
	}
}

// An idle tunnel holds no buffers either.
func TestIdleTunnelMemory(t *testing.T) {
	if testing.Short() || raceEnabled {
		t.Skip("measures memory")
	}
	w := newWorld(t, worldConfig{tcp: true, handler: func(_ context.Context, r *Request) {
		if st, err := r.Accept(); err == nil {
			_, _ = st.Read(make([]byte, 1))
			st.Close()
		}
	}})
	defer w.close()
	const n = 50
	w.open("warm")
	before := memory()
	for i := range n {
		w.open(fmt.Sprint(i))
	}
	per := float64(memory()-before) / (2 * n) // both ends are in this process
	t.Logf("%.1f KB per idle tunnel and proxy, with one stream", per/1024)
	if per > 50<<10 {
		t.Errorf("an idle tunnel costs %.0f bytes, want at most 50 KB", per)
	}
}

// memory is heap and stacks in use after a collection.
func memory() uint64 {
	runtime.GC()
	runtime.GC() // the pools' victims too
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapInuse + m.StackInuse
}
