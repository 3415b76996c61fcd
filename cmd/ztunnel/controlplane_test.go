package main

import (
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ztunnel-go/ztunnel/xds"
	"github.com/ztunnel-go/ztunnel/xds/discoverypb"
	"github.com/ztunnel-go/ztunnel/xds/securitypb"
	"github.com/ztunnel-go/ztunnel/xds/xdstest"
)

// startXDS serves a control plane on a unix socket, whose address it returns.
func startXDS(t *testing.T) (*xdstest.Server, string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "xds") // t.TempDir may be longer than a socket's path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := xdstest.New(xdstest.Config{})
	done := make(chan error, 1)
	go func() { done <- s.Serve(ln) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return s, "unix://" + path
}

// denyPort is a policy of the namespace default.
func denyPort(port uint32) xdstest.Resource {
	return xdstest.Authorization(&securitypb.Authorization{
		Name: "deny", Namespace: "default", Scope: securitypb.Scope_NAMESPACE, Action: securitypb.Action_DENY,
		Rules: []*securitypb.Rule{{Clauses: []*securitypb.Clause{{Matches: []*securitypb.Match{{DestinationPorts: []uint32{port}}}}}}},
	})
}

func (r *running) readiness(t *testing.T) (int, string) {
	t.Helper()
	return get(t, "http://"+r.httpAddr(listenReadiness)+"/healthz/ready")
}

// The gate: nobody is served, and the node is not ready, before workloads and
// policies were heard of; what came meanwhile waits and is served then.
func TestXDS_Gate(t *testing.T) {
	server, address := startXDS(t)
	server.Pause()
	d := startDirect(t, "n", "XDS_ADDRESS="+address)
	c, err := d.dial(directTCP)
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Wait(d.ctx, func() bool { _, open := server.Streams(); return open == 2 }); err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- helloWorld(c) }()
	if code, body := d.client.readiness(t); code != http.StatusInternalServerError ||
		!strings.HasPrefix(body, "not ready, pending: dns proxy, proxy, state manager\nstate manager: ") || strings.Count(body, "\n") != 2 {
		t.Errorf("before the gate: readiness %d %q", code, body)
	}
	// Workloads alone do not open it: policies are missing.
	server.Inject(&discoverypb.DeltaDiscoveryResponse{TypeUrl: xdstest.AddressType})
	d.eventually(func() error {
		_, body := d.client.readiness(t)
		if !strings.HasSuffix(body, ", which has not sent istio.security.Authorization\n") {
			return errors.New(body)
		}
		return nil
	})
	select {
	case err := <-served:
		t.Errorf("a connection was served before the gate: %v", err)
	default:
	}

	server.Resume()
	if err := <-served; err != nil {
		t.Errorf("a connection of before the gate: %v", err)
	}
	if code, body := d.client.readiness(t); code != http.StatusOK || body != "ready\n" {
		t.Errorf("after the gate: readiness %d %q", code, body)
	}
	for _, want := range []string{"Task 'state manager' complete", "Task 'proxy' complete"} {
		if !strings.Contains(d.client.logs.String(), want) {
			t.Errorf("no %q in the log", want)
		}
	}
}

// A control plane that is not there ends nothing, and a drain before the gate is
// a clean end.
func TestXDS_DrainBeforeGate(t *testing.T) {
	d := startDirect(t, "n", "XDS_ADDRESS=unix:///nobody/listens/here")
	d.eventually(func() error {
		_, body := d.client.readiness(t)
		if !strings.Contains(body, "/nobody/listens/here") {
			return errors.New(body)
		}
		return nil
	})
	select {
	case <-d.client.done:
		t.Fatalf("the node ended without its control plane: %v", d.client.err)
	default:
	}
	d.client.stop()
	d.client.within(t, 2*time.Second)
	if _, err := d.dial(directTCP); err == nil {
		t.Error("a listener outlived the node")
	}
}

