package main

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// files is a readFile over a map. The sysctl of loopback IPv6 always exists.
func files(m map[string]string) func(string) ([]byte, error) {
	return func(name string) ([]byte, error) {
		if s, ok := m[name]; ok {
			return []byte(s), nil
		}
		if name == "/proc/sys/net/ipv6/conf/lo/disable_ipv6" {
			return []byte("0\n"), nil
		}
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
}

// valid is the smallest environment that this build accepts.
var valid = []string{
	"PROXY_MODE=dedicated", "PROXY_WORKLOAD_INFO=default/echo-1/echo",
	"CA_PROVIDER=local", "XDS_ADDRESS=", "LOCAL_XDS_PATH=/local.yaml",
}

// with adds to valid; a name that stands again replaces, one with a leading "-"
// is taken away.
func with(env ...string) []string {
	out := slices.Clone(valid)
	for _, kv := range env {
		name, _, _ := strings.Cut(strings.TrimPrefix(kv, "-"), "=")
		out = slices.DeleteFunc(out, func(s string) bool { return strings.HasPrefix(s, name+"=") })
		if !strings.HasPrefix(kv, "-") {
			out = append(out, kv)
		}
	}
	return out
}

// parsed is Load with 8 processors.
func parsed(t *testing.T, env []string, m map[string]string) (*Config, []error) {
	t.Helper()
	l := newLoader(env, files(m))
	l.cpus = 8
	l.load()
	return l.cfg, l.problems
}

func mustParse(t *testing.T, env []string, m map[string]string) *Config {
	t.Helper()
	c, problems := parsed(t, env, m)
	for _, p := range problems {
		t.Error(p)
	}
	return c
}

func origin(c *Config, name string) (value, origin string) {
	for _, s := range c.Settings() {
		if s.Name == name {
			return s.Value, s.Origin
		}
	}
	return "", "no such row"
}

func TestID_CF01_ConfigFromProxyConfig(t *testing.T) {
	const mesh = "defaultConfig:\n  discoveryAddress: istiod-rev0.istio-system-2:15012\n  proxyAdminPort: 15999\n  unknown: [1]\n" +
		"  proxyMetadata:\n    ISTIO_META_FOO: foo\n    BAR: bar\n    BOTH: mesh\nother: true\n"
	const env = `{"discoveryAddress": "istiod-rev1.istio-system:15012", "statsPort": 15888, "proxyMetadata": {"BOTH": "env", "ISTIO_META_BAZ": "baz"}}`
	meshOnly := map[string]string{meshFile: mesh}
	shared := func(kv ...string) []string { return append(kv, "CLUSTER_ID=test-cluster") }

	t.Run("mesh only", func(t *testing.T) {
		c := mustParse(t, shared(), meshOnly)
		if got, want := c.XDS.Address, "https://istiod-rev0.istio-system-2:15012"; got != want {
			t.Errorf("xds address: got %q, want %q", got, want)
		}
		if _, got := origin(c, "XDS_ADDRESS"); got != "mesh file" {
			t.Errorf("origin of XDS_ADDRESS: got %q", got)
		}
		if c.Listeners.Admin.Port != 15999 || c.Listeners.Stats.Addr.Port() != 15020 {
			t.Errorf("ports: got %v %v, want 15999 and 15020", c.Listeners.Admin, c.Listeners.Stats)
		}
		if d := cmp.Diff(map[string]string{"FOO": "foo", "BAR": "bar", "BOTH": "mesh"}, c.Proxy.Metadata); d != "" {
			t.Error(d)
		}
		if c.Proxy.ClusterID != "test-cluster" {
			t.Errorf("cluster: got %q", c.Proxy.ClusterID)
		}
	})
	t.Run("env only", func(t *testing.T) {
		c := mustParse(t, shared("PROXY_CONFIG="+env), nil)
		if got, want := c.XDS.Address, "https://istiod-rev1.istio-system:15012"; got != want {
			t.Errorf("xds address: got %q, want %q", got, want)
		}
		if c.Listeners.Admin.Port != 15000 || c.Listeners.Stats.Addr.Port() != 15888 {
			t.Errorf("ports: got %v %v", c.Listeners.Admin, c.Listeners.Stats)
		}
		if d := cmp.Diff(map[string]string{"BAZ": "baz", "BOTH": "env"}, c.Proxy.Metadata); d != "" {
			t.Error(d)
		}
	})
	t.Run("both, and the environment on top", func(t *testing.T) {
		c := mustParse(t, shared("PROXY_CONFIG="+env, "ISTIO_META_CLUSTER_ID=meta-cluster", "ISTIO_META_ISTIO_META_BAR=twice",
			"ISTIO_META_DNS_CAPTURE=True", "XDS_ADDRESS=https://x:1", "CA_ADDRESS=ca.test:15012",
			"CA_HEADER_HEADER_BAZ=baz", "XDS_HEADER_HEADER_FOO=foo", "XDS_HEADER_AUTHORIZATION=Bearer abc",
			"ISTIO_METAJSON_A={\"x\":1}", "ISTIO_METAJSON_B=nonsense"), meshOnly)
		if c.XDS.Address != "https://x:1" || c.CA.Address != "https://ca.test:15012" {
			t.Errorf("addresses: got %q %q", c.XDS.Address, c.CA.Address)
		}
		if c.Proxy.ClusterID != "meta-cluster" {
			t.Errorf("cluster: got %q, want that of ISTIO_META_CLUSTER_ID", c.Proxy.ClusterID)
		}
		if !c.DNS.Enabled {
			t.Error("ISTIO_META_DNS_CAPTURE=True must turn the DNS proxy on")
		}
		want := map[string]string{"FOO": "foo", "BAR": "twice", "BAZ": "baz", "BOTH": "env", "CLUSTER_ID": "meta-cluster", "DNS_CAPTURE": "True"}
		if d := cmp.Diff(want, c.Proxy.Metadata); d != "" {
			t.Error(d)
		}
		if d := cmp.Diff([]HeaderField{{Name: "header_baz", Value: "baz"}}, c.CA.Headers); d != "" {
			t.Error(d)
		}
		if d := cmp.Diff([]HeaderField{{Name: "authorization", Value: "Bearer abc"}, {Name: "header_foo", Value: "foo"}}, c.XDS.Headers); d != "" {
			t.Error(d)
		}
		if v, _ := origin(c, "XDS_HEADER_AUTHORIZATION"); v != redacted {
			t.Errorf("a secret header is shown: %q", v)
		}
		if d := cmp.Diff(map[string]string{"A": `{"x":1}`}, c.Proxy.MetadataJSON); d != "" {
			t.Error(d)
		}
	})
	t.Run("broken", func(t *testing.T) {
		for name, m := range map[string]struct{ env, mesh, want string }{
			"mesh syntax":    {"", "{", "failed parsing mesh config file ./etc/istio/config/mesh"},
			"env syntax":     {"{", "", "failed parsing proxy config env"},
			"unquoted":       {"proxyMetadata: {A: true}", "", "proxyMetadata.A: must be a string"},
			"metadata list":  {"proxyMetadata: [A]", "", "proxyMetadata: must be a map"},
			"port too large": {"statsPort: 65536", "", "statsPort: 65536: must be a whole number from 0 to 65535"},
			"port as text":   {"statsPort: '1'", "", "statsPort: must be a number"},
			"address type":   {"discoveryAddress: 1", "", "discoveryAddress: must be a string"},
			"no object":      {"[]", "", "must be an object"},
		} {
			t.Run(name, func(t *testing.T) {
				m2 := map[string]string{}
				if m.mesh != "" {
					m2[meshFile] = m.mesh
				}
				_, problems := parsed(t, with("PROXY_CONFIG="+m.env), m2)
				if len(problems) != 1 || !strings.Contains(problems[0].Error(), m.want) {
					t.Errorf("got %v, want one problem with %q", problems, m.want)
				}
			})
		}
	})
}

func TestID_CF02_ParseWorkerThreads(t *testing.T) {
	tests := []struct {
		name, env string
		want      int
	}{
		{"default is a quarter, at least 2", "", 2},
		{"number", "ZTUNNEL_WORKER_THREADS=5", 5},
		{"all", "ZTUNNEL_WORKER_THREADS=0", 8},
		{"all of the limit", "ZTUNNEL_WORKER_THREADS=0;ZTUNNEL_CPU_LIMIT=6", 6},
		{"percentage", "ZTUNNEL_WORKER_THREADS=30%", 3},
		{"percentage, small", "ZTUNNEL_WORKER_THREADS=0.1%", 1},
		{"percentage of the limit", "ZTUNNEL_WORKER_THREADS=50%;ZTUNNEL_RESOURCE_CPU_LIMIT=3;ZTUNNEL_CPU_LIMIT=100", 2},
		{"concurrency", "PROXY_CONFIG=concurrency: 3", 3},
		{"concurrency 0", "PROXY_CONFIG=concurrency: 0", 8},
		{"the variable wins over concurrency", "PROXY_CONFIG=concurrency: 3;ZTUNNEL_WORKER_THREADS=4", 4},
		{"limit below 2", "ZTUNNEL_RESOURCE_CPU_LIMIT=500m", 1},
		{"limit below the request", "ZTUNNEL_RESOURCE_CPU_LIMIT=1.5;ZTUNNEL_RESOURCE_CPU_REQUEST=2500m", 3},
		{"request", "ZTUNNEL_RESOURCE_CPU_REQUEST=3", 3},
		{"many CPUs", "ZTUNNEL_CPU_LIMIT=64", 16},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := mustParse(t, with(strings.Split(tt.env, ";")...), nil)
			if c.Proxy.WorkerThreads != tt.want {
				t.Errorf("got %d, want %d", c.Proxy.WorkerThreads, tt.want)
			}
		})
	}
}

