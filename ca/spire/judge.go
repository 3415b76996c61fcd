package spire

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
)

// judge decides what the latest report means. What it hears of comes from the
// goroutine of the stream, that of the board and a timer, but one at a time.
type judge struct {
	s      *subscription
	update func(ca.Event)
	turns  turns
	timers sync.WaitGroup // that run, or will

	// The rest belongs to whose turn it is.
	ended bool

	latest *answer // of the agent that counts; nil before the first
	gone   error   // the agent said so, errGone or errRedacted
	broken error   // why latest is not what the agent says now; nil while it is
	next   time.Time

	early     *time.Timer // until the certificate becomes valid; nil when none is waited for
	grace     *time.Timer // nil when there is no period of grace
	graceOver bool
	since     time.Time // when the agent began to grant nothing; zero while it grants
	had       bool      // an SVID was reported, and not taken back
	withdrawn bool      // one was, and is taken back

	said ca.Event // the latest event; Unavailable keeps the SVID of the one before
}

// hear takes note of something, and decides.
func (j *judge) hear(ctx context.Context, note func()) {
	j.turns.take(func() {
		if !j.ended {
			note()
			j.decide(ctx)
		}
	})
}

// end waits until nothing more will be reported.
func (j *judge) end() {
	done := make(chan struct{})
	j.turns.take(func() {
		j.ended = true
		j.stopGrace()
		j.stop(&j.early)
		close(done)
	})
	<-done
	j.timers.Wait()
}

// take notes a report.
func (j *judge) take(r report) {
	j.broken, j.next = r.err, r.next
	if r.answer == nil {
		if errors.Is(r.err, errGone) || errors.Is(r.err, errRedacted) && j.latest != nil {
			j.gone = r.err
		}
		return
	}
	if j.latest != nil && j.s.board != nil && !slices.Equal(j.latest.federates, r.answer.federates) {
		j.s.board.ask() // what changed for one may be gone for all
	}
	j.latest, j.gone = r.answer, nil
	if r.fresh {
		j.stopGrace() // a stream that begins with nothing may only be early
	}
}

// decide reports what is so now, if it has changed.
func (j *judge) decide(ctx context.Context) {
	j.stop(&j.early)
	switch {
	case j.gone != nil:
		j.nothing(ctx, j.gone)
	case j.latest == nil && j.broken == nil:
		// no answer yet
	case j.latest == nil:
		j.say(ca.Event{State: ca.Unavailable, Err: j.broken, Next: j.next})
	case j.latest.best == nil:
		j.nothing(ctx, j.absent(ctx))
	default:
		j.granted(ctx)
	}
}

// absent is the error of a state without our identity.
func (j *judge) absent(ctx context.Context) error {
	if len(j.latest.others) == 0 {
		return fmt.Errorf("%w: %s", ca.ErrDenied, j.s.nothing)
	}
	j.s.cfg.Logger.DebugContext(ctx, "the agent grants other identities", "identity", j.s.want, "granted", strings.Join(j.latest.others, ","))
	return fmt.Errorf("did not find expected SAN: %s", j.s.want)
}

// nothing handles a state without our identity: at first it only means that
// SPIRE is not ready, later that it took the identity back.
func (j *judge) nothing(ctx context.Context, why error) {
	switch {
	case j.had && j.s.board != nil && j.s.board.distrusts(j.s.want.TrustDomain()):
		j.stopGrace()
		j.distrusted(ctx, j.s.want.TrustDomain())
	case j.had && !j.graceOver:
		if j.grace == nil {
			j.startGrace(ctx)
		}
	case j.had || j.withdrawn:
		j.stopGrace()
		if j.had {
			j.s.cfg.Logger.WarnContext(ctx, "SPIRE took the identity back, it is no longer used and its tunnels end", "identity", j.identity(), "error", why.Error())
		}
		j.withdraw(why)
	case j.gone != nil:
		j.refuse(ctx, slog.LevelWarn, ca.Event{State: ca.Withdrawn, Err: why, Next: j.next})
	case len(j.latest.others) > 0:
		j.refuse(ctx, slog.LevelWarn, ca.Event{State: ca.Unavailable, Err: why})
	case j.broken != nil:
		j.say(ca.Event{State: ca.Unavailable, Err: j.broken, Next: j.next})
	default:
		// A pod is often there before its entry.
		j.refuse(ctx, slog.LevelInfo, ca.Event{State: ca.Pending, Err: why})
	}
}

