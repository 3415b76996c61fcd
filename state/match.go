package state

import (
	"net/netip"
	"slices"
	"strings"
)

// rule is the truth table of spec/datapath.md §11.3 for one rule of p; a policy
// matches if one of its rules does.
func (p *policy) rule(rule Rule, sub *subject) bool {
	for _, clause := range rule {
		if !p.clause(clause, sub) {
			return false
		}
	}
	return true
}

func (p *policy) clause(clause Clause, sub *subject) bool {
	if len(clause) == 0 {
		return true
	}
	return p.match(clause, sub) >= 0
}

// match returns the number of the first match of clause that holds, -1 if none does.
func (p *policy) match(clause Clause, sub *subject) int {
	for i := range clause {
		if clause[i].matches(sub, p.Action) {
			return i
		}
	}
	return -1
}

func (m *Match) matches(sub *subject, action Action) bool {
	if action == Allow && (m.Unknown || sub.foreign && m.namesAccounts()) {
		return false
	}
	return m.ports(sub) && m.addresses(sub) && m.identity(sub) && !m.empty()
}

// namesAccounts tells whether m speaks of namespaces or service accounts, be it
// to exclude them.
func (m *Match) namesAccounts() bool {
	return len(m.Namespaces)+len(m.NotNamespaces)+len(m.ServiceAccounts)+len(m.NotServiceAccounts) > 0
}

func (m *Match) empty() bool {
	return !m.Unknown &&
		!m.namesAccounts() && len(m.Principals)+len(m.NotPrincipals) == 0 &&
		len(m.SourceIPs)+len(m.NotSourceIPs)+len(m.DestinationIPs)+len(m.NotDestinationIPs) == 0 &&
		len(m.DestinationPorts)+len(m.NotDestinationPorts) == 0
}

func (m *Match) ports(sub *subject) bool {
	return (len(m.DestinationPorts) == 0 || slices.Contains(m.DestinationPorts, sub.port)) &&
		!slices.Contains(m.NotDestinationPorts, sub.port)
}

func (m *Match) addresses(sub *subject) bool {
	return (len(m.SourceIPs) == 0 || contains(m.SourceIPs, sub.src)) && !contains(m.NotSourceIPs, sub.src) &&
		(len(m.DestinationIPs) == 0 || contains(m.DestinationIPs, sub.dst)) && !contains(m.NotDestinationIPs, sub.dst)
}

func (m *Match) identity(sub *subject) bool {
	return (len(m.Namespaces) == 0 || sub.inNamespaces(m.Namespaces)) && !sub.inNamespaces(m.NotNamespaces) &&
		(len(m.ServiceAccounts) == 0 || sub.inAccounts(m.ServiceAccounts)) && !sub.inAccounts(m.NotServiceAccounts) &&
		(len(m.Principals) == 0 || sub.inPrincipals(m.Principals)) && !sub.inPrincipals(m.NotPrincipals)
}

func contains(prefixes []netip.Prefix, ip netip.Addr) bool {
	for _, p := range prefixes {
		if p.Contains(ip) {
			return true
		}
	}
	return false
}

func (sub *subject) inNamespaces(list []StringMatch) bool {
	for i := range list {
		if list[i].matches(sub.namespace, "") {
			return true
		}
	}
	return false
}

func (sub *subject) inAccounts(list []ServiceAccountMatch) bool {
	if sub.account == "" {
		return false
	}
	for i := range list {
		if list[i].Namespace == sub.namespace && list[i].ServiceAccount == sub.account {
			return true
		}
	}
	return false
}

// inPrincipals compares the identity without spiffe://, also as it would read in
// each trust domain that is the same as its own.
func (sub *subject) inPrincipals(list []StringMatch) bool {
	if !sub.identified {
		return false
	}
	for i := range list {
		m := &list[i]
		if m.matches(sub.trustDomain, sub.path) {
			return true
		}
		if sub.ownDomain == "" {
			continue
		}
		if m.matches(sub.ownDomain, sub.path) {
			return true
		}
		for _, alias := range sub.aliases {
			if m.matches(alias, sub.path) {
				return true
			}
		}
	}
	return false
}

// matches compares head+tail without joining them.
func (m *StringMatch) matches(head, tail string) bool {
	v := m.Value
	switch m.Kind {
	case Exact:
		return len(v) == len(head)+len(tail) && v[:len(head)] == head && v[len(head):] == tail
	case Prefix:
		if len(v) <= len(head) {
			return strings.HasPrefix(head, v)
		}
		return v[:len(head)] == head && strings.HasPrefix(tail, v[len(head):])
	case Suffix:
		if len(v) <= len(tail) {
			return strings.HasSuffix(tail, v)
		}
		cut := len(v) - len(tail)
		return v[cut:] == tail && strings.HasSuffix(head, v[:cut])
	case Presence:
		return head != "" || tail != ""
	}
	return false
}