func TestID_CF03_InvalidDNSProxyAddr(t *testing.T) {
	const want = "failed to parse DNS_PROXY_ADDR: not-an-address"
	for _, env := range []string{"ISTIO_META_DNS_PROXY_ADDR=not-an-address", "PROXY_CONFIG=proxyMetadata: {DNS_PROXY_ADDR: not-an-address}"} {
		_, _, err := Load(with(env), files(nil))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", env, err, want)
		}
	}
	c := mustParse(t, with("ISTIO_META_DNS_PROXY_ADDR=127.0.0.2:53"), nil)
	if got := c.DNS.Addr.Addrs(); len(got) != 1 || got[0].String() != "127.0.0.2:53" {
		t.Errorf("got %v, want 127.0.0.2:53", got)
	}
}

func TestLoad_ReportsEverythingAtOnce(t *testing.T) {
	_, _, err := Load([]string{"ENABLE_PROXY=2", "SECRET_TTL=x", "RUST_LOG=="}, files(nil))
	ce, ok := errors.AsType[*ConfigError](err)
	if !ok {
		t.Fatalf("got %T, want *ConfigError", err)
	}
	text := err.Error()
	for _, want := range []string{"ENABLE_PROXY=2", "SECRET_TTL=x", "RUST_LOG=="} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in:\n%s", want, text)
		}
	}
	if got := strings.Count(text, "\n"); got != len(ce.Problems) {
		t.Errorf("got %d lines for %d problems", got, len(ce.Problems))
	}
}

