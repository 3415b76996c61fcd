package local

import (
	"net/netip"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/ztunnel-go/ztunnel/state"
)

// parser reads one file. It remembers where each resource stands, so that what
// the store refuses can be reported with a line.
type parser struct {
	decoder
	clusterID string
	update    state.Update
	workloads map[string]place
	services  map[string]place
	policies  map[string]place
}

type place struct {
	node *yaml.Node
	path string
}

// parse reads data, the content of file. The update is complete only if the
// error is nil.
func parse(file, data, clusterID string) *parser {
	p := &parser{
		decoder:   decoder{file: file, budget: 100_000 + 10*len(data)},
		clusterID: clusterID,
		workloads: map[string]place{},
		services:  map[string]place{},
		policies:  map[string]place{},
	}
	root := p.document(data)
	if root == nil {
		return p
	}
	o, ok := p.object(root, "", nil, []string{"workloads", "policies", "services"})
	if !ok {
		return p
	}
	p.update.Workloads = list(o, "workloads", p.workload)
	p.update.Policies = list(o, "policies", p.policy)
	p.update.Services = list(o, "services", p.service)
	return p
}

// broken tells whether errors were found since there were so many. A resource
// with errors goes no further, so that none is reported twice.
func (p *parser) broken(since int) bool { return p.count() > since }

// once notes where a resource stands and refuses a second one of its name.
func (p *parser) once(places map[string]place, kind, name string, n *yaml.Node, path string) {
	if first, ok := places[name]; ok {
		p.fail(n, path, "duplicate %s %q, first in line %d", kind, name, first.node.Line)
		return
	}
	places[name] = place{n, path}
}

var (
	workloadRequired = []string{"workloadIps", "namespace", "services"}
	workloadOptional = []string{
		"name", "uid", "protocol", "networkMode", "waypoint", "networkGateway", "trustDomain", "serviceAccount",
		"clusterId", "network", "workloadName", "workloadType", "canonicalName", "canonicalRevision", "hostname",
		"node", "nativeTunnel", "applicationTunnel", "authorizationPolicies", "status", "locality", "capacity",
	}
	serviceRequired = []string{"name", "namespace", "hostname", "vips", "ports"}
	serviceOptional = []string{
		"cidrVips", "endpoints", "subjectAltNames", "waypoint", "weightedWaypoints", "loadBalancer", "ipFamilies",
		"canonical", "visibility",
	}
	policyRequired = []string{"name", "namespace", "scope", "action", "rules", "dryRun"}
)

func (p *parser) workload(n *yaml.Node, path string) (state.WorkloadUpdate, bool) {
	before := p.count()
	o, ok := p.object(n, path, workloadRequired, workloadOptional)
	if !ok {
		return state.WorkloadUpdate{}, false
	}
	w := &state.Workload{
		UID:               o.str("uid"),
		Name:              o.str("name"),
		Namespace:         o.str("namespace"),
		ServiceAccount:    o.str("serviceAccount"),
		TrustDomain:       o.str("trustDomain"),
		Network:           o.str("network"),
		Node:              o.str("node"),
		ClusterID:         o.str("clusterId"),
		IPs:               list(o, "workloadIps", p.ip),
		Hostname:          o.str("hostname"),
		Protocol:          choice(o, "protocol", named[state.Protocol]{"TCP", state.TCP}, named[state.Protocol]{"HBONE", state.HBONE}),
		NetworkMode:       choice(o, "networkMode", named[state.NetworkMode]{"Standard", state.Standard}, named[state.NetworkMode]{"HostNetwork", state.HostNetwork}),
		Health:            p.health(o, "status"),
		Capacity:          uint32(o.number("capacity", 32, 1)),
		NativeTunnel:      o.boolean("nativeTunnel"),
		WorkloadName:      o.str("workloadName"),
		WorkloadType:      o.str("workloadType"),
		CanonicalName:     o.str("canonicalName"),
		CanonicalRevision: o.str("canonicalRevision"),
		Locality:          p.locality(o),
		Waypoint:          p.gateway(o, "waypoint"),
		NetworkGateway:    p.gateway(o, "networkGateway"),
		ApplicationTunnel: p.tunnel(o),

		AuthorizationPolicies: list(o, "authorizationPolicies", p.str),
	}
	if w.UID == "" {
		cluster := w.ClusterID
		if cluster == "" {
			cluster = p.clusterID
		}
		w.UID = cluster + "//Pod/" + w.Namespace + "/" + w.Name
	}
	p.once(p.workloads, "uid", w.UID, o.node, path)
	u := state.WorkloadUpdate{Workload: w, Endpoints: p.memberships(o)}
	return u, !p.broken(before)
}

