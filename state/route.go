package state

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Step is one thing that a decision looked at, and what it found.
type Step struct{ Subject, Found string }

// Explanation tells how Route comes to its answer.
type Explanation struct {
	Steps []Step
	Route Route
	Err   error
}

// Explain takes the decision of Route and tells its steps.
func (s *Store) Explain(q Query) Explanation {
	t := s.read()
	defer s.release(t)
	var e Explanation
	e.Route, e.Err = s.route(t, &q, &e)
	return e
}

func (e *Explanation) step(subject, format string, args ...any) {
	e.Steps = append(e.Steps, Step{subject, fmt.Sprintf(format, args...)})
}

// Route says where an outbound connection goes, by the rules of
// spec/datapath.md §4.4. What it cannot route it refuses; it never falls back to
// a direct connection past a waypoint, a gateway or a service. It does not block.
//
// Errors: ErrNoHealthyUpstream, ErrNoValidDestination, ErrUnsupportedRoute.
func (s *Store) Route(q Query) (Route, error) {
	t := s.read()
	defer s.release(t)
	return s.route(t, &q, nil)
}

// Resolved completes a route whose Resolve is set with an address of that host.
func (r Route) Resolved(ip netip.Addr) Route {
	r.Resolve = ""
	r.NextHop = netip.AddrPortFrom(ip, r.NextHop.Port())
	return r
}

// upstream is the outcome of the endpoint lookup.
type upstream struct {
	workload *workload
	service  *service // by whose VIP the workload was found, nil if by its own address
	port     uint16
}

func (s *Store) route(t *tables, q *Query, e *Explanation) (Route, error) {
	if q.Source == nil {
		return Route{}, errNoSource
	}
	if !q.Dst.IsValid() {
		return Route{}, errors.New("no destination address")
	}
	q.Dst = netip.AddrPortFrom(q.Dst.Addr().Unmap(), q.Dst.Port())
	addressed, target := t.at(s.cfg.Network, q.Dst.Addr(), q.Source.Namespace)
	e.address(q, addressed, target)
	if target != nil && target.hasWaypoint() {
		return Route{}, needsWaypoint(target)
	}
	up, err := upstreamOf(t, q, e)
	if err != nil {
		return Route{}, err
	}
	if up.service != nil && up.service.hasWaypoint() {
		// A workload has the address of a VIP, or our network is not that of the
		// source. The waypoint of the service must not be passed by for that.
		return Route{}, needsWaypoint(up.service)
	}
	if up.workload == nil {
		if target != nil && !target.passthrough() || up.service != nil && !up.service.passthrough() {
			e.rule("B", "the service has no endpoint that can take the connection")
			return Route{}, fmt.Errorf("%w: %s", ErrNoHealthyUpstream, q.Dst)
		}
		e.rule("C", "passed through to the original destination")
		return Route{Rule: "C", Protocol: TCP, NextHop: q.Dst}, nil
	}
	if err := s.refuse(q, target, up); err != nil {
		return Route{}, err
	}
	ip, err := selectIP(up, q.Dst.Addr())
	if err != nil {
		return Route{}, err
	}
	return s.direct(up, netip.AddrPortFrom(ip, up.port), e), nil
}

// upstreamOf looks for the endpoint: by the VIP of a service, else by the address
// of a workload. No workload means that there is none; the service is then the
// one that was addressed, if any.
func upstreamOf(t *tables, q *Query, e *Explanation) (upstream, error) {
	network, ip := q.Source.Network, q.Dst.Addr()
	if svc := t.serviceAt(network, ip, q.Source.Namespace); svc != nil {
		if svc.passthrough() {
			e.endpoint(svc, nil)
			return upstream{service: svc}, nil
		}
		p := picker{t: t, src: q.Source, port: q.Dst.Port(), avoid: q.Avoid, draw: q.Draw}
		w, port := p.pick(svc)
		e.endpoint(svc, w)
		return upstream{workload: w, service: svc, port: port}, nil
	}
	w := t.workloadAt(network, ip)
	e.endpoint(nil, w)
	if w == nil {
		return upstream{}, nil
	}
	for _, uid := range q.Avoid {
		if uid == w.UID {
			return upstream{}, fmt.Errorf("%w: %s", ErrNoHealthyUpstream, q.Dst)
		}
	}
	return upstream{workload: w, port: q.Dst.Port()}, nil
}

