// Package hbone is a CONNECT-only HTTP/2 endpoint (RFC 9113 §8.5) over TLS,
// the tunnel of the HBONE protocol. It knows frames, streams, limits and pools;
// it knows neither workloads nor policies nor SPIFFE.
//
// One tunnel is one HTTP/2 connection; one stream is one tunnelled TCP
// connection. A tunnel has one reader goroutine, which blocks on nothing but
// its socket. A stream that is piped to an application socket needs one
// goroutine more, the caller's, for the direction application → tunnel; the
// other direction is written by the tunnel's reader itself.
package hbone

import (
	"context"
	"crypto/tls"
	"net"
	"net/netip"
	"sync/atomic"
)

// Field is one header field. Names are lower case, as HTTP/2 sends them.
type Field struct{ Name, Value string }

// Stream is one tunnelled connection. Exactly one owner closes it.
//
// It starts in pull mode, where it is an ordinary net.Conn: Read returns flow
// control credit to the peer, deadlines work, and Read and Write may be called
// concurrently. Pipe switches it, once, to push mode.
type Stream interface {
	net.Conn

	// CloseWrite ends our direction: END_STREAM on an empty DATA frame. Reading
	// goes on.
	CloseWrite() error
	// Reset ends both directions at once with RST_STREAM. It never blocks.
	Reset(ErrCode)
	// Cause is why the stream ended abnormally, nil while it lives and after an
	// orderly end.
	Cause() error
	// Fields are the peer's header fields: of the request on a server's stream,
	// of the response on a client's; none any more after Pipe was called. The
	// caller must not change them.
	Fields() []Field
	// Conn describes the tunnel that carries the stream.
	Conn() *ConnInfo

	// Pipe joins the stream to an application socket until both directions have
	// ended, and returns when they have. It may be called once: it delivers what
	// is queued, then the tunnel's reader writes to s directly, while the
	// caller's goroutine runs application → tunnel. Afterwards Read and Write
	// fail with ErrPiped.
	//
	// Half-close travels both ways. A reset travels both ways (design D6): an
	// RST of s becomes RST_STREAM(CONNECT_ERROR) after the bytes already read,
	// and a stream error, or the loss of the tunnel, becomes s.Abort after the
	// bytes already queued. When ctx ends, the stream is reset with CANCEL and s
	// is aborted. Pipe always closes s, by Close or by Abort, and the stream.
	Pipe(ctx context.Context, s Socket, m *Meter) Result
}

// Socket is the application's side of a Pipe.
type Socket interface {
	net.Conn
	// CloseWrite sends FIN.
	CloseWrite() error
	// Abort closes the socket with RST.
	Abort() error
	// TryWrite writes what fits without blocking and returns how much that was:
	// n < len(p) with a nil error means that the socket is full.
	TryWrite(p []byte) (n int, err error)
}

// Meter counts the bytes of one Pipe where they are written. The counters may
// be shared with other pipes; nil counters are skipped.
type Meter struct {
	FromSocket *atomic.Uint64 // application → tunnel
	ToSocket   *atomic.Uint64 // tunnel → application
}

// Result is how a Pipe ended.
type Result struct {
	FromSocket, ToSocket uint64 // bytes written to the tunnel, to the socket
	// Reset says which end of the connection sent a TCP reset, if one did. Such
	// an end is not an error of ours: Err is nil.
	Reset ResetBy
	// Err is nil after an orderly end. Otherwise the first failure:
	// *SocketError, *StreamError, *ConnError, or the cause of ctx.
	Err error
}

// ResetBy names the end that reset a connection.
type ResetBy uint8

// The ends, seen from the Pipe.
const (
	ResetByNone   ResetBy = iota
	ResetBySocket         // the application at our Socket
	ResetByPeer           // the application behind the tunnel: RST_STREAM(CONNECT_ERROR)
)

// ConnInfo describes a tunnel. It is immutable and shared by its streams.
type ConnInfo struct {
	// TLS is the state after the handshake, the zero value on a plaintext tunnel.
	TLS           tls.ConnectionState
	Local, Remote netip.AddrPort
	// Abort ends the tunnel at once; its streams end with cause. Nothing is said
	// to the peer. Safe for concurrent use, does not block.
	Abort func(cause error)
	// Terminate is Abort with a word to the peer: RST_STREAM(CANCEL) for every
	// stream, then GOAWAY(NO_ERROR).
	Terminate func(cause error)
	// Drain lets the tunnel end with its last stream; the peer learns by GOAWAY
	// that no new ones are taken. Safe for concurrent use, does not block.
	Drain func()
}

// Handshake is how one tunnel is secured, and who is told of it.
type Handshake struct {
	TLS *tls.Config // nil: plaintext
	// Established, if not nil, is called when the tunnel is up, before it has
	// streams. What it returns, if not nil, is called once the tunnel has ended
	// with all that it carried. Neither may block.
	Established func(*ConnInfo) (ended func())
}

func (h Handshake) established(info *ConnInfo) (ended func()) {
	if h.Established != nil {
		ended = h.Established(info)
	}
	if ended == nil {
		ended = func() {}
	}
	return ended
}

// Handler serves one request of a Server, in a goroutine of its own. It must
// call exactly one of Accept and Reject; the stream is reset if it returns
// without. ctx ends, with the cause, when the stream or the tunnel ends before
// Accept was called, and when the server is forced to stop.
type Handler func(ctx context.Context, r *Request)

// TLSSource returns what one handshake needs. It may block, bounded by ctx.
type TLSSource func(ctx context.Context) (Handshake, error)
