package state

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// Decisions read the tables through the methods of this file only; what is behind
// them is no business of theirs.

// read takes the tables for a reader, who gives them back with release and keeps
// nothing of them but objects. It never waits: a writer holds only a copy that is
// not the active one. A copy that was active when the reader looked for it may have
// been edited since then, and not be active yet: what is read there, the next
// reader would not find.
func (s *Store) read() *tables {
	for {
		t := s.active.Load()
		if !t.readers.TryRLock() {
			continue
		}
		if s.active.Load() == t {
			return t
		}
		t.readers.RUnlock()
	}
}

func (s *Store) release(t *tables) { t.readers.RUnlock() }

// service returns the service of a key, whoever may see it.
func (t *tables) service(key NamespacedHostname) *service { return t.services[key] }

func (t *tables) workloadByUID(uid string) *workload { return t.workloads[uid] }

// workloadByHost returns the workload of a namespace that has that hostname; of
// several the one with the least UID.
func (t *tables) workloadByHost(ns, host string) *workload {
	return t.named[NamespacedHostname{Namespace: ns, Hostname: host}]
}

// endpointWorkload returns the workload of an endpoint, nil if it is not known.
func (t *tables) endpointWorkload(ep *Endpoint) *workload { return ep.workload }

// policy returns the policy of a key.
func (t *tables) policy(key string) *policy { return t.policies[key] }

// policySet returns the policies of a namespace, "" for the global ones; nil if
// there are none.
func (t *tables) policySet(ns string) *policySet { return t.sets[ns] }

// localWorkload returns the workload on our node that ref names.
func (t *tables) localWorkload(ref Ref) *workload { return t.local[ref] }

// workloadAt returns the workload of an address. Of several the one with the
// highest rank wins, and the last that was inserted among equals.
func (t *tables) workloadAt(network string, ip netip.Addr) *workload {
	if n := t.networks[network]; n != nil {
		return n.workloads[ip]
	}
	return nil
}

// serviceAt returns the service of a VIP for a client in namespace ns ("": any):
// by exact VIP, and if that yields none that the client may see, by CIDR.
func (t *tables) serviceAt(network string, ip netip.Addr, ns string) *service {
	if n := t.networks[network]; n != nil {
		if svc := bestService(n.vips[ip], ns); svc != nil {
			return svc
		}
	}
	if len(t.cidrs) == 0 {
		return nil
	}
	return t.serviceOfCIDR(network, ip, ns)
}

// serviceOfCIDR ranks by namespace, then prefix length, then canonical, then
// insertion. All that a client may see are the ranges of its own namespace, which
// come first, and the public ones; who stands in no namespace sees all.
func (t *tables) serviceOfCIDR(network string, ip netip.Addr, ns string) *service {
	scope := cidrScope{network: network, kind: allCIDRs}
	if ns != "" {
		if own := t.cidrs[cidrScope{network, ns, ownCIDRs}]; own != nil {
			if svc, ok := own.Lookup(ip); ok {
				return svc
			}
		}
		scope.kind = publicCIDRs
	}
	if shared := t.cidrs[scope]; shared != nil {
		svc, _ := shared.Lookup(ip)
		return svc
	}
	return nil
}

// serviceByHost returns the service of a hostname for a client in namespace ns.
func (t *tables) serviceByHost(host, ns string) *service { return bestService(t.hosts[host], ns) }

// bestService picks from services that share a hostname or VIP: any that is not
// stale, then the client's namespace (there the canonical one, if one namespace has
// several), then the canonical one that came last, then the first.
func bestService(list []*service, ns string) *service {
	var best *service
	top := -1
	for _, svc := range list {
		if !svc.visible(ns) {
			continue
		}
		rank := svc.rankFor(ns)
		if rank > top || rank == top && rank&rankNear == 0 && rank&rankCanonical != 0 {
			best, top = svc, rank
		}
	}
	return best
}

// The ranks of services that share a hostname or VIP are sums of these.
const (
	rankCanonical = 1 << iota
	rankNear
	rankFresh
)

func (s *service) rankFor(ns string) int {
	rank := 0
	if !s.stale {
		rank |= rankFresh
	}
	if ns != "" && s.Namespace == ns {
		rank |= rankNear
	}
	if s.Canonical {
		rank |= rankCanonical
	}
	return rank
}

// beatsInRange tells whether s takes a range from holder, which came before.
func (s *service) beatsInRange(holder *service) bool {
	if s.stale != holder.stale {
		return holder.stale
	}
	return s.Canonical && !holder.Canonical
}

// eachWorkloadAt calls yield for all workloads that claim an address, eachServiceAt
// for all services that do, by exact VIP (prefix is the zero value) and by CIDR,
// visible or not. They are for explanations, which tell also what was not chosen:
// both look at everything that there is.
func (t *tables) eachWorkloadAt(network string, ip netip.Addr, yield func(*workload)) {
	var found []*workload
	for _, w := range t.workloads {
		if w.NetworkMode != HostNetwork && w.Network == network && w.owns(ip) {
			found = append(found, w)
		}
	}
	slices.SortFunc(found, func(a, b *workload) int { return strings.Compare(a.UID, b.UID) })
	for _, w := range found {
		yield(w)
	}
}

func (t *tables) eachServiceAt(network string, ip netip.Addr, yield func(svc *service, prefix netip.Prefix)) {
	for _, svc := range t.vip(NetworkAddress{network, ip}) {
		yield(svc, netip.Prefix{})
	}
	for _, host := range slices.Sorted(maps.Keys(t.hosts)) {
		for _, svc := range t.hosts[host] {
			for _, c := range svc.CIDRVIPs {
				if c.Network == network && c.Prefix.Contains(ip) {
					yield(svc, c.Prefix)
				}
			}
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
