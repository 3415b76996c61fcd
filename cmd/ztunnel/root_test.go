package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got); d != "" {
		t.Errorf("%s (-update to accept):\n%s", path, d)
	}
}

// command runs one command line against the files of m.
func command(t *testing.T, env []string, m map[string]string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	a := &app{stdout: &out, stderr: &errs, environ: env, readFile: files(m)}
	code = a.run(t.Context(), args)
	return code, out.String(), errs.String()
}

func TestUsageErrorsExit2(t *testing.T) {
	tests := []struct {
		name, args, want string
	}{
		{"unknown command", "bogus", "unknown command: bogus"},
		{"unknown flag", "--bogus", "unknown flag: --bogus"},
		{"unknown flag of a command", "certs --bogus", "unknown flag: --bogus"},
		{"bad format", "config -o yaml", "must be one of table, json, markdown"},
		{"argument too many", "version 1", `unknown command "1" for "ztunnel version"`},
		{"exclusive flags", "certs --admin x:1 -f y", "--admin and --file exclude each other"},
		{"configuration", "proxy ztunnel", "invalid env var PROXY_MODE=shared"},
		{"configuration, no command", "", "invalid env var PROXY_MODE=shared"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			code, stdout, stderr := command(t, nil, nil, strings.Fields(tt.args)...)
			if code != exitUsage || stdout != "" || !strings.Contains(stderr, tt.want) {
				t.Errorf("got exit code %d, stdout %q, stderr %q; want 2, nothing, %q", code, stdout, stderr, tt.want)
			}
		})
	}
}

func TestExitCodes(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want int
	}{
		{nil, 0},
		{io.EOF, 1},
		{fmt.Errorf("x: %w", usageError{io.EOF}), 2},
		{&ConfigError{}, 2},
		{conditionError{errors.New("expires soon")}, 3},
		{fmt.Errorf("x: %w", errInterrupted), 130},
	} {
		if got := exitCode(tt.err); got != tt.want {
			t.Errorf("exitCode(%v): got %d, want %d", tt.err, got, tt.want)
		}
	}
}

func TestHelpAndCompletion(t *testing.T) {
	for _, args := range [][]string{{"help"}, {"--help"}, {"help", "certs"}, {"completion", "bash"}, {"completion", "zsh"}} {
		code, stdout, stderr := command(t, nil, nil, args...)
		if code != 0 || stdout == "" || stderr != "" {
			t.Errorf("%v: got exit code %d, %d bytes on stdout, stderr %q", args, code, len(stdout), stderr)
		}
	}
}

// TestDrainOnSignal: the first signal ends the context with its cause, the
// second one the process.
func TestDrainOnSignal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		signals := make(chan os.Signal, 2)
		var exited int
		ctx, stop := drainOnSignal(t.Context(), signals, func(code int) { exited = code })
		synctest.Wait()
		if ctx.Err() != nil {
			t.Fatal("the context ended without a signal")
		}
		signals <- syscall.SIGTERM
		synctest.Wait()
		if !errors.Is(context.Cause(ctx), errInterrupted) || exited != 0 {
			t.Fatalf("after the first: got cause %v, exit code %d", context.Cause(ctx), exited)
		}
		signals <- os.Interrupt
		synctest.Wait()
		if exited != exitInterrupt {
			t.Errorf("after the second: got exit code %d, want 130", exited)
		}
		stop()
	})
}

// TestInterruptedCommand: a command that only asks is interrupted with 130.
func TestInterruptedCommand(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		cancel(errInterrupted)
		<-r.Context().Done()
	}))
	defer srv.Close()
	a := &app{stdout: io.Discard, stderr: io.Discard, readFile: os.ReadFile}
	if got := a.run(ctx, []string{"certs", "--admin", srv.Listener.Addr().String()}); got != exitInterrupt {
		t.Errorf("got exit code %d, want 130", got)
	}
}

func TestVersion(t *testing.T) {
	code, stdout, _ := command(t, nil, nil, "version")
	for _, want := range []string{"version.BuildInfo{Version:\"", "GitRevision:\"", `RustVersion:"go1.`, "BuildProfile:\"", "BuildStatus:\"", "IstioVersion:\"", `CryptoProvider:"go-`} {
		if code != 0 || !strings.Contains(stdout, want) {
			t.Errorf("got exit code %d, %q; want %q in it", code, stdout, want)
		}
	}
	_, stdout, _ = command(t, nil, nil, "version", "-o", "json")
	var got BuildInfo
	if err := json.Unmarshal([]byte(stdout), &got); err != nil || got != buildInfo() {
		t.Errorf("got %q (%v), want %+v", stdout, err, buildInfo())
	}
}

