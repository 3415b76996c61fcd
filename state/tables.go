package state

import (
	"maps"
	"net/netip"
	"sync"

	"github.com/gaissmai/bart"
)

// tables is one of the two copies of the indexes of a Store
// (spec/state-xds-dns.md §4.1). Everything that they lead to is shared by both
// copies and immutable; a list of services may be appended to, which a reader of
// the shorter list does not see. Where several objects claim a key, the one that
// readers get is chosen when the tables are written, as far as it does not depend
// on who asks.
type tables struct {
	readers sync.RWMutex // shared by readers, taken alone by the writer

	workloads map[string]*workload             // by UID
	local     map[Ref]*workload                // those on our node
	named     map[NamespacedHostname]*workload // those with a hostname
	networks  map[string]*network

	services map[NamespacedHostname]*service
	hosts    map[string][]*service // by hostname, in order of insertion
	cidrs    map[cidrScope]*bart.Table[*service]

	// staged are the endpoints of services that are not known yet, sorted by UID.
	staged map[NamespacedHostname][]Endpoint

	policyTable
}

// network holds what is found by an address in one network.
type network struct {
	workloads map[netip.Addr]*workload // no host-network workloads
	vips      map[netip.Addr][]*service
}

// cidrScope is a group of CIDR VIPs, of which the longest that contains an address
// wins. A service stands in that of its namespace, in that of all, and in that of
// the public ones if it is public.
type cidrScope struct {
	network, namespace string // namespace is "" unless kind is ownCIDRs
	kind               cidrKind
}

type cidrKind uint8

const (
	ownCIDRs cidrKind = iota // of one namespace
	publicCIDRs
	allCIDRs
)

type cidrKey struct {
	cidrScope
	prefix netip.Prefix // masked
}

func newTables() *tables {
	return &tables{
		workloads:   map[string]*workload{},
		local:       map[Ref]*workload{},
		named:       map[NamespacedHostname]*workload{},
		networks:    map[string]*network{},
		services:    map[NamespacedHostname]*service{},
		hosts:       map[string][]*service{},
		cidrs:       map[cidrScope]*bart.Table[*service]{},
		staged:      map[NamespacedHostname][]Endpoint{},
		policyTable: newPolicyTable(),
	}
}

// clone returns another copy.
func (t *tables) clone() *tables {
	c := &tables{
		workloads:   maps.Clone(t.workloads),
		local:       maps.Clone(t.local),
		named:       maps.Clone(t.named),
		networks:    make(map[string]*network, len(t.networks)),
		services:    maps.Clone(t.services),
		hosts:       maps.Clone(t.hosts),
		cidrs:       make(map[cidrScope]*bart.Table[*service], len(t.cidrs)),
		staged:      maps.Clone(t.staged),
		policyTable: policyTable{maps.Clone(t.policies), maps.Clone(t.sets)},
	}
	for name, n := range t.networks {
		c.networks[name] = &network{maps.Clone(n.workloads), maps.Clone(n.vips)}
	}
	for scope, cidrs := range t.cidrs {
		c.cidrs[scope] = cidrs.Clone()
	}
	return c
}

// network returns the part of a network, which it makes if need be.
func (t *tables) network(name string) *network {
	n := t.networks[name]
	if n == nil {
		n = &network{workloads: map[netip.Addr]*workload{}, vips: map[netip.Addr][]*service{}}
		t.networks[name] = n
	}
	return n
}

// setWorkloadAt puts w, or nothing, at an address.
func (t *tables) setWorkloadAt(a NetworkAddress, w *workload) {
	n := t.network(a.Network)
	if set(n.workloads, a.Addr, w, w != nil); len(n.workloads)+len(n.vips) == 0 {
		delete(t.networks, a.Network)
	}
}

// setVIP puts list, or nothing, at an address.
func (t *tables) setVIP(a NetworkAddress, list []*service) {
	n := t.network(a.Network)
	if set(n.vips, a.Addr, list, len(list) > 0); len(n.workloads)+len(n.vips) == 0 {
		delete(t.networks, a.Network)
	}
}

