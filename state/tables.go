package state

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// tables are the indexes of a Store (spec/state-xds-dns.md §4.1). The objects in
// them are immutable; slices of the workload and service indexes are edited in
// place and must not leave the Store's lock.
type tables struct {
	workloads map[string]*workload           // by UID
	addresses map[NetworkAddress][]*workload // in order of insertion; no host-network workloads
	local     map[Ref][]*workload            // those on our node

	services map[NamespacedHostname]*service
	hosts    map[string][]*service         // by hostname, in order of insertion
	vips     map[NetworkAddress][]*service // by exact VIP, in order of insertion
	cidrs    map[string][]cidrEntry        // by network, in order of insertion

	// staged are the endpoints of services that are not known yet, by UID.
	staged map[NamespacedHostname]map[string]Endpoint

	policyTable
	pending map[NamespacedHostname]*pendingEndpoints // of the update in progress
}

type cidrEntry struct {
	prefix netip.Prefix
	svc    *service
}

// pendingEndpoints collects what one update does to the endpoints of a service,
// so that the service is replaced once.
type pendingEndpoints struct {
	remove map[string]struct{}
	upsert map[string]Endpoint
}

func newTables() *tables {
	return &tables{
		workloads:   map[string]*workload{},
		addresses:   map[NetworkAddress][]*workload{},
		local:       map[Ref][]*workload{},
		services:    map[NamespacedHostname]*service{},
		hosts:       map[string][]*service{},
		vips:        map[NetworkAddress][]*service{},
		cidrs:       map[string][]cidrEntry{},
		staged:      map[NamespacedHostname]map[string]Endpoint{},
		policyTable: newPolicyTable(),
		pending:     map[NamespacedHostname]*pendingEndpoints{},
	}
}

// insertWorkload adds w, or puts it in the place of the workload of its UID.
func (t *tables) insertWorkload(w *workload, node string, endpoints map[NamespacedHostname][]Port) {
	t.removeWorkload(w.UID)
	t.workloads[w.UID] = w
	if w.NetworkMode != HostNetwork {
		for _, ip := range w.IPs {
			add(t.addresses, NetworkAddress{w.Network, ip}, w)
		}
	}
	if node == "" || w.Node == node {
		add(t.local, w.localRef(), w)
	}
	for _, key := range w.Services {
		t.pend(key).upsert[w.UID] = Endpoint{WorkloadUID: w.UID, Ports: SortPorts(endpoints[key]), Health: w.Health}
	}
}

// removeWorkload reports whether the workload was known. A removal cancels what
// the same update has said of the workload's endpoints before.
func (t *tables) removeWorkload(uid string) bool {
	w, ok := t.workloads[uid]
	if !ok {
		return false
	}
	delete(t.workloads, uid)
	for _, ip := range w.IPs {
		drop(t.addresses, NetworkAddress{w.Network, ip}, w)
	}
	drop(t.local, w.localRef(), w)
	for _, key := range w.Services {
		p := t.pend(key)
		delete(p.upsert, uid)
		p.remove[uid] = struct{}{}
	}
	return true
}

func (w *workload) localRef() Ref {
	return Ref{Namespace: w.Namespace, Name: w.Name, ServiceAccount: w.ServiceAccount}
}

func (t *tables) pend(key NamespacedHostname) *pendingEndpoints {
	p := t.pending[key]
	if p == nil {
		p = &pendingEndpoints{remove: map[string]struct{}{}, upsert: map[string]Endpoint{}}
		t.pending[key] = p
	}
	return p
}

// flush carries out the endpoint changes of an update.
func (t *tables) flush() {
	for key, p := range t.pending {
		if svc, ok := t.services[key]; ok {
			t.updateEndpoints(svc, p)
		} else {
			t.stage(key, p)
		}
	}
	clear(t.pending)
}

func (t *tables) stage(key NamespacedHostname, p *pendingEndpoints) {
	eps := t.staged[key]
	for uid := range p.remove {
		delete(eps, uid)
	}
	if eps == nil && len(p.upsert) > 0 {
		eps = make(map[string]Endpoint, len(p.upsert))
		t.staged[key] = eps
	}
	maps.Copy(eps, p.upsert)
	if len(eps) == 0 {
		delete(t.staged, key)
	}
}

