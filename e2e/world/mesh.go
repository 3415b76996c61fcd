//go:build e2e

package world

import (
	"net/netip"

	"github.com/ztunnel-go/ztunnel/xds/workloadpb"
)

// Workload is what a control plane says of the pod. The caller may change it
// before it is published.
func (p *Pod) Workload() *workloadpb.Workload {
	protocol := workloadpb.TunnelProtocol_NONE
	if p.Captured {
		protocol = workloadpb.TunnelProtocol_HBONE
	}
	return &workloadpb.Workload{
		Uid: p.UID(), Name: p.Name, Namespace: p.Namespace, ServiceAccount: p.SA, TrustDomain: p.TrustDomain,
		Addresses: [][]byte{p.Addr.AsSlice(), p.Addr6.AsSlice()}, TunnelProtocol: protocol, Node: p.Node.Name,
		CanonicalName: p.Name, CanonicalRevision: "v1", WorkloadName: p.Name, ClusterId: "Kubernetes",
	}
}

// UID is that of the pod's workload.
func (p *Pod) UID() string { return "Kubernetes//v1/Pod/" + p.Namespace + "/" + p.Name }

// Hostname is that of a service of the namespace default.
func Hostname(service string) string { return service + ".default.svc.cluster.local" }

// ServiceKey is the xDS name of that service.
func ServiceKey(service string) string { return "default/" + Hostname(service) }

// NewService is what a control plane says of a service of the namespace default.
// Ports come in pairs: that of the service and that of its endpoints, 0 where
// each endpoint has its own.
func NewService(name string, vip netip.Addr, ports ...uint32) *workloadpb.Service {
	s := &workloadpb.Service{Name: name, Namespace: "default", Hostname: Hostname(name), Canonical: true, Ports: portPairs(ports)}
	if vip.IsValid() {
		s.Addresses = []*workloadpb.NetworkAddress{{Address: vip.AsSlice()}}
	}
	return s
}

// Endpoint makes a workload serve a service of the namespace default, with ports
// in pairs as in NewService.
func Endpoint(w *workloadpb.Workload, service string, ports ...uint32) {
	if w.Services == nil {
		w.Services = map[string]*workloadpb.PortList{}
	}
	w.Services[ServiceKey(service)] = &workloadpb.PortList{Ports: portPairs(ports)}
}

func portPairs(ports []uint32) []*workloadpb.Port {
	var out []*workloadpb.Port
	for i := 0; i < len(ports); i += 2 {
		out = append(out, &workloadpb.Port{ServicePort: ports[i], TargetPort: ports[i+1]})
	}
	return out
}

// GatewayAt refers to a waypoint or a network gateway by address.
func GatewayAt(network string, addr netip.Addr, port uint32) *workloadpb.GatewayAddress {
	return &workloadpb.GatewayAddress{
		Destination:   &workloadpb.GatewayAddress_Address{Address: &workloadpb.NetworkAddress{Network: network, Address: addr.AsSlice()}},
		HboneMtlsPort: port,
	}
}

// GatewayNamed refers to one by the name of a service, or of a workload with
// that hostname, in the namespace default.
func GatewayNamed(hostname string, port uint32) *workloadpb.GatewayAddress {
	return &workloadpb.GatewayAddress{
		Destination:   &workloadpb.GatewayAddress_Hostname{Hostname: &workloadpb.NamespacedHostname{Namespace: "default", Hostname: hostname}},
		HboneMtlsPort: port,
	}
}
