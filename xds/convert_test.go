package xds

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/ztunnel-go/ztunnel/state"
	"github.com/ztunnel-go/ztunnel/xds/discoverypb"
	"github.com/ztunnel-go/ztunnel/xds/workloadpb"
)

var compareState = cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}, spiffeid.ID{})

func bytesOf(ip string) []byte { return netip.MustParseAddr(ip).AsSlice() }

func gatewayByIP(network, ip string, port uint32) *workloadpb.GatewayAddress {
	return &workloadpb.GatewayAddress{
		Destination:   &workloadpb.GatewayAddress_Address{Address: &workloadpb.NetworkAddress{Network: network, Address: bytesOf(ip), Length: new(uint32)}},
		HboneMtlsPort: port,
	}
}

func gatewayByName(ns, host string, port uint32) *workloadpb.GatewayAddress {
	return &workloadpb.GatewayAddress{
		Destination:   &workloadpb.GatewayAddress_Hostname{Hostname: &workloadpb.NamespacedHostname{Namespace: ns, Hostname: host}},
		HboneMtlsPort: port,
	}
}

// fullWorkload has every field set.
func fullWorkload() *workloadpb.Workload {
	return &workloadpb.Workload{
		Uid:                   "c1//Pod/ns/pod",
		Name:                  "pod",
		Namespace:             "ns",
		Addresses:             [][]byte{bytesOf("10.0.0.1"), bytesOf("2001:db8::1")},
		Hostname:              "pod.example",
		Network:               "nw",
		TunnelProtocol:        workloadpb.TunnelProtocol_HBONE,
		TrustDomain:           "td",
		ServiceAccount:        "sa",
		Waypoint:              gatewayByIP("nw", "10.0.0.9", 15008),
		NetworkGateway:        gatewayByName("gw-ns", "gw.example", 15009),
		Node:                  "node",
		CanonicalName:         "app",
		CanonicalRevision:     "v1",
		WorkloadType:          workloadpb.WorkloadType_JOB,
		WorkloadName:          "pod-owner",
		NativeTunnel:          true,
		ApplicationTunnel:     &workloadpb.ApplicationTunnel{Protocol: workloadpb.ApplicationTunnel_PROXY, Port: 15088},
		Services:              map[string]*workloadpb.PortList{"ns/svc.example": {Ports: []*workloadpb.Port{{ServicePort: 80, TargetPort: 8080}, {ServicePort: 65535}}}, "ns/a/b": nil},
		AuthorizationPolicies: []string{"ns/p"},
		Status:                workloadpb.WorkloadStatus_UNHEALTHY,
		ClusterId:             "c1",
		Locality:              &workloadpb.Locality{Region: "r", Zone: "z", Subzone: "s"},
		NetworkMode:           workloadpb.NetworkMode_HOST_NETWORK,
		Extensions:            []*workloadpb.Extension{{Name: "e", Config: &anypb.Any{TypeUrl: "t"}}},
		Capacity:              wrapperspb.UInt32(0),
	}
}

func TestConvertEveryFieldOfAWorkload(t *testing.T) {
	var u state.Update
	key, kind, err := convertAddress(resource(t, "name", workloadOf(fullWorkload())), &u)
	if err != nil || key != "c1//Pod/ns/pod" || kind != state.WorkloadResource {
		t.Fatalf("got %q, %q, %v", key, kind, err)
	}
	want := []state.WorkloadUpdate{{
		Workload: &state.Workload{
			UID: "c1//Pod/ns/pod", Name: "pod", Namespace: "ns", ServiceAccount: "sa", TrustDomain: "td",
			Network: "nw", Node: "node", ClusterID: "c1",
			IPs:      []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("2001:db8::1")},
			Hostname: "pod.example",
			Protocol: state.HBONE, NetworkMode: state.HostNetwork, Health: state.Unhealthy,
			Capacity: 0, NativeTunnel: true,
			WorkloadName: "pod-owner", WorkloadType: "job", CanonicalName: "app", CanonicalRevision: "v1",
			Locality:              state.Locality{Region: "r", Zone: "z", Subzone: "s"},
			Waypoint:              &state.GatewayAddress{Address: state.NetworkAddress{Network: "nw", Addr: netip.MustParseAddr("10.0.0.9")}, Port: 15008},
			NetworkGateway:        &state.GatewayAddress{Hostname: state.NamespacedHostname{Namespace: "gw-ns", Hostname: "gw.example"}, Port: 15009},
			ApplicationTunnel:     &state.ApplicationTunnel{Proxy: true, Port: 15088},
			AuthorizationPolicies: []string{"ns/p"},
		},
		Endpoints: map[state.NamespacedHostname][]state.Port{
			{Namespace: "ns", Hostname: "svc.example"}: {{Service: 80, Target: 8080}, {Service: 65535}},
			{Namespace: "ns", Hostname: "a/b"}:         nil, // split at the first slash
		},
	}}
	if diff := cmp.Diff(want, u.Workloads, compareState); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// What is absent has the defaults of spec/state-xds-dns.md §1.1; those that are
