package state

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

// model is a Store written down from spec/state-xds-dns.md §4 with no regard to
// cost: lists in order of insertion, and a scan for each question.
type model struct {
	node      string
	workloads []modelWorkload
	services  []modelService
	staged    map[NamespacedHostname]map[string]Endpoint
}

type modelWorkload struct {
	WorkloadUpdate
	stale bool
}

type modelService struct {
	*Service
	stale     bool
	endpoints map[string]Endpoint
}

func (m *model) service(key NamespacedHostname) *modelService {
	for i := range m.services {
		if m.services[i].Key() == key {
			return &m.services[i]
		}
	}
	return nil
}

func (m *modelService) keeps(h Health) bool {
	return h == Healthy || m.LoadBalancer != nil && m.LoadBalancer.HealthPolicy == AllowAll
}

type modelChange struct {
	key NamespacedHostname
	uid string
	ep  *Endpoint // nil: gone
}

func (m *model) apply(u Update) {
	var changes []modelChange
	removeWorkload := func(uid string) bool {
		i := slices.IndexFunc(m.workloads, func(w modelWorkload) bool { return w.Workload.UID == uid })
		if i < 0 {
			return false
		}
		for key := range m.workloads[i].Endpoints {
			changes = append(changes, modelChange{key, uid, nil})
		}
		m.workloads = slices.Delete(m.workloads, i, i+1)
		return true
	}
	for _, w := range u.Workloads {
		removeWorkload(w.Workload.UID)
		m.workloads = append(m.workloads, modelWorkload{WorkloadUpdate: w})
		for key, ports := range w.Endpoints {
			changes = append(changes, modelChange{key, w.Workload.UID, &Endpoint{WorkloadUID: w.Workload.UID, Ports: SortPorts(ports), Health: w.Workload.Health}})
		}
	}
	for _, svc := range u.Services {
		m.insertService(svc)
	}
	for _, name := range u.Stale {
		if i := slices.IndexFunc(m.workloads, func(w modelWorkload) bool { return w.Workload.UID == name }); i >= 0 {
			m.workloads[i].stale = true
		} else if i := slices.IndexFunc(m.services, func(s modelService) bool { return s.Key().String() == name }); i >= 0 {
			m.services[i].stale = true
		}
	}
	for _, name := range u.Removed {
		if !removeWorkload(name) {
			m.services = slices.DeleteFunc(m.services, func(o modelService) bool { return o.Key().String() == name })
			maps.DeleteFunc(m.staged, func(k NamespacedHostname, _ map[string]Endpoint) bool { return k.String() == name })
		}
	}
	for _, c := range changes {
		m.change(c)
	}
}

// insertService takes over the endpoints that the predecessor has, those that s
// names and the staged ones, as far as s keeps them.
func (m *model) insertService(s *Service) {
	next := modelService{Service: s, endpoints: map[string]Endpoint{}}
	add := func(all map[string]Endpoint) {
		for uid, ep := range all {
			if next.keeps(ep.Health) {
				next.endpoints[uid] = ep
			}
		}
	}
	if old := m.service(s.Key()); old != nil {
		add(old.endpoints)
	}
	for _, ep := range s.Endpoints {
		ep.Ports = SortPorts(ep.Ports)
		add(map[string]Endpoint{ep.WorkloadUID: ep})
	}
	add(m.staged[s.Key()])
	delete(m.staged, s.Key())
	m.services = append(slices.DeleteFunc(m.services, func(o modelService) bool { return o.Key() == s.Key() }), next)
}

func (m *model) change(c modelChange) {
	if svc := m.service(c.key); svc != nil {
		delete(svc.endpoints, c.uid)
		if c.ep != nil && svc.keeps(c.ep.Health) {
			svc.endpoints[c.uid] = *c.ep
		}
		return
	}
	delete(m.staged[c.key], c.uid)
	if c.ep != nil {
		if m.staged[c.key] == nil {
			m.staged[c.key] = map[string]Endpoint{}
		}
		m.staged[c.key][c.uid] = *c.ep
	}
	if len(m.staged[c.key]) == 0 {
		delete(m.staged, c.key)
	}
}

// ranked compares two answers by numbers, the first that differs decides.
func ranked(a, b []int) bool { return slices.Compare(a, b) > 0 }

func bit(b bool) int {
	if b {
		return 1
	}
	return 0
}