// refuse reports that there never was an SVID, because the agent says so.
func (j *judge) refuse(ctx context.Context, level slog.Level, ev ca.Event) {
	if j.say(ev) {
		j.s.link.refusals.refused(ctx, j.s.cfg.Logger, level, j.s.want, ev.Err)
	}
}

// identity is the one that was asked for, or the default that was had.
func (j *judge) identity() spiffeid.ID {
	if j.s.want.IsZero() && j.said.SVID != nil {
		return j.said.SVID.ID
	}
	return j.s.want
}

// maxGraces bounds the grace that begins again with each stream: an agent whose
// streams break all the time must not keep an identity alive that it does not
// grant.
const maxGraces = 12

func (j *judge) startGrace(ctx context.Context) {
	if j.since.IsZero() {
		j.since = time.Now()
	}
	grace := j.s.cfg.WithdrawGrace
	j.start(ctx, &j.grace, min(grace, time.Until(j.since.Add(maxGraces*grace))), func() { j.graceOver = true })
}

func (j *judge) stopGrace() {
	j.stop(&j.grace)
	j.graceOver = false
}

// start sets *t to a timer that has note taken after d, unless it is stopped.
func (j *judge) start(ctx context.Context, t **time.Timer, d time.Duration, note func()) {
	j.timers.Add(1)
	var timer *time.Timer
	timer = time.AfterFunc(d, func() {
		defer j.timers.Done()
		j.hear(ctx, func() {
			if *t == timer { // not one that was stopped too late
				note()
			}
		})
	})
	*t = timer
}

func (j *judge) stop(t **time.Timer) {
	if *t != nil && (*t).Stop() {
		j.timers.Done()
	}
	*t = nil
}

// withdraw takes the identity back.
func (j *judge) withdraw(why error) {
	j.had, j.withdrawn, j.since = false, true, time.Time{}
	j.say(ca.Event{State: ca.Withdrawn, Err: why, Next: j.next})
}

// granted handles a state with our identity.
func (j *judge) granted(ctx context.Context) {
	j.stopGrace()
	j.since = time.Time{}
	bundles := j.latest.bundles
	if j.s.board != nil {
		var err error
		if bundles, err = j.s.board.bundles(j.s.want.TrustDomain(), j.latest.federates); err != nil {
			j.say(ca.Event{State: ca.Pending, Err: err})
			return
		}
	}
	if td := j.latest.best.id.TrustDomain(); len(bundles.Anchors(td)) == 0 {
		j.distrusted(ctx, td)
		return
	}
	leaf := j.latest.best.chain[0]
	if now := time.Now(); !now.Before(leaf.NotAfter) {
		j.expired(leaf.NotAfter)
		return
	} else if wait := leaf.NotBefore.Sub(now); wait > 0 {
		j.premature(ctx, leaf.NotBefore, wait)
		return
	}
	j.had, j.withdrawn = true, false
	if said := j.said.SVID; said != nil && said.Cert.Leaf.Equal(leaf) && said.Bundles.Equal(bundles) {
		j.still()
		return
	}
	svid, err := j.latest.best.svid(j.s.cfg.Name, bundles)
	if err != nil {
		j.say(ca.Event{State: ca.Unavailable, Err: err})
		return
	}
	j.say(ca.Event{State: ca.Available, SVID: svid, Err: j.broken, Next: j.next})
	j.s.cfg.Logger.DebugContext(ctx, "certificate received", slog.Any("svid", svid))
}

