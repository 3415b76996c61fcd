package local

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ztunnel-go/ztunnel/state"
)

func newSource(t *testing.T, cfg Config) *Source {
	t.Helper()
	if cfg.Store == nil {
		cfg.Store = state.New(state.Config{})
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestNewRefuses(t *testing.T) {
	store := state.New(state.Config{})
	for name, cfg := range map[string]Config{
		"both":     {Path: "a", Inline: "b", Store: store},
		"neither":  {Store: store},
		"no store": {Path: "a"},
	} {
		if _, err := New(cfg); err == nil {
			t.Errorf("%s: New succeeded", name)
		}
	}
}

// WL-08: the shipped example.
func TestST_WL08_ShippedExample(t *testing.T) {
	store := state.New(state.Config{NodeName: "local"})
	src := newSource(t, Config{Path: "../../examples/localhost.yaml", Store: store})
	if err := src.Load(); err != nil {
		t.Fatal(err)
	}
	w, ok := store.Local(state.Ref{Namespace: "default", Name: "local", ServiceAccount: "default"})
	if !ok {
		t.Fatal("the local workload is not known")
	}
	if got, want := w.Identity.String(), "spiffe://cluster.local/ns/default/sa/default"; got != want {
		t.Errorf("identity %s, want %s", got, want)
	}
	wantServices := []state.NamespacedHostname{{Namespace: "default", Hostname: "example.com"}, {Namespace: "default", Hostname: "example2.com"}}
	if diff := cmp.Diff(wantServices, w.Services); diff != "" {
		t.Errorf("services of the workload (-want +got):\n%s", diff)
	}

	r, err := store.Route(state.Query{Source: w, Dst: netip.MustParseAddrPort("127.10.0.1:80"), Draw: func(uint64) uint64 { return 0 }})
	if err != nil {
		t.Fatal(err)
	}
	if r.Rule != "F" || r.Authority.String() != "127.0.0.1:8080" || r.NextHop.String() != "127.0.0.1:15008" {
		t.Errorf("route %+v", r)
	}
	var ids []string
	for _, id := range r.ExpectedIDs {
		ids = append(ids, id.String())
	}
	wantIDs := []string{"spiffe://cluster.local/ns/default/sa/local", "spiffe://cluster.local/ns/default/sa/default"}
	if diff := cmp.Diff(wantIDs, ids); diff != "" {
		t.Errorf("expected identities (-want +got):\n%s", diff)
	}

	remote := *w
	remote.Network = "remote"
	// The endpoints live in the default network, hence behind a gateway as seen from remote.
	if _, err := store.Route(state.Query{Source: &remote, Dst: netip.MustParseAddrPort("127.10.0.2:80")}); err == nil {
		t.Error("a service of another network was routed")
	}

	conn := state.Conn{Destination: w, Dst: netip.MustParseAddrPort("127.0.0.1:8080")}
	if v := store.Authorize(conn); v.Denied != nil {
		t.Errorf("port 8080: %v", v.Denied)
	}
	conn.Dst = netip.MustParseAddrPort("127.0.0.1:9999")
	if v := store.Authorize(conn); v.Denied == nil {
		t.Error("port 9999 is allowed")
	}
}

var update = flag.Bool("update", false, "rewrite the files in testdata")

const full = `
workloads:
- uid: u1
  name: n
  namespace: ns
  serviceAccount: sa
  trustDomain: td.example
  clusterId: c1
  network: net1
  workloadName: wn
  workloadType: deployment
  canonicalName: cn
  canonicalRevision: v1
  hostname: h.example
  node: node1
  nativeTunnel: true
  protocol: HBONE
  networkMode: HostNetwork
  status: Unhealthy
  capacity: 0
  applicationTunnel: {protocol: PROXY, port: 15088}
  authorizationPolicies: [ns/p]
  locality: {region: r, zone: z, subzone: s}
  waypoint: {destination: "net1/10.0.0.9", hboneMtlsPort: 15008}
  networkGateway: {destination: "ns/gw.example", hboneMtlsPort: 15009}
  workloadIps: ["10.0.0.1", "::1"]
  services: {"ns/svc.example": {"80": 8080, "443": 0}}
services:
- name: svc
  namespace: ns
  hostname: svc.example
  vips: ["net1/10.1.0.1", "/fd00::1"]
  cidrVips: [{network: net1, cidr: 10.2.0.0/16}]
  ports: {80: 8080}
  endpoints: {u2: {workloadUid: u2, port: {80: 9090}, status: Healthy}}
  subjectAltNames: ["spiffe://td.example/ns/ns/sa/other"]
  waypoint: {destination: ns/waypoint.example, hboneMtlsPort: 15008}
  weightedWaypoints: [{destination: {destination: "/10.0.0.7", hboneMtlsPort: 15008}, weight: 3}]
  loadBalancer: {routingPreferences: [Network, Region, Zone, Subzone, Node, Cluster], mode: Failover, healthPolicy: AllowAll}
  ipFamilies: Dual
  canonical: true
  visibility: Namespace
policies:
- name: p
  namespace: ns
  scope: WorkloadSelector
  action: Deny
  dryRun: true
  rules:
  - - - namespaces: [!Exact a, {Prefix: b}]
        notNamespaces: [!Suffix c]
        principals: [!Presence [], {Presence: []}]
        notPrincipals: [!Exact "spiffe"]
        serviceAccounts: [{namespace: ns, serviceAccount: sa}]
        notServiceAccounts: [{namespace: ns, serviceAccount: sb}]
        sourceIps: [10.0.0.0/8]
        notSourceIps: ["::/0"]
        destinationIps: [10.0.0.1/32]
        notDestinationIps: [10.0.0.2/24]
        destinationPorts: [80]
        notDestinationPorts: [443]
`

func encode(t *testing.T, v any) string {
	t.Helper()
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(v); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// Every key of the schema is read, and the dump of a file is a file again.
func TestEveryKeyAndRoundTrip(t *testing.T) {
	src := newSource(t, Config{Inline: full})
	if err := src.Load(); err != nil {
		t.Fatal(err)
	}
	dump := encode(t, src.StaticConfig())
	const want = "testdata/full.golden"
	golden, err := os.ReadFile(want)
	if *update {
		if err := os.WriteFile(want, []byte(dump), 0o644); err != nil {
			t.Fatal(err)
		}
		golden = []byte(dump)
	} else if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(golden), dump); diff != "" {
		t.Errorf("static config (-want +got):\n%s", diff)
	}
	again := newSource(t, Config{Inline: dump})
	if err := again.Load(); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(dump, encode(t, again.StaticConfig())); diff != "" {
		t.Errorf("static config of its own dump (-want +got):\n%s", diff)
	}
}

func TestEmptyFiles(t *testing.T) {
	for _, data := range []string{"", "\n# nothing\n", "{}", "null", "workloads:\nservices: []\n"} {
		if p := parse("f", data, ""); p.err() != nil {
			t.Errorf("%q: %v", data, p.err())
		}
	}
}

// D19: what is left out has a default.
func TestDefaults(t *testing.T) {
	store := state.New(state.Config{DefaultTrustDomain: "td.example", ClusterID: "c1"})
	src := newSource(t, Config{Store: store, ClusterID: "c1", Inline: `
workloads: [{workloadIps: [10.0.0.1], namespace: ns, name: n, trustDomain: "", services: {}}]`})
	if err := src.Load(); err != nil {
		t.Fatal(err)
	}
	w, ok := store.WorkloadByUID("c1//Pod/ns/n")
	if !ok {
		t.Fatal("workload not found by its derived UID")
	}
	if w.Identity.String() != "spiffe://td.example/ns/ns/sa/default" || w.ClusterID != "c1" || w.Capacity != 1 || w.Protocol != state.TCP {
		t.Errorf("got %+v", w)
	}
}

// The forms of spec/state-xds-dns.md §6.2 that have more than one spelling.
func TestSpellings(t *testing.T) {
	store := state.New(state.Config{})
	src := newSource(t, Config{Store: store, Inline: `
workloads:
- {uid: absent, workloadIps: [], namespace: ns, services: {}, applicationTunnel: {protocol: NONE}}
- {uid: "null", workloadIps: [], namespace: ns, services: {}, applicationTunnel: {protocol: PROXY, port: null}}
- {uid: none, workloadIps: [], namespace: ns, services: {}, applicationTunnel: null, waypoint: ~, status: Healthy}
services:
- {name: s, namespace: ns, hostname: h, vips: [], ports: {"80": 8080, 81: 0}, cidrVips: [{network: "", cidr: "fd00::/8"}], ipFamilies: null}
`})
	if err := src.Load(); err != nil {
		t.Fatal(err)
	}
	for uid, want := range map[string]*state.ApplicationTunnel{"absent": {}, "null": {Proxy: true}, "none": nil} {
		w, ok := store.WorkloadByUID(uid)
		if !ok {
			t.Fatalf("no workload %s", uid)
		}
		if diff := cmp.Diff(want, w.ApplicationTunnel); diff != "" || w.Waypoint != nil {
			t.Errorf("%s (-want +got):\n%s", uid, diff)
		}
	}
	svc := store.Dump().Services[0]
	if diff := cmp.Diff(map[uint16]uint16{80: 8080, 81: 0}, svc.Ports); diff != "" || svc.IPFamilies != "" {
		t.Errorf("ports (-want +got):\n%s, IP families %q", diff, svc.IPFamilies)
	}
}

func workload(extra string) string {
	return "workloads:\n- workloadIps: [10.0.0.1]\n  namespace: ns\n  services: {}\n  " + extra
}

func service(extra string) string {
	return "services:\n- name: s\n  namespace: ns\n  hostname: h\n  vips: []\n  ports: {}\n  " + extra
}

func match(extra string) string {
	return "policies:\n- name: p\n  namespace: ns\n  scope: Global\n  action: Allow\n  dryRun: false\n  rules:\n  - - - " + extra
}

// A file with one bad resource applies none of the good ones.
func TestBadFileChangesNothing(t *testing.T) {
	store := state.New(state.Config{})
	path := filepath.Join(t.TempDir(), "local.yaml")
	var loads, failures int
	src := newSource(t, Config{Path: path, Store: store, Loaded: func(err error) {
		loads++
		if err != nil {
			failures++
		}
	}})
	if err := src.Load(); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("Load of a missing file: %v", err)
	}
	write(t, path, workload("uid: good"))
	if loaded, err := src.Check(); !loaded || err != nil {
		t.Fatalf("Check() = %v, %v", loaded, err)
	}
	before := encode(t, src.StaticConfig())
	changed := store.Changed()

	write(t, path, workload("uid: other\n- {workloadIps: [], namespace: UPPER CASE, services: {}}"))
	if loaded, err := src.Check(); loaded || err == nil {
		t.Fatalf("Check() = %v, %v", loaded, err)
	}
	if src.LastError() == nil {
		t.Error("no LastError")
	}
	if _, ok := store.WorkloadByUID("good"); !ok {
		t.Error("the last good workload is gone")
	}
	if _, ok := store.WorkloadByUID("other"); ok {
		t.Error("a part of a bad file was applied")
	}
	select {
	case <-changed:
		t.Error("a bad file is a change")
	default:
	}
	if diff := cmp.Diff(before, encode(t, src.StaticConfig())); diff != "" {
		t.Errorf("static config (-want +got):\n%s", diff)
	}
	if loaded, err := src.Check(); loaded || err != nil {
		t.Errorf("second Check() = %v, %v; the bad file was read already", loaded, err)
	}

	if err := os.Rename(path, path+".old"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := src.Check(); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("Check() of a removed file: %v", err)
		}
	}
	write(t, path, workload("uid: other"))
	if loaded, err := src.Check(); !loaded || err != nil {
		t.Fatalf("Check() = %v, %v", loaded, err)
	}
	if _, ok := store.WorkloadByUID("good"); ok {
		t.Error("a workload that the file no longer has stays")
	}
	if src.LastError() != nil {
		t.Errorf("LastError() = %v after a good load", src.LastError())
	}
	if loads != 5 || failures != 3 {
		t.Errorf("hook: %d loads, %d failures, want 5 and 3", loads, failures)
	}
}

