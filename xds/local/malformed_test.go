package local

import (
	"strings"
	"testing"

	"github.com/ztunnel-go/ztunnel/state"
)

func TestMalformed(t *testing.T) {
	tests := []struct {
		name, data string
		want       []string // parts of the error
	}{
		{"syntax", "a: [", []string{"f: line 1"}},
		{"not a mapping", "[1]", []string{"f:1: got a list, want a mapping"}},
		{"scalar", "x", []string{`f:1: got "x", want a mapping`}},
		{"second document", "{}\n---\n{}", []string{"a second document"}},
		{"unknown top key", "workload: []", []string{"f:1: workload: unknown key, want one of policies, services, workloads"}},
		{"duplicate key", "workloads: []\nworkloads: []", []string{"f:2: workloads: duplicate key"}},
		{"missing keys", "workloads: [{}]", []string{"workloads[0]: missing key workloadIps", "missing key namespace", "missing key services"}},
		{"null for a required key", "workloads: [{workloadIps: null, namespace: n, services: {}}]", []string{"missing key workloadIps"}},
		{"unknown workload key", workload("proto: TCP"), []string{"f:5: workloads[0].proto: unknown key, want one of applicationTunnel"}},
		{"enum", workload("protocol: hbone"), []string{`f:5: workloads[0].protocol: got "hbone", want one of TCP, HBONE`}},
		{"mode", workload("networkMode: host"), []string{"Standard, HostNetwork"}},
		{"status", workload("status: ok"), []string{"Healthy, Unhealthy"}},
		{"number as string", workload("name: 5"), []string{"name: got 5, want a string: put it in quotes"}},
		{"list as string", workload("name: []"), []string{"name: got a list, want a string"}},
		{"bool", workload("nativeTunnel: yes please"), []string{"want true or false"}},
		{"tagged bool", workload("nativeTunnel: !!bool maybe"), []string{"want true or false"}},
		{"capacity", workload("capacity: 4294967296"), []string{"want a number from 0 to 4294967295"}},
		{"negative", workload("capacity: -1"), []string{`got "-1", want a number from 0 to`}},
		{"address", "workloads: [{workloadIps: [10.0.0], namespace: n, services: {}}]", []string{`workloadIps[0]: got "10.0.0", want an IP address`}},
		{"zone", "workloads: [{workloadIps: [\"fe80::1%eth0\"], namespace: n, services: {}}]", []string{"want an IP address"}},
		{"membership", "workloads: [{workloadIps: [], namespace: n, services: {svc: {}}}]", []string{`services.svc: got "svc", want namespace/hostname`}},
		{"port key", "workloads: [{workloadIps: [], namespace: n, services: {a/b: {http: 1}}}]", []string{`got "http" as a key, want a port`}},
		{"port value", "workloads: [{workloadIps: [], namespace: n, services: {a/b: {80: 65536}}}]", []string{"services.a/b.80", "want a number from 0 to 65535"}},
		{"locality", workload("locality: {region: r}"), []string{"missing key zone", "missing key subzone"}},
		{"tunnel", workload("applicationTunnel: {protocol: HTTP}"), []string{"want one of NONE, PROXY"}},
		{"gateway", workload("waypoint: {destination: x, hboneMtlsPort: 1}"), []string{`waypoint.destination: got "x", want network/IP or namespace/hostname`}},
		{"gateway zone", workload("waypoint: {destination: \"a/fe80::1%eth0\", hboneMtlsPort: 1}"), []string{`waypoint.destination: got "a/fe80::1%eth0", want an IP address without a zone`}},
		{"mapped range", match("{sourceIps: [\"::ffff:10.0.0.0/90\"]}"), []string{"f:2: policies[0]: source IPs: invalid cidr: ::ffff:10.0.0.0/90: want a length of at least 96"}},
		{"gateway port", workload("waypoint: {destination: a/b}"), []string{"missing key hboneMtlsPort"}},
		{"trust domain", workload("trustDomain: UPPER"), []string{`f:2: workloads[0]: trust domain "UPPER"`}},
		{"trust domain with a scheme", workload("trustDomain: spiffe://td"), []string{"trust domain"}},
		{"service account", workload("serviceAccount: a/b"), []string{`service account "a/b"`}},
		{"namespace", "workloads: [{workloadIps: [], namespace: \"\", services: {}}]", []string{`namespace ""`}},
		{"duplicate uid", "workloads:\n- {uid: u, workloadIps: [], namespace: n, services: {}}\n- {uid: u, workloadIps: [], namespace: n, services: {}}",
			[]string{`f:3: workloads[1]: duplicate uid "u", first in line 2`}},
		{"duplicate service", service("canonical: true\n- {name: s, namespace: ns, hostname: h, vips: [], ports: {}}"), []string{`duplicate service "ns/h"`}},
		{"hostname", "services: [{name: s, namespace: ns, hostname: \"\", vips: [], ports: {}}]", []string{"hostname is empty"}},
		{"vip", "services: [{name: s, namespace: ns, hostname: h, vips: [10.0.0.1], ports: {}}]", []string{"want network/IP"}},
		{"cidr", service("cidrVips: [{network: \"\", cidr: 10.0.0.0/33}]"), []string{"cidrVips[0].cidr"}},
		{"endpoint key", service("endpoints: {a: {workloadUid: b, port: {}, status: Healthy}}"), []string{`want the key of the endpoint, "a"`}},
		{"endpoint status", service("endpoints: {a: {workloadUid: a, port: {}}}"), []string{"missing key status"}},
		{"san", service("subjectAltNames: [cluster.local/x]"), []string{"want a SPIFFE ID"}},
		{"load balancer", service("loadBalancer: {mode: Strict}"), []string{"missing key routingPreferences", "missing key healthPolicy"}},
		{"preference", service("loadBalancer: {mode: Strict, healthPolicy: AllowAll, routingPreferences: [Rack]}"), []string{"Region, Zone, Subzone"}},
		{"weights", service("weightedWaypoints: [{weight: 1}]"), []string{"missing key destination"}},
		{"families", service("ipFamilies: IPv5"), []string{"Dual, IPv4, IPv6"}},
		{"visibility", service("visibility: Private"), []string{"Public, Namespace"}},
		{"policy keys", "policies: [{name: p}]", []string{"missing key dryRun", "missing key rules", "missing key scope", "missing key action"}},
		{"policy name", "policies: [{name: \"\", namespace: n, scope: Global, action: Allow, rules: [], dryRun: false}]", []string{"name is empty"}},
		{"policy scope", "policies: [{name: p, namespace: \"\", scope: Namespace, action: Allow, rules: [], dryRun: false}]", []string{"namespace is empty"}},
		{"match key", match("{ports: [80]}"), []string{"policies[0].rules[0][0][0].ports: unknown key"}},
		{"untagged string match", match("{namespaces: [x]}"), []string{`namespaces[0]: got "x", want !Exact value`}},
		{"unknown tag", match("{namespaces: [!Regex x]}"), []string{"want !Exact value"}},
		{"unknown form", match("{namespaces: [{Regex: x}]}"), []string{"want !Exact value"}},
		{"two forms", match("{namespaces: [{Exact: x, Prefix: y}]}"), []string{"want !Exact value"}},
		{"presence of something", match("{namespaces: [!Presence x]}"), []string{"for Presence, want []"}},
		{"tagged list", match("{namespaces: [!Exact [x]]}"), []string{"for Exact, want a string"}},
		{"range without length", match("{sourceIps: [10.0.0.1]}"), []string{"want a range of addresses"}},
		{"port", match("{destinationPorts: [70000]}"), []string{"want a number from 0 to 65535"}},
		{"account", match("{serviceAccounts: [{namespace: a}]}"), []string{"missing key serviceAccount"}},
		{"a policy and others of one name", "workloads: [{uid: ns/h, workloadIps: [], namespace: n, services: {}}]\n" + service("canonical: true") + "\n" +
			"policies:\n- {name: h, namespace: ns, scope: Global, action: Allow, dryRun: false, rules: [[[{sourceIps: [\"::ffff:0.0.0.0/90\"]}]]]}",
			[]string{"policies[0]: source IPs: invalid cidr"}},
		{"a service and others of one name", "workloads: [{uid: ns/h, workloadIps: [], namespace: n, services: {}}]\n" +
			service("cidrVips: [{network: n, cidr: \"::ffff:0.0.0.0/90\"}]"), []string{"services[0]: CIDR VIPs: invalid cidr"}},
		{"rules", "policies: [{name: p, namespace: n, scope: Global, action: Allow, rules: {}, dryRun: false}]", []string{"rules: got a mapping, want a list"}},
		{"key that is no scalar", "? [a]\n: b", []string{"got a list as a key"}},
		{"all at once", workload("protocol: X") + "\n" + service("visibility: Y") + "\n" + match("{z: 1}"),
			[]string{"workloads[0].protocol", "services[0].visibility", "policies[0].rules[0][0][0].z"}},
		{"aliases that multiply", "policies:\n- &p {name: p, namespace: n, scope: Global, action: Allow, dryRun: false, rules: [" +
			"&r [&c [&m {destinationPorts: &l [" + strings.Repeat("1,", 300) + "]}" + strings.Repeat(", *m", 300) + "]" + strings.Repeat(", *c", 300) + "]" + strings.Repeat(", *r", 300) + "]}",
			[]string{"too large: aliases"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := parse("f", tt.data, "")
			p.refuse(state.New(state.Config{}).Check(p.update))
			err := p.err()
			if err == nil {
				t.Fatal("no error")
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("got %v, want %q in it", err, want)
				}
			}
		})
	}
}

func TestManyErrorsAreBounded(t *testing.T) {
	err := parse("f", "policies: ["+strings.Repeat("x,", 1000)+"]", "").err()
	if n := strings.Count(err.Error(), "\n"); n != maxErrors {
		t.Errorf("got %d lines, want %d", n+1, maxErrors+1)
	}
	if !strings.HasSuffix(err.Error(), "900 more errors") {
		t.Errorf("got %v", err)
	}
}
