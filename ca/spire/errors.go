package spire

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ztunnel-go/ztunnel/ca"
)

// advice is what an error of the agent means, and what to do about it.
type advice struct {
	code codes.Code
	text string // part of the message, "" for any
	kind error  // ca.ErrDenied, ca.ErrConfig, errGone, errRedacted; nil: it may pass by itself
	hint string
}

// What several APIs have in common. A message that is too large is our own gRPC's
// complaint; the code is also that of an agent that limits the rate.
var (
	adviceUnattested = advice{codes.Unavailable, "workload attestation failed", nil,
		"the agent could not attest this proxy; it needs to see the proxy's process, in Kubernetes by hostPID"}
	adviceTooLarge = advice{codes.ResourceExhausted, "larger than max", ca.ErrConfig,
		"a message of the agent is larger than this proxy takes: let the workload match fewer entries, or federate with fewer trust domains"}
)

// explain gives an error its class by the first advice that fits. It is the only
// place that sees gRPC's codes.
func explain(err error, dialErr error, advices []advice) error {
	if err == nil || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ca.ErrRejected) || errors.Is(err, errGone) {
		return err
	}
	if errors.Is(err, io.EOF) {
		return errors.New("the agent ended the stream")
	}
	st, ok := status.FromError(err)
	if !ok {
		return err
	}
	if st.Code() == codes.Unavailable && dialErr != nil {
		return explainDial(dialErr)
	}
	for _, a := range advices {
		if a.code != st.Code() || !strings.Contains(st.Message(), a.text) {
			continue
		}
		if a.kind == nil {
			return fmt.Errorf("%s (%s: %s)", a.hint, st.Code(), st.Message())
		}
		return fmt.Errorf("%w: %s (%s: %s)", a.kind, a.hint, st.Code(), st.Message())
	}
	if st.Code() == codes.Unavailable {
		return fmt.Errorf("lost the agent: %s", st.Message())
	}
	return fmt.Errorf("the agent answered %s: %s", st.Code(), st.Message())
}

// errNotSocket is a path at which there is something else.
var errNotSocket = errors.New("it is no socket")

// explainDial says what to do about a socket to which we cannot connect.
func explainDial(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("connect to the agent: %w: the agent does not run, or the directory of the socket is not mounted", err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("connect to the agent: %w: give the proxy the group of the socket, or the capability DAC_OVERRIDE", err)
	case errors.Is(err, errNotSocket):
		return fmt.Errorf("connect to the agent: %w: mount the directory in which the agent makes its socket; a mount of the socket itself makes a directory when it comes first", err)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("connect to the agent: %w: the agent does not run", err)
	}
	return fmt.Errorf("connect to the agent: %w", err)
}

// complaintInterval is how often one and the same trouble is logged: every
// workload has it.
const complaintInterval = time.Minute

// maxComplaints is how many troubles are logged within a complaintInterval. An
// agent that is out of order may have another one with each message.
const maxComplaints = 20

// complaints logs the troubles of a provider. It is safe for concurrent use.
type complaints struct {
	mu     sync.Mutex // guards what follows
	logged map[string]time.Time
	full   time.Time // when it was said that there are too many
}

func (c *complaints) log(ctx context.Context, log *slog.Logger, err error) {
	if errors.Is(err, errGone) {
		return // it is about one workload, and told there
	}
	switch {
	case !c.news(ctx, log, err.Error()):
	case errors.Is(err, errRedacted):
		log.WarnContext(ctx, "SPIRE has no identity for this proxy", "error", err.Error())
	case errors.Is(err, ca.ErrRejected):
		log.WarnContext(ctx, "a message of the SPIRE agent is discarded, what it sent before stays until it expires", "error", err.Error())
	default:
		log.WarnContext(ctx, "no stream from the SPIRE agent, certificates stay as they are until they expire", "error", err.Error())
	}
}

// refused logs that the agent has nothing for a workload.
func (c *complaints) refused(ctx context.Context, log *slog.Logger, level slog.Level, id spiffeid.ID, err error) {
	if c.news(ctx, log, id.String()+" "+err.Error()) {
		log.Log(ctx, level, "SPIRE grants the workload no identity", "identity", id, "error", err.Error())
	}
}

// news reports whether a trouble is to be logged.
func (c *complaints) news(ctx context.Context, log *slog.Logger, trouble string) bool {
	fresh, full := c.note(trouble, time.Now())
	if full {
		log.WarnContext(ctx, "there are more troubles with the SPIRE agent than are logged; see LAST ERROR of ztunnel certs -o wide")
	}
	return fresh
}

// note remembers a trouble. fresh says that it is to be logged, full that it is the
// first one that is not because there are too many.
func (c *complaints) note(trouble string, now time.Time) (fresh, full bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for k, at := range c.logged {
		if now.Sub(at) >= complaintInterval {
			delete(c.logged, k)
		}
	}
	if _, known := c.logged[trouble]; known {
		return false, false
	}
	if len(c.logged) >= maxComplaints {
		if now.Sub(c.full) < complaintInterval {
			return false, false
		}
		c.full = now
		return false, true
	}
	if c.logged == nil {
		c.logged = make(map[string]time.Time)
	}
	c.logged[trouble] = now
	return true, false
}
