package state

import (
	"fmt"
	"net/netip"
	"strings"
)

// The size of the world of the benchmarks: that of a large cluster.
const (
	scaleWorkloads = 100_000
	scaleServices  = 10_000
	scaleEndpoints = scaleWorkloads / scaleServices
)

// padded returns a name of 60 bytes, the longest that a workload has here. Every
// call makes a string of its own, as decoding does.
func padded(format string, args ...any) string {
	s := fmt.Sprintf(format, args...)
	return s + strings.Repeat("x", 60-len(s))
}

func scaleWorkloadIP(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
}

func scaleVIP(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{11, byte(i >> 16), byte(i >> 8), byte(i)})
}

func scaleKey(i int) NamespacedHostname {
	return NamespacedHostname{scaleNamespace(i), fmt.Sprintf("service-%05d.%s.svc.cluster.local", i, scaleNamespace(i))}
}

func scaleNamespace(service int) string { return padded("namespace-%03d-", service%100) }

// scaleWorkload is the workload i of the world; generation makes other UIDs and
// names of it.
func scaleWorkload(i, generation int) WorkloadUpdate {
	service := i / scaleEndpoints
	return WorkloadUpdate{
		Workload: &Workload{
			UID: padded("Kubernetes//Pod/%06d/%d-", i, generation), Name: padded("pod-%06d-%d-", i, generation),
			Namespace: scaleNamespace(service), ServiceAccount: fmt.Sprintf("account-%05d", service),
			TrustDomain: strings.Clone("cluster.local"), Network: strings.Clone("network-1"),
			Node: fmt.Sprintf("node-%04d", i%1000), ClusterID: strings.Clone("Kubernetes"),
			IPs: []netip.Addr{scaleWorkloadIP(i)}, Protocol: HBONE, Capacity: 1,
			WorkloadName: fmt.Sprintf("deployment-%05d", service), WorkloadType: strings.Clone("deployment"),
			CanonicalName: fmt.Sprintf("service-%05d", service), CanonicalRevision: strings.Clone("v1"),
			Locality: Locality{Region: fmt.Sprintf("region-%d", i%3), Zone: fmt.Sprintf("zone-%d", i%9)},
		},
		Endpoints: map[NamespacedHostname][]Port{scaleKey(service): {{80, 8080}, {443, 8443}}},
	}
}

func scaleService(i int) *Service {
	key := scaleKey(i)
	return &Service{
		Name: fmt.Sprintf("service-%05d", i), Namespace: key.Namespace, Hostname: key.Hostname,
		VIPs: []NetworkAddress{{strings.Clone("network-1"), scaleVIP(i)}}, Ports: []Port{{80, 8080}, {443, 8443}},
	}
}

// scaleUpdate is the whole world as one response.
func scaleUpdate(generation int) Update {
	u := Update{Workloads: make([]WorkloadUpdate, 0, scaleWorkloads), Services: make([]*Service, 0, scaleServices)}
	for i := range scaleWorkloads {
		u.Workloads = append(u.Workloads, scaleWorkload(i, generation))
	}
	for i := range scaleServices {
		u.Services = append(u.Services, scaleService(i))
	}
	return u
}

// scaleRemoval names the workloads of a generation.
func scaleRemoval(generation int) []string {
	names := make([]string, 0, scaleWorkloads)
	for i := range scaleWorkloads {
		names = append(names, padded("Kubernetes//Pod/%06d/%d-", i, generation))
	}
	return names
}
