package dns

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/miekg/dns"

	"github.com/ztunnel-go/ztunnel/state"
)

// verdict is what becomes of a message.
type verdict uint8

const (
	dropped  verdict = iota // nobody is told
	answered                // there is an answer
	awaited                 // the answer takes time
)

// now answers a message if that takes no time; the answer lies in w. Otherwise
// source is the workload that asks, nil if that is what has to be waited for. ended
// is a context that has ended.
func (s *Server) now(ended context.Context, w *work, raw []byte, proto protocol) (reply []byte, source *state.Workload, v verdict) {
	if len(raw) < headerLen || raw[2]&bitResponse != 0 {
		return nil, nil, dropped
	}
	q, out := &w.query, w.out[2:]
	if q.parse(raw, proto) != nil || proto == overUDP && len(raw) == len(w.in) { // it may have been longer
		return q.refuse(out, dns.RcodeFormatError), nil, answered
	}
	if q.opcode() == dns.OpcodeQuery && q.questions != 1 {
		return q.refuse(out, dns.RcodeServerFailure), nil, answered
	}
	source, err := s.cfg.Local(ended)
	if err != nil {
		return nil, nil, awaited
	}
	if reply, ok := s.resolve(ended, w, source); ok {
		return reply, source, answered
	}
	return nil, source, awaited
}

// later answers what now could not, for the client at a port. It blocks until a nameserver has answered,
// within bounds of time, or until ctx ends, which gives no answer.
func (s *Server) later(ctx context.Context, raw []byte, proto protocol, port uint16, source *state.Workload) (reply []byte) {
	defer s.recovered(ctx)
	q := &query{port: port}
	if q.parse(raw, proto) != nil {
		return nil // now has parsed it
	}
	if source == nil {
		bounded, cancel := context.WithTimeoutCause(ctx, s.cfg.WorkloadWait, errUnknownClient)
		w, err := s.cfg.Local(bounded)
		cancel()
		if err != nil {
			s.cfg.Metrics.asked(q, nil)
			s.log.DebugContext(ctx, "query of an unknown workload refused", "error", err.Error())
			return q.refuse(make([]byte, len(raw)), dns.RcodeServerFailure)
		}
		source = w
		if reply, ok := s.resolveOne(ctx, raw, proto, source); ok {
			return reply
		}
	}
	return s.forward(ctx, q, source)
}

var errUnknownClient = fmt.Errorf("the control plane does not know the local workload: %w", context.DeadlineExceeded)

// resolveOne is resolve with memory of its own.
func (s *Server) resolveOne(ctx context.Context, raw []byte, proto protocol, source *state.Workload) ([]byte, bool) {
	w := takeWork()
	defer w.putBack()
	if w.query.parse(raw, proto) != nil {
		return nil, false
	}
	reply, ok := s.resolve(ctx, w, source)
	return slices.Clone(reply), ok
}

// resolve answers the names of services for a client (spec/state-xds-dns.md §5.3).
// It is false for all others; the answer lies in w.
func (s *Server) resolve(ctx context.Context, w *work, source *state.Workload) ([]byte, bool) {
	q := &w.query
	if q.name == nil || q.opcode() != dns.OpcodeQuery || q.qtype != dns.TypeA && q.qtype != dns.TypeAAAA {
		return nil, false
	}
	a, ok := s.find(q, source, w.addrs)
	if !ok {
		return nil, false
	}
	s.cfg.Metrics.asked(q, source)
	w.addrs = a.Addrs
	result := "success"
	switch {
	case a.OtherFamily || q.qtype == dns.TypeAAAA && !s.cfg.IPv6:
		result, a.Addrs = "service does not support this record type", nil
	case len(a.Addrs) == 0:
		result = "no records"
	default:
		shuffle(a.Addrs)
	}
	s.trace(ctx, q, source, result, len(a.Addrs), nil)
	name := string(q.name) + "."
	l := &local{authoritative: true, name: name, addrs: a.Addrs}
	if a.Bare > 0 && !a.Wildcard && len(a.Addrs) > 0 {
		l.bare = name[:a.Bare+1]
	}
	reply, err := w.answer(l)
	if err != nil {
		s.log.ErrorContext(ctx, "answer not encoded", "domain", name, "error", err.Error())
		return q.refuse(w.out[2:], dns.RcodeServerFailure), true
	}
	return reply, true
}

func (s *Server) find(q *query, source *state.Workload, buf []netip.Addr) (state.NameAnswer, bool) {
	return s.cfg.Store.ResolveName(&state.NameQuery{
		Client: source, Name: q.name, IPv6: q.qtype == dns.TypeAAAA,
		Domain: s.cfg.ClusterDomain, Search: s.searchFor(source.Namespace), Preferred: s.cfg.PreferredNamespace,
	}, buf)
}

// trace writes the log line of a query (spec/state-xds-dns.md §5.6).
func (s *Server) trace(ctx context.Context, q *query, source *state.Workload, result string, endpoints int, err error) {
	if !s.log.Enabled(ctx, slog.LevelDebug) {
		return
	}
	if err != nil {
		result = fmt.Sprintf("%s (%v)", result, err)
	}
	s.log.LogAttrs(ctx, slog.LevelDebug, "query",
		slog.String("src.workload", source.Name), slog.String("src.namespace", source.Namespace),
		slog.String("query", strings.ToUpper(queryType(q.qtype))), slog.String("domain", string(q.name)),
		slog.String("result", result), slog.Int("endpoints", endpoints))
}

// recovered keeps a panic within its query (decision D21).
func (s *Server) recovered(ctx context.Context) {
	if v := recover(); v != nil {
		s.log.ErrorContext(ctx, "DNS query panicked", "panic", fmt.Sprint(v), "stack", string(debug.Stack()))
		if s.cfg.Panicked != nil {
			s.cfg.Panicked()
		}
	}
}
