package ca

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// view is what a lease can see. It is immutable.
type view struct {
	state State
	svid  *SVID // Available only
	err   error // Unavailable and Withdrawn
}

// hold is one watched key. Its fields are guarded by the manager's lock, except
// where a comment says otherwise.
//
// Watches are for as long as there is a lease, or a linger, and the leases come
// and go. So no watch names a workload that has none any more: what pods share is
// watched for their identity, what is one pod's for one of the leases of that pod.
type hold struct {
	m      *Manager
	key    holdKey     // immutable
	id     spiffeid.ID // immutable
	shared bool        // immutable: by all pods of the identity
	ref    WorkloadRef // whom the provider's watch names

	ctx      context.Context // of the watches; nil until they start
	cancel   context.CancelFunc
	endWatch context.CancelFunc // of the provider's watch alone
	anew     bool               // that one took the place of another, and has not said yet what the backend grants

	own     *SVID     // as the provider delivered it, without the others' anchors
	lastErr error     // the newest failure, also while an SVID is available
	next    time.Time // the provider's next attempt
	wanted  bool      // a connection has waited
	until   time.Time // end of the linger, zero while it is leased

	leases map[*Lease]struct{} // that show what their audience sees
	moving map[*Lease]struct{} // that will, once it is Available

	all  *audience            // all leases
	pods map[string]*audience // by UID: those of one pod, where the hold is shared and other providers tell pods apart
}

func newHold(m *Manager, k holdKey, w WorkloadRef) *hold {
	h := &hold{
		m: m, key: k, id: w.ID, ref: w, shared: !perPod(k.provider, w),
		leases: make(map[*Lease]struct{}),
		moving: make(map[*Lease]struct{}),
		pods:   make(map[string]*audience),
	}
	if h.shared {
		h.ref = ofIdentity(w)
	}
	h.all = newAudience(h, &view{state: Pending})
	return h
}

// start begins the watches.
func (h *hold) start(ctx context.Context, providers []Provider) {
	h.ctx, h.cancel = context.WithCancel(ctx)
	h.startWatch()
	h.listen(providers)
}

func (h *hold) startWatch() {
	ctx, cancel := context.WithCancel(h.ctx)
	h.endWatch = cancel
	w := h.ref
	h.m.tasks.Go(func() { h.watch(ctx, w) })
}

// watch feeds h from its provider until ctx ends.
func (h *hold) watch(ctx context.Context, w WorkloadRef) {
	p := h.key.provider
	err := p.Watch(ctx, w, func(ev Event) { h.update(ctx, ev) })
	if ctx.Err() != nil {
		return
	}
	// The provider broke its contract; what it delivered stays until NotAfter.
	h.update(ctx, Event{State: Unavailable, Err: fmt.Errorf("certificate provider %s stopped watching %s: %w", p.Name(), w.ID, err)})
}

// update takes over an event. It runs on the goroutine of the watch: the checks
// happen outside the lock.
func (h *hold) update(ctx context.Context, ev Event) {
	if ev.State == Available {
		if err := ev.SVID.check(h.id, anyID(h.key.provider), h.m.cfg.Validation, time.Now()); err != nil {
			h.adopt(ctx, ev.SVID)
			ev = Event{State: Unavailable, Err: err, Next: ev.Next}
			h.m.log.WarnContext(ctx, "certificate rejected", "provider", h.key.key.Provider, "identity", h.id, "error", err)
		}
	}
	if h.apply(ctx, ev) {
		h.hurry()
	}
}

// adopt takes the bundles of a rejected SVID, if it is the one that is published
// with other bundles: that they no longer vouch for ourselves is no reason to go
// on trusting those whom the provider trusts no more.
func (h *hold) adopt(ctx context.Context, rejected *SVID) {
	h.m.mu.Lock()
	defer h.m.mu.Unlock()
	if ctx.Err() == nil && h.own != nil && h.own.sameLeaf(rejected) && rejected.Bundles != nil {
		h.own = h.own.withBundles(rejected.Bundles)
		h.publishSVID()
	}
}

