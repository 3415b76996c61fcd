package state

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// Dump is the state part of config_dump (spec/state-xds-dns.md §7). Its JSON has
// sorted keys; encode it without HTML escaping.
type Dump struct {
	Policies       []PolicyDump                       `json:"policies"`
	Services       []ServiceDump                      `json:"services"`
	StagedServices map[string]map[string]EndpointDump `json:"stagedServices"`
	Workloads      []WorkloadDump                     `json:"workloads"`
}

// StaticConfig is the staticConfig of config_dump: a local file as it was read.
type StaticConfig struct {
	Policies  []PolicyDump         `json:"policies"`
	Services  []ServiceDump        `json:"services"`
	Workloads []StaticWorkloadDump `json:"workloads"`
}

// WorkloadDump renders a Workload.
type WorkloadDump struct {
	workloadHead
	Services []string `json:"services,omitempty"`
	workloadTail
}

// StaticWorkloadDump renders a workload of a local file, which tells its ports.
type StaticWorkloadDump struct {
	workloadHead
	Services map[string]map[uint16]uint16 `json:"services"`
	workloadTail
}

// workloadHead are the keys before "services".
type workloadHead struct {
	ApplicationTunnel     *tunnelDump   `json:"applicationTunnel,omitempty"`
	AuthorizationPolicies []string      `json:"authorizationPolicies,omitempty"`
	CanonicalName         string        `json:"canonicalName,omitempty"`
	CanonicalRevision     string        `json:"canonicalRevision,omitempty"`
	Capacity              uint32        `json:"capacity"`
	ClusterID             string        `json:"clusterId"`
	Hostname              string        `json:"hostname,omitempty"`
	Locality              *localityDump `json:"locality,omitempty"`
	Name                  string        `json:"name"`
	Namespace             string        `json:"namespace"`
	NativeTunnel          bool          `json:"nativeTunnel,omitempty"`
	Network               string        `json:"network,omitempty"`
	NetworkGateway        *gatewayDump  `json:"networkGateway,omitempty"`
	NetworkMode           string        `json:"networkMode"`
	Node                  string        `json:"node,omitempty"`
	Protocol              string        `json:"protocol"`
	ServiceAccount        string        `json:"serviceAccount,omitempty"`
}

// workloadTail are the keys after "services".
type workloadTail struct {
	Status       string       `json:"status"`
	TrustDomain  string       `json:"trustDomain,omitempty"`
	UID          string       `json:"uid,omitempty"`
	Waypoint     *gatewayDump `json:"waypoint,omitempty"`
	WorkloadIPs  []netip.Addr `json:"workloadIps"`
	WorkloadName string       `json:"workloadName,omitempty"`
	WorkloadType string       `json:"workloadType,omitempty"`
}

type tunnelDump struct {
	Port     *uint16 `json:"port"`
	Protocol string  `json:"protocol"`
}

type localityDump struct {
	Region  string `json:"region"`
	Subzone string `json:"subzone"`
	Zone    string `json:"zone"`
}

type gatewayDump struct {
	Destination   string `json:"destination"`
	HBONEMTLSPort uint16 `json:"hboneMtlsPort"`
}

// EndpointDump renders an Endpoint.
type EndpointDump struct {
	Port        map[uint16]uint16 `json:"port"`
	Status      string            `json:"status"`
	WorkloadUID string            `json:"workloadUid"`
}

// ServiceDump renders a Service.
type ServiceDump struct {
	Canonical         bool                    `json:"canonical"`
	CIDRVIPs          []cidrDump              `json:"cidrVips,omitempty"`
	Endpoints         map[string]EndpointDump `json:"endpoints"`
	Hostname          string                  `json:"hostname"`
	IPFamilies        string                  `json:"ipFamilies,omitempty"`
	LoadBalancer      *loadBalancerDump       `json:"loadBalancer,omitempty"`
	Name              string                  `json:"name"`
	Namespace         string                  `json:"namespace"`
	Ports             map[uint16]uint16       `json:"ports"`
	SubjectAltNames   []string                `json:"subjectAltNames"`
	VIPs              []string                `json:"vips"`
	Visibility        string                  `json:"visibility"`
	Waypoint          *gatewayDump            `json:"waypoint,omitempty"`
	WeightedWaypoints []weightedDump          `json:"weightedWaypoints,omitempty"`
}

type cidrDump struct {
	CIDR    netip.Prefix `json:"cidr"`
	Network string       `json:"network"`
}

type loadBalancerDump struct {
	HealthPolicy       string   `json:"healthPolicy"`
	Mode               string   `json:"mode"`
	RoutingPreferences []string `json:"routingPreferences"`
}

type weightedDump struct {
	Destination *gatewayDump `json:"destination"`
	Weight      uint32       `json:"weight"`
}

