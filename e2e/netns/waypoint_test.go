//go:build e2e

package netns

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/ztunnel-go/ztunnel/e2e/world"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/xds/workloadpb"
)

// waypointWorld is a captured client, a server, and a waypoint made by hand,
// which a control plane knows.
type waypointWorld struct {
	*world.World
	client, server, waypoint *world.Pod
}

func newWaypointWorld(t *testing.T) *waypointWorld {
	t.Helper()
	w := world.New(t)
	m := &waypointWorld{World: w, client: w.AddPod("client", 1), server: w.AddPod("server", 2), waypoint: w.AddPod("waypoint", 2)}
	m.client.Redirect()
	m.server.Captured = true // HBONE, although nobody gets there in these rows
	m.waypoint.Captured = true
	return m
}

var (
	serviceVIP  = netip.MustParseAddr("10.96.0.1")
	waypointVIP = netip.MustParseAddr("10.96.0.2")
)

// checkWaypoint sends one request of the client to dst, which the waypoint has to
// answer, and looks at what the source counts and logs: M(11/20).
func (m *waypointWorld) checkWaypoint(source world.ProxyOptions, dst netip.AddrPort) {
	t := m.T
	t.Helper()
	s := m.waypoint.StartHBONE(15008, world.EchoTunnel)
	source.XDS = true
	p := m.client.StartProxy(source)
	m.client.Exchange(dst, greeting, world.WaypointPrefix+greeting)
	s.Expect(t, world.TunnelRequest{Authority: dst.String(), Peer: m.client.Identity()})
	p.Expect(m.Ctx, world.Fields{
		"message": "connection complete", "scope": "access", "direction": "outbound", "error": "",
		"src.workload": "client", "src.namespace": "default", "src.identity": m.client.Identity(),
		"dst.workload": "waypoint", "dst.namespace": "default", "dst.identity": m.waypoint.Identity(),
		"dst.addr": m.waypoint.At(15008).String(), "dst.hbone_addr": dst.String(), "bytes_sent": "11", "bytes_recv": "20",
	})
	p.ExpectMetrics(m.Ctx, "source", map[string]string{
		"source_workload": "client", "destination_workload": "waypoint",
		"connection_security_policy": "mutual_tls", "request_protocol": "tcp", "response_flags": "-",
	}, 11, 20)
}

// N-08: what goes straight to a pod goes to the waypoint of that pod.
func TestDP_N08_WorkloadWaypoint(t *testing.T) { inBoth(t, checkWorkloadWaypoint) }

func checkWorkloadWaypoint(t *testing.T, source world.ProxyOptions) {
	m := newWaypointWorld(t)
	server := m.server.Workload()
	server.Waypoint = world.GatewayAt("", m.waypoint.Addr, 15008)
	m.PublishPods(server)
	m.checkWaypoint(source, m.server.At(8080))
}

// N-11: the waypoint of a service, by its address.
func TestDP_N11_ServiceWaypoint(t *testing.T) { inBoth(t, checkServiceWaypoint) }

func checkServiceWaypoint(t *testing.T, source world.ProxyOptions) {
	m := newWaypointWorld(t)
	server, service := m.server.Workload(), world.NewService("server", serviceVIP, 80, 8080)
	world.Endpoint(server, "server", 80, 8080)
	service.Waypoint = world.GatewayAt("", m.waypoint.Addr, 15008)
	m.PublishPods(server)
	m.Publish(service)
	m.checkWaypoint(source, netip.AddrPortFrom(serviceVIP, 80))
}

// N-12: a workload's waypoint by the name of a service.
func TestDP_N12_WaypointByServiceHostname(t *testing.T) { inBoth(t, checkWaypointByService) }

func checkWaypointByService(t *testing.T, source world.ProxyOptions) {
	m := newWaypointWorld(t)
	server, waypoint := m.server.Workload(), m.waypoint.Workload()
	server.Waypoint = world.GatewayNamed(world.Hostname("waypoint"), 15008)
	world.Endpoint(waypoint, "waypoint", 15008, 15008)
	m.PublishPods(server, waypoint)
	m.Publish(world.NewService("waypoint", waypointVIP, 15008, 15008))
	m.checkWaypoint(source, m.server.At(8080))
}

// N-13: the name is that of a workload, and no service has it.
func TestDP_N13_WaypointByWorkloadHostname(t *testing.T) { inBoth(t, checkWaypointByWorkload) }

