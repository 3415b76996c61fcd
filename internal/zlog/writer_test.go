package zlog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// gate is an output that blocks until it is opened.
type gate struct {
	open chan struct{}
	bytes.Buffer
}

func (g *gate) Write(p []byte) (int, error) {
	<-g.open
	return g.Buffer.Write(p)
}

func line(i int) *buffer {
	b := newBuffer()
	b.b = fmt.Appendf(b.b, "line %d\n", i)
	return b
}

func lines(n int) string {
	var s strings.Builder
	for i := range n {
		fmt.Fprintf(&s, "line %d\n", i)
	}
	return s.String()
}

func TestDP_X06_BackpressureBlocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		out := &gate{open: make(chan struct{})}
		w := newWriter(joined(out), false)
		const n = QueueLines + 3*maxBatch
		written := make(chan struct{})
		go func() {
			defer close(written)
			for i := range n {
				w.put(line(i))
			}
		}()
		synctest.Wait()
		select {
		case <-written:
			t.Error("the producer did not wait for the output")
		default:
		}
		close(out.open)
		<-written
		if err := w.close(t.Context()); err != nil {
			t.Fatal(err)
		}
		if out.String() != lines(n) {
			t.Error("lines were lost or changed places")
		}
		if got := w.dropped(); got != 0 {
			t.Errorf("got %d dropped lines, want 0", got)
		}
	})
}

// Case 128: an output that nobody reads does not stop those who log.
func TestCase128_OutputStandsStill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		out := &gate{open: make(chan struct{})}
		w := newWriter(joined(out), false)
		w.put(line(0))
		synctest.Wait()             // the writer holds line 0
		for i := range QueueLines { // no waiting: they fit
			w.put(line(i + 1))
		}
		start := time.Now()
		var producers sync.WaitGroup
		for range 4 {
			producers.Go(func() {
				for i := range 5 {
					w.put(line(i))
				}
			})
		}
		producers.Wait()
		if got := time.Since(start); got != time.Second {
			t.Errorf("the producers waited for %v, want 1s for all lines together", got)
		}
		if got := w.dropped(); got != 20 {
			t.Errorf("got %d dropped lines, want 20", got)
		}
		close(out.open)
		synctest.Wait()
		for i := range 3 * QueueLines {
			w.put(line(QueueLines + 1 + i))
		}
		if err := w.close(t.Context()); err != nil {
			t.Fatal(err)
		}
		if out.String() != lines(4*QueueLines+1) || w.dropped() != 20 {
			t.Errorf("lines were lost after the output moved again; %d dropped", w.dropped())
		}
	})
}

// An idle output is no output that stands still.
func TestCase128_IdleThenFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		out := &gate{open: make(chan struct{})}
		w := newWriter(joined(out), false)
		<-time.After(time.Hour)
		time.AfterFunc(patience-time.Millisecond, func() { close(out.open) })
		const n = QueueLines + 3*maxBatch
		for i := range n {
			w.put(line(i))
		}
		if err := w.close(t.Context()); err != nil {
			t.Fatal(err)
		}
		if out.String() != lines(n) || w.dropped() != 0 {
			t.Errorf("lines were lost; %d dropped", w.dropped())
		}
	})
}

// An output that is slow but moves loses nothing.
func TestDP_X06_SlowOutput(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		w := newWriter(func(vector [][]byte) (int, error) {
			<-time.After(patience - time.Millisecond)
			return joined(&out)(vector)
		}, false)
		const n = 2 * QueueLines
		var producers sync.WaitGroup
		for range 8 {
			producers.Go(func() {
				for range n / 8 {
					w.put(line(1))
				}
			})
		}
		producers.Wait()
		if err := w.close(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := strings.Count(out.String(), "line 1\n"); got != n || w.dropped() != 0 {
			t.Errorf("got %d of %d lines; %d dropped", got, n, w.dropped())
		}
	})
}

// Each line that meets the end of the log is written or counted.
func TestCloseLosesNoCount(t *testing.T) {
	w := newWriter(joined(io.Discard), false)
	if err := w.close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if w.accept(line(0)); w.dropped() != 1 {
		t.Errorf("a line between the end and the news of it: got %d dropped, want 1", w.dropped())
	}
	for range 200 {
		var out bytes.Buffer
		w := newWriter(joined(&out), false)
		start := make(chan struct{})
		var producers sync.WaitGroup
		for range 8 {
			producers.Go(func() {
				<-start
				for i := range 40 {
					w.put(line(i))
				}
			})
		}
		close(start)
		if err := w.close(t.Context()); err != nil {
			t.Fatal(err)
		}
		producers.Wait()
		if got := strings.Count(out.String(), "\n") + int(w.dropped()); got != 320 {
			t.Fatalf("%d of 320 lines were written or counted", got)
		}
	}
}