// apply publishes ev, and reports whether the provider should hurry.
func (h *hold) apply(ctx context.Context, ev Event) (hurry bool) {
	h.m.mu.Lock()
	defer h.m.mu.Unlock()
	if ctx.Err() != nil {
		return false // dropped meanwhile
	}
	h.next = ev.Next
	h.lastErr = ev.Err
	kept := h.own != nil && !h.own.expired(time.Now())
	if h.anew && ev.State == Pending && ev.Err != nil {
		kept = false // to the new watch nothing was taken back: there just is nothing
	}
	h.anew = h.anew && kept && ev.State != Available && ev.State != Withdrawn
	switch ev.State {
	case Available:
		if h.own != nil && !h.own.sameLeaf(ev.SVID) {
			h.m.cfg.Metrics.renewed(h.key.key.Provider)
		}
		h.own = ev.SVID
		h.publishSVID()
		h.m.sweepBy(ev.SVID.NotAfter)
	case Withdrawn:
		h.own = nil
		h.publish(&view{state: Withdrawn, err: orElse(ev.Err, ErrDenied)})
	case Unavailable:
		if !kept {
			h.own = nil
			h.publish(&view{state: Unavailable, err: orElse(ev.Err, errNoReason)})
		}
	case Pending:
		if !kept {
			h.own = nil
			h.publish(&view{state: Pending})
		}
		return h.wanted
	}
	return false
}

var errNoReason = errors.New("the certificate provider gave no reason")

func orElse(err, fallback error) error {
	if err != nil {
		return err
	}
	return fallback
}

// hurry tells the provider, if it can hurry, that a connection waits.
func (h *hold) hurry() {
	if p, ok := h.key.provider.(interface{ Hurry(Key) }); ok {
		p.Hurry(h.key.key)
	}
}

// expire takes back an SVID that reached its NotAfter.
func (h *hold) expire() {
	err := fmt.Errorf("%w: %s, at %s", ErrExpired, h.id, h.own.NotAfter.UTC().Format(time.RFC3339))
	if h.lastErr != nil {
		err = fmt.Errorf("%w: %w", err, h.lastErr)
	}
	h.own = nil
	h.lastErr = err
	h.publish(&view{state: Unavailable, err: err})
}

// publishSVID publishes the own SVID with everyone's anchors.
func (h *hold) publishSVID() {
	if h.own == nil {
		return
	}
	h.publishTo(h.all)
	for _, a := range h.pods {
		h.publishTo(a)
	}
	h.show()
}

// publishTo has a, after which show must be called, see the own SVID with the
// anchors that are for it.
func (h *hold) publishTo(a *audience) {
	bundles := append([]*Bundles{h.own.Bundles}, h.all.anchors()...)
	if a != h.all {
		bundles = append(bundles, a.anchors()...)
	}
	a.publish(h.own, bundles)
}

// publish has all leases see v.
func (h *hold) publish(v *view) {
	h.all.view = v
	for _, a := range h.pods {
		a.view = v
	}
	h.show()
}

// show gives the leases what their audience sees.
func (h *hold) show() {
	for l := range h.leases {
		l.store(h.audience(l.ref).view)
		l.settle() // a lease under way elsewhere has nothing to wait for any more
	}
	for l := range maps.Clone(h.moving) {
		l.settle()
	}
}

// audience is the one to which the leases of w belong.
func (h *hold) audience(w WorkloadRef) *audience {
	if a := h.pods[w.UID]; a != nil {
		return a
	}
	return h.all
}

// others are the providers besides the hold's own: those whose anchors are for
// all leases, and those whose anchors are for one pod's alone.
func (h *hold) others(providers []Provider) (common, personal []Provider) {
	for _, p := range providers {
		switch {
		case p == h.key.provider:
		case h.shared && bundlesPerPod(p, h.ref):
			personal = append(personal, p)
		default:
			common = append(common, p)
		}
	}
	return common, personal
}

// watching reports whether watches may be started.
func (h *hold) watching() bool { return h.ctx != nil && h.ctx.Err() == nil }

// listen watches the anchors of all listed providers but the hold's own.
func (h *hold) listen(providers []Provider) {
	if !h.watching() {
		return
	}
	common, personal := h.others(providers)
	h.all.listen(common, h.ref)
	if len(personal) == 0 {
		for _, a := range h.pods {
			a.end()
		}
		clear(h.pods)
	} else {
		h.listenForPods(personal)
	}
	h.publishSVID()
}

