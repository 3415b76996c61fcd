package hbone

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Request is one request to a Server. Exactly one of Accept and Reject must be
// called.
type Request struct {
	// Method is CONNECT, or something that deserves a 400. The engine refuses
	// malformed requests of either kind by itself.
	Method string
	// Authority is :authority as sent. The engine checks only that CONNECT has one.
	Authority string
	// Fields are the other fields, in the order received. They must not be changed.
	Fields []Field
	// Conn describes the tunnel.
	Conn *ConnInfo

	st     *stream
	once   sync.Once
	ctx    context.Context // the handler's
	cancel context.CancelCauseFunc
	state  atomic.Int32
	rest   func(context.Context) // of Continue
}

// Cancel ends the handler's context with cause. Safe for concurrent use.
func (r *Request) Cancel(cause error) { r.cancel(cause) }

// Continue makes the rest of a handler's work run after the handler has
// returned, in a goroutine of its own that counts as the handler, with the
// handler's context. What lasts, such as Pipe, waits there on a small stack
// instead of the one that deciding and connecting has grown. Only the handler may
// call it, once. Fields are gone by then.
func (r *Request) Continue(rest func(context.Context)) { r.rest = rest }

// The states of a request's handler.
const (
	reqIdle     = iota // not started, or returned
	reqRunning         // counted as its stream
	reqOrphaned        // counted by itself
)

// ended is called when the stream has ended both ways.
func (r *Request) ended() {
	if r.state.CompareAndSwap(reqRunning, reqOrphaned) {
		r.st.c.orphans.Add(1)
	}
	if r.st.answered.Load() {
		return
	}
	cause := r.st.Cause()
	if cause == nil {
		cause = &StreamError{Code: ErrNo, Remote: true}
	}
	r.cancel(cause)
}

// Accept answers 200 and returns the stream, which the caller owns. It fails if
// the stream has ended already, or after Reject.
func (r *Request) Accept(fields ...Field) (Stream, error) {
	if err := checkFields(fields); err != nil {
		return nil, err
	}
	err := errAnswered
	r.once.Do(func() { err = r.answer(200, fields, "", false) })
	if err != nil {
		return nil, err
	}
	return r.st, nil
}

// Reject answers with status and ends the stream. What the client has sent, or
// still sends, is discarded. body may be empty; it must fit into one frame.
func (r *Request) Reject(status int, body string) error {
	err := errAnswered
	r.once.Do(func() {
		var fields []Field
		if body != "" {
			fields = []Field{{"content-type", "text/plain; charset=utf-8"}}
		}
		if err = r.answer(status, fields, body, true); err != nil {
			return
		}
		st := r.st
		open := st.state.Load()&recvClosed == 0
		st.mu.Lock()
		st.closed = true
		st.drop()
		st.mu.Unlock()
		st.c.cfg.Budget.relieve()
		st.done(sendClosed)
		if open {
			st.reset(ErrNo, nil)
		}
		st.c.kick()
	})
	return err
}

// answer queues the response, unless the stream has ended.
func (r *Request) answer(status int, fields []Field, body string, end bool) error {
	st := r.st
	c := st.c
	block := responseBlock(status, fields)
	c.w.mu.Lock()
	over := st.sendOver || c.w.err != nil || c.w.closing
	if !over {
		c.queueLocked(false, func(b []byte) []byte {
			b = appendHeaders(b, st.id, block, end && body == "", int(c.peerFrame.Load()))
			if body != "" {
				b = appendFrameHeader(b, len(body), frameData, flagEndStream, st.id)
				b = append(b, body...)
			}
			return b
		})
		st.sendOver = end
		st.answered.Store(true)
	}
	c.w.mu.Unlock()
	if over {
		return st.sendError()
	}
	if !end { // Reject has more to send
		c.kick()
	}
	return nil
}

// Server serves tunnels. Create it with NewServer.
type Server struct {
	cfg *Config

	mu       sync.Mutex // guards the rest
	conns    map[*conn]struct{}
	draining bool
}

// NewServer returns a server that has nothing to stop until ServeConn is called.
func NewServer(cfg Config) *Server {
	return &Server{cfg: cfg.withDefaults(), conns: make(map[*conn]struct{})}
}

// GoAway lets every tunnel that is there end as Drain does; those to come are
// served. It does not block and may be called again.
func (s *Server) GoAway() { s.drain(false) }

// Drain lets every tunnel, present and future, end: GOAWAY with the highest id, a
// PING round trip, GOAWAY with the last id (RFC 9113 §6.8). Streams run to their
// end; requests that cross the first GOAWAY are served, later ones get
// REFUSED_STREAM. A tunnel that has had no stream yet has a second for its first:
// there are clients that take a GOAWAY before for a failure. Drain does not block
// and may be called again.
func (s *Server) Drain() { s.drain(true) }

func (s *Server) drain(future bool) {
	s.mu.Lock()
	s.draining = s.draining || future
	conns := make([]*conn, 0, len(s.conns))
	for c := range s.conns {
		conns = append(conns, c)
	}
	s.mu.Unlock()
	for _, c := range conns {
		c.drainYoung()
	}
}