// PolicyDump renders a Policy.
type PolicyDump struct {
	Action    string          `json:"action"`
	DryRun    bool            `json:"dryRun"`
	Name      string          `json:"name"`
	Namespace string          `json:"namespace"`
	Rules     [][][]matchDump `json:"rules"`
	Scope     string          `json:"scope"`
}

type matchDump struct {
	DestinationIPs      []netip.Prefix    `json:"destinationIps,omitempty"`
	DestinationPorts    []uint16          `json:"destinationPorts,omitempty"`
	Namespaces          []stringMatchDump `json:"namespaces,omitempty"`
	NotDestinationIPs   []netip.Prefix    `json:"notDestinationIps,omitempty"`
	NotDestinationPorts []uint16          `json:"notDestinationPorts,omitempty"`
	NotNamespaces       []stringMatchDump `json:"notNamespaces,omitempty"`
	NotPrincipals       []stringMatchDump `json:"notPrincipals,omitempty"`
	NotServiceAccounts  []accountDump     `json:"notServiceAccounts,omitempty"`
	NotSourceIPs        []netip.Prefix    `json:"notSourceIps,omitempty"`
	Principals          []stringMatchDump `json:"principals,omitempty"`
	ServiceAccounts     []accountDump     `json:"serviceAccounts,omitempty"`
	SourceIPs           []netip.Prefix    `json:"sourceIps,omitempty"`
}

// stringMatchDump has one key, the kind; the value of Presence is an empty list.
type stringMatchDump map[string]any

type accountDump struct {
	Namespace      string `json:"namespace"`
	ServiceAccount string `json:"serviceAccount"`
}

// Dump renders everything in the store: workloads by UID, services by hostname,
// policies by key.
func (s *Store) Dump() Dump {
	t := s.read()
	workloads := slices.Collect(maps.Values(t.workloads))
	policies := slices.Collect(maps.Values(t.policies))
	services := make([]*service, 0, len(t.services))
	for _, host := range slices.Sorted(maps.Keys(t.hosts)) {
		services = append(services, t.hosts[host]...)
	}
	staged := make(map[string]map[string]EndpointDump, len(t.staged))
	for key, eps := range t.staged {
		m := make(map[string]EndpointDump, len(eps))
		for i := range eps {
			m[eps[i].WorkloadUID] = dumpEndpoint(&eps[i])
		}
		staged[key.String()] = m
	}
	s.release(t)

	slices.SortFunc(workloads, func(a, b *workload) int { return strings.Compare(a.UID, b.UID) })
	slices.SortFunc(policies, func(a, b *policy) int { return strings.Compare(a.key, b.key) })
	return Dump{
		Policies:       each(policies, func(p *policy) PolicyDump { return dumpPolicy(&p.Policy) }),
		Services:       each(services, func(s *service) ServiceDump { return dumpService(&s.Service) }),
		StagedServices: staged,
		Workloads:      each(workloads, func(w *workload) WorkloadDump { return dumpWorkload(&w.Workload) }),
	}
}

// NewStaticConfig renders an update as it was read from a local file.
func NewStaticConfig(u *Update) StaticConfig {
	return StaticConfig{
		Policies: each(u.Policies, dumpPolicy),
		Services: each(u.Services, dumpService),
		Workloads: each(u.Workloads, func(u WorkloadUpdate) StaticWorkloadDump {
			services := map[string]map[uint16]uint16{}
			for key, ports := range u.Endpoints {
				services[key.String()] = dumpPorts(ports)
			}
			return StaticWorkloadDump{dumpHead(u.Workload), services, dumpTail(u.Workload)}
		}),
	}
}

func dumpWorkload(w *Workload) WorkloadDump {
	services := make([]string, 0, len(w.Services))
	for _, key := range w.Services {
		services = append(services, key.String())
	}
	return WorkloadDump{dumpHead(w), services, dumpTail(w)}
}

func dumpHead(w *Workload) workloadHead {
	d := workloadHead{
		AuthorizationPolicies: w.AuthorizationPolicies,
		CanonicalName:         w.CanonicalName,
		CanonicalRevision:     w.CanonicalRevision,
		Capacity:              w.Capacity,
		ClusterID:             w.ClusterID,
		Hostname:              w.Hostname,
		Name:                  w.Name,
		Namespace:             w.Namespace,
		NativeTunnel:          w.NativeTunnel,
		Network:               w.Network,
		NetworkGateway:        dumpGateway(w.NetworkGateway),
		NetworkMode:           w.NetworkMode.String(),
		Node:                  w.Node,
		Protocol:              w.Protocol.String(),
		ServiceAccount:        w.ServiceAccount,
	}
	if w.Locality != (Locality{}) {
		d.Locality = &localityDump{Region: w.Locality.Region, Zone: w.Locality.Zone, Subzone: w.Locality.Subzone}
	}
	if t := w.ApplicationTunnel; t != nil {
		d.ApplicationTunnel = &tunnelDump{Protocol: "NONE"}
		if t.Proxy {
			d.ApplicationTunnel.Protocol = "PROXY"
		}
		if t.Port != 0 {
			d.ApplicationTunnel.Port = &t.Port
		}
	}
	return d
}

