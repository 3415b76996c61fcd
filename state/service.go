package state

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Port maps a port of a service to the port of its endpoints; a Target of 0 on
// a service means that each endpoint has a port of its own.
type Port struct{ Service, Target uint16 }

// Endpoint is the membership of a workload in a service.
type Endpoint struct {
	WorkloadUID string
	Ports       []Port // sorted by Service, no duplicates
	Health      Health
	// workload is that of WorkloadUID in the tables in which the service stands,
	// nil if it is not known.
	workload *workload
}

// CIDRAddress is a range of addresses in one network. Host bits may be set; they
// do not matter.
type CIDRAddress struct {
	Network string
	Prefix  netip.Prefix
}

// WeightedWaypoint is one of several waypoints among which connections are spread.
type WeightedWaypoint struct {
	Destination GatewayAddress
	Weight      uint32
}

// Scope is a part of a locality that a routing preference compares.
type Scope uint8

// The scopes. The zero value is none of them.
const (
	ScopeRegion Scope = iota + 1
	ScopeZone
	ScopeSubzone
	ScopeNode
	ScopeCluster
	ScopeNetwork
)

// String returns the name that dumps use.
func (s Scope) String() string {
	names := [...]string{"", "Region", "Zone", "Subzone", "Node", "Cluster", "Network"}
	if int(s) < len(names) && s != 0 {
		return names[s]
	}
	return fmt.Sprintf("Scope(%d)", uint8(s))
}

// LoadBalancerMode is how preferences select endpoints.
type LoadBalancerMode uint8

// Any takes every endpoint, Strict those that match every preference, Failover
// those that match the most; Passthrough sends traffic where it was addressed.
const (
	LoadBalanceAny LoadBalancerMode = iota
	LoadBalanceStrict
	LoadBalanceFailover
	LoadBalancePassthrough
)

// String returns the name that dumps use.
func (m LoadBalancerMode) String() string {
	names := [...]string{"Standard", "Strict", "Failover", "Passthrough"}
	if int(m) < len(names) {
		return names[m]
	}
	return fmt.Sprintf("LoadBalancerMode(%d)", uint8(m))
}

// HealthPolicy says which endpoints a service keeps.
type HealthPolicy uint8

// The health policies. Endpoints are judged when they are stored, not when one
// is picked.
const (
	OnlyHealthy HealthPolicy = iota
	AllowAll
)

// String returns the name that dumps use.
func (p HealthPolicy) String() string {
	if p == AllowAll {
		return "AllowAll"
	}
	return "OnlyHealthy"
}

// LoadBalancer is how a service spreads connections.
type LoadBalancer struct {
	Preferences  []Scope // in order of importance
	Mode         LoadBalancerMode
	HealthPolicy HealthPolicy
}

// IPFamilies restricts the addresses by which a service reaches its endpoints.
type IPFamilies uint8

// AnyFamily is the zero value: no restriction, and nothing in a dump.
const (
	AnyFamily IPFamilies = iota
	DualFamily
	IPv4Only
	IPv6Only
)

// String returns the name that dumps use.
func (f IPFamilies) String() string {
	names := [...]string{"", "Dual", "IPv4", "IPv6"}
	if int(f) < len(names) {
		return names[f]
	}
	return fmt.Sprintf("IPFamilies(%d)", uint8(f))
}

func (f IPFamilies) allow(ip netip.Addr) bool {
	switch f {
	case IPv4Only:
		return ip.Is4()
	case IPv6Only:
		return !ip.Is4()
	}
	return true
}

// Visibility says which namespaces may use a service.
type Visibility uint8

// A service of NamespaceVisibility exists for its own namespace only.
const (
	PublicVisibility Visibility = iota
	NamespaceVisibility
)

// String returns the name that dumps use.
func (v Visibility) String() string {
	if v == NamespaceVisibility {
		return "Namespace"
	}
	return "Public"
}

// Service is a name and addresses for a set of workloads. It is immutable once
// it is in a Store.
type Service struct {
	Name, Namespace, Hostname string
	VIPs                      []NetworkAddress
	CIDRVIPs                  []CIDRAddress
	Ports                     []Port // sorted by Service, no duplicates
	// Endpoints are sorted by UID. In an update they come in addition to those
	// that the Store knows from workloads.
	Endpoints         []Endpoint
	SubjectAltNames   []string // further SPIFFE IDs that endpoints may present
	Waypoint          *GatewayAddress
	WeightedWaypoints []WeightedWaypoint // take the place of Waypoint
	LoadBalancer      *LoadBalancer
	IPFamilies        IPFamilies
	Canonical         bool // wins a hostname or VIP that several services claim
	Visibility        Visibility
}

// Key returns the name of the service among the services of a Store.
func (s *Service) Key() NamespacedHostname {
	return NamespacedHostname{Namespace: s.Namespace, Hostname: s.Hostname}
}

