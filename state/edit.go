package state

import (
	"slices"
	"strings"
)

// editor writes tables. It edits one copy, notes what it has touched, and repeats
// that on the other. What only writers need stands here, once.
type editor struct {
	node    string  // ours
	t       *tables // the copy that is edited
	touched touched
	pool    *interner

	// Who else claims a key that one workload or service holds.
	addresses claims[NetworkAddress, *workload]
	local     claims[Ref, *workload]
	named     claims[NamespacedHostname, *workload]
	cidrs     claims[cidrKey, *service]

	stale   map[string]struct{}             // UIDs of stale workloads
	foreign map[string][]NamespacedHostname // by UID: services that have it among their foreign endpoints

	// What an update leaves to flush.
	pending map[NamespacedHostname]*pendingService
	order   []NamespacedHostname // of pending
	scratch []Endpoint
}

// newEditor returns an editor of empty tables.
func newEditor(node string) *editor {
	e := &editor{
		node:    node,
		pool:    newInterner(),
		stale:   map[string]struct{}{},
		foreign: map[string][]NamespacedHostname{},
		pending: map[NamespacedHostname]*pendingService{},
	}
	e.addresses = newClaims[NetworkAddress](e.outranks)
	e.local = newClaims[Ref](e.outranks)
	e.named = newClaims[NamespacedHostname](func(w, holder *workload) bool {
		if a, b := e.isStale(w), e.isStale(holder); a != b {
			return b
		}
		return w.UID < holder.UID
	})
	e.cidrs = newClaims[cidrKey]((*service).beatsInRange)
	return e
}

// outranks tells whether w takes a key from holder, which was inserted before.
func (e *editor) outranks(w, holder *workload) bool {
	if a, b := e.isStale(w), e.isStale(holder); a != b {
		return b
	}
	return w.rank >= holder.rank
}

func (e *editor) isStale(w *workload) bool {
	_, ok := e.stale[w.UID]
	return ok
}

// begin starts an update on a copy of the tables.
func (e *editor) begin(t *tables) { e.t = t }

func (e *editor) insert(p *prepared) {
	e.t.expect(p.workloads)
	e.touched.workloads = slices.Grow(e.touched.workloads, len(p.workloads))
	e.touched.addresses = slices.Grow(e.touched.addresses, len(p.workloads))
	if len(e.t.workloads) == 0 {
		e.t.workloads = make(map[string]*workload, len(p.workloads))
	}
	for i, w := range p.workloads {
		e.insertWorkload(w, p.endpoints[i])
	}
	for _, svc := range p.services {
		e.insertService(svc)
	}
}

// changePolicies inserts policies, then removes those of the keys.
func (e *editor) changePolicies(insert []*policy, remove []string) {
	e.touched.policies = e.t.change(insert, remove)
	e.t.apply(e.touched.policies)
}

// insertWorkload adds w, or puts it in the place of the workload of its UID.
func (e *editor) insertWorkload(w *workload, endpoints map[NamespacedHostname][]Port) {
	e.removeWorkload(w.UID)
	e.t.workloads[w.UID] = w
	e.touched.workloads = append(e.touched.workloads, w.UID)
	e.touchForeign(w.UID)
	e.eachClaim(w, claimAdded)
	for _, key := range w.Services {
		p := e.pend(key)
		ep := Endpoint{WorkloadUID: w.UID, Ports: e.pool.portList(SortPorts(endpoints[key])), Health: w.Health, workload: w}
		p.changes = append(p.changes, change{ep: ep})
	}
}

// removeWorkload reports whether the workload was known. A removal cancels what
// the same update has said of the workload's endpoints before.
func (e *editor) removeWorkload(uid string) bool {
	w, ok := e.t.workloads[uid]
	if !ok {
		return false
	}
	e.eachClaim(w, claimDropped)
	delete(e.stale, uid)
	delete(e.t.workloads, uid)
	e.touched.workloads = append(e.touched.workloads, uid)
	e.touchForeign(uid)
	for _, key := range w.Services {
		p := e.pend(key)
		p.changes = append(p.changes, change{ep: Endpoint{WorkloadUID: uid}, removed: true})
	}
	return true
}

// markStale dispatches on the form of a name, as remove does.
func (e *editor) markStale(name string) {
	if w := e.t.workloads[name]; w != nil {
		e.stale[name] = struct{}{}
		e.eachClaim(w, claimJudged)
		return
	}
	if key, ok := serviceKey(name); ok {
		if svc := e.t.services[key]; svc != nil {
			next := *svc
			next.stale = true
			e.replaceService(svc, &next)
		}
	}
}

// serviceKey parses namespace/hostname (spec/state-xds-dns.md §3.5).
func serviceKey(name string) (NamespacedHostname, bool) {
	ns, host, ok := strings.Cut(name, "/")
	return NamespacedHostname{Namespace: ns, Hostname: host}, ok && !strings.Contains(host, "/")
}

// remove dispatches on the form of a name: a UID, else namespace/hostname
// (spec/state-xds-dns.md §3.5).
func (e *editor) remove(name string) {
	if e.removeWorkload(name) {
		return
	}
	if key, ok := serviceKey(name); ok {
		e.removeService(key)
	}
}

// claimEvent is what has happened to a workload that claims keys.
type claimEvent uint8

const (
	claimAdded   claimEvent = iota // it has come
	claimDropped                   // it is gone
	claimJudged                    // it ranks otherwise
)

// eachClaim finds out who holds the keys that w claims.
func (e *editor) eachClaim(w *workload, event claimEvent) {
	if w.NetworkMode != HostNetwork {
		for _, ip := range w.IPs {
			a := NetworkAddress{w.Network, ip}
			e.setAddress(a, settled(&e.addresses, a, e.t.workloadAt(w.Network, ip), w, event))
		}
	}
	if e.node == "" || w.Node == e.node {
		ref := w.localRef()
		e.setLocal(ref, settled(&e.local, ref, e.t.local[ref], w, event))
	}
	if w.Hostname != "" {
		key := w.hostKey()
		e.setNamed(key, settled(&e.named, key, e.t.named[key], w, event))
	}
}

func settled[K comparable](c *claims[K, *workload], k K, holder, w *workload, event claimEvent) *workload {
	switch event {
	case claimAdded:
		return c.add(k, holder, w)
	case claimJudged:
		return c.judge(k, holder)
	}
	return c.drop(k, holder, w)
}

func (e *editor) setAddress(a NetworkAddress, w *workload) {
	e.t.setWorkloadAt(a, w)
	e.touched.addresses = append(e.touched.addresses, a)
}

func (e *editor) setLocal(ref Ref, w *workload) {
	set(e.t.local, ref, w, w != nil)
	e.touched.local = append(e.touched.local, ref)
}

func (e *editor) setNamed(key NamespacedHostname, w *workload) {
	set(e.t.named, key, w, w != nil)
	e.touched.named = append(e.touched.named, key)
}

// touchForeign has the services resolved anew that name a workload on their own
// account.
func (e *editor) touchForeign(uid string) {
	for _, key := range e.foreign[uid] {
		e.pend(key).resolve = true
	}
}