// A file that goes away and comes back as it was is no error any more.
func TestFileComesBack(t *testing.T) {
	path := filepath.Join(t.TempDir(), "local.yaml")
	write(t, path, workload("uid: u"))
	src := newSource(t, Config{Path: path})
	if err := src.Load(); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path, path+".old"); err != nil {
		t.Fatal(err)
	}
	if _, err := src.Check(); err == nil || src.LastError() == nil {
		t.Fatal("no error for a removed file")
	}
	if err := os.Rename(path+".old", path); err != nil {
		t.Fatal(err)
	}
	if loaded, err := src.Check(); !loaded || err != nil || src.LastError() != nil {
		t.Errorf("Check() = %v, %v, LastError() = %v", loaded, err, src.LastError())
	}
}

func TestRunReloads(t *testing.T) {
	path := filepath.Join(t.TempDir(), "local.yaml")
	write(t, path, workload("uid: first"))
	store := state.New(state.Config{})
	synctest.Test(t, func(t *testing.T) {
		var logs bytes.Buffer
		src := newSource(t, Config{Path: path, Store: store, Logger: slog.New(slog.NewTextHandler(&logs, nil))})
		if err := src.Load(); err != nil {
			t.Fatal(err)
		}
		cause := errors.New("stop")
		ctx, cancel := context.WithCancelCause(t.Context())
		done := make(chan error, 1)
		go func() { done <- src.Run(ctx) }()

		// The store was made outside of the bubble: its channel must not be waited
		// for in here.
		write(t, path, workload("uid: second, longer"))
		pass(3 * time.Second)
		if _, ok := store.WorkloadByUID("second, longer"); !ok {
			t.Error("the changed file was not loaded")
		}
		write(t, path, "nonsense")
		pass(5 * time.Second)
		if src.LastError() == nil {
			t.Error("no LastError for a bad file")
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		pass(5 * time.Second)
		cancel(cause)
		if err := <-done; !errors.Is(err, cause) {
			t.Errorf("Run() = %v", err)
		}
		if n := strings.Count(logs.String(), "local config not loaded"); n != 2 {
			t.Errorf("%d errors logged, want one for each of two states:\n%s", n, &logs)
		}
		if n := strings.Count(logs.String(), "local config initialized"); n != 2 {
			t.Errorf("%d loads logged, want 2:\n%s", n, &logs)
		}
	})
	if _, ok := store.WorkloadByUID("second, longer"); !ok {
		t.Error("the last good state is gone")
	}
}

// Beside xDS a file is read once: a later change is told, and takes nothing away
// of what came since.
func TestRunOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "local.yaml")
	write(t, path, workload("uid: first"))
	store := state.New(state.Config{})
	synctest.Test(t, func(t *testing.T) {
		var logs bytes.Buffer
		src := newSource(t, Config{Path: path, Store: store, Once: true, Logger: slog.New(slog.NewTextHandler(&logs, nil))})
		if err := src.Load(); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- src.Run(ctx) }()
		pushed := state.WorkloadUpdate{Workload: &state.Workload{UID: "pushed", Name: "pushed", Namespace: "ns"}}
		if err := store.Apply(state.Update{Workloads: []state.WorkloadUpdate{pushed}}); err != nil {
			t.Fatal(err)
		}
		write(t, path, workload("uid: second, longer"))
		pass(10 * time.Second)
		cancel()
		<-done
		for uid, want := range map[string]bool{"first": true, "pushed": true, "second, longer": false} {
			if _, ok := store.WorkloadByUID(uid); ok != want {
				t.Errorf("workload %q: %v, want %v", uid, ok, want)
			}
		}
		if n := strings.Count(logs.String(), "restart to apply it"); n != 1 {
			t.Errorf("%d warnings of the change, want 1:\n%s", n, &logs)
		}
	})
}

func TestRunInline(t *testing.T) {
	src := newSource(t, Config{Inline: "{}"})
	if loaded, err := src.Check(); loaded || err != nil {
		t.Errorf("Check() = %v, %v", loaded, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := src.Run(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Run() = %v", err)
	}
}

// pass lets fake time go on by d, in a bubble.
func pass(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}