// service is a Service with what is derived from it once.
type service struct {
	Service
	ref     ServiceRef
	sans    []spiffeid.ID // of SubjectAltNames, with aliases; those that are no SPIFFE ID are left out
	stale   bool          // the control plane may have given it up (Update.Stale)
	foreign []string      // UIDs of endpoints whose workloads do not list the service, or are not known
}

func (s *Store) newService(in *Service, pool *interner) (*service, error) {
	if in == nil {
		return nil, errors.New("no service")
	}
	if in.Hostname == "" {
		return nil, errors.New("hostname is empty")
	}
	svc := &service{Service: *in}
	if err := svc.unmap(); err != nil {
		return nil, err
	}
	if svc.IPFamilies > IPv6Only {
		return nil, fmt.Errorf("unknown enum: IP families %d", svc.IPFamilies)
	}
	if err := svc.LoadBalancer.check(); err != nil {
		return nil, err
	}
	svc.Namespace, svc.Hostname = pool.text(svc.Namespace), pool.text(svc.Hostname)
	svc.ref = ServiceRef{Hostname: svc.Hostname, Name: svc.Name, Namespace: svc.Namespace}
	svc.Ports = pool.portList(SortPorts(svc.Ports))
	svc.Waypoint = pool.gateway(svc.Waypoint)
	for _, san := range svc.SubjectAltNames {
		if id, err := spiffeid.FromString(san); err == nil {
			svc.sans = append(svc.sans, s.withAliases(id)...)
		}
	}
	return svc, nil
}

// unmap brings the addresses of s into the form of the Store.
func (s *service) unmap() error {
	var vipErr, cidrErr, waypointErr, weightedErr error
	s.VIPs, vipErr = unmapAll("VIPs", s.VIPs, unmapNetworkAddress)
	s.CIDRVIPs, cidrErr = unmapAll("CIDR VIPs", s.CIDRVIPs, unmapCIDR)
	s.Waypoint, waypointErr = unmapGateway("waypoint", s.Waypoint)
	s.WeightedWaypoints, weightedErr = unmapAll("weighted waypoints", s.WeightedWaypoints, unmapWeighted)
	return errors.Join(vipErr, cidrErr, waypointErr, weightedErr)
}

func (lb *LoadBalancer) check() error {
	if lb == nil {
		return nil
	}
	if lb.Mode > LoadBalancePassthrough {
		return fmt.Errorf("unknown enum: load balancer mode %d", lb.Mode)
	}
	if lb.HealthPolicy > AllowAll {
		return fmt.Errorf("unknown enum: health policy %d", lb.HealthPolicy)
	}
	for _, p := range lb.Preferences {
		if p < ScopeRegion || p > ScopeNetwork {
			return fmt.Errorf("unknown enum: routing preference %d", p)
		}
	}
	return nil
}

// SortPorts returns ports sorted by service port; of several entries for one
// port the last is kept. The argument is not modified; it is returned if there is
// nothing to change.
func SortPorts(ports []Port) []Port {
	inOrder := true
	for i := 1; i < len(ports); i++ {
		inOrder = inOrder && ports[i-1].Service < ports[i].Service
	}
	if inOrder {
		return ports
	}
	sorted := slices.Clone(ports)
	slices.SortStableFunc(sorted, func(a, b Port) int { return cmp.Compare(a.Service, b.Service) })
	out := sorted[:0]
	for i, p := range sorted {
		if i+1 < len(sorted) && sorted[i+1].Service == p.Service {
			continue
		}
		out = append(out, p)
	}
	return out
}

// target returns the target of a service port and whether it is mapped at all.
func target(ports []Port, port uint16) (uint16, bool) {
	i, ok := slices.BinarySearchFunc(ports, port, func(p Port, port uint16) int { return cmp.Compare(p.Service, port) })
	if !ok {
		return 0, false
	}
	return ports[i].Target, true
}

func (s *service) passthrough() bool {
	return s.LoadBalancer != nil && s.LoadBalancer.Mode == LoadBalancePassthrough
}

// keeps tells whether an endpoint of that health is stored.
func (s *service) keeps(h Health) bool {
	return h == Healthy || s.LoadBalancer != nil && s.LoadBalancer.HealthPolicy == AllowAll
}

// visible tells whether a client in namespace ns may use s; "" is a caller that
// stands in no namespace and sees everything.
func (s *service) visible(ns string) bool {
	return ns == "" || s.Visibility != NamespaceVisibility || s.Namespace == ns
}

func (s *service) endpoint(uid string) *Endpoint {
	i, ok := slices.BinarySearchFunc(s.Endpoints, uid, compareEndpoint)
	if !ok {
		return nil
	}
	return &s.Endpoints[i]
}

func compareEndpoint(e Endpoint, uid string) int { return strings.Compare(e.WorkloadUID, uid) }
