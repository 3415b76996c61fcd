package hbone

import (
	"errors"
	"sync"
	"time"
)

// writer serialises what a tunnel sends. Whoever holds the write turn writes;
// nobody holds a lock while writing. Control frames are only queued, by anyone,
// without blocking. A stream with data writes it inline when the turn is free,
// and otherwise queues one chunk: since a stream has one chunk in the queue at
// most, first come first served is round robin.
type writer struct {
	mu       sync.Mutex // guards all but spare
	busy     bool       // somebody holds the turn
	ctl      []byte     // control frames, encoded
	frames   int        // how many
	replies  int        // how many of them the peer made us send
	head     *sendItem
	tail     *sendItem
	err      error // sending is over
	closing  bool  // send what is queued, then close
	closed   bool
	stopped  bool // no goroutine may be started any more
	overflow bool

	spare []byte // the other buffer of ctl, owned by the turn
}

// sendItem is a chunk of a stream's data.
type sendItem struct {
	st        *stream
	next      *sendItem
	buf       *sendBuf
	off, n    int // the payload; frameHeaderLen bytes in front of it are free
	frame     int // largest payload of one frame
	queued    bool
	abandoned bool // nobody waits: the writer puts buf back
	err       error
}

var errSendClosed = errors.New("stream takes no more data")

// closeGrace bounds the last flush of a tunnel and the wait for the peer to
// read it.
const closeGrace = time.Second

// queue appends control frames through fn. It never blocks.
func (c *conn) queue(reply bool, fn func(b []byte) []byte) {
	w := &c.w
	w.mu.Lock()
	c.queueLocked(reply, fn)
	w.mu.Unlock()
}

func (c *conn) queueLocked(reply bool, fn func(b []byte) []byte) {
	w := &c.w
	if w.err != nil || w.closing {
		return
	}
	w.ctl = fn(w.ctl)
	w.frames++
	if reply {
		w.replies++
	}
	if w.frames > maxQueuedFrames || w.replies > maxQueuedReplies {
		w.overflow = true
	}
}

// overflowed tells whether a peer that does not read made us queue too much.
func (c *conn) overflowed() bool {
	if c.bc.corked() > maxCorked {
		return true
	}
	c.w.mu.Lock()
	defer c.w.mu.Unlock()
	return c.w.overflow
}

// takeCtl hands out the queued control frames. The caller has the turn.
func (w *writer) takeCtl() []byte {
	ctl := w.ctl
	w.ctl, w.spare = w.spare[:0], nil
	w.frames, w.replies = 0, 0
	return ctl
}

func (w *writer) putCtl(b []byte) {
	if cap(b) <= 4<<10 {
		w.spare = b[:0]
	}
}

// kick sends what is queued. It never blocks: what the socket does not take at
// once is left to a goroutine.
func (c *conn) kick() {
	w := &c.w
	w.mu.Lock()
	if w.busy || w.stopped || w.err != nil || len(w.ctl) == 0 && w.head == nil && !w.closing && c.bc.corked() == 0 {
		w.mu.Unlock()
		return
	}
	w.busy = true
	if c.bc.rc == nil || w.head != nil {
		c.spawn()
		w.mu.Unlock()
		return
	}
	ctl := w.takeCtl()
	w.mu.Unlock()
	done, err := false, c.writePlain(ctl)
	w.putCtl(ctl)
	if err == nil {
		done, err = c.bc.tryFlush()
	}
	if err != nil {
		c.writeFailed(err)
	}
	c.release(!done)
}

// spawn hands the turn to a goroutine. The caller holds w.mu and has the turn.
func (c *conn) spawn() {
	if c.w.stopped {
		c.w.busy = false
		return
	}
	c.wg.Go(c.writeLoop)
}

// release gives the turn back, or on.
func (c *conn) release(more bool) {
	w := &c.w
	w.mu.Lock()
	if more || len(w.ctl) > 0 || w.head != nil || w.closing && !w.closed {
		c.spawn()
	} else {
		w.busy = false
	}
	w.mu.Unlock()
}

// writePlain appends plaintext to what the next flush sends.
func (c *conn) writePlain(p []byte) error {
	if len(p) == 0 {
		return nil
	}
	var err error
	if c.tc != nil {
		_, err = c.tc.Write(p)
	} else {
		_, err = c.bc.Write(p)
	}
	return err
}

// writeItem appends it as DATA frames, its headers written in place.
func (c *conn) writeItem(it *sendItem) error {
	off, left := it.off, it.n
	for left > 0 {
		n := min(left, it.frame)
		frame := it.buf[off-frameHeaderLen : off+n]
		putFrameHeader(frame, n, frameData, 0, it.st.id)
		if err := c.writePlain(frame); err != nil {
			return err
		}
		c.dataSent.Add(uint64(n)>>14 + 1)
		off, left = off+n, left-n
	}
	return nil
}

