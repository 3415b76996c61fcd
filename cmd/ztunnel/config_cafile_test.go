package main

import (
	"encoding/json"
	"encoding/pem"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ztunnel-go/ztunnel/ca/local"
)

// rootPEM is the text of a certificate.
func rootPEM(t *testing.T) string {
	t.Helper()
	root, err := local.Open(local.Config{})
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Root().Raw}))
}

// TestCAFile: what the file says wins, what it does not say is inherited.
func TestCAFile(t *testing.T) {
	const text = `
providers:
- name: new
  type: spire-delegated
  adminEndpointSocket: unix:///run/spire/admin.sock
  selectors: ["k8s:pod-label:app:web", "k8s:node-name:{{.Node}}"]
  timeout: 3s
  bundleResync: 60
  withdrawGrace: 0s
- {name: broker, type: spiffe_broker, socket: "tcp://127.0.0.1:8788", workloadAPISocket: /w, attestation: k8s_object, workloadAPISPIFFEID: "spiffe://x/y"}
- {name: spire-workload, endpointSocket: /own}
- name: istio
  headers: {X-A: b}
  authToken: secret
  certSigner: ""
- name: istio-old
  type: istio_ca
  address: old:15012
  rootCA: SYSTEM
  altHostname: istiod
  roots: /roots.pem
  secretTTL: 1h
  requestTimeout: 2s
- {name: here, type: local, dir: /ca}
routes:
- {namespace: payments, provider: new}
- {trustDomain: old.example, provider: istio-old}
- {provider: istio}
`
	c := mustParse(t, with("-CA_PROVIDER", "CA_CONFIG=/ca.yaml", "POD_UID=u", "CA_ADDRESS=https://new:15012", "SECRET_TTL=2h", "CA_HEADER_Z=z",
		"CA_CERT_SIGNER=signer", "AUTH_TOKEN=/token", "CA_LOCAL_DIR=/elsewhere", "SPIRE_TIMEOUT=7s", "SPIFFE_BROKER_TIMEOUT=8s"),
		map[string]string{"/ca.yaml": text, "/roots.pem": rootPEM(t), "/token": "x"})
	if v, o := origin(c, "CA_PROVIDER"); v != "new,broker,spire-workload,istio,istio-old,here" || o != "/ca.yaml" {
		t.Errorf("CA_PROVIDER is shown as %q from %q", v, o)
	}
	base := c.CA.ProviderSettings
	type change func(*ProviderSettings)
	want := func(name, kind string, f change) ProviderConfig {
		p := ProviderConfig{Name: name, Type: kind, ProviderSettings: base}
		f(&p.ProviderSettings)
		return p
	}
	providers := []ProviderConfig{
		want("new", "spire-delegated", func(s *ProviderSettings) {
			s.AdminSocket, s.SPIRETimeout, s.BundleResync, s.WithdrawGrace = "unix:///run/spire/admin.sock", 3*time.Second, time.Minute, 0
			s.Selectors = []string{"k8s:pod-label:app:web", "k8s:node-name:{{.Node}}"}
		}),
		want("broker", "spire-broker", func(s *ProviderSettings) {
			s.BrokerSocket, s.BrokerWorkloadAPI, s.BrokerOwnID = "tcp://127.0.0.1:8788", "/w", "spiffe://x/y"
		}),
		want("spire-workload", "spire-workload", func(s *ProviderSettings) { s.EndpointSocket = "/own" }),
		want("istio", "istio", func(s *ProviderSettings) {
			s.Headers, s.Token, s.CertSigner = []HeaderField{{Name: "x-a", Value: "b"}}, TokenSource{Token: "secret"}, ""
		}),
		want("istio-old", "istio", func(s *ProviderSettings) {
			s.Address, s.RootCert, s.AltHostname, s.Roots = "https://old:15012", RootCert{}, "istiod", "/roots.pem"
			s.SecretTTL, s.RequestTimeout = time.Hour, 2*time.Second
		}),
		want("here", "local", func(s *ProviderSettings) { s.LocalDir = "/ca" }),
	}
	if d := cmp.Diff(providers, c.CA.Providers); d != "" {
		t.Error(d)
	}
	if base.Address != "https://new:15012" || base.SecretTTL != 2*time.Hour || base.CertSigner != "signer" || base.Token.File != "/token" || base.SPIRETimeout != 7*time.Second {
		t.Errorf("the environment's settings have changed: %+v", base)
	}
	var routes []string
	for _, r := range c.CA.Routes {
		routes = append(routes, r.String())
	}
	if d := cmp.Diff([]string{"ns=payments:new", "td=old.example:istio-old", "*:istio"}, routes); d != "" {
		t.Error(d)
	}
	if shown, err := json.Marshal(c); err != nil || strings.Contains(string(shown), "secret\"") {
		t.Errorf("%v, the dump shows a token: %s", err, shown)
	}
}

