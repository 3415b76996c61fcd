//go:build e2e

package netns

import (
	"os"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/cni/agent"
	"github.com/ztunnel-go/ztunnel/e2e/cni/rules"
	"github.com/ztunnel-go/ztunnel/e2e/world"
)

func TestMain(m *testing.M) {
	if task := os.Getenv(bareEnv); task != "" {
		os.Exit(runBare(task))
	}
	world.Main(m)
}

// pair adds the checks of this suite.
type pair struct {
	*world.Pair
	handOver time.Duration // how long a proxy that ends waits for its successor
}

func newPair(t *testing.T, o world.PairOptions) *pair {
	t.Helper()
	p := &pair{Pair: world.NewPair(t, o)}
	if o.Source.HostNetwork || o.Dest.HostNetwork {
		p.handOver = 5 * time.Second // half of the world's deadline (D14)
	}
	return p
}

// mode is how captured pods get their proxies.
type mode struct {
	name  string
	proxy world.ProxyOptions
	rules rules.Config
}

// The modes: a proxy in each pod; one for a node, which Istio's agent tells of the
// pods; the same beside Cilium's agent, on the host network and with its rules.
var (
	dedicated = mode{name: "dedicated"}
	shared    = mode{name: "shared", proxy: world.ProxyOptions{Shared: true}}
	cilium    = mode{"shared beside Cilium", world.ProxyOptions{Shared: true, HostNetwork: true}, rules.Config{Set: rules.Cilium}}

	allModes    = []mode{dedicated, shared, cilium}
	sharedModes = []mode{shared, cilium}
)

// in runs a row once for each mode, side by side and beside other rows.
func in(t *testing.T, modes []mode, check func(*testing.T, mode)) {
	t.Parallel()
	for _, m := range modes {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			check(t, m)
		})
	}
}

// pair are options for two pods in this mode. What o says of the proxies, other
// than their mode, stays.
func (m mode) pair(o world.PairOptions) world.PairOptions {
	for _, p := range []*world.ProxyOptions{&o.Source, &o.Dest} {
		p.Shared, p.HostNetwork = m.proxy.Shared, m.proxy.HostNetwork
	}
	o.Rules = m.rules
	return o
}

// personality is whose agent a shared proxy meets.
func (m mode) personality() agent.Personality {
	if m.proxy.HostNetwork {
		return agent.Cilium
	}
	return agent.Istio
}

// inBoth runs a row, whose proxies o describes, in a pod and in shared mode.
func inBoth(t *testing.T, check func(*testing.T, world.ProxyOptions)) {
	in(t, []mode{dedicated, shared}, func(t *testing.T, m mode) { check(t, m.proxy) })
}
