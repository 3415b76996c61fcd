package state

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Route says where an outbound connection goes, by the rules of
// spec/datapath.md §4.4. What it cannot route it refuses; it never falls back to
// a direct connection past a waypoint, a gateway or a service. It does not block.
//
// Errors: *Miss, with Config.OnDemand only; ErrNoHealthyUpstream,
// ErrNoValidDestination, ErrUnknownWaypoint, ErrUnknownGateway, ErrNoService.
func (s *Store) Route(q Query) (Route, error) {
	t := s.read()
	defer s.release(t)
	d := decision{s: s, t: t, q: &q}
	return d.route()
}

// Resolved completes a route whose Resolve is set with an address of that host.
func (r Route) Resolved(ip netip.Addr) Route {
	r.Resolve = ""
	r.NextHop = netip.AddrPortFrom(ip, r.NextHop.Port())
	// Rule F asks for the workload itself; all others for what the client dialled.
	if r.Rule == "F" {
		r.Authority.Addr = netip.AddrPortFrom(ip, r.Authority.Addr.Port())
	}
	return r
}

// decision is one run of the rules. It must not outlive the reading of its tables.
type decision struct {
	s *Store
	t *tables
	q *Query
	e *Explanation // nil: nobody wants to know
}

// upstream is the outcome of an endpoint lookup.
type upstream struct {
	workload *workload
	service  *service // by whose VIP or name the workload was found, nil if by its own address
	port     uint16
	target   netip.Addr // what was dialled: this address is preferred, else one of its family
}

func (d *decision) route() (Route, error) {
	q := d.q
	switch {
	case q.Source == nil:
		return Route{}, errNoSource
	case !q.Dst.IsValid():
		return Route{}, errors.New("no destination address")
	}
	q.Dst = netip.AddrPortFrom(q.Dst.Addr().Unmap(), q.Dst.Port())
	q.SourceIP = q.SourceIP.Unmap()
	w, svc := d.t.at(d.s.cfg.Network, q.Dst.Addr(), q.Source.Namespace)
	d.e.address(d, w, svc)
	if err := d.demandAddress(); err != nil {
		return Route{}, err
	}
	if svc != nil {
		if g := d.waypointOf(svc); g != nil {
			return d.throughServiceWaypoint(svc, g)
		}
	}
	// The endpoint lookup is by the network of the source, and prefers services.
	found, own := svc, w
	if elsewhere := q.Source.Network != d.s.cfg.Network; elsewhere || w != nil {
		found = d.t.serviceAt(q.Source.Network, q.Dst.Addr(), q.Source.Namespace)
		if elsewhere {
			own = d.t.workloadAt(q.Source.Network, q.Dst.Addr())
		}
	}
	up, err := d.endpoint(found, own, q.Dst, standardMode)
	if err != nil {
		return Route{}, err
	}
	if up.service != nil && up.service != svc {
		// A workload has the address of a VIP, or our network is not that of the
		// source. The waypoint of the service must not be passed by for that.
		if g := d.waypointOf(up.service); g != nil {
			return d.throughServiceWaypoint(up.service, g)
		}
	}
	if up.workload == nil && w != nil && w.Waypoint != nil {
		// Nor must that of a workload, for a passthrough service on its address.
		if up, err = d.itself(w, q.Dst); err != nil {
			return Route{}, err
		}
	}
	if up.workload == nil {
		return d.withoutEndpoint(svc, up.service)
	}
	return d.toEndpoint(svc, up)
}

// withoutEndpoint is rule B or C.
func (d *decision) withoutEndpoint(addressed, found *service) (Route, error) {
	if addressed != nil && !addressed.passthrough() || found != nil && !found.passthrough() {
		d.e.rule("B", "the service has no endpoint that can take the connection")
		return Route{}, fmt.Errorf("%w: %s", ErrNoHealthyUpstream, d.q.Dst)
	}
	d.e.rule("C", "passed through to the original destination")
	return Route{Rule: "C", Protocol: TCP, NextHop: d.q.Dst}, nil
}

