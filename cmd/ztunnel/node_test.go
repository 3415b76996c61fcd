package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ztunnel-go/ztunnel/admin"
	"github.com/ztunnel-go/ztunnel/ca/local"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/proxy/netns/loopback"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// D-01, LC-01.
func TestD01_ShutdownLifecycle(t *testing.T) {
	d := startDirect(t, "n", longDeadline)
	d.client.stop()
	d.client.within(t, 5*time.Second)
}

// D-02…D-05, LC-03…LC-06: an occupied port ends the start.
func TestD02_ConflictingBind(t *testing.T) {
	root, err := local.Open(local.Config{})
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		id, name string
		port     uint16
		admin    bool
	}{
		{"D-02", "inbound", 15008, false},
		{"D-03", "inbound plaintext", 15006, false},
		{"D-04", "outbound", 15001, false},
		{"D-05", "admin", 0, true},
	} {
		t.Run(tt.id+" "+tt.name, func(t *testing.T) {
			host := loopback.New().Host(directClient)
			cfg := directConfig(t, "local", "n")
			network, addr := host.Proxy(), netip.AddrPortFrom(netip.IPv6Unspecified(), tt.port)
			if tt.admin {
				network, addr = netns.NewHost(netns.HostConfig{}), netip.MustParseAddrPort("127.0.0.1:0")
			}
			ln, err := network.Listen(t.Context(), addr)
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			if tt.admin {
				cfg.Listeners.Admin.Addr = ln.Addr()
			}
			n, _ := newDirectNode(t, cfg, host.Proxy(), root)
			err = n.listen(t.Context())
			if err == nil || !strings.Contains(err.Error(), tt.name) || !strings.Contains(err.Error(), "failed to bind to address") {
				t.Errorf("listen = %v, want a bind error of %s", err, tt.name)
			}
		})
	}
}

// D-06, LC-07: a live connection holds the shutdown up, its end lets it through.
func TestD06_ShutdownDrain(t *testing.T) {
	d := startDirect(t, "n", longDeadline)
	c := d.open(directHBONE)
	d.client.stop()
	d.eventually(func() error {
		if at := d.client.data.(*dedicated).proxy.InboundAddr(); at.IsValid() {
			return fmt.Errorf("the proxy still listens at %s", at)
		}
		return nil
	})
	if err := helloWorld(c); err != nil {
		t.Errorf("during the drain: %v", err)
	}
	select {
	case <-d.client.done:
		t.Error("the node ended with a live connection")
	default:
	}
	c.Close()
	d.client.within(t, time.Second)
}

// D-07, LC-08: a client that never closes is cut at the deadline.
func TestD07_ShutdownForcedDrain(t *testing.T) {
	d := startDirect(t, "n", "CONNECTION_TERMINATION_DEADLINE=200ms")
	c := d.open(directHBONE)
	d.client.stop()
	d.client.within(t, time.Second)
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("the connection outlived its proxy")
	}
	if !strings.Contains(d.client.logs.String(), "drain duration expired with pending connections, forcefully shutting down") {
		t.Errorf("no word of the forced end in the log:\n%s", d.client.logs)
	}
}

// D-08, LC-02.
func TestD08_QuitLifecycle(t *testing.T) {
	d := startDirect(t, "n", longDeadline)
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Post("http://"+d.client.adminAddr()+"/quitquitquit", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("status = %d, want 200", resp.StatusCode)
	}
	d.client.within(t, 5*time.Second)
}

// D-09…D-11, and D-13…D-15 with the node named local.
func TestD09_Requests(t *testing.T) {
	for i, nodeName := range []string{"n", "local"} {
		d := startDirect(t, nodeName)
		for _, tt := range []struct {
			ids  [2]string
			name string
			dst  netip.AddrPort
		}{
			{[2]string{"D-09", "D-13"}, "hbone", directHBONE},
			{[2]string{"D-10", "D-14"}, "tcp", directTCP},
			{[2]string{"D-11", "D-15"}, "vip", directVIP},
		} {
			t.Run(tt.ids[i]+" "+tt.name+"_request", func(t *testing.T) { d.open(tt.dst).Close() })
		}
		for _, name := range []string{"process_open_fds", "process_max_fds"} {
			_, body := get(t, "http://"+d.client.statsAddr()+"/stats/prometheus")
			if n := strings.Count(body, "\n"+name+" "); n != 1 || d.client.sample(t, name) <= 0 {
				t.Errorf("%s: %d samples, value %v", name, n, d.client.sample(t, name))
			}
		}
	}
}

