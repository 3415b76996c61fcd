package ca

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// WorkloadRef names the workload for which we act.
type WorkloadRef struct {
	ID             spiffeid.ID
	Namespace      string
	ServiceAccount string
	Pod            string
	UID            string
	PIDFD          *os.File // held over a lookup by PID; nil when the workload is not referenced by PID
}

// Key says which workloads share an SVID. The provider decides: UID is that of
// the workload, or "" when it issues one per identity.
type Key struct {
	Provider string
	ID       spiffeid.ID
	UID      string
}

// State is what a provider knows of one key.
type State uint8

// The states of design D23.
const (
	Pending     State = iota // no answer yet
	Available                // SVID is set and valid
	Unavailable              // Err says why; retried at Next
	Withdrawn                // the backend took the identity back: no new handshake may use it
)

// Event is one report of a provider about one key. It is level-triggered: each
// event stands alone.
type Event struct {
	State State
	SVID  *SVID     // Available only
	Err   error     // Unavailable and Withdrawn
	Next  time.Time // the next attempt, zero if the backend pushes
}

// Provider keeps SVIDs current. All methods are safe for concurrent use.
type Provider interface {
	Name() string
	// Run owns the provider's connections and shared streams, and ends them
	// before it returns, which it does when ctx ends. It may be called again after
	// it returned, e.g. when a live move turns back, but never concurrently.
	// Watches may begin before it and outlast it.
	Run(ctx context.Context) error
	// Key is pure and does not block.
	Key(WorkloadRef) Key
	// Watch reports every change for w, one call at a time, and none after it has
	// returned. It returns only when ctx ends. A denial is an event and is retried. It may
	// depend only on what Key keeps of w: where that has no UID, w names no pod and
	// no process, for the watch serves every pod of the identity; otherwise w is a
	// workload that holds a lease. When that one gives its lease back and others of
	// the same key have theirs, the watch ends and another one begins.
	Watch(ctx context.Context, w WorkloadRef, update func(Event)) error
	// WatchBundles reports the bundles that this provider contributes for w,
	// under the same rules as Watch. What it says of a pod counts for the leases of
	// that pod alone, unless the provider has CommonBundles() bool and that is true:
	// then w names no pod, and it counts for whoever has the provider listed. When it contributes nothing any more it must say so, also if it
	// has not said anything before: another watch may have.
	WatchBundles(ctx context.Context, w WorkloadRef, update func(*Bundles)) error
}

// anyID reports whether p is one of those that decide by themselves who we are.
// It is an optional interface, AnyID() bool, which [Poll] has: whoever lacks it
// is held to the identity that was asked for.
func anyID(p Provider) bool {
	a, ok := p.(interface{ AnyID() bool })
	return ok && a.AnyID()
}

// Fetcher makes one certificate by one request: no cache, no retry. Poll makes
// a Provider of it.
type Fetcher interface {
	Fetch(ctx context.Context, id spiffeid.ID) (*SVID, error)
}

// Router chooses the provider that serves a workload.
type Router interface {
	For(WorkloadRef) Provider
	All() []Provider
}

// The errors on which callers branch.
var (
	// ErrDenied: the backend knows us and says no to this identity.
	ErrDenied = errors.New("the certificate provider denied the identity")
	// ErrConfig: as it is set up, our side or the backend's, no attempt can succeed.
	// It is retried all the same, since both can be mended without us.
	ErrConfig = errors.New("the certificate provider is misconfigured")
	// ErrRejected: the backend answered, and what it sent did not pass our checks.
	ErrRejected = errors.New("the certificate was rejected")
	ErrReleased = errors.New("the identity is no longer needed")
	ErrExpired  = errors.New("the certificate has expired")
)
