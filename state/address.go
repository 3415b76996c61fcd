package state

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// A Store knows an IPv4 address in one form only: never as IPv6
// (::ffff:10.0.0.1), because netip takes the two for different addresses, and
// one in the wrong form would match nothing. What comes in is converted here;
// what has no other form is refused.

// unmapAddr returns ip in the form of the Store.
func unmapAddr(ip netip.Addr) (netip.Addr, error) {
	switch {
	case !ip.IsValid():
		return ip, errors.New("an address is not valid")
	case ip.Zone() != "":
		return ip, fmt.Errorf("address %s: want one without a zone", ip)
	}
	return ip.Unmap(), nil
}

// unmapPrefix returns p in the form of the Store. Host bits stay as they are.
func unmapPrefix(p netip.Prefix) (netip.Prefix, error) {
	const mapped = 96 // length of ::ffff:0:0/96, which holds all of IPv4
	switch {
	case !p.IsValid():
		return p, errors.New("invalid cidr: the prefix length is too long for the address")
	case !p.Addr().Is4In6():
		return p, nil
	case p.Bits() < mapped:
		return p, fmt.Errorf("invalid cidr: %s: want a length of at least %d for an IPv4-mapped IPv6 address", p, mapped)
	}
	return netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-mapped), nil
}

func unmapNetworkAddress(a NetworkAddress) (_ NetworkAddress, err error) {
	a.Addr, err = unmapAddr(a.Addr)
	return a, err
}

func unmapCIDR(c CIDRAddress) (_ CIDRAddress, err error) {
	c.Prefix, err = unmapPrefix(c.Prefix)
	return c, err
}

// unmapGateway checks a waypoint or network gateway on the way; nil stays nil.
func unmapGateway(what string, g *GatewayAddress) (*GatewayAddress, error) {
	switch {
	case g == nil:
		return nil, nil
	case !g.Address.Addr.IsValid() && g.Hostname.Hostname == "":
		return nil, fmt.Errorf("nonempty gateway address is missing address: %s", what)
	case !g.Address.Addr.IsValid():
		return g, nil
	}
	ip, err := unmapAddr(g.Address.Addr)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	if ip == g.Address.Addr {
		return g, nil
	}
	unmapped := *g
	unmapped.Address.Addr = ip
	return &unmapped, nil
}

func unmapWeighted(w WeightedWaypoint) (WeightedWaypoint, error) {
	g, err := unmapGateway("destination", &w.Destination)
	if err != nil {
		return w, err
	}
	w.Destination = *g
	return w, nil
}

// unmapAll applies unmap to each element. The argument belongs to the caller and
// is not modified; it is returned if there is nothing to change.
func unmapAll[T comparable](what string, list []T, unmap func(T) (T, error)) ([]T, error) {
	out, cloned := list, false
	for i, v := range list {
		u, err := unmap(v)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", what, err)
		}
		if u == v {
			continue
		}
		if !cloned {
			out, cloned = slices.Clone(list), true
		}
		out[i] = u
	}
	return out, nil
}

// unmapRules returns a copy of rules, the parts of which lie in few pieces of
// memory because there may be very many of them.
func unmapRules(rules []Rule) ([]Rule, error) {
	clauses, matches := 0, 0
	for _, rule := range rules {
		clauses += len(rule)
		for _, clause := range rule {
			matches += len(clause)
		}
	}
	out := make([]Rule, len(rules))
	allClauses, allMatches := make([]Clause, clauses), make([]Match, matches)
	for r, rule := range rules {
		out[r], allClauses = allClauses[:len(rule):len(rule)], allClauses[len(rule):]
		for c, clause := range rule {
			copied := allMatches[:copy(allMatches, clause):len(clause)]
			allMatches = allMatches[len(clause):]
			for m := range copied {
				if err := copied[m].unmap(); err != nil {
					return nil, err
				}
			}
			out[r][c] = copied
		}
	}
	return out, nil
}

func (m *Match) unmap() error {
	for _, f := range [...]struct {
		name string
		list *[]netip.Prefix
	}{
		{"source IPs", &m.SourceIPs},
		{"not source IPs", &m.NotSourceIPs},
		{"destination IPs", &m.DestinationIPs},
		{"not destination IPs", &m.NotDestinationIPs},
	} {
		list, err := unmapAll(f.name, *f.list, unmapPrefix)
		if err != nil {
			return err
		}
		*f.list = list
	}
	return nil
}
