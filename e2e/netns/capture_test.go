//go:build e2e

package netns

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/world"
)

const greeting = "hello world"

// N-01 to N-04 in shared mode, N-05 to N-07 in dedicated mode, and what each table
// leaves out of the other: every way of capturing, on one node and on two; what
// both ends of the connection count and log. In dedicated mode each captured pod
// has its own proxy, in shared mode two pods of one node have the same.
func TestDP_N01_N07_Capture(t *testing.T) {
	for _, tc := range []struct {
		name string
		o    world.PairOptions
	}{
		{"N-01 both, same node", world.PairOptions{SameNode: true, CaptureClient: true, CaptureServ: true}},
		{"N-02 N-05 server uncaptured", world.PairOptions{CaptureClient: true}},
		{"N-03 N-06 client uncaptured", world.PairOptions{CaptureServ: true}},
		{"N-04 N-07 both, across nodes", world.BothCaptured},
		{"none", world.PairOptions{}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			in(t, allModes, func(t *testing.T, m mode) { newPair(t, m.pair(tc.o)).checkExchange() })
		})
	}
}

// checkExchange is the body of N-01 to N-07: 11 bytes there, 22 back.
func (p *pair) checkExchange() {
	t := p.T
	t.Helper()
	c := p.Dial(world.DoublePort)
	if err := world.Exchange(c, greeting, greeting+greeting); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	hbone := p.Source != nil && p.Dest != nil
	security, clientID, serverID := "unknown", "", ""
	if hbone {
		security, clientID, serverID = "mutual_tls", p.Client.Identity(), p.Server.Identity()
	}
	labels := map[string]string{
		"source_workload": "client", "destination_workload": "server",
		"connection_security_policy": security, "request_protocol": "tcp", "response_flags": "-",
	}
	line := world.Fields{
		"message": "connection complete", "scope": "access", "error": "",
		"src.workload": "client", "src.namespace": "default", "src.identity": clientID,
		"dst.workload": "server", "dst.namespace": "default", "dst.identity": serverID,
		"dst.addr": p.Server.At(world.DoublePort).String(),
	}
	if hbone {
		line["dst.addr"], line["dst.hbone_addr"] = p.Server.At(15008).String(), p.Server.At(world.DoublePort).String()
	} else {
		line["dst.hbone_addr"] = ""
	}
	if p.Source != nil {
		line["direction"], line["bytes_sent"], line["bytes_recv"] = "outbound", "11", "22"
		p.Source.Expect(p.Ctx, line)
		p.Source.ExpectMetrics(p.Ctx, "source", labels, 11, 22)
	}
	if p.Dest != nil {
		line["direction"], line["bytes_sent"], line["bytes_recv"] = "inbound", "22", "11"
		p.Dest.Expect(p.Ctx, line)
		p.Dest.ExpectMetrics(p.Ctx, "destination", labels, 11, 22)
	}
	// The server sees the client, not a proxy.
	p.Client.ExpectHello(p.Client.Addr, p.Server.At(world.HTTPPort))
	p.Client.ExpectHello(p.Client.Addr6, netip.AddrPortFrom(p.Server.Addr6, world.HTTPPort))
}

// Two connections with the client's address reach the server of a captured pod:
// the client's and the proxy's. If the proxy's took the client's port, the
// kernel would take its packets for the client's.
func TestOriginalSourceAvoidsClientPorts(t *testing.T) {
	in(t, allModes, func(t *testing.T, m mode) {
		newPair(t, m.pair(world.PairOptions{CaptureServ: true})).checkClientPorts()
	})
}

func (p *pair) checkClientPorts() {
	t := p.T
	t.Helper()
	p.Server.Sysctl(map[string]string{"net/ipv4/ip_local_port_range": "40000 40003"})
	// What connect chooses first, here as at the client, is the even ones.
	for _, port := range []string{"40000", "40002"} {
		out, err := world.Command(p.Ctx, greeting, p.Client.In("nc", "-N", "-w", "5", "-p", port, p.Server.Addr.String(), fmt.Sprint(world.LatePort))...)
		if err != nil || out != greeting {
			t.Errorf("client port %s: got %q, %v, want %q", port, out, err, greeting)
		}
	}
}

// faults row 89: a captured application reaches itself through its service, and
// does not loop.
func TestFault89_Hairpin(t *testing.T) { in(t, allModes, checkHairpin) }

func checkHairpin(t *testing.T, m mode) {
	w := world.New(t)
	p := w.AddPod("self", 1)
	p.Services = `"default/self.default.svc.cluster.local": {80: 8080}`
	w.Services = `{name: self, namespace: default, hostname: self.default.svc.cluster.local, vips: ["/10.96.0.1"], ports: {80: 8080}}`
	p.StartApp()
	p.RedirectBy(m.rules)
	w.WriteConfig()
	s := p.StartProxy(m.proxy)
	p.ExpectHello(p.Addr, netip.MustParseAddrPort("10.96.0.1:80"))
	s.Expect(w.Ctx, world.Fields{"message": "connection complete", "direction": "outbound", "dst.service": "self.default.svc.cluster.local", "error": ""})
}

// faults row 90: rules that capture the proxy's own packets, because they
// carry no mark, must not make it dial itself for ever.
func TestFault90_MarkLost(t *testing.T) { in(t, allModes, checkMarkLost) }

func checkMarkLost(t *testing.T, m mode) {
	o := m.pair(world.PairOptions{CaptureClient: true})
	o.Source.Env = []string{"PACKET_MARK=0"}
	p := newPair(t, o)
	c := p.Dial(world.ChatPort)
	if err := world.Exchange(c, "lost", "lost"); err == nil {
		t.Error("works without the mark: the rules do not capture")
	}
	// Each turn is a race between the dialler and the acceptor, and on a busy machine
	// the acceptor wins some. Without the check the turns end with the descriptors.
	opened, err := p.Source.Metric("istio_tcp_connections_opened_total", map[string]string{"reporter": "source"})
	if err != nil || opened > 32 {
		t.Errorf("%v connections opened for one, %v", opened, err)
	}
}

// faults row 95: a port of the proxy that the pod itself has taken is a clear
// failure, not a silent share.
func TestFault95_PortTaken(t *testing.T) {
	t.Parallel()
	w := world.New(t)
	p := w.AddPod("server", 1)
	ln, err := p.Net.Listen(w.Ctx, netip.MustParseAddrPort("[::]:15008"))
	if err == nil {
		t.Cleanup(func() { _ = ln.Close() })
	} else {
		t.Fatal(err)
	}
	w.WriteConfig()
	s := p.Start("ztunnel", []string{
		"PROXY_MODE=dedicated", "PROXY_WORKLOAD_INFO=default/server/server", "XDS_ADDRESS=", "LOCAL_XDS_PATH=" + w.ConfigFile(),
		"CA_PROVIDER=local", "CA_LOCAL_DIR=" + w.CADir(), "NODE_NAME=node1",
	}, world.Binary(t, "ZTUNNEL_BIN"), "proxy")
	if code := s.Wait(20 * time.Second); code == 0 {
		t.Error("exit code 0, want a failure")
	}
	if _, err := s.Find(w.Ctx, time.Second, func(line string) bool {
		return strings.Contains(line, "failed to bind to address") && strings.Contains(line, ":15008")
	}); err != nil {
		t.Errorf("the log does not name the address: %v", err)
	}
}
