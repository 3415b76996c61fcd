package ca

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// maxSleep bounds how long a timer trusts the wall clock to run evenly.
const maxSleep = 30 * time.Second

// priority orders requests: renewals give way to new identities, and those to
// identities for which a connection waits.
type priority uint8

const (
	background priority = iota
	warmup
	realTime
)

// Poll makes a Provider of a Fetcher. It holds one certificate per identity as
// long as somebody watches it: renewed from half-life on, retried with backoff,
// requested once however many watch. A failed renewal leaves the certificate
// in place until its NotAfter, at which time there is always an attempt.
//
// Requests are made while Run runs. The returned provider also has
// Hurry(Key), by which a waiting connection overtakes warm-up and renewal.
func Poll(name string, f Fetcher, cfg PollConfig) Provider {
	cfg.setDefaults()
	return &poll{
		name:         name,
		fetcher:      f,
		cfg:          cfg,
		log:          cfg.Logger.With("component", "ca", "provider", name),
		wake:         make(chan struct{}, 1),
		entries:      make(map[spiffeid.ID]*entry),
		retries:      make(map[spiffeid.ID]*retries),
		rootsChanged: make(chan struct{}),
	}
}

type poll struct {
	name    string
	fetcher Fetcher
	cfg     PollConfig
	log     *slog.Logger
	wake    chan struct{} // one slot: the dispatcher should look again

	mu           sync.Mutex // guards what follows, and the entries
	entries      map[spiffeid.ID]*entry
	queue        queue                    // of the entries that are not in flight
	retries      map[spiffeid.ID]*retries // survive the entry
	running      int
	seq          uint64
	roots        *Bundles // of the latest answer
	rootsChanged chan struct{}
}

// entry is one watched identity.
type entry struct {
	id       spiffeid.ID
	watchers int
	inflight bool // a request runs; its result goes to whoever watches then
	pri      priority
	due      time.Time
	seq      uint64 // breaks ties of due
	event    Event
	changed  chan struct{} // closed and replaced with each event
	queued   *entryHeap    // nil while it is in flight
	index    int           // in queued
}

func (p *poll) Name() string { return p.name }

// AnyID is that of the configuration, for the manager.
func (p *poll) AnyID() bool { return p.cfg.AnyID }

func (p *poll) Key(w WorkloadRef) Key { return Key{Provider: p.name, ID: w.ID} }

// Run starts the requests and waits for them when ctx ends.
func (p *poll) Run(ctx context.Context) error {
	if d, ok := p.fetcher.(Disconnecter); ok {
		defer d.Disconnect()
	}
	var requests sync.WaitGroup
	defer requests.Wait()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		timer.Reset(p.dispatch(ctx, &requests))
		select {
		case <-ctx.Done():
			return nil
		case <-p.wake:
		case <-timer.C:
		}
	}
}

// dispatch starts what is due, and returns how long to sleep.
func (p *poll) dispatch(ctx context.Context, requests *sync.WaitGroup) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		now := time.Now()
		if p.running >= p.cfg.Concurrency || ctx.Err() != nil {
			return maxSleep // the end of a request wakes us
		}
		e := p.queue.next(now)
		if e == nil {
			return p.queue.wait(now)
		}
		p.running++
		e.inflight = true
		requests.Go(func() { p.request(ctx, e) })
	}
}

func (p *poll) request(ctx context.Context, e *entry) {
	start := time.Now()
	svid, err := p.fetch(ctx, e.id)
	took := time.Since(start)
	p.mu.Lock()
	p.running--
	p.mu.Unlock()
	if err == nil {
		err = p.accept(ctx, e.id, svid)
	}
	if ctx.Err() == nil && p.cfg.Observe != nil {
		p.cfg.Observe(err, took)
	}
	report := p.finished(ctx, e, svid, err)
	if report != nil {
		report()
	}
	p.poke()
}

