package state

import (
	"encoding/json"
	"errors"
	"reflect"
	"testing"
)

// The world of the IN- rows (spec/datapath.md §16.4).
const (
	inClient, inServer, inWaypoint = "10.0.0.1", "10.0.0.2", "10.0.0.3"
	inVIP, inWaypointVIP           = "10.10.0.1", "10.10.0.2"
)

// inboundCase is one request and its answer; want "" is a refusal.
type inboundCase struct {
	name                    string
	config                  Config
	workloadVia, serviceVia *GatewayAddress
	weighted                []WeightedWaypoint // of the service of the server
	serviceMods             []func(*Service)   // of the same
	others                  []*Service
	tunnel                  *ApplicationTunnel // of the waypoint
	local, conn, authority  string             // authority: an address, else
	host                    string
	port                    uint16
	forwarded               string
	asked                   []string

	want    string
	proxy   bool
	target  string
	service string // hostname; not checked if empty
	wantErr error
	text    string
}

func (c *inboundCase) store(t *testing.T) *Store {
	t.Helper()
	s := New(c.config)
	service := func(name, ip string, target uint16) *Service {
		return &Service{Name: name, Namespace: "ns", Hostname: name + ".ns.svc", VIPs: []NetworkAddress{{"", addr(ip)}}, Ports: []Port{{80, target}}}
	}
	server := service("server", inVIP, 8080)
	server.Waypoint, server.WeightedWaypoints = c.serviceVia, c.weighted
	for _, m := range c.serviceMods {
		m(server)
	}
	apply(t, s, Update{
		Workloads: []WorkloadUpdate{
			member(Workload{UID: "client", IPs: ips(inClient)}, nil),
			member(Workload{UID: "server", IPs: ips(inServer), Waypoint: c.workloadVia},
				map[NamespacedHostname][]Port{host("ns", "server.ns.svc"): nil, host("ns", "named.ns.svc"): {{80, 9090}}}),
			member(Workload{UID: "waypoint", Name: "waypoint", IPs: ips(inWaypoint), ApplicationTunnel: c.tunnel, Hostname: "way.host"},
				map[NamespacedHostname][]Port{host("ns", "waypoint.ns.svc"): nil}),
			member(Workload{UID: "other-waypoint", IPs: ips("10.0.0.4")}, nil),
		},
		Services: append([]*Service{server, service("waypoint", inWaypointVIP, 15008), service("named", "10.10.0.3", 0)}, c.others...),
	})
	return s
}

func (c *inboundCase) run(t *testing.T) {
	s := c.store(t)
	local, _ := s.WorkloadByUID(c.local)
	q := InboundQuery{Local: local, ConnDst: addrPort(c.conn + ":15008"), Host: c.host, Port: c.port, ForwardedHost: c.forwarded, Asked: c.asked}
	if c.authority != "" {
		q.Addr = addrPort(c.authority)
	}
	r, err := s.Inbound(q)
	e := s.ExplainInbound(q)
	if e.InboundRoute != r || !reflect.DeepEqual(e.Err, err) || len(e.Steps) == 0 {
		t.Errorf("ExplainInbound: %+v\nInbound: %+v, %v", e, r, err)
	}
	if _, err := json.Marshal(e); err != nil {
		t.Error(err)
	}
	if c.want == "" {
		if err == nil || c.wantErr != nil && !errors.Is(err, c.wantErr) || c.text != "" && err.Error() != c.text {
			t.Fatalf("got %+v, %v, want %v %s", r, err, c.wantErr, c.text)
		}
		if r != (InboundRoute{}) {
			t.Errorf("a refusal with a route: %+v", r)
		}
		return
	}
	target := ""
	if r.Target.IsValid() {
		target = r.Target.String()
	}
	if err != nil || r.Upstream.String() != c.want || r.Proxy != c.proxy || target != c.target {
		t.Errorf("got %+v, %v, want %s, PROXY %t %s", r, err, c.want, c.proxy, c.target)
	}
	if c.service != "" && (r.Service == nil || r.Service.Hostname != c.service) {
		t.Errorf("service %+v, want %s", r.Service, c.service)
	}
}

func runInbound(t *testing.T, cases []inboundCase) {
	for _, c := range cases {
		t.Run(c.name, c.run)
	}
}