// caErrors are files and what is said of them, each without the name of the file.
var caErrors = []struct {
	name, text string
	want       []string
}{
	{"empty", "", []string{": the file is empty"}},
	{"null", "null", []string{": the file is empty"}},
	{"no YAML", "providers: [", []string{": line 1: did not find expected node content"}},
	{"two documents", "providers: [{name: istio}]\n---\n{}", []string{"a second document"}},
	{"no mapping", "[]", []string{":1: got a list, want a mapping"}},
	{"no providers", "routes: []", []string{":1: providers: at least one provider must be listed"}},
	{"providers of nobody", "providers: []", []string{":1: providers: at least one provider must be listed"}},
	{"unknown key", "provider: []\nproviders: [{name: local}]", []string{":1: provider: unknown key: must be providers or routes"}},
	{"key twice", "providers: [{name: local}]\nproviders: []", []string{":2: providers: duplicate key"}},
	{"key of another kind", "1: x\nproviders: [{name: local}]", []string{":1: got a number as a key, want a string"}},
	{"providers of another kind", "providers: local", []string{":1: providers: got a string, want a list"}},
	{"provider of another kind", "providers: [local]", []string{":1: providers[0]: got a string, want a mapping"}},
	{"no name", "providers: [{type: local}]", []string{`:1: providers[0].name: "": must be 1 to 63 lower case letters`}},
	{"bad name", "providers: [{name: 'a:b', type: local}]", []string{`providers[0].name: "a:b": must be`}},
	{"name of another kind", "providers: [{name: 1, type: local}]", []string{"providers[0].name: got a number, want a string: quote it"}},
	{"unknown type", "providers:\n- name: vault", []string{`:2: providers[0].type: unknown provider "vault": must be one of istio, spire-delegated, spire-broker, spire-workload, local`}},
	{"name twice", "providers:\n- name: local\n- {name: local, dir: /x}", []string{`:3: providers[1]: name "local": the provider of line 2 has it`}},
	{"key of another type", "providers: [{name: local, address: x}]", []string{"providers[0].address: unknown key of a provider of type local: must be one of name, type, dir, secretTTL, requestTimeout"}},
	{"setting twice", "providers: [{name: local, dir: /x, dir: /y}]", []string{"providers[0].dir: duplicate key"}},
	{"everything at once", "providers:\n- name: istio\n  address: 'ftp://x'\n  secretTTL: 5x\n  rootCA: system\n  headers: [a]\n- name: spire-delegated\n  adminEndpointSocket: 5\n  selectors: a\n  reference: both\nroutes:\n- {namespace: a}\n", []string{
		`:3: providers[0].address: "ftp://x": invalid uri: scheme "ftp"`, `:4: providers[0].secretTTL: "5x": unknown unit "x"`,
		`:5: providers[0].rootCA: "system": must be the path of a file, SYSTEM, or PEM text`, ":6: providers[0].headers: got a list, want a mapping",
		":8: providers[1].adminEndpointSocket: got a number, want a string: quote it", ":9: providers[1].selectors: got a string, want a list",
		`:10: providers[1].reference: "both": must be one of selectors, pid`, ":12: routes[0]: missing key provider",
	}},
	{"credentials", "providers: [{name: istio, address: 'https://user:sesame@x'}]", []string{"providers[0].address: <redacted>: invalid uri: user information"}},
	{"secret header", "providers: [{name: istio, headers: {token: \"sesame\\x01\"}}]", []string{"providers[0].headers.token: <redacted>: failed to parse header value"}},
	{"alternative name", "providers: [{name: istio, altHostname: 'a b'}]", []string{`providers[0].altHostname: "a b": invalid alt hostname: "a b", want a DNS name or an IP address`}},
	{"header name", "providers: [{name: istio, headers: {'a b': x}}]", []string{"failed to parse header key"}},
	{"address empty", "providers:\n- {name: istio, address: ''}", []string{":2: providers[0]: address (CA_ADDRESS) is empty: the provider istio needs the address of a CA"}},
	{"selector", "providers: [{name: spire-delegated, selectors: ['k8s:x', 'web']}]", []string{`providers[0].selectors[1]: selector "web"`}},
	{"selector of another kind", "providers: [{name: spire-delegated, selectors: [1]}]", []string{"providers[0].selectors[0]: got a number, want a string"}},
	{"roots missing", "providers: [{name: istio, roots: /missing.pem}]", []string{"providers[0].roots: open /missing.pem"}},
	{"roots without certificates", "providers: [{name: istio, roots: /empty.pem}]", []string{`providers[0].roots: "/empty.pem": must be a file of certificates in PEM, and has none`}},
	{"roots with a key", "providers: [{name: istio, roots: /key.pem}]", []string{`providers[0].roots: "/key.pem": PEM block 1 is no certificate`}},
	{"broker without socket", "providers: [{name: spire-broker, workloadAPISocket: /w}]", []string{"providers[0]: socket (SPIFFE_BROKER_SOCKET) is not set"}},
	{"broker by PID over the network", "providers: [{name: spire-broker, socket: 'tcp://a:1', workloadAPISocket: /w, attestation: pid}]", []string{
		"providers[0]: socket (SPIFFE_BROKER_SOCKET) is on the network", "providers[0]: attestation (SPIFFE_BROKER_ATTESTATION)=pid needs PROXY_WORKLOAD_PID",
	}},
	{"workload without socket", "providers: [{name: spire-workload}]", []string{"providers[0]: endpointSocket (SPIFFE_ENDPOINT_SOCKET) is not set"}},
	{"PID without a process", "providers: [{name: spire-delegated, reference: pid}]", []string{"providers[0]: reference (SPIRE_REFERENCE)=pid needs PROXY_WORKLOAD_PID"}},
	{"alias", "providers: [&a {name: local}, *a]", []string{"providers[1]: got an alias, which is not supported here"}},
	{"alias of itself", "providers: &a [*a]", []string{"providers[0]: got an alias"}},
	{"merge key", "providers: [{name: local, <<: {dir: /x}}]", []string{"providers[0]: got something else (!!merge) as a key"}},
	{"duration of another kind", "providers: [{name: local, secretTTL: 1.5}]", []string{"providers[0].secretTTL: got a number, want a string"}},
	{"duration as a list", "providers: [{name: local, secretTTL: [1]}]", []string{"providers[0].secretTTL: got a list, want a string"}},
	{"nothing", "providers: [{name: local, dir: }]", []string{"providers[0].dir: got nothing, want a string"}},
	{"routes of another kind", "providers: [{name: local}]\nroutes: {}", []string{":2: routes: got a mapping, want a list"}},
	{"route with another key", "providers: [{name: local}]\nroutes:\n- {ns: a, provider: local}", []string{":3: routes[0].ns: unknown key: must be namespace, trustDomain or provider"}},
	{"route with both", "providers: [{name: local}]\nroutes: [{namespace: a, trustDomain: b, provider: local}]", []string{"a rule has one of them or neither"}},
	{"route with a bad namespace", "providers: [{name: local}]\nroutes: [{namespace: a*, provider: local}]", []string{`routes[0]: namespace "a*": must be of letters`}},
	{"route with an empty namespace", "providers: [{name: local}]\nroutes: [{namespace: '', provider: local}]", []string{"routes[0].namespace: must not be empty"}},
	{"route with a bad trust domain", "providers: [{name: local}]\nroutes: [{trustDomain: 'A', provider: local}]", []string{`routes[0]: trust domain "A"`}},
	{"route to nobody", "providers: [{name: local}]\nroutes:\n- {namespace: a, provider: locl}", []string{`:3: routes[0]: unknown provider "locl": must be one of those that are listed: local`}},
	{"route twice", "providers: [{name: local}]\nroutes:\n- {provider: local}\n- {provider: local}", []string{":4: routes[1]: duplicate: *:local stands there before"}},
	{"route that is never reached", "providers: [{name: local}, {name: istio}]\nroutes:\n- {namespace: a, provider: local}\n- {namespace: a, provider: istio}", []string{":4: routes[1]: ns=a:istio can never be reached: ns=a:local stands before it"}},
}

