package ca

import (
	"context"
	"maps"
)

// audience are leases of one hold that trust the same: all of them, or those of
// one pod, where other providers grant anchors to single pods. It is guarded by
// the manager's lock.
type audience struct {
	hold    *hold
	view    *view               // published; never nil
	refs    map[WorkloadRef]int // of its leases, each with their number; watches name one of them
	watches map[Provider]*bundleWatch
}

// bundleWatch is the contribution of one other provider.
type bundleWatch struct {
	ref    WorkloadRef // whom it names
	cancel context.CancelFunc
	latest *Bundles
}

func newAudience(h *hold, v *view) *audience {
	return &audience{hold: h, view: v, refs: make(map[WorkloadRef]int), watches: make(map[Provider]*bundleWatch)}
}

// perPod reports whether p tells the pods of w's identity apart. What it says of
// one of them is nothing for the others.
func perPod(p Provider, w WorkloadRef) bool {
	w.UID = "any"
	return p.Key(w).UID != ""
}

// bundlesPerPod reports whether p tells pods apart where it contributes anchors,
// too. A provider that does so only with its certificates has the optional
// interface CommonBundles() bool.
func bundlesPerPod(p Provider, w WorkloadRef) bool {
	c, ok := p.(interface{ CommonBundles() bool })
	return perPod(p, w) && !(ok && c.CommonBundles())
}

// ofIdentity is w without what tells it apart from the other pods of its
// identity: whatever they share outlives each of them.
func ofIdentity(w WorkloadRef) WorkloadRef {
	return WorkloadRef{ID: w.ID, Namespace: w.Namespace, ServiceAccount: w.ServiceAccount}
}

// living is the workload of a lease, w if it has one.
func (a *audience) living(w WorkloadRef) (WorkloadRef, bool) {
	if a.refs[w] > 0 {
		return w, true
	}
	for other := range a.refs {
		return other, true
	}
	return w, false
}

// listen watches the anchors of the given providers, and of no others. One that
// takes the place of another of its name, with other settings, begins with what is
// known of that one: tunnels would end while it connects. The watches name w.
func (a *audience) listen(providers []Provider, w WorkloadRef) {
	listed := make(map[Provider]bool, len(providers))
	for _, p := range providers {
		listed[p] = true
	}
	known := make(map[string]*Bundles) // by name
	for p, watch := range a.watches {
		if !listed[p] {
			watch.cancel()
			delete(a.watches, p)
			known[p.Name()] = watch.latest
		}
	}
	for _, p := range providers {
		if a.watches[p] == nil {
			a.watch(p, w, known[p.Name()])
		}
	}
}

// watch begins a watch of p's anchors that names w, as far as p tells w apart from
// the other pods. Until it reports, latest counts.
func (a *audience) watch(p Provider, w WorkloadRef, latest *Bundles) {
	if !bundlesPerPod(p, w) {
		w = ofIdentity(w)
	}
	ctx, cancel := context.WithCancel(a.hold.ctx)
	watch := &bundleWatch{ref: w, cancel: cancel, latest: latest}
	a.watches[p] = watch
	a.hold.m.tasks.Go(func() { a.hold.watchBundles(ctx, a, p, watch) })
}

// follow has the watches name workloads that have a lease.
func (a *audience) follow() {
	for p, watch := range maps.Clone(a.watches) {
		if w, ok := a.living(watch.ref); ok && w != watch.ref && bundlesPerPod(p, w) {
			watch.cancel()
			a.watch(p, w, watch.latest)
		}
	}
}

// end ends the watches.
func (a *audience) end() {
	for _, watch := range a.watches {
		watch.cancel()
	}
	clear(a.watches)
}

// known is what the first provider that is has contributed to a, nil if nothing.
func (a *audience) known(is func(Provider) bool) *Bundles {
	for p, watch := range a.watches {
		if watch.latest != nil && is(p) {
			return watch.latest
		}
	}
	return nil
}

// anchors are those of the other providers.
func (a *audience) anchors() []*Bundles {
	all := make([]*Bundles, 0, len(a.watches))
	for _, watch := range a.watches {
		all = append(all, watch.latest)
	}
	return all
}

// publish has a see own with bundles, unless it sees that already.
func (a *audience) publish(own *SVID, bundles []*Bundles) {
	var before *Bundles
	old := a.view.svid
	if old != nil {
		before = old.Bundles
	}
	svid := own.withBundles(Union(bundles...).Keep(before))
	if old != nil && old.Cert == svid.Cert && old.Bundles == svid.Bundles && old.NotAfter.Equal(svid.NotAfter) {
		return
	}
	a.view = &view{state: Available, svid: svid}
}
