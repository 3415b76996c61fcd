package proxy

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/state"
)

// D23: an identity that its provider takes back loses its tunnels, in both roles.
// One that could not be renewed keeps them to their end.
func TestWithdrawnIdentityEndsTunnels(t *testing.T) {
	for _, side := range []string{"server", "client"} {
		t.Run(side, func(t *testing.T) {
			inMesh(t, func(t *testing.T, m *mesh) {
				root := catest.NewCA(t, meshTD)
				client, server := m.certify("client", "10.0.1.2", root, false), m.certify("server", "10.0.2.2", root, false)
				held := client.hold(server)
				who, id := server, catest.ID(serverID)
				if side == "client" {
					who, id = client, catest.ID(clientID)
				}
				who.provider.Set(ca.Key{Provider: "test", ID: id}, ca.Event{State: ca.Withdrawn, Err: fmt.Errorf("no entry: %w", ca.ErrDenied)})
				held.reset("the identity was withdrawn")
				synctest.Wait()
				if n := len(who.logs.find(map[string]string{"message": "connection complete", "level": "error",
					"error": "connection closed: our identity was withdrawn: no entry: " + ca.ErrDenied.Error()})); n != 1 {
					t.Errorf("%d such lines in\n%s", n, who.logs.text("access"))
				}
				who.wantMetric(1, "istio_tcp_connections_failed", map[string]string{"response_flags": "IDENTITY_ERROR"})
				if err := client.request(server.echoAddr(), "x"); err == nil {
					t.Error("a new connection succeeded")
				}
			})
		})
	}
}

// The same whatever else has happened to the node.
func TestWithdrawnIdentityEndsTunnelsInAnyState(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(m *mesh, n *certified)
	}{
		{"on the way to a provider that has not answered", func(_ *mesh, n *certified) {
			n.proxy.cfg.Certs.Replace(one{catest.NewProvider("next")})
		}},
		{"expired", func(_ *mesh, _ *certified) { time.Sleep(2 * time.Hour) }},
		{"unknown to the store", func(m *mesh, n *certified) {
			if err := n.store.Apply(state.Update{Removed: []string{n.w.UID}}); err != nil {
				m.t.Fatal(err)
			}
			synctest.Wait()
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			inMesh(t, func(t *testing.T, m *mesh) {
				root := catest.NewCA(t, meshTD)
				client, server := m.certify("client", "10.0.1.2", root, false), m.certify("server", "10.0.2.2", root, false)
				server.become(root.SVID(t, catest.ID(serverID), catest.Life(time.Hour)))
				held := client.hold(server)
				c.do(m, server)
				held.check("before it was withdrawn")
				server.provider.Set(ca.Key{Provider: "test", ID: catest.ID(serverID)}, ca.Event{State: ca.Withdrawn, Err: ca.ErrDenied})
				held.reset("the identity was withdrawn")
			})
		})
	}
}

// A tunnel that was asked for with one identity is not opened with another.
func TestTunnelOfAnotherIdentity(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		client := m.certify("client", "10.0.1.2", catest.NewCA(t, meshTD), false)
		m.certify("server", "10.0.2.2", catest.NewCA(t, meshTD), false)
		var identity *identityError
		_, _, err := client.proxy.dialTunnel(m.ctx, poolKey{source: catest.ID(serverID), expected: serverID, dst: netip.MustParseAddrPort("10.0.2.2:15008")})
		if !errors.As(err, &identity) {
			t.Errorf("got %v, want an error of the identity", err)
		}
	})
}

// Case 96: a connection that waited in vain, and one that need not wait, say since
// when there is no certificate, and why.
func TestFault_096_NoCertificateSaysWhy(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		root := catest.NewCA(t, meshTD)
		client, server := m.certify("client", "10.0.1.2", root, false), m.certify("server", "10.0.2.2", root, false)
		why := errors.New("the CA cannot be reached")
		key := ca.Key{Provider: "test", ID: catest.ID(clientID)}
		lost := time.Now().UTC().Format(time.RFC3339)
		for _, c := range []struct {
			event ca.Event
			want  string
		}{
			{ca.Event{State: ca.Withdrawn, Err: ca.ErrDenied}, ca.ErrDenied.Error()},
			{ca.Event{State: ca.Unavailable, Err: why}, why.Error()},
			{ca.Event{State: ca.Pending}, "wait for the certificate of " + clientID + ": provider test has not answered: context deadline exceeded"},
			{ca.Event{State: ca.Pending, Err: why}, "wait for the certificate of " + clientID + ": provider test: " + why.Error() + ": context deadline exceeded"},
		} {
			client.provider.Set(key, c.event)
			synctest.Wait()
			if err := client.request(server.echoAddr(), "x"); err == nil {
				t.Errorf("%v: a connection succeeded", c.event)
			}
			time.Sleep(time.Minute)
			text := "identity error: no certificate since " + lost + ": " + c.want
			if n := len(client.logs.find(map[string]string{"message": "connection complete", "error": text})); n != 1 {
				t.Errorf("%d lines with %q in\n%s", n, text, client.logs.text("access"))
			}
		}
	})
}
