package ca

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

// ManagerConfig configures a [Manager]. The zero value of a field means its
// default.
type ManagerConfig struct {
	// Linger is how long a certificate that is shared by identity is kept, and
	// renewed, after its last lease was released: re-issuing is dear, and pods
	// of one service account come and go (CA_LINGER). Default 5 min; negative
	// means not at all. Certificates of one workload (Key.UID) never linger.
	Linger time.Duration
	// Validation overrides the mode in which delivered certificates are judged.
	Validation Validation
	// Metrics; nil counts nothing.
	Metrics *Metrics
	// Logger; nil discards.
	Logger *slog.Logger
}

// Manager holds one certificate per [Key] that is leased, and hands it to the
// holders of leases. All methods are safe for concurrent use.
//
// A hold is the manager's side of one key: one Watch of its provider, and one
// WatchBundles of every other provider, since a peer's certificate may come
// from any of them. Where the certificate is shared by identity, and another
// provider tells pods apart, there is one WatchBundles of that one for each pod,
// and what it says counts for the leases of that pod alone. Leases point to one
// hold; during a live move also to the next one. A hold copies what it publishes
// into its leases, so that reading is one atomic load.
type Manager struct {
	cfg  ManagerConfig
	log  *slog.Logger
	wake chan struct{} // one slot: a deadline of the sweeper moved

	mu        sync.Mutex // guards what follows, holds and leases
	router    Router
	holds     map[holdKey]*hold
	held      map[Provider]int // how many of holds are of it
	leases    map[*Lease]struct{}
	providers map[Provider]*providerRun // those whose Run has not returned
	failed    error                     // of a provider's Run
	moved     time.Time                 // of the latest Replace, zero once its end was reported
	moving    int                       // leases on their way to another hold
	warned    bool                      // that there still are some
	stop      context.CancelCauseFunc
	ctx       context.Context // of Run, nil before; it belongs to the manager as long as it runs
	tasks     sync.WaitGroup  // watches and providers
	sweepAt   time.Time       // when the sweeper looks at all holds again
}

// providerRun is one call of Provider.Run. It is guarded by the manager's lock.
type providerRun struct {
	cancel context.CancelFunc
	ending bool // canceled; the next Run, if any, waits for its end
}

// holdKey tells apart providers of one name before and after a move.
type holdKey struct {
	provider Provider
	key      Key
}

var errStopped = fmt.Errorf("%w: the certificate manager has stopped", ErrReleased)

// NewManager makes a manager that serves workloads as r says. It starts
// nothing: leases stay pending until Run.
func NewManager(r Router, cfg ManagerConfig) *Manager {
	switch {
	case cfg.Linger == 0:
		cfg.Linger = 5 * time.Minute
	case cfg.Linger < 0:
		cfg.Linger = 0
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Manager{
		cfg:       cfg,
		log:       cfg.Logger.With("component", "ca"),
		wake:      make(chan struct{}, 1),
		router:    r,
		holds:     make(map[holdKey]*hold),
		held:      make(map[Provider]int),
		leases:    make(map[*Lease]struct{}),
		providers: make(map[Provider]*providerRun),
	}
}

// Run runs the providers and the watches of all leases. It may be called once.
// It returns after all have ended: nil when ctx ends, or the error of the first
// provider whose Run failed. All leases are then without an SVID.
func (m *Manager) Run(ctx context.Context) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	m.mu.Lock()
	if m.ctx != nil {
		m.mu.Unlock()
		return errors.New("the certificate manager was started twice")
	}
	m.ctx, m.stop = ctx, stop
	m.reconcile()
	for _, h := range m.holds {
		m.start(h)
	}
	m.mu.Unlock()

	m.sweep(ctx)

	m.mu.Lock()
	for l := range m.leases {
		l.store(&view{state: Withdrawn, err: errStopped})
	}
	m.mu.Unlock()
	m.tasks.Wait()
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.holds)
	clear(m.held)
	return m.failed
}

// running reports whether goroutines may be started. It is called with the lock
// held.
func (m *Manager) running() bool { return m.ctx != nil && m.ctx.Err() == nil }

// stopped reports whether Run has ended or is about to. It is called with the
// lock held.
func (m *Manager) stopped() bool { return m.ctx != nil && m.ctx.Err() != nil }

