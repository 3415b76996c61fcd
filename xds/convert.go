package xds

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/ztunnel-go/ztunnel/state"
	"github.com/ztunnel-go/ztunnel/xds/discoverypb"
	"github.com/ztunnel-go/ztunnel/xds/workloadpb"
)

// Errors of a NACK whose text is part of the protocol (spec/state-xds-dns.md §1.2).
var (
	errDecode      = errors.New("decode error")
	errNoPayload   = errors.New("XDS payload without resource")
	errNoType      = errors.New("unknown address type")
	errNoGateway   = errors.New("nonempty gateway address is missing address")
	errNoName      = errors.New("resource without a name: it could never be removed")
	errUnknownEnum = errors.New("unknown enum")
)

// errSkipped marks a resource that is neither applied nor refused.
var errSkipped = errors.New("skipped")

// ignoreUnknown decodes what is not judged by fields that we do not know.
var ignoreUnknown = proto.UnmarshalOptions{DiscardUnknown: true}

// decode reads the payload of a resource into m.
func decode(opts proto.UnmarshalOptions, r *discoverypb.Resource, m proto.Message) error {
	if r.GetResource() == nil {
		return errNoPayload
	}
	if err := opts.Unmarshal(r.GetResource().GetValue(), m); err != nil {
		return fmt.Errorf("%w: %w", errDecode, err)
	}
	return nil
}

// convertAddress adds the workload or service of r to u and returns its key: a
// UID or namespace/hostname. Nothing in u refers to r afterwards.
func convertAddress(r *discoverypb.Resource, u *state.Update) (key string, kind state.ResourceKind, err error) {
	var a workloadpb.Address
	if err := decode(ignoreUnknown, r, &a); err != nil {
		return "", "", err
	}
	switch t := a.GetType().(type) {
	case *workloadpb.Address_Workload:
		key, kind = t.Workload.GetUid(), state.WorkloadResource
		if err = named(r, key); err == nil {
			err = addWorkload(t.Workload, u)
		}
		return key, kind, err
	case *workloadpb.Address_Service:
		key, kind = t.Service.GetNamespace()+"/"+t.Service.GetHostname(), state.ServiceResource
		if err = named(r, key); err == nil {
			err = addService(t.Service, u)
		}
		return key, kind, err
	}
	return "", "", errNoType
}

// named refuses a resource that has no xDS name. Without a UID, too, it is what
// Cilium sends for an endpoint that is no pod: no error, but nothing that we could
// use (spec/cilium-spire.md §1.5).
func named(r *discoverypb.Resource, key string) error {
	switch {
	case r.GetName() != "":
		return nil
	case key == "":
		return errSkipped
	}
	return errNoName
}

func addWorkload(w *workloadpb.Workload, u *state.Update) error {
	var c checker
	out := &state.Workload{
		UID:               w.GetUid(),
		Name:              w.GetName(),
		Namespace:         w.GetNamespace(),
		ServiceAccount:    w.GetServiceAccount(),
		TrustDomain:       w.GetTrustDomain(),
		Network:           w.GetNetwork(),
		Node:              w.GetNode(),
		ClusterID:         w.GetClusterId(),
		IPs:               convertEach(&c, w.GetAddresses(), address),
		Hostname:          w.GetHostname(),
		Protocol:          enum(&c, "tunnel_protocol", w.GetTunnelProtocol(), protocols),
		NetworkMode:       enum(&c, "network_mode", w.GetNetworkMode(), networkModes),
		Health:            enum(&c, "status", w.GetStatus(), healths),
		Capacity:          1,
		NativeTunnel:      w.GetNativeTunnel(),
		WorkloadName:      w.GetWorkloadName(),
		WorkloadType:      workloadTypes[w.GetWorkloadType()],
		CanonicalName:     w.GetCanonicalName(),
		CanonicalRevision: w.GetCanonicalRevision(),
		Waypoint:          c.gateway("waypoint", w.GetWaypoint()),
		NetworkGateway:    c.gateway("network_gateway", w.GetNetworkGateway()),
		ApplicationTunnel: c.tunnel(w.GetApplicationTunnel()),

		AuthorizationPolicies: w.GetAuthorizationPolicies(),
	}
	if l := w.GetLocality(); l != nil {
		out.Locality = state.Locality{Region: l.GetRegion(), Zone: l.GetZone(), Subzone: l.GetSubzone()}
	}
	if out.WorkloadType == "" {
		out.WorkloadType = workloadTypes[workloadpb.WorkloadType_DEPLOYMENT]
	}
	if w.GetCapacity() != nil {
		out.Capacity = w.GetCapacity().GetValue()
	}
	endpoints := c.memberships(w.GetServices())
	if c.err == nil {
		u.Workloads = append(u.Workloads, state.WorkloadUpdate{Workload: out, Endpoints: endpoints})
	}
	return c.err
}

// memberships converts the services of a workload.
func (c *checker) memberships(services map[string]*workloadpb.PortList) map[state.NamespacedHostname][]state.Port {
	if len(services) == 0 {
		return nil
	}
	m := make(map[state.NamespacedHostname][]state.Port, len(services))
	for name, ports := range services {
		ns, host, ok := strings.Cut(name, "/")
		if !ok {
			c.fail(fmt.Errorf("failed to parse namespaced hostname: %s", name))
		}
		m[state.NamespacedHostname{Namespace: ns, Hostname: host}] = c.ports("services", ports.GetPorts())
	}
	return m
}