// ServeConn serves one tunnel on nc, which it owns: handshake, preface, requests
// until the tunnel ends, one way or another. A nil source means plaintext. It
// returns when every goroutine it started has ended, the handlers included; nil
// after an orderly end. The end of ctx ends every stream with its cause.
func (s *Server) ServeConn(ctx context.Context, nc net.Conn, source TLSSource, handler Handler) error {
	c := newConn(s.cfg, nc, false, source != nil)
	late := false
	begin := time.Now()
	defer func() { _ = nc.Close() }()
	var h Handshake
	if source != nil {
		if err := c.onOwnStack(func() (err error) { h, err = s.handshake(ctx, c, source); return err }); err != nil {
			c.hangUp()
			return err
		}
	}
	var cancel context.CancelCauseFunc
	c.ctx, cancel = context.WithCancelCause(ctx)
	defer cancel(nil)
	var handlers sync.WaitGroup
	c.accept = func(req *Request) { s.accept(c, req, handler, &handlers) }
	c.start() // SETTINGS come first, also before the GOAWAY of a Drain
	defer h.established(c.info)()
	s.mu.Lock()
	s.conns[c] = struct{}{}
	late = s.draining
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
	}()

	stop := context.AfterFunc(ctx, func() { c.fail(&ConnError{Err: context.Cause(ctx)}, aborted) })
	defer stop()
	preface := time.AfterFunc(s.cfg.HandshakeTimeout-time.Since(begin), func() {
		if !isClosed(c.ready) {
			c.fail(&ConnError{Err: fmt.Errorf("no SETTINGS from peer: %w", context.DeadlineExceeded)}, lost)
		}
	})
	defer preface.Stop()
	c.keepAlive()
	c.idleAfter(s.cfg.IdleTimeout)
	c.expireAt()
	if late {
		c.drainYoung()
	}
	c.readLoop()
	c.finish()
	handlers.Wait()
	return s.result(ctx, c, late)
}

func (s *Server) result(ctx context.Context, c *conn, late bool) error {
	err := c.end()
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case !isClosed(c.ready) && !errors.Is(err, net.ErrClosed):
		return &PrefaceError{Err: err.Err}
	case late:
		return ErrServerDraining
	case errors.Is(err, net.ErrClosed):
		return nil // drained, or idle
	case errors.Is(err, io.EOF) && c.cut.Load() == 0:
		return nil // the client closed a tunnel without streams
	}
	return err
}

// onOwnStack runs f in a goroutine of its own and waits for it. A handshake grows
// a stack to many times what the rest of a tunnel's life needs, and a goroutine
// keeps what it has grown.
func (c *conn) onOwnStack(f func() error) (err error) {
	var g sync.WaitGroup
	g.Go(func() {
		defer func() {
			if v := recover(); v != nil {
				c.panicked("handshake", v)
				err = &HandshakeError{Err: fmt.Errorf("panic: %v", v)}
			}
		}()
		err = f()
	})
	g.Wait()
	return err
}

func (s *Server) handshake(ctx context.Context, c *conn, source TLSSource) (Handshake, error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.HandshakeTimeout)
	defer cancel()
	h, err := source(ctx)
	if err != nil {
		return h, &HandshakeError{Err: err}
	}
	var own *x509.Certificate
	c.tc = tls.Server(c.bc, captureLeaf(h.TLS, &own))
	if err := c.tc.HandshakeContext(ctx); err != nil {
		return h, &HandshakeError{Err: err}
	}
	c.setTLS(own)
	// A client may leave ALPN out; it shows by its preface what it speaks.
	if p := c.info.TLS.NegotiatedProtocol; p != "h2" && p != "" {
		return h, &PrefaceError{Err: fmt.Errorf("client offered ALPN %q, not h2", p)}
	}
	return h, nil
}

// hangUp ends a connection whose handshake failed, so that the alert arrives: a
// socket closed with unread bytes would take it back.
func (c *conn) hangUp() {
	if cw, ok := c.bc.Conn.(interface{ CloseWrite() error }); ok && cw.CloseWrite() == nil {
		_ = c.bc.Conn.SetReadDeadline(time.Now().Add(closeGrace))
		c.linger()
	}
}

// expireAt sends the peer away when a certificate of the tunnel expires.
func (c *conn) expireAt() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.expiry.IsZero() && c.err == nil {
		c.expire = time.AfterFunc(time.Until(c.expiry), c.drain)
	}
}

// accept runs h in a goroutine of its own.
func (s *Server) accept(c *conn, req *Request, h Handler, handlers *sync.WaitGroup) {
	req.state.Store(reqRunning)
	if req.st.state.Load() == recvClosed|sendClosed { // it ended before we counted it
		req.cancel(net.ErrClosed)
		req.state.Store(reqIdle)
		return
	}
	handlers.Go(func() {
		c.runHandler(req, h)
		if req.rest == nil {
			c.handled(req)
			return
		}
		req.Fields = nil // an idle stream keeps what it needs
		handlers.Go(req.runRest)
	})
}

// runRest runs what Continue was given. Its frames lie under an idle stream for
// as long as that lives: they are few and small.
func (r *Request) runRest() {
	defer r.restDone()
	r.rest(r.ctx)
}

func (r *Request) restDone() {
	if v := recover(); v != nil {
		r.st.c.panicked("handler", v)
		r.st.Reset(ErrInternal)
	}
	r.st.c.handled(r)
}

// runHandler runs a handler. A panic ends the request.
func (c *conn) runHandler(req *Request, h Handler) {
	defer func() {
		if v := recover(); v != nil {
			c.panicked("handler", v)
			req.rest = nil
			req.st.Reset(ErrInternal)
		}
	}()
	h(req.ctx, req)
}

// handled ends a request whose handler is through.
func (c *conn) handled(req *Request) {
	req.once.Do(func() { req.st.reset(ErrInternal, errHandlerQuit); c.kick() })
	if req.state.Swap(reqIdle) == reqOrphaned {
		c.orphans.Add(-1)
	}
	req.cancel(nil)
}
