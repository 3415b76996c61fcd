package proxy

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/state"
)

// late makes a node whose workload the control plane tells of later: until then
// it has another name.
func (m *mesh) late(name, addr string, options ...nodeOption) (n *node, arrive func()) {
	n = m.add(name, addr, append(options, withConfig(func(c *Config) { c.Local.Name = "late" }))...)
	return n, func() {
		m.t.Helper()
		n.w.Name = "late"
		m.push()
		synctest.Wait()
	}
}

// D22: a proxy whose workload the store does not know refuses inbound connections
// after five seconds, and serves one that waited when the workload arrives in
// time (§2.4, ST-04).
func TestInboundWaitsForLocalWorkload(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		client := m.add("client", "10.0.1.2")
		bare := m.add("bare", "10.0.3.2", uncaptured)
		server, arrive := m.late("server", "10.0.2.2")
		const text = "failed to fetch information about local workload: server.default (late)"
		for _, from := range []*node{client, bare} {
			start := time.Now()
			if err := from.request(server.echoAddr(), "x"); err == nil {
				t.Errorf("%s: a request to an unknown workload succeeded", from.w.Name)
			}
			if d := time.Since(start); d != 5*time.Second {
				t.Errorf("%s: refused after %v, want 5s", from.w.Name, d)
			}
		}
		synctest.Wait()
		if n := len(server.logs.find(map[string]string{"scope": "access", "message": "connection failed", "direction": "inbound"})); n != 2 {
			t.Errorf("%d refusals, want 2:\n%s", n, server.logs.text("access"))
		}
		server.wantLog(map[string]string{"scope": "access", "message": "connection failed", "dst.addr": "10.0.2.2:8080", "error": text})

		c := client.mustDial(server.echoAddr())
		time.Sleep(3 * time.Second)
		arrive()
		if err := roundTrip(c, "hello"); err != nil {
			t.Errorf("the connection that waited: %v", err)
		}
		c.Close()
	})
}

// D22: outbound connections of an unknown workload go on after a second with what
// is known of it from elsewhere, and the next ones at once.
func TestStandIn(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		client, arrive := m.late("client", "10.0.1.2", withConfig(func(c *Config) { c.ClusterID = "west" }))
		server := m.add("server", "10.0.2.2")
		for _, want := range []time.Duration{time.Second, 0} {
			start := time.Now()
			if err := client.request(server.echoAddr(), "hello"); err != nil {
				t.Fatal(err)
			}
			if d := time.Since(start); d != want {
				t.Errorf("served after %v, want %v", d, want)
			}
		}
		synctest.Wait()
		if n := len(client.logs.find(map[string]string{"message": "connection complete", "src.workload": "late", "src.cluster": "west",
			"src.namespace": "default", "src.identity": clientID, "error": ""})); n != 2 {
			t.Errorf("%d such lines in\n%s", n, client.logs.text("access"))
		}
		if n := len(client.logs.find(map[string]string{"level": "warn", "workload": "late"})); n != 1 {
			t.Errorf("%d warnings, want 1", n)
		}
		server.wantMetric(2, "istio_tcp_connections_opened", map[string]string{"source_principal": clientID})

		// The real one has the same identity: the tunnel is as good as before.
		tunnel := client.proxy.pool.Stats().Dialed
		arrive()
		if err := client.request(server.echoAddr(), "hello"); err != nil {
			t.Fatal(err)
		}
		client.wantLog(map[string]string{"message": "connection complete", "src.cluster": "Kubernetes", "error": ""})
		if now := client.proxy.pool.Stats().Dialed; tunnel != 1 || now != 1 {
			t.Errorf("tunnels dialled: %d, then %d, want 1", tunnel, now)
		}
		// When it is gone again, it is waited for again.
		if err := client.store.Apply(state.Update{Removed: []string{client.w.UID}}); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if err := client.request(server.echoAddr(), "hello"); err != nil || time.Since(start) != time.Second {
			t.Errorf("after its removal: %v after %v, want 1s", err, time.Since(start))
		}
	})
}