func TestLoad_Warnings(t *testing.T) {
	tests := []struct {
		env  string
		want string // name of the warning, "" = none
	}{
		{"AUTHZ_POLICY_INFO_LOGGING=yes", "AUTHZ_POLICY_INFO_LOGGING"},
		{"AUTHZ_POLICY_INFO_LOGGING=false", ""},
		{"TLS12_ENABLED=1", "TLS12_ENABLED"},
		{"COMPLIANCE_POLICY=strict", "COMPLIANCE_POLICY"},
		{"COMPLIANCE_POLICY=pqc", ""},
		{"LOG_FORMAT=xml", "LOG_FORMAT"},
		{"LOG_FORMAT=json", ""},
		{"ISTIO_METAJSON_X={", "ISTIO_METAJSON_X"},
		{"-LOCAL_XDS_PATH", "LOCAL_XDS_PATH"},
		{"XDS_ON_DEMAND=true;ISTIO_META_DNS_CAPTURE=false", "XDS_ON_DEMAND"},
		{"INPOD_ENABLED=whatever", ""},
		{"PREFERED_SERVICE_NAMESPACE=a", ""},
		{"ISTIO_META_DNS_CAPTURE=on", "ISTIO_META_DNS_CAPTURE"},
		{"PROXY_MODE=shared;-PROXY_WORKLOAD_INFO", ""},
		{"PROXY_MODE=shared", "PROXY_WORKLOAD_INFO"},
		{"PROXY_MODE=shared;-PROXY_WORKLOAD_INFO;PACKET_MARK=0", "PACKET_MARK"},
		{"PACKET_MARK=0", ""},
		{"PROXY_MODE=shared;-PROXY_WORKLOAD_INFO;CA_PROVIDER=spire-workload;SPIFFE_ENDPOINT_SOCKET=/x", "CA_PROVIDER"},
		{"CA_PROVIDER=spire-workload;SPIFFE_ENDPOINT_SOCKET=/x", ""},
		{"LOCALHOST_APP_TUNNEL=false", ""},
	}
	for _, tt := range tests {
		_, warnings, err := Load(with(strings.Split(tt.env, ";")...), files(nil))
		if err != nil {
			t.Errorf("%s: %v", tt.env, err)
		}
		var got []string
		for _, w := range warnings {
			got = append(got, w.Name)
		}
		if strings.Join(got, ",") != tt.want {
			t.Errorf("%s: got warnings %v, want %q", tt.env, warnings, tt.want)
		}
	}
}

