//go:build e2e

package spire

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/ztunnel-go/ztunnel/e2e/world"
)

const meshDomain, otherDomain = "cluster.local", "other.test"

// server is a SPIRE server, which the tests share: each has agents of its own,
// and an entry belongs to one agent. It is administrated through the API on its
// unix socket, as the program spire-server does.
type server struct {
	*place
	domain string
	dir    string
	port   int
	proc   *world.Process
	conn   *grpc.ClientConn
}

var (
	meshServer  = sync.OnceValues(func() (*server, error) { return startServer(meshDomain) })
	otherServer = sync.OnceValues(func() (*server, error) { return startServer(otherDomain) })
)

// needServer returns the server of a trust domain, which starts with the first test
// that needs it.
func needServer(t *testing.T, get func() (*server, error)) *server {
	t.Helper()
	world.RequireRoot(t)
	s, err := get()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.proc.ShowIfFailed(t) })
	return s
}

// serverConfig is healthy in half a second. SVIDs that live longer than a sixth
// of the CA may be cut short.
const serverConfig = `
server {
  bind_address = "127.0.0.1"
  bind_port = "%[1]d"
  socket_path = "%[2]s/api.sock"
  trust_domain = "%[3]s"
  data_dir = "%[2]s"
  log_level = "INFO"
  ca_ttl = "24h"
  default_x509_svid_ttl = "1h"
  experimental { cache_reload_interval = "1s" }
}
plugins {
  DataStore "sql" {
    plugin_data {
      database_type = "sqlite3"
      connection_string = "%[2]s/datastore.sqlite3"
    }
  }
  NodeAttestor "join_token" { plugin_data {} }
  KeyManager "memory" { plugin_data {} }
}
`

func startServer(domain string) (*server, error) {
	p, err := machine()
	if err != nil {
		return nil, err
	}
	s := &server{place: p, domain: domain, port: p.nextPort()}
	if s.dir, err = world.Dir(); err != nil {
		return nil, err
	}
	config := filepath.Join(s.dir, "server.conf")
	if err := os.WriteFile(config, fmt.Appendf(nil, serverConfig, s.port, s.dir, domain), 0o600); err != nil {
		return nil, err
	}
	if s.proc, err = p.run("spire-server "+domain, s.dir, "spire-server", "run", "-config", config); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if _, err := s.proc.Find(ctx, time.Minute, has("Starting Server APIs")); err != nil {
		return nil, fmt.Errorf("spire-server does not start: %w: %s", err, strings.Join(s.proc.Lines(), "\n"))
	}
	s.conn, err = dialUnix(filepath.Join(s.dir, "api.sock"))
	return s, err
}

func has(text string) func(string) bool {
	return func(line string) bool { return strings.Contains(line, text) }
}

func dialUnix(path string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
}

// id makes a SPIFFE ID of the server's trust domain.
func (s *server) id(path string) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: s.domain, Path: path}
}

// joinToken makes a token for one agent, and an alias for the node that uses it.
func (s *server) joinToken(ctx context.Context, alias string) (string, error) {
	token, err := agentv1.NewAgentClient(s.conn).CreateJoinToken(ctx, &agentv1.CreateJoinTokenRequest{Ttl: 600, AgentId: s.id(alias)})
	return token.GetValue(), err
}

// bundle is that of the server's own trust domain.
func (s *server) bundle(t *testing.T) *types.Bundle {
	t.Helper()
	b, err := bundlev1.NewBundleClient(s.conn).GetBundle(world.Context(t), &bundlev1.GetBundleRequest{})
	if err != nil {
		t.Fatalf("bundle of %s: %v", s.domain, err)
	}
	return b
}

// bundlePEM is what an agent trusts at its first contact.
func (s *server) bundlePEM(t *testing.T) []byte {
	t.Helper()
	var out []byte
	for _, c := range s.bundle(t).GetX509Authorities() {
		if _, err := x509.ParseCertificate(c.GetAsn1()); err != nil {
			t.Fatal(err)
		}
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.GetAsn1()})...)
	}
	return out
}

// federate lets the server hand out the bundle of another trust domain to the
// entries that name it.
func (s *server) federate(t *testing.T, other *types.Bundle) {
	t.Helper()
	resp, err := bundlev1.NewBundleClient(s.conn).BatchSetFederatedBundle(world.Context(t), &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*types.Bundle{other}})
	if err == nil {
		err = failed(resp.GetResults()[0].GetStatus())
	}
	if err != nil {
		t.Fatalf("federate with %s: %v", other.GetTrustDomain(), err)
	}
}

func failed(st *types.Status) error {
	if codes.Code(st.GetCode()) == codes.OK {
		return nil
	}
	return fmt.Errorf("%v: %s", codes.Code(st.GetCode()), st.GetMessage())
}

// entry registers a workload with one agent.
type entry struct {
	path      string   // of the SPIFFE ID
	selectors []string // type:value
	ttl       time.Duration
	federates []string // names of trust domains
}

// createEntry returns the new entry's ID.
func (s *server) createEntry(t *testing.T, parent string, e entry) string {
	t.Helper()
	resp, err := entryv1.NewEntryClient(s.conn).BatchCreateEntry(world.Context(t), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{s.wire(t, parent, e)}})
	if err == nil {
		err = failed(resp.GetResults()[0].GetStatus())
	}
	if err != nil {
		t.Fatalf("create the entry of %s: %v", e.path, err)
	}
	return resp.GetResults()[0].GetEntry().GetId()
}

// updateEntry replaces what an entry says.
func (s *server) updateEntry(t *testing.T, id, parent string, e entry) {
	t.Helper()
	wire := s.wire(t, parent, e)
	wire.Id = id
	resp, err := entryv1.NewEntryClient(s.conn).BatchUpdateEntry(world.Context(t), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{wire}})
	if err == nil {
		err = failed(resp.GetResults()[0].GetStatus())
	}
	if err != nil {
		t.Fatalf("update the entry of %s: %v", e.path, err)
	}
}

func (s *server) wire(t *testing.T, parent string, e entry) *types.Entry {
	t.Helper()
	wire := &types.Entry{
		ParentId: s.id(parent), SpiffeId: s.id(e.path), FederatesWith: e.federates,
		X509SvidTtl: int32(e.ttl / time.Second),
	}
	for _, text := range e.selectors {
		kind, value, ok := strings.Cut(text, ":")
		if !ok {
			t.Fatalf("selector %q", text)
		}
		wire.Selectors = append(wire.Selectors, &types.Selector{Type: kind, Value: value})
	}
	return wire
}

func (s *server) deleteEntry(t *testing.T, id string) {
	t.Helper()
	resp, err := entryv1.NewEntryClient(s.conn).BatchDeleteEntry(world.Context(t), &entryv1.BatchDeleteEntryRequest{Ids: []string{id}})
	if err == nil {
		err = failed(resp.GetResults()[0].GetStatus())
	}
	if err != nil {
		t.Fatalf("delete entry %s: %v", id, err)
	}
}
