package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"

	"github.com/ztunnel-go/ztunnel/internal/backoff"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

const (
	// streamWait is how long a client may take for one query, from the end of the one
	// before, and to take an answer (spec/state-xds-dns.md §5.1).
	streamWait = 5 * time.Second
	// maxQueued answers of one connection wait for those before them. A client that
	// asks for more waits, too.
	maxQueued = 32
	// linger is how long a listener that is drained gets no connection before it is
	// closed (decision D14), and its connections no query; maxLinger is how long it
	// may get connections.
	linger    = time.Second
	maxLinger = 3 * time.Second
)

// listener is a TCP listener for clients.
type listener struct {
	netns.Listener
	draining atomic.Bool

	mu    sync.Mutex // guards conns
	conns map[netns.Conn]struct{}
}

// drain makes serveTCP answer what has come, and end.
func (ln *listener) drain() {
	ln.draining.Store(true)
	if d, ok := ln.Listener.(netns.DeadlineSetter); ok {
		_ = d.SetDeadline(pastDeadline)
	} else {
		_ = ln.Close()
	}
	ln.mu.Lock()
	defer ln.mu.Unlock()
	for c := range ln.conns {
		_ = c.SetReadDeadline(time.Now().Add(linger))
	}
}

// patience bounds the wait of a connection for a query.
func (ln *listener) patience(c netns.Conn) {
	_ = c.SetReadDeadline(time.Now().Add(streamWait))
	if ln.draining.Load() { // after that, so that drain does not come in between
		_ = c.SetReadDeadline(time.Now().Add(linger))
	}
}

func (ln *listener) add(c netns.Conn) {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	if ln.conns == nil {
		ln.conns = make(map[netns.Conn]struct{})
	}
	ln.conns[c] = struct{}{}
}

func (ln *listener) remove(c netns.Conn) {
	ln.mu.Lock()
	defer ln.mu.Unlock()
	if delete(ln.conns, c); len(ln.conns) == 0 {
		ln.conns = nil
	}
}

// serveTCP accepts connections until the listener is closed, or drained, and waits
// for them; ended has ended.
func (s *Server) serveTCP(ctx, ended context.Context, ln *listener) {
	var conns sync.WaitGroup
	defer conns.Wait()
	defer ln.Close()
	retry := backoff.Policy{First: 5 * time.Millisecond, Max: time.Second, Budget: -1}.New()
	var until time.Time // of draining
	for {
		c, err := ln.Accept()
		switch {
		case err == nil:
			retry.Reset()
			s.accepted(ctx, ended, ln, c, &conns)
		case errors.Is(err, net.ErrClosed), errors.Is(err, os.ErrDeadlineExceeded) && !until.IsZero():
			return
		case errors.Is(err, os.ErrDeadlineExceeded):
			until = time.Now().Add(maxLinger)
		default:
			s.log.ErrorContext(ctx, "accept failed", "listener", "dns", "error", err.Error())
			if !backoff.Sleep(ctx, retry.Next(time.Now())) {
				return
			}
		}
		if !until.IsZero() {
			ln.yield(ctx, s, until)
		}
	}
}

// yield leaves new connections to others, and bounds the wait for those that come
// here all the same.
func (ln *listener) yield(ctx context.Context, s *Server, until time.Time) {
	if y, ok := ln.Listener.(netns.Yielder); ok {
		if _, err := y.Yield(); err != nil {
			s.log.WarnContext(ctx, "DNS connections may get lost while another proxy takes over", "address", ln.Addr(), "error", err.Error())
		}
	}
	next := time.Now().Add(linger)
	if next.After(until) {
		next = until
	}
	_ = ln.Listener.(netns.DeadlineSetter).SetDeadline(next) // drain has done so, too
}

// accepted serves a connection, or refuses it.
func (s *Server) accepted(ctx, ended context.Context, ln *listener, c netns.Conn, conns *sync.WaitGroup) {
	if !s.peers.allowed(c.Remote()) || !c.Local().Addr().IsLoopback() || !s.cfg.Limits.conns.take() {
		_ = c.Abort()
		return
	}
	select {
	case s.conns <- struct{}{}:
	case <-ctx.Done():
		s.cfg.Limits.conns.release()
		_ = c.Abort()
		return
	}
	conns.Go(func() {
		defer s.cfg.Limits.conns.release()
		defer func() { <-s.conns }()
		ln.add(c)
		defer ln.remove(c)
		s.serveConn(ctx, ended, ln, c)
	})
}

