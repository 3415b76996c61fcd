//go:build e2e

package spire

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/world"
)

// agent is a SPIRE agent of one test, on a node of its own: entries are made for
// it alone.
type agent struct {
	*server
	t       *testing.T
	node    string // path of the node's alias, the parent of entries
	dir     string
	token   string
	kubelet *kubelet
	proc    *world.Process
}

// agentOptions are what tests vary.
type agentOptions struct {
	delegate string // SPIFFE ID in authorized_delegates; "" = that of the proxies
	broker   string // SPIFFE ID that may use the broker endpoint; "" = that of the proxies
	noPods   bool   // the broker endpoint takes no references to pods
	late     bool   // do not start it yet
}

// proxyPath is the identity of the proxies themselves, as delegates and brokers.
const proxyPath = "/ztunnel"

// agentConfig is healthy in about a second.
//   - admin_socket_path and the broker's socket_path must not lie in or under the
//     directory of socket_path.
//   - With KeyManager "memory" an agent cannot restart on a used join token.
//   - The k8s attestor takes part in every attestation, of processes too: for one
//     that is in no container it has no selectors, and the unix ones remain. It needs
//     its own experimental.broker block, with every broker, or it answers Internal
//     "broker configuration missing".
//   - The read-only port of the kubelet is plain HTTP on 127.0.0.1; the list of
//     pods is fetched again at most once per poll_retry_interval.
const agentConfig = `
agent {
  data_dir = "%[1]s/data"
  log_level = "DEBUG"
  server_address = "127.0.0.1"
  server_port = "%[2]d"
  socket_path = "%[1]s/public/api.sock"
  admin_socket_path = "%[1]s/admin/admin.sock"
  trust_bundle_path = "%[1]s/bundle.pem"
  trust_domain = "%[3]s"
  authorized_delegates = ["%[4]s"]
  experimental {
    sync_interval = "1s"
%[5]s
  }
}
plugins {
  NodeAttestor "join_token" { plugin_data {} }
  KeyManager "disk" { plugin_data { directory = "%[1]s/data" } }
  WorkloadAttestor "unix" { plugin_data { discover_workload_path = true } }
  WorkloadAttestor "k8s" {
    plugin_data {
      kubelet_read_only_port = %[6]d
      poll_retry_interval = "100ms"
      max_poll_attempts = 5
      experimental {
        broker {
          access_policy = "permissive"
          brokers = [ { id = "%[7]s" } ]
        }
      }
    }
  }
}
`

const brokerEndpoint = `
    broker {
      socket_path = "%s/broker/broker.sock"
      brokers = [
        {
          id = "%s"
          allowed_reference_types = [
            { type_url = "type.googleapis.com/spiffe.broker.WorkloadPIDReference" },
            %s
          ]
        },
      ]
    }
`

const podReferences = `{ type_url = "type.googleapis.com/spiffe.broker.KubernetesObjectReference" },`

// newAgent makes an agent of server s for the test, and starts it.
func newAgent(t *testing.T, s *server, o agentOptions) *agent {
	t.Helper()
	dir, err := world.Dir()
	if err != nil {
		t.Fatal(err)
	}
	a := &agent{server: s, t: t, dir: dir, node: "/node/" + filepath.Base(dir), kubelet: startKubelet(t, s.place)}
	if err := os.WriteFile(filepath.Join(dir, "bundle.pem"), s.bundlePEM(t), 0o600); err != nil {
		t.Fatal(err)
	}
	a.configure(o)
	if a.token, err = s.joinToken(world.Context(t), a.node); err != nil {
		t.Fatalf("join token: %v", err)
	}
	if !o.late {
		a.start()
	}
	return a
}

// configure writes the configuration, for the next start.
func (a *agent) configure(o agentOptions) {
	a.t.Helper()
	proxy := "spiffe://" + a.domain + proxyPath
	if o.delegate == "" {
		o.delegate = proxy
	}
	if o.broker == "" {
		o.broker = proxy
	}
	references := podReferences
	if o.noPods {
		references = ""
	}
	endpoint := fmt.Sprintf(brokerEndpoint, a.dir, o.broker, references)
	config := fmt.Appendf(nil, agentConfig, a.dir, a.port, a.domain, o.delegate, endpoint, a.kubelet.port, o.broker)
	if err := os.WriteFile(filepath.Join(a.dir, "agent.conf"), config, 0o600); err != nil {
		a.t.Fatal(err)
	}
}

// start runs the agent, for the first time or again, and waits for its sockets.
func (a *agent) start() {
	a.t.Helper()
	var err error
	a.proc, err = a.run("spire-agent", a.dir, "spire-agent", "run", "-config", filepath.Join(a.dir, "agent.conf"), "-joinToken", a.token)
	if err != nil {
		a.t.Fatal(err)
	}
	a.proc.EndWith(a.t)
	ctx := world.Context(a.t)
	if _, err := a.proc.Find(ctx, 30*time.Second, has("Starting Admin APIs")); err != nil {
		a.t.Fatalf("the agent does not start: %v", err)
	}
	world.Eventually(a.t, ctx, 10*time.Second, func() error {
		for _, path := range []string{a.workloadSocket(), a.adminSocket(), a.brokerSocket()} {
			c, err := net.Dial("unix", path)
			if err != nil {
				return err
			}
			_ = c.Close()
		}
		return nil
	})
}

// kill is kill -9.
func (a *agent) kill() { a.proc.Kill() }

func (a *agent) workloadSocket() string { return filepath.Join(a.dir, "public/api.sock") }
func (a *agent) adminSocket() string    { return filepath.Join(a.dir, "admin/admin.sock") }
func (a *agent) brokerSocket() string   { return filepath.Join(a.dir, "broker/broker.sock") }

// entry registers a workload with this agent, and waits until the agent has its
// SVID: who asks before is told to come again in some seconds. It returns the
// entry's ID.
func (a *agent) entry(e entry) string {
	a.t.Helper()
	id := a.createEntry(a.t, a.node, e)
	if a.proc != nil {
		a.learns(id)
	}
	return id
}

// learns waits until the agent has the SVID of an entry.
func (a *agent) learns(id string) {
	a.t.Helper()
	_, err := a.proc.Find(world.Context(a.t), 15*time.Second, func(line string) bool {
		return strings.Contains(line, `msg="SVID updated"`) && strings.Contains(line, "entry="+id)
	})
	if err != nil {
		a.t.Fatalf("the agent does not learn of entry %s: %v", id, err)
	}
}
