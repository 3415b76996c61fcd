package state

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// gatewayKind tells waypoints from network gateways: how their ports are read and
// what it means when they are missing.
type gatewayKind struct {
	name    string
	unknown error
	mode    portMode
}

var (
	waypointKind = gatewayKind{"waypoint", ErrUnknownWaypoint, waypointMode}
	gatewayOfNet = gatewayKind{"network gateway", ErrUnknownGateway, standardMode}
)

// waypointOf returns the waypoint of a connection to svc, nil if it has none. A
// weighted set is drawn from once for each connection; without any weight it is
// as if it were empty.
func (d *decision) waypointOf(svc *service) *GatewayAddress {
	elsewhere := len(d.q.Avoid) > 0 // a second try must not draw the waypoint that has just failed
	total := d.totalWeight(svc, elsewhere)
	if total == 0 && elsewhere {
		elsewhere = false
		total = d.totalWeight(svc, false)
	}
	if total == 0 {
		return svc.Waypoint
	}
	n := d.q.draw(total)
	for i := range svc.WeightedWaypoints {
		m := &svc.WeightedWaypoints[i]
		weight := d.weight(m, elsewhere)
		if n < weight {
			d.e.weighted(svc, &m.Destination)
			return &m.Destination
		}
		n -= weight
	}
	return svc.Waypoint
}

func (d *decision) totalWeight(svc *service, elsewhere bool) (total uint64) {
	for i := range svc.WeightedWaypoints {
		total += d.weight(&svc.WeightedWaypoints[i], elsewhere)
	}
	return total
}

// weight of a member. With elsewhere it is 0 for one that is known to have no
// endpoint but those that are to be avoided.
func (d *decision) weight(m *WeightedWaypoint, elsewhere bool) uint64 {
	if elsewhere {
		silent := decision{s: d.s, t: d.t, q: d.q}
		_, err := silent.gateway(&waypointKind, &m.Destination)
		if miss := (*Miss)(nil); err != nil && !errors.As(err, &miss) {
			return 0
		}
	}
	return uint64(m.Weight)
}

// throughServiceWaypoint is rule A: to the waypoint of the service, by way of a
// gateway if it is in another network. There is no other way to the service.
func (d *decision) throughServiceWaypoint(svc *service, g *GatewayAddress) (Route, error) {
	if err := d.s.demandWaypoints(d.t, d.q.Asked, svc); err != nil {
		return Route{}, err
	}
	up, err := d.gateway(&waypointKind, g)
	if err != nil {
		return Route{}, err
	}
	if up.workload.Network != d.q.Source.Network {
		return d.throughGateway("A1", svc, up)
	}
	return d.toWaypoint("A2", &svc.ref, up)
}

// throughWorkloadWaypoint is rule E. A workload is addressed without a service, and
// without one no gateway can be asked for its waypoint in another network.
func (d *decision) throughWorkloadWaypoint(up upstream) (Route, error) {
	wp, err := d.gateway(&waypointKind, up.workload.Waypoint)
	if err != nil {
		return Route{}, err
	}
	if wp.workload.Network != d.q.Source.Network {
		d.e.rule("E", "the waypoint of the workload is in another network")
		return Route{}, noDestination(wp.workload)
	}
	var ref *ServiceRef
	if up.service != nil {
		ref = &up.service.ref
	}
	return d.toWaypoint("E", ref, wp)
}

// toWaypoint is HBONE to a waypoint in our network, whatever its workload
// declares. It is asked for what the client has dialled.
func (d *decision) toWaypoint(rule string, ref *ServiceRef, wp upstream) (Route, error) {
	ip, err := d.selectIP(&wp)
	if err != nil {
		return Route{}, err
	}
	d.e.rule(rule, "HBONE to the waypoint")
	r := Route{
		Rule: rule, Protocol: HBONE, NextHop: netip.AddrPortFrom(ip, wp.port), Authority: Authority{Addr: d.q.Dst},
		Workload: &wp.workload.Workload, Service: ref, ExpectedIDs: wp.ids(),
	}
	if !ip.IsValid() {
		r.Resolve = wp.workload.Hostname
	}
	return r, nil
}

