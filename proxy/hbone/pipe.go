package hbone

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// drainLimit bounds how long a pipe goes on delivering to a slow application
// after its stream has failed.
const drainLimit = 10 * time.Second

// pipe is a stream in push mode. Tunnel → socket is done by the tunnel's reader,
// and by a drainer while the socket is slower; socket → tunnel by the goroutine
// that called Pipe.
type pipe struct {
	st   *stream
	sock Socket
	m    *Meter
	to   atomic.Uint64

	delivered chan struct{}  // closed when tunnel → socket is over
	broken    chan struct{}  // closed when the socket has failed
	cutting   sync.WaitGroup // what the end of the context does

	// Guarded by stream.mu.
	delivering bool // the reader is in TryWrite
	draining   bool // the drainer runs
	over       bool // delivered is closed, or about to be
	ended      bool // the application has sent FIN
	sockErr    *SocketError
}

var past = time.Unix(1, 0)

// Pipe is documented with Stream.
func (st *stream) Pipe(ctx context.Context, s Socket, m *Meter) Result {
	if m == nil {
		m = new(Meter)
	}
	p := &pipe{st: st, sock: s, m: m, delivered: make(chan struct{}), broken: make(chan struct{})}
	st.mu.Lock()
	if st.piped || st.closed {
		st.mu.Unlock()
		_ = s.Abort()
		return Result{Err: ErrPiped}
	}
	st.piped = true
	st.pipe = p
	st.fields = nil // an idle stream keeps what it needs
	st.wakeReader()
	gone, discard := st.isGone, st.discard
	p.draining = st.queue.bytes > 0
	drain := p.draining
	finish := !discard && p.settle()
	st.mu.Unlock()

	switch {
	case discard: // reset before it was piped
		p.abort()
	case drain:
		go p.drain()
	case finish:
		p.endDelivery()
	}
	if gone {
		p.stopReading()
	}
	p.cutting.Add(1)
	stop := context.AfterFunc(ctx, func() {
		defer p.cutting.Done()
		st.reset(ErrCancel, context.Cause(ctx))
		st.c.kick()
	})
	from := p.copyIn()
	<-p.delivered
	if !stop() {
		p.cutting.Wait()
	}
	return p.finish(from)
}

// finish closes both ends and sums up.
func (p *pipe) finish(from uint64) Result {
	st := p.st
	st.mu.Lock()
	sockErr, cause := p.sockErr, st.cause
	st.mu.Unlock()
	if sockErr != nil {
		st.reset(ErrConnect, sockErr)
		st.c.kick()
		if cause == nil {
			cause = sockErr
		}
	}
	res := Result{FromSocket: from, ToSocket: p.to.Load(), Err: cause}
	var se *StreamError
	switch {
	case cause == nil:
		_ = p.sock.Close() // both directions have ended; there is nobody left to tell
	case errors.As(cause, &se) && se.Remote:
		if se.Code == ErrConnect {
			res.Reset, res.Err = ResetByPeer, nil
		}
		p.closeAfter()
	case sockErr != nil && errors.Is(cause, sockErr) && isReset(sockErr.Err):
		res.Reset, res.Err = ResetBySocket, nil
		_ = p.sock.Abort()
	default:
		p.closeAfter()
	}
	_ = st.Close() // never fails
	return res
}

// closeAfter closes the socket of a failed stream: with RST, unless the peer had
// ended its direction in order, which the application shall be able to read.
func (p *pipe) closeAfter() {
	p.st.mu.Lock()
	orderly := p.st.eof && p.sockErr == nil && !p.st.discard
	p.st.mu.Unlock()
	if orderly {
		_ = p.sock.Close()
		return
	}
	_ = p.sock.Abort()
}

// isReset tells an RST of the application from other failures.
func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, io.ErrClosedPipe)
}

// copyIn is application → tunnel.
func (p *pipe) copyIn() (from uint64) {
	st := p.st
	src := newSource(p.sock)
	for {
		buf, n, err := src.read()
		if n > 0 {
			sent, abandoned, sendErr := st.sendAll(buf, n, p.broken, false)
			if !abandoned {
				sendPool.Put(buf)
			}
			from += uint64(sent)
			if p.m.FromSocket != nil {
				p.m.FromSocket.Add(uint64(sent))
			}
			if sendErr != nil {
				return from
			}
			continue
		}
		switch {
		case isClosed(st.gone), isClosed(p.broken):
		case errors.Is(err, io.EOF):
			st.mu.Lock()
			p.ended = true
			st.mu.Unlock()
			_ = st.CloseWrite() // never fails
		default:
			p.broke("read", err)
		}
		return from
	}
}

