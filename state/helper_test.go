package state

import (
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"testing"

	"github.com/gaissmai/bart"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func addr(s string) netip.Addr         { return netip.MustParseAddr(s) }
func addrPort(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func host(ns, hostname string) NamespacedHostname {
	return NamespacedHostname{Namespace: ns, Hostname: hostname}
}

func apply(t testing.TB, s *Store, u Update) {
	t.Helper()
	if err := s.Apply(u); err != nil {
		t.Fatal(err)
	}
}

// member is a workload with the ports of its services.
func member(w Workload, services map[NamespacedHostname][]Port) WorkloadUpdate {
	if w.Namespace == "" {
		w.Namespace = "ns"
	}
	if w.Capacity == 0 {
		w.Capacity = 1
	}
	return WorkloadUpdate{Workload: &w, Endpoints: services}
}

func (s *Store) uidAt(network, ip string) string {
	w, ok := s.Workload(network, addr(ip))
	if !ok {
		return ""
	}
	return w.UID
}

// pick chooses an endpoint of a service.
func (s *Store) pick(key NamespacedHostname, q *Query, port uint16, mode portMode) (*workload, uint16) {
	t := s.read()
	defer s.release(t)
	p := picker{t: t, q: q, svc: t.service(key), port: port, mode: mode}
	return p.pick()
}

// vip names the service of a VIP as a client in ns sees it.
func (s *Store) vip(network, ip, ns string) string {
	svc := s.now().serviceAt(network, addr(ip), ns)
	if svc == nil {
		return ""
	}
	return svc.Key().String()
}

func (s *Store) host(hostname, ns string) string {
	svc := s.now().serviceByHost(hostname, ns)
	if svc == nil {
		return ""
	}
	return svc.Key().String()
}

func (s *Store) endpointUIDs(key NamespacedHostname) []string {
	svc := s.now().services[key]
	if svc == nil {
		return nil
	}
	uids := []string{}
	for _, ep := range svc.Endpoints {
		uids = append(uids, ep.WorkloadUID)
	}
	return uids
}

func spiffe(t testing.TB, s string) spiffeid.ID {
	t.Helper()
	id, err := spiffeid.FromString(s)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// now returns the tables of a store that nobody writes.
func (s *Store) now() *tables { return s.active.Load() }

func (t *tables) countAddresses() (n int) {
	for _, net := range t.networks {
		n += len(net.workloads)
	}
	return n
}

func (t *tables) countVIPs() (n int) {
	for _, net := range t.networks {
		n += len(net.vips)
	}
	return n
}

// consistent checks that both copies are equal, and that every index holds the
// same objects, and nothing else.
func (s *Store) consistent(t testing.TB) {
	t.Helper()
	if n := len(s.edit.pending) + len(s.edit.order) + len(s.edit.scratch); n != 0 {
		t.Errorf("%d things are left from an update", n)
	}
	if !reflect.DeepEqual(s.edit.touched, touched{}) {
		t.Errorf("keys are left from an update: %+v", s.edit.touched)
	}
	s.now().equals(t, s.idle)
	s.now().consistentServices(t)
	s.now().consistentRanges(t)
	s.now().consistentWorkloads(t)
	s.leftovers(t)
}

// equals checks that both copies lead to the same objects.
func (t *tables) equals(tb testing.TB, o *tables) {
	tb.Helper()
	same := maps.Equal(t.workloads, o.workloads) && maps.Equal(t.local, o.local) && maps.Equal(t.named, o.named) &&
		maps.Equal(t.services, o.services) && maps.EqualFunc(t.hosts, o.hosts, slices.Equal[[]*service]) &&
		maps.Equal(t.policies, o.policies) && maps.Equal(t.sets, o.sets) &&
		maps.EqualFunc(t.networks, o.networks, func(a, b *network) bool {
			return maps.Equal(a.workloads, b.workloads) && maps.EqualFunc(a.vips, b.vips, slices.Equal[[]*service])
		}) &&
		maps.EqualFunc(t.cidrs, o.cidrs, func(a, b *bart.Table[*service]) bool { return a.Equal(b) }) &&
		reflect.DeepEqual(slices.Sorted(maps.Keys(t.sortedStaged())), slices.Sorted(maps.Keys(o.sortedStaged())))
	if !same {
		tb.Errorf("the copies differ:\n%+v\n%+v", t, o)
	}
}

// sortedStaged names every staged endpoint.
func (t *tables) sortedStaged() map[string]bool {
	m := map[string]bool{}
	for key, eps := range t.staged {
		for _, ep := range eps {
			m[fmt.Sprintf("%s %+v", key, ep)] = true
		}
	}
	return m
}

func (tb *tables) consistentServices(t testing.TB) {
	t.Helper()
	hosts := 0
	for name, list := range tb.hosts {
		for _, svc := range list {
			hosts++
			if tb.services[svc.Key()] != svc || svc.Hostname != name {
				t.Errorf("host index: stale %s under %s", svc.Key(), name)
			}
		}
	}
	if hosts != len(tb.services) {
		t.Errorf("%d services by host, %d by key", hosts, len(tb.services))
	}
	for name, n := range tb.networks {
		if len(n.vips)+len(n.workloads) == 0 {
			t.Errorf("network %q is empty", name)
		}
		for ip, list := range n.vips {
			for _, svc := range list {
				if tb.services[svc.Key()] != svc || !slices.Contains(svc.VIPs, NetworkAddress{name, ip}) {
					t.Errorf("VIP index: stale %s under %s/%s", svc.Key(), name, ip)
				}
			}
		}
	}
	for _, svc := range tb.services {
		for _, vip := range svc.VIPs {
			if !slices.Contains(tb.vip(vip), svc) {
				t.Errorf("VIP index lacks %s under %s", svc.Key(), vip)
			}
		}
		if _, ok := tb.staged[svc.Key()]; ok {
			t.Errorf("endpoints of the known service %s are staged", svc.Key())
		}
		if !slices.IsSortedFunc(svc.Endpoints, func(a, b Endpoint) int { return compareEndpoint(a, b.WorkloadUID) }) {
			t.Errorf("endpoints of %s are not sorted", svc.Key())
		}
		for i := range svc.Endpoints {
			if ep := &svc.Endpoints[i]; tb.endpointWorkload(ep) != tb.workloads[ep.WorkloadUID] {
				t.Errorf("%s has an endpoint that leads to another workload than %s", svc.Key(), ep.WorkloadUID)
			}
		}
	}
}

func (tb *tables) consistentRanges(t testing.TB) {
	t.Helper()
	for scope, list := range tb.cidrs {
		for prefix, svc := range list.All() {
			claimed := slices.ContainsFunc(svc.CIDRVIPs, func(c CIDRAddress) bool {
				return c.Network == scope.network && c.Prefix.Masked() == prefix
			})
			if tb.services[svc.Key()] != svc || !claimed {
				t.Errorf("CIDR index: stale %s under %s", svc.Key(), prefix)
			}
		}
	}
	for _, svc := range tb.services {
		svc.eachCIDR(func(k cidrKey) {
			if tb.cidr(k) == nil {
				t.Errorf("CIDR index lacks %s under %+v", svc.Key(), k)
			}
		})
	}
}

func (tb *tables) consistentWorkloads(t testing.TB) {
	t.Helper()
	for name, n := range tb.networks {
		for ip, w := range n.workloads {
			if tb.workloads[w.UID] != w || w.Network != name || !slices.Contains(w.IPs, ip) {
				t.Errorf("address index: stale %s under %s/%s", w.UID, name, ip)
			}
		}
	}
	for _, w := range tb.local {
		if tb.workloads[w.UID] != w {
			t.Errorf("local index: stale %s", w.UID)
		}
	}
	for key, w := range tb.named {
		if tb.workloads[w.UID] != w || w.hostKey() != key {
			t.Errorf("hostname index: stale %s", w.UID)
		}
	}
	for _, w := range tb.workloads {
		for _, ip := range w.IPs {
			if w.NetworkMode != HostNetwork && tb.workloadAt(w.Network, ip) == nil {
				t.Errorf("address index lacks %s", w.UID)
			}
		}
		if w.Hostname != "" && tb.named[w.hostKey()] == nil {
			t.Errorf("hostname index lacks %s", w.UID)
		}
	}
}

// leftovers checks that the writer remembers nothing of what is gone.
func (s *Store) leftovers(t testing.TB) {
	t.Helper()
	tb := s.now()
	for a, list := range s.edit.addresses.many {
		for _, w := range list {
			if len(list) < 2 || tb.workloads[w.UID] != w || !slices.Contains(w.IPs, a.Addr) {
				t.Errorf("claims of %s: %s of %d", a, w.UID, len(list))
			}
		}
	}
	for k, list := range s.edit.cidrs.many {
		for _, svc := range list {
			if len(list) < 2 || tb.services[svc.Key()] != svc {
				t.Errorf("claims of %s: %s of %d", k.prefix, svc.Key(), len(list))
			}
		}
	}
	for uid := range s.edit.stale {
		if tb.workloads[uid] == nil {
			t.Errorf("the unknown workload %s is stale", uid)
		}
	}
	for uid, keys := range s.edit.foreign {
		for _, key := range keys {
			if svc := tb.services[key]; svc == nil || !slices.Contains(svc.foreign, uid) || svc.endpoint(uid) == nil {
				t.Errorf("%s is noted as a foreign endpoint of %s", uid, key)
			}
		}
	}
}