// stream is one connection of a client. Its answers go out in the order of the
// queries.
type stream struct {
	conn    netns.Conn
	length  [2]byte // of the query that is being read
	pending sync.WaitGroup
	queue   chan *queued // to the writer; nil as long as no answer had to wait
	waiting atomic.Int32 // in queue, or being written from there
	writer  sync.WaitGroup
}

// queued is an answer that waits for its turn.
type queued struct {
	msg  []byte        // with its length in front; nil: there is none
	done chan struct{} // closed when msg is set; nil: it is
}

// serveConn reads the queries of a connection and closes it.
func (s *Server) serveConn(ctx, ended context.Context, ln *listener, c netns.Conn) {
	st := &stream{conn: c}
	defer c.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer atEnd(ctx, func() { _ = c.Abort() })()
	defer st.finish()
	defer s.recovered(ctx)
	for {
		ln.patience(c)
		w, raw, err := st.read()
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, os.ErrDeadlineExceeded) {
				cancel() // nobody is there to be answered
			}
			return
		}
		ok := s.query(ctx, cancel, ended, st, w, raw)
		w.putBack()
		if !ok {
			return
		}
	}
}

// read returns the next query, and memory that the caller puts back.
func (st *stream) read() (w *work, raw []byte, err error) {
	if _, err := io.ReadFull(st.conn, st.length[:]); err != nil {
		return nil, nil, err
	}
	n := int(binary.BigEndian.Uint16(st.length[:]))
	w = takeWork()
	if raw = w.in[:]; n > len(raw) {
		raw = make([]byte, n)
	}
	if _, err := io.ReadFull(st.conn, raw[:n]); err != nil {
		w.putBack()
		return nil, nil, err
	}
	return w, raw[:n], nil
}

// query answers one query, or queues its answer. It is false if the client takes no
// more of them.
func (s *Server) query(ctx context.Context, cancel func(), ended context.Context, st *stream, w *work, raw []byte) bool {
	reply, source, v := s.now(ended, w, raw, overTCP)
	if v == awaited {
		if s.reserve() {
			raw = slices.Clone(raw)
			return st.enqueue(ctx, cancel, func() []byte {
				defer s.release()
				return s.later(ctx, raw, overTCP, source)
			})
		}
		s.refused(ctx, &w.query, source)
		reply, v = w.query.refuse(w.out[2:], dns.RcodeServerFailure), answered
	}
	if v == dropped {
		return true
	}
	binary.BigEndian.PutUint16(w.out[:], uint16(len(reply)))
	msg := w.out[:2+len(reply)]
	if st.waiting.Load() == 0 {
		return st.write(msg) == nil
	}
	msg = slices.Clone(msg)
	return st.put(ctx, cancel, &queued{msg: msg})
}

// enqueue puts the answer in the queue that f will return.
func (st *stream) enqueue(ctx context.Context, cancel func(), f func() []byte) bool {
	q := &queued{done: make(chan struct{})}
	st.pending.Go(func() {
		defer close(q.done)
		if reply := f(); reply != nil {
			q.msg = append(binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(reply)), uint16(len(reply))), reply...)
		}
	})
	return st.put(ctx, cancel, q)
}

// put waits for room in the queue.
func (st *stream) put(ctx context.Context, cancel func(), q *queued) bool {
	if st.queue == nil {
		st.queue = make(chan *queued, maxQueued)
		st.writer.Go(func() { st.writeQueued(cancel) })
	}
	st.waiting.Add(1)
	select {
	case st.queue <- q:
		return true
	case <-ctx.Done():
		return false
	}
}

// writeQueued writes answers in their turn. After an error it ends what is under way.
func (st *stream) writeQueued(cancel func()) {
	for q := range st.queue {
		if q.done != nil {
			<-q.done
		}
		if q.msg != nil && st.write(q.msg) != nil {
			cancel()
		}
		st.waiting.Add(-1)
	}
}

func (st *stream) write(msg []byte) error {
	_ = st.conn.SetWriteDeadline(time.Now().Add(streamWait))
	_, err := st.conn.Write(msg)
	return err
}

// finish waits until all that was asked is answered.
func (st *stream) finish() {
	if st.queue != nil {
		close(st.queue)
	}
	st.writer.Wait()
	st.pending.Wait()
}
