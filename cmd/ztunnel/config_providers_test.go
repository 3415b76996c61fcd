package main

import (
	"strings"
	"testing"
)

// TestID_CF04_Providers: what is wrong with the settings of the certificate
// providers is told by name.
func TestID_CF04_Providers(t *testing.T) {
	checkLoads(t, []struct{ name, env, want string }{
		{"provider", "CA_PROVIDER=vault", `unknown provider "vault": must be one of istio, spire-delegated, spire-broker, spire-workload, local`},
		{"provider twice", "CA_PROVIDER=local,local", `provider "local" stands twice`},
		{"provider twice by its alias", "CA_PROVIDER=istio,istio_ca", `provider "istio" stands twice`},
		{"provider empty", "CA_PROVIDER=", `unknown provider "": must be one of`},
		{"provider istio", "-CA_PROVIDER", ""},
		{"provider alias", "CA_PROVIDER=istio_ca", ""},
		{"provider list", "CA_PROVIDER=local,istio", ""},
		{"fake CA", "-CA_PROVIDER;FAKE_CA=true", ""},
		{"fake CA contradiction", "CA_PROVIDER=istio;FAKE_CA=true", "CA_PROVIDER=istio contradicts FAKE_CA=true"},
		{"SPIRE contradiction", "SPIRE_ENABLED=true", "CA_PROVIDER=local contradicts SPIRE_ENABLED=true"},
		{"SPIRE and fake CA", "-CA_PROVIDER;SPIRE_ENABLED=true;FAKE_CA=true", "FAKE_CA=true contradicts SPIRE_ENABLED=true"},
		{"SPIRE alias contradiction", "SPIRE_ENABLED=false;USE_SPIRE=true", "SPIRE_ENABLED=false (contradicts USE_SPIRE=true"},
		{"SPIRE alias", "-CA_PROVIDER;USE_SPIRE=true", ""},
		{"SPIRE and its provider", "CA_PROVIDER=spire-delegated;USE_SPIRE=true", ""},
		{"SPIRE off", "CA_PROVIDER=istio;SPIRE_ENABLED=false", ""},
		{"CA address empty", "CA_PROVIDER=istio;CA_ADDRESS=", "invalid configuration: CA_ADDRESS is empty: the provider istio needs the address of a CA"},
		{"CA address empty for another provider", "CA_ADDRESS=", ""},
		{"CA address in the clear", "CA_ADDRESS=http://x", "invalid env var CA_ADDRESS=http://x (invalid uri: http is refused"},
		{"CA address", "CA_ADDRESS=http://[::1", "invalid env var CA_ADDRESS=http://[::1 (invalid uri: "},
		{"routes", "CA_ROUTES=a=b", `invalid env var CA_ROUTES=a=b (rule "a=b": names no provider`},
		{"routes empty is unset", "CA_ROUTES=", ""},
		{"routes to nobody", "CA_ROUTES=ns=a:istio", `invalid env var CA_ROUTES=ns=a:istio (rule "ns=a:istio": unknown provider "istio": must be one of those that are listed: local)`},
		{"routes by an alias", "CA_PROVIDER=local,istio;CA_ROUTES=*:istio_ca", ""},
		{"routes that exclude each other", "CA_PROVIDER=local,istio;CA_ROUTES=ns=a:istio,ns=a:local", "ns=a:local can never be reached"},
		{"socket", "SPIRE_ADMIN_ENDPOINT_SOCKET=admin.sock", "invalid env var SPIRE_ADMIN_ENDPOINT_SOCKET=admin.sock (must be an absolute path or unix:///path)"},
		{"socket by URI", "SPIRE_ADMIN_ENDPOINT_SOCKET=unix:///a;SPIFFE_ENDPOINT_SOCKET=unix:/a;SPIFFE_BROKER_WORKLOAD_API_SOCKET=/a", ""},
		{"socket over TCP", "SPIRE_ADMIN_ENDPOINT_SOCKET=tcp://127.0.0.1:1", "has another scheme: must be an absolute path or unix:///path"},
		{"socket over TCP, broker", "SPIFFE_BROKER_SOCKET=tcp://127.0.0.1:1", ""},
		{"socket over TCP without port", "SPIFFE_BROKER_SOCKET=tcp://127.0.0.1", "invalid env var SPIFFE_BROKER_SOCKET=tcp://127.0.0.1 (has no host or no port: must be an absolute path, unix:///path or tcp://host:port)"},
		{"socket with a query", "SPIFFE_ENDPOINT_SOCKET=unix:///a?b", "has a query or a fragment"},
		{"socket, longest path", "SPIFFE_ENDPOINT_SOCKET=/" + strings.Repeat("a", 106), ""},
		{"socket, too long", "SPIFFE_ENDPOINT_SOCKET=unix:///" + strings.Repeat("a", 107), "the path has 108 bytes, and a socket's has at most 107"},
		{"broker without socket", "CA_PROVIDER=spire-broker;SPIFFE_ENDPOINT_SOCKET=/a", "SPIFFE_BROKER_SOCKET is not set: the provider spire-broker needs it"},
		{"broker without Workload API", "CA_PROVIDER=spiffe_broker;SPIFFE_BROKER_SOCKET=/a", "SPIFFE_BROKER_WORKLOAD_API_SOCKET is not set, nor is SPIFFE_ENDPOINT_SOCKET"},
		{"broker without the pod's UID", "CA_PROVIDER=spire-broker;SPIFFE_BROKER_SOCKET=/a;SPIFFE_ENDPOINT_SOCKET=/a", "POD_UID is not set: the provider spire-broker needs it in dedicated mode, unless SPIFFE_BROKER_ATTESTATION is pid"},
		{"broker", "CA_PROVIDER=spire-broker;SPIFFE_BROKER_SOCKET=/a;SPIFFE_ENDPOINT_SOCKET=/a;POD_UID=u", ""},
		{"broker by PID over the network", "CA_PROVIDER=spire-broker;SPIFFE_BROKER_SOCKET=tcp://a:1;SPIFFE_ENDPOINT_SOCKET=/a;SPIFFE_BROKER_ATTESTATION=pid;PROXY_WORKLOAD_PID=1", "SPIFFE_BROKER_SOCKET is on the network, where a PID means nothing"},
		{"workload", "CA_PROVIDER=spire-workload;SPIFFE_ENDPOINT_SOCKET=/a", ""},
		{"broker's identity", "SPIFFE_BROKER_WORKLOAD_API_SPIFFE_ID=spiffe://a", "(must be a SPIFFE ID as in spiffe://cluster.local/ns/istio-system/sa/ztunnel: the path is missing)"},
		{"broker's attestation", "SPIFFE_BROKER_ATTESTATION=uid", "(must be one of k8s_object, pid)"},
		{"workload without socket", "CA_PROVIDER=spire-workload", "SPIFFE_ENDPOINT_SOCKET is not set: the provider spire-workload needs it"},
		{"selector", "SPIRE_SELECTORS=k8s:pod-label:app:web,k8s:node-name:{{.Node}}", ""},
		{"selector without type", "SPIRE_SELECTORS=web", "invalid env var SPIRE_SELECTORS=web ("},
		{"selector with an unknown field", "SPIRE_SELECTORS=a:{{.Pod}}", "invalid env var SPIRE_SELECTORS=a:{{.Pod}} ("},
		{"reference", "SPIRE_REFERENCE=uid", "(must be one of selectors, pid)"},
		{"reference without a process", "CA_PROVIDER=spire-delegated;SPIRE_REFERENCE=pid", "SPIRE_REFERENCE=pid needs PROXY_WORKLOAD_PID"},
		{"reference of another provider", "SPIRE_REFERENCE=pid", ""},
		{"reference with a process", "CA_PROVIDER=spire-delegated;SPIRE_REFERENCE=pid;PROXY_WORKLOAD_PID=1", ""},
		{"attestation without a process", "CA_PROVIDER=spire-broker;SPIFFE_BROKER_SOCKET=/a;SPIFFE_ENDPOINT_SOCKET=/a;SPIFFE_BROKER_ATTESTATION=pid", "SPIFFE_BROKER_ATTESTATION=pid needs PROXY_WORKLOAD_PID"},
		{"process", "PROXY_WORKLOAD_PID=0", "(must be a whole number from 1 to 4194304)"},
		{"resync", "SPIRE_BUNDLE_RESYNC=0", "(must be longer than 0)"},
	})
}

