package state

import (
	"fmt"
	"net/netip"
)

// The steps of an explanation. They do nothing on nil, which is how Route and
// Inbound call them.

// address tells what an outbound connection is about, and who claims its
// destination.
func (e *Explanation) address(d *decision, w *workload, svc *service) {
	if e == nil {
		return
	}
	q, ip := d.q, d.q.Dst.Addr()
	e.step("source", "%s in namespace %q and network %q", q.Source, q.Source.Namespace, q.Source.Network)
	step := e.step("address", "%s is unknown in network %q", ip, d.s.cfg.Network)
	switch {
	case w != nil:
		step.Found = fmt.Sprintf("%s is %s", ip, &w.Workload)
	case svc != nil:
		step.Found = fmt.Sprintf("%s is service %s", ip, svc.Key())
	}
	step.claims(d, w, svc)
}

// claims lists the workloads and services that have the destination.
func (s *Step) claims(d *decision, w *workload, svc *service) {
	network, ip, ns := d.s.cfg.Network, d.q.Dst.Addr(), d.q.Source.Namespace
	d.t.eachWorkloadAt(network, ip, func(c *workload) {
		s.candidate(Candidate{Name: c.UID, Chosen: c == w, Why: whyNotWorkload(c, w)})
	})
	won := svc
	if won == nil {
		won = d.t.serviceAt(network, ip, ns) // what a workload has outdone
	}
	chosen := netip.Prefix{}
	exact, first := false, true
	d.t.eachServiceAt(network, ip, func(c *service, p netip.Prefix) {
		if c != won {
			return
		}
		if exact = exact || !p.IsValid(); first || p.Bits() > chosen.Bits() {
			chosen, first = p, false
		}
	})
	if exact {
		chosen = netip.Prefix{}
	}
	d.t.eachServiceAt(network, ip, func(c *service, p netip.Prefix) {
		name := "service " + c.Key().String()
		if p.IsValid() {
			name += " (" + p.String() + ")"
		}
		switch {
		case c == svc && p == chosen:
			s.candidate(Candidate{Name: name, Chosen: true})
		case c == won && p == chosen:
			s.candidate(Candidate{Name: name, Why: "a workload has the address"})
		default:
			s.candidate(Candidate{Name: name, Why: whyNotService(c, won, p, chosen, ns)})
		}
	})
}

func whyNotWorkload(c, chosen *workload) string {
	switch {
	case c == chosen:
		return ""
	case chosen != nil && c.rank < chosen.rank:
		return "pods go first, then workloads that speak HBONE"
	}
	return "another one came later, or this one is stale"
}

// whyNotService compares a service that claims an address, by its prefix p or
// exactly, with the one that was found.
func whyNotService(c, chosen *service, p, chosenPrefix netip.Prefix, ns string) string {
	switch {
	case !c.visible(ns):
		return fmt.Sprintf("not visible from namespace %q", ns)
	case p.IsValid() && !chosenPrefix.IsValid():
		return "another one has the address itself"
	case !p.IsValid() && c.stale && !chosen.stale:
		return "it is stale: the control plane may have given it up"
	case chosen.Namespace == ns && c.Namespace != ns:
		return "another one is in the namespace of the client"
	case p.Bits() < chosenPrefix.Bits():
		return "another one has a longer prefix"
	case chosen.Canonical && !c.Canonical:
		return "another one is canonical"
	}
	return "another one goes first by order of arrival"
}

func (e *Explanation) rule(rule, meaning string) {
	if e != nil {
		e.step("rule "+rule, "%s", meaning)
	}
}

func (e *Explanation) passthrough(svc *service) {
	if e != nil {
		e.step("endpoint", "none wanted: service %s passes traffic through", svc.Key())
	}
}

func (e *Explanation) avoided(w *workload) {
	if e != nil {
		e.step("endpoint", "none: %s has just failed", &w.Workload)
	}
}

// direct is an endpoint that was found without a service.
func (e *Explanation) direct(w *workload) {
	switch {
	case e == nil:
	case w == nil:
		e.step("endpoint", "none: no service and no workload has the address in the network of the source")
	default:
		e.step("endpoint", "%s by itself, without a service", &w.Workload)
	}
}

// endpoints tells the choice of p.
func (e *Explanation) endpoints(p *picker, w *workload, port uint16) {
	if e == nil {
		return
	}
	step := e.step("endpoint", "none of the %d of service %s for port %d", len(p.svc.Endpoints), p.svc.Key(), p.port)
	if w != nil {
		step.Found = fmt.Sprintf("%s, port %d, of the %d of service %s", &w.Workload, port, len(p.svc.Endpoints), p.svc.Key())
	}
	for i := range p.svc.Endpoints {
		ep := &p.svc.Endpoints[i]
		of, _, rank, why := p.candidate(ep)
		c := Candidate{Name: ep.WorkloadUID, Rank: rank, Chosen: of != nil && of == w}
		if of != nil {
			c.Weight = of.Capacity
		}
		if !c.Chosen {
			c.Why = p.whyNot(of, rank, why)
		}
		step.candidate(c)
	}
}

