package state

import "slices"

// portMode says how strictly an endpoint must know the port it is asked for.
type portMode uint8

// A port must be declared by the service in standardMode. In waypointMode an
// endpoint with an application tunnel takes any.
const (
	standardMode portMode = iota
	waypointMode
)

// picker chooses an endpoint of a service (spec/state-xds-dns.md §4.7).
type picker struct {
	t        *tables
	q        *Query
	svc      *service
	port     uint16 // of the service
	mode     portMode
	svcPort  uint16 // target of port, 0 if each endpoint has its own
	declared bool   // whether the service has the port
	top      int    // rank of the endpoints among which was drawn
}

// dropReason is why an endpoint cannot take a connection. The zero value: it can.
type dropReason uint8

const (
	kept dropReason = iota
	dropUnknown
	dropAvoided
	dropNoAddress
	dropNoPort
	dropStrict
)

// pickedRanks is for how many endpoints a pick remembers what it has found in its
// first pass.
const pickedRanks = 32

// pick returns an endpoint's workload and target port, or nil if no endpoint can
// take the connection. Connections are spread by capacity.
func (p *picker) pick() (*workload, uint16) {
	p.svcPort, p.declared = target(p.svc.Ports, p.port)
	p.top = -1
	var total uint64
	var ranks [pickedRanks]int32 // -1: dropped
	for i := range p.svc.Endpoints {
		w, _, rank, why := p.candidate(&p.svc.Endpoints[i])
		if why != kept {
			rank = -1
		}
		if i < pickedRanks {
			ranks[i] = int32(rank)
		}
		if why != kept || rank < p.top {
			continue
		}
		if rank > p.top {
			p.top, total = rank, 0
		}
		total += uint64(w.Capacity)
	}
	if total == 0 {
		return nil, 0
	}
	n := p.q.draw(total)
	for i := range p.svc.Endpoints {
		if i < pickedRanks && int(ranks[i]) != p.top {
			continue
		}
		w, port, rank, why := p.candidate(&p.svc.Endpoints[i])
		if why != kept || rank != p.top {
			continue
		}
		if n < uint64(w.Capacity) {
			return w, port
		}
		n -= uint64(w.Capacity)
	}
	return nil, 0
}

// candidate judges an endpoint: its workload, the port to connect to, how well it
// fits the preferences of the service, and why it cannot take the connection.
func (p *picker) candidate(ep *Endpoint) (w *workload, port uint16, rank int, why dropReason) {
	w = p.t.endpointWorkload(ep)
	if w == nil {
		return nil, 0, 0, dropUnknown
	}
	if len(p.q.Avoid) > 0 && slices.Contains(p.q.Avoid, w.UID) {
		return w, 0, 0, dropAvoided
	}
	src := p.q.Source
	if len(w.IPs) == 0 && w.Hostname == "" && (w.Network == src.Network || w.NetworkGateway == nil) {
		return w, 0, 0, dropNoAddress
	}
	if port = p.targetPort(ep, w); port == 0 {
		return w, 0, 0, dropNoPort
	}
	lb := p.svc.LoadBalancer
	if lb == nil || lb.Mode == LoadBalanceAny {
		return w, port, 0, kept
	}
	matched, bonus := lb.rank(src, &w.Workload)
	if lb.Mode == LoadBalanceStrict && matched != len(lb.Preferences) {
		return w, port, matched + bonus, dropStrict
	}
	return w, port, matched + bonus, kept
}

// targetPort is the endpoint's own target port, else that of the service, else
// for a waypoint whose tunnel has a port of its own the port that was asked for.
// It is 0 if there is none, or if the mapping says 0.
func (p *picker) targetPort(ep *Endpoint, w *workload) uint16 {
	tunnel := p.mode == waypointMode && w.ApplicationTunnel != nil
	if !p.declared && !tunnel {
		return 0
	}
	if len(ep.Ports) > 0 {
		if port, ok := target(ep.Ports, p.port); ok {
			return port
		}
	}
	if p.svcPort == 0 && tunnel && w.ApplicationTunnel.Port != 0 {
		return p.port
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
