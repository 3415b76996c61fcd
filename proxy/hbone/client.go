package hbone

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
)

// dialConn makes a tunnel of nc: TLS handshake, preface, the peer's SETTINGS. It
// owns nc, also when it fails. A nil tlsConfig means plaintext.
func dialConn(ctx context.Context, cfg *Config, nc net.Conn, tlsConfig *tls.Config, hooks func(*conn)) (*conn, error) {
	ctx, cancel := context.WithTimeout(ctx, cfg.HandshakeTimeout)
	defer cancel()
	c := newConn(cfg, nc, true, tlsConfig != nil)
	hooks(c)
	if tlsConfig != nil {
		var own *x509.Certificate
		c.tc = tls.Client(c.bc, captureLeaf(tlsConfig, &own))
		if err := c.tc.HandshakeContext(ctx); err != nil {
			_ = nc.Close()
			return nil, &HandshakeError{Err: err}
		}
		c.setTLS(own)
		if p := c.info.TLS.NegotiatedProtocol; p != "h2" {
			_ = nc.Close()
			return nil, &PrefaceError{Err: fmt.Errorf("peer chose ALPN %q, not h2", p)}
		}
	}
	c.start()
	c.wg.Go(c.readLoop)
	select {
	case <-c.ready:
		c.keepAlive()
		return c, nil
	case <-c.ended:
		err := c.end()
		c.finish()
		// A TLS 1.3 client learns that its certificate was refused from an alert
		// after its own handshake.
		var alert *net.OpError
		if errors.As(err, &alert) && alert.Op == "remote error" {
			return nil, &HandshakeError{Err: err.Err}
		}
		return nil, &PrefaceError{Err: err.Err}
	case <-ctx.Done():
		err := context.Cause(ctx)
		c.fail(&ConnError{Err: err}, aborted)
		c.finish()
		return nil, &PrefaceError{Err: fmt.Errorf("no SETTINGS from peer: %w", err)}
	}
}

// limit is how many streams the tunnel may carry at a time.
func (c *conn) limit(own int) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return int(min(uint32(own), c.peerStreams))
}

// usable tells whether new streams may be opened.
func (c *conn) usable() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err == nil && !c.away
}

// open sends CONNECT and waits for the answer. onEnd is called exactly once if
// it is called at all, and is called if open returns anything but errNoStreams.
func (c *conn) open(ctx context.Context, authority string, fields []Field, onEnd func()) (*stream, error) {
	block := requestBlock(authority, fields)
	st := newStream(c, 0)
	st.answer = make(chan struct{})
	st.onEnd = onEnd
	st.connect = true
	c.mu.Lock()
	if c.err != nil || c.away || c.lastID > maxStreamID-2 {
		c.mu.Unlock()
		return nil, errNoStreams
	}
	if c.lastID == 0 {
		c.lastID = 1
	} else {
		c.lastID += 2
	}
	st.id = c.lastID
	c.streams[st.id] = st
	c.opened.Add(1)
	// The id is taken and the frame queued under one lock: ids must rise on the wire.
	c.queue(false, func(b []byte) []byte {
		return appendHeaders(b, st.id, block, false, int(c.peerFrame.Load()))
	})
	c.mu.Unlock()
	c.kick()

	ctx, cancel := context.WithTimeoutCause(ctx, c.cfg.ResponseTimeout, errNoAnswer)
	defer cancel()
	select {
	case <-st.answer:
	case <-st.gone:
		select {
		case <-st.answer: // both
		default:
			if err := st.Cause(); err != nil {
				return nil, err
			}
			return nil, &StreamError{Code: ErrNo, Remote: true}
		}
	case <-ctx.Done():
		err := context.Cause(ctx)
		st.reset(ErrCancel, err)
		c.kick()
		return nil, err
	}
	if st.status != 200 {
		st.reset(ErrCancel, nil)
		c.kick()
		return nil, &StatusError{Code: st.status}
	}
	return st, nil
}

var errNoAnswer = fmt.Errorf("no answer to CONNECT: %w", context.DeadlineExceeded)