func checkWaypointByWorkload(t *testing.T, source world.ProxyOptions) {
	m := newWaypointWorld(t)
	server, waypoint := m.server.Workload(), m.waypoint.Workload()
	waypoint.Hostname = "waypoint.example.com"
	server.Waypoint = world.GatewayNamed(waypoint.Hostname, 15008)
	m.PublishPods(server, waypoint)
	m.checkWaypoint(source, m.server.At(8080))
}

// checkSandwich sends one request to the server, which runs behind a proxy of
// its own, by way of a waypoint behind one, whose implementation o chooses.
func (m *waypointWorld) checkSandwich(o world.ProxyOptions) {
	t := m.T
	t.Helper()
	m.server.StartApp()
	for _, p := range []*world.Pod{m.server, m.waypoint} {
		p.Redirect()
	}
	var proxies []*world.Proxy
	o.XDS = true
	for _, p := range []*world.Pod{m.server, m.waypoint, m.client} {
		options := world.ProxyOptions{XDS: true, Shared: o.Shared}
		if p == m.waypoint {
			options = o
		}
		proxies = append(proxies, p.StartProxy(options))
	}
	dst := m.server.At(world.DoublePort)
	m.client.Exchange(dst, greeting, greeting+greeting)
	line := func(from, to *world.Pod, addr, hboneAddr netip.AddrPort) world.Fields {
		return world.Fields{
			"message": "connection complete", "error": "", "src.workload": from.Name, "src.identity": from.Identity(),
			"dst.workload": to.Name, "dst.identity": to.Identity(), "dst.addr": addr.String(), "dst.hbone_addr": hboneAddr.String(),
		}
	}
	proxies[2].Expect(m.Ctx, line(m.client, m.waypoint, m.waypoint.At(15008), dst))
	proxies[1].Expect(m.Ctx, line(m.waypoint, m.server, m.server.At(15008), dst))
	inbound := line(m.waypoint, m.server, m.server.At(15008), dst)
	inbound["direction"] = "inbound"
	proxies[0].Expect(m.Ctx, inbound)
}

// N-14: a waypoint behind its own proxy that gets what it is asked for as plain
// TCP.
func TestDP_N14_SandwichPlain(t *testing.T) { inBoth(t, checkSandwichPlain) }

func checkSandwichPlain(t *testing.T, waypointProxy world.ProxyOptions) {
	m := newWaypointWorld(t)
	server, waypoint := m.server.Workload(), m.waypoint.Workload()
	waypoint.ApplicationTunnel = &workloadpb.ApplicationTunnel{Protocol: workloadpb.ApplicationTunnel_NONE}
	server.Waypoint = world.GatewayAt("", m.waypoint.Addr, 15008)
	m.PublishPods(server, waypoint)
	m.waypoint.Forward(world.DoublePort, func(netns.Conn) (netip.AddrPort, error) { return m.server.At(world.DoublePort), nil })
	m.checkSandwich(waypointProxy)
}

// tlvAuthority carries the SPIFFE ID of the client (spec/datapath.md §6.6).
const tlvAuthority = 0xD0

// N-15: a waypoint behind its own proxy that learns from a PROXY header who asks
// for what. Its service has an address and no ports.
func TestDP_N15_SandwichProxyProtocol(t *testing.T) { inBoth(t, checkSandwichProxy) }

func checkSandwichProxy(t *testing.T, waypointProxy world.ProxyOptions) {
	m := newWaypointWorld(t)
	server, waypoint := m.server.Workload(), m.waypoint.Workload()
	waypoint.ApplicationTunnel = &workloadpb.ApplicationTunnel{Protocol: workloadpb.ApplicationTunnel_PROXY, Port: 15088}
	world.Endpoint(waypoint, "waypoint")
	server.Waypoint = world.GatewayAt("", waypointVIP, 15008)
	m.PublishPods(server, waypoint)
	m.Publish(world.NewService("waypoint", waypointVIP))
	m.waypoint.Forward(15088, func(c netns.Conn) (netip.AddrPort, error) {
		h, err := world.ReadProxyHeader(c)
		if err == nil && (h.Src.Addr() != m.client.Addr || h.TLVs[tlvAuthority] != m.client.Identity()) {
			err = fmt.Errorf("PROXY header of %v with %q, want %v with %q", h.Src, h.TLVs, m.client.Addr, m.client.Identity())
		}
		return h.Dst, err
	})
	m.checkSandwich(waypointProxy)
}