// reconcile runs the providers that are listed or still hold a key, and ends
// the others. One that is wanted again while it ends is run anew after that. It
// is called with the lock held.
func (m *Manager) reconcile() {
	if !m.running() {
		return
	}
	want := make(map[Provider]bool)
	for _, p := range m.router.All() {
		want[p] = true
	}
	for p := range m.held {
		want[p] = true
	}
	for p, run := range m.providers {
		if !want[p] {
			run.cancel()
			run.ending = true
		}
	}
	for p := range want {
		if _, ok := m.providers[p]; ok {
			continue
		}
		ctx, cancel := context.WithCancel(m.ctx)
		m.providers[p] = &providerRun{cancel: cancel}
		m.tasks.Go(func() { m.runProvider(ctx, p) })
	}
}

func (m *Manager) runProvider(ctx context.Context, p Provider) {
	err := p.Run(ctx)
	m.mu.Lock()
	defer m.mu.Unlock()
	if ctx.Err() != nil {
		delete(m.providers, p)
		m.reconcile() // it may be wanted again
		return
	}
	if err == nil {
		err = errors.New("it ended without a reason")
	}
	err = fmt.Errorf("run certificate provider %s: %w", p.Name(), err)
	if m.failed == nil {
		m.failed = err
	}
	m.stop(err)
}

// Acquire leases the certificate of w. It does not block. The caller must
// release the lease; w.PIDFD stays the caller's, and must stay open until then.
// After that nothing is done in w's name any more, whoever else has leases.
func (m *Manager) Acquire(w WorkloadRef) *Lease {
	l := &Lease{m: m, ref: w, changed: make(chan struct{}), empty: time.Now()}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stopped() {
		l.view.Store(&view{state: Withdrawn, err: errStopped})
		l.released = true
		return l
	}
	m.leases[l] = struct{}{}
	l.view.Store(&view{state: Pending})
	p := m.router.For(w)
	if p == nil {
		l.view.Store(noProvider(w))
		return l
	}
	l.hold = m.join(p, w)
	l.hold.leases[l] = struct{}{}
	l.hold.enter(w)
	l.store(l.hold.audience(w).view)
	return l
}

func noProvider(w WorkloadRef) *view {
	return &view{state: Unavailable, err: fmt.Errorf("no certificate provider serves %s in namespace %q", w.ID, w.Namespace)}
}

// join finds or makes the hold of p for w. It is called with the lock held.
func (m *Manager) join(p Provider, w WorkloadRef) *hold {
	k := holdKey{p, p.Key(w)}
	h := m.holds[k]
	if h == nil {
		h = newHold(m, k, w)
		m.holds[k] = h
		m.held[p]++
		if m.providers[p] == nil {
			m.reconcile() // the router chose one that it does not list
		}
		m.start(h)
	}
	h.until = time.Time{}
	return h
}

// start begins the watches of h if the manager runs. It is called with the lock
// held.
func (m *Manager) start(h *hold) {
	if !m.running() || h.cancel != nil {
		return
	}
	h.start(m.ctx, m.router.All())
}

// leave is what l leaves behind in h: nothing that names it. Once nobody points to
// h it ends, after the linger or at once. It is called with the lock held.
func (m *Manager) leave(h *hold, l *Lease, linger bool) {
	h.exit(l.ref)
	if len(h.leases) > 0 || len(h.moving) > 0 {
		return
	}
	if linger && h.shared && m.cfg.Linger > 0 {
		h.until = time.Now().Add(m.cfg.Linger)
		m.sweepBy(h.until)
		return
	}
	m.drop(h)
}

// drop ends h. It is called with the lock held.
func (m *Manager) drop(h *hold) {
	if h.cancel != nil {
		h.cancel()
	}
	if m.holds[h.key] != h {
		return
	}
	delete(m.holds, h.key)
	p := h.key.provider
	if m.held[p]--; m.held[p] == 0 {
		delete(m.held, p)
		m.reconcile() // it may have been the last of a provider that is no longer listed
	}
}

// sweep ends what is over, an SVID at its NotAfter and a hold after its
// linger, until ctx ends.
func (m *Manager) sweep(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		timer.Reset(m.sweepOnce(time.Now()))
		m.followMove(ctx, time.Now())
		select {
		case <-ctx.Done():
			return
		case <-m.wake:
		case <-timer.C:
		}
	}
}