func TestConfigCommand(t *testing.T) {
	env := with("KEEPALIVE_TIME=1m", "AUTH_TOKEN=sesame", "LOG_FORMAT=odd")
	code, table, notes := command(t, env, nil, "config")
	if code != 0 || !strings.Contains(table, "KEEPALIVE_TIME") || strings.Contains(table, "sesame") || !strings.Contains(notes, "warning: LOG_FORMAT: ") {
		t.Errorf("got exit code %d, notes %q and:\n%s", code, notes, table)
	}
	code, stdout, _ := command(t, env, nil, "config", "-o", "json")
	var settings []Setting
	if err := json.Unmarshal([]byte(stdout), &settings); err != nil || code != 0 {
		t.Fatalf("got exit code %d, %v", code, err)
	}
	want := Setting{Group: "Sockets", Name: "KEEPALIVE_TIME", Type: "duration", Value: "1m", Origin: "env KEEPALIVE_TIME", Since: "yes"}
	found := false
	for _, s := range settings {
		found = found || s == want
	}
	if !found {
		t.Errorf("no %+v in %s", want, stdout)
	}
	code, stdout, stderr := command(t, []string{"ENABLE_PROXY=2"}, nil, "config")
	if code != exitUsage || !strings.Contains(stdout, "ENABLE_PROXY") || !strings.Contains(stderr, "invalid env var ENABLE_PROXY=2") {
		t.Errorf("invalid: got exit code %d, stderr %q; want the table, and 2", code, stderr)
	}
}

// testCert mints a certificate that is valid between the two times.
func testCert(t *testing.T, serial int64, from, to time.Time) certInfo {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "x"}, NotBefore: from, NotAfter: to}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return certInfo{PEM: base64.StdEncoding.EncodeToString(text), SerialNumber: tmpl.SerialNumber.String(), ValidFrom: from, ExpirationTime: to}
}

func testDump(t *testing.T, now time.Time) string {
	t.Helper()
	b, err := json.Marshal(map[string]any{"workloads": []any{}, "certificates": []certEntry{
		{Identity: "spiffe://cluster.local/ns/default/sa/echo", State: "Available",
			CertChain: []certInfo{testCert(t, 0xd1d2ea0c5b5a2d, now.Add(-time.Hour), now.Add(23*time.Hour)), testCert(t, 7, now.Add(-time.Hour), now.Add(time.Hour))},
			RootCerts: []certInfo{testCert(t, 255, now.Add(-48*time.Hour), now.Add(-time.Second))}},
		{Identity: "spiffe://cluster.local/ns/default/sa/new", State: "Initializing", CertChain: []certInfo{}, RootCerts: []certInfo{}},
		{Identity: "spiffe://cluster.local/ns/default/sa/old", State: "Unavailable: connection refused", CertChain: []certInfo{}, RootCerts: []certInfo{}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestCertsTable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // the time of a bubble is the same in each run
		m := map[string]string{"/dump.json": testDump(t, time.Now())}
		code, stdout, stderr := command(t, nil, m, "certs", "-f", "/dump.json")
		if code != 0 || stderr != "" {
			t.Fatalf("got exit code %d, %q", code, stderr)
		}
		golden(t, "certs", stdout)
	})
}

func TestCertsJSON(t *testing.T) {
	m := map[string]string{"/dump.json": `{"certificates": [{"certChain": [], "identity": "spiffe://a/ns/b/sa/c", "rootCerts": [], "state": "Unavailable: a <b>"}]}`}
	for _, name := range []string{"certs", "cert", "certificate", "certificates"} {
		code, stdout, stderr := command(t, nil, m, name, "-o", "json", "--file", "/dump.json")
		if code != 0 || stderr != "" {
			t.Fatalf("%s: got exit code %d, %q", name, code, stderr)
		}
		golden(t, "certs_json", stdout)
	}
}

func TestCertsFromAdmin(t *testing.T) {
	dump := testDump(t, time.Now())
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/config_dump" {
			http.NotFound(w, r)
			return
		}
		_, _ = io.WriteString(w, dump)
	}))
	defer srv.Close()
	code, stdout, stderr := command(t, nil, nil, "certs", "--admin", srv.Listener.Addr().String())
	if code != 0 || stderr != "" || strings.Count(stdout, "\n") != 6 {
		t.Errorf("got exit code %d, %q, %q", code, stderr, stdout)
	}
}

// TestD26_CertsFromSocket: without --admin the socket of this PID namespace is
// asked before localhost.
func TestD26_CertsFromSocket(t *testing.T) {
	dump := testDump(t, time.Now())
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
	if code := a.run(t.Context(), []string{"certs"}); code != 0 || strings.Count(out.String(), "\n") != 6 {
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