// IN-01 … IN-12 of spec/datapath.md §16.4, IN-01 of spec/state-xds-dns.md §9.3.
func TestDP_IN_Inbound(t *testing.T) {
	pod, vip := gw(inWaypoint, 15008), gw(inWaypointVIP, 15008)
	tunnel := &ApplicationTunnel{Proxy: true, Port: 15088}
	server := inServer + ":8080"
	runInbound(t, []inboundCase{
		{name: "IN-01", local: "server", conn: inServer, authority: server, want: server, service: "server.ns.svc"},
		{name: "IN-02", local: "server", conn: inServer, host: "server.ns.svc", port: 80, want: server, service: "server.ns.svc"},
		{name: "IN-03", workloadVia: pod, local: "waypoint", conn: inWaypoint, authority: server, want: "10.0.0.3:8080"},
		{name: "IN-04", workloadVia: vip, local: "waypoint", conn: inWaypoint, authority: server, want: "10.0.0.3:8080"},
		{name: "IN-05", workloadVia: vip, tunnel: tunnel, local: "waypoint", conn: inWaypoint, authority: server, want: "10.0.0.3:15088", proxy: true, target: server},
		{name: "IN-06", serviceVia: pod, local: "waypoint", conn: inWaypoint, authority: inVIP + ":8080", want: "10.0.0.3:8080"},
		{name: "IN-07", serviceVia: vip, local: "waypoint", conn: inWaypoint, authority: inVIP + ":8080", want: "10.0.0.3:8080"},
		{name: "IN-08", serviceVia: vip, tunnel: tunnel, local: "waypoint", conn: inWaypoint, authority: inVIP + ":8080", want: "10.0.0.3:15088", proxy: true, target: inVIP + ":8080"},
		{name: "IN-09", local: "server", conn: inServer, authority: inClient + ":8080", wantErr: ErrIPMismatch, text: "ip mismatch: 10.0.0.2 != 10.0.0.1"},
		{name: "IN-10", local: "waypoint", conn: inWaypoint, authority: inClient + ":8080", wantErr: ErrIPMismatch},
		{name: "IN-11", serviceVia: vip, local: "waypoint", conn: inWaypoint, authority: server, wantErr: ErrIPMismatch, text: "ip mismatch: 10.0.0.3 != 10.0.0.2"},
		{name: "IN-12", workloadVia: vip, local: "waypoint", conn: inWaypoint, authority: inVIP + ":8080", wantErr: ErrIPMismatch},
	})
}

func TestInboundDestination(t *testing.T) {
	vip, other := gw(inWaypointVIP, 15008), gw("10.0.0.4", 15008)
	toVIP := func(c inboundCase) inboundCase {
		c.local, c.conn, c.authority = "waypoint", inWaypoint, inVIP+":80"
		return c
	}
	hidden := func(s *Service) { s.Namespace, s.Visibility = "hidden", NamespaceVisibility }
	runInbound(t, []inboundCase{
		toVIP(inboundCase{name: "weighted member", weighted: []WeightedWaypoint{{*other, 1}, {*vip, 1}}, want: "10.0.0.3:80"}),
		toVIP(inboundCase{name: "weighted member beside the single one", serviceVia: other, weighted: []WeightedWaypoint{{*vip, 5}}, want: "10.0.0.3:80"}),
		toVIP(inboundCase{name: "member without weight", serviceVia: other, weighted: []WeightedWaypoint{{*vip, 0}, {*other, 1}}, wantErr: ErrIPMismatch}),
		toVIP(inboundCase{name: "waypoint by hostname of a service", serviceVia: byHost("waypoint.ns.svc", 15008), want: "10.0.0.3:80"}),
		toVIP(inboundCase{name: "waypoint by hostname of a workload", serviceVia: byHost("way.host", 15008), want: "10.0.0.3:80"}),
		toVIP(inboundCase{name: "waypoint by hostname of nobody", serviceVia: byHost("nobody", 15008), wantErr: ErrIPMismatch}),
		toVIP(inboundCase{name: "another waypoint", serviceVia: other, wantErr: ErrIPMismatch}),
		toVIP(inboundCase{name: "waypoint in another network", serviceVia: inRemote(gw(inWaypoint, 15008)), wantErr: ErrIPMismatch}),
		toVIP(inboundCase{name: "of a service that our namespace does not see", serviceVia: vip, serviceMods: []func(*Service){hidden}, want: "10.0.0.3:80"}),
		toVIP(inboundCase{name: "of the service of our namespace, beside a canonical one", serviceVia: vip, others: []*Service{
			{Namespace: "other", Hostname: "canonical", Canonical: true, VIPs: []NetworkAddress{{"", addr(inVIP)}}}}, want: "10.0.0.3:80"}),
		toVIP(inboundCase{name: "of a service of a third namespace, beside a canonical one of another", serviceVia: vip, others: []*Service{
			{Namespace: "other", Hostname: "canonical", Canonical: true, VIPs: []NetworkAddress{{"", addr(inVIP)}}}}, want: "10.0.0.3:80",
			serviceMods: []func(*Service){func(s *Service) { s.Namespace = "third" }}}),
		{name: "the service of the server does not make it a waypoint", serviceVia: vip, local: "server", conn: inServer, authority: inVIP + ":80", wantErr: ErrIPMismatch},
		{name: "a tunnel takes any address", tunnel: &ApplicationTunnel{Port: 15088}, local: "waypoint", conn: inWaypoint, authority: inClient + ":80", want: "10.0.0.3:15088"},
		{name: "a tunnel without port or PROXY", tunnel: &ApplicationTunnel{}, local: "waypoint", conn: inWaypoint, authority: inClient + ":80", want: "10.0.0.3:80"},
		{name: "a tunnel without port", tunnel: &ApplicationTunnel{Proxy: true}, local: "waypoint", conn: inWaypoint, authority: "[2001:db8::1]:80",
			want: "10.0.0.3:80", proxy: true, target: "[2001:db8::1]:80"},
		{name: "mapped address", local: "server", conn: inServer, authority: "[::ffff:10.0.0.2]:8080", want: "10.0.0.2:8080"},
		{name: "no authority", local: "server", conn: inServer, text: "no authority"},
	})
	if _, err := New(Config{}).Inbound(InboundQuery{}); err == nil {
		t.Error("no error without a local workload")
	}
}