func addService(s *workloadpb.Service, u *state.Update) error {
	var c checker
	out := &state.Service{
		Name:              s.GetName(),
		Namespace:         s.GetNamespace(),
		Hostname:          s.GetHostname(),
		Ports:             c.ports("ports", s.GetPorts()),
		SubjectAltNames:   s.GetSubjectAltNames(),
		Waypoint:          c.gateway("waypoint", s.GetWaypoint()),
		WeightedWaypoints: convertEach(&c, s.GetWeightedWaypoints(), c.weighted),
		LoadBalancer:      c.loadBalancer(s.GetLoadBalancing()),
		IPFamilies:        enum(&c, "ip_families", s.GetIpFamilies(), ipFamilies),
		Canonical:         s.GetCanonical(),
		Visibility:        visibilities[s.GetVisibility()], // PUBLIC if unknown
	}
	for _, a := range s.GetAddresses() {
		c.vip(a, out)
	}
	if c.err == nil {
		u.Services = append(u.Services, out)
	}
	return c.err
}

// vip adds an address of a service: an exact VIP, unless it has a length that is
// not that of the whole address.
func (c *checker) vip(a *workloadpb.NetworkAddress, s *state.Service) {
	ip, err := address(a.GetAddress())
	switch {
	case err != nil:
		c.fail(err)
	case a.Length == nil || a.GetLength() == uint32(ip.BitLen()):
		s.VIPs = append(s.VIPs, state.NetworkAddress{Network: a.GetNetwork(), Addr: ip})
	default:
		p, err := prefix(ip, a.GetLength())
		c.fail(err)
		s.CIDRVIPs = append(s.CIDRVIPs, state.CIDRAddress{Network: a.GetNetwork(), Prefix: p})
	}
}

func (c *checker) loadBalancer(lb *workloadpb.LoadBalancing) *state.LoadBalancer {
	if lb == nil {
		return nil
	}
	return &state.LoadBalancer{
		Preferences: convertEach(c, lb.GetRoutingPreference(), func(s workloadpb.LoadBalancing_Scope) (state.Scope, error) {
			return enum(c, "routing_preference", s, scopes), nil
		}),
		Mode:         enum(c, "mode", lb.GetMode(), modes),
		HealthPolicy: enum(c, "health_policy", lb.GetHealthPolicy(), healthPolicies),
	}
}

func (c *checker) weighted(w *workloadpb.WeightedWaypoint) (state.WeightedWaypoint, error) {
	if w.GetDestination() == nil {
		return state.WeightedWaypoint{}, fmt.Errorf("%w: weighted_waypoints", errNoGateway)
	}
	g := c.gateway("weighted_waypoints", w.GetDestination())
	if g == nil {
		return state.WeightedWaypoint{}, c.err
	}
	return state.WeightedWaypoint{Destination: *g, Weight: w.GetWeight()}, nil
}

// gateway converts a waypoint or network gateway; nil stays nil.
func (c *checker) gateway(field string, g *workloadpb.GatewayAddress) *state.GatewayAddress {
	if g == nil {
		return nil
	}
	out := &state.GatewayAddress{Port: c.port("hbone_mtls_port of "+field, g.GetHboneMtlsPort())}
	switch d := g.GetDestination().(type) {
	case *workloadpb.GatewayAddress_Address:
		ip, err := address(d.Address.GetAddress())
		if err != nil {
			c.fail(fmt.Errorf("%s: %w", field, err))
			return nil
		}
		out.Address = state.NetworkAddress{Network: d.Address.GetNetwork(), Addr: ip}
	case *workloadpb.GatewayAddress_Hostname:
		out.Hostname = state.NamespacedHostname{Namespace: d.Hostname.GetNamespace(), Hostname: d.Hostname.GetHostname()}
	default:
		c.fail(fmt.Errorf("%w: %s", errNoGateway, field))
		return nil
	}
	return out
}

func (c *checker) tunnel(t *workloadpb.ApplicationTunnel) *state.ApplicationTunnel {
	if t == nil {
		return nil
	}
	return &state.ApplicationTunnel{
		Proxy: enum(c, "application_tunnel", t.GetProtocol(), tunnels),
		Port:  c.port("application_tunnel", t.GetPort()),
	}
}

func (c *checker) ports(field string, ports []*workloadpb.Port) []state.Port {
	return convertEach(c, ports, func(p *workloadpb.Port) (state.Port, error) {
		return state.Port{Service: c.port(field, p.GetServicePort()), Target: c.port(field, p.GetTargetPort())}, nil
	})
}

// address reads an address of 4 or 16 bytes. An IPv4-mapped one stays IPv6 here:
// the Store has one rule for it.
func address(b []byte) (netip.Addr, error) {
	ip, ok := netip.AddrFromSlice(b)
	if !ok {
		return ip, fmt.Errorf("failed to parse address, had %d bytes", len(b))
	}
	return ip, nil
}

func prefix(ip netip.Addr, length uint32) (netip.Prefix, error) {
	if length > uint32(ip.BitLen()) {
		return netip.Prefix{}, fmt.Errorf("invalid cidr: %s/%d: want a length of at most %d", ip, length, ip.BitLen())
	}
	return netip.PrefixFrom(ip, int(length)), nil
}