// What the control plane sends is added to the local file; what is rejected of it
// is told, and keeps nobody from being ready.
func TestXDS_Status(t *testing.T) {
	server, address := startXDS(t)
	bad := xdstest.Bad(xdstest.AddressType, "cluster//Pod/ns/bad")
	server.Set(bad, denyPort(9))
	d := startDirect(t, "n", "XDS_ADDRESS="+address, "XDS_HEADER_X=y", "POD_NAME=p", "POD_NAMESPACE=q")
	d.open(directHBONE).Close()
	if code, body := d.client.readiness(t); code != http.StatusOK || body != "ready\n" {
		t.Errorf("readiness %d %q", code, body)
	}
	_, body := get(t, "http://"+d.client.adminAddr()+"/config_dump")
	var dump struct {
		Policies  []map[string]any
		Workloads []any
		ZtunnelGo struct{ XDS xds.Status }
	}
	if err := json.Unmarshal([]byte(body), &dump); err != nil {
		t.Fatal(err)
	}
	if len(dump.Policies) != 1 || len(dump.Workloads) != 3 {
		t.Errorf("%d policies and %d workloads, want the one that was pushed and those of the file", len(dump.Policies), len(dump.Workloads))
	}
	_, page := get(t, "http://"+d.client.adminAddr()+"/xds")
	var alone xds.Status
	if err := json.Unmarshal([]byte(page), &alone); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(dump.ZtunnelGo.XDS, alone); diff != "" {
		t.Errorf("the page differs from the dump (-dump +page):\n%s", diff)
	}
	if !alone.Connected || !alone.Synced || alone.Address != address || len(alone.Types) != 2 {
		t.Errorf("status %+v", alone)
	}
	for _, ty := range alone.Types {
		want := 0
		if ty.TypeURL == xdstest.AddressType {
			want = 1
		}
		if ty.RejectedCount != want || len(ty.Rejected) != want || want == 1 && ty.Rejected[0].Name != bad.Name {
			t.Errorf("%s: rejected %v", ty.TypeURL, ty.Rejected)
		}
	}
	first := server.Requests()[0]
	if got := first.Headers.Get("x"); len(got) != 1 || got[0] != "y" || !strings.Contains(first.GetNode().GetId(), "~p.q~") {
		t.Errorf("header %q, node %q", got, first.GetNode().GetId())
	}
	if v := server.Violations(); len(v) > 0 {
		t.Error(v)
	}
}

// A control plane that refuses us changes nothing that is known.
func TestXDS_Refused(t *testing.T) {
	server, address := startXDS(t)
	d := startDirect(t, "n", "XDS_ADDRESS="+address)
	d.open(directHBONE).Close()
	server.Refuse(status.Error(codes.Unauthenticated, "authentication failure"))
	server.Disconnect(nil)
	d.eventually(func() error {
		if d.client.sample(t, "istio_xds_connected") != 0 {
			return errors.New("the loss of the control plane goes unnoticed")
		}
		return nil
	})
	d.open(directHBONE).Close()
	if code, body := d.client.readiness(t); code != http.StatusOK {
		t.Errorf("readiness %d %q", code, body)
	}
	d.client.stop()
	d.client.within(t, 5*time.Second)
}

// The control plane is followed to the end of a drain: a policy that comes then
// still ends a connection.
func TestXDS_EndsLast(t *testing.T) {
	server, address := startXDS(t)
	d := startDirect(t, "n", "XDS_ADDRESS="+address, "CONNECTION_TERMINATION_DEADLINE=1h")
	c := d.open(directHBONE)
	d.server.stop()
	d.eventually(func() error {
		if !strings.Contains(d.server.logs.String(), `"draining"`) {
			return errors.New("no drain")
		}
		return nil
	})
	if err := helloWorld(c); err != nil {
		t.Fatalf("during the drain: %v", err)
	}
	server.Set(denyPort(uint32(directHBONE.Port())))
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the denied connection read %v, want its end", err)
	}
	d.server.within(t, 5*time.Second)
}