func TestDP_X06_LossyCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		out := &gate{open: make(chan struct{})}
		w := newWriter(joined(out), true)
		w.put(line(0))
		synctest.Wait() // the writer holds line 0
		for i := range QueueLines + 5 {
			w.put(line(i + 1))
		}
		if got := w.dropped(); got != 5 {
			t.Errorf("got %d dropped lines, want 5", got)
		}
		close(out.open)
		if err := w.close(t.Context()); err != nil {
			t.Fatal(err)
		}
		if out.String() != lines(QueueLines+1) {
			t.Error("the lines that fitted did not come out in order")
		}
	})
}

func TestDP_X06_Producers(t *testing.T) {
	var out bytes.Buffer
	l, err := New(Config{Out: &out})
	if err != nil {
		t.Fatal(err)
	}
	log := l.Logger()
	var wg sync.WaitGroup
	for i := range 10 {
		wg.Go(func() { log.Info("hello", "producer", i) })
	}
	wg.Wait()
	if err := l.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i := range 10 {
		if want := fmt.Sprintf("\thello\tproducer=%d\n", i); strings.Count(out.String(), want) != 1 {
			t.Errorf("got %q, want one line with %q", out.String(), want)
		}
	}
	if got := strings.Count(out.String(), "\n"); got != 10 {
		t.Errorf("got %d lines, want 10", got)
	}
}

func TestDP_X06_PartialWrites(t *testing.T) {
	for _, most := range []int{1, 3, 7, 1024} {
		t.Run(fmt.Sprint(most), func(t *testing.T) {
			var out bytes.Buffer
			calls := 0
			w := newWriter(func(vector [][]byte) (int, error) {
				if len(vector) > maxBatch {
					t.Errorf("got a vector of %d, want at most %d", len(vector), maxBatch)
				}
				if calls++; calls%3 == 0 {
					return 0, syscall.EINTR
				}
				n := 0
				for _, b := range vector {
					k := min(len(b), most-n)
					out.Write(b[:k])
					n += k
				}
				if calls%5 == 0 {
					return n, syscall.EINTR
				}
				return n, nil
			}, false)
			for i := range 500 {
				w.put(line(i))
			}
			if err := w.close(t.Context()); err != nil {
				t.Fatal(err)
			}
			if out.String() != lines(500) || w.dropped() != 0 {
				t.Errorf("the output differs after partial writes; %d dropped", w.dropped())
			}
		})
	}
}

func TestBrokenOutputCounts(t *testing.T) {
	for name, write := range map[string]writeFunc{
		"error":       func([][]byte) (int, error) { return 0, errors.New("no space left on device") },
		"no progress": func([][]byte) (int, error) { return 0, nil },
		"half a line": func(v [][]byte) (int, error) { return len(v[0]) / 2, io.ErrShortWrite },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWriter(write, false)
			for i := range 7 {
				w.put(line(i))
			}
			if err := w.close(t.Context()); err != nil {
				t.Fatal(err)
			}
			w.put(line(7))
			if got := w.dropped(); got != 8 {
				t.Errorf("got %d dropped lines, want 8", got)
			}
		})
	}
}

func TestCloseIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		out := &gate{open: make(chan struct{})}
		l, err := New(Config{Out: out})
		if err != nil {
			t.Fatal(err)
		}
		l.Logger().Info("stuck")
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := l.Close(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want the deadline", err)
		}
		l.Logger().Info("too late")
		if got := l.Dropped(); got != 1 {
			t.Errorf("got %d dropped lines, want the one after Close", got)
		}
		close(out.open)
		if err := l.Close(t.Context()); err != nil || !strings.Contains(out.String(), "stuck") {
			t.Errorf("second Close: %v, output %q", err, out.String())
		}
	})
}

// The descriptor path: a pipe that is smaller than the lines, read slowly.
func TestDP_X06_Descriptor(t *testing.T) {
	r, f, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	w := newWriter(vectored(f), false)
	got := make(chan string)
	go func() {
		all, err := io.ReadAll(r)
		if err != nil {
			t.Error(err)
		}
		got <- string(all)
	}()
	const n = 3 * QueueLines
	for i := range n {
		w.put(line(i))
	}
	if err := w.close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if <-got != lines(n) {
		t.Error("the pipe did not deliver all lines in order")
	}
	w = newWriter(vectored(f), false) // closed
	w.put(line(0))
	if err := w.close(t.Context()); err != nil || w.dropped() != 1 {
		t.Errorf("closed file: got %v and %d dropped lines, want 1", err, w.dropped())
	}
}

func TestSyncAfterClose(t *testing.T) {
	l, out := testLog(t, Config{})
	l.Logger().Info("one")
	if err := l.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	l.Logger().Info("two")
	if got := out.String(); strings.Count(got, "\n") != 1 || l.Dropped() != 1 {
		t.Errorf("got %q and %d dropped, want one line and one dropped", got, l.Dropped())
	}
}
