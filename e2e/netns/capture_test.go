//go:build e2e

package netns

import (
	"fmt"
	"io"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// pair is a client and a server pod with the application "server" and, where
// captured, a proxy.
type pair struct {
	*world
	client, server   *pod
	source, dest     *proxy // nil = uncaptured
	app              *process
	otherImplemented bool // a peer takes part
}

type pairOptions struct {
	sameNode                   bool
	captureClient, captureServ bool
	source, dest               proxyOptions
	policies                   string
}

func newPair(t *testing.T, o pairOptions) *pair {
	t.Helper()
	p := &pair{world: newWorld(t), otherImplemented: o.source.peer || o.dest.peer}
	p.policies = o.policies
	p.client = p.addPod("client", 1)
	serverNode := 2
	if o.sameNode {
		serverNode = 1
	}
	p.server = p.addPod("server", serverNode)
	p.app = p.server.startApp()
	if o.captureClient {
		p.client.redirect()
	}
	if o.captureServ {
		p.server.redirect()
	}
	p.writeConfig()
	if o.captureServ {
		p.dest = p.server.startProxy(o.dest)
	}
	if o.captureClient {
		p.source = p.client.startProxy(o.source)
	}
	return p
}

var bothCaptured = pairOptions{captureClient: true, captureServ: true}

// dial connects an application in the client pod to a port of the server.
func (p *pair) dial(port uint16) netns.Conn {
	p.t.Helper()
	c, err := p.client.net.Dial(p.ctx, netip.Addr{}, p.server.at(port))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		p.t.Fatal(err)
	}
	return c
}

// exchange sends and expects an answer.
func exchange(c netns.Conn, send, want string) error {
	if _, err := io.WriteString(c, send); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	buf := make([]byte, len(want))
	if n, err := io.ReadFull(c, buf); err != nil {
		return fmt.Errorf("receive: %w after %d bytes", err, n)
	}
	if string(buf) != want {
		return fmt.Errorf("got %q, want %q", buf, want)
	}
	return nil
}

const greeting = "hello world"

// N-01 to N-07: every way of capturing, on one node and on two; what both ends
// of the connection count and log. In dedicated mode each captured pod has its
// own proxy, so N-01 and N-04 differ in the nodes only, N-05 and N-06 are N-02
// and N-03, and N-07 is N-04.
func TestDP_N01_N07_Capture(t *testing.T) {
	for _, tc := range []struct {
		name string
		o    pairOptions
	}{
		{"N-01 both, same node", pairOptions{sameNode: true, captureClient: true, captureServ: true}},
		{"N-02 N-05 server uncaptured", pairOptions{captureClient: true}},
		{"N-03 N-06 client uncaptured", pairOptions{captureServ: true}},
		{"N-04 N-07 both, across nodes", bothCaptured},
		{"none", pairOptions{}},
	} {
		t.Run(tc.name, func(t *testing.T) { newPair(t, tc.o).checkExchange() })
	}
}

// checkExchange is the body of N-01 to N-07: 11 bytes there, 22 back.
func (p *pair) checkExchange() {
	t := p.t
	t.Helper()
	c := p.dial(doublePort)
	if err := exchange(c, greeting, greeting+greeting); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	hbone := p.source != nil && p.dest != nil
	security, clientID, serverID := "unknown", "", ""
	if hbone {
		security, clientID, serverID = "mutual_tls", p.client.identity(), p.server.identity()
	}
	labels := map[string]string{
		"source_workload": "client", "destination_workload": "server",
		"connection_security_policy": security, "request_protocol": "tcp", "response_flags": "-",
	}
	line := fields{
		"message": "connection complete", "scope": "access", "error": "",
		"src.workload": "client", "src.namespace": "default", "src.identity": clientID,
		"dst.workload": "server", "dst.namespace": "default", "dst.identity": serverID,
		"dst.addr": p.server.at(doublePort).String(),
	}
	if hbone {
		line["dst.addr"], line["dst.hbone_addr"] = p.server.at(15008).String(), p.server.at(doublePort).String()
	} else {
		line["dst.hbone_addr"] = ""
	}
	if p.source != nil {
		line["direction"], line["bytes_sent"], line["bytes_recv"] = "outbound", "11", "22"
		p.source.expect(p.ctx, line)
		p.source.expectMetrics(p.ctx, "source", labels, 11, 22)
	}
	if p.dest != nil {
		line["direction"], line["bytes_sent"], line["bytes_recv"] = "inbound", "22", "11"
		p.dest.expect(p.ctx, line)
		p.dest.expectMetrics(p.ctx, "destination", labels, 11, 22)
	}
	// The server sees the client, not a proxy.
	p.client.expectHello(p.client.addr, p.server.at(httpPort))
	p.client.expectHello(p.client.addr6, netip.AddrPortFrom(p.server.addr6, httpPort))
}