// finished takes over the result of a request, and returns what to log.
func (p *poll) finished(ctx context.Context, e *entry, svid *SVID, err error) (report func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	e.inflight = false
	switch {
	case e.watchers == 0:
		delete(p.entries, e.id)
		return nil
	case ctx.Err() != nil: // we are stopping: this says nothing about the backend
		p.queue.add(e, time.Now())
		return nil
	case err != nil:
		return p.failed(ctx, e, err)
	}
	return p.succeeded(ctx, e, svid)
}

func (p *poll) fetch(ctx context.Context, id spiffeid.ID) (*SVID, error) {
	rctx, cancel := context.WithTimeout(ctx, p.cfg.Timeout)
	defer cancel()
	svid, err := p.fetcher.Fetch(rctx, id)
	// The backend knows the deadline, too, and its answer may be there before our
	// own timer.
	if deadline, _ := rctx.Deadline(); err != nil && !time.Now().Before(deadline) && ctx.Err() == nil {
		err = fmt.Errorf("no certificate within %v: %w", p.cfg.Timeout, err)
	}
	return svid, err
}

// accept judges an answer. It holds back one that is not valid yet because the
// backend's clock is ahead of ours; no slot is taken meanwhile.
func (p *poll) accept(ctx context.Context, id spiffeid.ID, svid *SVID) error {
	if svid != nil {
		if early := time.Until(svid.NotBefore); early > 0 && early <= p.cfg.Skew {
			p.poke() // for the slot
			p.log.DebugContext(ctx, "the certificate is not valid yet: compare the clocks of this node and of the CA", "identity", id, "early", early)
			timer := time.NewTimer(early)
			defer timer.Stop()
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-timer.C:
			}
		}
	}
	return svid.check(id, p.cfg.AnyID, p.cfg.Validation, time.Now())
}

// succeeded is called with the lock held.
func (p *poll) succeeded(ctx context.Context, e *entry, svid *SVID) (report func()) {
	delete(p.retries, e.id)
	now := time.Now()
	spread := max(p.cfg.RenewSpread, 0) * rand.Float64()
	at := renewAt(svid.NotBefore, svid.NotAfter, 0.5+spread)
	if floor := now.Add(max(p.cfg.Floor, svid.NotAfter.Sub(now)/10)); at.Before(floor) {
		at = floor
	}
	if p.cfg.Ceiling > 0 {
		if latest := now.Add(time.Duration(float64(p.cfg.Ceiling) * (1 - spread))); at.After(latest) {
			at = latest
		}
	}
	p.schedule(e, at)
	p.publish(e, Event{State: Available, SVID: svid, Next: at})
	if roots := svid.Bundles.Keep(p.roots); roots != p.roots {
		p.roots = roots
		close(p.rootsChanged)
		p.rootsChanged = make(chan struct{})
	}
	return func() { p.log.DebugContext(ctx, "certificate issued", "svid", svid, "renewal", at) }
}

// failed is called with the lock held.
func (p *poll) failed(ctx context.Context, e *entry, err error) (report func()) {
	now := time.Now()
	delay := p.retryDelay(e.id, err, now)
	at := now.Add(delay)
	if old := e.event.SVID; e.event.State == Available && !old.expired(now) {
		if at.After(old.NotAfter) {
			at = old.NotAfter
		}
		p.schedule(e, at)
		p.publish(e, Event{State: Available, SVID: old, Err: err, Next: at})
		return func() {
			p.log.InfoContext(ctx, "certificate renewal failed, keeping the certificate",
				"identity", e.id, "error", err, "not_after", old.NotAfter, "retry", at)
		}
	}
	p.schedule(e, at)
	p.publish(e, Event{State: Unavailable, Err: err, Next: at})
	return func() {
		p.log.WarnContext(ctx, "certificate fetch failed, there is no valid certificate",
			"identity", e.id, "error", err, "delay", delay)
	}
}

