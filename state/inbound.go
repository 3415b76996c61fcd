package state

import (
	"errors"
	"fmt"
	"net/netip"
)

// Inbound says what an HBONE request means for the local workload: whether its
// authority may be served and by which address of the application
// (spec/datapath.md §6.2, checks 4 and 5). The check that the upstream is not
// the proxy itself is left to the caller, who knows its ports.
//
// Errors: *Miss, with Config.OnDemand only; ErrIPMismatch (the request is bad);
// all others mean that the request cannot be served.
func (s *Store) Inbound(q InboundQuery) (InboundRoute, error) {
	t := s.read()
	defer s.release(t)
	d := inboundDecision{s: s, t: t, q: &q}
	return d.route()
}

// GuessService says which service of the local workload a connection to port was
// probably meant for: the one of the forwarded host ("" if the client named
// none), else the first that leads to the port, else nil. It is for telemetry
// only (spec/datapath.md §6.3, §7).
func (s *Store) GuessService(local *Workload, port uint16, forwardedHost string) *ServiceRef {
	t := s.read()
	defer s.release(t)
	return t.guessService(local, port, forwardedHost)
}

// inboundDecision is decision for Inbound.
type inboundDecision struct {
	s *Store
	t *tables
	q *InboundQuery
	e *Explanation // nil: nobody wants to know
}

func (d *inboundDecision) route() (InboundRoute, error) {
	q := d.q
	if q.Local == nil {
		return InboundRoute{}, errors.New("no local workload")
	}
	q.Addr = netip.AddrPortFrom(q.Addr.Addr().Unmap(), q.Addr.Port())
	q.ConnDst = netip.AddrPortFrom(q.ConnDst.Addr().Unmap(), q.ConnDst.Port())
	d.e.inbound(q)
	if q.Host == "" && !q.Addr.IsValid() {
		return InboundRoute{}, errors.New("no authority")
	}
	port, svc := q.Addr.Port(), (*service)(nil)
	if q.Host == "" {
		if err := d.checkAddress(); err != nil {
			return InboundRoute{}, err
		}
	} else {
		var err error
		if svc, port, err = d.byName(); err != nil {
			return InboundRoute{}, err
		}
	}
	r := InboundRoute{}
	if tunnel := q.Local.ApplicationTunnel; tunnel != nil {
		if tunnel.Port != 0 {
			port = tunnel.Port
		}
		if tunnel.Proxy {
			target, err := d.tunnelTarget(svc)
			if err != nil {
				return InboundRoute{}, err
			}
			r.Proxy, r.Target = true, target
		}
	}
	r.Upstream = netip.AddrPortFrom(q.ConnDst.Addr(), port)
	if svc != nil {
		r.Service = &svc.ref
	} else {
		r.Service = d.t.guessService(q.Local, port, q.ForwardedHost)
	}
	d.e.upstream(q, &r)
	return r, nil
}

// checkAddress validates an authority that is an address (spec/datapath.md
// §6.2.1): it is that of the tunnel, or the local workload tunnels to an
// application, or is the waypoint of what has the address.
func (d *inboundDecision) checkAddress() error {
	q := d.q
	if q.Addr.Addr() == q.ConnDst.Addr() || q.Local.ApplicationTunnel != nil {
		d.e.accepted(q)
		return nil
	}
	a := NetworkAddress{d.s.cfg.Network, q.Addr.Addr()}
	if d.s.cfg.OnDemand {
		if err := miss(q.Asked, d.t.unknownAddress(a)); err != nil {
			return err
		}
	}
	w, svc := d.t.at(a.Network, a.Addr, q.Local.Namespace)
	d.e.sandwich(w, svc)
	if ok, err := d.servedByUs(w, svc); ok || err != nil {
		return err
	}
	// What the address means depends on the namespace of the client: a waypoint may
	// stand for a service that its own namespace does not see, or not prefer.
	for _, svc := range d.t.vip(a) {
		if ok, err := d.servedByUs(nil, svc); ok || err != nil {
			return err
		}
	}
	if w == nil {
		if ok, err := d.servedByUs(nil, d.t.serviceAt(a.Network, a.Addr, "")); ok || err != nil {
			return err
		}
	}
	d.e.mismatch()
	return fmt.Errorf("%w: %s != %s", ErrIPMismatch, q.ConnDst.Addr(), q.Addr.Addr())
}