func TestProviderAliases(t *testing.T) {
	for env, want := range map[string]string{
		"CA_PROVIDER=istio_ca,spiffe_broker;SPIFFE_BROKER_SOCKET=/b;SPIFFE_ENDPOINT_SOCKET=/w;POD_UID=u": "istio,spire-broker",
		"-CA_PROVIDER;SPIRE_ENABLED=true":              "spire-delegated",
		"-CA_PROVIDER;USE_SPIRE=true":                  "spire-delegated",
		"-CA_PROVIDER;FAKE_CA=true":                    "local",
		"-CA_PROVIDER":                                 "istio",
		"CA_PROVIDER= spire-delegated , istio , local": "spire-delegated,istio,local",
	} {
		c := mustParse(t, with(strings.Split(env, ";")...), nil)
		if got := strings.Join(c.CA.names(), ","); got != want {
			t.Errorf("%s: got %s, want %s", env, got, want)
		}
	}
	c := mustParse(t, with("DEFAULT_TRUST_DOMAIN=mesh.example"), nil)
	if want := "spiffe://mesh.example/ns/istio-system/sa/ztunnel"; c.CA.BrokerOwnID != want {
		t.Errorf("identity towards the broker: got %q, want %q", c.CA.BrokerOwnID, want)
	}
}
