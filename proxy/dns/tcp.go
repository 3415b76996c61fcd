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
	// streamWait is how long a client may take for one query, from when it has all its
	// answers, and to take an answer (spec/state-xds-dns.md §5.1).
	streamWait = 5 * time.Second
	// maxQueued answers of one connection wait for those before them. A client that
	// asks for more waits, too.
	maxQueued = 32
	// linger is how long a listener that is drained gets no connection before it is
	// closed (decision D14), and its connections no query; maxLinger is how long they
	// may get any.
	linger    = time.Second
	maxLinger = 3 * time.Second
	// settled is how long connections that were queued before a Yield may take to be
	// accepted.
	settled = 100 * time.Millisecond
)

// listener is a TCP listener for clients.
type listener struct {
	netns.Listener
	drained atomic.Pointer[time.Time] // when that began; nil before
	yielded time.Time                 // of serveTCP

	mu    sync.Mutex // guards conns
	conns map[netns.Conn]struct{}
}

// drain makes serveTCP answer what has come, and end.
func (ln *listener) drain() {
	now := time.Now()
	ln.drained.Store(&now)
	if d, ok := ln.Listener.(netns.DeadlineSetter); ok {
		_ = d.SetDeadline(pastDeadline)
	} else {
		_ = ln.Close()
	}
	ln.mu.Lock()
	defer ln.mu.Unlock()
	for c := range ln.conns {
		_ = c.SetReadDeadline(now.Add(linger))
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
			s.yield(ctx, ln)
			next := time.Now().Add(linger)
			if next.After(until) {
				next = until
			}
			_ = ln.Listener.(netns.DeadlineSetter).SetDeadline(next) // drain has done so, too
		}
	}
}

// yield leaves new connections to others (decision D14). It does so again when some
// come later than those that were queued.
func (s *Server) yield(ctx context.Context, ln *listener) {
	y, ok := ln.Listener.(netns.Yielder)
	if !ok || time.Since(ln.yielded) < settled {
		return
	}
	if _, err := y.Yield(); err != nil {
		s.log.WarnContext(ctx, "DNS connections may get lost while another proxy takes over", "address", ln.Addr(), "error", err.Error())
	}
	ln.yielded = time.Now()
}

// accepted serves a connection, or refuses it.
func (s *Server) accepted(ctx, ended context.Context, ln *listener, c netns.Conn, conns *sync.WaitGroup) {
	if !c.Local().Addr().IsLoopback() || !s.admits(ctx, c.Remote()) || !s.cfg.Limits.conns.take() {
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
	ln      *listener
	conn    netns.Conn
	length  [2]byte // of the query that is being read
	pending sync.WaitGroup
	queue   chan *queued // to the writer; nil as long as no answer had to wait
	waiting atomic.Int32 // in queue, or being written from there
	writer  sync.WaitGroup
}

// queued is an answer that waits for its turn. As long as it does it takes the room
// of a query that waits, found or not: answers that nobody reads are memory, too.
type queued struct {
	msg  []byte        // with its length in front, or the rest of it; nil: there is none
	find func() []byte // finds the answer; nil: there is one
	done chan struct{} // closed when find has
	room bool          // to be released
}

// serveConn reads the queries of a connection and closes it.
func (s *Server) serveConn(ctx, ended context.Context, ln *listener, c netns.Conn) {
	st := &stream{ln: ln, conn: c}
	defer c.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer atEnd(ctx, func() { _ = c.Abort() })()
	defer st.finish()
	defer s.recovered(ctx)
	for {
		st.patience()
		raw, err := st.read()
		if err != nil {
			if !isEnd(err) {
				cancel() // nobody is there to be answered
			}
			return
		}
		q, err := s.take(ctx, ended, st, raw)
		if err != nil {
			cancel()
			return
		}
		if q != nil && !s.put(ctx, cancel, st, q) {
			s.passed(q)
			return
		}
	}
}

// patience bounds the wait for a query, unless the client waits for an answer. Who
// goes on asking does not hold up a drain. What changes meanwhile is seen by whoever
// comes last.
func (st *stream) patience() {
	if st.waiting.Load() > 0 {
		_ = st.conn.SetReadDeadline(time.Time{})
	}
	if st.waiting.Load() == 0 {
		_ = st.conn.SetReadDeadline(time.Now().Add(streamWait))
	}
	if began := st.ln.drained.Load(); began != nil {
		until, last := time.Now().Add(linger), began.Add(maxLinger)
		if until.After(last) {
			until = last
		}
		_ = st.conn.SetReadDeadline(until)
	}
}

// isEnd tells whether a client only has no more queries.
func isEnd(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, os.ErrDeadlineExceeded)
}

