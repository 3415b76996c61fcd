package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/ztunnel-go/ztunnel"

// rule forbids imports. Paths are relative to the module where they begin with
// "./"; "/..." at the end covers the path and everything below it.
type rule struct {
	from   []string // packages that the rule binds
	except []string // of these, the ones that it does not
	no     []string // what they must not reach
	but    []string // of that, what they may
	direct bool     // own imports only; otherwise through other packages, too
	why    string
}

// rules is the layering of the project: imports go down only.
var rules = []rule{
	{
		from: []string{"./cmd/ztunnel"},
		no:   []string{"testing", "testing/..."},
		why:  "test support has no place in the binary; its flags and its runtime come with it",
	},
	{
		from: []string{"./cmd/ztunnel"},
		no:   []string{"./ca/catest/...", "./xds/xdstest/...", "./proxy/netns/memnet/...", "./e2e/..."},
		why:  "a fake that reaches the binary can be switched on in it",
	},
	{
		from: []string{"./cmd/ztunnel"},
		no:   []string{"istio.io/istio/...", "k8s.io/...", "sigs.k8s.io/..."},
		why:  "monoliths: we need their wire formats, not their code",
	},
	{
		// Direct imports: gRPC has the package, too. Tests, where its framer is the
		// reference codec, are not in this graph.
		from: []string{"./..."}, except: []string{"./e2e/..."}, direct: true,
		no:  []string{"golang.org/x/net/http2"},
		why: "its Server and Transport are deprecated and cannot half-close; only hpack is used",
	},
	{
		from: []string{"./state"},
		no:   []string{"./...", "google.golang.org/..."},
		but:  []string{"./state/...", "./internal/..."},
		why:  "state is a leaf: pure decisions, no protobuf, no gRPC",
	},
	{
		from: []string{"./proxy/hbone"},
		no:   []string{"./...", "github.com/spiffe/..."},
		but:  []string{"./proxy/hbone/...", "./internal/..."},
		why:  "hbone knows frames, streams, limits and pools; no workloads, policies or SPIFFE",
	},
	{
		from: []string{"./proxy/netns"},
		no:   []string{"./..."},
		but:  []string{"./proxy/netns/...", "./internal/..."},
		why:  "netns opens sockets and knows nothing of what they are for",
	},
	{
		from: []string{"./proxy/dns"},
		no:   []string{"./..."},
		but:  []string{"./proxy/dns/...", "./proxy/netns", "./state", "./internal/..."},
		why:  "dns answers names from the state and from nameservers, and knows nothing of what they are for",
	},
	{
		from: []string{"./proxy/..."},
		no:   []string{"./ca/..."},
		but:  []string{"./ca"},
		why:  "the proxy is the same for every certificate provider",
	},
	{
		from: []string{"./proxy", "./proxy/hbone/...", "./proxy/dns/...", "./proxy/netns/..."},
		no:   []string{"./proxy/inpod/..."},
		why:  "a proxy does not know who keeps it: the agent's pods are one case of several",
	},
	{
		from: []string{"./proxy/inpod"}, direct: true,
		no:  []string{"./..."},
		but: []string{"./proxy", "./proxy/inpod/...", "./proxy/netns", "./state", "./internal/..."},
		why: "inpod starts and ends proxies, and knows nothing of tunnels, names and certificates",
	},
	{
		from: []string{"./proxy/..."},
		no:   []string{"./xds/...", "./admin/...", "./cmd/..."},
		why:  "the proxy reads the state; it does not know who writes it and who looks at it",
	},
	{
		from: []string{"./ca/..."},
		no:   []string{"./state/...", "./proxy/...", "./xds/...", "./admin/...", "./cmd/..."},
		why:  "certificates do not depend on workloads",
	},
	{
		from: []string{"./ca"}, direct: true,
		no:  []string{"./ca/..."},
		but: []string{"./ca"},
		why: "backends import ca, never the other way round",
	},
	{
		from: []string{"./ca/istio", "./ca/spire", "./ca/local"},
		no:   []string{"./ca/..."},
		but:  []string{"./ca", "./ca/istio/...", "./ca/spire/...", "./ca/local/..."}, // their own parts; siblings: next rules
		why:  "a backend imports ca and no router",
	},
	{
		from: []string{"./ca/router"},
		no:   []string{"./..."},
		but:  []string{"./ca", "./internal/..."},
		why:  "the router chooses between providers; it knows none of them",
	},
	{
		from: []string{"./..."}, except: []string{"./cmd/...", "./e2e/...", "./ca/catest/...", "./ca/istio/...", "./ca/spire/...", "./ca/local/..."}, direct: true,
		no:  []string{"./ca/istio/...", "./ca/spire/...", "./ca/local/..."},
		why: "backends reach the binary through cmd alone",
	},
	{from: []string{"./ca/istio/..."}, no: []string{"./ca/spire/...", "./ca/local/..."}, why: "a backend does not know its siblings"},
	{from: []string{"./ca/spire/..."}, no: []string{"./ca/istio/...", "./ca/local/..."}, why: "a backend does not know its siblings"},
	{from: []string{"./ca/local/..."}, no: []string{"./ca/istio/...", "./ca/spire/..."}, why: "a backend does not know its siblings"},
	{
		from: []string{"./xds/..."},
		no:   []string{"./ca/...", "./proxy/...", "./admin/...", "./cmd/..."},
		why:  "xds writes the state and does nothing else",
	},
	{
		from: []string{"./admin/..."},
		no:   []string{"./..."},
		but:  []string{"./admin/...", "./internal/..."},
		why:  "admin gets handlers and snapshots from cmd; it imports no sibling",
	},
	{
		from: []string{"./internal/..."},
		no:   []string{"./..."},
		but:  []string{"./internal/..."},
		why:  "internal holds nouns without policy",
	},
	{
		from: []string{"./..."}, except: []string{"./cmd/...", "./e2e/..."}, direct: true,
		no:  []string{"github.com/spf13/..."},
		why: "flags are read only in cmd",
	},
}

