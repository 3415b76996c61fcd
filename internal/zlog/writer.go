package zlog

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// maxBatch is how many lines go into one vectored write.
const maxBatch = 64

// patience is how long an output may stand still before producers no longer wait
// for it.
const patience = time.Second

// rest is how long the writer pauses after a write, for the next lines to gather:
// waking it for each one costs its producers more than the line does. A line that
// comes after a pause is written at once.
const rest = 2 * time.Millisecond

// maxPooled is the capacity up to which a line's memory is kept for the next.
const maxPooled = 16 << 10

type buffer struct{ b []byte }

var buffers = sync.Pool{New: func() any { return &buffer{b: make([]byte, 0, 1024)} }}

func newBuffer() *buffer { return buffers.Get().(*buffer) }

func (b *buffer) free() {
	if cap(b.b) > maxPooled {
		return
	}
	b.b = b.b[:0]
	buffers.Put(b)
}

// writeFunc writes the buffers in order and returns how many bytes it wrote,
// which may be fewer than there are, with or without an error.
type writeFunc func([][]byte) (int, error)

// writer is the queue in front of the output and the goroutine behind it.
type writer struct {
	write writeFunc
	lossy bool
	lost  atomic.Uint64

	start   time.Time
	moved   atomic.Int64 // since start: the output last took something, or began to be asked to
	writing atomic.Bool  // it is being asked to

	queue   chan *buffer
	closing sync.Once
	stop    chan struct{} // closed by close: drain and end
	ended   chan struct{} // closed by run: nobody takes from the queue any more
	done    chan struct{} // closed by run, last
}

func newWriter(write writeFunc, lossy bool) *writer {
	w := &writer{
		write: write, lossy: lossy,
		start: time.Now(),
		queue: make(chan *buffer, QueueLines),
		stop:  make(chan struct{}),
		ended: make(chan struct{}),
		done:  make(chan struct{}),
	}
	go w.run()
	return w
}

func (w *writer) dropped() uint64 { return w.lost.Load() }

func (w *writer) put(b *buffer) {
	select {
	case <-w.stop:
		w.drop(b)
		return
	default:
	}
	w.accept(b)
}

// accept is put for a log that was open a moment ago.
func (w *writer) accept(b *buffer) {
	if !w.enqueue(b) {
		w.drop(b)
		return
	}
	select {
	case <-w.ended: // it came too late, unnoticed
		w.discard()
	default:
	}
}

// enqueue reports whether b found a place. It waits for one as long as the output
// moves, or may move again before its patience ends: then lines are lost, but
// the connections that log them go on (faults case 128).
func (w *writer) enqueue(b *buffer) bool {
	select {
	case w.queue <- b:
		return true
	default:
	}
	if w.lossy {
		return false
	}
	for {
		left := patience - w.still()
		if left <= 0 {
			return false
		}
		timer := time.NewTimer(left)
		select {
		case w.queue <- b:
			timer.Stop()
			return true
		case <-w.stop:
			timer.Stop()
			return false
		case <-timer.C: // the output may have moved meanwhile
		}
	}
}

// still is how long the output has taken nothing of what it was given. Between
// two writes it has nothing to take, whatever waits in the queue.
func (w *writer) still() time.Duration {
	if !w.writing.Load() {
		return 0
	}
	return time.Since(w.start) - time.Duration(w.moved.Load())
}

func (w *writer) move() { w.moved.Store(int64(time.Since(w.start))) }

// tracked is w.write with a note of its progress.
func (w *writer) tracked(vector [][]byte) (int, error) {
	n, err := w.write(vector)
	if n > 0 {
		w.move()
	}
	return n, err
}

// discard counts as lost what is in the queue.
func (w *writer) discard() {
	for {
		select {
		case b := <-w.queue:
			w.drop(b)
		default:
			return
		}
	}
}

func (w *writer) drop(b *buffer) {
	w.lost.Add(1)
	b.free()
}

func (w *writer) close(ctx context.Context) error {
	w.closing.Do(func() { close(w.stop) })
	select {
	case <-w.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (w *writer) run() {
	defer close(w.done)
	// A line that is queued while run ends is seen here or by its producer.
	defer w.discard()
	defer close(w.ended)
	lines := make([]*buffer, 0, maxBatch)
	vector := make([][]byte, 0, maxBatch)
	for {
		var first *buffer
		select {
		case first = <-w.queue:
		case <-w.stop:
			select {
			case first = <-w.queue:
			default:
				return
			}
		}
		lines = w.batch(append(lines[:0], first))
		vector = vector[:0]
		for _, b := range lines {
			vector = append(vector, b.b)
		}
		w.move() // before this the output had nothing to take
		w.writing.Store(true)
		if left := writeAll(w.tracked, vector); left > 0 {
			w.lost.Add(uint64(left))
		}
		w.writing.Store(false)
		for _, b := range lines {
			b.free()
		}
		clear(lines)
		clear(vector)
		w.rest()
	}
}

// rest lets lines gather, unless there are enough already.
func (w *writer) rest() {
	if len(w.queue) >= maxBatch {
		return
	}
	timer := time.NewTimer(rest)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-w.stop:
	}
}

// batch adds to lines what is queued already. It never waits: a line that is
// alone is written alone.
func (w *writer) batch(lines []*buffer) []*buffer {
	for len(lines) < maxBatch {
		select {
		case b := <-w.queue:
			lines = append(lines, b)
		default:
			return lines
		}
	}
	return lines
}

// writeAll writes the whole vector, which it uses up, and returns how many of
// its buffers a failure left unfinished. There is nobody to report the failure
// to: it is the log that is broken.
func writeAll(write writeFunc, vector [][]byte) (left int) {
	for {
		for len(vector) > 0 && len(vector[0]) == 0 {
			vector = vector[1:]
		}
		if len(vector) == 0 {
			return 0
		}
		n, err := write(vector)
		progress := n > 0
		for n > 0 && len(vector) > 0 {
			k := min(n, len(vector[0]))
			vector[0] = vector[0][k:]
			n -= k
			if len(vector[0]) == 0 {
				vector = vector[1:]
			}
		}
		interrupted := errors.Is(err, syscall.EINTR)
		if err != nil && !interrupted || !progress && !interrupted {
			return len(vector)
		}
	}
}

// joined writes to an output without a descriptor by one call per batch.
func joined(out io.Writer) writeFunc {
	var scratch []byte
	return func(vector [][]byte) (int, error) {
		scratch = scratch[:0]
		for _, b := range vector {
			scratch = append(scratch, b...)
		}
		return out.Write(scratch)
	}
}

// syncSink writes each line on the producer's goroutine.
type syncSink struct {
	mu     sync.Mutex // guards write and closed
	write  writeFunc
	closed bool
	lost   atomic.Uint64
}

func newSyncSink(out io.Writer) *syncSink { return &syncSink{write: joined(out)} }

func (s *syncSink) put(b *buffer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || writeAll(s.write, [][]byte{b.b}) > 0 {
		s.lost.Add(1)
	}
	b.free()
}

func (s *syncSink) dropped() uint64 { return s.lost.Load() }

func (s *syncSink) close(context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	return nil
}