// deliver is tunnel → application, by the reader.
func (st *stream) deliver(b []byte, small bool) error {
	st.mu.Lock()
	if st.discard {
		refuse := st.closed
		st.mu.Unlock()
		if refuse {
			st.refuse()
		}
		return nil
	}
	update := 0
	p := st.pipe
	if p != nil && !p.draining {
		p.delivering = true
		st.mu.Unlock()
		n, err := p.sock.TryWrite(b)
		p.count(n)
		if err != nil {
			p.broke("write", err)
		}
		st.mu.Lock()
		p.delivering = false
		if st.discard {
			end := !p.over
			p.over = true
			st.mu.Unlock()
			if end {
				close(p.delivered)
			}
			return nil
		}
		b = b[n:]
		st.smooth += n
		update = st.credited(n)
	}
	over, tooMany, drain, finish := false, false, false, false
	if len(b) > 0 {
		over, tooMany = st.enqueue(b, small)
		if p != nil && !p.draining {
			p.draining, drain = true, true
		}
	} else if p != nil {
		finish = p.settle()
	}
	st.mu.Unlock()
	if update > 0 {
		st.sendUpdate(update) // the reader kicks before it waits
	}
	if drain {
		go p.drain()
	}
	if finish {
		p.endDelivery()
	}
	if over {
		st.c.cfg.Budget.shed()
	}
	if tooMany {
		return flood("small DATA frames")
	}
	return nil
}

// enqueue keeps b. The caller holds st.mu.
func (st *stream) enqueue(b []byte, small bool) (overBudget, tooMany bool) {
	if st.queue.bytes == 0 {
		st.wakeReader()
	}
	grown := st.queue.push(b)
	st.smooth = 0
	st.held.Add(int64(grown))
	if small {
		st.smallN++
		tooMany = st.c.small.Add(1) > maxSmallFrames
	}
	return st.c.cfg.Budget.add(st, grown), tooMany
}

func (p *pipe) count(n int) {
	if n <= 0 {
		return
	}
	p.to.Add(uint64(n))
	if p.m.ToSocket != nil {
		p.m.ToSocket.Add(uint64(n))
	}
}

// drain delivers the queue to a slow socket.
func (p *pipe) drain() {
	st := p.st
	defer p.drainRecovered()
	for {
		st.mu.Lock()
		if st.discard {
			p.draining, p.over = false, true
			st.mu.Unlock()
			close(p.delivered)
			return
		}
		h := st.queue.head
		if h == nil {
			p.draining = false
			finish := p.settle()
			st.mu.Unlock()
			if finish {
				p.endDelivery()
			}
			return
		}
		b := h.buf[h.r:h.w]
		st.mu.Unlock()

		n, err := p.sock.Write(b)
		p.count(n)

		st.mu.Lock()
		update := 0
		if !st.discard {
			freed := st.queue.advance(n)
			st.dequeued(n, freed)
			st.smooth = 0
			update = st.credited(n)
		}
		st.mu.Unlock()
		st.c.cfg.Budget.relieve()
		if update > 0 {
			st.sendUpdate(update)
			st.c.kick()
		}
		if err != nil {
			p.broke("write", err)
		}
	}
}

func (p *pipe) drainRecovered() {
	v := recover()
	if v == nil {
		return
	}
	p.st.c.panicked("drainer", v)
	p.st.mu.Lock()
	p.draining = false
	p.st.mu.Unlock()
	p.st.Reset(ErrInternal)
}

// settle tells the caller to end the delivery, if there is nothing left to
// deliver and nobody else is at it. The caller holds st.mu and calls
// endDelivery without.
func (p *pipe) settle() bool {
	st := p.st
	if p.delivering || p.draining || p.over || st.queue.bytes > 0 || !st.eof && st.rerr == nil {
		return false
	}
	p.over = true
	return true
}

// endDelivery passes the end of the stream to the socket.
func (p *pipe) endDelivery() {
	p.st.mu.Lock()
	failed, ended := !p.st.eof, p.ended
	p.st.mu.Unlock()
	if failed {
		_ = p.sock.Abort()
	} else if ended {
		// Both directions are over: the Close that follows sends FIN just as well,
		// and saves a system call.
	} else if err := p.sock.CloseWrite(); err != nil && !errors.Is(err, syscall.ENOTCONN) && !errors.Is(err, net.ErrClosed) {
		p.broke("close", err)
	}
	close(p.delivered)
}

// stopReading ends copyIn because the stream takes nothing more.
func (p *pipe) stopReading() {
	_ = p.sock.SetReadDeadline(past)
	p.st.mu.Lock()
	failed := p.st.rerr != nil
	p.st.mu.Unlock()
	if failed {
		_ = p.sock.SetWriteDeadline(time.Now().Add(drainLimit))
	}
}

// broke notes that the socket has failed: what comes for it is dropped, what it
// still gives is read.
func (p *pipe) broke(op string, err error) {
	st := p.st
	st.mu.Lock()
	if p.sockErr == nil {
		p.sockErr = &SocketError{Op: op, Err: err}
		close(p.broken)
	}
	if st.cause == nil {
		st.cause = p.sockErr
	}
	st.drop()
	end := !p.delivering && !p.draining && !p.over
	p.over = p.over || end
	st.mu.Unlock()
	st.c.cfg.Budget.relieve()
	_ = p.sock.SetReadDeadline(time.Now().Add(closeGrace))
	_ = p.sock.SetWriteDeadline(past)
	if end {
		close(p.delivered)
	}
}

// abort ends both directions after a local reset.
func (p *pipe) abort() {
	_ = p.sock.Abort()
	p.st.mu.Lock()
	end := !p.delivering && !p.draining && !p.over
	p.over = p.over || end
	p.st.mu.Unlock()
	if end {
		close(p.delivered)
	}
}