func TestCAFileErrors(t *testing.T) {
	for _, tt := range caErrors {
		t.Run(tt.name, func(t *testing.T) {
			_, problems := parsed(t, with("-CA_PROVIDER", "CA_CONFIG=/ca.yaml", "POD_UID=u"), map[string]string{
				"/ca.yaml": tt.text, "/empty.pem": "nothing", "/key.pem": "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
			})
			var lines []string
			for _, p := range problems {
				lines = append(lines, p.Error())
			}
			all := strings.Join(lines, "\n")
			if len(problems) != len(tt.want) || strings.Contains(all, "sesame") {
				t.Errorf("got %d problems, want %d:\n%s", len(problems), len(tt.want), all)
			}
			for _, want := range tt.want {
				if !strings.Contains(all, want) || !strings.HasPrefix(all, "/ca.yaml:") {
					t.Errorf("got\n%s\nwant %q", all, want)
				}
			}
		})
	}
}

// TestCAFileContradictions: nothing but the default may stand beside the file.
func TestCAFileContradictions(t *testing.T) {
	m := map[string]string{"/ca.yaml": "providers: [{name: local}]"}
	for env, want := range map[string]string{
		"-CA_PROVIDER":                         "",
		"CA_PROVIDER=istio":                    "",
		"CA_PROVIDER=local":                    "CA_PROVIDER=local contradicts CA_CONFIG=/ca.yaml",
		"CA_PROVIDER=istio,local":              "CA_PROVIDER=istio,local contradicts CA_CONFIG=/ca.yaml",
		"-CA_PROVIDER;CA_ROUTES=*:local":       "CA_ROUTES=*:local contradicts CA_CONFIG=/ca.yaml",
		"-CA_PROVIDER;CA_ROUTES=":              "",
		"-CA_PROVIDER;FAKE_CA=true":            "FAKE_CA=true contradicts CA_CONFIG=/ca.yaml",
		"-CA_PROVIDER;USE_SPIRE=true":          "USE_SPIRE=true contradicts CA_CONFIG=/ca.yaml",
		"-CA_PROVIDER;SPIRE_ENABLED=false":     "",
		"-CA_PROVIDER;CA_CONFIG=/missing.yaml": "invalid env var CA_CONFIG=/missing.yaml (open /missing.yaml",
	} {
		e := strings.Split(env, ";")
		if !strings.Contains(env, "CA_CONFIG") {
			e = append(e, "CA_CONFIG=/ca.yaml")
		}
		_, problems := parsed(t, with(e...), m)
		err := errors.Join(problems...)
		if want == "" && err != nil || want != "" && (len(problems) != 1 || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: got %v, want %q", env, err, want)
		}
	}
}

