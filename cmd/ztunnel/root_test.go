package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"

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
		{"configuration", "proxy ztunnel", "invalid env var PROXY_MODE=sidecar"},
		{"configuration, no command", "", "invalid env var PROXY_MODE=sidecar"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			code, stdout, stderr := command(t, []string{"PROXY_MODE=sidecar"}, nil, strings.Fields(tt.args)...)
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
	want := Setting{Group: "Sockets", Name: "KEEPALIVE_TIME", Type: "duration", Value: "1m", Origin: "env KEEPALIVE_TIME"}
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