// toEndpoint is rules D to G. svc is the service that the client addressed.
func (d *decision) toEndpoint(svc *service, up upstream) (Route, error) {
	w := up.workload
	if w.Network != d.q.Source.Network {
		if svc == nil {
			d.e.rule("D", "the endpoint is in another network, and no service leads there")
			return Route{}, fmt.Errorf("%w: %s", ErrNoService, d.q.Dst)
		}
		return d.throughGateway("D", svc, up)
	}
	// Only who dials a service has chosen to pass the workload's waypoint by.
	if w.Waypoint != nil && (svc == nil || up.service == nil) {
		if !d.fromWaypoint(w.Waypoint) {
			return d.throughWorkloadWaypoint(up)
		}
	}
	ip, err := d.selectIP(&up)
	if err != nil {
		return Route{}, err
	}
	r := Route{Rule: "G", Protocol: TCP, NextHop: netip.AddrPortFrom(ip, up.port), Workload: &w.Workload}
	if up.service != nil {
		r.Service = &up.service.ref
	}
	if !ip.IsValid() {
		r.Resolve = w.Hostname
	}
	if w.Protocol != HBONE {
		d.e.rule("G", "plain TCP to the endpoint, which does not speak HBONE")
		return r, nil
	}
	d.e.rule("F", "HBONE to the endpoint")
	r.Rule, r.Protocol = "F", HBONE
	r.Authority.Addr = r.NextHop
	r.NextHop = netip.AddrPortFrom(ip, d.s.cfg.HBONEPort)
	r.ExpectedIDs = up.ids()
	return r, nil
}

// endpointAt is the endpoint lookup of spec/state-xds-dns.md §4.6: by the VIP of
// a service, else by the address of a workload.
func (d *decision) endpointAt(network string, dst netip.AddrPort, mode portMode) (upstream, error) {
	svc := d.t.serviceAt(network, dst.Addr(), d.q.Source.Namespace)
	if svc != nil {
		return d.endpoint(svc, nil, dst, mode)
	}
	return d.endpoint(nil, d.t.workloadAt(network, dst.Addr()), dst, mode)
}

// endpoint is the endpoint of a service that was found by its VIP, or if that is
// nil the workload of the address. No workload in the answer means that there is
// none; the service is then the one that was addressed, if any.
func (d *decision) endpoint(svc *service, w *workload, dst netip.AddrPort, mode portMode) (upstream, error) {
	switch {
	case svc == nil:
		return d.itself(w, dst)
	case svc.passthrough():
		d.e.passthrough(svc)
		return upstream{service: svc}, nil
	}
	return d.endpointOf(svc, dst.Port(), dst.Addr(), mode)
}

// itself is a workload that was dialled at its own address, nil for none.
func (d *decision) itself(w *workload, dst netip.AddrPort) (upstream, error) {
	if w != nil && slices.Contains(d.q.Avoid, w.UID) {
		d.e.avoided(w)
		return upstream{}, fmt.Errorf("%w: %s", ErrNoHealthyUpstream, dst)
	}
	d.e.direct(w)
	return upstream{workload: w, port: dst.Port(), target: dst.Addr()}, nil
}

// endpointOf picks an endpoint of a service.
func (d *decision) endpointOf(svc *service, port uint16, target netip.Addr, mode portMode) (upstream, error) {
	p := picker{t: d.t, q: d.q, svc: svc, port: port, mode: mode}
	w, targetPort := p.pick()
	d.e.endpoints(&p, w, targetPort)
	if w == nil && d.s.cfg.OnDemand {
		if err := d.demandEndpoints(svc); err != nil {
			return upstream{}, err
		}
	}
	return upstream{workload: w, service: svc, port: targetPort, target: target}, nil
}

// selectIP picks the address of the endpoint: the one that was dialled, else the
// first of the same family, else the first (spec/state-xds-dns.md §4.9). It is the
// zero value if the endpoint has a hostname only.
func (d *decision) selectIP(up *upstream) (netip.Addr, error) {
	w := up.workload
	ip := w.pickIP(up)
	if !ip.IsValid() && w.Hostname == "" {
		d.e.noAddress(w)
		return ip, noDestination(w)
	}
	d.e.selected(w, ip)
	return ip, nil
}

func (w *workload) pickIP(up *upstream) netip.Addr {
	if w.owns(up.target) {
		return up.target
	}
	families := AnyFamily
	if up.service != nil {
		families = up.service.IPFamilies
	}
	var first netip.Addr
	for _, ip := range w.IPs {
		if !families.allow(ip) {
			continue
		}
		if ip.Is4() == up.target.Is4() {
			return ip
		}
		if !first.IsValid() {
			first = ip
		}
	}
	return first
}

// ids are the identities that the endpoint may present: those of its service and
// its own.
func (u *upstream) ids() []spiffeid.ID {
	if u.service == nil || len(u.service.sans) == 0 {
		return u.workload.ids
	}
	return slices.Concat(u.service.sans, u.workload.ids)
}

// draw returns a uniform number in [0, n).
func (q *Query) draw(n uint64) uint64 {
	if q.Draw != nil {
		return q.Draw(n)
	}
	return rand.Uint64N(n)
}

func noDestination(w *workload) error {
	return fmt.Errorf("%w: %s", ErrNoValidDestination, &w.Workload)
}