// graph maps an import path to its direct imports.
type graph map[string][]string

// reach returns everything that from imports, itself excluded, each with the
// path of imports that leads there.
func (g graph) reach(from string) map[string][]string {
	out := map[string][]string{}
	queue := [][]string{{from}}
	for len(queue) > 0 {
		path := queue[0]
		queue = queue[1:]
		for _, to := range g[path[len(path)-1]] {
			if _, seen := out[to]; seen || to == from {
				continue
			}
			out[to] = slices.Concat(path, []string{to})
			queue = append(queue, out[to])
		}
	}
	return out
}

// matches tells whether the import path p is covered by one of the patterns.
func matches(p string, patterns []string) bool {
	for _, pat := range patterns {
		if rel, ok := strings.CutPrefix(pat, "./"); ok {
			pat = module + "/" + rel
		}
		base, deep := strings.CutSuffix(pat, "/...")
		if p == base || deep && strings.HasPrefix(p, base+"/") {
			return true
		}
	}
	return false
}

// violations applies the rules to g: one line for each forbidden import.
func violations(g graph, rules []rule) []string {
	var out []string
	for _, from := range slices.Sorted(maps.Keys(g)) {
		for _, r := range rules {
			if !matches(from, r.from) || matches(from, r.except) {
				continue
			}
			reached := g.reach(from)
			for _, to := range slices.Sorted(maps.Keys(reached)) {
				path := reached[to]
				if matches(to, r.no) && !matches(to, r.but) && (!r.direct || len(path) == 2) {
					out = append(out, fmt.Sprintf("%s must not import %s: %s\n\t%s", from, to, r.why, strings.Join(path, "\n\t→ ")))
				}
			}
		}
	}
	return out
}

// loadGraph is the import graph of the binary and of every package of the
// module, without test files.
func loadGraph(t *testing.T, packages ...string) graph {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", append([]string{"list", "-e", "-deps", "-json=ImportPath,Imports"}, packages...)...)
	out, err := cmd.Output()
	if err != nil {
		if ee, ok := errors.AsType[*exec.ExitError](err); ok {
			t.Fatalf("go list: %v\n%s", err, ee.Stderr)
		}
		t.Fatalf("go list: %v", err)
	}
	g := graph{}
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p struct {
			ImportPath string
			Imports    []string
		}
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return g
		} else if err != nil {
			t.Fatal(err)
		}
		g[p.ImportPath] = p.Imports
	}
}

// TestDeps holds the layering of the whole module.
func TestDeps(t *testing.T) {
	g := loadGraph(t, module+"/...")
	if len(g[module+"/cmd/ztunnel"]) == 0 {
		t.Fatal("the graph lacks the binary")
	}
	for _, v := range violations(g, rules) {
		t.Error(v)
	}
}

