package state

import (
	"net/netip"
	"slices"
	"testing"

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

// vip names the service of a VIP as a client in ns sees it.
func (s *Store) vip(network, ip, ns string) string {
	svc := s.tables.serviceAt(network, addr(ip), ns)
	if svc == nil {
		return ""
	}
	return svc.Key().String()
}

func (s *Store) host(hostname, ns string) string {
	svc := s.tables.serviceByHost(hostname, ns)
	if svc == nil {
		return ""
	}
	return svc.Key().String()
}

func (s *Store) endpointUIDs(key NamespacedHostname) []string {
	svc := s.tables.services[key]
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

// consistent checks that every index holds the same objects, and nothing else.
func (s *Store) consistent(t testing.TB) {
	t.Helper()
	tb := s.tables
	if n := len(tb.pending); n != 0 {
		t.Errorf("%d things are left from an update", n)
	}
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
	for vip, list := range tb.vips {
		for _, svc := range list {
			if tb.services[svc.Key()] != svc || !slices.Contains(svc.VIPs, vip) {
				t.Errorf("VIP index: stale %s under %s", svc.Key(), vip)
			}
		}
	}
	for network, list := range tb.cidrs {
		for _, e := range list {
			if tb.services[e.svc.Key()] != e.svc || !slices.Contains(e.svc.CIDRVIPs, CIDRAddress{network, e.prefix}) {
				t.Errorf("CIDR index: stale %s under %s", e.svc.Key(), e.prefix)
			}
		}
	}
	for _, svc := range tb.services {
		for _, vip := range svc.VIPs {
			if !slices.Contains(tb.vips[vip], svc) {
				t.Errorf("VIP index lacks %s under %s", svc.Key(), vip)
			}
		}
		if _, ok := tb.staged[svc.Key()]; ok {
			t.Errorf("endpoints of the known service %s are staged", svc.Key())
		}
	}
	for a, list := range tb.addresses {
		for _, w := range list {
			if tb.workloads[w.UID] != w || !slices.Contains(w.IPs, a.Addr) {
				t.Errorf("address index: stale %s under %s", w.UID, a)
			}
		}
	}
	for _, list := range tb.local {
		for _, w := range list {
			if tb.workloads[w.UID] != w {
				t.Errorf("local index: stale %s", w.UID)
			}
		}
	}
}
