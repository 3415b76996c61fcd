package main

import (
	"fmt"
	"io/fs"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/proxy/inpod"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// produced is everything that the packages and the process get of a
// configuration, but for what only a node shows.
func produced(t *testing.T, cfg *Config) string {
	t.Helper()
	trust, err := trustOf(cfg)
	if err != nil {
		t.Fatal(err)
	}
	providers := []any{}
	for _, p := range cfg.CA.Providers {
		signer := istioConfig(cfg, trust, p)
		signer.Poll.Logger = nil
		broker, err := brokerConfig(p)
		if err != nil {
			t.Fatal(err)
		}
		providers = append(providers, signer, localCAConfig(trust, p), delegatedConfig(cfg, trust, p), broker, workloadConfig(p))
	}
	return fmt.Sprintf("%+v\n", []any{
		stateConfig(cfg), worldConfig(cfg), xdsConfig(cfg), hboneConfig(cfg), queueLimit(cfg), dataPathConfig(cfg), metricsConfig(cfg), hostConfig(cfg), podConfig(cfg),
		inpodConfig(cfg), cfg.Proxy.Mode, dnsConfig(cfg), cfg.DNS.Enabled,
		logConfig(cfg), providers, cfg.CA.Routes, cfg.Proxy.WorkloadPID, managerConfig(cfg, trust), tlsOptions(cfg, trust), crlConfig(cfg), cfg.serverConfig(),
		cfg.Proxy.TerminationDeadline, cfg.Proxy.WorkerThreads, cfg.Metrics.BuildTag,
	})
}

// TestEverySettingIsUsed: each row that claims to have an effect in this build
// changes what the packages get.
func TestEverySettingIsUsed(t *testing.T) {
	read := files(map[string]string{"/world.yaml": "", "/ca": "", "/root.pem": "", "/ca.yaml": "providers: [{name: local, dir: /ca}]"})
	changed := map[string]string{ // a value that is not the default
		"PROXY_WORKLOAD_INFO": "a/b/c", "NODE_NAME": "x", "NETWORK": "x", "CLUSTER_ID": "x", "LOCALHOST_APP_TUNNEL": "false", "ENABLE_RESPONSE_BAGGAGE": "false",
		"CONNECTION_TERMINATION_DEADLINE": "1m", "TERMINATION_GRACE_PERIOD_SECONDS": "100",
		"ZTUNNEL_WORKER_THREADS": "777", "concurrency": "777", "ZTUNNEL_RESOURCE_CPU_LIMIT": "777", "ZTUNNEL_RESOURCE_CPU_REQUEST": "777",
		"ZTUNNEL_CPU_LIMIT": "7777", "ZTUNNEL_MEMORY_LIMIT": "1Gi",
		"IPV6_ENABLED": "false", "ENABLE_ORIG_SRC": "false", "PACKET_MARK": "7", "KEEPALIVE_ENABLED": "false", "KEEPALIVE_TIME": "1s",
		"KEEPALIVE_INTERVAL": "1s", "KEEPALIVE_RETRIES": "1", "USER_TIMEOUT_ENABLED": "true",
		"POOL_MAX_STREAMS_PER_CONNECTION": "7", "POOL_CONNECTIONS_PER_KEY": "7", "POOL_UNUSED_RELEASE_TIMEOUT": "1s", "POOL_MAX_CONNECTION_AGE": "1s",
		"HBONE_MAX_CONCURRENT_STREAMS": "7", "HTTP2_STREAM_WINDOW_SIZE": "70000", "HTTP2_CONNECTION_WINDOW_SIZE": "70000", "HTTP2_FRAME_SIZE": "20000",
		"TCP_CONNECT_TIMEOUT": "1s", "HBONE_HANDSHAKE_TIMEOUT": "1s", "HBONE_RESPONSE_TIMEOUT": "1s", "HBONE_IDLE_TIMEOUT": "1s",
		"HBONE_PING_INTERVAL": "1s", "HBONE_PING_TIMEOUT": "1s", "WORKLOAD_WAIT_TIMEOUT": "1s", "CA_REQUEST_TIMEOUT": "1s", "HTTP_HEADER_TIMEOUT": "1s",
		"PROXY_WORKLOAD_PID": "7", "POD_UID": "x", "CA_PROVIDER": "istio", "CA_ROUTES": "ns=a:local", "CA_CONFIG": "/ca.yaml",
		"CA_ADDRESS": "https://x", "CA_ROOT_CA": "/root.pem", "ALT_CA_HOSTNAME": "x", "CA_HEADER_*": "CA_HEADER_X=y", "CA_CERT_SIGNER": "x", "AUTH_TOKEN": "x",
		"KUBERNETES_SERVICE_HOST": "x", "SPIRE_ADMIN_ENDPOINT_SOCKET": "/x", "SPIRE_TIMEOUT": "1s", "SPIRE_SELECTORS": "a:b", "SPIRE_BUNDLE_RESYNC": "1m",
		"SPIRE_REFERENCE": "pid", "SVID_WITHDRAW_GRACE": "1s", "SPIFFE_BROKER_SOCKET": "/x", "SPIFFE_BROKER_WORKLOAD_API_SOCKET": "/x",
		"SPIFFE_BROKER_WORKLOAD_API_SPIFFE_ID": "spiffe://x/y", "SPIFFE_BROKER_ATTESTATION": "pid", "SPIFFE_BROKER_TIMEOUT": "1s", "SPIFFE_ENDPOINT_SOCKET": "/x",
		"CA_LOCAL_DIR": "/ca", "SECRET_TTL": "1h", "CA_LINGER": "1s", "CRL_PATH": "/crl", "SVID_VALIDATION": "strict", "DEFAULT_TRUST_DOMAIN": "x", "TRUST_DOMAIN_ALIASES": "x",
		"POD_NAME": "x", "POD_NAMESPACE": "x", "INSTANCE_IP": "x", "discoveryAddress": "x", "XDS_ROOT_CA": "/root.pem", "ALT_XDS_HOSTNAME": "x",
		"XDS_ADDRESS": "x", "XDS_HEADER_*": "XDS_HEADER_X=y", "XDS_ON_DEMAND": "true", "XDS_STALE_GRACE": "1s", "XDS_FULL_SET": "never", "ISTIO_METAJSON_*": "ISTIO_METAJSON_X=7",
		"LOCAL_XDS_PATH": "/world.yaml", "LOCAL_XDS": "workloads: []",
		"ENABLE_PROXY": "false", "PROXY_MODE": "shared", "UNSTABLE_ENABLE_SOCKS5": "true", "INPOD_UDS": "/x", "INPOD_NACK": "always", "INPOD_PORT_REUSE": "false",
		"READINESS_BIND_ADDRESS": "::1", "CLUSTER_DOMAIN": "x", "PREFERED_SERVICE_NAMESPACE": "x", "ISTIO_META_DNS_CAPTURE": "false",
		"ISTIO_META_DNS_PROXY_ADDR": "127.0.0.1:53",
		"AUTHZ_POLICY_INFO_LOGGING": "true", "AUTHZ_MISSING_POLICY": "deny", "AUTHZ_FOREIGN_TRUST_DOMAIN": "match",
		"TLS12_ENABLED": "true", "COMPLIANCE_POLICY": "pqc",
		"proxyAdminPort": "777", "statsPort": "777", "METRICS_IDLE_TIMEOUT": "1s", "METRICS_MAX_SERIES": "7",
		"RUST_LOG": "debug", "LOG_FORMAT": "json", "PROXY_CONFIG": "statsPort: 777", "ISTIO_META_ISTIO_VERSION": "x",
		"ISTIO_META_*": "ISTIO_META_TRUST_DOMAIN_ALIASES=x",
	}
	elsewhere := map[string]string{ // why a row does not stand above
		"SERVICE_ACCOUNT":             "needs POD_NAME and POD_NAMESPACE: TestID_E203_SelfListener",
		"FAKE_CA":                     "means CA_PROVIDER=local: TestID_CF04_Validation",
		"SPIRE_ENABLED":               "means CA_PROVIDER=spire-delegated: TestProviderAliases",
		"CONTAINER_RUNTIME_SOCK_PATH": "has no effect, and says so",
		"TRUST_DOMAIN":                "is shown only: TestID_AD02_ConfigDump",
		"INPOD_ENABLED":               "has no effect, and says so",
		"RUST_BACKTRACE":              "has no effect, and says so",
	}
	for _, g := range configTable {
		for _, v := range g.vars {
			text, used := changed[v.name]
			if _, known := elsewhere[v.name]; used == known {
				t.Errorf("%s: must stand in one of the tables, and in one only", v.name)
			}
			if !used {
				continue
			}
			env := v.name + "=" + text
			switch {
			case v.field:
				env = "PROXY_CONFIG=" + v.name + ": " + text
			case v.prefix:
				env = text
			}
			base := with("-LOCAL_XDS_PATH", "XDS_ADDRESS=istiod:1")
			if v.name == "XDS_ON_DEMAND" {
				base = append(base, "ISTIO_META_DNS_CAPTURE=false")
			}
			if v.name == "discoveryAddress" {
				base = with("-LOCAL_XDS_PATH", "-XDS_ADDRESS")
			}
			if v.name == "CA_CONFIG" {
				base = with("-LOCAL_XDS_PATH", "-CA_PROVIDER")
			}
			was, _, err := Load(base, read)
			if err != nil {
				t.Fatal(err)
			}
			is, _, err := Load(append([]string{env}, base...), read) // the first wins
			if err != nil {
				t.Errorf("%s: %v", env, err)
				continue
			}
			if produced(t, was) == produced(t, is) {
				t.Errorf("%s changes nothing", env)
			}
		}
	}
}

// TestMapping: durations of which 0 is special, and what reaches two packages.
func TestMapping(t *testing.T) {
	cfg, _, err := Load(with("POOL_UNUSED_RELEASE_TIMEOUT=0s", "CA_LINGER=0s", "METRICS_IDLE_TIMEOUT=0s", "POOL_MAX_CONNECTION_AGE=7s",
		"CA_REQUEST_TIMEOUT=3s", "SVID_VALIDATION=strict", "HTTP_HEADER_TIMEOUT=9s"), func(string) ([]byte, error) { return nil, fs.ErrNotExist })
	if err != nil {
		t.Fatal(err)
	}
	trust, err := trustOf(cfg)
	if err != nil {
		t.Fatal(err)
	}
	data, signer := dataPathConfig(cfg), localCAConfig(trust, cfg.CA.Providers[0])
	if data.PoolIdle >= 0 || managerConfig(cfg, trust).Linger >= 0 || metricsConfig(cfg).Idle >= 0 {
		t.Errorf("0s: pool %v, linger %v, metrics %v; want all negative", data.PoolIdle, managerConfig(cfg, trust).Linger, metricsConfig(cfg).Idle)
	}
	if data.PoolMaxAge != cfg.HBONE.PoolMaxAge || data.PoolMaxAge == 0 {
		t.Errorf("greatest age = %v, want %v", data.PoolMaxAge, cfg.HBONE.PoolMaxAge)
	}
	if data.CertificateWait != cfg.CA.RequestTimeout || signer.Poll.Timeout != cfg.CA.RequestTimeout {
		t.Errorf("request timeout: proxy %v, provider %v, want %v", data.CertificateWait, signer.Poll.Timeout, cfg.CA.RequestTimeout)
	}
	for name, got := range map[string]ca.Validation{
		"provider": signer.Poll.Validation, "manager": managerConfig(cfg, trust).Validation, "tls": tlsOptions(cfg, trust).Validation,
	} {
		if got != trust.validation || got == ca.PerAnchor {
			t.Errorf("validation of the %s = %v, want %v", name, got, trust.validation)
		}
	}
}

// TestMapping_Shared: what sockets have in pods, and what they have outside (spec
// §7.9); when the next proxy is waited for (decision D14).
func TestMapping_Shared(t *testing.T) {
	load := func(env ...string) *Config {
		t.Helper()
		cfg, _, err := Load(append(env, "ENABLE_ORIG_SRC=true"), files(nil))
		if err != nil {
			t.Fatal(err)
		}
		return cfg
	}
	shared, dedicated := load(), load("PROXY_MODE=dedicated", "PROXY_WORKLOAD_INFO=a/b/c", "PACKET_MARK=7")
	if host := hostConfig(shared); host.Mark != 0 || host.OriginalSource != netns.OriginalSourceOff {
		t.Errorf("outside of pods: %+v, want neither a mark nor the original source", host)
	}
	if pod := podConfig(shared); pod.Mark != 1337 || !pod.PortReuse || pod.OriginalSource != netns.OriginalSourceRequired {
		t.Errorf("in pods: %+v", pod)
	}
	if host := hostConfig(dedicated); host.Mark != 7 || host.OriginalSource != netns.OriginalSourceRequired {
		t.Errorf("dedicated: %+v", host)
	}
	for _, tt := range []struct {
		path, deadline string
		want           time.Duration
	}{
		{"/var/run/ztunnel/ztunnel.sock", "1m", 0},
		{"/var/run/cilium/ztunnel.sock", "1m", 10 * time.Second},
		{"/run/cilium/../cilium/z", "6s", 3 * time.Second},
		{"/var/run/cilium/../ztunnel/z", "6s", 0},
		{"/var/run/cilium-x/z", "6s", 0},
	} {
		cfg := load("INPOD_UDS="+tt.path, "CONNECTION_TERMINATION_DEADLINE="+tt.deadline)
		if got, ours := handOver(cfg), inpodConfig(cfg); got != tt.want || ours.HandOver != (tt.want > 0) || ours.Path != tt.path {
			t.Errorf("%s: hand-over %s, %+v, want %s", tt.path, got, ours, tt.want)
		}
	}
	for text, want := range map[string]inpod.NACK{"auto": inpod.NACKAuto, "always": inpod.NACKAlways, "never": inpod.NACKNever} {
		if got := inpodConfig(load("INPOD_NACK=" + text)).NACK; got != want {
			t.Errorf("INPOD_NACK=%s: %v, want %v", text, got, want)
		}
	}
}
