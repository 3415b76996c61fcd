package main

import (
	"bytes"
	"crypto/ed25519"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// testCert mints a certificate that is the same in each run.
func testCert(t *testing.T, serial int64, from, to time.Time) certInfo {
	t.Helper()
	key := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{byte(serial)}, ed25519.SeedSize))
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "x"}, NotBefore: from, NotAfter: to}
	der, err := x509.CreateCertificate(nil, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return certInfo{
		PEM: base64.StdEncoding.EncodeToString(text), SerialNumber: tmpl.SerialNumber.String(),
		ValidFrom: from.UTC().Format(time.RFC3339), ExpirationTime: to.UTC().Format(time.RFC3339),
	}
}

// testEntries are the certificates of a node, as the reference has them: an
// ordinary one, one whose root expired, one that expires soon, two pods of one
// identity, one that is awaited, and one that is refused.
func testEntries(t *testing.T, now time.Time) []certEntry {
	t.Helper()
	h := func(n int) time.Time { return now.Add(time.Duration(n) * time.Hour) }
	root := testCert(t, 255, h(-48), h(9000))
	entry := func(id, state string, root []certInfo, chain ...certInfo) certEntry {
		return certEntry{Identity: "spiffe://" + id, State: state, CertChain: append([]certInfo{}, chain...), RootCerts: append([]certInfo{}, root...)}
	}
	roots := []certInfo{root}
	return []certEntry{
		entry("cluster.local/ns/default/sa/echo", "Available", roots, testCert(t, 0xd1d2ea0c5b5a2d, h(-1), h(23)), testCert(t, 7, h(-1), h(100))),
		entry("cluster.local/ns/default/sa/old-root", "Available", []certInfo{testCert(t, 254, h(-48), now.Add(-time.Second))}, testCert(t, 3, h(-1), h(23))),
		entry("cluster.local/ns/default/sa/soon", "Available", roots, testCert(t, 2, h(-23), now.Add(time.Hour))),
		entry("prod.example/ns/shop/sa/web", "Available", roots, testCert(t, 4, h(-1), h(5))),
		entry("prod.example/ns/shop/sa/web", "Available", roots, testCert(t, 5, h(-1), h(6))),
		entry("prod.example/ns/shop/sa/new", "Initializing", nil),
		entry("prod.example/ns/shop/sa/old", "Unavailable: signing gRPC error (\x1b[2JPermission denied): no identity issued", nil),
	}
}

