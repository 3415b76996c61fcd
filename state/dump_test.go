package state

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func encode(t testing.TB, v any) string {
	t.Helper()
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", " ")
	if err := enc.Encode(v); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// spec/state-xds-dns.md §7: what is left out and what never is, in which order.
func TestDump(t *testing.T) {
	tests := []struct {
		name string
		u    Update
		want string
	}{
		{"empty", Update{}, `{
 "policies": [],
 "services": [],
 "stagedServices": {},
 "workloads": []
}
`},
		{"least", Update{
			Workloads: []WorkloadUpdate{{Workload: &Workload{UID: "u", Namespace: "ns"}, Endpoints: map[NamespacedHostname][]Port{host("ns", "h"): {{80, 8080}, {9, 1}}}}},
			Services:  []*Service{{Hostname: "b"}},
			Policies:  []*Policy{{Name: "p", Namespace: "ns", Rules: []Rule{{{{}}}}}},
		}, `{
 "policies": [
  {
   "action": "Allow",
   "dryRun": false,
   "name": "p",
   "namespace": "ns",
   "rules": [
    [
     [
      {}
     ]
    ]
   ],
   "scope": "Global"
  }
 ],
 "services": [
  {
   "canonical": false,
   "endpoints": {},
   "hostname": "b",
   "name": "",
   "namespace": "",
   "ports": {},
   "subjectAltNames": [],
   "vips": [],
   "visibility": "Public"
  }
 ],
 "stagedServices": {
  "ns/h": {
   "u": {
    "port": {
     "80": 8080,
     "9": 1
    },
    "status": "Healthy",
    "workloadUid": "u"
   }
  }
 },
 "workloads": [
  {
   "capacity": 0,
   "clusterId": "Kubernetes",
   "name": "",
   "namespace": "ns",
   "networkMode": "Standard",
   "protocol": "TCP",
   "serviceAccount": "default",
   "services": [
    "ns/h"
   ],
   "status": "Healthy",
   "trustDomain": "cluster.local",
   "uid": "u",
   "workloadIps": []
  }
 ]
}
`},
		{"most of a workload", Update{Workloads: []WorkloadUpdate{{Workload: &Workload{
			UID: "<u&>", Name: "n", Namespace: "ns", ServiceAccount: "sa", TrustDomain: "td", Network: "net", Node: "node", ClusterID: "c",
			IPs: ips("10.0.0.1", "fd00::1"), Hostname: "h", Protocol: HBONE, NetworkMode: HostNetwork, Health: Unhealthy, Capacity: 2,
			NativeTunnel: true, WorkloadName: "wn", WorkloadType: "job", CanonicalName: "cn", CanonicalRevision: "cr", Locality: Locality{Zone: "z"},
			Waypoint:              &GatewayAddress{Address: NetworkAddress{"defaultnw", addr("127.0.0.10")}, Port: 15008},
			NetworkGateway:        &GatewayAddress{Hostname: host("ns", "gw"), Port: 15009},
			ApplicationTunnel:     &ApplicationTunnel{Proxy: true},
			AuthorizationPolicies: []string{"ns/p"},
		}}}}, `{
 "policies": [],
 "services": [],
 "stagedServices": {},
 "workloads": [
  {
   "applicationTunnel": {
    "port": null,
    "protocol": "PROXY"
   },
   "authorizationPolicies": [
    "ns/p"
   ],
   "canonicalName": "cn",
   "canonicalRevision": "cr",
   "capacity": 2,
   "clusterId": "c",
   "hostname": "h",
   "locality": {
    "region": "",
    "subzone": "",
    "zone": "z"
   },
   "name": "n",
   "namespace": "ns",
   "nativeTunnel": true,
   "network": "net",
   "networkGateway": {
    "destination": "ns/gw",
    "hboneMtlsPort": 15009
   },
   "networkMode": "HostNetwork",
   "node": "node",
   "protocol": "HBONE",
   "serviceAccount": "sa",
   "status": "Unhealthy",
   "trustDomain": "td",
   "uid": "<u&>",
   "waypoint": {
    "destination": "defaultnw/127.0.0.10",
    "hboneMtlsPort": 15008
   },
   "workloadIps": [
    "10.0.0.1",
    "fd00::1"
   ],
   "workloadName": "wn",
   "workloadType": "job"
  }
 ]
}
`},
		{"most of a service", Update{Services: []*Service{{
			Name: "s", Namespace: "ns", Hostname: "h", VIPs: []NetworkAddress{{"net", addr("10.0.0.1")}},
			CIDRVIPs: []CIDRAddress{{"", netip.MustParsePrefix("10.0.0.0/24")}}, Ports: []Port{{80, 0}},
			Endpoints: []Endpoint{{WorkloadUID: "u"}}, SubjectAltNames: []string{"spiffe://td/x"},
			Waypoint:          &GatewayAddress{Hostname: host("ns", "w"), Port: 1},
			WeightedWaypoints: []WeightedWaypoint{{GatewayAddress{Hostname: host("ns", "w"), Port: 1}, 7}},
			LoadBalancer:      &LoadBalancer{Preferences: []Scope{ScopeNetwork, ScopeSubzone}, Mode: LoadBalanceFailover, HealthPolicy: AllowAll},
			IPFamilies:        IPv6Only, Canonical: true, Visibility: NamespaceVisibility,
		}}}, `{
 "policies": [],
 "services": [
  {
   "canonical": true,
   "cidrVips": [
    {
     "cidr": "10.0.0.0/24",
     "network": ""
    }
   ],
   "endpoints": {
    "u": {
     "port": {},
     "status": "Healthy",
     "workloadUid": "u"
    }
   },
   "hostname": "h",
   "ipFamilies": "IPv6",
   "loadBalancer": {
    "healthPolicy": "AllowAll",
    "mode": "Failover",
    "routingPreferences": [
     "Network",
     "Subzone"
    ]
   },
   "name": "s",
   "namespace": "ns",
   "ports": {
    "80": 0
   },
   "subjectAltNames": [
    "spiffe://td/x"
   ],
   "vips": [
    "net/10.0.0.1"
   ],
   "visibility": "Namespace",
   "waypoint": {
    "destination": "ns/w",
    "hboneMtlsPort": 1
   },
   "weightedWaypoints": [
    {
     "destination": {
      "destination": "ns/w",
      "hboneMtlsPort": 1
     },
     "weight": 7
    }
   ]
  }
 ],
 "stagedServices": {},
 "workloads": []
}
`},
	}
	for _, tt := range tests {
		s := New(Config{})
		apply(t, s, tt.u)
		if diff := cmp.Diff(tt.want, encode(t, s.Dump())); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
}

func TestDumpOrder(t *testing.T) {
	s := New(Config{})
	apply(t, s, Update{
		Workloads: []WorkloadUpdate{member(Workload{UID: "b"}, nil), member(Workload{UID: "a"}, nil)},
		Services:  []*Service{{Hostname: "z"}, {Hostname: "h", Namespace: "second"}, {Hostname: "h", Namespace: "first"}},
		Policies:  []*Policy{{Name: "b", Namespace: "x"}, {Name: "z", Namespace: "a"}},
	})
	d := s.Dump()
	var got []string
	for _, w := range d.Workloads {
		got = append(got, w.UID)
	}
	for _, sv := range d.Services {
		got = append(got, sv.Namespace+"/"+sv.Hostname)
	}
	for _, p := range d.Policies {
		got = append(got, p.Namespace+"/"+p.Name)
	}
	if diff := cmp.Diff([]string{"a", "b", "second/h", "first/h", "/z", "a/z", "x/b"}, got); diff != "" {
		t.Error(diff)
	}
}
