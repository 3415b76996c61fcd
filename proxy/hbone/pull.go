package hbone

import (
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// Read is pull mode: it returns credit for what it delivers, also when the budget
// is short. Its caller takes nothing that it has no room for, and may carry a
// tunnel of its own in the stream, whose streams have windows and a share in the
// budget themselves, while its pings and window updates must go on.
func (st *stream) Read(p []byte) (int, error) {
	st.rdMu.Lock()
	defer st.rdMu.Unlock()
	for {
		st.mu.Lock()
		st.pulled = true
		switch {
		case st.piped:
			st.mu.Unlock()
			return 0, ErrPiped
		case st.closed:
			st.mu.Unlock()
			return 0, net.ErrClosed
		}
		expired := st.rdl.wait()
		if isClosed(expired) {
			st.mu.Unlock()
			return 0, os.ErrDeadlineExceeded
		}
		if st.queue.bytes > 0 || len(p) == 0 {
			n := st.take(p)
			st.mu.Unlock()
			st.c.cfg.Budget.relieve()
			st.returnCredit(n)
			return n, nil
		}
		if st.rerr != nil || st.eof {
			err := st.rerr
			if err == nil {
				err = io.EOF
			}
			st.mu.Unlock()
			return 0, err
		}
		if st.readable == nil {
			st.readable = make(chan struct{}, 1)
		}
		readable := st.readable
		st.mu.Unlock()
		select {
		case <-readable:
		case <-expired:
		}
	}
}

// take copies from the queue. The caller holds st.mu and returns the credit.
func (st *stream) take(p []byte) (n int) {
	freed := 0
	for n < len(p) && st.queue.bytes > 0 {
		h := st.queue.head
		m := copy(p[n:], h.buf[h.r:h.w])
		freed += st.queue.advance(m)
		n += m
	}
	st.dequeued(n, freed)
	return n
}

// Write is pull mode.
func (st *stream) Write(p []byte) (n int, err error) {
	st.wrMu.Lock()
	defer st.wrMu.Unlock()
	st.mu.Lock()
	switch {
	case st.piped:
		err = ErrPiped
	case st.closed:
		err = net.ErrClosed
	}
	st.mu.Unlock()
	if err != nil {
		return 0, err
	}
	if isClosed(st.wdl.wait()) {
		return 0, st.cancelled()
	}
	for len(p) > 0 {
		buf := sendPool.Get().(*sendBuf)
		m := copy(buf[frameHeaderLen:], p)
		sent, abandoned, err := st.sendAll(buf, m, st.wdl.wait(), true)
		if !abandoned {
			sendPool.Put(buf)
		}
		n += sent
		if err != nil {
			return n, err
		}
		p = p[m:]
	}
	return n, nil
}

// deadline is a time limit that may be moved while somebody waits for it.
type deadline struct {
	mu    sync.Mutex
	timer *time.Timer
	ch    chan struct{}
	over  bool // end was called
}

// wait returns a channel that is closed when the limit has passed.
func (d *deadline) wait() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ch == nil {
		d.ch = make(chan struct{})
	}
	return d.ch
}

// set moves the limit; the zero time removes it.
func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.over {
		d.move(t)
	}
}

// end lets the limit pass at once and for good.
func (d *deadline) end() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.over {
		d.over = true
		d.move(past)
	}
}

// move is called with d.mu held.
func (d *deadline) move(t time.Time) {
	if d.timer != nil && !d.timer.Stop() {
		<-d.ch // the timer fired: wait for its function
	}
	d.timer = nil
	waited := d.ch != nil && !isClosed(d.ch)
	left := time.Until(t)
	switch {
	case !t.IsZero() && left <= 0 && waited:
		close(d.ch)
	case !t.IsZero() && left <= 0:
		d.ch = passed
	case !waited:
		d.ch = make(chan struct{})
	}
	if left > 0 {
		ch := d.ch
		d.timer = time.AfterFunc(left, func() { close(ch) })
	}
}

// passed is the channel of every limit that was over before anybody waited.
var passed = func() chan struct{} {
	ch := make(chan struct{})
	close(ch)
	return ch
}()
