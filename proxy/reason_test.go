package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"syscall"
	"testing"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/proxy/hbone"
	"github.com/ztunnel-go/ztunnel/state"
)

// The table of spec/datapath.md §10.6.
func TestReason(t *testing.T) {
	refused := syscall.ECONNREFUSED
	revoked := &ca.RevokedError{Serial: big.NewInt(1), Issuer: "CN=x"}
	for _, tt := range []struct {
		name       string
		err        error
		text, flag string
	}{
		{"orderly end", nil, "", "-"},
		{"denied by a policy", &state.Denied{Policy: "ns/p"}, "connection closed due to policy rejection: explicitly denied by: ns/p", "DENY"},
		{"no policy allows", &state.Denied{}, "connection closed due to policy rejection: allow policies exist, but none allowed", "DENY"},
		{"late denial", directionError{"send", fmt.Errorf("x: %w", ErrPolicyChanged)}, "connection closed due to policy change", "DENY"},
		{"revoked", directionError{"receive", fmt.Errorf("%w: serial", ErrCertificateRevoked)}, ErrCertificateRevoked.Error(), "CERT_REVOKED"},
		{"revoked outweighs a denial", errors.Join(ErrPolicyChanged, ErrCertificateRevoked), ErrCertificateRevoked.Error(), "CERT_REVOKED"},
		{"revoked before the answer", &openError{err: &hbone.ConnError{Err: ErrCertificateRevoked}}, ErrCertificateRevoked.Error(), "CERT_REVOKED"},
		{"revoked at the handshake", &openError{err: &hbone.HandshakeError{Err: revoked}}, "io error: tls handshake: " + revoked.Error(), "CERT_REVOKED"},
		{"anchor removed", fmt.Errorf("%w: R29", errAnchorRemoved), errAnchorRemoved.Error() + ": R29", "TLS_FAILURE"},
		{"identity withdrawn", fmt.Errorf("%w: no entry", errIdentityWithdrawn), errIdentityWithdrawn.Error() + ": no entry", "IDENTITY_ERROR"},
		{"drain deadline", ErrDraining, "connection closed due to connection drain", "-"},
		{"drain deadline while connecting", &upstreamError{ErrDraining}, "connection closed due to connection drain", "-"},
		{"certificate", &identityError{ca.ErrDenied}, "identity error: " + ca.ErrDenied.Error(), "IDENTITY_ERROR"},
		{"certificate, through the pool", fmt.Errorf("dial: %w", &identityError{ca.ErrExpired}), "identity error: " + ca.ErrExpired.Error(), "IDENTITY_ERROR"},
		{"plain connect", &dialError{err: refused}, "io error: connection refused", "CONNECT"},
		{"plain connect timeout", &dialError{err: os.ErrDeadlineExceeded}, "io error: i/o timeout", "CONNECT"},
		{"HBONE connect", &dialError{hbone: true, err: refused}, "io error: connection refused", "CONNECT"},
		{"HBONE connect timeout", &dialError{hbone: true, err: os.ErrDeadlineExceeded}, "connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008: i/o timeout", "NETWORK_POLICY"},
		{"HBONE connect ETIMEDOUT", &dialError{hbone: true, err: syscall.ETIMEDOUT}, "connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008: connection timed out", "NETWORK_POLICY"},
		{"TLS configuration", &tlsConfigError{errors.New("no SVID")}, "tls error: no SVID", "TLS_FAILURE"},
		{"TLS handshake", &openError{err: &hbone.HandshakeError{Err: io.ErrUnexpectedEOF}}, "io error: " + (&hbone.HandshakeError{Err: io.ErrUnexpectedEOF}).Error(), "CONNECT"},
		{"preface", &openError{err: &hbone.PrefaceError{Err: io.EOF}}, "http2 handshake failed: EOF", "H2_HANDSHAKE_FAILURE"},
		{"status", &openError{err: &hbone.StatusError{Code: 401}}, "http status: 401 Unauthorized", "CONNECT"},
		{"stream reset before the answer", &openError{err: &hbone.StreamError{Code: hbone.ErrInternal, Remote: true}}, "h2 failed: " + (&hbone.StreamError{Code: hbone.ErrInternal, Remote: true}).Error(), "H2_HANDSHAKE_FAILURE"},
		{"pool", &openError{err: hbone.ErrPoolClosed}, "pool draining", "CONNECT"},
		{"inner TLS handshake", &openError{inner: true, err: &hbone.HandshakeError{Err: io.ErrUnexpectedEOF}}, "inner tunnel: io error: " + (&hbone.HandshakeError{Err: io.ErrUnexpectedEOF}).Error(), "CONNECT"},
		{"inner status", &openError{inner: true, err: &hbone.StatusError{Code: 503}}, "inner tunnel: http status: 503 Service Unavailable", "CONNECT"},
		{"inner, revoked at the handshake", &openError{inner: true, err: &hbone.HandshakeError{Err: revoked}}, "inner tunnel: io error: tls handshake: " + revoked.Error(), "CERT_REVOKED"},
		{"no identity behind the gateway", &tlsConfigError{errNoFinalIdentity}, "tls error: " + errNoFinalIdentity.Error(), "TLS_FAILURE"},
		{"no answer on demand", &lookUpError{"a/b", errLookUpTime}, "look up a/b on demand: no answer within 5s: context deadline exceeded", "CONNECT"},
		{"PROXY header", &proxyHeaderError{syscall.EPIPE}, "io error: broken pipe", "CONNECT"},
		{"application", &upstreamError{refused}, "connection failed: connection refused", "CONNECT"},
		{"copy", directionError{"receive", syscall.EHOSTUNREACH}, "receive: io error: no route to host", "CONNECT"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			text, flag := reason(tt.err)
			if text != tt.text || flag != tt.flag {
				t.Errorf("reason = %q, %s, want %q, %s", text, flag, tt.text, tt.flag)
			}
		})
	}
}

