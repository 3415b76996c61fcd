package state

import "slices"

// AuthorizeExplanation tells how Authorize comes to its verdict.
type AuthorizeExplanation struct {
	Verdict  Verdict
	Policies []ExplainedPolicy // those that apply, in the order in which they are asked
}

// ExplainedPolicy is a policy that applies to the destination of a connection.
type ExplainedPolicy struct {
	Key       string // by which workloads name it
	Policy    string // namespace/name
	Reason    string // why it applies
	Scope     PolicyScope
	Action    Action
	DryRun    bool
	Tombstone bool // it was rejected and no good version of it is known (decision D7)
	// Rules are the rules that were compared with the connection, in order of their
	// numbers. The others cannot match it, or were not asked any more because
	// another policy or rule had decided.
	Rules []ExplainedRule
}

// ExplainedRule is a rule that was compared with the connection.
type ExplainedRule struct {
	Rule    int // its number, from 0
	Matched bool
	// Matches are, by clause, the numbers of the first match that holds, -1 for a
	// clause without matches, which holds. They end before the first clause that
	// does not hold.
	Matches []int
}

// Reasons why a policy applies.
const (
	reasonNamespace = "it applies to the namespace of the workload"
	reasonGlobal    = "it applies everywhere"
	reasonNamed     = "the workload names it"
)

// ExplainAuthorize takes the decision of Authorize and tells its steps.
func (s *Store) ExplainAuthorize(c Conn) AuthorizeExplanation {
	var e AuthorizeExplanation
	e.Verdict = s.authorize(&c, &e)
	return e
}

// The steps of an explanation. They do nothing on nil, which is how Authorize
// calls them.

func (e *AuthorizeExplanation) applies(a *applicable) {
	if e == nil {
		return
	}
	add := func(p *policy, reason string) {
		e.Policies = append(e.Policies, ExplainedPolicy{
			Key: p.key, Policy: p.fullName(), Reason: reason, Scope: p.Scope, Action: p.Action, DryRun: p.DryRun, Tombstone: p.tombstone,
		})
	}
	for _, kind := range [...]policyKind{kindOf(Deny, true), kindOf(Deny, false), kindOf(Allow, true), kindOf(Allow, false)} {
		for i, reason := range [...]string{reasonNamespace, reasonGlobal} {
			if ix := a.sets[i].index(kind); ix != nil {
				for _, p := range ix.policies {
					add(p, reason)
				}
			}
		}
		for _, p := range a.named {
			if p.kind() == kind {
				add(p, reasonNamed)
			}
		}
	}
}

func (e *AuthorizeExplanation) evaluated(p *policy, rule int, matched bool, sub *subject) {
	if e == nil {
		return
	}
	at := slices.IndexFunc(e.Policies, func(ep ExplainedPolicy) bool { return ep.Key == p.key })
	ep := &e.Policies[at]
	i, known := slices.BinarySearchFunc(ep.Rules, rule, func(r ExplainedRule, rule int) int { return r.Rule - rule })
	if known {
		return // found under several keys
	}
	told := ExplainedRule{Rule: rule, Matched: matched}
	for _, clause := range p.Rules[rule] {
		m := p.match(clause, sub)
		if m < 0 && len(clause) > 0 {
			break
		}
		told.Matches = append(told.Matches, m)
	}
	ep.Rules = slices.Insert(ep.Rules, i, told)
}
