package state

import (
	"errors"
	"testing"
)

// IN-01, IN-02, IN-09 … IN-12, and the sandwich cases, which are refused.
func TestDP_IN_Inbound(t *testing.T) {
	const (
		client, server, waypoint = "10.0.0.1", "10.0.0.2", "10.0.0.3"
		vip, waypointVIP         = "10.10.0.1", "10.10.0.2"
	)
	attach := gw(waypointVIP, 15008)
	tests := []struct {
		name                      string
		workloadVia, serviceVia   *GatewayAddress
		tunnel                    *ApplicationTunnel
		local, conn, address, dns string
		port                      uint16
		want                      string
		wantErr                   error
		text                      string
	}{
		{name: "IN-01", local: "server", conn: server, address: server + ":8080", want: server + ":8080"},
		{name: "IN-02", local: "server", conn: server, dns: "server.ns.svc", port: 80, want: server + ":8080"},
		{name: "IN-03 and IN-04 workload attached", workloadVia: attach, local: "waypoint", conn: waypoint, address: server + ":8080", wantErr: ErrUnsupportedRoute},
		{name: "IN-05 tunnel", workloadVia: attach, tunnel: &ApplicationTunnel{Proxy: true, Port: 15088}, local: "waypoint", conn: waypoint, address: server + ":8080", wantErr: ErrUnsupportedRoute},
		{name: "IN-06 and IN-07 service attached", serviceVia: attach, local: "waypoint", conn: waypoint, address: vip + ":8080", wantErr: ErrUnsupportedRoute},
		{name: "IN-08 tunnel", serviceVia: attach, tunnel: &ApplicationTunnel{Proxy: true, Port: 15088}, local: "waypoint", conn: waypoint, address: vip + ":8080", wantErr: ErrUnsupportedRoute},
		{name: "tunnel to itself", tunnel: &ApplicationTunnel{Port: 15088}, local: "waypoint", conn: waypoint, address: waypoint + ":80", wantErr: ErrUnsupportedRoute,
			text: "route not supported: application tunnel of Workload{waypoint with uid waypoint (TCP)}"},
		{name: "IN-09", local: "server", conn: server, address: client + ":8080", wantErr: ErrIPMismatch, text: "ip mismatch: 10.0.0.2 != 10.0.0.1"},
		{name: "IN-10", local: "waypoint", conn: waypoint, address: client + ":8080", wantErr: ErrIPMismatch},
		{name: "IN-11 service attached only", serviceVia: attach, local: "waypoint", conn: waypoint, address: server + ":8080", wantErr: ErrIPMismatch, text: "ip mismatch: 10.0.0.3 != 10.0.0.2"},
		{name: "IN-12 workload attached only", workloadVia: attach, local: "waypoint", conn: waypoint, address: vip + ":8080", wantErr: ErrIPMismatch},
		{name: "unknown hostname", local: "server", conn: server, dns: "nobody", port: 80, text: "no service or workload for hostname: nobody"},
		{name: "port of a hostname", local: "server", conn: server, dns: "server.ns.svc", port: 81, text: "requested service server.ns.svc:81 found, but cannot resolve port"},
		{name: "named port of another endpoint", local: "waypoint", conn: waypoint, dns: "named.ns.svc", port: 80, text: "requested service named.ns.svc:80 found, but cannot resolve port"},
		{name: "named port of ours", local: "server", conn: server, dns: "named.ns.svc", port: 80, want: server + ":9090"},
		{name: "hostname of which we are no endpoint", local: "waypoint", conn: waypoint, dns: "server.ns.svc", port: 80, want: waypoint + ":8080"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := New(Config{})
			sv := func(name, ip string, target uint16) *Service {
				return &Service{Name: name, Namespace: "ns", Hostname: name + ".ns.svc", VIPs: []NetworkAddress{{"", addr(ip)}}, Ports: []Port{{80, target}}}
			}
			serverService := sv("server", vip, 8080)
			serverService.Waypoint = tt.serviceVia
			apply(t, s, Update{
				Workloads: []WorkloadUpdate{
					member(Workload{UID: "client", IPs: ips(client)}, nil),
					member(Workload{UID: "server", IPs: ips(server), Waypoint: tt.workloadVia},
						map[NamespacedHostname][]Port{host("ns", "server.ns.svc"): nil, host("ns", "named.ns.svc"): {{80, 9090}}}),
					member(Workload{UID: "waypoint", Name: "waypoint", IPs: ips(waypoint), ApplicationTunnel: tt.tunnel},
						map[NamespacedHostname][]Port{host("ns", "waypoint.ns.svc"): nil}),
				},
				Services: []*Service{serverService, sv("waypoint", waypointVIP, 15008), sv("named", "10.10.0.3", 0)},
			})
			local, _ := s.WorkloadByUID(tt.local)
			q := InboundQuery{Local: local, ConnDst: addrPort(tt.conn + ":15008"), Host: tt.dns, Port: tt.port}
			if tt.address != "" {
				q.Addr = addrPort(tt.address)
			}
			r, err := s.Inbound(q)
			if tt.want == "" {
				if err == nil || tt.wantErr != nil && !errors.Is(err, tt.wantErr) || tt.text != "" && err.Error() != tt.text {
					t.Fatalf("got %+v, %v, want %v %s", r, err, tt.wantErr, tt.text)
				}
				if r != (InboundRoute{}) {
					t.Errorf("a refusal with a route: %+v", r)
				}
				return
			}
			if err != nil || r.Upstream.String() != tt.want {
				t.Errorf("got %s, %v, want %s", r.Upstream, err, tt.want)
			}
		})
	}
	if _, err := New(Config{}).Inbound(InboundQuery{}); err == nil {
		t.Error("no error without a local workload")
	}
}

