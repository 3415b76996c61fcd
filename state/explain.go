package state

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Explanation tells how Route or Inbound came to its answer. Its JSON form is for
// people and tools; the answer itself is in Route or InboundRoute, and Err.
type Explanation struct {
	Steps    []Step          `json:"steps"`
	Outbound *RouteOutcome   `json:"outbound,omitempty"` // of Explain, if there is a route
	Inbound  *InboundOutcome `json:"inbound,omitempty"`  // of ExplainInbound, if there is a route
	Error    string          `json:"error,omitempty"`
	Missing  []string        `json:"missing,omitempty"` // keys that must be demanded first

	Route        Route        `json:"-"`
	InboundRoute InboundRoute `json:"-"`
	Err          error        `json:"-"`
}

// Step is one thing that a decision looked at, and what it found.
type Step struct {
	Subject    string      `json:"subject"`
	Found      string      `json:"found"`
	Candidates []Candidate `json:"candidates,omitempty"` // among which was chosen
}

// Candidate is something that could have been chosen.
type Candidate struct {
	Name   string `json:"name"`
	Chosen bool   `json:"chosen"`
	Rank   int    `json:"rank,omitempty"`   // of an endpoint: the highest is preferred
	Weight uint32 `json:"weight,omitempty"` // of an endpoint: its capacity
	Why    string `json:"why,omitempty"`    // it was not chosen
}

// RouteOutcome is a Route as it is shown.
type RouteOutcome struct {
	Rule               string   `json:"rule"` // of spec/datapath.md §4.4
	Protocol           string   `json:"protocol"`
	NextHop            string   `json:"nextHop"`
	Resolve            string   `json:"resolve,omitempty"` // hostname whose address the next hop gets
	Authority          string   `json:"authority,omitempty"`
	Workload           string   `json:"workload,omitempty"` // UID
	Gateway            string   `json:"gateway,omitempty"`  // UID
	Service            string   `json:"service,omitempty"`  // namespace/hostname
	ExpectedIdentities []string `json:"expectedIdentities,omitempty"`
	FinalIdentities    []string `json:"finalIdentities,omitempty"`
}

// InboundOutcome is an InboundRoute as it is shown.
type InboundOutcome struct {
	Upstream string `json:"upstream"`
	Service  string `json:"service,omitempty"` // namespace/hostname
	Proxy    bool   `json:"proxy,omitempty"`
	Target   string `json:"target,omitempty"`
}

// Explain takes the decision of Route and tells its steps. Where Route draws, so
// does Explain, and two draws may differ unless q has a Draw of its own.
func (s *Store) Explain(q Query) Explanation {
	t := s.read()
	defer s.release(t)
	e := &Explanation{}
	d := decision{s: s, t: t, q: &q, e: e}
	e.Route, e.Err = d.route()
	e.finish()
	if r := &e.Route; e.Err == nil {
		e.Outbound = &RouteOutcome{
			Rule: r.Rule, Protocol: r.Protocol.String(), NextHop: nextHop(r), Resolve: r.Resolve, Authority: r.Authority.String(),
			Workload: uid(r.Workload), Gateway: uid(r.Gateway), Service: r.Service.key(),
			ExpectedIdentities: idTexts(r.ExpectedIDs), FinalIdentities: idTexts(r.FinalIDs),
		}
		if r.Resolve != "" && r.Rule == "F" {
			e.Outbound.Authority = nextHopOf(r.Resolve, r.Authority.Addr)
		}
	}
	return *e
}

// ExplainInbound takes the decision of Inbound and tells its steps.
func (s *Store) ExplainInbound(q InboundQuery) Explanation {
	t := s.read()
	defer s.release(t)
	e := &Explanation{}
	d := inboundDecision{s: s, t: t, q: &q, e: e}
	e.InboundRoute, e.Err = d.route()
	e.finish()
	if r := &e.InboundRoute; e.Err == nil {
		e.Inbound = &InboundOutcome{Upstream: r.Upstream.String(), Service: r.Service.key(), Proxy: r.Proxy}
		if r.Proxy {
			e.Inbound.Target = r.Target.String()
		}
	}
	return *e
}

func (e *Explanation) finish() {
	if e.Err == nil {
		return
	}
	e.Error = e.Err.Error()
	var m *Miss
	if errors.As(e.Err, &m) {
		e.Missing = m.Keys
	}
}

func nextHop(r *Route) string {
	if r.Resolve != "" {
		return nextHopOf(r.Resolve, r.NextHop)
	}
	return r.NextHop.String()
}

// nextHopOf names an address that is not known yet.
func nextHopOf(host string, a netip.AddrPort) string {
	return Authority{Host: host, Port: a.Port()}.String()
}

func uid(w *Workload) string {
	if w == nil {
		return ""
	}
	return w.UID
}

func (r *ServiceRef) key() string {
	if r == nil {
		return ""
	}
	return r.Namespace + "/" + r.Hostname
}

func idTexts(ids []spiffeid.ID) []string {
	var texts []string
	for _, id := range ids {
		texts = append(texts, id.String())
	}
	return texts
}

func (e *Explanation) step(subject, format string, args ...any) *Step {
	e.Steps = append(e.Steps, Step{Subject: subject, Found: fmt.Sprintf(format, args...)})
	return &e.Steps[len(e.Steps)-1]
}

func (s *Step) candidate(c Candidate) { s.Candidates = append(s.Candidates, c) }