// throughGateway is double HBONE to an endpoint, or to the waypoint of svc, in
// another network (spec/datapath.md §4.7). Behind the gateway nobody but the
// identities of the service is believed: the gateway has its own choice of
// endpoints, so that the identity of the workload says nothing. If the service
// names none, no answer could be trusted, and there is no route.
func (d *decision) throughGateway(rule string, svc *service, up upstream) (Route, error) {
	w := up.workload
	if w.NetworkGateway == nil {
		d.e.rule(rule, "the endpoint is in another network, and has no network gateway")
		return Route{}, noDestination(w)
	}
	gw, err := d.gateway(&gatewayOfNet, w.NetworkGateway)
	if err != nil {
		return Route{}, err
	}
	if up.service == nil || len(up.service.sans) == 0 {
		d.e.rule(rule, "no identity is known that would be believed behind the gateway")
		name := "its address alone"
		if up.service != nil {
			name = up.service.Key().String()
		}
		return Route{}, fmt.Errorf("%w: %s names no subject alt names to expect behind the network gateway", noDestination(w), name)
	}
	ip, err := d.selectIP(&gw)
	if err != nil {
		return Route{}, err
	}
	d.e.rule(rule, "double HBONE through the network gateway")
	r := Route{
		Rule: rule, Protocol: DoubleHBONE, NextHop: netip.AddrPortFrom(ip, gw.port),
		Authority: Authority{Host: svc.Hostname, Port: d.q.Dst.Port()},
		Workload:  &w.Workload, Gateway: &gw.workload.Workload, Service: &svc.ref,
		ExpectedIDs: gw.ids(), FinalIDs: up.service.sans,
	}
	if !ip.IsValid() {
		r.Resolve = gw.workload.Hostname
	}
	return r, nil
}

// gateway resolves a reference to a waypoint or network gateway
// (spec/datapath.md §4.4.1). Where the reference leads is dialled itself: whether
// it has a waypoint or gateway of its own does not matter, hence no loop.
func (d *decision) gateway(kind *gatewayKind, g *GatewayAddress) (upstream, error) {
	d.e.reference(kind, g)
	if err := d.s.demandGateway(d.t, d.q.Asked, g); err != nil {
		return upstream{}, err
	}
	up, known, err := d.gatewayUpstream(kind, g)
	switch {
	case err != nil:
		return upstream{}, err
	case !known:
		return upstream{}, fmt.Errorf("%w: %s %s not found", kind.unknown, kind.name, g.name())
	case up.workload == nil || up.port == 0:
		return upstream{}, fmt.Errorf("%w: %s %s has no endpoint that can take the connection on port %d", kind.unknown, kind.name, g.name(), g.Port)
	}
	return up, nil
}

// gatewayUpstream looks the reference up. known tells whether there is something
// of that name at all. By name, the family of the client's destination is kept.
func (d *decision) gatewayUpstream(kind *gatewayKind, g *GatewayAddress) (up upstream, known bool, err error) {
	if ip := g.Address.Addr; ip.IsValid() {
		up, err = d.endpointAt(g.Address.Network, netip.AddrPortFrom(ip, g.Port), kind.mode)
		return up, up.workload != nil || up.service != nil, err
	}
	svc, w := d.t.atHost(g.Hostname)
	switch {
	case svc != nil && svc.passthrough():
		d.e.passthrough(svc)
		return upstream{service: svc}, true, nil
	case svc != nil:
		up, err = d.endpointOf(svc, g.Port, d.q.Dst.Addr(), kind.mode)
		return up, true, err
	case w == nil:
		return upstream{}, false, nil
	case slices.Contains(d.q.Avoid, w.UID):
		d.e.avoided(w)
		return upstream{}, true, nil
	}
	d.e.direct(w)
	return upstream{workload: w, port: g.Port, target: d.q.Dst.Addr()}, true, nil
}

// fromWaypoint tells whether the caller is the waypoint that g refers to, by
// identity and address (spec/datapath.md §4.4.2).
func (d *decision) fromWaypoint(g *GatewayAddress) bool {
	svc, w := d.t.referred(g)
	found := w != nil && d.isCaller(w)
	if w == nil && svc != nil {
		for i := range svc.Endpoints {
			if ep := d.t.endpointWorkload(&svc.Endpoints[i]); ep != nil && d.isCaller(ep) {
				found = true
				break
			}
		}
	}
	d.e.fromWaypoint(g, found)
	return found
}

func (d *decision) isCaller(w *workload) bool {
	return w.Identity == d.q.Source.Identity && w.Network == d.q.Source.Network && w.owns(d.q.SourceIP)
}

// referred returns what a reference means, whoever asks: by address a workload
// first, by hostname a service first. One of the two is nil.
func (t *tables) referred(g *GatewayAddress) (*service, *workload) {
	if !g.Address.Addr.IsValid() {
		return t.atHost(g.Hostname)
	}
	w, svc := t.at(g.Address.Network, g.Address.Addr, "")
	return svc, w
}

func (t *tables) atHost(name NamespacedHostname) (*service, *workload) {
	if svc := t.service(name); svc != nil {
		return svc, nil
	}
	return nil, t.workloadByHost(name.Namespace, name.Hostname)
}

// name is how error texts call what g refers to.
func (g *GatewayAddress) name() string {
	if g.Address.Addr.IsValid() {
		return g.Address.String()
	}
	return g.Hostname.Hostname
}