func TestInboundHostname(t *testing.T) {
	tunnel := &ApplicationTunnel{Proxy: true, Port: 15088}
	toHost := func(c inboundCase) inboundCase {
		c.local, c.conn, c.host, c.port, c.tunnel = "waypoint", inWaypoint, "server.ns.svc", 80, tunnel
		if c.want == "" && c.text == "" {
			c.want, c.proxy = "10.0.0.3:15088", true
		}
		return c
	}
	addresses := func(list ...NetworkAddress) []func(*Service) {
		return []func(*Service){func(s *Service) { s.VIPs = list }}
	}
	at := func(network, ip string) NetworkAddress { return NetworkAddress{network, addr(ip)} }
	runInbound(t, []inboundCase{
		{name: "unknown", local: "server", conn: inServer, host: "nobody", port: 80, text: "no service or workload for hostname: nobody"},
		{name: "hidden", local: "server", conn: inServer, host: "server.ns.svc", port: 80, text: "no service or workload for hostname: server.ns.svc",
			serviceMods: []func(*Service){func(s *Service) { s.Namespace, s.Visibility = "hidden", NamespaceVisibility }}},
		{name: "port", local: "server", conn: inServer, host: "server.ns.svc", port: 81, text: "requested service server.ns.svc:81 found, but cannot resolve port"},
		{name: "named port of another endpoint", local: "waypoint", conn: inWaypoint, host: "named.ns.svc", port: 80, text: "requested service named.ns.svc:80 found, but cannot resolve port"},
		{name: "named port of ours", local: "server", conn: inServer, host: "named.ns.svc", port: 80, want: "10.0.0.2:9090", service: "named.ns.svc"},
		{name: "we are no endpoint", local: "waypoint", conn: inWaypoint, host: "server.ns.svc", port: 80, want: "10.0.0.3:8080", service: "server.ns.svc"},
		toHost(inboundCase{name: "tunnel", target: inVIP + ":80"}),
		toHost(inboundCase{name: "tunnel, v4 first", serviceMods: addresses(at("far", "10.9.0.1"), at("", "2001:db8::1"), at("", "10.9.0.2")), target: "10.9.0.2:80"}),
		toHost(inboundCase{name: "tunnel, our network first", serviceMods: addresses(at("far", "10.9.0.1"), at("", "2001:db8::1")), target: "[2001:db8::1]:80"}),
		toHost(inboundCase{name: "tunnel, any", serviceMods: addresses(at("far", "10.9.0.1"), at("far", "10.9.0.2")), target: "10.9.0.1:80"}),
		toHost(inboundCase{name: "tunnel, no VIP", serviceMods: addresses(), text: "requested service server.ns.svc found, but has no IP addresses"}),
	})
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

// Addresses mean something in their network only: who has the address of the
// tunnel in another one is not the local workload.
func TestInboundWaypointOfAnotherNetwork(t *testing.T) {
	for _, via := range []*GatewayAddress{inRemote(gw(inWaypoint, 15008)), byHost("far.host", 15008)} {
		s := New(Config{})
		apply(t, s, Update{
			Workloads: []WorkloadUpdate{
				member(Workload{UID: "server", IPs: ips(inServer), Waypoint: via}, nil),
				member(Workload{UID: "local", IPs: ips(inWaypoint)}, nil),
				member(Workload{UID: "far", Network: "remote", Hostname: "far.host", IPs: ips(inWaypoint)}, nil),
			},
		})
		local, _ := s.WorkloadByUID("local")
		r, err := s.Inbound(InboundQuery{Local: local, ConnDst: addrPort(inWaypoint + ":15008"), Addr: addrPort(inServer + ":80")})
		if !errors.Is(err, ErrIPMismatch) {
			t.Errorf("waypoint %s: got %+v, %v", via, r, err)
		}
	}
}