// spec/datapath.md §6.3: the service that the client meant.
func TestGuessService(t *testing.T) {
	s := New(Config{})
	sv := func(hostname string, target uint16) *Service {
		return &Service{Namespace: "ns", Hostname: hostname, Ports: []Port{{80, target}}}
	}
	apply(t, s, Update{
		Services: []*Service{sv("a", 8080), sv("b", 8080), sv("c", 0), sv("stranger", 8080)},
		Workloads: []WorkloadUpdate{member(Workload{UID: "w", IPs: ips("10.0.0.1")}, map[NamespacedHostname][]Port{
			host("ns", "a"): nil, host("ns", "b"): nil, host("ns", "c"): {{80, 9090}}, host("ns", "gone"): nil,
		})},
	})
	local, _ := s.WorkloadByUID("w")
	for _, tt := range []struct {
		port      string
		forwarded string
		want      string
	}{
		{"8080", "", "a"}, {"8080", "b", "b"}, {"9999", "b", "b"}, {"8080", "stranger", "a"}, {"9090", "", "c"}, {"1", "", ""}, {"1", "gone", ""},
	} {
		r, err := s.Inbound(InboundQuery{Local: local, ConnDst: addrPort("10.0.0.1:15008"), Addr: addrPort("10.0.0.1:" + tt.port), ForwardedHost: tt.forwarded})
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		if r.Service != nil {
			got = r.Service.Hostname
		}
		if got != tt.want {
			t.Errorf("port %s, forwarded %q: got %q, want %q", tt.port, tt.forwarded, got, tt.want)
		}
	}
	if r, err := s.Inbound(InboundQuery{Local: local, ConnDst: addrPort("10.0.0.1:15008"), Host: "stranger", Port: 80}); err != nil || r.Service == nil || r.Service.Hostname != "stranger" {
		t.Errorf("by hostname: %+v, %v", r, err)
	}
	if got := s.GuessService(local, 9090, ""); got == nil || got.Hostname != "c" {
		t.Errorf("GuessService: %+v", got)
	}
}
