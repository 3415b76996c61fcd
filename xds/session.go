package xds

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/ztunnel-go/ztunnel/state"
	"github.com/ztunnel-go/ztunnel/xds/discoverypb"
)

// A server that gives no versions may lose changes on its way to us (Cilium's
// streams share a queue), and cannot be asked what has changed. So its stream is
// opened anew now and then, for a full set: after resyncMin to twice that for up to
// resyncSize resources, and longer for more. One that turns out not to have taken
// notice of the versions that we told is asked again after resyncSoon.
const (
	resyncMin  = 5 * time.Minute
	resyncSize = 10_000
	resyncSoon = 10 * time.Second
)

// answerTimeout is how long a server may leave maxAnswers answers unread, while
// nothing that it sends is taken: it may wait for us, too.
const answerTimeout = time.Minute

// subscribeBatch bounds a request that subscribes to what we hold.
const subscribeBatch = 1000

// nothing are names of what there is not: each end of subscriptions subscribes to one
// of them, in turn.
var nothing = []string{"nothing/0", "nothing/1"}

type clientStream = grpc.BidiStreamingClient[discoverypb.DeltaDiscoveryRequest, discoverypb.DeltaDiscoveryResponse]

// session is one stream. Its goroutines end with run; but for the outbox, the
// goroutine of run owns its fields.
type session struct {
	c      *Client
	log    *slog.Logger
	stream clientStream
	out    *outbox
	events chan event

	echoes   int       // names that it told, of the type with the most
	since    time.Time // when it was established
	resyncAt time.Time // when it is opened anew; zero: not
	mixed    bool      // it told versions to a server that has none
	askAt    time.Time // when the next names may be asked for
	more     bool      // there are names to be asked for
	turn     int       // of nothing
	deafAt   time.Time // when the server counts as deaf; zero: it reads
}

// event is what the receiving goroutine tells.
type event struct {
	response *discoverypb.DeltaDiscoveryResponse // nil: the stream is established
	err      error                               // the end
}

func newSession(c *Client, log *slog.Logger, stream clientStream) *session {
	return &session{c: c, log: log, stream: stream, out: newOutbox(), events: make(chan event)}
}

func (s *session) established() bool { return !s.since.IsZero() }

// answered reports whether every first request was.
func (s *session) answered() bool {
	for _, sub := range s.c.subscriptions {
		if !sub.answered {
			return false
		}
	}
	return true
}

