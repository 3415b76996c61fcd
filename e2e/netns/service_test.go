//go:build e2e

package netns

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/ztunnel-go/ztunnel/e2e/world"
	"github.com/ztunnel-go/ztunnel/xds/workloadpb"
)

// N-09: the only endpoint is in another network, and its gateway has an address.
func TestDP_N09_DoubleHBONE(t *testing.T) { inBoth(t, checkDoubleHBONE) }

func checkDoubleHBONE(t *testing.T, source world.ProxyOptions) {
	checkGateway(t, source, func(gateway *world.Pod) *workloadpb.GatewayAddress {
		return world.GatewayAt(homeNetwork, gateway.Addr, 15008)
	})
}

// N-10: the gateway is a service, which maps the port.
func TestDP_N10_DoubleHBONEByHostname(t *testing.T) { inBoth(t, checkDoubleHBONEByHostname) }

func checkDoubleHBONEByHostname(t *testing.T, source world.ProxyOptions) {
	checkGateway(t, source, func(*world.Pod) *workloadpb.GatewayAddress {
		return world.GatewayNamed(world.Hostname("gateway"), 15009)
	})
}

const homeNetwork = "home"

func checkGateway(t *testing.T, source world.ProxyOptions, reference func(gateway *world.Pod) *workloadpb.GatewayAddress) {
	w := world.New(t)
	client, gateway, echo := w.AddPod("client", 1), w.AddPod("gateway", 2), w.AddPod("echo", 2)
	client.Redirect()
	gateway.Captured = true
	inner := echo.StartHBONE(15008, world.EchoTunnel)
	outer := gateway.StartHBONE(15008, gateway.ForwardTunnel(echo.At(15008)))

	self, remote, entry := client.Workload(), echo.Workload(), gateway.Workload()
	service, gateways := world.NewService("remote", serviceVIP, 8080, 8080), world.NewService("gateway", waypointVIP, 15009, 15008)
	self.Network, entry.Network = homeNetwork, homeNetwork
	service.Addresses[0].Network, gateways.Addresses[0].Network = homeNetwork, homeNetwork
	remote.Uid, remote.Name, remote.WorkloadName = "remote/SplitHorizonWorkload/remote", "remote", "remote"
	remote.Addresses, remote.Network, remote.TunnelProtocol = nil, "remote", workloadpb.TunnelProtocol_HBONE
	remote.NetworkGateway = reference(gateway)
	world.Endpoint(remote, "remote", 8080, 8080)
	service.SubjectAltNames = []string{echo.Identity()}
	world.Endpoint(entry, "gateway", 15009, 15008)
	w.Publish(self, entry, remote, service, gateways)

	source.XDS = true
	source.Env = append(slices.Clone(source.Env), "NETWORK="+homeNetwork)
	p := client.StartProxy(source)
	client.Exchange(netip.AddrPortFrom(serviceVIP, 8080), greeting, world.WaypointPrefix+greeting)
	authority := world.Hostname("remote") + ":8080"
	outer.Expect(t, world.TunnelRequest{Authority: authority, Peer: client.Identity()})
	inner.Expect(t, world.TunnelRequest{Authority: authority, Peer: client.Identity(), Network: homeNetwork})
	p.Expect(w.Ctx, world.Fields{
		"message": "connection complete", "direction": "outbound", "error": "", "bytes_sent": "11", "bytes_recv": "20",
		"src.identity": client.Identity(), "dst.workload": "echo", "dst.hbone_addr": authority,
		"dst.addr": gateway.At(15008).String(), "dst.identity": echo.Identity(),
	})
	p.ExpectMetrics(w.Ctx, "source", map[string]string{
		"source_workload": "client", "destination_workload": "echo", "connection_security_policy": "mutual_tls", "response_flags": "-",
	}, 11, 20)
}

// N-16: a service with an endpoint on this node and one on another.
func TestDP_N16_ServiceLoadBalancing(t *testing.T) {
	inBoth(t, func(t *testing.T, o world.ProxyOptions) { checkLoadBalancing(t, o, o) })
}