func (p *poll) schedule(e *entry, at time.Time) {
	p.seq++
	e.pri, e.due, e.seq = background, at, p.seq
	p.queue.add(e, time.Now())
}

func (p *poll) publish(e *entry, ev Event) {
	e.event = ev
	close(e.changed)
	e.changed = make(chan struct{})
}

// Hurry moves a first request in front of warm-up and renewal. It does nothing
// for an identity that has an answer, good or bad.
func (p *poll) Hurry(k Key) {
	p.mu.Lock()
	e := p.entries[k.ID]
	if e != nil && e.event.State == Pending && !e.inflight && e.pri < realTime {
		now := time.Now()
		p.queue.remove(e)
		e.pri, e.due = realTime, now
		p.queue.add(e, now)
	}
	p.mu.Unlock()
	p.poke()
}

func (p *poll) poke() {
	select {
	case p.wake <- struct{}{}:
	default: // already told
	}
}

// Watch joins the watchers of w's identity.
func (p *poll) Watch(ctx context.Context, w WorkloadRef, update func(Event)) error {
	e := p.join(w.ID)
	defer p.leave(e)
	p.poke()
	for {
		p.mu.Lock()
		ev, changed := e.event, e.changed
		p.mu.Unlock()
		update(ev)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}

func (p *poll) join(id spiffeid.ID) *entry {
	p.mu.Lock()
	defer p.mu.Unlock()
	e := p.entries[id]
	if e == nil {
		p.seq++
		e = &entry{id: id, pri: warmup, due: time.Now(), seq: p.seq, changed: make(chan struct{})}
		p.entries[id] = e
		p.queue.add(e, e.due)
	}
	e.watchers++
	return e
}

// leave forgets the identity with its last watcher. A running request goes on:
// whoever watches again before it ends gets its result.
func (p *poll) leave(e *entry) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if e.watchers--; e.watchers > 0 {
		return
	}
	e.event = Event{}
	if e.inflight {
		e.pri, e.due = warmup, time.Now()
	} else {
		p.queue.remove(e)
		delete(p.entries, e.id)
	}
	p.pruneRetries()
}

// WatchBundles reports the anchors of the latest answer, for whichever
// identity: one CA signs them all. Before the first answer it reports those
// that the fetcher knows, and no others if they are fixed.
func (p *poll) WatchBundles(ctx context.Context, _ WorkloadRef, update func(*Bundles)) error {
	if w, ok := p.fetcher.(RootWatcher); ok {
		if f, ok := p.fetcher.(FixedRoots); ok && f.FixedRoots() {
			return w.WatchRoots(ctx, update)
		}
		if err := p.watchRoots(ctx, w, update); err != nil {
			return err
		}
	}
	for {
		p.mu.Lock()
		roots, changed := p.roots, p.rootsChanged
		p.mu.Unlock()
		if roots != nil {
			update(roots)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}

// watchRoots runs w until the first answer.
func (p *poll) watchRoots(ctx context.Context, w RootWatcher, update func(*Bundles)) error {
	p.mu.Lock()
	roots, changed := p.roots, p.rootsChanged
	p.mu.Unlock()
	if roots != nil {
		return nil
	}
	rctx, cancel := context.WithCancel(ctx)
	var watcher sync.WaitGroup
	watcher.Go(func() {
		select {
		case <-changed:
			cancel()
		case <-rctx.Done():
		}
	})
	err := w.WatchRoots(rctx, update)
	answered := rctx.Err() != nil && ctx.Err() == nil
	cancel()
	watcher.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil && !answered {
		p.log.WarnContext(ctx, "trust anchors unknown before the first answer", "error", err)
	}
	return nil
}

// renewAt is the time at share of the life from notBefore to notAfter, or
// notAfter when there is no life.
func renewAt(notBefore, notAfter time.Time, share float64) time.Time {
	life := notAfter.Sub(notBefore)
	if life < 0 {
		return notAfter
	}
	return notBefore.Add(time.Duration(float64(life) * share))
}
