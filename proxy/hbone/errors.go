package hbone

import (
	"errors"
	"fmt"
)

// Errors that callers branch on.
var (
	// ErrPiped is what Read and Write give once Pipe was called.
	ErrPiped = errors.New("stream is piped")
	// ErrPoolClosed is what Open gives after Close or Drain.
	ErrPoolClosed = errors.New("pool closed")
	// ErrServerDraining is what ServeConn gives for a tunnel that came after
	// Drain: it was told to go away and carried nothing.
	ErrServerDraining = errors.New("server draining")
	// ErrPingTimeout is wrapped by the *ConnError of a tunnel whose peer stopped
	// answering.
	ErrPingTimeout = errors.New("ping timeout")
	// ErrFlood is wrapped by the *ConnError of a tunnel whose peer exceeded a
	// limit on abuse.
	ErrFlood = errors.New("peer exceeded a protocol limit")
	// ErrExpired is the cause of a tunnel retired because a leaf certificate on
	// it expired.
	ErrExpired = errors.New("a certificate of the tunnel has expired, or it has reached its greatest age")

	errHandlerQuit = errors.New("handler returned without a reply")
	errNoStreams   = errors.New("tunnel takes no new streams")
	errAnswered    = errors.New("request was answered already")
)

// HandshakeError is a TLS handshake that did not complete, or whose result the
// peer rejected at once (TLS 1.3 clients learn of that after their handshake).
type HandshakeError struct{ Err error }

func (e *HandshakeError) Error() string { return "tls handshake: " + e.Err.Error() }
func (e *HandshakeError) Unwrap() error { return e.Err }

// PrefaceError is a tunnel that failed between the TLS handshake and the peer's
// first SETTINGS frame.
type PrefaceError struct{ Err error }

func (e *PrefaceError) Error() string { return "http2 handshake: " + e.Err.Error() }
func (e *PrefaceError) Unwrap() error { return e.Err }

// ConnError is the end of a tunnel, as its streams see it.
type ConnError struct {
	Code   ErrCode // of the GOAWAY, NO_ERROR if there was none
	Remote bool    // the peer sent that GOAWAY
	Err    error   // the cause
}

func (e *ConnError) Error() string {
	switch {
	case e.Code == ErrNo:
		return fmt.Sprintf("tunnel lost: %v", e.Err)
	case e.Remote:
		return fmt.Sprintf("tunnel lost: peer sent GOAWAY %v: %v", e.Code, e.Err)
	default:
		return fmt.Sprintf("tunnel lost: %v: %v", e.Code, e.Err)
	}
}
func (e *ConnError) Unwrap() error { return e.Err }

// StreamError is the reset of one stream.
type StreamError struct {
	Code   ErrCode
	Remote bool  // the peer sent it
	Err    error // why we sent it, may be nil
}

func (e *StreamError) Error() string {
	who := "sent"
	if e.Remote {
		who = "received"
	}
	if e.Err != nil {
		return fmt.Sprintf("stream reset %s: %v: %v", who, e.Code, e.Err)
	}
	return fmt.Sprintf("stream reset %s: %v", who, e.Code)
}
func (e *StreamError) Unwrap() error { return e.Err }

// StatusError is an answer to CONNECT other than 200.
type StatusError struct{ Code int }

func (e *StatusError) Error() string { return fmt.Sprintf("http status %d", e.Code) }

// SocketError is a failure of the application's socket in a Pipe, other than
// its reset.
type SocketError struct {
	Op  string // "read", "write" or "close"
	Err error
}

func (e *SocketError) Error() string { return "application socket: " + e.Op + ": " + e.Err.Error() }
func (e *SocketError) Unwrap() error { return e.Err }

// connErr is a violation that ends the tunnel with a GOAWAY.
func connErr(code ErrCode, format string, args ...any) *ConnError {
	return &ConnError{Code: code, Err: fmt.Errorf(format, args...)}
}

// flood is abuse that ends the tunnel (decision D11).
func flood(what string) *ConnError {
	return &ConnError{Code: ErrEnhanceYourCalm, Err: fmt.Errorf("%w: %s", ErrFlood, what)}
}