// memberships reads the services of a workload with their ports.
func (p *parser) memberships(o *object) map[state.NamespacedHostname][]state.Port {
	n := o.fields["services"]
	if n == nil {
		return nil
	}
	entries, _ := p.entries(n, o.at("services"))
	m := make(map[state.NamespacedHostname][]state.Port, len(entries))
	for _, e := range entries {
		path := join(o.at("services"), e.key.Value)
		ns, host, ok := strings.Cut(e.key.Value, "/")
		if !ok || host == "" {
			p.fail(e.key, path, "got %q, want namespace/hostname", e.key.Value)
			continue
		}
		m[state.NamespacedHostname{Namespace: ns, Hostname: host}] = p.ports(e.value, path)
	}
	return m
}

func (p *parser) ports(n *yaml.Node, path string) []state.Port {
	entries, _ := p.entries(n, path)
	ports := make([]state.Port, 0, len(entries))
	for _, e := range entries {
		service, err := strconv.ParseUint(e.key.Value, 10, 16)
		if err != nil {
			p.fail(e.key, join(path, e.key.Value), "got %q as a key, want a port from 0 to 65535", e.key.Value)
			continue
		}
		target := p.number(e.value, join(path, e.key.Value), 16)
		ports = append(ports, state.Port{Service: uint16(service), Target: uint16(target)})
	}
	return state.SortPorts(ports)
}

func (p *parser) ip(n *yaml.Node, path string) (netip.Addr, bool) {
	s, ok := p.str(n, path)
	if !ok {
		return netip.Addr{}, false
	}
	ip, err := netip.ParseAddr(s)
	if err != nil || ip.Zone() != "" {
		p.fail(n, path, "got %q, want an IP address", s)
		return netip.Addr{}, false
	}
	return ip, true
}

func (p *parser) prefix(n *yaml.Node, path string) (netip.Prefix, bool) {
	s, ok := p.str(n, path)
	if !ok {
		return netip.Prefix{}, false
	}
	prefix, err := netip.ParsePrefix(s)
	if err != nil {
		p.fail(n, path, "got %q, want a range of addresses such as 10.0.0.0/8", s)
		return netip.Prefix{}, false
	}
	return prefix, true
}

func (p *parser) health(o *object, key string) state.Health {
	return choice(o, key, named[state.Health]{"Healthy", state.Healthy}, named[state.Health]{"Unhealthy", state.Unhealthy})
}

func (p *parser) locality(o *object) state.Locality {
	n := o.fields["locality"]
	if n == nil {
		return state.Locality{}
	}
	l, ok := p.object(n, o.at("locality"), []string{"region", "zone", "subzone"}, nil)
	if !ok {
		return state.Locality{}
	}
	return state.Locality{Region: l.str("region"), Zone: l.str("zone"), Subzone: l.str("subzone")}
}

func (p *parser) tunnel(o *object) *state.ApplicationTunnel {
	n := o.fields["applicationTunnel"]
	if n == nil {
		return nil
	}
	t, ok := p.object(n, o.at("applicationTunnel"), []string{"protocol"}, []string{"port"})
	if !ok {
		return nil
	}
	return &state.ApplicationTunnel{
		Proxy: choice(t, "protocol", named[bool]{"NONE", false}, named[bool]{"PROXY", true}),
		Port:  uint16(t.number("port", 16, 0)),
	}
}

func (p *parser) gateway(o *object, key string) *state.GatewayAddress {
	n := o.fields[key]
	if n == nil {
		return nil
	}
	g, ok := p.object(n, o.at(key), []string{"destination", "hboneMtlsPort"}, nil)
	if !ok {
		return nil
	}
	gateway := &state.GatewayAddress{Port: uint16(g.number("hboneMtlsPort", 16, 0))}
	if g.fields["destination"] == nil {
		return nil
	}
	dst := g.str("destination")
	first, second, ok := strings.Cut(dst, "/")
	if !ok || second == "" {
		g.fail("destination", "got %q, want network/IP or namespace/hostname", dst)
		return nil
	}
	if ip, err := netip.ParseAddr(second); err == nil {
		if ip.Zone() != "" {
			g.fail("destination", "got %q, want an IP address without a zone", dst)
			return nil
		}
		gateway.Address = state.NetworkAddress{Network: first, Addr: ip}
	} else {
		gateway.Hostname = state.NamespacedHostname{Namespace: first, Hostname: second}
	}
	return gateway
}

