package proxy

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztunnel-go/ztunnel/proxy/hbone"
	"github.com/ztunnel-go/ztunnel/state"
)

// demands is a control plane that sends what it is asked for.
type demands struct {
	m *mesh

	mu    sync.Mutex // guards what follows
	store *state.Store
	keys  []string
	err   error
	hangs bool
}

// ask is a Config.Demand.
func (d *demands) ask(ctx context.Context, key string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.keys = append(d.keys, key)
	switch {
	case d.hangs:
		<-ctx.Done()
		return ctx.Err()
	case d.err != nil:
		return d.err
	}
	u := state.Update{}
	for _, n := range d.m.nodes {
		names := []string{n.w.UID}
		for _, ip := range n.w.IPs {
			names = append(names, n.w.Network+"/"+ip.String())
		}
		if slices.Contains(names, key) {
			u.Workloads = append(u.Workloads, state.WorkloadUpdate{Workload: n.w, Endpoints: n.services})
		}
	}
	for _, svc := range d.m.services {
		names := []string{svc.Key().String()}
		for _, vip := range svc.VIPs {
			names = append(names, vip.String())
		}
		if !slices.Contains(names, key) {
			continue
		}
		u.Services = append(u.Services, svc)
		for _, n := range d.m.nodes {
			if n.services[svc.Key()] != nil {
				u.Workloads = append(u.Workloads, state.WorkloadUpdate{Workload: n.w, Endpoints: n.services})
			}
		}
	}
	return d.store.Apply(u)
}

// take are the keys that were asked for since the last time, sorted.
func (d *demands) take() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	keys := d.keys
	d.keys = nil
	slices.Sort(keys)
	return keys
}

// fail makes it answer with err, or, if err is nil, not at all.
func (d *demands) fail(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.err, d.hangs = err, err == nil
}

// onDemand makes a node that knows itself alone and asks for the rest.
func (m *mesh) onDemand(name, addr string, options ...nodeOption) (*node, *demands) {
	d := &demands{m: m}
	n := m.add(name, addr, append(options, func(p *nodeParts) { p.world.OnDemand = true }, withConfig(func(c *Config) { c.Demand = d.ask }))...)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.store = n.store
	return n, d
}

func wantKeys(t *testing.T, d *demands, want ...string) {
	t.Helper()
	if got := d.take(); !slices.Equal(got, want) {
		t.Errorf("demanded %v, want %v", got, want)
	}
}

// On demand: the first connection asks, the next ones find it there; a waypoint
// that the answer names is asked for in the next round; what does not exist is
// passed through only when the control plane has said so.
func TestOnDemandOutbound(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		client, d := m.onDemand("client", "10.0.1.2")
		server := m.add("server", "10.0.2.2")
		if err := client.request(server.echoAddr(), "hello"); err != nil {
			t.Fatal(err)
		}
		wantKeys(t, d, "/10.0.2.2")
		if err := client.request(server.echoAddr(), "hello"); err != nil {
			t.Fatal(err)
		}
		wantKeys(t, d)

		// A service by its VIP, with a waypoint of which the client has not heard.
		waypoint := m.peer("10.0.3.2:15008", m.svid("spiffe://cluster.local/ns/default/sa/waypoint"), to(server.echoAddr()))
		m.add("waypoint", "10.0.3.2", uncaptured, withWorkload(func(w *state.Workload) { w.Protocol = state.HBONE }))
		svc := &state.Service{
			Name: "echo", Namespace: "default", Hostname: remoteHost, Ports: []state.Port{{Service: 80, Target: echoPort}},
			VIPs: []state.NetworkAddress{{Addr: remoteVIP.Addr()}}, Waypoint: byAddress("", waypoint.at),
		}
		m.services = append(m.services, svc)
		server.services = map[state.NamespacedHostname][]state.Port{svc.Key(): svc.Ports}
		m.push()
		if err := client.request(remoteVIP, "hello"); err != nil {
			t.Fatalf("%v\n%s", err, client.logs.text("access"))
		}
		wantKeys(t, d, "/10.0.3.2", "/10.96.0.9")
		if n := len(waypoint.got()); n != 1 {
			t.Errorf("the waypoint got %d requests, want 1", n)
		}

		stranger := netip.MustParseAddrPort("192.0.2.1:80")
		m.echo(m.net.Host(stranger.Addr()), stranger)
		if err := client.request(stranger, "out"); err != nil {
			t.Fatal(err)
		}
		wantKeys(t, d, "/192.0.2.1")

		// No answer, no connection: it might not be a stranger.
		d.fail(errors.New("stream lost"))
		if err := client.request(netip.MustParseAddrPort("192.0.2.2:80"), "out"); err == nil {
			t.Error("a request to an address of which the control plane has said nothing succeeded")
		}
		client.wantLog(map[string]string{"message": "connection failed", "error": "look up /192.0.2.2 on demand: stream lost"})
		client.wantMetric(1, "istio_tcp_connections_rejected", map[string]string{"reporter": "source", "reason": "no_route"})
	})
}

