package istio

import (
	"context"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ztunnel-go/ztunnel/ca"
)

// descriptions are the texts of gRPC codes in the reference implementation, for
// which people search.
var descriptions = map[codes.Code]string{
	codes.Canceled:           "The operation was cancelled",
	codes.Unknown:            "Unknown error",
	codes.InvalidArgument:    "Client specified an invalid argument",
	codes.DeadlineExceeded:   "Deadline expired before operation could complete",
	codes.NotFound:           "Some requested entity was not found",
	codes.AlreadyExists:      "Some entity that we attempted to create already exists",
	codes.PermissionDenied:   "The caller does not have permission to execute the specified operation",
	codes.ResourceExhausted:  "Some resource has been exhausted",
	codes.FailedPrecondition: "The system is not in a state required for the operation's execution",
	codes.Aborted:            "The operation was aborted",
	codes.OutOfRange:         "Operation was attempted past the valid range",
	codes.Unimplemented:      "Operation is not implemented or not supported",
	codes.Internal:           "Internal error",
	codes.Unavailable:        "The service is currently unavailable",
	codes.DataLoss:           "Unrecoverable data loss or corruption",
	codes.Unauthenticated:    "The request does not have valid authentication credentials",
}

// signingError is a request that the CA did not answer with a certificate.
type signingError struct {
	code    codes.Code
	message string
	hint    string // what the operator should do
	class   error  // ca.ErrDenied, ca.ErrConfig, or the end of a deadline; nil: try again
}

func (e *signingError) Error() string {
	description := descriptions[e.code]
	if description == "" {
		description = e.code.String()
	}
	text := fmt.Sprintf("signing gRPC error (%s): %s", description, e.message)
	if e.hint != "" {
		text += " (" + e.hint + ")"
	}
	return text
}

func (e *signingError) Unwrap() error { return e.class }

// signingError sorts the error of a call. Whatever is neither a denial nor
// hopeless is tried again, such as Cilium's Unknown "no endpoints found for
// service account", which means that the agent does not know the pod yet.
func (f *fetcher) signingError(err error) error {
	s := status.Convert(err)
	e := &signingError{code: s.Code(), message: s.Message()}
	switch e.code {
	case codes.Unauthenticated, codes.PermissionDenied:
		e.class, e.hint = ca.ErrDenied, f.denialHint()
	case codes.Unimplemented:
		e.class, e.hint = ca.ErrConfig, "what listens there is no Istio CA: correct CA_ADDRESS"
	case codes.InvalidArgument:
		e.class, e.hint = ca.ErrConfig, "the CA does not accept what we ask for, be it the form of a request, or a SECRET_TTL above its limit: see its log"
	case codes.DeadlineExceeded:
		e.class = context.DeadlineExceeded
	}
	return e
}

// denialHint says what to look at. CAs do not tell a bad token from a lack of
// trust in us.
func (f *fetcher) denialHint() string {
	switch {
	case !f.creds.Sends():
		return "no token was sent: mount a service account token for the CA's audience, and set AUTH_TOKEN to its path"
	case f.cfg.Impersonate:
		return "the CA must trust this proxy's service account to act for others (CA_TRUSTED_NODE_ACCOUNTS of istiod, --ca-trusted-node-accounts of istio-csr), " +
			"a pod of this identity must run on this node, and the token must be valid for the CA's audience: see the log of the CA"
	}
	return "the token must be valid for the CA's audience, and its cluster be known to the CA: see the log of the CA"
}
