package spire

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	brokerapi "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	workloadapi "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/ca/catest/spireagent"
)

// TestFault_115_UnlistedBroker: an agent that does not list the proxy refuses it
// at the TLS layer, without a word of gRPC.
func TestFault_115_UnlistedBroker(t *testing.T) {
	inBrokerBubble(t, "", func(t *testing.T, w *world) {
		w.agent.SetBrokers(spireagent.Broker{ID: proxyText + "-other"})
		e := watch(t, w.provider, web)
		pass(time.Minute)
		ev := e.want(t, ca.Unavailable, "refuses the certificate of "+proxyText, "add this SPIFFE ID to brokers of experimental.broker of the agent", "bad certificate")
		if !errors.Is(ev.Err, ca.ErrDenied) {
			t.Errorf("%v is no ErrDenied", ev.Err)
		}
		if n := w.agent.Opened(spireagent.SubscribeToX509SVID); n != 0 {
			t.Errorf("%d streams were opened", n)
		}
		w.agent.SetBrokers(spireagent.Broker{ID: proxyText})
		pass(36 * time.Second)
		e.want(t, ca.Available)
	})
	inBrokerBubble(t, "type of reference", func(t *testing.T, w *world) {
		w.agent.SetBrokers(spireagent.Broker{ID: proxyText, References: []string{spireagent.PIDReference}})
		e := watch(t, w.provider, web)
		pass(time.Minute)
		e.want(t, ca.Unavailable, "allowed_reference_types", proxyText)
	})
}

// TestFault_115_WrongServer: SVIDs are taken from an agent of the proxy's own
// trust domain, and from nobody else who answers at its address.
func TestFault_115_WrongServer(t *testing.T) {
	const agentText = "spiffe://cluster.local/spire/agent/fake"
	for name, tt := range map[string]struct {
		serve func(*testing.T, *spireagent.Agent) *ca.SVID
		texts []string
	}{
		"another root": {func(t *testing.T, _ *spireagent.Agent) *ca.SVID {
			return catest.NewCA(t, "cluster.local").SVID(t, catest.ID(agentText))
		}, []string{"not trusted by the bundle of the proxy's own trust domain", "R29"}},
		"another trust domain": {func(t *testing.T, _ *spireagent.Agent) *ca.SVID {
			return catest.NewCA(t, "friend.example").SVID(t, catest.ID("spiffe://friend.example/spire/agent/fake"))
		}, []string{"not trusted", "R29"}},
		"a federated trust domain": {func(t *testing.T, a *spireagent.Agent) *ca.SVID {
			friend := catest.NewCA(t, "friend.example")
			a.Federate("friend.example", friend)
			federated := proxyEntry
			federated.FederatesWith = []string{"friend.example"}
			a.SetEntries(federated, webEntry)
			return friend.SVID(t, catest.ID("spiffe://friend.example/spire/agent/fake"))
		}, []string{"another one answers in place of the agent", "trustdomain (cluster.local)"}},
		"a workload of the mesh": {func(t *testing.T, a *spireagent.Agent) *ca.SVID {
			return a.CA().SVID(t, catest.ID(webText))
		}, []string{"another one answers in place of the agent", webText}},
		"the server of the trust domain": {func(t *testing.T, a *spireagent.Agent) *ca.SVID {
			return a.CA().SVID(t, catest.ID("spiffe://cluster.local/spire/server"))
		}, []string{"another one answers in place of the agent"}},
		"expired": {func(t *testing.T, a *spireagent.Agent) *ca.SVID {
			return a.CA().SVID(t, catest.ID(agentText), catest.Between(-2*time.Hour, -time.Hour))
		}, []string{"not trusted", "R24"}},
	} {
		inBrokerBubble(t, name, func(t *testing.T, w *world) {
			w.agent.ServeBrokerAs(tt.serve(t, w.agent))
			e := watch(t, w.provider, web)
			pass(time.Minute)
			if ev := e.want(t, ca.Unavailable, tt.texts...); !errors.Is(ev.Err, ca.ErrConfig) {
				t.Errorf("%v is no ErrConfig", ev.Err)
			}
			if n := w.agent.Opened(spireagent.SubscribeToX509SVID); n != 0 {
				t.Errorf("%d streams were opened", n)
			}
			w.agent.ServeBrokerAs(nil)
			pass(36 * time.Second)
			e.want(t, ca.Available)
		})
	}
}

// TestFault_115_NoBroker: another socket of the agent in place of the endpoint's.
func TestFault_115_NoBroker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := newBrokerAgent(t)
		p := newBroker(t, agent, BrokerConfig{Common: Common{Dial: agent.Dial}}) // the admin socket
		run(t, p)
		e := watch(t, p, web)
		pass(time.Minute)
		if ev := e.want(t, ca.Unavailable, "this is not the broker endpoint", "SPIFFE_BROKER_SOCKET"); !errors.Is(ev.Err, ca.ErrConfig) {
			t.Errorf("%v is no ErrConfig", ev.Err)
		}
	})
}