// FuzzCAFile (F14): no file brings the parser down, and what it accepts is whole.
func FuzzCAFile(f *testing.F) {
	for _, tt := range caErrors {
		f.Add(tt.text)
	}
	base, _, err := Load(valid, files(nil))
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, text string) {
		file, err := parseCAFile(base, []byte(text), files(nil))
		if err != nil {
			return
		}
		if len(file.entries) == 0 {
			t.Fatal("accepted without a provider")
		}
		for _, e := range file.entries {
			if e.Name == "" || len(keysOf(e.Type)) == 0 {
				t.Fatalf("accepted: %+v", e)
			}
		}
	})
}

func TestCAValidate(t *testing.T) {
	m := map[string]string{"/ca.yaml": `providers:
- name: spire
  type: spire-delegated
  adminEndpointSocket: /run/spire/admin.sock
  selectors: ["k8s:pod-label:app:web", "k8s:node-name:{{.Node}}"]
- name: istio
  headers: {x-a: b, x-token: sesame}
  authToken: sesame
- name: old
  type: istio
  address: https://old:15012
- name: local
routes:
- {trustDomain: old.example, provider: old}
- {namespace: payments, provider: istio}
`}
	env := []string{"CA_ADDRESS=new:15012", "CA_HEADER_X=y", "CA_HEADER_TOKEN=sesame", "AUTH_TOKEN=sesame", "SPIRE_TIMEOUT=5s", "KUBERNETES_SERVICE_HOST=1.2.3.4", "CA_CONFIG=/other.yaml"}
	for _, tt := range []struct{ golden, args string }{{"ca_validate", "ca validate /ca.yaml"}, {"ca_validate_json", "ca validate /ca.yaml -o json"}} {
		code, stdout, stderr := command(t, env, m, strings.Fields(tt.args)...)
		if code != exitOK || stderr != "" || strings.Contains(stdout, "sesame") {
			t.Errorf("%s: exit code %d, stderr %q, stdout %s", tt.args, code, stderr, stdout)
		}
		golden(t, tt.golden, stdout)
	}
	for _, tt := range []struct {
		name, text, args string
		env              []string
		want             []string
	}{
		{"file", "providers: [{name: vault}, {name: local, dir: 1}]", "ca validate /ca.yaml", nil, []string{`/ca.yaml:1: providers[0].type: unknown provider "vault"`, "/ca.yaml:1: providers[1].dir: got a number"}},
		{"missing", "", "ca validate /missing.yaml", nil, []string{"CA_CONFIG=/missing.yaml (open /missing.yaml"}},
		{"environment", "providers: [{name: local}]", "ca validate /ca.yaml", []string{"CA_PROVIDER=local"}, []string{"CA_PROVIDER=local contradicts CA_CONFIG=/ca.yaml"}},
		{"provider that cannot be made", "providers: [{name: istio, address: 'https://x/path'}]", "ca validate /ca.yaml", nil, []string{"/ca.yaml: certificate provider istio: istio CA: field Address"}},
		{"no argument", "", "ca validate", nil, []string{"got 0 arguments, want the file"}},
		{"unknown command", "", "ca check", nil, []string{"unknown command: ca check"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			code, stdout, stderr := command(t, tt.env, map[string]string{"/ca.yaml": tt.text}, strings.Fields(tt.args)...)
			if code != exitUsage || stdout != "" {
				t.Errorf("exit code %d, stdout %q, want 2 and nothing", code, stdout)
			}
			for _, want := range tt.want {
				if !strings.Contains(stderr, want) {
					t.Errorf("stderr %q, want %q in it", stderr, want)
				}
			}
		})
	}
}