// vip returns the services of an exact VIP.
func (t *tables) vip(a NetworkAddress) []*service {
	if n := t.networks[a.Network]; n != nil {
		return n.vips[a.Addr]
	}
	return nil
}

func (t *tables) cidr(k cidrKey) *service {
	if cidrs := t.cidrs[k.cidrScope]; cidrs != nil {
		svc, _ := cidrs.Get(k.prefix)
		return svc
	}
	return nil
}

// setCIDR puts svc, or nothing, in the place of a range.
func (t *tables) setCIDR(k cidrKey, svc *service) {
	cidrs := t.cidrs[k.cidrScope]
	switch {
	case svc != nil && cidrs == nil:
		cidrs = &bart.Table[*service]{}
		t.cidrs[k.cidrScope] = cidrs
		fallthrough
	case svc != nil:
		cidrs.Insert(k.prefix, svc)
	case cidrs != nil:
		if cidrs.Delete(k.prefix); cidrs.Size() == 0 {
			delete(t.cidrs, k.cidrScope)
		}
	}
}

// set stores v, or deletes the key.
func set[K comparable, V any](m map[K]V, k K, v V, ok bool) {
	if ok {
		m[k] = v
	} else {
		delete(m, k)
	}
}

// touched are the keys that an update has edited in one copy of the tables.
type touched struct {
	workloads []string
	local     []Ref
	named     []NamespacedHostname
	addresses []NetworkAddress
	services  []NamespacedHostname
	hosts     []string
	vips      []NetworkAddress
	cidrs     []cidrKey
	staged    []NamespacedHostname
	policies  *policyChange
}

// any tells whether anything was edited.
func (k *touched) any() bool {
	return len(k.workloads)+len(k.local)+len(k.named)+len(k.addresses)+len(k.services)+len(k.hosts)+
		len(k.vips)+len(k.cidrs)+len(k.staged) > 0 || k.policies.accepted
}

// expect makes room for the workloads of a large update, which costs less than
// growing step by step.
func (t *tables) expect(workloads []*workload) {
	if !most(len(workloads), len(t.workloads)) {
		return
	}
	addresses := map[string]int{}
	for _, w := range workloads {
		if w.NetworkMode != HostNetwork {
			addresses[w.Network] += len(w.IPs)
		}
	}
	t.workloads = roomy(t.workloads, len(workloads))
	for name, n := range t.networks {
		n.workloads = roomy(n.workloads, addresses[name])
		delete(addresses, name)
	}
	for name, n := range addresses {
		if n > 0 {
			t.network(name).workloads = make(map[netip.Addr]*workload, n)
		}
	}
}

// roomy returns a copy of m with room for so many entries.
func roomy[K comparable, V any](m map[K]V, n int) map[K]V {
	c := make(map[K]V, max(n, len(m)))
	maps.Copy(c, m)
	return c
}

// compact gives back the room of maps that have lost much of what was put in; maps
// do not shrink by themselves.
func (k *touched) compact(t *tables) {
	t.workloads = compacted(t.workloads, len(k.workloads))
	t.local = compacted(t.local, len(k.local))
	t.named = compacted(t.named, len(k.named))
	t.services = compacted(t.services, len(k.services))
	t.hosts = compacted(t.hosts, len(k.hosts))
	t.staged = compacted(t.staged, len(k.staged))
	for _, n := range t.networks {
		n.workloads = compacted(n.workloads, len(k.addresses))
		n.vips = compacted(n.vips, len(k.vips))
	}
}

// compacted returns m, or a copy of it after so many edits that it may be much
// larger than what is in it.
func compacted[K comparable, V any](m map[K]V, edits int) map[K]V {
	if !most(edits, 2*len(m)) { // what was only put in counts once
		return m
	}
	return roomy(m, 0) // maps.Clone copies the room, too
}

// most tells whether so many edits are worth a look at the whole of a map of size.
func most(edits, size int) bool { return edits >= 1<<12 && edits >= size }