// sweepOnce returns the time to the next deadline, at most 30 s: timers do not
// see steps of the wall clock, which certificates go by.
func (m *Manager) sweepOnce(now time.Time) time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	sleep := maxSleep
	for _, h := range m.holds {
		if svid := h.all.view.svid; svid != nil {
			if svid.expired(now) {
				h.expire()
			} else {
				sleep = min(sleep, svid.NotAfter.Sub(now))
			}
		}
		if h.until.IsZero() {
			continue
		}
		if wait := h.until.Sub(now); wait > 0 {
			sleep = min(sleep, wait)
		} else {
			m.drop(h)
		}
	}
	m.sweepAt = now.Add(sleep)
	return sleep
}

// movePatience is how long a live move may take before it is reported.
const movePatience = time.Minute

// followMove logs the end of a live move, and once that it takes long. The
// sweeper calls it when the last lease has moved, and every 30 s.
func (m *Manager) followMove(ctx context.Context, now time.Time) {
	m.mu.Lock()
	if m.moved.IsZero() || m.warned && m.moving > 0 {
		m.mu.Unlock()
		return
	}
	took := now.Sub(m.moved)
	report := func() {}
	switch {
	case m.moving == 0:
		leases := len(m.leases)
		m.moved = time.Time{}
		report = func() {
			m.log.InfoContext(ctx, "the move to the listed certificate providers is complete", "leases", leases, "took", took)
		}
	case took >= movePatience:
		m.warned = true
		pending, example := m.moving, m.example()
		report = func() {
			m.log.WarnContext(ctx, "certificates have not moved to their new provider and stay with the old one; see ztunnel certs -o wide",
				"leases", pending, "provider", example.Provider, "identity", example.ID, "error", example.Err)
		}
	}
	m.mu.Unlock()
	report()
}

// example is a certificate for which a lease waits that has another one. It is
// called with the lock held.
func (m *Manager) example() Status {
	for _, h := range m.holds {
		if len(h.moving) > 0 {
			return h.status()
		}
	}
	return Status{}
}

// sweepBy has the sweeper look at t at the latest. Looking costs a step for each
// hold: it is woken only when it would come too late. It is called with the lock
// held.
func (m *Manager) sweepBy(t time.Time) {
	if t.Before(m.sweepAt) {
		m.sweepAt = t
		m.poke()
	}
}

func (m *Manager) poke() {
	select {
	case m.wake <- struct{}{}:
	default: // already told
	}
}

// Replace is a live move to another routing. Every lease is resolved anew, by
// the WorkloadRef with which it was acquired. One whose key changes keeps its
// SVID, renewed as before, until the new key has a valid one; one that has no
// SVID to keep moves at once. What is known of the other providers' anchors
// goes along, so that no peer is refused in between. Providers that are no
// longer listed end when their last lease has moved; their anchors are trusted
// no longer, but for the leases that still have a certificate of them. A second
// Replace redirects a move under way. [Status].Moves shows it until it has come
// to its end. After Run has ended it does nothing.
func (m *Manager) Replace(r Router) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stopped() {
		return
	}
	m.router = r
	m.reconcile()
	m.moved, m.warned = time.Now(), false
	for l := range m.leases {
		m.move(l)
	}
	all := r.All()
	for k, h := range m.holds {
		if !h.until.IsZero() && !routed(r, h.ref, k) {
			m.drop(h) // nobody would ask the old provider again
			continue
		}
		if m.running() {
			h.listen(all)
		}
	}
	m.reconcile()
	m.poke() // the sweeper follows the move
}

// routed reports whether w is still served under k.
func routed(r Router, w WorkloadRef, k holdKey) bool {
	p := r.For(w)
	return p != nil && holdKey{p, p.Key(w)} == k
}

// move points l to the hold that the router chooses now. It is called with the
// lock held.
func (m *Manager) move(l *Lease) {
	if next := l.stay(); next != nil { // a move that did not come to its end
		defer m.leave(next, l, false)
	}
	p := m.router.For(l.ref)
	if p == nil {
		if old := l.hold; old != nil {
			l.hold = nil
			delete(old.leases, l)
			m.leave(old, l, false)
		}
		l.store(noProvider(l.ref))
		return
	}
	if l.hold != nil && l.hold.key == (holdKey{p, p.Key(l.ref)}) {
		return
	}
	l.head(m.join(p, l.ref))
	if l.hold != nil {
		l.next.inherit(l.hold, l.ref)
	}
	l.settle()
}
