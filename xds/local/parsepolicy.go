package local

import (
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v3"

	"github.com/ztunnel-go/ztunnel/state"
)

func (p *parser) san(n *yaml.Node, path string) (string, bool) {
	s, ok := p.str(n, path)
	if !ok {
		return "", false
	}
	if _, err := spiffeid.FromString(s); err != nil {
		p.fail(n, path, "got %q, want a SPIFFE ID: %v", s, err)
		return "", false
	}
	return s, true
}

func (p *parser) policy(n *yaml.Node, path string) (*state.Policy, bool) {
	before := p.count()
	o, ok := p.object(n, path, policyRequired, nil)
	if !ok {
		return nil, false
	}
	pol := &state.Policy{
		Name:      o.str("name"),
		Namespace: o.str("namespace"),
		Scope: choice(o, "scope", named[state.PolicyScope]{"Global", state.PolicyGlobal},
			named[state.PolicyScope]{"Namespace", state.PolicyNamespace},
			named[state.PolicyScope]{"WorkloadSelector", state.PolicySelector}),
		Action: choice(o, "action", named[state.Action]{"Allow", state.Allow}, named[state.Action]{"Deny", state.Deny}),
		Rules: list(o, "rules", func(n *yaml.Node, path string) (state.Rule, bool) {
			return items(&p.decoder, n, path, func(n *yaml.Node, path string) (state.Clause, bool) {
				return items(&p.decoder, n, path, p.match), true
			}), true
		}),
		DryRun: o.boolean("dryRun"),
	}
	p.once(p.policies, "policy", pol.Key(), o.node, path)
	return pol, !p.broken(before)
}

var matchOptional = []string{
	"namespaces", "notNamespaces", "serviceAccounts", "notServiceAccounts", "principals", "notPrincipals",
	"sourceIps", "notSourceIps", "destinationIps", "notDestinationIps", "destinationPorts", "notDestinationPorts",
}

func (p *parser) match(n *yaml.Node, path string) (state.Match, bool) {
	o, ok := p.object(n, path, nil, matchOptional)
	if !ok {
		return state.Match{}, false
	}
	return state.Match{
		Namespaces:          list(o, "namespaces", p.stringMatch),
		NotNamespaces:       list(o, "notNamespaces", p.stringMatch),
		ServiceAccounts:     list(o, "serviceAccounts", p.account),
		NotServiceAccounts:  list(o, "notServiceAccounts", p.account),
		Principals:          list(o, "principals", p.stringMatch),
		NotPrincipals:       list(o, "notPrincipals", p.stringMatch),
		SourceIPs:           list(o, "sourceIps", p.prefix),
		NotSourceIPs:        list(o, "notSourceIps", p.prefix),
		DestinationIPs:      list(o, "destinationIps", p.prefix),
		NotDestinationIPs:   list(o, "notDestinationIps", p.prefix),
		DestinationPorts:    list(o, "destinationPorts", p.port),
		NotDestinationPorts: list(o, "notDestinationPorts", p.port),
	}, true
}

func (p *parser) port(n *yaml.Node, path string) (uint16, bool) {
	return uint16(p.number(n, path, 16)), true
}

func (p *parser) account(n *yaml.Node, path string) (state.ServiceAccountMatch, bool) {
	o, ok := p.object(n, path, []string{"namespace", "serviceAccount"}, nil)
	if !ok {
		return state.ServiceAccountMatch{}, false
	}
	return state.ServiceAccountMatch{Namespace: o.str("namespace"), ServiceAccount: o.str("serviceAccount")}, true
}

const stringMatchForms = "want !Exact value, !Prefix value, !Suffix value or !Presence [], " +
	"or a mapping with one of Exact, Prefix, Suffix, Presence"

// stringMatch reads both forms: the tag "!Exact v" and the mapping "{Exact: v}"
// that a dump has.
func (p *parser) stringMatch(n *yaml.Node, path string) (state.StringMatch, bool) {
	if n = p.visit(n, path); n == nil {
		return state.StringMatch{}, false
	}
	kind, value := "", n
	switch {
	case n.Kind == yaml.MappingNode && n.ShortTag() == "!!map" && len(n.Content) == 2:
		kind, value = n.Content[0].Value, n.Content[1]
		if value = p.visit(value, path); value == nil {
			return state.StringMatch{}, false
		}
	case n.Tag != "" && n.Tag[0] == '!' && n.Kind != yaml.MappingNode:
		kind = n.Tag[1:]
	}
	kinds := map[string]state.MatchKind{
		"Exact": state.Exact, "Prefix": state.Prefix, "Suffix": state.Suffix, "Presence": state.Presence,
	}
	k, ok := kinds[kind]
	if !ok {
		p.fail(n, path, "got %s, %s", found(n), stringMatchForms)
		return state.StringMatch{}, false
	}
	if k == state.Presence {
		empty := value.Kind == yaml.SequenceNode && len(value.Content) == 0 ||
			value.Kind == yaml.ScalarNode && (value.Value == "" || isNull(value))
		if !empty {
			p.fail(n, path, "got %s for Presence, want []", found(value))
		}
		return state.StringMatch{Kind: k}, empty
	}
	if value != n {
		s, ok := p.str(value, path)
		return state.StringMatch{Kind: k, Value: s}, ok
	}
	if n.Kind != yaml.ScalarNode {
		p.fail(n, path, "got %s for %s, want a string", found(n), kind)
		return state.StringMatch{}, false
	}
	return state.StringMatch{Kind: k, Value: n.Value}, true
}