// TestDepsFindsViolations: the checker sees a forbidden import in made-up
// graphs, directly and through others, and none in an innocent one.
func TestDepsFindsViolations(t *testing.T) {
	const m = module
	tests := []struct {
		name string
		g    graph
		want string // of the first violation, "" = none
	}{
		{"innocent", graph{m + "/cmd/ztunnel": {m + "/proxy", m + "/ca/local", "net/http"}, m + "/proxy": {m + "/ca", m + "/state"}, m + "/ca/local": {m + "/ca"}}, ""},
		{"testing through a library", graph{m + "/cmd/ztunnel": {"example.com/lib"}, "example.com/lib": {"testing"}}, "/cmd/ztunnel must not import testing: "},
		{"fake in the binary", graph{m + "/cmd/ztunnel": {m + "/ca/local"}, m + "/ca/local": {m + "/ca/catest"}}, "/cmd/ztunnel must not import " + m + "/ca/catest"},
		{"memnet in the binary", graph{m + "/cmd/ztunnel": {m + "/proxy/netns/memnet"}}, "/proxy/netns/memnet"},
		{"kubernetes", graph{m + "/cmd/ztunnel": {"k8s.io/client-go/rest"}}, "k8s.io/client-go/rest"},
		{"istio, but not its API", graph{m + "/cmd/ztunnel": {"istio.io/istio/pkg/x", "istio.io/api/y"}}, "istio.io/istio/pkg/x"},
		{"proxy and a backend", graph{m + "/proxy": {m + "/ca/spire"}}, "/proxy must not import " + m + "/ca/spire"},
		{"inpod and a backend", graph{m + "/proxy/inpod": {"x"}, "x": {m + "/ca/istio"}}, "/proxy/inpod must not import " + m + "/ca/istio"},
		{"inpod and certificates", graph{m + "/proxy/inpod": {m + "/proxy", m + "/ca"}, m + "/proxy": {m + "/ca"}}, "/proxy/inpod must not import " + m + "/ca"},
		{"proxy and inpod", graph{m + "/proxy": {m + "/proxy/inpod"}}, "/proxy must not import " + m + "/proxy/inpod"},
		{"state and protobuf", graph{m + "/state": {"google.golang.org/protobuf/proto"}}, "/state must not import google.golang.org/protobuf/proto"},
		{"state and a sibling", graph{m + "/state": {m + "/ca"}}, "/state must not import " + m + "/ca"},
		{"state and internal", graph{m + "/state": {m + "/internal/backoff"}}, ""},
		{"hbone and state", graph{m + "/proxy/hbone": {m + "/state"}}, "/proxy/hbone must not import " + m + "/state"},
		{"hbone and SPIFFE", graph{m + "/proxy/hbone": {"github.com/spiffe/go-spiffe/v2/spiffeid"}}, "/proxy/hbone must not import github.com/spiffe/"},
		{"hbone and netns", graph{m + "/proxy/hbone": {m + "/proxy/netns"}}, "/proxy/hbone must not import " + m + "/proxy/netns"},
		{"dns and hbone", graph{m + "/proxy/dns": {m + "/proxy/netns", m + "/state", m + "/proxy/hbone"}}, "/proxy/dns must not import " + m + "/proxy/hbone"},
		{"admin and a sibling", graph{m + "/admin": {m + "/state"}}, "/admin must not import " + m + "/state"},
		{"ca and state", graph{m + "/ca": {m + "/state"}}, "/ca must not import " + m + "/state"},
		{"backend and sibling", graph{m + "/ca/spire": {m + "/ca/local"}}, "/ca/spire must not import " + m + "/ca/local"},
		{"backend and router", graph{m + "/ca/istio": {m + "/ca/router"}}, "/ca/istio must not import " + m + "/ca/router"},
		{"router and backend", graph{m + "/ca/router": {m + "/ca", m + "/ca/local"}}, "/ca/router must not import " + m + "/ca/local"},
		{"admin and a backend's part", graph{m + "/xds/client": {m + "/ca/istio/creds"}}, "/xds/client must not import " + m + "/ca/istio/creds"},
		{"http2 server", graph{m + "/proxy/hbone": {"golang.org/x/net/http2", "golang.org/x/net/http2/hpack"}}, "/proxy/hbone must not import golang.org/x/net/http2: "},
		{"hpack", graph{m + "/proxy/hbone": {"golang.org/x/net/http2/hpack"}}, ""},
		{"flags outside of cmd", graph{m + "/admin": {"github.com/spf13/pflag"}}, "/admin must not import github.com/spf13/pflag"},
		{"a prefix is not a path", graph{m + "/statesman": {"google.golang.org/grpc"}, m + "/cmd/ztunnel": {"k8s.iota/x"}}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := violations(tt.g, rules)
			switch {
			case tt.want == "" && len(got) > 0:
				t.Errorf("got %q, want none", got)
			case tt.want != "" && (len(got) == 0 || !strings.Contains(strings.Join(got, "\n"), tt.want)):
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
	for _, r := range rules {
		if r.why == "" || len(r.from) == 0 || len(r.no) == 0 {
			t.Errorf("a rule needs from, no and why: %+v", r)
		}
	}
}
