package main

import (
	"strings"
	"testing"
)

// TestID_CF04_Validation: each validation of spec §5.2. An entry without want must
// be accepted.
func TestID_CF04_Validation(t *testing.T) {
	tests := []struct{ name, env, want string }{
		{"valid", "", ""},
		{"mode", "PROXY_MODE=sidecar", "invalid env var PROXY_MODE=sidecar (must be one of shared, dedicated)"},
		{"mode empty", "PROXY_MODE=", "invalid env var PROXY_MODE= (must be one of shared, dedicated)"},
		{"mode shared", "PROXY_MODE=shared", ""},
		{"mode shared by default", "-PROXY_MODE;-PROXY_WORKLOAD_INFO", ""},
		{"no workload", "-PROXY_WORKLOAD_INFO", "invalid configuration: PROXY_MODE=dedicated requires PROXY_WORKLOAD_INFO to be set"},
		{"workload of two parts", "PROXY_WORKLOAD_INFO=a/b", "invalid env var PROXY_WORKLOAD_INFO=a/b (must be namespace/name/service-account)"},
		{"workload without identity", "PROXY_WORKLOAD_INFO=ns/pod/..", "invalid env var PROXY_WORKLOAD_INFO=ns/pod/.. (invalid spiffe identity: "},
		{"workload of four parts", "PROXY_WORKLOAD_INFO=ns/pod/sa/b", "namespace and service account must be of letters, digits"},
		{"workload and trust domain", "PROXY_WORKLOAD_INFO=ns/pod/a b;DEFAULT_TRUST_DOMAIN=X", "PROXY_WORKLOAD_INFO=ns/pod/a b (invalid spiffe identity"},
		{"DNS alone", "ENABLE_PROXY=false", ""},
		{"no servers", "ENABLE_PROXY=false;ISTIO_META_DNS_CAPTURE=false", "error parsing proxy config: ztunnel run without any servers enabled"},
		{"bool", "ENABLE_PROXY=1", "invalid env var ENABLE_PROXY=1 (must be true or false)"},
		{"bool case", "IPV6_ENABLED=True", "invalid env var IPV6_ENABLED=True (must be true or false)"},
		{"bool empty", "KEEPALIVE_ENABLED=", "invalid env var KEEPALIVE_ENABLED= (must be true or false)"},
		{"original source", "ENABLE_ORIG_SRC=maybe", "invalid env var ENABLE_ORIG_SRC=maybe (must be one of true, false)"},
		{"number", "PACKET_MARK=-1", "invalid env var PACKET_MARK=-1 (must be a whole number from 0 to 4294967295)"},
		{"number range", "POOL_MAX_STREAMS_PER_CONNECTION=65536", "(must be a whole number from 1 to 65535)"},
		{"number empty", "KEEPALIVE_RETRIES=", "invalid env var KEEPALIVE_RETRIES= (must be a whole number"},
		{"frame size", "HTTP2_FRAME_SIZE=1000", "(must be a whole number from 16384 to 16777215)"},
		{"window", "HTTP2_STREAM_WINDOW_SIZE=4294967295", "(must be a whole number from 65535 to 2147483647)"},
		{"duration", "POOL_UNUSED_RELEASE_TIMEOUT=5x", `invalid env var POOL_UNUSED_RELEASE_TIMEOUT=5x (unknown unit "x"`},
		{"duration empty", "SECRET_TTL=", "invalid env var SECRET_TTL= (Empty input)"},
		{"certificate life", "SECRET_TTL=10ms", "invalid env var SECRET_TTL=10ms (must be at least 1s)"},
		{"certificate life, least", "SECRET_TTL=1s", ""},
		{"ping interval zero", "HBONE_PING_INTERVAL=0", "invalid env var HBONE_PING_INTERVAL=0 (must be longer than 0)"},
		{"idle timeout zero", "HBONE_IDLE_TIMEOUT=0s", "invalid env var HBONE_IDLE_TIMEOUT=0s (must be longer than 0)"},
		{"timeout zero", "TCP_CONNECT_TIMEOUT=0s", "(must be longer than 0)"},
		{"threads", "ZTUNNEL_WORKER_THREADS=many", "(invalid number: "},
		{"threads percentage", "ZTUNNEL_WORKER_THREADS=x%", "(invalid percentage: "},
		{"threads percentage range", "ZTUNNEL_WORKER_THREADS=101%", "(percentage must be between 0 and 100)"},
		{"threads NaN", "ZTUNNEL_WORKER_THREADS=NaN%", "(percentage must be between 0 and 100)"},
		{"cpu zero", "ZTUNNEL_RESOURCE_CPU_LIMIT=0", "(must be a positive CPU quantity)"},
		{"cpu NaN, although threads are set", "ZTUNNEL_RESOURCE_CPU_REQUEST=NaN;ZTUNNEL_WORKER_THREADS=2", "(must be a positive CPU quantity)"},
		{"cpu inf", "ZTUNNEL_RESOURCE_CPU_REQUEST=inf", "(must be a positive CPU quantity)"},
		{"cpu limit", "ZTUNNEL_CPU_LIMIT=1.5", "invalid env var ZTUNNEL_CPU_LIMIT=1.5 ("},
		{"memory", "ZTUNNEL_MEMORY_LIMIT=much", "(must be a positive memory quantity"},
		{"grace", "TERMINATION_GRACE_PERIOD_SECONDS=-3", "invalid env var TERMINATION_GRACE_PERIOD_SECONDS=-3 ("},
		{"xDS", "XDS_ADDRESS=istiod:15012", ""},
		{"xDS unset", "-XDS_ADDRESS", ""},
		{"xDS without a file", "XDS_ADDRESS=istiod:15012;-LOCAL_XDS_PATH", ""},
		{"xDS over a socket", "XDS_ADDRESS=unix:///run/xds.sock", ""},
		{"xDS in the clear", "XDS_ADDRESS=http://istiod:15010", "invalid env var XDS_ADDRESS=http://istiod:15010 (invalid uri: http is refused"},
		{"xDS in the clear, in ProxyConfig", "-XDS_ADDRESS;PROXY_CONFIG={discoveryAddress: 'http://x:1'}", "discoveryAddress=http://x:1 in PROXY_CONFIG (invalid uri: http is refused"},
		{"xDS over a relative socket", "XDS_ADDRESS=unix://run/xds.sock", "(invalid uri: must be unix:///path)"},
		{"xDS with credentials", "XDS_ADDRESS=https://a:sesame@x", "XDS_ADDRESS=<redacted> (invalid uri: user information"},
		{"xDS address", "XDS_ADDRESS=ftp://x", "(invalid uri: scheme"},
		{"on demand", "XDS_ON_DEMAND=true;XDS_ADDRESS=x;ISTIO_META_DNS_CAPTURE=false", ""},
		{"stale grace", "XDS_STALE_GRACE=long", "invalid env var XDS_STALE_GRACE=long ("},
		{"full set", "XDS_FULL_SET=always", "(must be one of auto, never)"},
		{"on demand with DNS", "XDS_ON_DEMAND=true;ISTIO_META_DNS_CAPTURE=true", "error parsing proxy config: DNS proxy does not currently support on-demand mode"},
		{"on demand with DNS by default", "XDS_ON_DEMAND=true", "DNS proxy does not currently support on-demand mode: set ISTIO_META_DNS_CAPTURE=false"},
		{"root neither path nor PEM", "CA_ROOT_CA=system", "(must be the path of a file, SYSTEM, or PEM text"},
		{"root that comes later", "CA_ROOT_CA=/missing.pem;XDS_ROOT_CA=root.pem", ""},
		{"root system", "CA_ROOT_CA=SYSTEM;XDS_ROOT_CA=" + rootPEM(t), ""},
		{"root of damaged PEM", "XDS_ROOT_CA=-----BEGIN CERTIFICATE-----", "(the PEM text holds no certificate that can be read)"},
		{"alternative name", "ALT_XDS_HOSTNAME=a b", `invalid env var ALT_XDS_HOSTNAME=a b (invalid alt hostname: "a b"`},
		{"header of gRPC", "XDS_HEADER_GRPC-TIMEOUT=1", "failed to parse header key"},
		{"header key", "CA_HEADER_A B=x", "failed to parse header key: CA_HEADER_A B"},
		{"header value", "XDS_HEADER_A=x\ny", "failed to parse header value"},
		{"local both", "LOCAL_XDS=workloads: []", "only one of LOCAL_XDS_PATH and LOCAL_XDS may be set"},
		{"local path empty", "LOCAL_XDS_PATH=", "invalid env var LOCAL_XDS_PATH= (must not be empty)"},
		{"SOCKS5", "UNSTABLE_ENABLE_SOCKS5=true", ""},
		{"SOCKS5 case", "UNSTABLE_ENABLE_SOCKS5=yes", "invalid env var UNSTABLE_ENABLE_SOCKS5=yes (must be true or false)"},
		{"DNS on", "ISTIO_META_DNS_CAPTURE=TRUE", ""},
		{"DNS off", "ISTIO_META_DNS_CAPTURE=false", ""},
		{"DNS address", "ISTIO_META_DNS_PROXY_ADDR=[::1]:53", ""},
		{"DNS address of strangers", "ISTIO_META_DNS_PROXY_ADDR=10.0.0.1:53", "invalid env var ISTIO_META_DNS_PROXY_ADDR=10.0.0.1:53 (must be a loopback address: "},
		{"DNS address of everybody", "ISTIO_META_DNS_PROXY_ADDR=0.0.0.0:53", "(must be a loopback address: "},
		{"DNS address mapped", "ISTIO_META_DNS_PROXY_ADDR=[::ffff:10.0.0.1]:53", "(must be a loopback address: "},
		{"DNS address without port", "ISTIO_META_DNS_PROXY_ADDR=localhost:0", "failed to parse DNS_PROXY_ADDR: localhost:0 (port must be a whole number from 1 to 65535)"},
		{"DNS port of another", "ISTIO_META_DNS_PROXY_ADDR=localhost:15001", "ISTIO_META_DNS_PROXY_ADDR=localhost:15001 (the port of the outbound listener: must be another one)"},
		{"DNS port of the admin server", "ISTIO_META_DNS_PROXY_ADDR=localhost:15000", "proxyAdminPort=15000 (the port of the DNS proxy: must be another one)"},
		{"DNS port of the admin server, in shared mode", "PROXY_MODE=shared;ISTIO_META_DNS_PROXY_ADDR=localhost:15000", ""},
		{"DNS port of another, off", "ISTIO_META_DNS_CAPTURE=false;ISTIO_META_DNS_PROXY_ADDR=localhost:15001", ""},
		{"cluster domain", "CLUSTER_DOMAIN=cluster..local", "invalid env var CLUSTER_DOMAIN=cluster..local (must be a DNS domain, as in cluster.local)"},
		{"cluster domain empty", "CLUSTER_DOMAIN=", "invalid env var CLUSTER_DOMAIN= (must be a DNS domain"},
		{"cluster domain as URI", "CLUSTER_DOMAIN=spiffe://x", "(must be a DNS domain"},
		{"cluster domain long", "CLUSTER_DOMAIN=" + strings.Repeat("a.", 128), "(must be a DNS domain"},
		{"agent socket empty", "INPOD_UDS=", "invalid env var INPOD_UDS= (must be the path of a unix socket)"},
		{"agent socket as URI", "INPOD_UDS=unix:///run/x", "(must be the path of a unix socket alone, and no URI)"},
		{"agent socket long", "INPOD_UDS=/" + strings.Repeat("x", 107), "(the path has 108 bytes, and a socket's has at most 107)"},
		{"port reuse", "INPOD_PORT_REUSE=1", "invalid env var INPOD_PORT_REUSE=1 (must be true or false)"},
		{"nack", "INPOD_NACK=sometimes", "invalid env var INPOD_NACK=sometimes (must be one of auto, always, never)"},
		{"nack empty", "INPOD_NACK=", "invalid env var INPOD_NACK= (must be one of auto, always, never)"},
		{"readiness address", "READINESS_BIND_ADDRESS=127.0.0.1", ""},
		{"readiness address with port", "READINESS_BIND_ADDRESS=[::1]:15022", ""},
		{"readiness name", "READINESS_BIND_ADDRESS=localhost", "invalid env var READINESS_BIND_ADDRESS=localhost (must be an IP address or ip:port)"},
		{"readiness port", "READINESS_BIND_ADDRESS=127.0.0.1:0", "(must be an IP address or ip:port)"},
		{"readiness port of another", "READINESS_BIND_ADDRESS=127.0.0.1:15006", "READINESS_BIND_ADDRESS=127.0.0.1:15006 (the port of the inbound plaintext listener: must be another one)"},
		{"PID in shared mode", "PROXY_MODE=shared;CA_PROVIDER=spire-delegated;SPIRE_REFERENCE=pid;PROXY_WORKLOAD_PID=7", "SPIRE_REFERENCE=pid needs PROXY_MODE=dedicated"},
		{"PID of the broker in shared mode", "PROXY_MODE=shared;CA_PROVIDER=spire-broker;SPIFFE_BROKER_SOCKET=/x;SPIFFE_ENDPOINT_SOCKET=/y;SPIFFE_BROKER_ATTESTATION=pid", "SPIFFE_BROKER_ATTESTATION=pid needs PROXY_MODE=dedicated"},
		{"broker in shared mode", "PROXY_MODE=shared;CA_PROVIDER=spire-broker;SPIFFE_BROKER_SOCKET=/x;SPIFFE_ENDPOINT_SOCKET=/y", ""},
		{"CRL empty is unset", "CRL_PATH=", ""},
		{"validation", "SVID_VALIDATION=lax", "(must be one of strict, compatible)"},
		{"missing policy", "AUTHZ_MISSING_POLICY=drop", "(must be one of allow, deny)"},
		{"foreign", "AUTHZ_FOREIGN_TRUST_DOMAIN=yes", "(must be one of ignore, match)"},
		{"trust domain", "DEFAULT_TRUST_DOMAIN=Cluster.Local", "invalid env var DEFAULT_TRUST_DOMAIN=Cluster.Local ("},
		{"trust domain alias", "TRUST_DOMAIN_ALIASES=a, b/c", `invalid env var TRUST_DOMAIN_ALIASES=a, b/c ("b/c": `},
		{"trust domain as URI", "DEFAULT_TRUST_DOMAIN=spiffe://x/ns/a/sa/b", "invalid env var DEFAULT_TRUST_DOMAIN=spiffe://x/ns/a/sa/b (\"spiffe://x/ns/a/sa/b\": must be the name of a trust domain alone"},
		{"trust domain as scheme and name", "DEFAULT_TRUST_DOMAIN=spiffe://x", "must be the name of a trust domain alone"},
		{"trust domain alias as URI", "TRUST_DOMAIN_ALIASES=a,spiffe://x/ns/y", "(\"spiffe://x/ns/y\": must be the name of a trust domain alone"},
		{"metadata twice", "ISTIO_META_X=one;ISTIO_META_ISTIO_META_X=two", "invalid env var ISTIO_META_X=one (contradicts ISTIO_META_ISTIO_META_X=two: both name the metadata X"},
		{"metadata twice, the same", "ISTIO_META_X=one;ISTIO_META_ISTIO_META_X=one", ""},
		{"secret metadata twice", "ISTIO_META_A_TOKEN=sesame1;ISTIO_META_ISTIO_META_A_TOKEN=sesame2", "ISTIO_META_ISTIO_META_A_TOKEN=<redacted> (contradicts ISTIO_META_A_TOKEN=<redacted>"},
		{"metadata twice in ProxyConfig", "PROXY_CONFIG={proxyMetadata: {X: one, ISTIO_META_ISTIO_META_X: two}}", "proxyMetadata.ISTIO_META_ISTIO_META_X contradicts proxyMetadata.X"},
		{"ports of our own", "PROXY_CONFIG={proxyAdminPort: 15020}", "proxyAdminPort=15020 in PROXY_CONFIG (the port of statsPort: must be another one)"},
		{"ports of our own, the other", "PROXY_CONFIG={statsPort: 15000}", "statsPort=15000 in PROXY_CONFIG (the port of proxyAdminPort: must be another one)"},
		{"ports, both set", "PROXY_CONFIG={statsPort: 1, proxyAdminPort: 1}", "statsPort=1 in PROXY_CONFIG (the port of proxyAdminPort"},
		{"ports exchanged", "PROXY_CONFIG={statsPort: 15000, proxyAdminPort: 15020}", ""},
		{"ports any", "PROXY_CONFIG={statsPort: 0, proxyAdminPort: 0}", ""},
		{"port of HBONE", "PROXY_CONFIG={proxyAdminPort: 15008}", "proxyAdminPort=15008 in PROXY_CONFIG (the port of the HBONE listener"},
		{"port of inbound plaintext", "PROXY_CONFIG={statsPort: 15006}", "statsPort=15006 in PROXY_CONFIG (the port of the inbound plaintext listener"},
		{"port of outbound", "PROXY_CONFIG={statsPort: 15001}", "(the port of the outbound listener"},
		{"port of readiness", "PROXY_CONFIG={statsPort: 15021}", "(the port of readiness"},
		{"log filter", "RUST_LOG=access=loud", "invalid env var RUST_LOG=access=loud ("},
		{"log filter empty", "RUST_LOG=", ""},
		{"unknown names", "NO_SUCH_SETTING=1;ISTIO_META_X=y;PROXY_CONFIG=proxyMetadata: {NOBODY: knows}", ""},
		{"secret stays hidden", "XDS_HEADER_AUTHORIZATION=sesame\x01", "XDS_HEADER_AUTHORIZATION=<redacted> ("},
	}
	checkLoads(t, tests)
}

// checkLoads loads each env, names separated by semicolons, on top of valid; want
// is in the error, "" = none.
func checkLoads(t *testing.T, tests []struct{ name, env, want string }) {
	t.Helper()
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c, _, err := Load(with(strings.Split(tt.env, ";")...), files(nil))
			switch {
			case c == nil:
				t.Error("the Config must never be nil")
			case tt.want == "" && err != nil:
				t.Errorf("got %v, want no error", err)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("got %v, want %q", err, tt.want)
			case err != nil && strings.Contains(err.Error(), "sesame"):
				t.Errorf("a secret is shown: %v", err)
			}
		})
	}
}