func (p *picker) whyNot(w *workload, rank int, why dropReason) string {
	switch {
	case why == dropUnknown:
		return "the workload is not known"
	case why == dropAvoided:
		return "it has just failed"
	case why == dropNoAddress:
		return "it has no address, no hostname and no gateway to another network"
	case why == dropNoPort && !p.declared:
		return fmt.Sprintf("the service has no port %d", p.port)
	case why == dropNoPort:
		return fmt.Sprintf("it has no target for port %d", p.port)
	case why == dropStrict:
		return "it does not match all preferences of the service"
	case w.Capacity == 0:
		return "its capacity is 0"
	case rank < p.top:
		return "others match more preferences of the service"
	}
	return "another one was drawn"
}

func (e *Explanation) weighted(svc *service, g *GatewayAddress) {
	if e == nil {
		return
	}
	step := e.step("waypoint", "%s was drawn by weight", g)
	for i := range svc.WeightedWaypoints {
		m := &svc.WeightedWaypoints[i]
		c := Candidate{Name: m.Destination.String(), Weight: m.Weight, Chosen: &m.Destination == g}
		switch {
		case m.Weight == 0:
			c.Why = "it has no weight"
		case !c.Chosen:
			c.Why = "another one was drawn"
		}
		step.candidate(c)
	}
}

func (e *Explanation) reference(kind *gatewayKind, g *GatewayAddress) {
	if e != nil {
		e.step(kind.name, "the connection goes to %s, port %d", g, g.Port)
	}
}

func (e *Explanation) fromWaypoint(g *GatewayAddress, found bool) {
	switch {
	case e == nil:
	case found:
		e.step("waypoint", "the client is the waypoint %s itself", g)
	default:
		e.step("waypoint", "the client is not the waypoint %s", g)
	}
}

func (e *Explanation) selected(w *workload, ip netip.Addr) {
	switch {
	case e == nil:
	case ip.IsValid():
		e.step("connect to", "%s of %s", ip, &w.Workload)
	default:
		e.step("connect to", "an address of %q, the hostname of %s", w.Hostname, &w.Workload)
	}
}

func (e *Explanation) noAddress(w *workload) {
	if e != nil {
		e.step("connect to", "no address of %s may be used", &w.Workload)
	}
}

// The steps of Inbound.

func (e *Explanation) inbound(q *InboundQuery) {
	if e == nil {
		return
	}
	e.step("local workload", "%s in namespace %q, reached at %s", q.Local, q.Local.Namespace, q.ConnDst)
	if q.Host != "" {
		e.step("authority", "hostname %s, port %d", q.Host, q.Port)
		return
	}
	e.step("authority", "address %s", q.Addr)
}

func (e *Explanation) accepted(q *InboundQuery) {
	switch {
	case e == nil:
	case q.Addr.Addr() == q.ConnDst.Addr():
		e.step("destination", "accepted: the authority is the address of the tunnel")
	default:
		e.step("destination", "accepted: the local workload has an application tunnel")
	}
}

func (e *Explanation) sandwich(w *workload, svc *service) {
	switch {
	case e == nil:
	case w != nil:
		e.step("address", "the authority is %s", &w.Workload)
	case svc != nil:
		e.step("address", "the authority is service %s", svc.Key())
	default:
		e.step("address", "the authority is unknown")
	}
}

func (e *Explanation) attached(g *GatewayAddress, ours bool) {
	switch {
	case e == nil:
	case ours:
		e.step("destination", "accepted: its waypoint %s is the local workload", g)
	default:
		e.step("waypoint", "%s is not the local workload", g)
	}
}

func (e *Explanation) mismatch() {
	if e != nil {
		e.step("destination", "refused: the local workload is not the waypoint of that address")
	}
}

func (e *Explanation) service(svc *service) {
	if e != nil {
		e.step("service", "%s", svc.Key())
	}
}

func (e *Explanation) upstream(q *InboundQuery, r *InboundRoute) {
	if e == nil {
		return
	}
	if t := q.Local.ApplicationTunnel; t != nil {
		e.step("application tunnel", "port %d (0: as sent), PROXY header: %t", t.Port, t.Proxy)
	}
	if r.Service != nil {
		e.step("service", "%s, by the authority, the forwarded host or the port", r.Service.key())
	}
	e.step("connect to", "%s", r.Upstream)
}