// bestWorkload returns the UID of the workload that is better than all others.
func (m *model) bestWorkload(claims func(w *Workload) bool, byUID bool) string {
	best, top := "", []int{}
	for _, w := range m.workloads {
		if !claims(w.Workload) {
			continue
		}
		rank := []int{bit(!w.stale), 2*bit(strings.Contains(w.Workload.UID, "//Pod/")) + bit(w.Workload.Protocol == HBONE)}
		if byUID {
			rank = rank[:1]
		}
		if best == "" || ranked(rank, top) || slices.Equal(rank, top) && (!byUID || w.Workload.UID < best) {
			best, top = w.Workload.UID, rank
		}
	}
	return best
}

// bestService is §4.4 for a hostname or an exact VIP.
func (m *model) bestService(claims func(s *Service) bool, ns string) string {
	best, top := "", []int{}
	for _, s := range m.services {
		near := ns != "" && s.Namespace == ns
		rank := []int{bit(!s.stale), bit(near), bit(s.Canonical)}
		if claims(s.Service) && m.visible(&s, ns) && (best == "" || ranked(rank, top) || slices.Equal(rank, top) && s.Canonical && !near) {
			best, top = s.Key().String(), rank
		}
	}
	return best
}

func (m *model) serviceAt(network string, ip netip.Addr, ns string) string {
	best, top := m.bestService(func(s *Service) bool { return slices.Contains(s.VIPs, NetworkAddress{network, ip}) }, ns), []int{}
	if best != "" {
		return best
	}
	for _, s := range m.services {
		for _, c := range s.CIDRVIPs {
			rank := []int{bit(ns != "" && s.Namespace == ns), c.Prefix.Bits(), bit(!s.stale), bit(s.Canonical)}
			if c.Network == network && c.Prefix.Contains(ip) && m.visible(&s, ns) && (best == "" || ranked(rank, top)) {
				best, top = s.Key().String(), rank
			}
		}
	}
	return best
}

func (m *model) visible(s *modelService, ns string) bool {
	return ns == "" || s.Visibility == PublicVisibility || s.Namespace == ns
}

// modelUpdate draws changes of a small world, so that names and addresses meet.
func modelUpdate(r *rand.Rand) (u Update) {
	c := &choices{make([]byte, 1200)}
	for i := range c.data {
		c.data[i] = byte(r.Uint32())
	}
	for range r.IntN(4) {
		w := c.workload()
		w.Workload.Name, w.Workload.Node = [...]string{"p", "q"}[c.n(2)], [...]string{"here", "there"}[c.n(2)]
		if c.maybe() {
			w.Endpoints = nil
		}
		u.Workloads = append(u.Workloads, w)
	}
	for range r.IntN(4) {
		s := c.service()
		for i := range s.Endpoints {
			s.Endpoints[i].Health = Health(c.n(2))
		}
		if c.maybe() {
			s.VIPs = nil
		}
		for range c.n(3) {
			s.CIDRVIPs = append(s.CIDRVIPs, CIDRAddress{c.network(), netip.PrefixFrom(c.ip(), 24+c.n(9))})
		}
		u.Services = append(u.Services, s)
	}
	for range r.IntN(2) {
		u.Stale = append(u.Stale, c.uid(), c.host().String())
	}
	for range r.IntN(3) {
		u.Removed = append(u.Removed, c.uid(), c.host().String())
	}
	for range r.IntN(3) {
		u.Policies = append(u.Policies, &Policy{Name: fmt.Sprintf("p%d", c.n(4)), Namespace: c.ns(), Scope: PolicyScope(c.n(3)), Action: Action(c.n(2))})
	}
	for range r.IntN(2) {
		u.RemovedPolicies = append(u.RemovedPolicies, c.ns()+fmt.Sprintf("/p%d", c.n(4)))
	}
	return u
}