func checkLoadBalancing(t *testing.T, source, dest world.ProxyOptions) {
	w := world.New(t)
	client := w.AddPod("client", 1)
	local, remote := w.AddPod("local", 1), w.AddPod("remote", 2)
	w.Publish(world.NewService("server", serviceVIP, 80, world.DoublePort))
	for _, p := range []*world.Pod{client, local, remote} {
		p.Redirect()
		wl := p.Workload()
		if p != client {
			world.Endpoint(wl, "server", 80, world.DoublePort)
			p.StartApp()
		}
		w.Publish(wl)
	}
	source.XDS, dest.XDS = true, true
	dests := map[*world.Pod]*world.Proxy{local: local.StartProxy(dest), remote: remote.StartProxy(dest)}
	p := client.StartProxy(source)
	dst := netip.AddrPortFrom(serviceVIP, 80)
	labels := map[string]string{
		"reporter": "source", "source_workload": "client", "destination_service": world.Hostname("server"),
		"destination_service_name": "server", "destination_service_namespace": "default", "response_flags": "-",
	}
	client.Exchange(dst, greeting, greeting+greeting)
	p.ExpectMetric(w.Ctx, "istio_tcp_connections_opened_total", labels, 1)

	const more = 50
	for range more {
		client.Exchange(dst, greeting, greeting+greeting)
	}
	p.ExpectMetric(w.Ctx, "istio_tcp_connections_opened_total", labels, 1+more)
	sum := 0.0
	for pod, d := range dests {
		labels["reporter"], labels["destination_principal"] = "source", pod.Identity()
		n, err := p.Metric("istio_tcp_connections_opened_total", labels)
		if err != nil || n == 0 {
			t.Errorf("connections to %s: %v, %v", pod.Name, n, err)
		}
		sum += n
		labels["reporter"] = "destination"
		d.ExpectMetric(w.Ctx, "istio_tcp_connections_opened_total", labels, n)
	}
	if sum != 1+more {
		t.Errorf("%v connections to the two endpoints, want %d", sum, 1+more)
	}
}

// N-21: a gateway asks for a service by name; the pod knows its port.
func TestDP_N21_ServiceHostnamePort(t *testing.T) {
	inBoth(t, func(t *testing.T, o world.ProxyOptions) { checkServiceHostname(t, o, 8080) })
}

// N-22: the service names the port, and only the endpoint knows its number.
func TestDP_N22_ServiceHostnameNamedPort(t *testing.T) {
	inBoth(t, func(t *testing.T, o world.ProxyOptions) { checkServiceHostname(t, o, 0) })
}

func checkServiceHostname(t *testing.T, dest world.ProxyOptions, target uint32) {
	w := world.New(t)
	client, server := w.AddPod("client", 1), w.AddPod("server", 2)
	server.Redirect()
	server.StartApp()
	wl := server.Workload()
	world.Endpoint(wl, "server", 80, 8080)
	w.Publish(client.Workload(), wl, world.NewService("server", serviceVIP, 80, target))
	dest.XDS = true
	p := server.StartProxy(dest)
	authority := world.Hostname("server") + ":80"
	expectStatus(t, client, server, strangerID, authority, 200)
	p.Expect(w.Ctx, world.Fields{"direction": "inbound", "src.identity": strangerID, "dst.workload": "server", "dst.hbone_addr": authority})
	expectStatus(t, client, server, strangerID, world.Hostname("nobody")+":80", 503)
	expectStatus(t, client, server, strangerID, fmt.Sprintf("%s:%d", world.Hostname("server"), 81), 503)
}

// A workload that has a name and no address is looked up by the proxy, once a
// connection needs it.
func TestXDS_HostnameWorkload(t *testing.T) {
	const name = "db.example.com"
	w := world.New(t)
	client, server := w.AddPod("client", 1), w.AddPod("server", 2)
	client.Redirect()
	client.ServeDNS(map[string]netip.Addr{name: server.Addr})
	server.StartApp()
	external := &workloadpb.Workload{Uid: "Kubernetes/networking.istio.io/ServiceEntry/default/db", Name: "db", Namespace: "default", Hostname: name, WorkloadName: "db"}
	world.Endpoint(external, "db", 5432, world.DoublePort)
	w.Publish(client.Workload(), external, world.NewService("db", serviceVIP, 5432, world.DoublePort))
	p := client.StartProxy(world.ProxyOptions{XDS: true})
	client.Exchange(netip.AddrPortFrom(serviceVIP, 5432), greeting, greeting+greeting)
	p.Expect(w.Ctx, world.Fields{
		"message": "connection complete", "direction": "outbound", "error": "", "dst.workload": "db",
		"dst.service": world.Hostname("db"), "dst.addr": server.At(world.DoublePort).String(),
	})
	p.ExpectMetric(w.Ctx, "istio_on_demand_dns_total", nil, 1)
}