// TestBrokerTLS is the form of the connection: TLS 1.3 with h2, no server name,
// and no ticket is taken.
func TestBrokerTLS(t *testing.T) {
	agent := newBrokerAgent(t)
	root := agent.CA()
	svid := root.SVID(t, catest.ID(proxyText))
	for name, tt := range map[string]struct {
		opts  ca.TLSOptions
		serve func(*tls.Config)
		want  string // of the error; "" for none
	}{
		"as it is":         {ca.TLSOptions{}, func(*tls.Config) {}, ""},
		"post-quantum":     {ca.TLSOptions{PQC: true}, func(*tls.Config) {}, ""},
		"TLS 1.2":          {ca.TLSOptions{}, func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12 }, "protocol version not supported"},
		"another protocol": {ca.TLSOptions{}, func(c *tls.Config) { c.NextProtos = nil }, `the server speaks "", not h2`},
		"pqc, unable":      {ca.TLSOptions{PQC: true}, func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.X25519} }, "handshake failure"},
	} {
		t.Run(name, func(t *testing.T) {
			own := newOwnSVID(nil, svid.ID)
			own.svid = svid
			var noted error
			creds := &endpointCreds{own: own, tls: tt.opts, note: func(err error) { noted = err }}
			client, server := net.Pipe()
			defer client.Close()
			seen := make(chan tls.ConnectionState, 1)
			var hello *tls.ClientHelloInfo
			background(t, func(context.Context) {
				defer server.Close()
				agentSVID := root.SVID(t, catest.ID("spiffe://cluster.local/spire/agent/fake"))
				conf := ca.ServerTLS(agentSVID, ca.TLSOptions{})
				tt.serve(conf)
				conf.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) { hello = h; return nil, nil }
				conn := tls.Server(server, conf)
				if err := conn.Handshake(); err == nil {
					seen <- conn.ConnectionState()
				}
			})
			_, info, err := creds.ClientHandshake(t.Context(), "spire-agent", client)
			if tt.want != "" {
				if err == nil || !errors.Is(noted, err) {
					t.Errorf("got %v, noted %v, want an error", err, noted)
				}
				if !strings.Contains(text(err), tt.want) {
					t.Errorf("got %v, want %q", err, tt.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			state := <-seen
			if state.Version != tls.VersionTLS13 || state.NegotiatedProtocol != "h2" || hello.ServerName != "" {
				t.Errorf("version %x, protocol %q, server name %q", state.Version, state.NegotiatedProtocol, hello.ServerName)
			}
			if id, err := ca.PeerID(state); err != nil || id != svid.ID {
				t.Errorf("the server saw %v, %v", id, err)
			}
			if i, ok := info.(credentials.TLSInfo); !ok || i.SecurityLevel != credentials.PrivacyAndIntegrity || !i.State.HandshakeComplete {
				t.Errorf("the connection is described as %v", info)
			}
		})
	}
}

// TestFault_115_Header: no request is without its header (R38, R47), and the
// endpoints insist on it.
func TestFault_115_Header(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := newBrokerAgent(t)
		own := newOwnSVID(nil, catest.ID(proxyText))
		own.svid = agent.CA().SVID(t, catest.ID(proxyText))
		connect := func(dial func(context.Context) (net.Conn, error), creds credentials.TransportCredentials) *grpc.ClientConn {
			conn, err := grpc.NewClient("passthrough:///agent", grpc.WithTransportCredentials(creds),
				grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return dial(ctx) }))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { conn.Close() })
			return conn
		}
		ref, err := packReference(&brokerapi.KubernetesObjectReference{Type: &brokerapi.KubernetesObjectType{Plural: "pods", Group: "core"}, Uid: "uid-1"})
		if err != nil {
			t.Fatal(err)
		}
		broker := brokerapi.NewAPIClient(connect(agent.DialBroker, &endpointCreds{own: own, note: func(error) {}}))
		workload := workloadapi.NewSpiffeWorkloadAPIClient(connect(agent.DialWorkload, insecure.NewCredentials()))
		calls := map[string]struct {
			header string
			first  func(context.Context) error
		}{
			"FetchX509SVID": {"workload.spiffe.io", func(ctx context.Context) error {
				s, err := workload.FetchX509SVID(ctx, &workloadapi.X509SVIDRequest{})
				if err != nil {
					return err
				}
				_, err = s.Recv()
				return err
			}},
			"SubscribeToX509SVID": {"broker.spiffe.io", func(ctx context.Context) error {
				s, err := broker.SubscribeToX509SVID(ctx, &brokerapi.SubscribeToX509SVIDRequest{Reference: ref})
				if err != nil {
					return err
				}
				_, err = s.Recv()
				return err
			}},
			"SubscribeToX509Bundles": {"broker.spiffe.io", func(ctx context.Context) error {
				s, err := broker.SubscribeToX509Bundles(ctx, &brokerapi.SubscribeToX509BundlesRequest{Reference: ref})
				if err != nil {
					return err
				}
				_, err = s.Recv()
				return err
			}},
		}
		for name, call := range calls {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			if err := call.first(ctx); status.Code(err) != codes.InvalidArgument {
				t.Errorf("%s without the header: %v", name, err)
			}
			if err := call.first(metadata.AppendToOutgoingContext(ctx, call.header, "True")); status.Code(err) != codes.InvalidArgument {
				t.Errorf("%s with a wrong value: %v", name, err)
			}
			if err := call.first(metadata.AppendToOutgoingContext(ctx, call.header, "true")); err != nil {
				t.Errorf("%s with the header: %v", name, err)
			}
			cancel()
		}
	})
}