// settings are the store's.
func TestConvertWorkloadWithoutOptionalFields(t *testing.T) {
	var u state.Update
	if _, _, err := convertAddress(workloadResource(t, &workloadpb.Workload{Uid: "u", WorkloadType: 77}), &u); err != nil {
		t.Fatal(err)
	}
	want := []state.WorkloadUpdate{{Workload: &state.Workload{UID: "u", Capacity: 1, WorkloadType: "deployment"}}}
	if diff := cmp.Diff(want, u.Workloads, compareState); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func networkAddress(network, ip string, length ...uint32) *workloadpb.NetworkAddress {
	a := &workloadpb.NetworkAddress{Network: network, Address: bytesOf(ip)}
	if len(length) > 0 {
		a.Length = &length[0]
	}
	return a
}

// fullService has every field set.
func fullService() *workloadpb.Service {
	return &workloadpb.Service{
		Name: "svc", Namespace: "ns", Hostname: "svc.example",
		Addresses: []*workloadpb.NetworkAddress{
			networkAddress("nw", "10.1.0.1"), networkAddress("", "10.1.0.2", 32), networkAddress("", "2001:db8::2", 128),
			networkAddress("nw", "10.2.3.4", 16), networkAddress("", "2001:db8::3", 32), networkAddress("", "10.9.9.9", 0),
		},
		Ports:              []*workloadpb.Port{{ServicePort: 80, TargetPort: 8080, AppProtocol: workloadpb.AppProtocol_TLS}, {ServicePort: 81}},
		SubjectAltNames:    []string{"spiffe://td/ns/ns/sa/sa", "no SPIFFE ID"},
		Waypoint:           gatewayByName("ns", "waypoint", 0),
		IpFamilies:         workloadpb.IPFamilies_IPV6_ONLY,
		Extensions:         []*workloadpb.Extension{{Name: "e"}},
		Canonical:          true,
		Visibility:         workloadpb.Service_NAMESPACE,
		IngressUseWaypoint: true,
		LoadBalancing: &workloadpb.LoadBalancing{
			RoutingPreference: []workloadpb.LoadBalancing_Scope{1, 2, 3, 4, 5, 6},
			Mode:              workloadpb.LoadBalancing_FAILOVER,
			HealthPolicy:      workloadpb.LoadBalancing_ALLOW_ALL,
		},
		WeightedWaypoints: []*workloadpb.WeightedWaypoint{
			{Destination: gatewayByIP("", "10.0.0.9", 15008), Weight: 75},
			{Destination: gatewayByName("ns", "w2", 15008)},
		},
	}
}

func TestConvertEveryFieldOfAService(t *testing.T) {
	var u state.Update
	key, kind, err := convertAddress(serviceResource(t, fullService()), &u)
	if err != nil || key != "ns/svc.example" || kind != state.ServiceResource {
		t.Fatalf("got %q, %q, %v", key, kind, err)
	}
	want := []*state.Service{{
		Name: "svc", Namespace: "ns", Hostname: "svc.example",
		VIPs: []state.NetworkAddress{
			{Network: "nw", Addr: netip.MustParseAddr("10.1.0.1")}, {Addr: netip.MustParseAddr("10.1.0.2")}, {Addr: netip.MustParseAddr("2001:db8::2")},
		},
		CIDRVIPs: []state.CIDRAddress{ // host bits as they were sent
			{Network: "nw", Prefix: netip.MustParsePrefix("10.2.3.4/16")}, {Prefix: netip.MustParsePrefix("2001:db8::3/32")},
			{Prefix: netip.MustParsePrefix("10.9.9.9/0")},
		},
		Ports:           []state.Port{{Service: 80, Target: 8080}, {Service: 81}},
		SubjectAltNames: []string{"spiffe://td/ns/ns/sa/sa", "no SPIFFE ID"},
		Waypoint:        &state.GatewayAddress{Hostname: state.NamespacedHostname{Namespace: "ns", Hostname: "waypoint"}},
		IPFamilies:      state.IPv6Only,
		Canonical:       true,
		Visibility:      state.NamespaceVisibility,
		LoadBalancer: &state.LoadBalancer{
			Preferences: []state.Scope{
				state.ScopeRegion, state.ScopeZone, state.ScopeSubzone, state.ScopeNode, state.ScopeCluster, state.ScopeNetwork,
			},
			Mode: state.LoadBalanceFailover, HealthPolicy: state.AllowAll,
		},
		WeightedWaypoints: []state.WeightedWaypoint{
			{Destination: state.GatewayAddress{Address: state.NetworkAddress{Addr: netip.MustParseAddr("10.0.0.9")}, Port: 15008}, Weight: 75},
			{Destination: state.GatewayAddress{Hostname: state.NamespacedHostname{Namespace: "ns", Hostname: "w2"}, Port: 15008}},
		},
	}}
	if diff := cmp.Diff(want, u.Services, compareState); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// An unknown visibility is PUBLIC, no load balancer is none, AUTOMATIC is none.
func TestConvertServiceWithoutOptionalFields(t *testing.T) {
	var u state.Update
	if _, _, err := convertAddress(serviceResource(t, &workloadpb.Service{Namespace: "ns", Hostname: "h", Visibility: 9}), &u); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]*state.Service{{Namespace: "ns", Hostname: "h"}}, u.Services, compareState); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestST_WL01BytesThatAreNoAddress(t *testing.T) {
	for _, n := range []int{9, 0} {
		_, err := address(make([]byte, n))
		if want := map[int]string{9: "had 9 bytes", 0: "had 0 bytes"}[n]; err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%d bytes: got %v, want %q", n, err, want)
		}
	}
}

