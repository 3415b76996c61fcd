package spire

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/internal/backoff"
)

// settled is how long a stream must have lived to be opened anew at once when it
// breaks. Of one that breaks sooner the next attempt waits, as after a refusal.
const settled = time.Second

// deniedDelay is the least time between two attempts after a refusal, jittered by
// the policy: it takes an operator to mend one.
const deniedDelay = 5 * time.Second

// againDelay is how long a stream that somebody wants anew goes on, jittered:
// what one workload asks for, others ask for at the same time.
const againDelay = time.Second

// stream follows one server stream of the agent for ever: each message is the
// full state (R42), and one that breaks is opened anew (R41).
type stream[T any] struct {
	cfg  *Common
	link *link
	// open begins the stream. recv returns its messages, and ends with its ctx. A
	// ca.ErrRejected of recv is about one message, which does not count (R43); any
	// other error is the end of the stream.
	open func(ctx context.Context, conn *grpc.ClientConn) (recv func() (T, error), err error)
	// ready, if not nil, says what is missing to open the stream, which then waits
	// until changed is closed. Nothing is broken while it is errEarly.
	ready func() (changed <-chan struct{}, err error)
	// explain gives an error of the stream its class, and says what to do.
	explain func(error) error
	// life, if not 0, is how long the stream is followed before it is opened anew
	// without need, jittered by ±20 %; again, if not nil, ends it after againDelay.
	life  time.Duration
	again <-chan struct{}
	// report takes a message; fresh says that it is the first one of its stream.
	report func(message T, fresh bool)
	// broken takes the reason why the latest message is not the state of the agent:
	// there is no stream, with the time of the next attempt, or none while something
	// is missing for it; or a message was rejected, with none.
	broken func(err error, next time.Time)
}

// errEarly is what is missing when nobody has said yet that it is.
var errEarly = errors.New("there is no answer yet")

// errRenew ends a stream that nothing is wrong with.
var errRenew = errors.New("the stream is renewed")

// follow returns when ctx ends. report and broken are called from this
// goroutine.
func (s *stream[T]) follow(ctx context.Context) {
	retry := s.cfg.Retry.New()
	for opened := false; ; opened = true {
		conn, err := s.link.get(ctx)
		if err != nil || !s.await(ctx) {
			return
		}
		if opened {
			s.cfg.Metrics.Reconnected()
		}
		start := time.Now()
		delivered, err := s.once(ctx, conn)
		if ctx.Err() != nil {
			return
		}
		if errors.Is(err, errRenew) {
			opened = false // not broken
			continue
		}
		if s.link.replaced(conn) {
			continue // it ended with the connection, which is ours to end
		}
		err = s.explain(err)
		delay := s.pause(retry, err, delivered && time.Since(start) >= settled)
		s.complain(ctx, err)
		s.broken(err, time.Now().Add(delay))
		if !backoff.Sleep(ctx, delay) {
			return
		}
	}
}

// await waits until the stream can be opened; it is false when ctx ended first.
func (s *stream[T]) await(ctx context.Context) bool {
	if s.ready == nil {
		return true
	}
	for {
		changed, err := s.ready()
		if err == nil {
			return true
		}
		if !errors.Is(err, errEarly) {
			s.broken(err, time.Time{})
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
}

// complain logs err, unless everybody knows it.
func (s *stream[T]) complain(ctx context.Context, err error) {
	s.link.complaints.log(ctx, s.cfg.Logger, err)
}

// pause is the time until the next attempt. A stream that did its duty is opened
// anew almost at once: all streams of an agent break together, and the agent
// attests us for each of them.
func (s *stream[T]) pause(retry *backoff.Sequence, err error, wasSettled bool) time.Duration {
	if wasSettled {
		retry.Reset()
		return time.Duration(rand.Float64() * float64(s.cfg.Retry.First))
	}
	delay := retry.Next(time.Now())
	soon := errors.Is(err, errGone) || errors.Is(err, errRedacted) // a pod or an entry that is about to be known
	if !soon && (errors.Is(err, ca.ErrDenied) || errors.Is(err, ca.ErrConfig)) {
		delay = max(delay, jitter(deniedDelay))
	}
	return delay
}

// once opens the stream and follows it to its end. The error is never nil.
func (s *stream[T]) once(ctx context.Context, conn *grpc.ClientConn) (delivered bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	start := time.Now()
	patience := time.AfterFunc(s.cfg.Timeout, func() {
		cancel(fmt.Errorf("%w within %v: %w", errNoMessage, s.cfg.Timeout, context.DeadlineExceeded))
	})
	defer patience.Stop()
	defer s.renewal(ctx, cancel)()
	recv, err := s.open(ctx, conn)
	answered := false
	for err == nil {
		var message T
		message, err = recv()
		rejected := errors.Is(err, ca.ErrRejected)
		if err != nil && !rejected {
			break
		}
		if !answered {
			answered = true
			patience.Stop()
			s.cfg.Metrics.Request(err, time.Since(start))
		}
		if rejected {
			s.complain(ctx, err)
			s.broken(err, time.Time{})
			err = nil
			continue
		}
		s.report(message, !delivered)
		delivered = true
	}
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	if !answered && !errors.Is(err, errRenew) && !errors.Is(err, context.Canceled) {
		s.cfg.Metrics.Request(s.explain(err), time.Since(start))
	}
	return delivered, err
}

// renewal ends the stream when its life is over, or soon after somebody asks,
// until the returned function has returned.
func (s *stream[T]) renewal(ctx context.Context, cancel context.CancelCauseFunc) (stop func()) {
	if s.life <= 0 {
		return func() {}
	}
	select {
	case <-s.again: // whoever asked before gets this one
	default:
	}
	done := make(chan struct{})
	var watcher sync.WaitGroup
	watcher.Go(func() {
		timer := time.NewTimer(jitter(s.life))
		defer timer.Stop()
		for again := s.again; ; {
			select {
			case <-again:
				again = nil
				timer.Reset(jitter(againDelay))
				continue
			case <-timer.C:
				cancel(errRenew)
			case <-ctx.Done():
			case <-done:
			}
			return
		}
	})
	return func() {
		close(done)
		watcher.Wait()
	}
}

// jitter is d ± 20 %.
func jitter(d time.Duration) time.Duration {
	return time.Duration(float64(d) * (0.8 + 0.4*rand.Float64()))
}