func (m *model) compare(t *testing.T, s *Store) {
	t.Helper()
	tb := s.now()
	networks, namespaces := []string{"", "far", "nowhere"}, []string{"", "ns", "other", "third"}
	c := &choices{}
	all := []netip.Addr{addr("10.0.0.200"), addr("2001::1"), c.ip()}
	for i := range 5 {
		all = append(all, netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}))
	}
	all = append(all, netip.AddrFrom16([16]byte{0x20, 1, 15: 0}), netip.AddrFrom16([16]byte{0x20, 1, 15: 1}))
	for _, network := range networks {
		for _, ip := range all {
			want := m.bestWorkload(func(w *Workload) bool {
				return w.NetworkMode != HostNetwork && w.Network == network && slices.Contains(w.IPs, ip)
			}, false)
			if got := s.uidAt(network, ip.String()); got != want {
				t.Errorf("workload at %s/%s: %q, want %q", network, ip, got, want)
			}
			for _, ns := range namespaces {
				if got, want := s.vip(network, ip.String(), ns), m.serviceAt(network, ip, ns); got != want {
					t.Errorf("service at %s/%s from %q: %q, want %q", network, ip, ns, got, want)
				}
			}
		}
	}
	for _, hostname := range []string{"a", "b", "way", "nobody"} {
		for _, ns := range namespaces {
			want := m.bestService(func(s *Service) bool { return s.Hostname == hostname }, ns)
			if got := s.host(hostname, ns); got != want {
				t.Errorf("service of %s from %q: %q, want %q", hostname, ns, got, want)
			}
		}
	}
	for _, w := range m.workloads {
		ref := Ref{w.Workload.Namespace, w.Workload.Name, w.Workload.ServiceAccount}
		want := m.bestWorkload(func(o *Workload) bool {
			return (m.node == "" || o.Node == m.node) && Ref{o.Namespace, o.Name, o.ServiceAccount} == ref
		}, false)
		if got, _ := s.Local(ref); uid(got) != want {
			t.Errorf("local %+v: %q, want %q", ref, uid(got), want)
		}
		if key := host(w.Workload.Namespace, w.Workload.Hostname); key.Hostname != "" {
			want := m.bestWorkload(func(o *Workload) bool { return host(o.Namespace, o.Hostname) == key }, true)
			if got := tb.workloadByHost(key.Namespace, key.Hostname); got == nil || got.UID != want {
				t.Errorf("workload of %s: %+v, want %q", key, got, want)
			}
		}
	}
	if len(tb.workloads) != len(m.workloads) || len(tb.services) != len(m.services) || len(tb.staged) != len(m.staged) {
		t.Errorf("%d workloads, %d services, %d staged, want %d, %d, %d",
			len(tb.workloads), len(tb.services), len(tb.staged), len(m.workloads), len(m.services), len(m.staged))
	}
	for i := range m.services {
		sv := &m.services[i]
		compareEndpoints(t, sv.Key(), tb.services[sv.Key()].Endpoints, sv.endpoints)
	}
	for key, eps := range m.staged {
		compareEndpoints(t, key, tb.staged[key], eps)
	}
}

func compareEndpoints(t *testing.T, key NamespacedHostname, got []Endpoint, want map[string]Endpoint) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("endpoints of %s: %+v, want %+v", key, got, want)
	}
	for _, ep := range got {
		w, ok := want[ep.WorkloadUID]
		if !ok || !slices.Equal(ep.Ports, w.Ports) || ep.Health != w.Health {
			t.Errorf("endpoint of %s: %+v, want %+v", key, ep, w)
		}
	}
}

// What a store answers after any updates is what a scan of its content answers;
// and when all has gone again, nothing is left of it.
func TestStoreAgainstModel(t *testing.T) {
	for seed := range uint64(150) {
		r := rand.New(rand.NewPCG(seed, 5))
		m := &model{node: [...]string{"", "here"}[seed%2], staged: map[NamespacedHostname]map[string]Endpoint{}}
		s := New(Config{NodeName: m.node})
		for range 25 {
			u := modelUpdate(r)
			apply(t, s, u)
			m.apply(u)
			s.consistent(t)
			m.compare(t, s)
			if t.Failed() {
				t.Fatalf("seed %d", seed)
			}
		}
		checkEmptied(t, s, r)
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

// checkEmptied removes all in random order and parts.
func checkEmptied(t *testing.T, s *Store, r *rand.Rand) {
	t.Helper()
	tb := s.now()
	names := slices.Collect(maps.Keys(tb.workloads))
	for key := range tb.services {
		names = append(names, key.String())
	}
	slices.Sort(names)
	policies := slices.Sorted(maps.Keys(tb.policies))
	r.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
	for len(names) > 0 {
		n := 1 + r.IntN(len(names))
		apply(t, s, Update{Removed: names[:n]})
		s.consistent(t)
		names = names[n:]
	}
	apply(t, s, Update{RemovedPolicies: policies})
	for _, tb := range []*tables{s.now(), s.idle} {
		if n := len(tb.workloads) + len(tb.local) + len(tb.named) + len(tb.networks) + len(tb.services) + len(tb.hosts) + len(tb.cidrs) +
			len(tb.staged) + len(tb.policies) + len(tb.sets); n != 0 {
			t.Errorf("%d entries are left: %+v", n, tb)
		}
	}
	e := s.edit
	if n := len(e.addresses.many) + len(e.local.many) + len(e.named.many) + len(e.cidrs.many) + len(e.stale) + len(e.foreign); n != 0 {
		t.Errorf("the writer remembers %d things: %+v", n, e)
	}
}
