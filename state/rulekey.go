package state

import (
	"encoding/binary"
	"hash/maphash"
	"net/netip"
	"strings"
)

// A rule matches only if each of its clauses does, a clause only if one of its
// matches does, and a match only if an entry of each of its positive lists fits.
// Hence a connection that fits none of the entries of one list of each match of
// one clause does not match the rule. Those entries are the keys of the rule.

// keyKind says what of a connection a key is compared with.
type keyKind uint8

const (
	// pathKey is the path of an identity of any trust domain: of exact principals,
	// and of service accounts, which are principals of ours.
	pathKey keyKind = iota
	// pathNamespaceKey is the namespace in such a path: of principals that begin
	// with <trust domain>/ns/<namespace>/.
	pathNamespaceKey
	namespaceKey
	portKey
	sourceKey
	destinationKey
)

// keyForm tells how the hash of a key is made. Addresses are looked up once for
// each length of prefix: bits is that in the IPv6 form, 0 for what is no address.
type keyForm struct {
	kind keyKind
	bits uint8
}

type ruleKey struct {
	form keyForm
	hash uint64
}

// hashSeed is one for all, so that hashes of one index are those of the next.
var hashSeed = maphash.MakeSeed()

// ofString flips the topmost bits by the kind, so that kinds do not share hashes.
func (f keyForm) ofString(s string) uint64 {
	return maphash.String(hashSeed, s) ^ uint64(f.kind)<<60
}

func (f keyForm) ofPort(p uint16) uint64 {
	b := [...]byte{byte(f.kind), byte(p >> 8), byte(p)}
	return maphash.Bytes(hashSeed, b[:])
}

// ofAddr takes the bits that the prefix has.
func (f keyForm) ofAddr(ip netip.Addr) uint64 {
	a := ip.As16()
	hi, lo := binary.BigEndian.Uint64(a[:8]), binary.BigEndian.Uint64(a[8:])
	if f.bits <= 64 {
		hi, lo = hi&^(^uint64(0)>>f.bits), 0
	} else {
		lo &^= ^uint64(0) >> (f.bits - 64)
	}
	b := [18]byte{byte(f.kind), f.bits}
	binary.BigEndian.PutUint64(b[2:], hi)
	binary.BigEndian.PutUint64(b[10:], lo)
	return maphash.Bytes(hashSeed, b[:])
}

// of returns the hash of what sub has of the form, false if it has nothing.
func (f keyForm) of(sub *subject) (hash uint64, ok bool) {
	switch f.kind {
	case pathKey:
		return f.ofString(sub.path), sub.identified
	case pathNamespaceKey:
		ns, ok := pathNamespace(sub.path)
		return f.ofString(ns), ok
	case namespaceKey:
		return f.ofString(sub.namespace), true
	case portKey:
		return f.ofPort(sub.port), true
	case sourceKey:
		return f.ofSubjectAddr(sub.src)
	default:
		return f.ofSubjectAddr(sub.dst)
	}
}

func (f keyForm) ofSubjectAddr(ip netip.Addr) (hash uint64, ok bool) {
	if !ip.IsValid() || ip.Is4() && f.bits < ipv4Bits {
		return 0, false
	}
	return f.ofAddr(ip), true
}

// ipv4Bits is the length of the prefix of all IPv4 addresses in their IPv6 form.
const ipv4Bits = 96

// pathNamespace reads /ns/<namespace>/ at the start of a path.
func pathNamespace(path string) (ns string, ok bool) {
	rest, ok := strings.CutPrefix(path, "/ns/")
	if !ok {
		return "", false
	}
	ns, _, ok = strings.Cut(rest, "/")
	return ns, ok
}

// keys appends the keys of a rule to buf, none if the rule never matches. It
// returns false if any connection may match, for which there are no keys.
func (p *policy) keys(rule Rule, buf []ruleKey) ([]ruleKey, bool) {
	var best Clause
	least, found := 0, false
	for _, clause := range rule {
		if cost, ok := p.clauseCost(clause); ok && (!found || cost < least) {
			best, least, found = clause, cost, true
		}
	}
	for i := range best {
		if m := &best[i]; !m.never(p.Action) {
			buf = m.keys(buf)
		}
	}
	return buf, found
}

// clauseCost returns false for a clause that has a match without keys.
func (p *policy) clauseCost(clause Clause) (cost int, ok bool) {
	for i := range clause {
		if clause[i].never(p.Action) {
			continue
		}
		_, c := clause[i].keyAttribute()
		if c == 0 {
			return 0, false
		}
		cost += c
	}
	return cost, len(clause) > 0
}

