package state

import "slices"

// With Config.OnDemand a decision that lacks something returns a *Miss with the
// keys to ask the control plane for. What was asked for and is still not there
// does not exist, and the decision is then the same as without OnDemand.

// maxDemand bounds the keys of one Miss.
const maxDemand = 100

// miss returns the *Miss of the keys that were not asked for yet, nil if there
// are none. The key "" stands for something that is known.
func miss(asked []string, keys ...string) error {
	keys = slices.DeleteFunc(keys, func(key string) bool { return key == "" || slices.Contains(asked, key) })
	if len(keys) == 0 {
		return nil
	}
	return &Miss{Keys: keys[:min(len(keys), maxDemand)]}
}

// demandAddress returns the *Miss of the address that the client dialled. It is
// looked up in our network and in that of the source.
func (d *decision) demandAddress() error {
	if !d.s.cfg.OnDemand {
		return nil
	}
	ours := NetworkAddress{d.s.cfg.Network, d.q.Dst.Addr()}
	theirs := NetworkAddress{d.q.Source.Network, d.q.Dst.Addr()}
	if ours == theirs {
		return miss(d.q.Asked, d.t.unknownAddress(ours))
	}
	return miss(d.q.Asked, d.t.unknownAddress(ours), d.t.unknownAddress(theirs))
}

// demandEndpoints returns the *Miss of the endpoints of svc whose workloads are
// not known.
func (d *decision) demandEndpoints(svc *service) error {
	var keys []string
	for i := range svc.Endpoints {
		if ep := &svc.Endpoints[i]; d.t.endpointWorkload(ep) == nil {
			keys = append(keys, ep.WorkloadUID)
		}
	}
	return miss(d.q.Asked, keys...)
}

// demandWaypoints returns the *Miss of the waypoints of svc: of all, because the
// next run of the rules may draw another one.
func (s *Store) demandWaypoints(t *tables, asked []string, svc *service) error {
	if !s.cfg.OnDemand {
		return nil
	}
	keys := []string{t.unknownGateway(svc.Waypoint)}
	for i := range svc.WeightedWaypoints {
		if m := &svc.WeightedWaypoints[i]; m.Weight > 0 {
			keys = append(keys, t.unknownGateway(&m.Destination))
		}
	}
	return miss(asked, keys...)
}

// demandGateway returns the *Miss of a reference to a waypoint or gateway.
func (s *Store) demandGateway(t *tables, asked []string, g *GatewayAddress) error {
	if !s.cfg.OnDemand {
		return nil
	}
	return miss(asked, t.unknownGateway(g))
}

// unknownGateway returns the key of what g refers to, "" if that is known.
func (t *tables) unknownGateway(g *GatewayAddress) string {
	switch {
	case g == nil:
		return ""
	case g.Address.Addr.IsValid():
		return t.unknownAddress(g.Address)
	}
	if svc, w := t.atHost(g.Hostname); svc != nil || w != nil {
		return ""
	}
	return g.Hostname.String()
}

// unknownAddress returns the key of an address, "" if a workload or a service has
// it. A service whose CIDR contains it does not count: there may be a nearer one.
func (t *tables) unknownAddress(a NetworkAddress) string {
	if t.workloadAt(a.Network, a.Addr) != nil {
		return ""
	}
	if svc := t.serviceAt(a.Network, a.Addr, ""); svc != nil && slices.Contains(svc.VIPs, a) {
		return ""
	}
	return a.String()
}