// servedByUs tells whether the local workload is a waypoint of w or svc. Of a
// weighted set every member is, unless it has no weight (decision D26).
func (d *inboundDecision) servedByUs(w *workload, svc *service) (bool, error) {
	switch {
	case w != nil:
		if err := d.s.demandGateway(d.t, d.q.Asked, w.Waypoint); err != nil {
			return false, err
		}
		return d.isWaypoint(w.Waypoint), nil
	case svc == nil:
		return false, nil
	}
	if err := d.s.demandWaypoints(d.t, d.q.Asked, svc); err != nil {
		return false, err
	}
	ours := d.isWaypoint(svc.Waypoint)
	for i := range svc.WeightedWaypoints {
		m := &svc.WeightedWaypoints[i]
		ours = ours || m.Weight > 0 && d.isWaypoint(&m.Destination)
	}
	return ours, nil
}

// isWaypoint tells whether g refers to the local workload: to a service that has
// it as an endpoint, or to a workload that has the address of the tunnel in our network.
func (d *inboundDecision) isWaypoint(g *GatewayAddress) bool {
	if g == nil {
		return false
	}
	svc, w := d.t.referred(g)
	ours := svc != nil && svc.endpoint(d.q.Local.UID) != nil || w != nil && w.Network == d.s.cfg.Network && w.owns(d.q.ConnDst.Addr())
	d.e.attached(g, ours)
	return ours
}

// byName finds the service of an authority that is a hostname, and the port that
// it means at the local workload, which need not be one of its endpoints.
func (d *inboundDecision) byName() (*service, uint16, error) {
	q := d.q
	svc := d.t.serviceByHost(q.Host, q.Local.Namespace)
	if svc == nil {
		if d.s.cfg.OnDemand {
			key := NamespacedHostname{Namespace: q.Local.Namespace, Hostname: q.Host}
			if err := miss(q.Asked, key.String()); err != nil {
				return nil, 0, err
			}
		}
		return nil, 0, fmt.Errorf("no service or workload for hostname: %s", q.Host)
	}
	d.e.service(svc)
	port, ok := uint16(0), false
	if ep := svc.endpoint(q.Local.UID); ep != nil {
		port, ok = target(ep.Ports, q.Port)
	}
	if !ok {
		port, _ = target(svc.Ports, q.Port)
	}
	if port == 0 {
		return nil, 0, fmt.Errorf("requested service %s:%d found, but cannot resolve port", q.Host, q.Port)
	}
	return svc, port, nil
}

// tunnelTarget is what the PROXY header of an application tunnel names: the
// authority, for a hostname the VIP of its service svc. A VIP of our network goes
// before all others, and IPv4 before IPv6 there.
func (d *inboundDecision) tunnelTarget(svc *service) (netip.AddrPort, error) {
	if svc == nil {
		return d.q.Addr, nil
	}
	best, rank := netip.Addr{}, -1
	for _, vip := range svc.VIPs {
		r := 0
		if vip.Network == d.s.cfg.Network {
			r = 1
			if vip.Addr.Is4() {
				r = 2
			}
		}
		if r > rank {
			best, rank = vip.Addr, r
		}
	}
	if rank < 0 {
		return netip.AddrPort{}, fmt.Errorf("requested service %s found, but has no IP addresses", d.q.Host)
	}
	return netip.AddrPortFrom(best, d.q.Port), nil
}

func (t *tables) guessService(local *Workload, port uint16, forwardedHost string) *ServiceRef {
	var guess *service
	for _, key := range local.Services {
		svc := t.service(key)
		if svc == nil {
			continue
		}
		if forwardedHost != "" && svc.Hostname == forwardedHost {
			return &svc.ref
		}
		if guess == nil && svc.serves(local.UID, port) {
			guess = svc
		}
	}
	if guess == nil {
		return nil
	}
	return &guess.ref
}

// serves tells whether a port of the service leads to that port of a workload.
func (s *service) serves(uid string, port uint16) bool {
	for _, p := range s.Ports {
		if p.Target == port {
			return true
		}
	}
	if ep := s.endpoint(uid); ep != nil {
		for _, p := range ep.Ports {
			if p.Target == port {
				return true
			}
		}
	}
	return false
}
