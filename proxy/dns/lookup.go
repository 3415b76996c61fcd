package dns

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/miekg/dns"

	"github.com/ztunnel-go/ztunnel/state"
)

// LookupIP returns the addresses of a host name as the client of the server would
// get them: of one family, in random order if they are those of a service. It is
// for what asks in the client's name within the process (spec/datapath.md §8), and
// counts as a query by TCP. The caller owns the slice, which is never empty: no
// address is an error, which wraps ErrNoSuchHost if there is no such name. It blocks
// until ctx ends at the most.
func (s *Server) LookupIP(ctx context.Context, host string, v6 bool) ([]netip.Addr, error) {
	addrs, err := s.lookUp(ctx, host, v6)
	if err != nil {
		return nil, fmt.Errorf("resolve %q: %w", abridged(host), err)
	}
	return addrs, nil
}

var errNoAddress = errors.New("dns response had no valid IP addresses")

func (s *Server) lookUp(ctx context.Context, host string, v6 bool) (addrs []netip.Addr, err error) {
	defer func() {
		if err != nil && ctx.Err() != nil {
			err = context.Cause(ctx)
		}
	}()
	name, err := canonical(host)
	if err != nil {
		return nil, err
	}
	bounded, cancel := context.WithTimeoutCause(ctx, s.cfg.WorkloadWait, errUnknownClient)
	defer cancel()
	source, err := s.cfg.Local(bounded)
	if err != nil {
		return nil, err
	}
	q := &query{proto: overTCP, qtype: dns.TypeA}
	if v6 {
		q.qtype = dns.TypeAAAA
	}
	q.name = append(q.buf[:0], name[:len(name)-1]...)
	if a, ok := s.find(q, source, nil); ok {
		s.cfg.Metrics.asked(q, source)
		if v6 && !s.cfg.IPv6 || len(a.Addrs) == 0 {
			s.trace(ctx, q, source, "no records", 0, nil)
			return nil, errNoAddress
		}
		s.trace(ctx, q, source, "success", len(a.Addrs), nil)
		shuffle(a.Addrs)
		return a.Addrs, nil
	}
	return s.lookUpBeyond(ctx, q, source)
}

// lookUpBeyond asks for a name that is none of the mesh's.
func (s *Server) lookUpBeyond(ctx context.Context, q *query, source *state.Workload) ([]netip.Addr, error) {
	s.cfg.Metrics.asked(q, source)
	if known, addrs, ok := s.hostAddrs(q); ok {
		switch {
		case !known:
			return nil, ErrNoSuchHost
		case len(addrs) == 0:
			return nil, errNoAddress
		}
		return addrs, nil
	}
	if !s.reserve() {
		s.refused(ctx, q, source)
		return nil, errTooMany
	}
	defer s.release()
	start := time.Now()
	addrs, err := s.follow(ctx, q)
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	s.cfg.Metrics.forwarded(q, source, time.Since(start), err != nil)
	if err != nil {
		s.trace(ctx, q, source, "forwarding failed", 0, err)
		return nil, err
	}
	s.trace(ctx, q, source, "forwarded", len(addrs), nil)
	return addrs, nil
}

// follow asks nameservers, and goes after aliases that they leave to us.
func (s *Server) follow(ctx context.Context, q *query) ([]netip.Addr, error) {
	conf := s.upstream.conf.get()
	if conf == nil {
		return nil, errNoNameserver
	}
	ctx, cancel := context.WithTimeoutCause(ctx, maxFlight, errNoAnswer)
	defer cancel()
	a, err := s.upstream.resolve(ctx, conf, question{string(q.name) + ".", q.qtype})
	switch {
	case err != nil:
		return nil, err
	case a.absent && !a.exists:
		return nil, ErrNoSuchHost
	case len(a.addrs) == 0:
		return nil, errNoAddress
	}
	return slices.Clone(a.addrs), nil
}
