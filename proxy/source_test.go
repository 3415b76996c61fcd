package proxy

import (
	"errors"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/proxy/hbone"
	"github.com/ztunnel-go/ztunnel/state"
)

// Case 77, IN-14 and §6.3: whom the labels of an inbound request name. The client
// is at 10.0.9.1, where the store knows a workload with or without its identity.
func TestFault_077_IN14_PeersDoNotChooseTheirLabels(t *testing.T) {
	const liar = "k8s.cluster.name=c9,k8s.namespace.name=kube-system,k8s.deployment.name=liar,service.name=liar"
	far := hbone.Field{Name: fieldNetwork, Value: "far"}
	for _, tt := range []struct {
		name      string
		holder    string // the service account of the workload at the client's address, "" for no workload
		fields    []hbone.Field
		noBaggage bool // ENABLE_RESPONSE_BAGGAGE=false
		workload  string
		namespace string
		cluster   string
	}{
		{name: "its own address", holder: "client", workload: "holder", namespace: "default", cluster: "Kubernetes"},
		{name: "its own address, and another network", holder: "client", fields: []hbone.Field{far}, workload: "holder", namespace: "default", cluster: "Kubernetes"},
		{name: "somebody else's address", holder: "victim", workload: "liar", namespace: "default", cluster: "c9"},
		{name: "somebody else's address, and another network", holder: "victim", fields: []hbone.Field{far}, workload: "liar", namespace: "default", cluster: "c9"},
		{name: "an unknown address", workload: "liar", namespace: "default", cluster: "c9"},
		{name: "our own network in other letters", fields: []hbone.Field{{Name: fieldNetwork, Value: "NEAR"}}, workload: "liar", namespace: "default", cluster: "c9"},
		{name: "no baggage wanted", noBaggage: true, workload: "unknown", namespace: "unknown", cluster: "unknown"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inMesh(t, func(t *testing.T, m *mesh) {
				server := m.add("server", "10.0.2.2", inNetwork("near"), withConfig(func(c *Config) { c.ResponseBaggage = !tt.noBaggage }))
				if tt.holder != "" {
					m.add("holder", "10.0.9.1", uncaptured, inNetwork("near"), withWorkload(func(w *state.Workload) { w.ServiceAccount = tt.holder }))
				}
				pool := m.handmade(server, m.svid(clientID))
				defer pool.Close()
				stream, err := pool.Open(m.ctx, "", "10.0.2.2:8080", append(tt.fields, hbone.Field{Name: fieldBaggage, Value: liar})...)
				if err != nil {
					t.Fatal(err)
				}
				_, answered := fieldValue(stream.Fields(), fieldBaggage)
				if answered == tt.noBaggage { // IN-13
					t.Errorf("baggage in the answer: %v", answered)
				}
				stream.Close()
				server.wantMetric(1, "istio_tcp_connections_opened", map[string]string{
					"source_workload": tt.workload, "source_workload_namespace": tt.namespace, "source_cluster": tt.cluster, "source_principal": clientID,
				})
			})
		})
	}
}

func TestSameIdentity(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString
	p := &Proxy{cfg: Config{TLS: ca.TLSOptions{DefaultTrustDomain: td("mesh.example"), Aliases: []spiffeid.TrustDomain{td("old.example")}}}}
	for _, tt := range []struct {
		a, b string
		want bool
	}{
		{"spiffe://mesh.example/ns/a/sa/b", "spiffe://mesh.example/ns/a/sa/b", true},
		{"spiffe://mesh.example/ns/a/sa/b", "spiffe://old.example/ns/a/sa/b", true},
		{"spiffe://mesh.example/ns/a/sa/b", "spiffe://old.example/ns/a/sa/c", false},
		{"spiffe://mesh.example/ns/a/sa/b", "spiffe://other.example/ns/a/sa/b", false},
		{"spiffe://other.example/ns/a/sa/b", "spiffe://other.example/ns/a/sa/b", true},
	} {
		if got := p.cfg.TLS.SameIdentity(p.cfg.TLS.DefaultTrustDomain, spiffeid.RequireFromString(tt.a), spiffeid.RequireFromString(tt.b)); got != tt.want {
			t.Errorf("%s and %s: %v, want %v", tt.a, tt.b, got, tt.want)
		}
	}
}

// N-21, N-22: a request for a service's host name is served at the port that the
// service, or its endpoint, means; the log has the name, policies see the port.
func TestDP_N21_N22_HostnameAuthority(t *testing.T) {
	for _, tt := range []struct {
		name    string
		service uint16 // its target port
		deny    uint16
		status  int
	}{
		{"N21", echoPort, 80, 0},
		{"N22", 0, 80, 0},
		{"denied by the final port", echoPort, echoPort, 401},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inMesh(t, func(t *testing.T, m *mesh) {
				const host = "server.default.svc.cluster.local"
				m.policies = []*state.Policy{denyPort(tt.deny)}
				server := m.add("server", "10.0.2.2", withConfig(func(c *Config) { c.PolicyInfoLogging = true }))
				svc := &state.Service{Name: "server", Namespace: "default", Hostname: host, Ports: []state.Port{{Service: 80, Target: tt.service}}}
				m.services = []*state.Service{svc}
				server.services = map[state.NamespacedHostname][]state.Port{svc.Key(): {{Service: 80, Target: echoPort}}}
				m.push()
				pool := m.handmade(server, m.svid(clientID))
				defer pool.Close()
				stream, err := pool.Open(m.ctx, "", host+":80")
				line := map[string]string{"message": "connection complete", "dst.hbone_addr": host + ":80", "dst.addr": "10.0.2.2:15008", "dst.service": host}
				if tt.status != 0 {
					var status *hbone.StatusError
					if !errors.As(err, &status) || status.Code != tt.status {
						t.Errorf("Open: %v, want status %d", err, tt.status)
					}
					line["error"] = "connection closed due to policy rejection: explicitly denied by: default/deny"
					server.wantLog(line)
					server.wantLog(map[string]string{"level": "info", "message": "deny policy match", "policy": "default/deny"})
					return
				}
				if err != nil {
					t.Fatalf("%v\n%s", err, server.logs.text("access"))
				}
				if err := roundTrip(stream, "hello"); err != nil {
					t.Error(err)
				}
				stream.Close()
				line["error"] = ""
				server.wantLog(line)
			})
		})
	}
}