// Two connections with the client's address reach the server of a captured pod:
// the client's and the proxy's. If the proxy's took the client's port, the
// kernel would take its packets for the client's.
func TestOriginalSourceAvoidsClientPorts(t *testing.T) {
	p := newPair(t, pairOptions{captureServ: true})
	p.sysctl(p.server.ns, map[string]string{"net/ipv4/ip_local_port_range": "40000 40003"})
	// What connect chooses first, here as at the client, is the even ones.
	for _, port := range []string{"40000", "40002"} {
		out, err := command(p.ctx, greeting, p.client.in("nc", "-N", "-w", "5", "-p", port, p.server.addr.String(), fmt.Sprint(latePort))...)
		if err != nil || out != greeting {
			t.Errorf("client port %s: got %q, %v, want %q", port, out, err, greeting)
		}
	}
}

// faults row 89: a captured application reaches itself through its service, and
// does not loop.
func TestFault89_Hairpin(t *testing.T) {
	w := newWorld(t)
	p := w.addPod("self", 1)
	p.services = `"default/self.default.svc.cluster.local": {80: 8080}`
	w.services = `{name: self, namespace: default, hostname: self.default.svc.cluster.local, vips: ["/10.96.0.1"], ports: {80: 8080}}`
	p.startApp()
	p.redirect()
	w.writeConfig()
	s := p.startProxy(proxyOptions{})
	p.expectHello(p.addr, netip.MustParseAddrPort("10.96.0.1:80"))
	s.expect(w.ctx, fields{"message": "connection complete", "direction": "outbound", "dst.service": "self.default.svc.cluster.local", "error": ""})
}

// faults row 90: rules that capture the proxy's own packets, because they
// carry no mark, must not make it dial itself for ever.
func TestFault90_MarkLost(t *testing.T) {
	o := pairOptions{captureClient: true}
	o.source.env = []string{"PACKET_MARK=0"}
	p := newPair(t, o)
	c := p.dial(chatPort)
	if err := exchange(c, "lost", "lost"); err == nil {
		t.Error("works without the mark: the rules do not capture")
	}
	opened, err := p.source.metric("istio_tcp_connections_opened_total", map[string]string{"reporter": "source"})
	if err != nil || opened > 4 {
		t.Errorf("%v connections opened for one, %v", opened, err)
	}
}

// faults row 95: a port of the proxy that the pod itself has taken is a clear
// failure, not a silent share.
func TestFault95_PortTaken(t *testing.T) {
	w := newWorld(t)
	p := w.addPod("server", 1)
	ln, err := p.net.Listen(w.ctx, netip.MustParseAddrPort("[::]:15008"))
	if err == nil {
		t.Cleanup(func() { _ = ln.Close() })
	} else {
		t.Fatal(err)
	}
	w.writeConfig()
	s := p.start("ztunnel", []string{
		"PROXY_MODE=dedicated", "PROXY_WORKLOAD_INFO=default/server/server", "XDS_ADDRESS=", "LOCAL_XDS_PATH=" + w.configFile(),
		"CA_PROVIDER=local", "CA_LOCAL_DIR=" + w.caDir(), "NODE_NAME=node1",
	}, binary(t, "ZTUNNEL_BIN"), "proxy")
	if code := s.wait(20 * time.Second); code == 0 {
		t.Error("exit code 0, want a failure")
	}
	if _, err := s.find(w.ctx, time.Second, func(line string) bool {
		return strings.Contains(line, "failed to bind to address") && strings.Contains(line, ":15008")
	}); err != nil {
		t.Errorf("the log does not name the address: %v", err)
	}
}
