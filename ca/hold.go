package ca

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"
)

// view is what a lease can see. It is immutable.
type view struct {
	state State
	svid  *SVID // Available only
	err   error // Unavailable and Withdrawn
}

// hold is one watched key. Its fields are guarded by the manager's lock, except
// where a comment says otherwise.
type hold struct {
	m   *Manager
	key holdKey     // immutable
	ref WorkloadRef // immutable: of the first lease; the provider sees only what Key keeps

	ctx    context.Context // of the watches; nil until they start
	cancel context.CancelFunc

	view    *view     // published; never nil
	own     *SVID     // as the provider delivered it, without the others' anchors
	lastErr error     // the newest failure, also while an SVID is available
	next    time.Time // the provider's next attempt
	wanted  bool      // a connection has waited
	until   time.Time // end of the linger, zero while it is leased

	leases map[*Lease]struct{}       // that show view
	moving map[*Lease]struct{}       // that will, once it is Available
	extra  map[Provider]*bundleWatch // anchors of the other providers
}

// bundleWatch is the contribution of one other provider.
type bundleWatch struct {
	cancel context.CancelFunc
	latest *Bundles
}

// watch feeds h from its provider until ctx ends.
func (h *hold) watch(ctx context.Context) {
	p := h.key.provider
	err := p.Watch(ctx, h.ref, func(ev Event) { h.update(ctx, ev) })
	if ctx.Err() != nil {
		return
	}
	// The provider broke its contract; what it delivered stays until NotAfter.
	h.update(ctx, Event{State: Unavailable, Err: fmt.Errorf("certificate provider %s stopped watching %s: %w", p.Name(), h.ref.ID, err)})
}

// update takes over an event. It runs on the goroutine of the watch: the checks
// happen outside the lock.
func (h *hold) update(ctx context.Context, ev Event) {
	if ev.State == Available {
		if err := ev.SVID.check(h.ref.ID, anyID(h.key.provider), h.m.cfg.Validation, time.Now()); err != nil {
			h.adopt(ctx, ev.SVID)
			ev = Event{State: Unavailable, Err: err, Next: ev.Next}
			h.m.log.WarnContext(ctx, "certificate rejected", "provider", h.key.key.Provider, "identity", h.ref.ID, "error", err)
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
	err := fmt.Errorf("%w: %s, at %s", ErrExpired, h.ref.ID, h.own.NotAfter.UTC().Format(time.RFC3339))
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
	bundles := []*Bundles{h.own.Bundles}
	for _, w := range h.extra {
		bundles = append(bundles, w.latest)
	}
	var before *Bundles
	if h.view.svid != nil {
		before = h.view.svid.Bundles
	}
	svid := h.own.withBundles(Union(bundles...).Keep(before))
	if old := h.view.svid; old != nil && old.Cert == svid.Cert && old.Bundles == svid.Bundles && old.NotAfter.Equal(svid.NotAfter) {
		return // said before
	}
	h.publish(&view{state: Available, svid: svid})
}

// publish shows v to the leases.
func (h *hold) publish(v *view) {
	h.view = v
	for l := range h.leases {
		l.store(v)
		l.settle() // a lease under way elsewhere has nothing to wait for any more
	}
	for l := range maps.Clone(h.moving) {
		l.settle()
	}
}

// watchBundles watches the anchors of all providers but the hold's own. One that
// takes the place of another of its name, with other settings, begins with what is
// known of that one: tunnels would end while it connects.
func (h *hold) watchBundles(all []Provider) {
	if h.ctx == nil || h.ctx.Err() != nil {
		return
	}
	listed := make(map[Provider]bool)
	for _, p := range all {
		listed[p] = p != h.key.provider
	}
	changed := false
	known := make(map[string]*Bundles) // by name
	for p, w := range h.extra {
		if !listed[p] {
			w.cancel()
			delete(h.extra, p)
			changed = changed || w.latest != nil
			known[p.Name()] = w.latest
		}
	}
	for p, other := range listed {
		if !other || h.extra[p] != nil {
			continue
		}
		ctx, cancel := context.WithCancel(h.ctx)
		w := &bundleWatch{cancel: cancel, latest: known[p.Name()]}
		h.extra[p] = w
		h.m.tasks.Go(func() { h.watchBundlesOf(ctx, p, w) })
	}
	if changed {
		h.publishSVID()
	}
}

// inherit takes over what old knows of the anchors of the other providers, old's
// own among them, as far as those have not spoken to h yet: a lease that moves
// must not lose the trust that it has. It is called with the lock held.
func (h *hold) inherit(old *hold) {
	changed := false
	for p, w := range h.extra {
		if w.latest == nil {
			w.latest = old.known(p)
			changed = changed || w.latest != nil
		}
	}
	if changed {
		h.publishSVID()
	}
}

// known is what p has contributed to h, or else the provider whose place it takes
// with other settings; nil if nothing. Of h's own it is the trust domain of its
// SVID with the aliases: what the provider grants beyond goes with that SVID.
func (h *hold) known(p Provider) *Bundles {
	if w := h.extra[p]; w != nil && w.latest != nil {
		return w.latest
	}
	if h.key.provider.Name() == p.Name() {
		if h.own == nil {
			return nil
		}
		return h.own.Bundles.only(h.own.ID.TrustDomain())
	}
	for other, w := range h.extra {
		if other.Name() == p.Name() && w.latest != nil {
			return w.latest
		}
	}
	return nil
}

// watchBundlesOf feeds w from p until ctx ends.
func (h *hold) watchBundlesOf(ctx context.Context, p Provider, w *bundleWatch) {
	err := p.WatchBundles(ctx, h.ref, func(b *Bundles) {
		h.m.mu.Lock()
		defer h.m.mu.Unlock()
		if ctx.Err() != nil || w.latest != nil && w.latest.Equal(b) {
			return
		}
		w.latest = b
		h.publishSVID()
	})
	if ctx.Err() == nil {
		h.m.log.ErrorContext(ctx, "certificate provider stopped reporting bundles", "provider", p.Name(), "identity", h.ref.ID, "error", err)
	}
}
