package state

import (
	"math/rand/v2"
	"slices"
)

// picker chooses an endpoint of a service (spec/state-xds-dns.md §4.7).
type picker struct {
	t       *tables
	src     *Workload
	port    uint16 // of the service
	avoid   []string
	draw    func(uint64) uint64
	svcPort uint16 // target of port, 0 if each endpoint has its own
}

// pick returns an endpoint's workload and target port, or nil if no endpoint can
// take the connection. Connections are spread by capacity.
func (p *picker) pick(svc *service) (*workload, uint16) {
	var declared bool
	if p.svcPort, declared = target(svc.Ports, p.port); !declared {
		return nil, 0
	}
	var total uint64
	top := -1
	for i := range svc.Endpoints {
		w, rank := p.candidate(svc, &svc.Endpoints[i])
		if w == nil || rank < top {
			continue
		}
		if rank > top {
			top, total = rank, 0
		}
		total += uint64(w.Capacity)
	}
	if total == 0 {
		return nil, 0
	}
	draw := p.draw
	if draw == nil {
		draw = rand.Uint64N
	}
	n := draw(total)
	for i := range svc.Endpoints {
		w, rank := p.candidate(svc, &svc.Endpoints[i])
		if w == nil || rank != top {
			continue
		}
		if n < uint64(w.Capacity) {
			return w, p.targetPort(&svc.Endpoints[i])
		}
		n -= uint64(w.Capacity)
	}
	return nil, 0
}

// candidate returns the workload of ep if it can take the connection, and how
// well it fits the preferences of the service.
func (p *picker) candidate(svc *service, ep *Endpoint) (*workload, int) {
	w := p.t.endpointWorkload(ep)
	if w == nil || slices.Contains(p.avoid, w.UID) {
		return nil, 0
	}
	if len(w.IPs) == 0 && w.Hostname == "" && (w.Network == p.src.Network || w.NetworkGateway == nil) {
		return nil, 0
	}
	if p.svcPort == 0 {
		if _, ok := target(ep.Ports, p.port); !ok {
			return nil, 0
		}
	}
	lb := svc.LoadBalancer
	if lb == nil || lb.Mode == LoadBalanceAny {
		return w, 0
	}
	matched, bonus := lb.rank(p.src, &w.Workload)
	if lb.Mode == LoadBalanceStrict && matched != len(lb.Preferences) {
		return nil, 0
	}
	return w, matched + bonus
}

// targetPort is the endpoint's own target port, else that of the service.
func (p *picker) targetPort(ep *Endpoint) uint16 {
	if port, ok := target(ep.Ports, p.port); ok {
		return port
	}
	return p.svcPort
}

// rank counts the preferences that match, up to the first that does not. A
// network that stands first is preferred, not required: a mismatch is passed
// over, and a match outweighs all the rest.
func (lb *LoadBalancer) rank(src, dst *Workload) (matched, bonus int) {
	for i, scope := range lb.Preferences {
		same := scope.same(src, dst)
		if i == 0 && scope == ScopeNetwork {
			if same {
				matched++
				bonus = len(lb.Preferences) - 1
			}
			continue
		}
		if !same {
			break
		}
		matched++
	}
	return matched, bonus
}

// same compares one scope; two that are not set are the same.
func (s Scope) same(a, b *Workload) bool {
	switch s {
	case ScopeRegion:
		return a.Locality.Region == b.Locality.Region
	case ScopeZone:
		return a.Locality.Zone == b.Locality.Zone
	case ScopeSubzone:
		return a.Locality.Subzone == b.Locality.Subzone
	case ScopeNode:
		return a.Node == b.Node
	case ScopeCluster:
		return a.ClusterID == b.ClusterID
	case ScopeNetwork:
		return a.Network == b.Network
	}
	return false
}