func dumpTail(w *Workload) workloadTail {
	return workloadTail{
		Status:       w.Health.String(),
		TrustDomain:  w.TrustDomain,
		UID:          w.UID,
		Waypoint:     dumpGateway(w.Waypoint),
		WorkloadIPs:  each(w.IPs, func(ip netip.Addr) netip.Addr { return ip }),
		WorkloadName: w.WorkloadName,
		WorkloadType: w.WorkloadType,
	}
}

func dumpService(s *Service) ServiceDump {
	d := ServiceDump{
		Canonical:       s.Canonical,
		CIDRVIPs:        each(s.CIDRVIPs, func(c CIDRAddress) cidrDump { return cidrDump{c.Prefix, c.Network} }),
		Endpoints:       make(map[string]EndpointDump, len(s.Endpoints)),
		Hostname:        s.Hostname,
		IPFamilies:      s.IPFamilies.String(),
		Name:            s.Name,
		Namespace:       s.Namespace,
		Ports:           dumpPorts(s.Ports),
		SubjectAltNames: each(s.SubjectAltNames, func(san string) string { return san }),
		VIPs:            each(s.VIPs, NetworkAddress.String),
		Visibility:      s.Visibility.String(),
		Waypoint:        dumpGateway(s.Waypoint),
		WeightedWaypoints: each(s.WeightedWaypoints, func(w WeightedWaypoint) weightedDump {
			return weightedDump{dumpGateway(&w.Destination), w.Weight}
		}),
	}
	for i := range s.Endpoints {
		d.Endpoints[s.Endpoints[i].WorkloadUID] = dumpEndpoint(&s.Endpoints[i])
	}
	if lb := s.LoadBalancer; lb != nil {
		d.LoadBalancer = &loadBalancerDump{lb.HealthPolicy.String(), lb.Mode.String(), each(lb.Preferences, Scope.String)}
	}
	return d
}

func dumpEndpoint(e *Endpoint) EndpointDump {
	return EndpointDump{Port: dumpPorts(e.Ports), Status: e.Health.String(), WorkloadUID: e.WorkloadUID}
}

func dumpPorts(ports []Port) map[uint16]uint16 {
	m := make(map[uint16]uint16, len(ports))
	for _, p := range ports {
		m[p.Service] = p.Target
	}
	return m
}

func dumpGateway(g *GatewayAddress) *gatewayDump {
	if g == nil {
		return nil
	}
	return &gatewayDump{Destination: g.String(), HBONEMTLSPort: g.Port}
}

func dumpPolicy(p *Policy) PolicyDump {
	return PolicyDump{
		Action:    p.Action.String(),
		DryRun:    p.DryRun,
		Name:      p.Name,
		Namespace: p.Namespace,
		Scope:     p.Scope.String(),
		Rules: each(p.Rules, func(r Rule) [][]matchDump {
			return each(r, func(c Clause) []matchDump { return each(c, dumpMatch) })
		}),
	}
}

func dumpMatch(m Match) matchDump {
	account := func(a ServiceAccountMatch) accountDump { return accountDump(a) }
	return matchDump{
		DestinationIPs:      m.DestinationIPs,
		DestinationPorts:    m.DestinationPorts,
		Namespaces:          each(m.Namespaces, dumpStringMatch),
		NotDestinationIPs:   m.NotDestinationIPs,
		NotDestinationPorts: m.NotDestinationPorts,
		NotNamespaces:       each(m.NotNamespaces, dumpStringMatch),
		NotPrincipals:       each(m.NotPrincipals, dumpStringMatch),
		NotServiceAccounts:  each(m.NotServiceAccounts, account),
		NotSourceIPs:        m.NotSourceIPs,
		Principals:          each(m.Principals, dumpStringMatch),
		ServiceAccounts:     each(m.ServiceAccounts, account),
		SourceIPs:           m.SourceIPs,
	}
}

func dumpStringMatch(m StringMatch) stringMatchDump {
	switch m.Kind {
	case Exact:
		return stringMatchDump{"Exact": m.Value}
	case Prefix:
		return stringMatchDump{"Prefix": m.Value}
	case Suffix:
		return stringMatchDump{"Suffix": m.Value}
	}
	return stringMatchDump{"Presence": []string{}}
}

// each maps a list; the result is never nil, so that it renders as a list.
func each[T, U any](list []T, f func(T) U) []U {
	out := make([]U, 0, len(list))
	for _, v := range list {
		out = append(out, f(v))
	}
	return out
}