// listenForPods watches the anchors that are for single pods.
func (h *hold) listenForPods(personal []Provider) {
	refs := make(map[string]map[WorkloadRef]int)
	for l := range h.eachLease {
		if refs[l.ref.UID] == nil {
			refs[l.ref.UID] = make(map[WorkloadRef]int)
		}
		refs[l.ref.UID][l.ref]++
	}
	for uid := range refs {
		a := h.pods[uid]
		if a == nil {
			a = newAudience(h, h.all.view)
			h.pods[uid] = a
		}
		a.refs = refs[uid]
		w, _ := a.living(WorkloadRef{})
		a.listen(personal, w)
	}
}

// eachLease yields the leases that show h and those that will.
func (h *hold) eachLease(yield func(*Lease) bool) {
	for _, leases := range []map[*Lease]struct{}{h.leases, h.moving} {
		for l := range leases {
			if !yield(l) {
				return
			}
		}
	}
}

// enter counts a lease of w in. It is called when l shows h, or is on its way.
func (h *hold) enter(w WorkloadRef) {
	if !h.shared {
		h.all.refs[w]++
		return
	}
	if !h.watching() {
		return
	}
	if a := h.pods[w.UID]; a != nil {
		a.refs[w]++
		return
	}
	if _, personal := h.others(h.m.router.All()); len(personal) > 0 {
		a := newAudience(h, h.all.view)
		h.pods[w.UID] = a
		a.refs[w] = 1
		a.listen(personal, w)
	}
}

// exit counts a lease of w out.
func (h *hold) exit(w WorkloadRef) {
	a := h.all
	if h.shared {
		a = h.pods[w.UID]
	}
	if a == nil {
		return
	}
	if a.refs[w]--; a.refs[w] <= 0 {
		delete(a.refs, w)
	}
	switch {
	case len(a.refs) > 0:
		h.follow(a)
	case h.shared:
		a.end()
		delete(h.pods, w.UID)
	}
}

// follow has the watches that name a workload whose leases are gone name another
// one. What they have said counts until that one is answered.
func (h *hold) follow(a *audience) {
	if !h.watching() {
		return
	}
	a.follow()
	if h.shared {
		return
	}
	if w, ok := a.living(h.ref); ok && w != h.ref {
		h.endWatch()
		h.ref, h.anew = w, true
		h.startWatch()
	}
}

// inherit takes over what old knows of the anchors of the other providers for w,
// old's own among them, as far as those have not spoken to h yet: a lease that
// moves must not lose the trust that it has.
func (h *hold) inherit(old *hold, w WorkloadRef) {
	for _, a := range []*audience{h.all, h.pods[w.UID]} {
		if a == nil {
			continue
		}
		for p, watch := range a.watches {
			if watch.latest == nil {
				watch.latest = old.known(p, w)
			}
		}
	}
	h.publishSVID()
}

// known is what p has contributed to h for w, or else the provider whose place it
// takes with other settings; nil if nothing. Of h's own it is the trust domain of
// its SVID with the aliases: what the provider grants beyond goes with that SVID.
func (h *hold) known(p Provider, w WorkloadRef) *Bundles {
	both := []*audience{h.audience(w), h.all}
	for _, a := range both {
		if b := a.known(func(other Provider) bool { return other == p }); b != nil {
			return b
		}
	}
	if h.key.provider.Name() == p.Name() {
		if h.own == nil {
			return nil
		}
		return h.own.Bundles.only(h.own.ID.TrustDomain())
	}
	for _, a := range both {
		if b := a.known(func(other Provider) bool { return other.Name() == p.Name() }); b != nil {
			return b
		}
	}
	return nil
}

// watchBundles feeds watch, which is one of a's, from p until ctx ends.
func (h *hold) watchBundles(ctx context.Context, a *audience, p Provider, watch *bundleWatch) {
	err := p.WatchBundles(ctx, watch.ref, func(b *Bundles) {
		h.m.mu.Lock()
		defer h.m.mu.Unlock()
		if ctx.Err() != nil || watch.latest != nil && watch.latest.Equal(b) {
			return
		}
		watch.latest = b
		switch {
		case a == h.all:
			h.publishSVID()
		case h.own != nil:
			h.publishTo(a)
			h.show()
		}
	})
	if ctx.Err() == nil {
		h.m.log.ErrorContext(ctx, "certificate provider stopped reporting bundles", "provider", p.Name(), "identity", h.id, "error", err)
	}
}