// read returns the next query. It takes no more memory than has come.
func (st *stream) read() ([]byte, error) {
	if _, err := io.ReadFull(st.conn, st.length[:]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(st.length[:]))
	raw := make([]byte, 0, min(n, plainDatagram))
	for len(raw) < n {
		raw = slices.Grow(raw, 1)
		room := raw[len(raw):min(cap(raw), n)]
		got, err := st.conn.Read(room)
		if raw = raw[:len(raw)+got]; err != nil && len(raw) < n {
			return nil, err
		}
	}
	return raw, nil
}

// take answers a query if that takes no time and the client takes the answer.
// Otherwise it returns what has to wait. Room is reserved for it, unless it is short
// or the rest of an answer, of which a connection has one.
func (s *Server) take(ctx, ended context.Context, st *stream, raw []byte) (*queued, error) {
	w := takeWork()
	defer w.putBack()
	reply, source, v := s.now(ended, w, raw, overTCP)
	if v == dropped {
		return nil, nil
	}
	inTurn := st.waiting.Load() == 0
	needed := v == awaited || !inTurn && len(reply) > plainDatagram
	room := needed && s.reserve()
	switch {
	case v == awaited && room:
		return &queued{room: true, done: make(chan struct{}), find: func() []byte {
			return s.later(ctx, raw, overTCP, st.conn.Remote().Port(), source)
		}}, nil
	case v == awaited:
		s.refused(ctx, &w.query, source)
		reply = w.query.refuse(w.out[2:], dns.RcodeServerFailure)
	case needed && !room:
		s.flooded(ctx)
		reply = w.query.refuse(w.out[2:], dns.RcodeServerFailure)
	}
	binary.BigEndian.PutUint16(w.out[:], uint16(len(reply)))
	msg := w.out[:2+len(reply)]
	if inTurn {
		n, err := st.conn.TryWrite(msg)
		if err != nil || n == len(msg) {
			return nil, err
		}
		msg = msg[n:]
	}
	return &queued{msg: slices.Clone(msg), room: room}, nil
}

// put waits for room in the queue. It is false if the connection ends before.
func (s *Server) put(ctx context.Context, cancel func(), st *stream, q *queued) bool {
	if st.queue == nil {
		st.queue = make(chan *queued, maxQueued)
		st.writer.Go(func() { s.writeQueued(cancel, st) })
	}
	st.waiting.Add(1)
	select {
	case st.queue <- q:
	case <-ctx.Done():
		return false
	}
	if q.find != nil {
		st.pending.Go(q.answer)
	}
	return true
}

func (q *queued) answer() {
	defer close(q.done)
	if reply := q.find(); reply != nil {
		q.msg = append(binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(reply)), uint16(len(reply))), reply...)
	}
}

// writeQueued writes answers in their turn. After an error it ends what is under way.
func (s *Server) writeQueued(cancel func(), st *stream) {
	for q := range st.queue {
		if q.find != nil {
			<-q.done
		}
		if q.msg != nil && st.write(q.msg) != nil {
			cancel()
		}
		s.passed(q)
		if st.waiting.Add(-1) == 0 {
			st.patience()
		}
	}
}

// passed gives back the room of an answer that waits no more.
func (s *Server) passed(q *queued) {
	if q.room {
		s.release()
	}
}

func (st *stream) write(msg []byte) error {
	_ = st.conn.SetWriteDeadline(time.Now().Add(streamWait))
	_, err := st.conn.Write(msg)
	_ = st.conn.SetWriteDeadline(time.Time{}) // TryWrite would fail once it has passed
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
