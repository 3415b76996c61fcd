package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestID_AD02_ConfigDump: the shapes of spec §4.3 for the values of its example.
func TestID_AD02_ConfigDump(t *testing.T) {
	c := mustParse(t, []string{
		"KUBERNETES_SERVICE_HOST=10.0.0.1", "ISTIO_META_CLUSTER_ID=Kubernetes", "CA_HEADER_HEADER_BAZ=baz", "XDS_HEADER_TOKEN=sesame",
		"NODE_NAME=node-a", "TERMINATION_GRACE_PERIOD_SECONDS=30", "AUTH_TOKEN=sesame", "LOCAL_XDS=sesame",
		"POD_NAME=ztunnel-x7k2p", "POD_NAMESPACE=istio-system", "SERVICE_ACCOUNT=ztunnel", "ISTIO_META_DNS_CAPTURE=true",
	}, nil)
	c.Args = "proxy ztunnel"
	const want = `{
    "adminAddr": {"Localhost": [true, 15000]},
    "altCaHostname": null, "altXdsHostname": null,
    "caAddress": "https://istiod.istio-system.svc:15012",
    "caHeaders": [["header_baz", "baz"]],
    "caRootCert": {"File": "./var/run/secrets/istio/root-cert.pem"},
    "clusterDomain": "cluster.local", "clusterId": "Kubernetes",
    "connectionWindowSize": 16777216, "crlPath": null,
    "dnsProxy": true, "dnsProxyAddr": {"Localhost": [true, 15053]},
    "dnsResolverCfg": {"domain": null, "name_servers": [], "search": []}, "dnsResolverOpts": {},
    "enableEnhancedBaggage": true, "fakeCa": false, "fakeSelfInbound": false, "frameSize": 1048576,
    "illegalPorts": [15001, 15006, 15008],
    "inboundAddr": "[::]:15008", "inboundPlaintextAddr": "[::]:15006",
    "inpodPortReuse": true, "inpodUds": "/var/run/ztunnel/ztunnel.sock",
    "ipv6Enabled": true, "localNode": "node-a", "localhostAppTunnel": true, "network": "",
    "numWorkerThreads": 2, "outboundAddr": "[::]:15001", "packetMark": 1337,
    "poolMaxStreamsPerConn": 100, "poolUnusedReleaseTimeout": {"nanos": 0, "secs": 300},
    "preferedServiceNamespace": null, "proxy": true, "proxyArgs": "proxy ztunnel",
    "proxyMetadata": {"CLUSTER_ID": "Kubernetes", "DNS_CAPTURE": "true"}, "proxyMode": "Shared", "proxyWorkloadInformation": null,
    "readinessAddr": {"SocketAddr": "[::]:15021"}, "requireOriginalSource": null,
    "secretTtl": {"nanos": 0, "secs": 86400}, "selfTerminationDeadline": {"nanos": 0, "secs": 25},
    "socketConfig": {"keepaliveEnabled": true, "keepaliveInterval": {"nanos": 0, "secs": 180}, "keepaliveRetries": 9,
                     "keepaliveTime": {"nanos": 0, "secs": 180}, "userTimeoutEnabled": false},
    "socks5Addr": null, "statsAddr": {"SocketAddr": "[::]:15020"}, "windowSize": 4194304,
    "xdsAddress": "https://istiod.istio-system.svc:15012", "xdsHeaders": [["token", "<redacted>"]], "xdsOnDemand": false,
    "xdsRootCert": {"File": "./var/run/secrets/istio/root-cert.pem"},
    "ztunnelIdentity": "spiffe://cluster.local/ns/istio-system/sa/ztunnel",
    "ztunnelWorkload": {"name": "ztunnel-x7k2p", "namespace": "istio-system", "serviceAccount": "ztunnel"}
  }`
	if d := cmp.Diff(unmarshal(t, []byte(want)), dumped(t, c)); d != "" {
		t.Error(d)
	}

	d := dumped(t, mustParse(t, with("UNSTABLE_ENABLE_SOCKS5=true", "ENABLE_ORIG_SRC=true", "CA_ROOT_CA=SYSTEM",
		"XDS_ROOT_CA="+rootPEM(t), "CRL_PATH=/crl", "CONNECTION_TERMINATION_DEADLINE=1500ms"), nil))
	for key, want := range map[string]any{
		"socks5Addr":               "127.0.0.1:15080",
		"illegalPorts":             []any{15001.0, 15006.0, 15008.0, 15080.0},
		"requireOriginalSource":    true,
		"caRootCert":               "Default",
		"xdsRootCert":              "Static",
		"crlPath":                  "/crl",
		"packetMark":               nil,
		"proxyMode":                "Dedicated",
		"proxyWorkloadInformation": map[string]any{"name": "echo-1", "namespace": "default", "serviceAccount": "echo"},
		"selfTerminationDeadline":  map[string]any{"secs": 1.0, "nanos": 5e8},
		"xdsAddress":               nil,
		"ztunnelIdentity":          nil,
	} {
		if diff := cmp.Diff(want, d[key]); diff != "" {
			t.Errorf("%s: %s", key, diff)
		}
	}
}

// TestDumpRedacts: what Settings hides, the dump does not tell.
func TestDumpRedacts(t *testing.T) {
	c := mustParse(t, with("ISTIO_META_API_TOKEN=sesame", `PROXY_CONFIG={"proxyMetadata":{"DB_PASSWORD":"sesame", "EMPTY_KEY": "", "PLAIN": "x"}}`,
		"AUTH_TOKEN=sesame", "CA_HEADER_AUTHORIZATION=sesame"), nil)
	want := map[string]any{"API_TOKEN": redacted, "DB_PASSWORD": redacted, "EMPTY_KEY": "", "PLAIN": "x"}
	d := dumped(t, c)
	if diff := cmp.Diff(want, d["proxyMetadata"]); diff != "" {
		t.Error(diff)
	}
	if shown := fmt.Sprint(d, c.Settings()); strings.Contains(shown, "sesame") {
		t.Errorf("a secret is shown: %s", shown)
	}
}

func dumped(t *testing.T, c *Config) map[string]any {
	t.Helper()
	b, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	return unmarshal(t, b)
}

func unmarshal(t *testing.T, b []byte) map[string]any {
	t.Helper()
	var m map[string]any
	if err := json.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	return m
}
