package proxy

import (
	"errors"
	"fmt"

	"github.com/ztunnel-go/ztunnel/state"
)

// The causes with which connections end.
var (
	// ErrPolicyChanged ends a connection that a later policy denies.
	ErrPolicyChanged = errors.New("connection closed due to policy change")
	// ErrDraining ends the connections that are left when the drain deadline has passed.
	ErrDraining = errors.New("connection closed due to connection drain")
	// ErrCertificateRevoked ends the tunnels of a peer that a CRL revokes.
	ErrCertificateRevoked = errors.New("connection closed: peer certificate revoked by CRL")
	// errAnchorRemoved ends the tunnels of a peer whom we would not believe any more.
	errAnchorRemoved = errors.New("connection closed: no bundle of ours vouches for the peer certificate any more")
	// errIdentityWithdrawn ends the tunnels of an identity that is no longer ours.
	errIdentityWithdrawn = errors.New("connection closed: our identity was withdrawn")
	// errSelfCall refuses a connection to our own listeners.
	errSelfCall = errors.New("attempted recursive call to ourselves")
)

// unknownWorkloadError says that the store does not know the pod that we stand in for.
type unknownWorkloadError struct{ ref state.Ref }

func (e *unknownWorkloadError) Error() string {
	return fmt.Sprintf("failed to fetch information about local workload: %s.%s (%s)",
		e.ref.ServiceAccount, e.ref.Namespace, e.ref.Name)
}

// identityError says that there is no certificate to act with.
type identityError struct{ err error }

func (e *identityError) Error() string { return "identity error: " + e.err.Error() }
func (e *identityError) Unwrap() error { return e.err }

// dialError is a failed TCP connect of the outbound path.
type dialError struct {
	hbone bool // to a peer's 15008
	err   error
}

func (e *dialError) Error() string { return "connect: " + e.err.Error() }
func (e *dialError) Unwrap() error { return e.err }

// openError is a failure between the TCP connect and the peer's answer.
type openError struct {
	inner bool // of the tunnel within a tunnel, to the workload behind a gateway
	err   error
}

func (e *openError) Error() string { return "open: " + e.err.Error() }
func (e *openError) Unwrap() error { return e.err }

// upstreamError is a failed connect from the inbound path to the application.
type upstreamError struct{ err error }

func (e *upstreamError) Error() string { return "connection failed: " + e.err.Error() }
func (e *upstreamError) Unwrap() error { return e.err }

// directionError is a failure while copying: send is downstream → upstream,
// receive the other way.
type directionError struct {
	direction string
	err       error
}

func (e directionError) Error() string { return e.direction + ": io error: " + e.err.Error() }
func (e directionError) Unwrap() error { return e.err }

// tlsConfigError says that the parts of a TLS configuration do not fit.
type tlsConfigError struct{ err error }

func (e *tlsConfigError) Error() string { return "tls error: " + e.err.Error() }
func (e *tlsConfigError) Unwrap() error { return e.err }