func TestLoad_Values(t *testing.T) {
	c := mustParse(t, with("PROXY_WORKLOAD_INFO=ns/pod/sa", "TRUST_DOMAIN_ALIASES=old.example, older.example",
		"AUTHZ_MISSING_POLICY=deny", "AUTHZ_FOREIGN_TRUST_DOMAIN=match", "AUTHZ_POLICY_INFO_LOGGING=true", "SVID_VALIDATION=strict",
		"ZTUNNEL_MEMORY_LIMIT=512Mi", "IPV6_ENABLED=false", "TLS12_ENABLED=true", "COMPLIANCE_POLICY=pqc", "AUTH_TOKEN=/token",
		"NODE_NAME=\xff", "ENABLE_ORIG_SRC=false", "NETWORK=first", "NETWORK=second"), map[string]string{"/token": "x"})
	check := func(name string, got, want any) {
		t.Helper()
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s: %s", name, d)
		}
	}
	check("workload", c.Proxy.Workload, WorkloadInfo{"ns", "pod", "sa"})
	check("aliases", c.CA.TrustDomainAliases, []string{"old.example", "older.example"})
	check("authz", c.Authz, AuthzConfig{InfoLogging: true, MissingPolicyDeny: true, MatchForeignIdentity: true})
	check("validation", c.CA.Validation, "strict")
	check("memory", c.Proxy.MemoryLimit, uint64(512<<20))
	check("inbound", c.Listeners.Inbound.String(), "0.0.0.0:15008")
	check("admin", len(c.Listeners.Admin.Addrs()), 1)
	check("tls", c.TLS.AllowTLS12 && c.TLS.PostQuantum, true)
	check("token", c.CA.Token, TokenSource{File: "/token"})
	check("not UTF-8 is unset", c.Proxy.Node, "")
	check("original source", c.Sockets.OriginalSource, OriginalSourceNever)
	check("mark in dedicated mode", c.Sockets.Mark, uint32(0))
	check("providers", c.CA.names(), []string{"local"})
	if v, _ := origin(c, "AUTH_TOKEN"); v != redacted {
		t.Errorf("AUTH_TOKEN is shown as %q", v)
	}

	check("DNS", c.DNS == DNSConfig{Enabled: true, Addr: BindAddr{Localhost: true, Port: 15053}}, true)
	check("readiness", c.Listeners.Readiness.String(), "0.0.0.0:15021")
	check("SOCKS5", c.Listeners.SOCKS5.IsValid(), false)

	shared := mustParse(t, []string{"KUBERNETES_SERVICE_HOST=10.0.0.1"}, map[string]string{defaultTokenFile: "x"})
	check("mark in shared mode", shared.Sockets.Mark, uint32(1337))
	check("istiod", shared.XDS.Address, "https://istiod.istio-system.svc:15012")
	check("token default", shared.CA.Token, TokenSource{File: defaultTokenFile})
	check("root default", shared.CA.RootCert, RootCert{File: defaultRootFile})
	check("inpod", shared.Inpod, InpodConfig{UDS: "/var/run/ztunnel/ztunnel.sock", NACK: "auto"})
	check("cluster domain", shared.Proxy.ClusterDomain, "cluster.local")
	other := mustParse(t, []string{"READINESS_BIND_ADDRESS=::ffff:10.0.0.1", "CLUSTER_DOMAIN=Mesh.Example.", "ISTIO_META_DNS_CAPTURE=off"}, nil)
	check("readiness", other.Listeners.Readiness.String(), "10.0.0.1:15021")
	check("cluster domain", other.Proxy.ClusterDomain, "mesh.example")
	check("DNS off", other.DNS.Enabled, false)
	check("mark 0 in shared mode", mustParse(t, []string{"PACKET_MARK=0"}, nil).Sockets.Mark, uint32(0))
	check("timeouts", shared.Timeouts, TimeoutConfig{Handshake: 10 * time.Second, Response: 20 * time.Second,
		TCPConnect: 10 * time.Second, WorkloadWait: 5 * time.Second, HTTPHeader: 2 * time.Second})
}

