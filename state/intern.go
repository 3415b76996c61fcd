package state

import (
	"cmp"
	"hash/maphash"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// poolSize bounds a pool: it remembers at least that many values that were used
// last, and at most twice as many.
const poolSize = 1 << 14

// pool remembers values, so that equal ones are stored once. What has not been
// asked for in a long time is forgotten, and is stored twice when it comes again;
// hence a pool needs no news of what is still in use, and cannot leak.
type pool[K comparable, V any] struct{ young, old map[K]V }

func (p *pool[K, V]) get(k K) (V, bool) {
	if v, ok := p.young[k]; ok {
		return v, true
	}
	v, ok := p.old[k]
	if ok {
		p.put(k, v)
	}
	return v, ok
}

func (p *pool[K, V]) put(k K, v V) {
	if len(p.young) >= poolSize || p.young == nil {
		p.old, p.young = p.young, map[K]V{}
	}
	p.young[k] = v
}

// account is what an identity is made of.
type account struct{ trustDomain, namespace, serviceAccount string }

// interner makes the objects of a Store share what they have in common: most of
// what a workload consists of is the same in thousands of others. What it returns
// must not be modified. It is not safe for concurrent use.
type interner struct {
	seed     maphash.Seed
	texts    pool[string, string]
	ids      pool[account, []spiffeid.ID]
	gateways pool[GatewayAddress, *GatewayAddress]
	tunnels  pool[ApplicationTunnel, *ApplicationTunnel]
	// Lists by the hash of their elements.
	ports pool[uint64, []Port]
	keys  pool[uint64, []NamespacedHostname]
	names pool[uint64, []string]

	last    [13]string // of each field of the workload before
	scratch []NamespacedHostname
	buf     []byte
}

func newInterner() *interner { return &interner{seed: maphash.MakeSeed()} }

func (in *interner) text(s string) string {
	if s == "" {
		return ""
	}
	if same, ok := in.texts.get(s); ok {
		return same
	}
	s = strings.Clone(s) // what it lay in may be the whole of a response
	in.texts.put(s, s)
	return s
}

// workload replaces what w has in common with others.
func (in *interner) workload(w *Workload) {
	for i, s := range [...]*string{
		&w.Namespace, &w.ServiceAccount, &w.TrustDomain, &w.Network, &w.Node, &w.ClusterID,
		&w.WorkloadName, &w.WorkloadType, &w.CanonicalName, &w.CanonicalRevision,
		&w.Locality.Region, &w.Locality.Zone, &w.Locality.Subzone,
	} {
		// Of most of these, one workload has what the one before it has.
		if *s != in.last[i] {
			in.last[i] = in.text(*s)
		}
		*s = in.last[i]
	}
	w.Waypoint, w.NetworkGateway = in.gateway(w.Waypoint), in.gateway(w.NetworkGateway)
	w.ApplicationTunnel = shared(&in.tunnels, w.ApplicationTunnel)
	w.AuthorizationPolicies = sharedList(in, &in.names, w.AuthorizationPolicies, appendText)
}

func (in *interner) gateway(g *GatewayAddress) *GatewayAddress { return shared(&in.gateways, g) }

func (in *interner) portList(ports []Port) []Port {
	return sharedList(in, &in.ports, ports, func(b []byte, p Port) []byte {
		return append(b, byte(p.Service>>8), byte(p.Service), byte(p.Target>>8), byte(p.Target))
	})
}

// services returns the keys of m in order.
func (in *interner) services(m map[NamespacedHostname][]Port) []NamespacedHostname {
	if len(m) == 0 {
		return nil
	}
	keys := in.scratch[:0]
	for key := range m {
		keys = append(keys, key)
	}
	in.scratch = keys
	slices.SortFunc(keys, func(a, b NamespacedHostname) int {
		return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Hostname, b.Hostname))
	})
	sum, found := listed(in, &in.keys, keys, func(b []byte, k NamespacedHostname) []byte {
		return appendText(appendText(b, k.Namespace), k.Hostname)
	})
	if found != nil {
		return found
	}
	list := make([]NamespacedHostname, len(keys))
	for i, k := range keys {
		list[i] = NamespacedHostname{Namespace: in.text(k.Namespace), Hostname: in.text(k.Hostname)}
	}
	in.keys.put(sum, list)
	return list
}

func appendText(b []byte, s string) []byte { return append(append(b, s...), 0) }

func shared[T comparable](p *pool[T, *T], v *T) *T {
	if v == nil {
		return nil
	}
	if same, ok := p.get(*v); ok {
		return same
	}
	p.put(*v, v)
	return v
}

func sharedList[T comparable](in *interner, p *pool[uint64, []T], list []T, add func([]byte, T) []byte) []T {
	if len(list) == 0 {
		return nil
	}
	sum, found := listed(in, p, list, add)
	if found != nil {
		return found
	}
	list = slices.Clip(list)
	p.put(sum, list)
	return list
}

// listed returns the hash of list, of whose elements add makes bytes, and the list
// that is equal to it, nil if there is none.
func listed[T comparable](in *interner, p *pool[uint64, []T], list []T, add func([]byte, T) []byte) (uint64, []T) {
	in.buf = in.buf[:0]
	for _, v := range list {
		in.buf = add(in.buf, v)
	}
	sum := maphash.Bytes(in.seed, in.buf)
	if found, ok := p.get(sum); ok && slices.Equal(found, list) {
		return sum, found
	}
	return sum, nil
}
