package xds

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ztunnel-go/ztunnel/internal/backoff"
)

// reason is why an attempt ended, as the metric tells it.
type reason string

const (
	connectionError reason = "ConnectionError" // there was no stream
	streamError     reason = "Error"
	reconnect       reason = "Reconnect" // the transport was lost, which is nobody's fault
	complete        reason = "Complete"  // the server ended the stream
)

// ended is the end of an attempt.
type ended struct {
	reason reason
	local  bool  // it was a file of ours, and nothing was sent
	err    error // nil when the server ended the stream without one, or when we did
	lived  time.Duration
}

// errResync ends a stream that is to be opened anew, to be told everything again.
var errResync = errors.New("the stream is opened anew for a full set")

// errDeaf ends a stream whose server takes nothing from us.
var errDeaf = errors.New("the control plane does not read the answers to what it sends")

// lost are texts of a transport that broke while a stream was open: gRPC has one
// code for this and for a server that refuses.
var lost = []string{
	"transport is closing", "received prior goaway", "GOAWAY", "error reading from server", "EOF",
	"connection reset", "connection is draining", "keepalive ping failed", "closing transport",
}

// classify sorts the error of a stream by spec/state-xds-dns.md §3.7. Without the
// headers of an answer there was no stream.
func classify(err error, established bool) (reason, error) {
	if errors.Is(err, errResync) {
		return reconnect, nil
	}
	if errors.Is(err, io.EOF) {
		return complete, nil
	}
	if errors.Is(err, errDeaf) {
		return streamError, err
	}
	if !established {
		return connectionError, err
	}
	switch s := status.Convert(err); s.Code() {
	case codes.Unknown, codes.Canceled, codes.DeadlineExceeded:
		return reconnect, err
	case codes.Unavailable:
		for _, text := range lost {
			if strings.Contains(s.Message(), text) {
				return reconnect, err
			}
		}
	}
	return streamError, err
}

// describe is the text of a failed attempt, with what the operator should do.
// dialed is the latest error of the dialer, which gRPC would tell as text only.
func describe(address string, r reason, err, dialed error) error {
	s, isStatus := status.FromError(err)
	if !isStatus {
		return fmt.Errorf("connect to %s: %w", address, err)
	}
	text := fmt.Sprintf("gRPC error status: %s, message: %q", s.Code(), s.Message())
	if r == connectionError {
		text = fmt.Sprintf("gRPC connection error connecting to %s: status: %s, message: %q", address, s.Code(), s.Message())
	}
	if hint := hintFor(s, dialed); hint != "" {
		text += " (" + hint + ")"
	}
	return errors.New(text)
}

func hintFor(s *status.Status, dialed error) string {
	if _, ok := errors.AsType[*net.DNSError](dialed); ok && s.Code() == codes.Unavailable {
		return "is the DNS server reachable?"
	}
	contains := func(text string) bool { return strings.Contains(s.Message(), text) }
	switch {
	case contains("authentication failure"):
		return "check the control plane logs for more information"
	case s.Code() == codes.Unauthenticated || s.Code() == codes.PermissionDenied:
		return "the token must be valid for the control plane's audience (AUTH_TOKEN), and the cluster be known to it (CLUSTER_ID): see its log"
	case contains("x509: certificate is valid for") || contains("x509: certificate is not valid for any names") ||
		contains("doesn't contain any IP SANs") || contains("legacy Common Name"):
		return "the server's certificate has another name: correct XDS_ADDRESS, or set ALT_XDS_HOSTNAME"
	case contains("x509: certificate has expired or is not yet valid"):
		return "renew the server's certificate, and check the clocks"
	case contains("first record does not look like a TLS handshake"):
		return "what listens there speaks no TLS: correct the port in XDS_ADDRESS"
	case contains("protocol version"):
		return "a control plane that has TLS 1.2 only needs TLS12_ENABLED=true"
	case contains("x509: "):
		return "XDS_ROOT_CA must hold the root of the server's certificate"
	case s.Code() == codes.Unimplemented:
		return "what listens there serves no delta xDS: correct XDS_ADDRESS"
	case s.Code() == codes.ResourceExhausted && contains("received message larger than max"):
		return "a message is too large: where it was ours, the next stream tells no versions; one of the server may have 200 MiB"
	}
	return ""
}

const (
	backoffFirst = 20 * time.Millisecond
	backoffMax   = 15 * time.Second
	// quickEnd is the life of a stream below which its end, when it is not the first
	// such in a row, is spaced out as an error is: a server that ends each stream at
	// once must not be asked for everything a hundred times a second.
	quickEnd = 10 * time.Second
)

// pacer says how long to wait between attempts.
type pacer struct {
	failures *backoff.Sequence
	quick    bool // the attempt before ended well, but quickly
}

func newPacer() *pacer {
	policy := backoff.Policy{First: backoffFirst, Max: backoffMax, Budget: -1}
	return &pacer{failures: policy.New()}
}

// next is the delay after an attempt. Errors double it, an end in order does not,
// and only the latter is taken for the end of the trouble.
func (p *pacer) next(e ended) time.Duration {
	if e.reason == connectionError || e.reason == streamError {
		p.quick = false
		return p.failures.Next(time.Now())
	}
	if e.lived < quickEnd && p.quick {
		return p.failures.Next(time.Now())
	}
	p.quick = e.lived < quickEnd
	p.failures.Reset()
	if e.reason == complete {
		return 0
	}
	// All nodes lose a control plane at the same moment.
	return time.Duration((0.8 + 0.4*rand.Float64()) * float64(backoffFirst/2))
}
