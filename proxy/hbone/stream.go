package hbone

import (
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

const (
	recvClosed = 1 << iota // nothing more will be received
	sendClosed             // nothing more will be sent
)

// stream is one CONNECT, of either role.
type stream struct {
	c      *conn
	id     uint32
	fields []Field
	gone   chan struct{} // closed when the stream was reset by either side or its tunnel was lost
	state  atomic.Uint32 // recvClosed, sendClosed
	held   atomic.Int64  // capacity of queue, for the budget
	onEnd  func()        // set before the stream is shared; called once, when it has ended both ways

	// Guarded by conn.mu.
	granted, sent int64
	credit        chan struct{}

	// Guarded by writer.mu.
	item     sendItem
	wrote    chan struct{}
	sendOver bool // END_STREAM or RST_STREAM is queued or sent

	// Client: the answer to CONNECT.
	answer chan struct{} // closed when status is set
	status int

	// Owned by the reader.
	recvAnswer bool     // HEADERS were received; on a server: sent, see answered
	bodyLeft   int64    // content-length still to come of a request other than CONNECT, -1 if unknown
	pending    *Request // not handed over yet
	connect    bool     // the method is CONNECT

	answered atomic.Bool // server: response HEADERS are queued

	mu        sync.Mutex // guards the rest
	queue     chunkQueue
	smallN    int64 // small frames counted in conn.small
	window    int   // receive window that the peer knows, as a whole
	avail     int   // what the peer may still send
	owed      int   // delivered or discarded, not yet returned
	smooth    int   // delivered since the queue last held bytes
	eof       bool  // END_STREAM, or RST_STREAM(NO_ERROR)
	rerr      error // reading fails with it after the queue
	cause     error // first abnormal end
	discard   bool  // nobody will read
	isGone    bool
	readable  chan struct{}
	piped     bool
	pulled    bool // Read was called
	closed    bool // Close was called
	pipe      *pipe
	rdl, wdl  deadline
	resetPeer bool // RST_STREAM(CONNECT_ERROR) received

	rdMu, wrMu sync.Mutex // serialise Read and Write in pull mode
}

var _ Stream = (*stream)(nil)

func newStream(c *conn, id uint32) *stream {
	st := &stream{c: c, id: id, gone: make(chan struct{}), bodyLeft: -1}
	st.window, st.avail = c.cfg.InitialWindow, c.cfg.InitialWindow
	return st
}

func (st *stream) Fields() []Field                   { return st.fields }
func (st *stream) Conn() *ConnInfo                   { return st.c.info }
func (st *stream) LocalAddr() net.Addr               { return st.c.bc.LocalAddr() }
func (st *stream) RemoteAddr() net.Addr              { return st.c.bc.RemoteAddr() }
func (st *stream) SetDeadline(t time.Time) error     { st.rdl.set(t); st.wdl.set(t); return nil }
func (st *stream) SetReadDeadline(t time.Time) error { st.rdl.set(t); return nil }
func (st *stream) SetWriteDeadline(t time.Time) error {
	st.wdl.set(t)
	return nil
}

func (st *stream) Cause() error {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.cause
}

// dequeued accounts for bytes that left the queue. The caller holds st.mu.
func (st *stream) dequeued(n, freed int) {
	st.held.Add(-int64(freed))
	if st.queue.bytes == 0 {
		st.smooth += n
		st.c.small.Add(-st.smallN)
		st.smallN = 0
	} else {
		st.smooth = 0
	}
	st.c.cfg.Budget.sub(st, freed, st.queue.bytes == 0)
}

// returnCredit tells the peer that n more bytes were delivered, in steps of a
// quarter of the window.
func (st *stream) returnCredit(n int) {
	st.mu.Lock()
	update := st.credited(n)
	st.mu.Unlock()
	if update > 0 {
		st.sendUpdate(update)
		st.c.kick()
	}
}

func (st *stream) sendUpdate(n int) {
	st.c.queue(false, func(b []byte) []byte { return appendWindowUpdate(b, st.id, n) })
}

// credited returns the increment to send now. The caller holds st.mu.
func (st *stream) credited(n int) int {
	st.owed += n
	if st.eof || st.isGone || st.owed == 0 {
		return 0
	}
	if budget := st.c.cfg.Budget; budget.Tight() && (st.piped || st.discard || !st.pulled) {
		budget.starve(st)
		return 0
	}
	grow := 0
	if st.smooth >= st.window && st.window < st.c.cfg.StreamWindow {
		grow = min(st.window, st.c.cfg.StreamWindow-st.window)
		st.smooth = 0
	}
	if grow == 0 && st.owed < st.window/4 {
		return 0
	}
	update := st.owed + grow
	st.window += grow
	st.owed = 0
	st.avail += update
	return update
}

// sendAll sends n bytes at buf[frameHeaderLen:], as the windows allow. cancel
// ends the wait for credit; in pull mode it also ends the wait for the turn.
func (st *stream) sendAll(buf *sendBuf, n int, cancel <-chan struct{}, pull bool) (sent int, abandoned bool, err error) {
	for sent < n {
		if isClosed(st.gone) {
			return sent, false, st.sendError()
		}
		if pull && isClosed(cancel) {
			return sent, false, st.cancelled()
		}
		k, wait := st.c.takeCredit(st, n-sent)
		if k == 0 {
			select {
			case <-wait:
				continue
			case <-st.gone:
				continue
			case <-cancel:
				return sent, false, st.cancelled()
			}
		}
		var turn <-chan struct{}
		if pull {
			turn = cancel
		}
		abandoned, err = st.c.send(st, buf, frameHeaderLen+sent, k, !pull, turn)
		if err == nil {
			sent += k
			continue
		}
		if !abandoned {
			st.c.refundCredit(st, k) // nothing of it was written: the tunnel's window must not leak
		}
		if pull && isClosed(cancel) && !isClosed(st.gone) {
			return sent, abandoned, st.cancelled()
		}
		return sent, abandoned, st.sendError()
	}
	return sent, false, nil
}

// cancelled is why a send was given up: the limit of time, or the end of our
// direction, which ends that limit too.
func (st *stream) cancelled() error {
	if st.state.Load()&sendClosed == 0 {
		return os.ErrDeadlineExceeded
	}
	return st.sendError()
}

// sendError is why nothing can be sent.
func (st *stream) sendError() error {
	st.mu.Lock()
	defer st.mu.Unlock()
	switch {
	case st.cause != nil:
		return st.cause
	case st.closed:
		return net.ErrClosed
	case st.isGone:
		return &StreamError{Code: ErrNo, Remote: true}
	}
	if err := st.c.end(); err != nil {
		return err
	}
	return io.ErrClosedPipe // after CloseWrite
}

// CloseWrite queues END_STREAM. A Write that waits ends: nothing else would wake
// it once the stream has ended both ways, for the tunnel forgets it then.
func (st *stream) CloseWrite() error {
	c := st.c
	c.w.mu.Lock()
	if st.sendOver {
		c.w.mu.Unlock()
		return nil
	}
	st.sendOver = true
	c.queueLocked(false, func(b []byte) []byte {
		return appendFrameHeader(b, 0, frameData, flagEndStream, st.id)
	})
	c.w.mu.Unlock()
	st.done(sendClosed)
	st.wdl.end()
	c.kick()
	return nil
}

// Close ends both directions as TCP does: the peer reads all that was written,
// and may still write without an error until it learns that nobody reads: at
// once if there were unread bytes, else with its next bytes or after closeGrace.
func (st *stream) Close() error {
	st.mu.Lock()
	if st.closed {
		st.mu.Unlock()
		return nil
	}
	st.closed = true
	open, unread := st.state.Load()&recvClosed == 0, st.queue.bytes > 0
	st.drop()
	st.mu.Unlock()
	st.c.cfg.Budget.relieve()
	_ = st.CloseWrite() // never fails
	switch {
	case open && unread:
		st.refuse()
	case open:
		time.AfterFunc(closeGrace, st.refuse)
	}
	return nil
}

// refuse tells the peer that nobody reads any more.
func (st *stream) refuse() {
	if st.state.Load()&recvClosed == 0 {
		st.reset(ErrNo, nil)
		st.c.kick()
	}
}

// Reset ends both directions at once.
func (st *stream) Reset(code ErrCode) {
	st.reset(code, &StreamError{Code: code})
	st.c.kick()
}

// reset sends RST_STREAM unless the stream has ended both ways, and fails our
// side with cause.
func (st *stream) reset(code ErrCode, cause error) {
	c := st.c
	c.w.mu.Lock()
	open := st.state.Load() != recvClosed|sendClosed
	if open {
		st.sendOver = true
		c.queueLocked(false, func(b []byte) []byte { return appendRST(b, st.id, code) })
	}
	c.w.mu.Unlock()
	if open {
		c.mu.Lock()
		c.resets.add(st.id)
		c.mu.Unlock()
	}
	st.mu.Lock()
	if st.cause == nil && (st.state.Load() != recvClosed|sendClosed || st.pipe != nil && !st.pipe.over) {
		st.cause = cause
	}
	if st.rerr == nil && !st.eof {
		if st.rerr = cause; cause == nil {
			st.rerr = net.ErrClosed
		}
	}
	st.drop()
	st.goneLocked()
	p := st.pipe
	st.mu.Unlock()
	c.cfg.Budget.relieve()
	if p != nil {
		p.abort()
	}
	st.done(recvClosed | sendClosed)
}

// drop discards the queue and whatever comes. The caller holds st.mu.
func (st *stream) drop() {
	st.discard = true
	freed := st.queue.clear(st.pipe != nil && st.pipe.draining)
	st.dequeued(0, freed)
	st.wakeReader()
}

// goneLocked wakes everyone who waits. The caller holds st.mu.
func (st *stream) goneLocked() {
	if !st.isGone {
		st.isGone = true
		close(st.gone)
	}
	st.wakeReader()
}

func (st *stream) wakeReader() {
	if st.readable != nil {
		select {
		case st.readable <- struct{}{}:
		default:
		}
	}
}

// done notes that directions have ended, and lets the tunnel forget a stream
// that has ended both ways.
func (st *stream) done(bits uint32) {
	old := st.state.Or(bits)
	if old == recvClosed|sendClosed || old|bits != recvClosed|sendClosed {
		return
	}
	st.c.cfg.Budget.forget(st)
	if st.onEnd != nil {
		st.onEnd()
	}
	st.c.forget(st)
}

// forget removes a stream that has ended both ways.
func (c *conn) forget(st *stream) {
	c.mu.Lock()
	_, known := c.streams[st.id]
	delete(c.streams, st.id)
	delete(c.waiters, st)
	if known {
		c.endedIDs.add(st.id)
	}
	if c.idle != nil && len(c.streams) == 0 && c.err == nil {
		c.idle.Reset(c.cfg.IdleTimeout)
	}
	c.mu.Unlock()
	if known {
		c.closeIfDone()
	}
}

// peerReset is RST_STREAM.
func (st *stream) peerReset(code ErrCode) {
	st.c.w.mu.Lock()
	st.sendOver = true
	st.c.w.mu.Unlock()
	st.mu.Lock()
	var cause error
	if code != ErrNo {
		cause = &StreamError{Code: code, Remote: true}
		if st.cause == nil && st.state.Load() != recvClosed|sendClosed {
			st.cause = cause
			st.resetPeer = code == ErrConnect
		}
	}
	st.endRecv(cause)
}

// lost is the end of the tunnel.
func (st *stream) lost(err error, how ending) {
	st.c.w.mu.Lock()
	st.sendOver = true
	st.c.w.mu.Unlock()
	st.mu.Lock()
	if st.cause == nil {
		st.cause = err
	}
	p := st.pipe
	if how == aborted && p != nil {
		st.drop()
	}
	st.endRecv(err)
	if how == aborted && p != nil {
		p.abort()
	}
}

// endRecv ends both directions because of the peer: reading goes on to the end
// of the queue, and END_STREAM received before stands. The caller holds st.mu,
// which is released.
func (st *stream) endRecv(err error) {
	if !st.eof && st.rerr == nil {
		if st.rerr = err; err == nil {
			st.eof = true
		}
	}
	st.goneLocked()
	p := st.pipe
	finish := p != nil && p.settle()
	st.mu.Unlock()
	if p != nil {
		p.stopReading()
		if finish {
			p.endDelivery()
		}
	}
	st.done(recvClosed | sendClosed)
}

// endStream is END_STREAM.
func (st *stream) endStream() {
	st.mu.Lock()
	st.eof = true
	st.wakeReader()
	p := st.pipe
	finish := p != nil && p.settle()
	st.mu.Unlock()
	if finish {
		p.endDelivery()
	}
	st.done(recvClosed)
}

func isClosed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}
