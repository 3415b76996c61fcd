//go:build linux

//lint:file-ignore SA1019 this file measures what x/net/http2 costs; the product does not use these types

package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"sync"

	"golang.org/x/net/http2"
)

const (
	h2Copy         = 64 << 10
	h2StreamWindow = 4 << 20
	h2ConnWindow   = 16 << 20
	h2Frame        = 1 << 20
	h2Streams      = 250
)

// h2client carries application connections as CONNECT streams of golang.org/x/net/http2 over pooled connections.
// The Transport and Server types are marked as deprecated upstream; they are measured here, not used by the product.
type h2client struct {
	transport *http2.Transport
	dial      func(ctx context.Context, dst netip.AddrPort) (net.Conn, error)

	mu    sync.Mutex // guards conns; held while dialling, so that a burst shares one connection
	conns map[netip.AddrPort][]*http2.ClientConn
}

func newH2Client(r *reference) (*h2client, error) {
	t1 := &http.Transport{HTTP2: &http.HTTP2Config{
		MaxReceiveBufferPerConnection: h2ConnWindow,
		MaxReceiveBufferPerStream:     h2StreamWindow,
		MaxReadFrameSize:              h2Frame,
	}}
	t2, err := http2.ConfigureTransports(t1)
	if err != nil {
		return nil, fmt.Errorf("configure HTTP/2: %w", err)
	}
	t2.DisableCompression = true
	dial := func(ctx context.Context, dst netip.AddrPort) (net.Conn, error) {
		conn, err := r.dial(ctx, netip.AddrPortFrom(dst.Addr(), r.peerPort))
		if err != nil {
			return nil, err
		}
		secure := tls.Client(conn, r.client)
		if err := secure.HandshakeContext(ctx); err != nil {
			conn.Close()
			return nil, err
		}
		return secure, nil
	}
	return &h2client{transport: t2, dial: dial, conns: make(map[netip.AddrPort][]*http2.ClientConn)}, nil
}

// reserve returns a pooled connection with room for one more stream, or a new one.
func (c *h2client) reserve(ctx context.Context, dst netip.AddrPort) (*http2.ClientConn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	alive := c.conns[dst][:0]
	defer func() { c.conns[dst] = alive }()
	var found *http2.ClientConn
	for _, conn := range c.conns[dst] {
		if state := conn.State(); state.Closed || state.Closing {
			continue
		}
		alive = append(alive, conn)
		if found == nil && conn.ReserveNewRequest() {
			found = conn
		}
	}
	if found != nil {
		return found, nil
	}
	raw, err := c.dial(ctx, dst)
	if err != nil {
		return nil, err
	}
	conn, err := c.transport.NewClientConn(raw)
	if err != nil {
		raw.Close()
		return nil, err
	}
	conn.ReserveNewRequest()
	alive = append(alive, conn)
	return conn, nil
}

func (c *h2client) carry(ctx context.Context, app *net.TCPConn, dst netip.AddrPort) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	conn, err := c.reserve(ctx, dst)
	if err != nil {
		return
	}
	body, upload := io.Pipe()
	defer body.Close()
	req := (&http.Request{
		Method: http.MethodConnect,
		URL:    &url.URL{Scheme: "https", Host: dst.String()},
		Host:   dst.String(),
		Header: http.Header{},
		Body:   body,
	}).WithContext(ctx)
	resp, err := conn.RoundTrip(req)
	if err != nil {
		return
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return
	}
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		upload.CloseWithError(copyWith(h2Copy)(upload, app))
	}()
	if copyWith(h2Copy)(app, resp.Body) == nil {
		_ = app.CloseWrite()
	}
	// x/net cannot half-close from its server: the end of the response is the end of the stream.
	app.Close()
	body.Close()
	<-sent
}

func (r *reference) serveH2(ctx context.Context, conn *net.TCPConn) {
	secure := tls.Server(conn, r.server)
	if err := secure.HandshakeContext(ctx); err != nil {
		return
	}
	server := &http2.Server{
		MaxReadFrameSize:             h2Frame,
		MaxUploadBufferPerConnection: h2ConnWindow,
		MaxUploadBufferPerStream:     h2StreamWindow,
		MaxConcurrentStreams:         h2Streams,
	}
	server.ServeConn(secure, &http2.ServeConnOpts{Context: ctx, Handler: http.HandlerFunc(r.connect)})
}

// connect is the inbound half of one h2tun stream. It ends with the application's last byte.
func (r *reference) connect(w http.ResponseWriter, req *http.Request) {
	app, err := r.dial(req.Context(), r.target)
	if err != nil {
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	}
	defer app.Close()
	w.WriteHeader(http.StatusOK)
	control := http.NewResponseController(w)
	if control.Flush() != nil {
		return
	}
	received := make(chan struct{})
	go func() {
		defer close(received)
		if copyWith(h2Copy)(app, req.Body) == nil {
			_ = app.CloseWrite()
		}
	}()
	_ = copyWith(h2Copy)(flushWriter{w, control}, app)
	app.Close()
	req.Body.Close()
	<-received
}

// flushWriter sends every write at once.
type flushWriter struct {
	io.Writer
	control *http.ResponseController
}

func (w flushWriter) Write(p []byte) (int, error) {
	n, err := w.Writer.Write(p)
	if err == nil {
		err = w.control.Flush()
	}
	return n, err
}

// close ends the pooled connections at once.
func (c *h2client) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conns := range c.conns {
		for _, conn := range conns {
			conn.Close()
		}
	}
}