// On demand: an inbound request for a service's name, and the workload at the
// client's address, which is worth a second at most and no error.
func TestOnDemandInbound(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		client := m.add("client", "10.0.1.2")
		server, d := m.onDemand("server", "10.0.2.2")
		if err := client.request(server.echoAddr(), "hello"); err != nil {
			t.Fatal(err)
		}
		wantKeys(t, d, "/10.0.1.2")
		server.wantLog(map[string]string{"message": "connection complete", "src.workload": "client", "src.identity": clientID})

		svc := &state.Service{Name: "echo", Namespace: "default", Hostname: remoteHost, Ports: []state.Port{{Service: 80, Target: echoPort}},
			VIPs: []state.NetworkAddress{{Addr: remoteVIP.Addr()}}}
		m.services = append(m.services, svc)
		server.services = map[state.NamespacedHostname][]state.Port{svc.Key(): svc.Ports}
		m.push()
		pool := m.handmade(server, m.svid(clientID))
		defer pool.Close()
		stream, err := pool.Open(m.ctx, "", "10.0.2.2:8080", hbone.Field{Name: fieldNetwork, Value: "far"})
		if err != nil {
			t.Fatal(err)
		}
		stream.Close()
		wantKeys(t, d) // whoever is behind a gateway is not at the gateway's address
		stream, err = pool.Open(m.ctx, "", remoteHost+":80")
		if err != nil {
			t.Fatalf("%v\n%s", err, server.logs.text("access"))
		}
		stream.Close()
		wantKeys(t, d, "/10.0.9.1", "default/"+remoteHost)

		// A look-up for telemetry that fails costs nothing but the labels, and one
		// that hangs a second.
		bare := m.add("bare", "10.0.4.2", uncaptured)
		for _, tt := range []struct {
			err   error
			after time.Duration
		}{{errors.New("stream lost"), 0}, {nil, sourceWait}} {
			d.fail(tt.err)
			start := time.Now()
			if err := bare.request(server.echoAddr(), "hello"); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(start); took != tt.after {
				t.Errorf("look-up ends by %v: served after %v, want %v", tt.err, took, tt.after)
			}
		}
		server.wantMetric(2, "istio_tcp_connections_opened", map[string]string{"source_workload": "unknown", "connection_security_policy": "unknown"})
	})
}

// OUT and INT-03: a workload without address is reached by its host name, and
// each use is counted in one series.
func TestST_INT03_ResolvedOnDemand(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		answers := []netip.Addr{netip.MustParseAddr("10.0.2.2")}
		client := m.add("client", "10.0.1.2", withConfig(func(c *Config) {
			c.Resolve = func(_ context.Context, host string) ([]netip.Addr, error) {
				if host != "vm.example" {
					return nil, errors.New("no such host")
				}
				return answers, nil
			}
		}))
		vm := m.add("server", "10.0.2.2", withWorkload(func(w *state.Workload) { w.IPs, w.Hostname = nil, "vm.example" }))
		svc := &state.Service{Name: "vm", Namespace: "default", Hostname: "vm.default.svc", Ports: []state.Port{{Service: 80, Target: echoPort}},
			VIPs: []state.NetworkAddress{{Addr: remoteVIP.Addr()}}}
		m.services = append(m.services, svc)
		vm.services = map[state.NamespacedHostname][]state.Port{svc.Key(): svc.Ports}
		m.push()
		for range 2 {
			if err := client.request(remoteVIP, "hello"); err != nil {
				t.Fatalf("%v\n%s", err, client.logs.text("access"))
			}
		}
		client.wantMetric(2, "istio_on_demand_dns", map[string]string{"source_workload": "client", "hostname": "vm.example", "source_principal": clientID})
		synctest.Wait()
		if n := len(client.logs.find(map[string]string{"message": "connection complete", "dst.addr": "10.0.2.2:15008", "dst.hbone_addr": "10.0.2.2:8080", "error": ""})); n != 2 {
			t.Errorf("%d such lines in\n%s", n, client.logs.text("access"))
		}
		// Its tunnel is not retired at each change of the world for having no address.
		m.push()
		synctest.Wait()
		if err := client.request(remoteVIP, "hello"); err != nil {
			t.Fatal(err)
		}
		if s := client.proxy.pool.Stats(); s.Dialed != 1 {
			t.Errorf("%d tunnels dialled, want 1", s.Dialed)
		}

		answers = nil
		if err := client.request(remoteVIP, "hello"); err == nil {
			t.Error("a request to nowhere succeeded")
		}
		client.wantLog(map[string]string{"message": "connection failed",
			"error": "ip addresses were resolved for workload " + vm.w.UID + ", but valid dns response had no A/AAAA records"})
	})
}