// never tells whether m matches nothing, whatever its lists say.
func (m *Match) never(action Action) bool { return m.empty() || action == Allow && m.Unknown }

// attribute is a positive list of a Match.
type attribute uint8

const (
	principalsAttribute attribute = iota
	accountsAttribute
	namespacesAttribute
	portsAttribute
	sourcesAttribute
	destinationsAttribute
)

// keyAttribute picks the list of m whose keys cost least. It returns 0 if no list
// has keys.
func (m *Match) keyAttribute() (picked attribute, cost int) {
	for a, c := range [...]int{
		principalsAttribute:   principalsCost(m.Principals),
		accountsAttribute:     len(m.ServiceAccounts),
		namespacesAttribute:   namespacesCost(m.Namespaces),
		portsAttribute:        len(m.DestinationPorts) * portCost,
		sourcesAttribute:      prefixesCost(m.SourceIPs),
		destinationsAttribute: prefixesCost(m.DestinationIPs),
	} {
		if c > 0 && (cost == 0 || c < cost) {
			picked, cost = attribute(a), c
		}
	}
	return picked, cost
}

// Costs of a key, by rule of thumb: how often it is met by connections that do
// not match. One path or address costs 1; a list of which an entry has no key
// costs 0, as an empty one does.
const (
	namespaceCost = 1 << 4
	portCost      = 1 << 8
)

func principalsCost(list []StringMatch) (cost int) {
	for i := range list {
		switch form, _, ok := list[i].principalKey(); {
		case !ok:
			return 0
		case form.kind == pathNamespaceKey:
			cost += namespaceCost
		default:
			cost++
		}
	}
	return cost
}

func namespacesCost(list []StringMatch) int {
	for i := range list {
		if list[i].Kind != Exact {
			return 0
		}
	}
	return len(list) * namespaceCost
}

// prefixesCost doubles the cost of an address with every two bits that an IPv4
// prefix lacks, or eight that an IPv6 prefix does.
func prefixesCost(list []netip.Prefix) (cost int) {
	for _, p := range list {
		free := p.Addr().BitLen() - p.Bits()
		if p.Addr().Is6() {
			free /= 4
		}
		cost += 1 << (free / 2)
	}
	return cost
}

// keys appends the keys of the list that keyAttribute picks.
func (m *Match) keys(buf []ruleKey) []ruleKey {
	add := func(form keyForm, hash uint64) { buf = append(buf, ruleKey{form, hash}) }
	addPrefixes := func(kind keyKind, list []netip.Prefix) {
		for _, p := range list {
			form := keyForm{kind, uint8(p.Bits())}
			if p.Addr().Is4() {
				form.bits += ipv4Bits
			}
			add(form, form.ofAddr(p.Addr()))
		}
	}
	switch picked, _ := m.keyAttribute(); picked {
	case principalsAttribute:
		for i := range m.Principals {
			form, s, _ := m.Principals[i].principalKey()
			add(form, form.ofString(s))
		}
	case accountsAttribute:
		form := keyForm{kind: pathKey}
		for _, a := range m.ServiceAccounts {
			add(form, form.ofString("/ns/"+a.Namespace+"/sa/"+a.ServiceAccount))
		}
	case namespacesAttribute:
		form := keyForm{kind: namespaceKey}
		for _, ns := range m.Namespaces {
			add(form, form.ofString(ns.Value))
		}
	case portsAttribute:
		form := keyForm{kind: portKey}
		for _, port := range m.DestinationPorts {
			add(form, form.ofPort(port))
		}
	case sourcesAttribute:
		addPrefixes(sourceKey, m.SourceIPs)
	case destinationsAttribute:
		addPrefixes(destinationKey, m.DestinationIPs)
	}
	return buf
}

// principalKey is the key of a principal, the first slash of which ends the trust
// domain. It returns false for one that has none.
func (m *StringMatch) principalKey() (form keyForm, s string, ok bool) {
	path := ""
	if i := strings.IndexByte(m.Value, '/'); i >= 0 {
		path = m.Value[i:]
	}
	switch m.Kind {
	case Exact:
		return keyForm{kind: pathKey}, path, true
	case Prefix:
		ns, ok := pathNamespace(path)
		return keyForm{kind: pathNamespaceKey}, ns, ok
	}
	return keyForm{}, "", false
}