func TestST_WL02BytesThatAreAnAddress(t *testing.T) {
	for want, b := range map[string][]byte{
		"0.0.0.0":                      {0, 0, 0, 0},
		"127.0.0.1":                    {127, 0, 0, 1},
		"1.1.1.1":                      {1, 1, 1, 1},
		"2001:db8:85a3::8a2e:370:7334": {0x20, 0x01, 0x0d, 0xb8, 0x85, 0xa3, 0, 0, 0, 0, 0x8a, 0x2e, 0x03, 0x70, 0x73, 0x34},
		"::1":                          {15: 1},
		"::ffff:10.0.0.1":              {10: 0xff, 11: 0xff, 12: 10, 15: 1}, // the store unmaps it
	} {
		got, err := address(b)
		if err != nil || got.String() != want {
			t.Errorf("got %v, %v, want %s", got, err, want)
		}
	}
}

// Every reason to refuse a workload or service, with the text of the NACK
// (spec/state-xds-dns.md §1.1, §1.2).
func TestST_XDS12ReasonsToRejectAnAddress(t *testing.T) {
	w := func(change func(*workloadpb.Workload)) *workloadpb.Address {
		in := pod("x", "10.0.0.1")
		change(in)
		return workloadOf(in)
	}
	s := func(change func(*workloadpb.Service)) *workloadpb.Address {
		in := &workloadpb.Service{Namespace: "ns", Hostname: "h"}
		change(in)
		return serviceOf(in)
	}
	noDestination := &workloadpb.GatewayAddress{HboneMtlsPort: 15008}
	badAddress := &workloadpb.GatewayAddress{Destination: &workloadpb.GatewayAddress_Address{Address: &workloadpb.NetworkAddress{}}}
	badPort := []*workloadpb.Port{{ServicePort: 80, TargetPort: 65536}}
	for name, tc := range map[string]struct {
		in   *workloadpb.Address
		want string
	}{
		"no type":               {&workloadpb.Address{}, "unknown address type"},
		"address":               {w(func(w *workloadpb.Workload) { w.Addresses = [][]byte{make([]byte, 5)} }), "failed to parse address, had 5 bytes"},
		"empty address":         {w(func(w *workloadpb.Workload) { w.Addresses = append(w.Addresses, nil) }), "failed to parse address, had 0 bytes"},
		"legacy protocol":       {w(func(w *workloadpb.Workload) { w.TunnelProtocol = 2 }), "unknown enum: tunnel_protocol 2"},
		"protocol":              {w(func(w *workloadpb.Workload) { w.TunnelProtocol = 257 }), "unknown enum: tunnel_protocol 257"},
		"status":                {w(func(w *workloadpb.Workload) { w.Status = -1 }), "unknown enum: status -1"},
		"network mode":          {w(func(w *workloadpb.Workload) { w.NetworkMode = 2 }), "unknown enum: network_mode 2"},
		"services key":          {w(func(w *workloadpb.Workload) { w.Services = map[string]*workloadpb.PortList{"host": {}} }), "failed to parse namespaced hostname: host"},
		"services port":         {w(func(w *workloadpb.Workload) { w.Services = map[string]*workloadpb.PortList{"n/h": {Ports: badPort}} }), "services: port 65536: want one from 0 to 65535"},
		"tunnel protocol":       {w(func(w *workloadpb.Workload) { w.ApplicationTunnel = &workloadpb.ApplicationTunnel{Protocol: 2} }), "unknown enum: application_tunnel 2"},
		"tunnel port":           {w(func(w *workloadpb.Workload) { w.ApplicationTunnel = &workloadpb.ApplicationTunnel{Port: 1 << 16} }), "application_tunnel: port 65536: want one from 0 to 65535"},
		"waypoint":              {w(func(w *workloadpb.Workload) { w.Waypoint = noDestination }), "nonempty gateway address is missing address: waypoint"},
		"waypoint without host": {w(func(w *workloadpb.Workload) { w.Waypoint = gatewayByName("ns", "", 1) }), "nonempty gateway address is missing address: waypoint"},
		"waypoint address":      {w(func(w *workloadpb.Workload) { w.Waypoint = badAddress }), "waypoint: failed to parse address, had 0 bytes"},
		"waypoint port":         {w(func(w *workloadpb.Workload) { w.Waypoint = gatewayByName("ns", "h", 1<<16) }), "hbone_mtls_port of waypoint: port 65536: want one from 0 to 65535"},
		"network gateway":       {w(func(w *workloadpb.Workload) { w.NetworkGateway = noDestination }), "nonempty gateway address is missing address: network_gateway"},
		"identity":              {w(func(w *workloadpb.Workload) { w.TrustDomain = "UPPER" }), `trust domain "UPPER": want 1 to 255 characters of a-z, 0-9, '.', '-', '_'`},
		"service address":       {s(func(s *workloadpb.Service) { s.Addresses = []*workloadpb.NetworkAddress{{Address: make([]byte, 3)}} }), "failed to parse address, had 3 bytes"},
		"v4 length": {s(func(s *workloadpb.Service) {
			s.Addresses = []*workloadpb.NetworkAddress{networkAddress("", "10.0.0.1", 33)}
		}), "invalid cidr: 10.0.0.1/33: want a length of at most 32"},
		"v4 length of 8 bits": {s(func(s *workloadpb.Service) {
			s.Addresses = []*workloadpb.NetworkAddress{networkAddress("", "10.0.0.1", 256+24)}
		}), "invalid cidr: 10.0.0.1/280: want a length of at most 32"},
		"v6 length": {s(func(s *workloadpb.Service) {
			s.Addresses = []*workloadpb.NetworkAddress{networkAddress("", "::1", 129)}
		}), "invalid cidr: ::1/129: want a length of at most 128"},
		"service port":      {s(func(s *workloadpb.Service) { s.Ports = badPort }), "ports: port 65536: want one from 0 to 65535"},
		"service waypoint":  {s(func(s *workloadpb.Service) { s.Waypoint = noDestination }), "nonempty gateway address is missing address: waypoint"},
		"weighted waypoint": {s(func(s *workloadpb.Service) { s.WeightedWaypoints = []*workloadpb.WeightedWaypoint{{Weight: 1}} }), "nonempty gateway address is missing address: weighted_waypoints"},
		"weighted without a type": {s(func(s *workloadpb.Service) {
			s.WeightedWaypoints = []*workloadpb.WeightedWaypoint{{Destination: noDestination}}
		}), "nonempty gateway address is missing address: weighted_waypoints"},
		"IP families": {s(func(s *workloadpb.Service) { s.IpFamilies = 4 }), "unknown enum: ip_families 4"},
		"scope": {s(func(s *workloadpb.Service) {
			s.LoadBalancing = &workloadpb.LoadBalancing{RoutingPreference: []workloadpb.LoadBalancing_Scope{1, 0}}
		}), "unknown enum: routing_preference 0"},
		"mode":          {s(func(s *workloadpb.Service) { s.LoadBalancing = &workloadpb.LoadBalancing{Mode: 4} }), "unknown enum: mode 4"},
		"health policy": {s(func(s *workloadpb.Service) { s.LoadBalancing = &workloadpb.LoadBalancing{HealthPolicy: 2} }), "unknown enum: health_policy 2"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore()
			name := "x"
			if tc.in.GetService() != nil {
				name = "ns/h"
			}
			got := text(newAddresses(s).apply([]*discoverypb.Resource{resource(t, name, tc.in)}, nil, nil))
			if got != name+": "+tc.want {
				t.Errorf("got %q, want %q", got, name+": "+tc.want)
			}
			if got := keys(s); len(got) > 0 {
				t.Errorf("the store holds %v", got)
			}
		})
	}
}