// testDumps are the dump of ours and one of the reference, which has no facts.
func testDumps(t *testing.T, now time.Time) map[string]string {
	t.Helper()
	entries := testEntries(t, now)
	next := now.Add(11 * time.Hour)
	facts := []ourCertificate{
		{Provider: "istio", Pods: []string{"default/echo-1", "default/echo-2", "default/echo-3", "default/echo-4", "default/echo-5"}, Leases: 5, NextRenewal: &next},
		{Provider: "istio", Pods: []string{}, NextRenewal: &next},
		{Provider: "istio", Pods: []string{"default/soon-1"}, Leases: 1, NextRenewal: &next, LastError: "CA unavailable",
			Moves: []ourMove{{Provider: "spire-delegated", Leases: 1, Since: now, LastError: "no identity issued"}}},
		{Provider: "spire-delegated", UID: "a", Pods: []string{"shop/web-1"}, Leases: 1},
		{Provider: "spire-delegated", UID: "b", Pods: []string{"shop/web-2"}, Leases: 1, LastError: "the agent is away"},
		{Provider: "spire-delegated", UID: "c", Pods: []string{"shop/new-1"}, Leases: 1, Arriving: 1},
		{Provider: "spire-delegated", UID: "d", Pods: []string{"shop/old-1"}, Leases: 1, LastError: "no identity issued"},
	}
	for i, e := range entries {
		facts[i].Identity, facts[i].TrustDomain = e.Identity, e.trustDomain()
		facts[i].State, _, _ = strings.Cut(e.State, ":")
	}
	dump := func(v map[string]any) string {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	legacy := entries[0] // the root was the last of the chain once
	legacy.CertChain, legacy.RootCerts = append(legacy.CertChain, legacy.RootCerts...), nil
	return map[string]string{
		"go.json":     dump(map[string]any{"workloads": []any{}, "certificates": entries, "ztunnelGo": map[string]any{"certificates": facts}}),
		"rust.json":   dump(map[string]any{"workloads": []any{}, "certificates": entries}),
		"legacy.json": dump(map[string]any{"certificates": map[string]any{"b": legacy, "a": entries[5]}}),
		"odd.json":    dump(map[string]any{"certificates": entries[3:4], "ztunnelGo": map[string]any{"certificates": facts}}),
		"empty.json":  `{"certificates": []}`,
	}
}

// script writes what a command line says in the form of a golden file.
func script(code int, stdout, stderr string, args ...string) string {
	return fmt.Sprintf("$ ztunnel %s\n%s-- stderr --\n%s-- exit code %d --\n", strings.Join(args, " "), stdout, stderr, code)
}

// TestCerts is every format and flag on saved dumps.
func TestCerts(t *testing.T) {
	tests := map[string]string{
		"short":                    "certs -f go.json",
		"short_rust":               "certs -f rust.json",
		"short_legacy":             "certs -f legacy.json",
		"short_empty":              "certs -f empty.json",
		"wide":                     "certs -f go.json -o wide",
		"wide_rust":                "certs -f rust.json -o wide",
		"wide_odd":                 "certs -f odd.json -o wide",
		"json":                     "certs -f go.json -o json default/soon spiffe://prod.example/ns/shop/sa/old",
		"yaml":                     "certs -f go.json -o yaml default/soon shop/new",
		"name":                     "certs -f go.json -o name",
		"pem":                      "certs -f go.json --pem default/echo",
		"pem_missing":              "certs -f go.json --pem shop/old",
		"pem_namespace":            "certs -f go.json --pem --workload-namespace shop",
		"identity":                 "certs -f go.json spiffe://prod.example/ns/shop/sa/web",
		"identity_unknown":         "certs -f go.json shop/web shop/nobody default/nobody",
		"namespace":                "certs -f go.json --workload-namespace shop",
		"namespace_unknown":        "certs -f go.json --workload-namespace sho",
		"expiring":                 "certs -f go.json --expiring 1h",
		"expiring_wide":            "certs -f go.json --expiring 5h -o wide --workload-namespace shop",
		"expiring_json":            "certs -f rust.json --expiring 1h -o json default/soon",
		"expiring_name":            "certs -f rust.json --expiring 1h -o name",
		"expiring_none":            "certs -f go.json --expiring 22h default/echo",
		"expiring_now":             "certs -f go.json --expiring 0 --workload-namespace default",
		"expiring_empty":           "certs -f empty.json --expiring 1h",
		"expiring_unknown":         "certs -f empty.json --expiring 1h default/echo",
		"usage_identity":           "certs -f go.json echo",
		"usage_expiring":           "certs -f go.json --expiring soon",
		"usage_format":             "certs -f go.json -o table",
		"usage_pem_and_output":     "certs -f go.json --pem -o json",
		"usage_watch_and_file":     "certs -f go.json --watch",
		"usage_watch_and_yaml":     "certs --watch -o yaml",
		"usage_watch_and_pem":      "certs --watch --pem",
		"usage_file_and_admin":     "certs -f go.json --admin localhost:1",
		"unreadable_file":          "certs -f missing.json",
		"unreadable_verify":        "certs verify missing.pem",
		"usage_verify":             "certs verify",
		"usage_verify_td":          "certs verify leaf.pem --trust-domain td.test",
		"usage_verify_validation":  "certs verify leaf.pem --validation lax",
		"usage_verify_two_streams": "certs verify - --bundle -",
	}
	for name, args := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { // the time of a bubble is the same in each run
				words := strings.Fields(args)
				code, stdout, stderr := command(t, nil, testDumps(t, time.Now()), words...)
				if strings.Contains(stdout+stderr, "\x1b") {
					t.Errorf("a control character of the dump reached the terminal: %q %q", stdout, stderr)
				}
				golden(t, "certs/"+name, script(code, stdout, stderr, words...))
			})
		})
	}
}

// TestCertsAliases: the names that istioctl has.
func TestCertsAliases(t *testing.T) {
	for _, name := range []string{"certs", "cert", "certificate", "certificates"} {
		code, stdout, stderr := command(t, nil, testDumps(t, time.Now()), name, "--file", "rust.json")
		if code != 0 || stderr != "" || !strings.HasPrefix(stdout, "CERTIFICATE NAME ") {
			t.Errorf("%s: got exit code %d, %q", name, code, stderr)
		}
	}
}

func TestCertsFromStdin(t *testing.T) {
	var out, errs bytes.Buffer
	a := &app{stdin: strings.NewReader(testDumps(t, time.Now())["go.json"]), stdout: &out, stderr: &errs, readFile: os.ReadFile}
	if code := a.run(t.Context(), []string{"certs", "-f", "-"}); code != 0 || strings.Count(out.String(), "\n") != 14 {
		t.Errorf("got exit code %d, %q, %q", code, errs.String(), out.String())
	}
}