// D-17, AD-06: istio_build is there, and the help texts tell stable from unstable.
func TestD17_StatsExist(t *testing.T) {
	d := startDirect(t, "n")
	d.open(directHBONE).Close()
	if got := d.client.sample(t, "istio_build", `component="ztunnel"`); got != 1 {
		t.Errorf("istio_build = %v, want 1", got)
	}
	if err := admin.CheckHelp(d.client.registry); err != nil {
		t.Error(err)
	}
}

// D-19: opened while open, closed soon after the end.
func TestD19_TCPConnectionsMetrics(t *testing.T) {
	d := startDirect(t, "n")
	c := d.open(directTCP)
	if opened, closed := d.client.sample(t, "istio_tcp_connections_opened_total"), d.client.sample(t, "istio_tcp_connections_closed_total"); opened != 1 || closed != 0 {
		t.Errorf("while open: opened %v, closed %v, want 1 and 0", opened, closed)
	}
	c.Close()
	d.eventually(func() error {
		if got := d.client.sample(t, "istio_tcp_connections_closed_total"); got != 1 {
			return fmt.Errorf("closed = %v, want 1", got)
		}
		return nil
	})
}

// D-20.
func TestD20_TCPBytesMetrics(t *testing.T) {
	d := startDirect(t, "n")
	d.open(directTCP).Close()
	for _, name := range []string{"istio_tcp_received_bytes_total", "istio_tcp_sent_bytes_total"} {
		d.eventually(func() error {
			if got := d.client.sample(t, name); got != float64(len("hello world")) {
				return fmt.Errorf("%s = %v, want 11", name, got)
			}
			return nil
		})
	}
}

// The dump has the keys that its readers know, certificates among them, and no
// private key; readiness answers; the log level changes at run time.
func TestConfigDump(t *testing.T) {
	d := startDirect(t, "n")
	c := d.open(directHBONE)
	defer c.Close()
	status, body := get(t, "http://"+d.client.adminAddr()+"/config_dump")
	if status != http.StatusOK || strings.Contains(body, "PRIVATE KEY") {
		t.Fatalf("status %d, private key: %t", status, strings.Contains(body, "PRIVATE KEY"))
	}
	var dump struct {
		Certificates []struct {
			Identity, State string
			CertChain       []any
		}
		Config       map[string]any
		Policies     []any
		Services     []any
		Workloads    []any
		StaticConfig map[string][]any
		Version      map[string]any
		ZtunnelGo    struct {
			Connections struct {
				Outbound []map[string]string
			}
		}
	}
	if err := json.Unmarshal([]byte(body), &dump); err != nil {
		t.Fatal(err)
	}
	if len(dump.Certificates) != 1 || dump.Certificates[0].State != "Available" || len(dump.Certificates[0].CertChain) != 1 ||
		dump.Certificates[0].Identity != "spiffe://cluster.local/ns/default/sa/default" {
		t.Errorf("certificates = %+v", dump.Certificates)
	}
	if dump.Config["proxyMode"] != "Dedicated" || len(dump.Workloads) != 3 || len(dump.Services) != 1 || len(dump.StaticConfig["workloads"]) != 3 || dump.Version["cryptoProvider"] == "" {
		t.Errorf("dump = %.2000s", body)
	}
	if out := dump.ZtunnelGo.Connections.Outbound; len(out) != 1 || out[0]["actualDst"] != "10.1.0.3:15008" || out[0]["originalDst"] != "10.1.0.3:8080" || out[0]["protocol"] != "HBONE" {
		t.Errorf("outbound connections = %v", out)
	}
	if status, body := get(t, "http://"+d.client.httpAddr(listenReadiness)+"/healthz/ready"); status != 200 || body != "ready\n" {
		t.Errorf("readiness = %d %q", status, body)
	}
}

// A reload of the local file re-checks the open connections (§12.2 and the
// issue's point 3), and one that does not parse changes nothing.
func TestReload(t *testing.T) {
	d := startDirect(t, "n")
	c := d.open(directHBONE)
	path := d.server.cfg.XDS.LocalPath
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, append(good, "policies: [{name: broken}]"...), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := d.server.world.Check(); err == nil {
		t.Error("a policy without its keys was accepted")
	}
	if err := helloWorld(c); err != nil {
		t.Errorf("after a reload that failed: %v", err)
	}
	deny := "policies: [{name: deny, namespace: default, scope: Namespace, action: Deny, dryRun: false, rules: [[[{destinationPorts: [8080]}]]]}]\n"
	if err := os.WriteFile(path, append(good, deny...), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := d.server.world.Check(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the denied connection read %v, want its end", err)
	}
	c2, err := d.dial(directHBONE)
	if err == nil {
		err = helloWorld(c2)
	}
	if err == nil {
		t.Error("a denied request succeeded")
	}
}