// run serves the stream until it ends, or with errResync until it is to be opened
// anew. cancel ends the stream.
func (s *session) run(ctx context.Context, cancel context.CancelFunc) error {
	var goroutines sync.WaitGroup
	defer goroutines.Wait()
	defer cancel()
	s.begin()
	goroutines.Go(func() { s.send(ctx) })
	goroutines.Go(func() { s.receive(ctx) })
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		events := s.source()
		if err := s.due(ctx); err != nil {
			return err
		}
		s.arm(timer)
		select {
		case e := <-events:
			if e.err != nil {
				return e.err
			}
			s.handle(ctx, e)
		case <-s.out.room:
		case <-s.c.demands.ready:
			s.more = true
		case <-timer.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// source is where events come from: nowhere while too many answers wait to be read.
func (s *session) source() <-chan event {
	if !s.out.full() {
		s.deafAt = time.Time{}
		return s.events
	}
	if s.deafAt.IsZero() {
		s.deafAt = time.Now().Add(answerTimeout)
	}
	return nil
}

// begin queues the first requests, one for each type, without waiting for
// anything.
func (s *session) begin() {
	bare := s.c.bare()
	s.c.demands.reset()
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	for _, sub := range s.c.subscriptions {
		sub.begin()
		r := sub.initial(s.c.node, bare)
		s.echoes = max(s.echoes, len(r.GetInitialResourceVersions()))
		s.out.push(r)
		if bare && !sub.wildcard {
			s.resubscribe(sub)
		}
		s.c.tell(sub)
	}
}

// resubscribe asks for what we hold, which the versions do otherwise.
func (s *session) resubscribe(sub *subscription) {
	r := &discoverypb.DeltaDiscoveryRequest{TypeUrl: sub.url}
	for name := range sub.known {
		r.ResourceNamesSubscribe = append(r.ResourceNamesSubscribe, name)
		if len(r.ResourceNamesSubscribe) == subscribeBatch {
			s.out.push(r)
			r = &discoverypb.DeltaDiscoveryRequest{TypeUrl: sub.url}
		}
	}
	if len(r.ResourceNamesSubscribe) > 0 {
		s.out.push(r)
	}
}

func (s *session) send(ctx context.Context) {
	for {
		for m := s.out.take(); m != nil; m = s.out.take() {
			if err := s.stream.Send(m); err != nil {
				s.out.fail()
				return // the receiver gets the reason
			}
		}
		select {
		case <-s.out.ready:
		case <-ctx.Done():
			return
		}
	}
}

func (s *session) receive(ctx context.Context) {
	tell := func(e event) bool {
		select {
		case s.events <- e:
			return e.err == nil
		case <-ctx.Done():
			return false
		}
	}
	// Without headers there was no stream; Recv tells why.
	if headers, err := s.stream.Header(); err == nil && headers != nil && !tell(event{}) {
		return
	}
	for {
		r, err := s.stream.Recv()
		if !tell(event{response: r, err: err}) {
			return
		}
	}
}

// arm sets the timer to the next thing to be done.
func (s *session) arm(timer *time.Timer) {
	next := earlier(s.resyncAt, s.deafAt)
	for _, sub := range s.c.subscriptions {
		next = earlier(next, sub.staleAt)
	}
	if s.more && !s.out.hasDemand() {
		next = earlier(next, s.askAt)
	}
	if s.more && s.out.hasDemand() {
		next = earlier(next, time.Now().Add(demandPace))
	}
	if next.IsZero() {
		timer.Stop()
		return
	}
	timer.Reset(time.Until(next))
}

func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// due does whatever has its time.
func (s *session) due(ctx context.Context) error {
	now := time.Now()
	reached := func(t time.Time) bool { return !t.IsZero() && !now.Before(t) }
	if reached(s.deafAt) {
		return errDeaf
	}
	for _, sub := range s.c.subscriptions {
		if reached(sub.staleAt) {
			s.expire(ctx, sub)
		}
	}
	if s.more && !now.Before(s.askAt) && !s.out.hasDemand() {
		s.ask(ctx, now)
	}
	if !reached(s.resyncAt) {
		return nil
	}
	if !s.mixed && s.c.subscription(addressURL).versioned() {
		s.resyncAt = time.Time{} // it has got versions since
		return nil
	}
	return errResync
}

// ask sends what was asked for on demand.
func (s *session) ask(ctx context.Context, now time.Time) {
	unsubscribe, subscribe, more := s.c.demands.take()
	s.more, s.askAt = more, now.Add(demandPace)
	// Two requests: in one, a name that stands in both lists would be unsubscribed.
	if len(unsubscribe) > 0 {
		// To a request that subscribes to nothing istiod answers that everything is removed.
		s.turn = 1 - s.turn
		s.out.push(&discoverypb.DeltaDiscoveryRequest{
			TypeUrl: addressURL, ResourceNamesSubscribe: nothing[s.turn : s.turn+1],
			ResourceNamesUnsubscribe: append(unsubscribe, nothing[1-s.turn]),
		})
	}
	if len(subscribe) > 0 {
		s.out.push(&discoverypb.DeltaDiscoveryRequest{TypeUrl: addressURL, ResourceNamesSubscribe: subscribe})
		s.log.DebugContext(ctx, "ask for resources on demand", "names", subscribe)
	}
}

// expire removes what the server has given up.
func (s *session) expire(ctx context.Context, sub *subscription) {
	s.c.mu.Lock()
	names := sub.expire()
	s.c.mu.Unlock()
	sub.apply(nil, names, nil)
	s.c.tell(sub)
	s.log.InfoContext(ctx, "removed what the control plane no longer names", "type_url", sub.url, "resources", len(names))
}

// handle does one response: the store, then what we know of it, then those who
// wait for it, then the answer.
func (s *session) handle(ctx context.Context, e event) {
	r := e.response
	if r == nil {
		s.since = time.Now()
		s.c.setConnected(s.since)
		s.log.InfoContext(ctx, "XDS stream established", "address", s.c.cfg.Address)
		return
	}
	sub := s.c.subscription(r.GetTypeUrl())
	answer := &discoverypb.DeltaDiscoveryRequest{TypeUrl: r.GetTypeUrl(), ResponseNonce: r.GetNonce()}
	if sub == nil {
		s.c.cfg.Metrics.received(unknownURL, payload(r), time.Now())
		s.log.WarnContext(ctx, "the control plane sent resources of a type that nobody asked for, they are ignored", "type_url", cut(r.GetTypeUrl(), maxReason))
		s.out.push(answer)
		return
	}
	s.c.cfg.Metrics.received(sub.url, payload(r), time.Now())
	if rejected := s.process(ctx, sub, r); rejected != nil {
		text := nackText(rejected)
		answer.ErrorDetail = &discoverypb.Status{Message: text}
		s.log.ErrorContext(ctx, "resources were rejected, the versions from before stay in use: correct them", "type_url", sub.url,
			"nonce", r.GetNonce(), "type", "Nack", "resources", len(rejected.Resources), "error", cut(text, 8*maxReason))
	} else {
		s.log.DebugContext(ctx, "resources were accepted", "type_url", sub.url, "nonce", r.GetNonce(), "type", "Ack",
			"resources", len(r.GetResources()), "removed", len(r.GetRemovedResources()))
	}
	s.out.push(answer)
}

// payload is how many bytes of resources there are in r.
func payload(r *discoverypb.DeltaDiscoveryResponse) int {
	n := 0
	for _, res := range r.GetResources() {
		n += len(res.GetResource().GetValue())
	}
	return n
}

// process applies r and keeps the books.
func (s *session) process(ctx context.Context, sub *subscription, r *discoverypb.DeltaDiscoveryResponse) *state.RejectedError {
	if s.log.Enabled(ctx, slog.LevelDebug) {
		for _, name := range r.GetRemovedResources() {
			s.log.DebugContext(ctx, "received delete resource", "type_url", sub.url, "name", name)
		}
	}
	first := !sub.answered
	var stale []string
	if first && sub.wildcard && s.c.cfg.FullSet == FullSetAuto {
		stale = sub.unnamed(r)
	}
	rejected := sub.apply(r.GetResources(), r.GetRemovedResources(), stale)
	s.c.mu.Lock()
	held := sub.held()
	sub.note(r, rejected)
	sub.answered = true
	s.suspect(sub, stale)
	s.c.mu.Unlock()
	if 2*len(stale) > held && len(stale) > 0 {
		s.log.WarnContext(ctx, "the control plane no longer names more than half of what it sent before, which is removed after a while: check that it is the right one, or set XDS_FULL_SET=never",
			"type_url", sub.url, "resources", len(stale), "of", held, "removed_in", s.c.cfg.StaleGrace)
	}
	s.c.demands.answer(r)
	if first {
		s.accepted(sub)
	}
	s.plan(sub, r)
	s.c.tell(sub)
	return rejected
}

// suspect starts the grace of stale resources.
func (s *session) suspect(sub *subscription, stale []string) {
	if len(stale) == 0 {
		return
	}
	sub.stale = make(map[string]struct{}, len(stale))
	for _, name := range stale {
		sub.stale[name] = struct{}{}
	}
	sub.staleAt = time.Now().Add(max(0, s.c.cfg.StaleGrace))
}

// accepted is called after the first response of a type on the stream.
func (s *session) accepted(sub *subscription) {
	if s.c.echo.bare && s.answered() {
		// It went well without versions: if it had not with them, that was why.
		if s.c.echo.trial > 0 {
			s.c.echo.limit = s.c.echo.trial
		}
		s.c.echo.bare, s.c.echo.trial = false, 0
	}
	s.c.processed(sub)
}

// plan decides when the stream is opened anew for a full set.
func (s *session) plan(sub *subscription, r *discoverypb.DeltaDiscoveryResponse) {
	if !sub.wildcard {
		return
	}
	if sub.echoed && unversioned(r) {
		sub.echoed = false
		if sub.versioned() && s.c.cfg.FullSet == FullSetAuto {
			// It was another server which sent what this one has not named so far.
			s.mixed = true
			s.resyncAt = earlier(s.resyncAt, time.Now().Add(max(resyncSoon, s.c.cfg.StaleGrace)))
		}
	}
	if s.resyncAt.IsZero() && sub.url == addressURL && !sub.versioned() {
		size := max(1, float64(len(sub.known))/resyncSize)
		s.resyncAt = time.Now().Add(time.Duration((1 + rand.Float64()) * size * float64(resyncMin)))
	}
}
