package xds

import (
	"errors"
	"net/netip"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/ztunnel-go/ztunnel/state"
	"github.com/ztunnel-go/ztunnel/xds/discoverypb"
	"github.com/ztunnel-go/ztunnel/xds/securitypb"
)

var policyScopes = map[securitypb.Scope]state.PolicyScope{
	securitypb.Scope_GLOBAL:            state.PolicyGlobal,
	securitypb.Scope_NAMESPACE:         state.PolicyNamespace,
	securitypb.Scope_WORKLOAD_SELECTOR: state.PolicySelector,
}

var policyActions = map[securitypb.Action]state.Action{
	securitypb.Action_ALLOW: state.Allow,
	securitypb.Action_DENY:  state.Deny,
}

// convertAuthorization adds the policy of r to u. If that cannot be done, it adds
// what stands in its place as long as no good version is known, so that a policy
// that we do not understand opens nothing (decision D7).
func convertAuthorization(r *discoverypb.Resource, u *state.Update) error {
	var a securitypb.Authorization
	if err := decode(proto.UnmarshalOptions{}, r, &a); err != nil {
		ns, name, ok := strings.Cut(r.GetName(), "/")
		if !ok {
			ns, name = "", r.GetName()
		}
		u.Tombstones = append(u.Tombstones, &state.Policy{
			Namespace: ns, Name: name, ResourceName: resourceName(r, ns, name),
			Scope: state.PolicySelector, Action: state.Allow,
		})
		return err
	}
	var c checker
	p := &state.Policy{
		Name:         a.GetName(),
		Namespace:    a.GetNamespace(),
		ResourceName: resourceName(r, a.GetNamespace(), a.GetName()),
		Scope:        enum(&c, "scope", a.GetScope(), policyScopes),
		Action:       enum(&c, "action", a.GetAction(), policyActions),
		DryRun:       a.GetDryRun(),
		Rules:        convertEach(&c, a.GetRules(), c.rule),
	}
	if r.GetName() == "" {
		c.fail(errNoName)
	}
	if c.err == nil {
		u.Policies = append(u.Policies, p)
		return nil
	}
	u.Tombstones = append(u.Tombstones, tombstone(&a, p))
	return c.err
}

// resourceName is the xDS name of r, or "" if it is that of its content, which is
// the rule.
func resourceName(r *discoverypb.Resource, ns, name string) string {
	if r.GetName() == ns+"/"+name {
		return ""
	}
	return r.GetName()
}

// tombstone makes p one. Where the scope or the action is unknown, it is what
// opens least of those that are certain to be meant: for the workloads that name
// the policy, and a DENY.
func tombstone(a *securitypb.Authorization, p *state.Policy) *state.Policy {
	p.Rules = nil
	if _, ok := policyScopes[a.GetScope()]; !ok {
		p.Scope = state.PolicySelector
	}
	if _, ok := policyActions[a.GetAction()]; !ok {
		p.Action = state.Deny
	}
	return p
}

// unknown is a condition that an ALLOW policy fails and a DENY policy meets.
func unknown() state.Clause { return state.Clause{{Unknown: true}} }

// alien tells whether m has a field that our .proto lacks.
func alien(m protoreflect.ProtoMessage) bool { return len(m.ProtoReflect().GetUnknown()) > 0 }

func (c *checker) rule(r *securitypb.Rule) (state.Rule, error) {
	rule := state.Rule(convertEach(c, r.GetClauses(), c.clause))
	if alien(r) {
		rule = append(rule, unknown())
	}
	return rule, nil
}

// clause gives up what it knows of a clause with an unknown field: next to the
// others, one that an ALLOW policy fails would change nothing.
func (c *checker) clause(cl *securitypb.Clause) (state.Clause, error) {
	clause := state.Clause(convertEach(c, cl.GetMatches(), c.match))
	if alien(cl) {
		clause = unknown()
	}
	return clause, nil
}

func (c *checker) match(m *securitypb.Match) (state.Match, error) {
	out := state.Match{Unknown: alien(m)}
	out.Namespaces = conditions(c, &out, m.GetNamespaces(), stringMatch)
	out.NotNamespaces = conditions(c, &out, m.GetNotNamespaces(), stringMatch)
	out.Principals = conditions(c, &out, m.GetPrincipals(), stringMatch)
	out.NotPrincipals = conditions(c, &out, m.GetNotPrincipals(), stringMatch)
	out.ServiceAccounts = conditions(c, &out, m.GetServiceAccounts(), accountMatch)
	out.NotServiceAccounts = conditions(c, &out, m.GetNotServiceAccounts(), accountMatch)
	out.SourceIPs = conditions(c, &out, m.GetSourceIps(), ipMatch)
	out.NotSourceIPs = conditions(c, &out, m.GetNotSourceIps(), ipMatch)
	out.DestinationIPs = conditions(c, &out, m.GetDestinationIps(), ipMatch)
	out.NotDestinationIPs = conditions(c, &out, m.GetNotDestinationIps(), ipMatch)
	out.DestinationPorts = c.policyPorts("destination_ports", m.GetDestinationPorts())
	out.NotDestinationPorts = c.policyPorts("not_destination_ports", m.GetNotDestinationPorts())
	return out, nil
}

// conditions converts a list of a match. If an entry has a field that we do not
// know, so is the whole condition unknown.
func conditions[T protoreflect.ProtoMessage, U any](c *checker, m *state.Match, list []T, f func(T) (U, error)) []U {
	out := convertEach(c, list, f)
	for _, v := range list {
		if alien(v) {
			m.Unknown = true
			return nil
		}
	}
	return out
}

func (c *checker) policyPorts(field string, ports []uint32) []uint16 {
	return convertEach(c, ports, func(p uint32) (uint16, error) { return c.port(field, p), nil })
}

func stringMatch(m *securitypb.StringMatch) (state.StringMatch, error) {
	switch t := m.GetMatchType().(type) {
	case *securitypb.StringMatch_Exact:
		return state.StringMatch{Kind: state.Exact, Value: t.Exact}, nil
	case *securitypb.StringMatch_Prefix:
		return state.StringMatch{Kind: state.Prefix, Value: t.Prefix}, nil
	case *securitypb.StringMatch_Suffix:
		return state.StringMatch{Kind: state.Suffix, Value: t.Suffix}, nil
	case *securitypb.StringMatch_Presence:
		return state.StringMatch{Kind: state.Presence}, nil
	}
	return state.StringMatch{}, errors.New("string match without exact, prefix, suffix or presence")
}

func accountMatch(m *securitypb.ServiceAccountMatch) (state.ServiceAccountMatch, error) {
	return state.ServiceAccountMatch{Namespace: m.GetNamespace(), ServiceAccount: m.GetServiceAccount()}, nil
}

func ipMatch(a *securitypb.Address) (netip.Prefix, error) {
	ip, err := address(a.GetAddress())
	if err != nil {
		return netip.Prefix{}, err
	}
	return prefix(ip, a.GetLength())
}