// distrusted handles a bundle of our own trust domain that is empty (R31) or gone
// (R42): every SVID of it is invalid, ours among them. There is no grace: until
// its end we would trust what the agent says we must not.
func (j *judge) distrusted(ctx context.Context, td spiffeid.TrustDomain) {
	err := fmt.Errorf("the agent has no certificate in its bundle of trust domain %q, which makes all of its identities invalid", td.Name())
	switch {
	case j.had:
		j.s.cfg.Logger.WarnContext(ctx, "SPIRE emptied the bundle of the trust domain, the identity is no longer used and its tunnels end", "identity", j.identity(), "trust_domain", td.Name())
		j.withdraw(err)
	case j.withdrawn:
		j.withdraw(err)
	default:
		j.say(ca.Event{State: ca.Unavailable, Err: err, Next: j.next})
	}
}

// expired handles an SVID that ended at end: the agent delivered it so, or has
// not delivered another one.
func (j *judge) expired(end time.Time) {
	err := fmt.Errorf("%w: %s, at %s", ca.ErrExpired, j.latest.best.id, end.UTC().Format(time.RFC3339))
	if j.broken != nil {
		err = fmt.Errorf("%w: %w", err, j.broken)
	}
	j.say(ca.Event{State: ca.Unavailable, Err: err, Next: j.next})
}

// maxEarly is the longest wait before the clock is looked at again: timers do not
// see that it is set.
const maxEarly = 30 * time.Second

// premature handles an SVID that begins only after wait, at begin: SPIRE's clock is
// ahead of ours. The agent sends it once, so it is for us to come back to it; what
// there was before stays meanwhile.
func (j *judge) premature(ctx context.Context, begin time.Time, wait time.Duration) {
	j.start(ctx, &j.early, min(wait, maxEarly), func() {})
	err := fmt.Errorf("the certificate of %s is not valid before %s: compare the clocks of this node and of the SPIRE server", j.latest.best.id, begin.UTC().Format(time.RFC3339))
	if j.broken != nil {
		err = fmt.Errorf("%w: %w", err, j.broken)
	}
	j.say(ca.Event{State: ca.Unavailable, Err: err, Next: begin})
}

// still repeats the SVID that was reported, if its circumstances have changed:
// its stream is broken, or is back.
func (j *judge) still() {
	ev := ca.Event{State: ca.Available, SVID: j.said.SVID, Err: j.broken, Next: j.next}
	if j.said.State != ca.Available || text(j.said.Err) != text(ev.Err) || !j.said.Next.Equal(ev.Next) {
		j.said = ev
		j.update(ev)
	}
}

// say reports ev, unless it was said before. It is news when it is more than
// another time of the next attempt.
func (j *judge) say(ev ca.Event) (news bool) {
	same := ev.State == j.said.State && text(ev.Err) == text(j.said.Err)
	if ev.State != ca.Available && same && ev.Next.Equal(j.said.Next) {
		return false
	}
	svid := j.said.SVID
	j.said = ev
	if ev.State == ca.Unavailable {
		j.said.SVID = svid // the manager keeps it, too
	}
	j.update(ev)
	return !same
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// turns runs functions one at a time, in the order in which they come, on the
// goroutine of one that takes a turn. No lock is held meanwhile.
type turns struct {
	mu      sync.Mutex // guards what follows
	waiting []func()
	busy    bool
}

// take runs f, or leaves it to the goroutine whose turn it is. f must not wait
// for a later turn.
func (t *turns) take(f func()) {
	t.mu.Lock()
	t.waiting = append(t.waiting, f)
	if t.busy {
		t.mu.Unlock()
		return
	}
	t.busy = true
	for len(t.waiting) > 0 {
		next := t.waiting[0]
		t.waiting = t.waiting[1:]
		t.mu.Unlock()
		next()
		t.mu.Lock()
	}
	t.busy, t.waiting = false, nil
	t.mu.Unlock()
}