// send writes n bytes at buf[off:] as DATA of st, or waits for its turn to. It
// owns buf until it returns; if it returns abandoned, for longer. inline allows
// to block on the socket itself.
func (c *conn) send(st *stream, buf *sendBuf, off, n int, inline bool, cancel <-chan struct{}) (abandoned bool, err error) {
	w := &c.w
	it := &st.item
	w.mu.Lock()
	switch {
	case w.err != nil:
		err = w.err
	case w.closing || st.sendOver:
		err = errSendClosed
	}
	if err != nil {
		w.mu.Unlock()
		return false, err
	}
	if it.abandoned {
		it = new(sendItem)
	}
	*it = sendItem{st: st, buf: buf, off: off, n: n, frame: c.frameSize()}
	if inline && !w.busy {
		w.busy = true
		ctl := w.takeCtl()
		w.mu.Unlock()
		err = c.writeBatch(ctl, it)
		w.putCtl(ctl)
		c.release(false)
		return false, err
	}
	if st.wrote == nil {
		st.wrote = make(chan struct{}, 1)
	}
	it.queued = true
	if w.tail == nil {
		w.head = it
	} else {
		w.tail.next = it
	}
	w.tail = it
	if !w.busy {
		w.busy = true
		c.spawn()
		if !w.busy { // stopped
			w.unlink(it)
			w.mu.Unlock()
			return false, errSendClosed
		}
	}
	w.mu.Unlock()
	select {
	case <-st.wrote:
		return false, it.err
	case <-st.gone:
	case <-cancel:
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	select {
	case <-st.wrote:
		return false, it.err
	default:
	}
	if it.queued {
		w.unlink(it)
		return false, errSendClosed
	}
	it.abandoned = true
	return true, errSendClosed
}

// unlink takes it out of the queue.
func (w *writer) unlink(it *sendItem) {
	var prev *sendItem
	for i := w.head; i != nil; prev, i = i, i.next {
		if i != it {
			continue
		}
		if prev == nil {
			w.head = i.next
		} else {
			prev.next = i.next
		}
		if w.tail == i {
			w.tail = prev
		}
		i.next, i.queued = nil, false
		return
	}
}

// writeBatch sends ctl and items; small ones share a TLS record.
func (c *conn) writeBatch(ctl []byte, items ...*sendItem) error {
	pending := ctl
	for _, it := range items {
		if len(pending)+frameHeaderLen+it.n <= recordSize && it.n <= it.frame && (len(pending) > 0 || len(items) > 1) {
			pending = appendFrameHeader(pending, it.n, frameData, 0, it.st.id)
			pending = append(pending, it.buf[it.off:it.off+it.n]...)
			c.dataSent.Add(1)
			continue
		}
		if err := c.flushPlain(&pending); err != nil {
			return err
		}
		if c.bc.corked()+sendSize > corkLimit {
			if err := c.flushSocket(); err != nil {
				return err
			}
		}
		if err := c.writeItem(it); err != nil {
			c.writeFailed(err)
			return err
		}
	}
	if err := c.flushPlain(&pending); err != nil {
		return err
	}
	return c.flushSocket()
}

func (c *conn) flushPlain(p *[]byte) error {
	err := c.writePlain(*p)
	*p = (*p)[:0]
	if err != nil {
		c.writeFailed(err)
	}
	return err
}

func (c *conn) flushSocket() error {
	err := c.bc.flush()
	if err != nil {
		c.writeFailed(err)
	}
	return err
}

// writeLoop holds the turn while anything is queued.
func (c *conn) writeLoop() {
	defer c.recovered("writer")
	w := &c.w
	var items []*sendItem
	for first := true; ; first = false {
		items = items[:0]
		w.mu.Lock()
		for size := 0; w.head != nil && size < corkLimit; {
			it := w.head
			if w.head = it.next; w.head == nil {
				w.tail = nil
			}
			it.next, it.queued = nil, false
			if w.err != nil || it.st.sendOver {
				it.finish(errSendClosed)
				continue
			}
			size += it.n
			items = append(items, it)
		}
		ctl := w.takeCtl()
		if len(ctl) == 0 && len(items) == 0 && !first {
			w.putCtl(ctl)
			if w.closing && !w.closed {
				w.closed = true
				w.mu.Unlock()
				c.closeSocket()
				continue
			}
			w.busy = false
			w.mu.Unlock()
			return
		}
		err := w.err
		w.mu.Unlock()
		if err == nil {
			err = c.writeBatch(ctl, items...)
		}
		w.putCtl(ctl)
		w.mu.Lock()
		for _, it := range items {
			it.finish(err)
		}
		w.mu.Unlock()
	}
}

// finish wakes the one who waits for it. The caller holds w.mu.
func (it *sendItem) finish(err error) {
	it.err = err
	if it.abandoned {
		it.abandoned = false
		sendPool.Put(it.buf)
		it.buf = nil
		return
	}
	it.st.wrote <- struct{}{}
}

// writeFailed ends the sending half. The reader ends the tunnel: it may still
// find a TLS alert or a GOAWAY, which says more than a broken pipe.
func (c *conn) writeFailed(err error) {
	c.stopWriting(err)
	_ = c.bc.Conn.SetReadDeadline(time.Now().Add(closeGrace))
}

// stopWriting ends the queue; w.err makes every later send fail.
func (c *conn) stopWriting(err error) {
	w := &c.w
	w.mu.Lock()
	if w.err == nil {
		w.err = err
	}
	if !w.busy {
		for it := w.head; it != nil; {
			next := it.next
			it.next, it.queued = nil, false
			it.finish(w.err)
			it = next
		}
		w.head, w.tail = nil, nil
	}
	w.mu.Unlock()
}

// closeSocket says goodbye after everything else was sent. The reader sees the
// end of the connection.
func (c *conn) closeSocket() {
	if c.tc != nil {
		if err := c.tc.CloseWrite(); err == nil {
			_ = c.bc.flush() // the peer may be gone already
		}
	}
	if cw, ok := c.bc.Conn.(interface{ CloseWrite() error }); ok && cw.CloseWrite() == nil {
		return // the reader closes after the peer has, or after closeGrace
	}
	_ = c.bc.Conn.Close()
}