// TestLoad_OtherPlatforms: pods have no network namespaces there.
func TestLoad_OtherPlatforms(t *testing.T) {
	for mode, want := range map[string]int{"shared": 1, "dedicated": 0} {
		l := newLoader(with("PROXY_MODE="+mode), files(nil))
		l.goos = "darwin"
		l.load()
		if len(l.problems) != want || want == 1 && !strings.Contains(l.problems[0].Error(), "in-pod mode is not supported on non-linux platforms") {
			t.Errorf("%s: got %v", mode, l.problems)
		}
	}
}

func TestLoad_TerminationDeadline(t *testing.T) {
	for env, want := range map[string]time.Duration{
		"":                                     5 * time.Second,
		"TERMINATION_GRACE_PERIOD_SECONDS=30":  25 * time.Second,
		"TERMINATION_GRACE_PERIOD_SECONDS=11":  6 * time.Second,
		"TERMINATION_GRACE_PERIOD_SECONDS=10":  9 * time.Second,
		"TERMINATION_GRACE_PERIOD_SECONDS=1":   time.Second,
		"TERMINATION_GRACE_PERIOD_SECONDS=0":   time.Second,
		"CONNECTION_TERMINATION_DEADLINE=90ms": 90 * time.Millisecond,
		"CONNECTION_TERMINATION_DEADLINE=1m;TERMINATION_GRACE_PERIOD_SECONDS=30": time.Minute,
	} {
		if got := mustParse(t, with(strings.Split(env, ";")...), nil).Proxy.TerminationDeadline; got != want {
			t.Errorf("%s: got %v, want %v", env, got, want)
		}
	}
}

func TestLoad_LoopbackIPv6(t *testing.T) {
	const sysctl = "/proc/sys/net/ipv6/conf/lo/disable_ipv6"
	c := mustParse(t, valid, map[string]string{sysctl: "1\n"})
	if c.Listeners.Admin.IPv6 {
		t.Error("::1 is used although it is disabled")
	}
	c, warnings, err := Load(valid, func(string) ([]byte, error) { return nil, fs.ErrNotExist })
	if err != nil || !c.Listeners.Admin.IPv6 || len(warnings) != 1 {
		t.Errorf("unreadable: got ::1 %v, warnings %v, error %v; want it assumed, with one warning", c.Listeners.Admin.IPv6, warnings, err)
	}
}

func TestLoad_OriginOfSettings(t *testing.T) {
	c := mustParse(t, with("USE_SPIRE=false", "LOCAL_XDS=abc", "-LOCAL_XDS_PATH", "PROXY_CONFIG=proxyAdminPort: 1234"), nil)
	for name, want := range map[string][2]string{
		"SPIRE_ENABLED":  {"false", "env USE_SPIRE"},
		"CA_PROVIDER":    {"local", "env CA_PROVIDER"},
		"KEEPALIVE_TIME": {"180s", "default"},
		"proxyAdminPort": {"1234", "PROXY_CONFIG"},
		"LOCAL_XDS":      {"<3 bytes>", "env LOCAL_XDS"},
	} {
		if v, o := origin(c, name); v != want[0] || o != want[1] {
			t.Errorf("%s: got %q from %q, want %q from %q", name, v, o, want[0], want[1])
		}
	}
}

// TestConfigTable: every row is documented, named once and parses its default.
func TestConfigTable(t *testing.T) {
	seen := map[string]bool{}
	for _, g := range configTable {
		for _, v := range g.vars {
			for _, name := range append([]string{v.name}, v.aliases...) {
				if seen[name] {
					t.Errorf("%s stands twice", name)
				}
				seen[name] = true
			}
			if v.doc == "" || v.typ == "" || v.set == nil {
				t.Errorf("%s: doc, typ and set are required", v.name)
			}
			if strings.Contains(v.doc+v.typ+v.def, "|") || strings.Contains(v.doc, "\n") {
				t.Errorf("%s: breaks the markdown table", v.name)
			}
		}
	}
}

func TestConfigDocsAreCurrent(t *testing.T) {
	want, err := os.ReadFile("../../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	var got bytes.Buffer
	if err := writeConfigDocs(&got); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got.String()); d != "" {
		t.Errorf("docs/configuration.md is stale, run make generate:\n%s", d)
	}
}

// A control plane whose address is wrong is not one that is off.
func TestLoad_BadAddressIsNotOff(t *testing.T) {
	_, warnings, err := Load(with("XDS_ADDRESS=http://istiod:15010", "XDS_ON_DEMAND=true", "-LOCAL_XDS_PATH"), files(nil))
	if err == nil {
		t.Error("the address was taken")
	}
	for _, w := range warnings {
		if w.Name == "LOCAL_XDS_PATH" || w.Name == "XDS_ON_DEMAND" {
			t.Errorf("warning %v", w)
		}
	}
}
