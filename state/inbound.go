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
// Errors: ErrIPMismatch (the request is bad); all others mean that the request
// cannot be served.
func (s *Store) Inbound(q InboundQuery) (InboundRoute, error) {
	if q.Local == nil {
		return InboundRoute{}, errors.New("no local workload")
	}
	q.Addr = netip.AddrPortFrom(q.Addr.Addr().Unmap(), q.Addr.Port())
	q.ConnDst = netip.AddrPortFrom(q.ConnDst.Addr().Unmap(), q.ConnDst.Port())
	t := s.read()
	defer s.release(t)
	byName := q.Host != ""
	if !byName {
		if err := s.checkAddress(t, &q); err != nil {
			return InboundRoute{}, err
		}
	}
	if q.Local.ApplicationTunnel != nil {
		return InboundRoute{}, fmt.Errorf("%w: application tunnel of %s", ErrUnsupportedRoute, q.Local)
	}
	if byName {
		return inboundByName(t, &q)
	}
	r := InboundRoute{Upstream: netip.AddrPortFrom(q.ConnDst.Addr(), q.Addr.Port())}
	r.Service = t.guessService(q.Local, q.Addr.Port(), q.ForwardedHost)
	return r, nil
}

// checkAddress accepts an authority that is the address of the tunnel itself.
func (s *Store) checkAddress(t *tables, q *InboundQuery) error {
	if q.Addr.Addr() == q.ConnDst.Addr() || q.Local.ApplicationTunnel != nil {
		return nil
	}
	w, svc := t.at(s.cfg.Network, q.Addr.Addr(), q.Local.Namespace)
	if w != nil && w.Waypoint != nil || svc != nil && svc.hasWaypoint() {
		return fmt.Errorf("%w: %s != %s: %w: sandwiched waypoint", ErrIPMismatch, q.ConnDst.Addr(), q.Addr.Addr(), ErrUnsupportedRoute)
	}
	return fmt.Errorf("%w: %s != %s", ErrIPMismatch, q.ConnDst.Addr(), q.Addr.Addr())
}

// inboundByName finds the port of a service; the local workload need not be one
// of its endpoints.
func inboundByName(t *tables, q *InboundQuery) (InboundRoute, error) {
	svc := t.serviceByHost(q.Host, q.Local.Namespace)
	if svc == nil {
		return InboundRoute{}, fmt.Errorf("no service or workload for hostname: %s", q.Host)
	}
	port, ok := uint16(0), false
	if ep := svc.endpoint(q.Local.UID); ep != nil {
		port, ok = target(ep.Ports, q.Port)
	}
	if !ok {
		port, _ = target(svc.Ports, q.Port)
	}
	if port == 0 {
		return InboundRoute{}, fmt.Errorf("requested service %s:%d found, but cannot resolve port", q.Host, q.Port)
	}
	return InboundRoute{Upstream: netip.AddrPortFrom(q.ConnDst.Addr(), port), Service: &svc.ref}, nil
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
