package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"

	"github.com/ztunnel-go/ztunnel/state"
)

var (
	errLoop    = errors.New("the query is our own")
	errTooMany = errors.New("too many queries are waiting")
)

// forward passes a message on, and gives the answer of a nameserver to the client
// as it is. It is nil if ctx has ended.
func (s *Server) forward(ctx context.Context, q *query, source *state.Workload) []byte {
	s.cfg.Metrics.asked(q, source)
	if reply, ok := s.wellKnown(ctx, q, source); ok {
		return reply
	}
	start := time.Now()
	reply, err := s.exchange(ctx, q)
	if ctx.Err() != nil {
		return nil
	}
	if err != nil {
		rcode := dns.RcodeServerFailure
		if errors.Is(err, errNoNameserver) && q.opcode() != dns.OpcodeQuery {
			rcode = dns.RcodeNotImplemented
		}
		reply = q.refuse(make([]byte, len(q.raw)), rcode)
	} else {
		err = failure(q, reply)
		copy(reply, q.raw[:2]) // the ID
		reply = shorten(reply, q.limit())
	}
	s.cfg.Metrics.forwarded(q, source, time.Since(start), err != nil)
	if err != nil {
		s.trace(ctx, q, source, "forwarding failed", 0, err)
	} else {
		s.trace(ctx, q, source, "forwarded", 0, nil)
	}
	return reply
}

// exchange asks the nameservers.
func (s *Server) exchange(ctx context.Context, q *query) ([]byte, error) {
	if s.outgoing.has(q.port, q.raw) {
		s.loops.warn(ctx, s.log, "query of the proxy was redirected to the proxy itself: exempt packets with its mark in the rules of the network namespace")
		return nil, errLoop
	}
	conf := s.upstream.conf.get()
	if conf == nil {
		return nil, errNoNameserver
	}
	ctx, cancel := context.WithTimeoutCause(ctx, maxFlight, errNoAnswer)
	defer cancel()
	reply, err := s.upstream.exchanger.exchange(ctx, conf, asking{msg: q.raw, partial: q.proto == overUDP})
	if err != nil {
		s.unreached(ctx, conf, err)
	}
	return reply, err
}

// unreached tells of nameservers that can't be meant: on a loopback address there is
// the pod itself, not the host whose resolv.conf we have.
func (s *Server) unreached(ctx context.Context, conf *resolvConf, err error) {
	if i := slices.IndexFunc(conf.nameservers, netip.Addr.IsLoopback); i >= 0 {
		s.lonely.warn(ctx, s.log, "no nameserver answers, and one is a loopback address, which in the network namespace of a pod is the pod's own: "+
			"name one in resolv.conf that pods reach", "nameserver", conf.nameservers[i], "error", err.Error())
	}
}

// failure is why the answer of a nameserver counts as a failure: it does as soon as
// it has no records, be it because there are none (spec/state-xds-dns.md §5.6).
func failure(q *query, reply []byte) error {
	switch {
	case rcode(reply) != dns.RcodeSuccess:
		return errors.New(rcodeText(rcode(reply)))
	case q.opcode() == dns.OpcodeQuery && binary.BigEndian.Uint16(reply[6:]) == 0 && !truncated(reply):
		return errors.New("no records")
	}
	return nil
}

// refused answers a query that there is no room for.
func (s *Server) refused(ctx context.Context, q *query, source *state.Workload) {
	s.cfg.Metrics.asked(q, source)
	s.cfg.Metrics.forwarded(q, source, 0, true)
	s.flooded(ctx)
	if source != nil {
		s.trace(ctx, q, source, "forwarding failed", 0, errTooMany)
	}
}

func (s *Server) flooded(ctx context.Context) {
	s.floods.warn(ctx, s.log, "DNS queries are refused: more are waiting for an answer than are allowed")
}

// The names that are answered by what they are (RFC 6761 §6.3), and not by
// nameservers.
const (
	localhost  = "localhost."
	reverse127 = "127.in-addr.arpa."
	reverseOne = "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.ip6.arpa."
)

// wellKnown answers the names of hosts, and those that no nameserver is asked for
// (spec/state-xds-dns.md §5.5).
func (s *Server) wellKnown(ctx context.Context, q *query, source *state.Workload) ([]byte, bool) {
	if q.name == nil || q.opcode() != dns.OpcodeQuery {
		return nil, false
	}
	a := local{name: string(q.name) + "."}
	known := true
	switch q.qtype {
	case dns.TypeA, dns.TypeAAAA:
		var ok bool
		if known, a.addrs, ok = s.hostAddrs(q); !ok {
			return nil, false
		}
	case dns.TypePTR:
		if a.name != reverseOne && a.name != reverse127 && !strings.HasSuffix(a.name, "."+reverse127) {
			return nil, false
		}
		a.ptr = localhost
	default:
		return nil, false
	}
	s.trace(ctx, q, source, "success", len(a.addrs), nil)
	if !known {
		return q.refuse(make([]byte, len(q.raw)), dns.RcodeNameError), true
	}
	w := takeWork()
	defer w.putBack()
	if w.query.parse(q.raw, q.proto) != nil {
		return nil, false
	}
	reply, err := w.answer(&a)
	return slices.Clone(reply), err == nil
}

// hostAddrs returns the addresses of one family that the name of a host has. It is
// false for names that nameservers have to be asked for; those that are known not to
// exist are not known.
func (s *Server) hostAddrs(q *query) (known bool, addrs []netip.Addr, ok bool) {
	unwanted := func(ip netip.Addr) bool { return ip.Is4() != (q.qtype == dns.TypeA) || ip.Is6() && !s.cfg.IPv6 }
	name := string(q.name) + "."
	addrs = slices.DeleteFunc(slices.Clone(s.upstream.hosts.get()[name]), unwanted)
	if len(addrs) > 0 {
		return true, addrs, true
	}
	addrs, ok = builtin(name)
	return len(addrs) > 0, slices.DeleteFunc(addrs, unwanted), ok
}

// seldom keeps one warning from coming more often than once a minute.
type seldom struct{ next atomic.Int64 }

func (o *seldom) warn(ctx context.Context, log *slog.Logger, text string, args ...any) {
	now := time.Now()
	if next := o.next.Load(); now.UnixNano() >= next && o.next.CompareAndSwap(next, now.Add(time.Minute).UnixNano()) {
		log.WarnContext(ctx, text, args...)
	}
}
