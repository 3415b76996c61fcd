package inpod

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Fault 123: 5 000 pods that come and go over a real socket, with real
// descriptors of namespaces, leave nothing behind.
func TestFault_123_Cycles(t *testing.T) {
	cycles := 5000
	if testing.Short() {
		cycles = 500
	}
	ln := listenAgent(t)
	w := newWorld(t, func(cfg *Config) { cfg.Path = ln.Addr().String() })
	w.m.dial = w.m.dialAgent
	w.shared = true // all pods are in the namespace of the test
	w.m.Open()
	ctx, cut := context.WithCancel(t.Context())
	defer cut()
	ended := make(chan error, 1)
	go func() { ended <- w.m.Run(ctx) }()
	a := acceptAgent(t, ln)
	if got := a.ask(sentRequest()); got != "" {
		t.Fatal(got)
	}
	cycle := func(i int) {
		uid := fmt.Sprint("uid", i%7) // the same pod comes again, and others in between
		if got := a.ask(addRequest(uid), ownNamespace(t, w)); got != "" {
			t.Fatalf("cycle %d: add: %s", i, got)
		}
		if i%3 == 0 { // the same, twice
			if got := a.ask(addRequest(uid), ownNamespace(t, w)); got != "" {
				t.Fatalf("cycle %d: add again: %s", i, got)
			}
		}
		if got := a.ask(delRequest(uid)); got != "" {
			t.Fatalf("cycle %d: del: %s", i, got)
		}
	}
	for i := range 10 {
		cycle(i)
	}
	fds, goroutines := w.left()
	for i := range cycles {
		cycle(i)
	}
	// A goroutine that has done its last step may still be counted for a moment.
	for deadline := time.Now().Add(10 * time.Second); ; runtime.Gosched() {
		fdsAfter, goroutinesAfter := w.left()
		if fdsAfter <= fds && goroutinesAfter <= goroutines {
			break
		}
		if time.Now().After(deadline) {
			t.Errorf("%d descriptors and %d goroutines, before it were %d and %d", fdsAfter, goroutinesAfter, fds, goroutines)
			break
		}
	}
	if got := w.value("workload_manager_proxies_stopped_total"); int(got) != cycles+10 {
		t.Errorf("%v proxies have stopped, want %d", got, cycles+10)
	}
	w.m.Drain()
	if err := <-ended; err != nil {
		t.Errorf("Run: %v", err)
	}
}

// left waits until the last pod has ended, and counts descriptors and goroutines.
func (w *world) left() (fds, goroutines int) {
	w.t.Helper()
	for len(w.m.Snapshot()) > 0 {
		runtime.Gosched()
	}
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		w.t.Fatal(err)
	}
	return len(entries), runtime.NumGoroutine()
}