// repeat carries over what stands under the keys to the other copy.
func (k *touched) repeat(from, to *tables) {
	to.workloads = carry(k.workloads, from.workloads, to.workloads)
	to.local = carry(k.local, from.local, to.local)
	to.named = carry(k.named, from.named, to.named)
	copied := k.copyNetworks(from, to)
	for _, a := range k.addresses {
		if !copied[a.Network] {
			to.setWorkloadAt(a, from.workloadAt(a.Network, a.Addr))
		}
	}
	to.services = carry(k.services, from.services, to.services)
	to.hosts = carry(k.hosts, from.hosts, to.hosts)
	for _, a := range k.vips {
		to.setVIP(a, from.vip(a))
	}
	for _, c := range k.cidrs {
		to.setCIDR(c, from.cidr(c))
	}
	to.staged = carry(k.staged, from.staged, to.staged)
	to.apply(k.policies)
}

// copyNetworks carries over the workloads of networks of which most has changed,
// and names these.
func (k *touched) copyNetworks(from, to *tables) map[string]bool {
	copied := map[string]bool{}
	for name, n := range from.networks {
		if most(len(k.addresses), len(n.workloads)) {
			to.network(name).workloads = maps.Clone(n.workloads)
			copied[name] = true
		}
	}
	return copied
}

// carry returns to with what stands in from under keys, or a copy of from, which
// has the same content and costs less where most of it is new.
func carry[K comparable, V any](keys []K, from, to map[K]V) map[K]V {
	if most(len(keys), len(from)) {
		return maps.Clone(from)
	}
	for _, k := range keys {
		v, ok := from[k]
		set(to, k, v, ok)
	}
	return to
}

// claims are the keys that several objects claim, each with all that do in order
// of insertion. Who holds a key that nobody else claims stands in the tables only.
type claims[K, V comparable] struct {
	many map[K][]V
	// beats tells whether v takes the key from holder, which was inserted before.
	beats func(v, holder V) bool
}

func newClaims[K, V comparable](beats func(v, holder V) bool) claims[K, V] {
	return claims[K, V]{many: map[K][]V{}, beats: beats}
}

// add returns who holds k after v, which was not among them, claims it. The zero
// value is nobody.
func (c *claims[K, V]) add(k K, holder, v V) V {
	var nobody V
	if holder == nobody || holder == v {
		return v
	}
	list := c.many[k]
	if list == nil {
		list = []V{holder}
	}
	if list[len(list)-1] != v {
		list = append(list, v)
	}
	c.many[k] = list
	if c.beats(v, holder) {
		return v
	}
	return holder
}

// drop returns who holds k after v has gone.
func (c *claims[K, V]) drop(k K, holder, v V) V {
	list := c.many[k]
	if list == nil {
		var nobody V
		if holder == v {
			return nobody
		}
		return holder
	}
	kept := list[:0]
	for _, o := range list {
		if o != v {
			kept = append(kept, o)
		}
	}
	clear(list[len(kept):])
	c.many[k] = kept
	if len(kept) == 1 {
		if delete(c.many, k); len(c.many) == 0 {
			c.many = map[K][]V{} // the old one keeps the room of all that was in it
		}
		return kept[0]
	}
	if holder == v {
		return c.best(kept)
	}
	return holder
}

// judge returns who holds k, after something has changed of the claimants.
func (c *claims[K, V]) judge(k K, holder V) V {
	if list := c.many[k]; list != nil {
		return c.best(list)
	}
	return holder
}

// swap puts next in the place of old, and returns who holds k then.
func (c *claims[K, V]) swap(k K, holder, old, next V) V {
	list := c.many[k]
	for i := range list {
		if list[i] == old {
			list[i] = next
		}
	}
	if list == nil && holder == old {
		return next
	}
	return c.judge(k, holder)
}

func (c *claims[K, V]) best(list []V) V {
	holder := list[0]
	for _, v := range list[1:] {
		if c.beats(v, holder) {
			holder = v
		}
	}
	return holder
}
