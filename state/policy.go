package state

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// PolicyScope says to which workloads a policy applies.
type PolicyScope uint8

// Global applies everywhere, Namespace in the namespace of the policy, Selector
// to the workloads that name it.
const (
	PolicyGlobal PolicyScope = iota
	PolicyNamespace
	PolicySelector
)

// String returns the name that dumps use.
func (s PolicyScope) String() string {
	names := [...]string{"Global", "Namespace", "WorkloadSelector"}
	if int(s) < len(names) {
		return names[s]
	}
	return fmt.Sprintf("PolicyScope(%d)", uint8(s))
}

// Action is what a policy does with what it matches.
type Action uint8

// The actions.
const (
	Allow Action = iota
	Deny
)

// String returns the name that dumps use.
func (a Action) String() string {
	if a == Allow {
		return "Allow"
	}
	return "Deny"
}

// Policy is an authorization policy (spec/datapath.md §11). It matches if one of
// its rules does. It is immutable once it is in a Store.
type Policy struct {
	Name, Namespace string
	// ResourceName is the name by which the control plane removes the policy and
	// workloads refer to it; "" means namespace/name, which it is by convention
	// (spec/state-xds-dns.md §1.3).
	ResourceName string
	Scope        PolicyScope
	Action       Action
	Rules        []Rule
	DryRun       bool // only logged
}

// Rule matches if each of its clauses does; without clauses it matches.
type Rule []Clause

// Clause matches if one of its matches does; without matches it matches.
type Clause []Match

// Match matches if each of its attributes does: a positive list if one entry
// fits, a negative one if none does. A Match without attributes never matches.
// Namespaces and service accounts are those of our trust domain and its aliases;
// see IgnoreForeign for the others (decision D18).
type Match struct {
	Namespaces, NotNamespaces             []StringMatch
	ServiceAccounts, NotServiceAccounts   []ServiceAccountMatch
	Principals, NotPrincipals             []StringMatch // without spiffe://
	SourceIPs, NotSourceIPs               []netip.Prefix
	DestinationIPs, NotDestinationIPs     []netip.Prefix
	DestinationPorts, NotDestinationPorts []uint16
	// Unknown says that the control plane sent a condition that we do not know.
	// It holds in a DENY policy and fails in an ALLOW policy (decision D7).
	Unknown bool
}

// MatchKind is how a StringMatch compares.
type MatchKind uint8

// Presence matches every string but the empty one.
const (
	Exact MatchKind = iota
	Prefix
	Suffix
	Presence
)

// StringMatch compares a string; Value is not used by Presence.
type StringMatch struct {
	Kind  MatchKind
	Value string
}

// ServiceAccountMatch compares both parts exactly.
type ServiceAccountMatch struct{ Namespace, ServiceAccount string }

// Key returns the name of the policy among the policies of a Store, by which
// workloads refer to it.
func (p *Policy) Key() string {
	if p.ResourceName != "" {
		return p.ResourceName
	}
	return p.fullName()
}

// fullName is how logs and errors name the policy.
func (p *Policy) fullName() string { return p.Namespace + "/" + p.Name }

// policy is a Policy with what is derived from it once, so that a verdict which
// one policy decides costs no allocation.
type policy struct {
	Policy
	key       string
	tombstone bool // stands for a policy that was rejected
	denied    *Denied
	events    []PolicyEvent
}

func newPolicy(in *Policy) (*policy, error) {
	if in == nil {
		return nil, errors.New("no policy")
	}
	if err := in.check(); err != nil {
		return nil, err
	}
	rules, err := unmapRules(in.Rules)
	if err != nil {
		return nil, err
	}
	name := in.fullName()
	message := "allow policy match"
	if in.Action == Deny {
		message = "deny policy match"
	}
	if in.DryRun {
		message = "dry-run: " + message
	}
	p := &policy{
		Policy: *in,
		key:    in.Key(),
		denied: &Denied{Policy: name},
		events: []PolicyEvent{{Message: message, Policy: name}},
	}
	p.Rules = rules
	return p, nil
}

// newTombstone stands for a rejected policy of which no good version is known
// (decision D7): an ALLOW that matches nothing, or a DENY that matches everything.
// Where it is not known to whom the policy applies, it does to those who name it.
func newTombstone(in *Policy) (*policy, error) {
	if in == nil {
		return nil, errors.New("no policy")
	}
	t := *in
	t.Name = or(t.Name, t.Key()) // what lacks a name is no less in force
	t.Rules = nil
	if t.Scope > PolicySelector || t.Scope == PolicyNamespace && t.Namespace == "" {
		t.Scope = PolicySelector
	}
	if t.Action != Allow {
		t.Action = Deny
		if !t.DryRun {
			t.Rules = []Rule{{}}
		}
	}
	p, err := newPolicy(&t)
	if err != nil {
		return nil, err
	}
	p.tombstone = true
	return p, nil
}

// equal tells whether p and o say the same.
func (p *policy) equal(o *policy) bool {
	return p.key == o.key && p.Name == o.Name && p.Namespace == o.Namespace && p.tombstone == o.tombstone &&
		p.Scope == o.Scope && p.Action == o.Action && p.DryRun == o.DryRun &&
		slices.EqualFunc(p.Rules, o.Rules, func(a, b Rule) bool {
			return slices.EqualFunc(a, b, func(a, b Clause) bool {
				return slices.EqualFunc(a, b, Match.equal)
			})
		})
}

func (m Match) equal(o Match) bool {
	return m.Unknown == o.Unknown &&
		slices.Equal(m.Namespaces, o.Namespaces) && slices.Equal(m.NotNamespaces, o.NotNamespaces) &&
		slices.Equal(m.ServiceAccounts, o.ServiceAccounts) && slices.Equal(m.NotServiceAccounts, o.NotServiceAccounts) &&
		slices.Equal(m.Principals, o.Principals) && slices.Equal(m.NotPrincipals, o.NotPrincipals) &&
		slices.Equal(m.SourceIPs, o.SourceIPs) && slices.Equal(m.NotSourceIPs, o.NotSourceIPs) &&
		slices.Equal(m.DestinationIPs, o.DestinationIPs) && slices.Equal(m.NotDestinationIPs, o.NotDestinationIPs) &&
		slices.Equal(m.DestinationPorts, o.DestinationPorts) && slices.Equal(m.NotDestinationPorts, o.NotDestinationPorts)
}

func (p *Policy) check() error {
	switch {
	case p.Name == "":
		return errors.New("name is empty")
	case p.Scope > PolicySelector:
		return fmt.Errorf("unknown enum: scope %d", p.Scope)
	case p.Action > Deny:
		return fmt.Errorf("unknown enum: action %d", p.Action)
	case p.Scope == PolicyNamespace && p.Namespace == "":
		return errors.New("namespace is empty in a policy of scope Namespace")
	}
	for _, rule := range p.Rules {
		for _, clause := range rule {
			for i := range clause {
				if err := clause[i].check(); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func (m *Match) check() error {
	for _, list := range [...][]StringMatch{m.Namespaces, m.NotNamespaces, m.Principals, m.NotPrincipals} {
		for _, s := range list {
			if s.Kind > Presence {
				return fmt.Errorf("unknown string match %d", s.Kind)
			}
		}
	}
	return nil
}
