package state

import (
	"slices"
	"strings"
)

// pendingService collects what one update does to the endpoints of a service, so
// that the service is replaced once.
type pendingService struct {
	fresh   bool     // the update has inserted the service: nobody has seen it yet
	resolve bool     // the workloads of its endpoints must be looked up
	changes []change // in the order of the update; the last of a UID counts
	few     [4]change
}

// change adds an endpoint, or takes away what is known of its UID.
type change struct {
	ep      Endpoint
	removed bool
}

func (e *editor) pend(key NamespacedHostname) *pendingService {
	p := e.pending[key]
	if p == nil {
		p = &pendingService{}
		p.changes = p.few[:0]
		e.pending[key] = p
		e.order = append(e.order, key)
	}
	return p
}

// flush carries out the endpoint changes of an update.
func (e *editor) flush() {
	for _, key := range e.order {
		p := e.pending[key]
		if svc := e.t.services[key]; svc != nil {
			e.updateEndpoints(svc, p)
		} else {
			e.stage(key, p.changes)
		}
	}
	if len(e.order) > 0 {
		e.pending = map[NamespacedHostname]*pendingService{}
	}
	e.order, e.scratch = nil, nil
}

func (e *editor) stage(key NamespacedHostname, changes []change) {
	eps, changed := e.merge(e.t.staged[key], changes, func(Health) bool { return true })
	if changed {
		e.setStaged(key, eps)
	}
}

func (e *editor) setStaged(key NamespacedHostname, eps []Endpoint) {
	set(e.t.staged, key, eps, len(eps) > 0)
	e.touched.staged = append(e.touched.staged, key)
}

// updateEndpoints carries out the changes that the health policy lets pass.
func (e *editor) updateEndpoints(svc *service, p *pendingService) {
	eps, changed := svc.Endpoints, false
	if len(p.changes) > 0 {
		eps, changed = e.merge(eps, p.changes, svc.keeps)
	}
	if p.resolve && e.unresolved(eps) {
		if !changed {
			eps = slices.Clone(eps)
		}
		for i := range eps {
			eps[i].workload = e.t.workloads[eps[i].WorkloadUID]
		}
		changed = true
	}
	if !changed && !p.fresh {
		return
	}
	next := svc
	if !p.fresh {
		copied := *svc
		next = &copied
	}
	next.Endpoints = eps
	if p.resolve || len(svc.foreign) > 0 {
		e.trackForeign(next, svc.foreign)
	}
	if !p.fresh {
		e.replaceService(svc, next)
	}
}

// unresolved tells whether an endpoint does not lead to what is known of its UID.
func (e *editor) unresolved(eps []Endpoint) bool {
	for i := range eps {
		if eps[i].workload != e.t.workloads[eps[i].WorkloadUID] {
			return true
		}
	}
	return false
}

// trackForeign notes which endpoints of svc change without a change of a workload
// that lists svc.
func (e *editor) trackForeign(svc *service, before []string) {
	key := svc.Key()
	svc.foreign = nil
	for i := range svc.Endpoints {
		if ep := &svc.Endpoints[i]; ep.workload == nil || !ep.workload.lists(key) {
			svc.foreign = append(svc.foreign, ep.WorkloadUID)
		}
	}
	e.forgetForeign(key, before)
	for _, uid := range svc.foreign {
		e.foreign[uid] = append(e.foreign[uid], key)
	}
}

func (e *editor) forgetForeign(key NamespacedHostname, uids []string) {
	for _, uid := range uids {
		keys := slices.DeleteFunc(e.foreign[uid], func(k NamespacedHostname) bool { return k == key })
		set(e.foreign, uid, keys, len(keys) > 0)
	}
}

// merge returns eps, which are sorted by UID and are not modified, after changes,
// and whether these had anything to do.
func (e *editor) merge(eps []Endpoint, changes []change, keep func(Health) bool) (_ []Endpoint, changed bool) {
	slices.SortStableFunc(changes, func(a, b change) int { return strings.Compare(a.ep.WorkloadUID, b.ep.WorkloadUID) })
	out, rest := e.scratch[:0], eps
	for i, c := range changes {
		uid := c.ep.WorkloadUID
		if i+1 < len(changes) && changes[i+1].ep.WorkloadUID == uid {
			continue
		}
		n, known := slices.BinarySearchFunc(rest, uid, compareEndpoint)
		out, rest = append(out, rest[:n]...), rest[n:]
		if known {
			rest = rest[1:]
		}
		added := !c.removed && keep(c.ep.Health)
		if added {
			out = append(out, c.ep)
		}
		changed = changed || known || added
	}
	if !changed {
		return eps, false
	}
	out = append(out, rest...)
	e.scratch = out
	return slices.Clone(out), true
}

