package proxy

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/ztunnel-go/ztunnel/state"
)

// verifyWait bounds one call of Verify. verifyAgain is how long a refusal of Verify stands: what it looked at, the
// addresses in the pod's namespace, may have changed.
const (
	verifyWait  = 5 * time.Second
	verifyAgain = time.Second
)

// verifier remembers what Verify said of the local workload.
type verifier struct {
	ask  func(context.Context, *state.Workload) error // nil: everybody is believed
	last atomic.Pointer[verdict]
	turn chan struct{} // held by who asks
}

// verdict is an answer of Verify.
type verdict struct {
	workload *state.Workload
	err      error
	at       time.Time
}

// verify tells whether we may act for w: it is an *unverifiedError if not, and
// the cause of ctx if that ends first.
func (v *verifier) verify(ctx context.Context, w *state.Workload) error {
	if v.ask == nil || len(w.IPs) == 0 { // by what should one know it
		return nil
	}
	if known := v.last.Load(); known != nil && known.workload == w && known.err == nil {
		return nil
	}
	return v.verifySlowly(ctx, w)
}

func (v *verifier) verifySlowly(ctx context.Context, w *state.Workload) error {
	select {
	case v.turn <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-v.turn }()
	known := v.last.Load()
	if known == nil || known.workload != w || known.err != nil && time.Since(known.at) >= verifyAgain {
		bounded, cancel := context.WithTimeout(ctx, verifyWait)
		err := v.ask(bounded, w)
		cancel()
		if err != nil && ctx.Err() != nil {
			return context.Cause(ctx) // that says nothing about w
		}
		known = &verdict{workload: w, err: err, at: time.Now()}
		v.last.Store(known)
	}
	if known.err != nil {
		return &unverifiedError{w, known.err}
	}
	return nil
}

// unverifiedError says that the local workload is not the pod that we stand in for.
type unverifiedError struct {
	workload *state.Workload
	err      error
}

func (e *unverifiedError) Error() string {
	return fmt.Sprintf("identity %s is not used: %v", e.workload.Identity, e.err)
}
func (e *unverifiedError) Unwrap() error { return e.err }
