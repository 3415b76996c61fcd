package state

import "net/netip"

// Decisions read the tables through the methods of this file only; what is behind
// them is no business of theirs.

// read takes the tables for a reader, who gives them back with release and keeps
// nothing of them but objects. A reader must not call read again before that.
func (s *Store) read() *tables {
	s.mu.RLock()
	return s.tables
}

func (s *Store) release(*tables) { s.mu.RUnlock() }

// service returns the service of a key, whoever may see it.
func (t *tables) service(key NamespacedHostname) *service { return t.services[key] }

func (t *tables) workloadByUID(uid string) *workload { return t.workloads[uid] }

// workloadByHost returns the workload of a namespace that has that hostname; of
// several the one with the least UID.
func (t *tables) workloadByHost(ns, host string) *workload {
	var found *workload
	for _, w := range t.workloads {
		if w.Hostname == host && w.Namespace == ns && (found == nil || w.UID < found.UID) {
			found = w
		}
	}
	return found
}

// endpointWorkload returns the workload of an endpoint, nil if it is not known.
func (t *tables) endpointWorkload(ep *Endpoint) *workload { return t.workloads[ep.WorkloadUID] }

// policy returns the policy of a key.
func (t *tables) policy(key string) *policy { return t.policies[key] }

// policySet returns the policies of a namespace, "" for the global ones; nil if
// there are none.
func (t *tables) policySet(ns string) *policySet { return t.sets[ns] }

// localWorkload returns the workload on our node that ref names.
func (t *tables) localWorkload(ref Ref) *workload { return best(t.local[ref]) }

// workloadAt returns the workload of an address. Of several the one with the
// highest rank wins, and the last that was inserted among equals.
func (t *tables) workloadAt(network string, ip netip.Addr) *workload {
	return best(t.addresses[NetworkAddress{network, ip}])
}

func best(list []*workload) *workload {
	var found *workload
	for _, w := range list {
		if found == nil || w.rank >= found.rank {
			found = w
		}
	}
	return found
}

// serviceAt returns the service of a VIP for a client in namespace ns ("": any):
// by exact VIP, and if that yields none that the client may see, by CIDR.
func (t *tables) serviceAt(network string, ip netip.Addr, ns string) *service {
	if svc := bestService(t.vips[NetworkAddress{network, ip}], ns); svc != nil {
		return svc
	}
	var found *cidrEntry
	entries := t.cidrs[network]
	for i := range entries {
		e := &entries[i]
		if !e.prefix.Contains(ip) || !e.svc.visible(ns) {
			continue
		}
		if found == nil || e.beats(found, ns) {
			found = e
		}
	}
	if found == nil {
		return nil
	}
	return found.svc
}

// beats compares by namespace, then prefix length, then canonical.
func (e *cidrEntry) beats(o *cidrEntry, ns string) bool {
	if a, b := ns != "" && e.svc.Namespace == ns, ns != "" && o.svc.Namespace == ns; a != b {
		return a
	}
	if a, b := e.prefix.Bits(), o.prefix.Bits(); a != b {
		return a > b
	}
	return e.svc.Canonical && !o.svc.Canonical
}

// serviceByHost returns the service of a hostname for a client in namespace ns.
func (t *tables) serviceByHost(host, ns string) *service { return bestService(t.hosts[host], ns) }

// bestService picks from services that share a hostname or VIP: the client's
// namespace first (there the canonical one, if one namespace has several), then
// the canonical one that came last, then the first.
func bestService(list []*service, ns string) *service {
	var first, canonical, near *service
	for _, svc := range list {
		if !svc.visible(ns) {
			continue
		}
		if ns != "" && svc.Namespace == ns && (near == nil || svc.Canonical && !near.Canonical) {
			near = svc
		}
		if first == nil {
			first = svc
		}
		if svc.Canonical {
			canonical = svc
		}
	}
	switch {
	case near != nil:
		return near
	case canonical != nil:
		return canonical
	}
	return first
}

// eachWorkloadAt calls yield for all workloads that claim an address, eachServiceAt
// for all services that do, by exact VIP (prefix is the zero value) and by CIDR,
// visible or not. They are for explanations, which tell also what was not chosen.
func (t *tables) eachWorkloadAt(network string, ip netip.Addr, yield func(*workload)) {
	for _, w := range t.addresses[NetworkAddress{network, ip}] {
		yield(w)
	}
}

func (t *tables) eachServiceAt(network string, ip netip.Addr, yield func(svc *service, prefix netip.Prefix)) {
	for _, svc := range t.vips[NetworkAddress{network, ip}] {
		yield(svc, netip.Prefix{})
	}
	for _, e := range t.cidrs[network] {
		if e.prefix.Contains(ip) {
			yield(e.svc, e.prefix)
		}
	}
}

// at returns what stands behind an address: a workload, or else a service.
func (t *tables) at(network string, ip netip.Addr, ns string) (*workload, *service) {
	if w := t.workloadAt(network, ip); w != nil {
		return w, nil
	}
	return nil, t.serviceAt(network, ip, ns)
}