// TestCertsJSONIsTheDump: what -o json writes of a dump of the reference is what
// istioctl reads of it.
func TestCertsJSONIsTheDump(t *testing.T) {
	m := testDumps(t, time.Now())
	code, stdout, _ := command(t, nil, m, "certs", "-f", "rust.json", "-o", "json")
	var got, want struct{ Certificates []istioCert }
	if err := json.Unmarshal([]byte(`{"certificates":`+stdout+`}`), &got); code != 0 || err != nil {
		t.Fatalf("got exit code %d, %v", code, err)
	}
	if err := json.Unmarshal([]byte(m["rust.json"]), &want); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// TestCertsColour: only a terminal gets colours, and only where NO_COLOR is not
// set.
func TestCertsColour(t *testing.T) {
	now := time.Now()
	rows := certRows(testEntries(t, now))
	for _, tt := range []struct {
		color       bool
		red, yellow int
	}{{false, 0, 0}, {true, 2, 1}} {
		var b bytes.Buffer
		c := certsCommand{output: "short", color: tt.color}
		if err := c.write(&b, rows, now); err != nil {
			t.Fatal(err)
		}
		if red, yellow := strings.Count(b.String(), "\x1b[31m"), strings.Count(b.String(), "\x1b[33m"); red != tt.red || yellow != tt.yellow {
			t.Errorf("colour %t: got %d red and %d yellow lines, want %d and %d", tt.color, red, yellow, tt.red, tt.yellow)
		}
	}
	for env, want := range map[string]bool{"NO_COLOR=1": true, "NO_COLOR=": false, "NO_COLORS=1": false} {
		if got := (&app{environ: []string{"A=b", env}}).noColor(); got != want {
			t.Errorf("%s: got %t, want %t", env, got, want)
		}
	}
}

func TestCertsFromAdmin(t *testing.T) {
	dump := testDumps(t, time.Now())["go.json"]
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/config_dump" {
			http.NotFound(w, r)
			return
		}
		_, _ = io.WriteString(w, dump)
	}))
	defer srv.Close()
	code, stdout, stderr := command(t, nil, nil, "certs", "--admin", srv.Listener.Addr().String())
	if code != 0 || stderr != "" || strings.Count(stdout, "\n") != 14 {
		t.Errorf("got exit code %d, %q, %q", code, stderr, stdout)
	}
}

// TestD26_CertsFromSocket: without --admin the socket of this PID namespace is
// asked before localhost.
func TestD26_CertsFromSocket(t *testing.T) {
	dump := testDumps(t, time.Now())["go.json"]
	name := fmt.Sprintf("@ztunnel-certs-test-%d", os.Getpid())
	ln, err := net.Listen("unix", name)
	if err != nil {
		t.Skipf("abstract unix sockets: %v", err)
	}
	srv := &httptest.Server{Listener: ln, Config: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, dump)
	})}}
	srv.Start()
	defer srv.Close()
	var out, errs bytes.Buffer
	a := &app{stdout: &out, stderr: &errs, readFile: os.ReadFile, adminSocket: func() (string, error) { return name, nil }}
	if code := a.run(t.Context(), []string{"certs"}); code != 0 || strings.Count(out.String(), "\n") != 14 {
		t.Errorf("got exit code %d, %q, %q", code, errs.String(), out.String())
	}
}

func TestCertsErrorsExit1(t *testing.T) {
	m := map[string]string{"/text": "hello", "/empty": "{}", "/odd": `{"certificates": {"a": 1}}`}
	failing := httptest.NewServer(http.NotFoundHandler())
	defer failing.Close()
	for args, want := range map[string]string{
		"-f /missing": "/missing",
		"-f /text":    "/text is no configuration dump: ",
		"-f /empty":   "/empty is no configuration dump: it has no certificates",
		"-f /odd":     "certificates of /odd: ",
		"--admin " + failing.Listener.Addr().String(): "status 404",
	} {
		code, stdout, stderr := command(t, nil, m, append([]string{"certs"}, strings.Fields(args)...)...)
		if code != exitRuntime || stdout != "" || !strings.Contains(stderr, want) {
			t.Errorf("certs %s: got exit code %d, stdout %q, stderr %q; want 1, nothing, %q", args, code, stdout, stderr, want)
		}
	}
}