// updateEndpoints removes first, then adds what the health policy lets pass.
func (t *tables) updateEndpoints(svc *service, p *pendingEndpoints) {
	changed := false
	merged := make([]Endpoint, 0, len(svc.Endpoints)+len(p.upsert))
	for _, ep := range svc.Endpoints {
		_, removed := p.remove[ep.WorkloadUID]
		_, replaced := p.upsert[ep.WorkloadUID]
		if removed || replaced {
			changed = true
			continue
		}
		merged = append(merged, ep)
	}
	for _, ep := range p.upsert {
		if svc.keeps(ep.Health) {
			merged = append(merged, ep)
			changed = true
		}
	}
	if !changed {
		return
	}
	next := *svc
	next.Endpoints = sortEndpoints(merged)
	t.replaceService(svc, &next)
}

// insertService adds svc with the endpoints that are known of it: its own, those
// of its predecessor and the staged ones, as far as its health policy keeps them.
func (t *tables) insertService(svc *service) {
	key := svc.Key()
	eps := map[string]Endpoint{}
	keep := func(ep Endpoint) {
		if svc.keeps(ep.Health) {
			eps[ep.WorkloadUID] = ep
		}
	}
	old := t.services[key]
	if old != nil {
		for _, ep := range old.Endpoints {
			keep(ep)
		}
	}
	for _, ep := range svc.Endpoints {
		ep.Ports = SortPorts(ep.Ports)
		keep(ep)
	}
	for _, ep := range t.staged[key] {
		keep(ep)
	}
	delete(t.staged, key)
	svc.Endpoints = sortEndpoints(slices.Collect(maps.Values(eps)))
	if old != nil {
		t.unindexService(old)
	}
	t.services[key] = svc
	add(t.hosts, svc.Hostname, svc)
	for _, vip := range svc.VIPs {
		if !slices.Contains(t.vips[vip], svc) {
			add(t.vips, vip, svc)
		}
	}
	for _, c := range svc.CIDRVIPs {
		add(t.cidrs, c.Network, cidrEntry{c.Prefix, svc})
	}
}

// replaceService puts next in every place of old, which differs in its
// endpoints only; the order of the indexes is kept.
func (t *tables) replaceService(old, next *service) {
	t.services[next.Key()] = next
	swap(t.hosts[next.Hostname], old, next)
	for _, vip := range next.VIPs {
		swap(t.vips[vip], old, next)
	}
	for _, c := range next.CIDRVIPs {
		entries := t.cidrs[c.Network]
		for i := range entries {
			if entries[i].svc == old {
				entries[i].svc = next
			}
		}
	}
}

// removeService drops a service with its endpoints, known and staged.
func (t *tables) removeService(key NamespacedHostname) bool {
	delete(t.staged, key)
	svc, ok := t.services[key]
	if ok {
		t.unindexService(svc)
	}
	return ok
}

func (t *tables) unindexService(svc *service) {
	delete(t.services, svc.Key())
	drop(t.hosts, svc.Hostname, svc)
	for _, vip := range svc.VIPs {
		drop(t.vips, vip, svc)
	}
	for _, c := range svc.CIDRVIPs {
		drop(t.cidrs, c.Network, cidrEntry{c.Prefix, svc})
	}
}

func add[K, V comparable](m map[K][]V, key K, v V) { m[key] = append(m[key], v) }

// drop removes every v of a list, and the list when it becomes empty.
func drop[K, V comparable](m map[K][]V, key K, v V) {
	list, ok := m[key]
	if !ok {
		return
	}
	list = slices.DeleteFunc(list, func(o V) bool { return o == v })
	if len(list) == 0 {
		delete(m, key)
		return
	}
	m[key] = list
}

func swap(list []*service, old, next *service) {
	for i := range list {
		if list[i] == old {
			list[i] = next
		}
	}
}

func sortEndpoints(eps []Endpoint) []Endpoint {
	slices.SortFunc(eps, func(a, b Endpoint) int { return strings.Compare(a.WorkloadUID, b.WorkloadUID) })
	return eps
}

func sortedKeys[V any](m map[NamespacedHostname]V) []NamespacedHostname {
	if len(m) == 0 {
		return nil
	}
	return slices.SortedFunc(maps.Keys(m), func(a, b NamespacedHostname) int {
		if c := strings.Compare(a.Namespace, b.Namespace); c != 0 {
			return c
		}
		return strings.Compare(a.Hostname, b.Hostname)
	})
}
