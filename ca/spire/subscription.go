package spire

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"github.com/ztunnel-go/ztunnel/ca"
)

// answer is the full state that an API reports of one workload.
type answer struct {
	grants []grant    // not looked into
	best   *candidate // the one that counts; nil when it is not among them
	others []string   // identities that were granted instead
	// federates are the trust domains that the workload federates with, sorted,
	// where the bundles come by a stream of their own.
	federates []spiffeid.TrustDomain
	// bundles are the workload's, where they come with the SVIDs.
	bundles *ca.Bundles
}

// errGone says that the agent no longer knows the workload, or not for us: its
// SVID is taken back, as if it were absent from a full state.
var errGone = fmt.Errorf("%w: the agent has nothing for the workload", ca.ErrDenied)

// errRedacted says that the agent has no SVID for us at all. After one it takes
// back what there was (R42); before, we are only too early.
var errRedacted = fmt.Errorf("%w: the agent has no identity for this proxy", ca.ErrDenied)

// subscription turns the stream of one workload into events (design D23).
type subscription struct {
	cfg     *Common
	link    *link
	want    spiffeid.ID                                 // zero: the first that is granted
	ready   func() (changed <-chan struct{}, err error) // as stream has it
	open    func(ctx context.Context, conn *grpc.ClientConn) (recv func() (*answer, error), err error)
	explain func(error) error
	// nothing says why the agent may have nothing for the workload.
	nothing string
	board   *board // nil: the bundles come with the SVIDs
}

// report is what a stream tells.
type report struct {
	answer *answer // nil: the stream is broken
	fresh  bool    // the first answer of its stream
	err    error
	next   time.Time
}

// watch is ca.Provider's Watch. It follows the stream on the goroutine of its
// caller, and has no other that lasts: there are as many watches as pods.
func (s *subscription) watch(ctx context.Context, update func(ca.Event)) error {
	j := &judge{s: s, update: update}
	defer j.end()
	if s.board != nil {
		defer s.board.subscribe(func() { j.hear(ctx, func() {}) })()
	}
	tell := func(r report) {
		aside(func() { j.hear(ctx, func() { j.take(r) }) })
	}
	follower := &stream[*answer]{
		cfg: s.cfg, link: s.link, ready: s.ready, open: s.openChosen, explain: s.explain,
		report: func(a *answer, fresh bool) { tell(report{answer: a, fresh: fresh}) },
		broken: func(err error, next time.Time) { tell(report{err: err, next: next}) },
	}
	follower.follow(ctx)
	return ctx.Err()
}

// openChosen is open, of whose answers the grants are looked into: one that cannot
// be read is a message that does not count, wherever it is wrong.
func (s *subscription) openChosen(ctx context.Context, conn *grpc.ClientConn) (func() (*answer, error), error) {
	recv, err := s.open(ctx, conn)
	if err != nil {
		return nil, err
	}
	return func() (*answer, error) {
		a, err := recv()
		if err != nil {
			return nil, err
		}
		aside(func() { err = a.choose(s.cfg.Name, s.want) })
		return a, err
	}, nil
}

// choose looks into the grants.
func (a *answer) choose(provider string, want spiffeid.ID) (err error) {
	a.best, a.others, err = choose(provider, a.grants, want)
	a.grants = nil
	return err
}

// aside runs f to its end on a goroutine of its own. Looking into certificates
// takes 16 KiB of stack, which the goroutine of a stream would keep as long as
// its pod lives.
func aside(f func()) {
	var done sync.WaitGroup
	done.Go(f)
	done.Wait()
}