// insertService adds svc with the endpoints that are known of it: its own, those
// of its predecessor and the staged ones, as far as its health policy keeps them.
func (e *editor) insertService(svc *service) {
	key := svc.Key()
	p := e.pend(key)
	p.fresh = true
	p.resolve = p.resolve || len(svc.Endpoints) > 0
	own := svc.Endpoints
	svc.Endpoints = nil
	if old := e.t.services[key]; old != nil {
		svc.Endpoints, svc.foreign = old.Endpoints, old.foreign
		if !svc.keeps(Unhealthy) {
			svc.Endpoints = slices.DeleteFunc(slices.Clone(svc.Endpoints), func(ep Endpoint) bool { return !svc.keeps(ep.Health) })
		}
		e.unindexService(old)
	}
	changes := make([]change, 0, len(own)+len(e.t.staged[key]))
	for _, list := range [...][]Endpoint{own, e.t.staged[key]} {
		for _, ep := range list {
			if !svc.keeps(ep.Health) {
				continue
			}
			ep.Ports = e.pool.portList(SortPorts(ep.Ports))
			changes = append(changes, change{ep: ep})
		}
	}
	svc.Endpoints, _ = e.merge(svc.Endpoints, changes, svc.keeps)
	if _, ok := e.t.staged[key]; ok {
		e.setStaged(key, nil)
	}
	e.indexService(svc)
}

// removeService drops a service with its endpoints, known and staged.
func (e *editor) removeService(key NamespacedHostname) {
	if _, ok := e.t.staged[key]; ok {
		e.setStaged(key, nil)
	}
	if svc := e.t.services[key]; svc != nil {
		e.unindexService(svc)
		e.forgetForeign(key, svc.foreign)
	}
}

func (e *editor) indexService(svc *service) {
	e.setService(svc.Key(), svc)
	e.setHost(svc.Hostname, append(e.t.hosts[svc.Hostname], svc))
	for _, vip := range svc.VIPs {
		if list := e.t.vip(vip); !slices.Contains(list, svc) {
			e.setVIP(vip, append(list, svc))
		}
	}
	svc.eachCIDR(func(k cidrKey) { e.setCIDR(k, e.cidrs.add(k, e.t.cidr(k), svc)) })
}

func (e *editor) unindexService(svc *service) {
	e.setService(svc.Key(), nil)
	e.setHost(svc.Hostname, without(e.t.hosts[svc.Hostname], svc))
	for _, vip := range svc.VIPs {
		e.setVIP(vip, without(e.t.vip(vip), svc))
	}
	svc.eachCIDR(func(k cidrKey) { e.setCIDR(k, e.cidrs.drop(k, e.t.cidr(k), svc)) })
}

// replaceService puts next in every place of old, which claims the same keys; the
// order of the indexes is kept.
func (e *editor) replaceService(old, next *service) {
	e.setService(next.Key(), next)
	e.setHost(next.Hostname, swapped(e.t.hosts[next.Hostname], old, next))
	for _, vip := range next.VIPs {
		e.setVIP(vip, swapped(e.t.vip(vip), old, next))
	}
	next.eachCIDR(func(k cidrKey) { e.setCIDR(k, e.cidrs.swap(k, e.t.cidr(k), old, next)) })
}

// eachCIDR calls f with every place of s among the CIDR VIPs.
func (s *service) eachCIDR(f func(cidrKey)) {
	for _, c := range s.CIDRVIPs {
		prefix := c.Prefix.Masked()
		f(cidrKey{cidrScope{c.Network, s.Namespace, ownCIDRs}, prefix})
		f(cidrKey{cidrScope{network: c.Network, kind: allCIDRs}, prefix})
		if s.Visibility != NamespaceVisibility {
			f(cidrKey{cidrScope{network: c.Network, kind: publicCIDRs}, prefix})
		}
	}
}

func (e *editor) setService(key NamespacedHostname, svc *service) {
	set(e.t.services, key, svc, svc != nil)
	e.touched.services = append(e.touched.services, key)
}

func (e *editor) setHost(host string, list []*service) {
	set(e.t.hosts, host, list, len(list) > 0)
	e.touched.hosts = append(e.touched.hosts, host)
}

func (e *editor) setVIP(a NetworkAddress, list []*service) {
	e.t.setVIP(a, list)
	e.touched.vips = append(e.touched.vips, a)
}

func (e *editor) setCIDR(k cidrKey, svc *service) {
	e.t.setCIDR(k, svc)
	e.touched.cidrs = append(e.touched.cidrs, k)
}

// without returns a new list that lacks svc.
func without(list []*service, svc *service) []*service {
	return slices.DeleteFunc(slices.Clone(list), func(o *service) bool { return o == svc })
}

// swapped returns a new list with next in the place of old.
func swapped(list []*service, old, next *service) []*service {
	list = slices.Clone(list)
	for i := range list {
		if list[i] == old {
			list[i] = next
		}
	}
	return list
}