func (p *parser) service(n *yaml.Node, path string) (*state.Service, bool) {
	before := p.count()
	o, ok := p.object(n, path, serviceRequired, serviceOptional)
	if !ok {
		return nil, false
	}
	s := &state.Service{
		Name:              o.str("name"),
		Namespace:         o.str("namespace"),
		Hostname:          o.str("hostname"),
		VIPs:              list(o, "vips", p.vip),
		CIDRVIPs:          list(o, "cidrVips", p.cidr),
		Endpoints:         p.endpoints(o),
		SubjectAltNames:   list(o, "subjectAltNames", p.san),
		Waypoint:          p.gateway(o, "waypoint"),
		WeightedWaypoints: list(o, "weightedWaypoints", p.weighted),
		LoadBalancer:      p.loadBalancer(o),
		IPFamilies: choice(o, "ipFamilies", named[state.IPFamilies]{"Dual", state.DualFamily},
			named[state.IPFamilies]{"IPv4", state.IPv4Only}, named[state.IPFamilies]{"IPv6", state.IPv6Only}),
		Canonical: o.boolean("canonical"),
		Visibility: choice(o, "visibility", named[state.Visibility]{"Public", state.PublicVisibility},
			named[state.Visibility]{"Namespace", state.NamespaceVisibility}),
	}
	if ports := o.fields["ports"]; ports != nil {
		s.Ports = p.ports(ports, o.at("ports"))
	}
	p.once(p.services, "service", s.Key().String(), o.node, path)
	return s, !p.broken(before)
}

func (p *parser) vip(n *yaml.Node, path string) (state.NetworkAddress, bool) {
	s, ok := p.str(n, path)
	if !ok {
		return state.NetworkAddress{}, false
	}
	network, addr, ok := strings.Cut(s, "/")
	ip, err := netip.ParseAddr(addr)
	if !ok || err != nil || ip.Zone() != "" {
		p.fail(n, path, "got %q, want network/IP, or /IP in the default network", s)
		return state.NetworkAddress{}, false
	}
	return state.NetworkAddress{Network: network, Addr: ip}, true
}

func (p *parser) cidr(n *yaml.Node, path string) (state.CIDRAddress, bool) {
	o, ok := p.object(n, path, []string{"network", "cidr"}, nil)
	if !ok || o.fields["cidr"] == nil {
		return state.CIDRAddress{}, false
	}
	prefix, ok := p.prefix(o.fields["cidr"], o.at("cidr"))
	return state.CIDRAddress{Network: o.str("network"), Prefix: prefix}, ok
}

func (p *parser) endpoints(o *object) []state.Endpoint {
	n := o.fields["endpoints"]
	if n == nil {
		return nil
	}
	entries, _ := p.entries(n, o.at("endpoints"))
	eps := make([]state.Endpoint, 0, len(entries))
	for _, e := range entries {
		path := join(o.at("endpoints"), e.key.Value)
		ep, ok := p.object(e.value, path, []string{"workloadUid", "port", "status"}, nil)
		if !ok {
			continue
		}
		uid := ep.str("workloadUid")
		if uid != e.key.Value {
			ep.fail("workloadUid", "got %q, want the key of the endpoint, %q", uid, e.key.Value)
		}
		var ports []state.Port
		if ep.fields["port"] != nil {
			ports = p.ports(ep.fields["port"], ep.at("port"))
		}
		eps = append(eps, state.Endpoint{WorkloadUID: uid, Ports: ports, Health: p.health(ep, "status")})
	}
	return eps
}

func (p *parser) weighted(n *yaml.Node, path string) (state.WeightedWaypoint, bool) {
	o, ok := p.object(n, path, []string{"destination", "weight"}, nil)
	if !ok {
		return state.WeightedWaypoint{}, false
	}
	weight := o.number("weight", 32, 0)
	gateway := p.gateway(o, "destination")
	if gateway == nil {
		return state.WeightedWaypoint{}, false
	}
	return state.WeightedWaypoint{Destination: *gateway, Weight: uint32(weight)}, true
}

func (p *parser) loadBalancer(o *object) *state.LoadBalancer {
	n := o.fields["loadBalancer"]
	if n == nil {
		return nil
	}
	lb, ok := p.object(n, o.at("loadBalancer"), []string{"routingPreferences", "mode", "healthPolicy"}, nil)
	if !ok {
		return nil
	}
	return &state.LoadBalancer{
		Preferences: list(lb, "routingPreferences", func(n *yaml.Node, path string) (state.Scope, bool) {
			s := choose(&p.decoder, n, path, named[state.Scope]{"Region", state.ScopeRegion},
				named[state.Scope]{"Zone", state.ScopeZone}, named[state.Scope]{"Subzone", state.ScopeSubzone},
				named[state.Scope]{"Node", state.ScopeNode}, named[state.Scope]{"Cluster", state.ScopeCluster},
				named[state.Scope]{"Network", state.ScopeNetwork})
			return s, s != 0
		}),
		Mode: choice(lb, "mode", named[state.LoadBalancerMode]{"Standard", state.LoadBalanceAny},
			named[state.LoadBalancerMode]{"Strict", state.LoadBalanceStrict},
			named[state.LoadBalancerMode]{"Failover", state.LoadBalanceFailover},
			named[state.LoadBalancerMode]{"Passthrough", state.LoadBalancePassthrough}),
		HealthPolicy: choice(lb, "healthPolicy", named[state.HealthPolicy]{"OnlyHealthy", state.OnlyHealthy},
			named[state.HealthPolicy]{"AllowAll", state.AllowAll}),
	}
}
