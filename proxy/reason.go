package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"syscall"

	"github.com/ztunnel-go/ztunnel/proxy/hbone"
	"github.com/ztunnel-go/ztunnel/state"
)

// The values of response_flags (spec/datapath.md §14.4). Dashboards know them.
const (
	flagNone          = "-"
	flagDeny          = "DENY"
	flagConnect       = "CONNECT"
	flagTLS           = "TLS_FAILURE"
	flagH2            = "H2_HANDSHAKE_FAILURE"
	flagNetworkPolicy = "NETWORK_POLICY"
	flagIdentity      = "IDENTITY_ERROR"
	flagRevoked       = "CERT_REVOKED"
)

// reason maps how a connection ended to the text of the access log and to
// response_flags (spec/datapath.md §10.6). It is the only place that does.
func reason(err error) (text, flag string) {
	if err == nil { // before the variables, for which most connections need not pay
		return "", flagNone
	}
	var (
		denied   *state.Denied
		identity *identityError
		foreign  *unverifiedError
		dial     *dialError
		open     *openError
		config   *tlsConfigError
	)
	switch {
	case errors.Is(err, ErrCertificateRevoked): // it outweighs whatever else has happened
		return ErrCertificateRevoked.Error(), flagRevoked
	case errors.Is(err, ErrDraining):
		return ErrDraining.Error(), flagNone
	case errors.Is(err, errAbandoned):
		return errAbandoned.Error(), flagNone
	case errors.Is(err, ErrPolicyChanged):
		return ErrPolicyChanged.Error(), flagDeny
	case errors.As(err, &denied):
		return denied.Error(), flagDeny
	case errors.Is(err, errAnchorRemoved):
		return err.Error(), flagTLS
	case errors.Is(err, errIdentityWithdrawn):
		return err.Error(), flagIdentity
	case errors.As(err, &open) && isRevoked(err):
		text, _ = openReason(open)
		return text, flagRevoked
	case errors.As(err, &identity):
		return identity.Error(), flagIdentity
	case errors.As(err, &foreign):
		return foreign.Error(), flagIdentity
	case errors.As(err, &config):
		return config.Error(), flagTLS
	case errors.As(err, &dial):
		return dialReason(dial)
	case errors.As(err, &open):
		return openReason(open)
	}
	return err.Error(), flagConnect
}

// dialReason tells a NetworkPolicy that eats the SYNs to 15008 from the rest.
func dialReason(e *dialError) (text, flag string) {
	if e.hbone && isTimeout(e.err) {
		return fmt.Sprintf("connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008: %v", e.err), flagNetworkPolicy
	}
	return "io error: " + e.err.Error(), flagConnect
}

// openReason speaks of TLS, the HTTP/2 preface and the CONNECT answer, and says
// if they were those of the inner tunnel of double HBONE: then the gateway is
// well, and the failure is beyond it.
func openReason(e *openError) (text, flag string) {
	text, flag = answerReason(e.err)
	if e.inner {
		text = "inner tunnel: " + text
	}
	return text, flag
}

func answerReason(err error) (text, flag string) {
	var (
		status    *hbone.StatusError
		handshake *hbone.HandshakeError
		preface   *hbone.PrefaceError
	)
	switch {
	case errors.As(err, &status):
		return fmt.Sprintf("http status: %d %s", status.Code, http.StatusText(status.Code)), flagConnect
	case errors.Is(err, hbone.ErrPoolClosed):
		return "pool draining", flagConnect
	case errors.As(err, &handshake):
		return "io error: " + handshake.Error(), flagConnect
	case errors.As(err, &preface):
		return "http2 handshake failed: " + preface.Err.Error(), flagH2
	}
	return "h2 failed: " + err.Error(), flagH2
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded) ||
		errors.Is(err, syscall.ETIMEDOUT) || errors.As(err, &ne) && ne.Timeout()
}