// The side that reset is told from the log's point of view on both paths, and is
// no error (design D6).
func TestOutcomeOf(t *testing.T) {
	read := &hbone.SocketError{Op: "read", Err: syscall.EHOSTUNREACH}
	write := &hbone.SocketError{Op: "write", Err: syscall.EHOSTUNREACH}
	lost := &hbone.ConnError{Err: io.EOF}
	for _, tt := range []struct {
		name       string
		in         hbone.Result
		downstream bool
		want       outcome
		wantText   string
	}{
		{"outbound bytes", hbone.Result{FromSocket: 1, ToSocket: 2}, true, outcome{toUp: 1, toDown: 2}, ""},
		{"inbound bytes", hbone.Result{FromSocket: 1, ToSocket: 2}, false, outcome{toUp: 2, toDown: 1}, ""},
		{"outbound, client reset", hbone.Result{Reset: hbone.ResetBySocket}, true, outcome{reset: resetDownstream}, ""},
		{"outbound, server reset", hbone.Result{Reset: hbone.ResetByPeer}, true, outcome{reset: resetUpstream}, ""},
		{"inbound, server reset", hbone.Result{Reset: hbone.ResetBySocket}, false, outcome{reset: resetUpstream}, ""},
		{"inbound, client reset", hbone.Result{Reset: hbone.ResetByPeer}, false, outcome{reset: resetDownstream}, ""},
		{"outbound read", hbone.Result{Err: read}, true, outcome{}, "send: io error: " + read.Error()},
		{"outbound write", hbone.Result{Err: write}, true, outcome{}, "receive: io error: " + write.Error()},
		{"inbound read", hbone.Result{Err: read}, false, outcome{}, "receive: io error: " + read.Error()},
		{"inbound write", hbone.Result{Err: write}, false, outcome{}, "send: io error: " + write.Error()},
		{"tunnel lost", hbone.Result{Err: lost}, true, outcome{}, "receive: io error: " + lost.Error()},
		{"policy", hbone.Result{Err: ErrPolicyChanged}, false, outcome{}, ErrPolicyChanged.Error()},
		{"cut", hbone.Result{Err: context.Canceled}, false, outcome{}, context.Canceled.Error()},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := outcomeOf(tt.in, tt.downstream)
			text := ""
			if got.err != nil {
				text = got.err.Error()
			}
			got.err = nil
			if got != tt.want || text != tt.wantText {
				t.Errorf("got %+v %q, want %+v %q", got, text, tt.want, tt.wantText)
			}
		})
	}
}