// Who gives up while waiting gets no stand-in, and does not decide for the others
// that they need not wait.
func TestStandInIsNotForThoseWhoLeave(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		client, _ := m.late("client", "10.0.1.2")
		ctx, leave := context.WithCancelCause(m.ctx)
		time.AfterFunc(standInWait/2, func() { leave(errClientReset) })
		if w, err := client.proxy.outboundWorkload(ctx); w != nil || !errors.Is(err, errClientReset) {
			t.Errorf("got %v, %v", w, err)
		}
		start := time.Now()
		if _, err := client.proxy.outboundWorkload(m.ctx); err != nil || time.Since(start) != standInWait {
			t.Errorf("the next one: %v after %v, want %v", err, time.Since(start), standInWait)
		}
	})
}

// Case 88 for a pod that the store does not know: it does not reach our ports by
// its own address either.
func TestFault_088_StandInDoesNotCallItself(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		client, _ := m.late("client", "10.0.1.2")
		for _, port := range []uint16{15001, 15006, 15008} {
			if err := client.request(client.at(port), "x"); err == nil {
				t.Errorf("port %d: a request succeeded", port)
			}
		}
		synctest.Wait()
		if n := len(client.logs.find(map[string]string{"scope": "access"})); n != 3 {
			t.Errorf("%d lines, want one for each:\n%s", n, client.logs.text("access"))
		}
		client.wantMetric(3, "istio_tcp_connections_rejected", map[string]string{"reporter": "source", "reason": "self_call"})
	})
}

// D22: the real workload turns out to be another identity. Open connections end
// in order, new ones have a tunnel of the new identity.
func TestStandInIsReplaced(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		id := catest.ID("spiffe://mesh.example/ns/default/sa/client")
		ours, theirs := catest.NewCA(t, meshTD), catest.NewCA(t, "mesh.example")
		bundles := ca.Union(ours.Bundles(ca.Strict), theirs.Bundles(ca.Strict))
		server := m.certify("server", "10.0.2.2", ours, false)
		server.become(ours.SVIDWith(t, catest.ID(serverID), bundles))
		provider := catest.NewProvider("test")
		provider.Set(ca.Key{Provider: "test", ID: catest.ID(clientID)}, ca.Event{State: ca.Available, SVID: ours.SVIDWith(t, catest.ID(clientID), bundles)})
		provider.Set(ca.Key{Provider: "test", ID: id}, ca.Event{State: ca.Available, SVID: theirs.SVIDWith(t, id, bundles)})
		client, arrive := m.late("client", "10.0.1.2", func(p *nodeParts) { p.provider = provider })
		held := client.mustDial(server.echoAddr())
		if err := roundTrip(held, "before"); err != nil {
			t.Fatal(err)
		}
		client.w.TrustDomain = "mesh.example"
		arrive()
		if err := roundTrip(held, "after"); err != nil {
			t.Errorf("the open connection: %v", err)
		}
		if err := client.request(server.echoAddr(), "new"); err != nil {
			t.Fatal(err)
		}
		client.wantLog(map[string]string{"message": "connection complete", "src.identity": id.String(), "error": ""})
		server.wantMetric(1, "istio_tcp_connections_opened", map[string]string{"source_principal": clientID})
		server.wantMetric(1, "istio_tcp_connections_opened", map[string]string{"source_principal": id.String()})
		held.Close()
		synctest.Wait()
		if s := client.proxy.pool.Stats(); s.Dialed != 2 || s.Closed != 1 {
			t.Errorf("tunnels: %+v, want the first of two closed", s)
		}
	})
}

// A pod whose names make no identity has no proxy.
func TestLocalWithoutIdentity(t *testing.T) {
	var cfg Config
	cfg.Local.Name, cfg.Local.Namespace, cfg.Local.ServiceAccount = "a", "b", "c d"
	if w, err := newStandIn(&cfg); err == nil {
		t.Errorf("got %v, want an error", w.Identity)
	}
}