// refuse returns an error for what needs rule D or E.
func (s *Store) refuse(q *Query, target *service, up upstream) error {
	w := up.workload
	switch {
	case w.Network != q.Source.Network && target == nil:
		return fmt.Errorf("no service for target address: %s", q.Dst)
	case w.Network != q.Source.Network && w.NetworkGateway == nil:
		return noDestination(w)
	case w.Network != q.Source.Network:
		return fmt.Errorf("%w: rule D: %s is in network %q, behind a gateway", ErrUnsupportedRoute, &w.Workload, w.Network)
	case target == nil && w.Waypoint != nil:
		return fmt.Errorf("%w: rule E: %s is reached through a waypoint", ErrUnsupportedRoute, &w.Workload)
	}
	return nil
}

// direct is the route to an endpoint in our network.
func (s *Store) direct(up upstream, dst netip.AddrPort, e *Explanation) Route {
	r := Route{Rule: "G", Protocol: TCP, NextHop: dst, Workload: &up.workload.Workload}
	if up.service != nil {
		r.Service = &up.service.ref
	}
	if up.workload.Protocol != HBONE {
		e.rule("G", "plain TCP to the endpoint")
		return r
	}
	e.rule("F", "HBONE to the endpoint")
	r.Rule, r.Protocol = "F", HBONE
	r.NextHop = netip.AddrPortFrom(dst.Addr(), s.cfg.HBONEPort)
	r.Authority = Authority{Addr: dst}
	r.ExpectedIDs = up.workload.ids
	if up.service != nil && len(up.service.sans) > 0 {
		ids := make([]spiffeid.ID, 0, len(up.service.sans)+len(up.workload.ids))
		r.ExpectedIDs = append(append(ids, up.service.sans...), up.workload.ids...)
	}
	return r
}

// selectIP picks the address of the endpoint: the one that was dialled, else the
// first of the same family, else the first (spec/state-xds-dns.md §4.9).
func selectIP(up upstream, dst netip.Addr) (netip.Addr, error) {
	w := up.workload
	if w.owns(dst) {
		return dst, nil
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
		if ip.Is4() == dst.Is4() {
			return ip, nil
		}
		if !first.IsValid() {
			first = ip
		}
	}
	if first.IsValid() {
		return first, nil
	}
	if w.Hostname != "" {
		return netip.Addr{}, fmt.Errorf("%w: hostname: the address of %s must be resolved from %q", ErrUnsupportedRoute, &w.Workload, w.Hostname)
	}
	return netip.Addr{}, noDestination(w)
}

func needsWaypoint(svc *service) error {
	return fmt.Errorf("%w: rule A: service %s is reached through a waypoint", ErrUnsupportedRoute, svc.Key())
}

func noDestination(w *workload) error {
	return fmt.Errorf("%w: %s", ErrNoValidDestination, &w.Workload)
}

// The steps of an explanation. They do nothing on nil, which is how Route calls
// them.

func (e *Explanation) address(q *Query, w *workload, svc *service) {
	if e == nil {
		return
	}
	e.step("source", "%s in network %q", q.Source, q.Source.Network)
	switch {
	case w != nil:
		e.step("address "+q.Dst.Addr().String(), "%s", &w.Workload)
	case svc != nil:
		e.step("address "+q.Dst.Addr().String(), "service %s", svc.Key())
	default:
		e.step("address "+q.Dst.Addr().String(), "unknown")
	}
}

func (e *Explanation) endpoint(svc *service, w *workload) {
	if e == nil {
		return
	}
	if svc != nil {
		e.step("service", "%s with %d endpoints", svc.Key(), len(svc.Endpoints))
		if svc.passthrough() {
			e.step("endpoint", "none wanted: the service passes traffic through")
			return
		}
	}
	if w == nil {
		e.step("endpoint", "none")
		return
	}
	e.step("endpoint", "%s", &w.Workload)
}

func (e *Explanation) rule(rule, meaning string) {
	if e != nil {
		e.step("rule "+rule, "%s", meaning)
	}
}
