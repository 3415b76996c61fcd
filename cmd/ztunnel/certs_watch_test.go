package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// watchScript plays dumps to a watch, one for each look, and returns what it
// wrote. The last look interrupts it.
func watchScript(t *testing.T, c *certsCommand, terminal bool, looks ...any) (out, notes string) {
	t.Helper()
	var o, n bytes.Buffer
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	start, i := time.Now(), 0
	w := &certWatch{cmd: c, out: &o, notes: &n, terminal: terminal, read: func(context.Context) ([]certEntry, error) {
		i++
		if i > len(looks) {
			cancel(errInterrupted)
			return nil, context.Canceled
		}
		o.WriteString("-- look " + string(rune('0'+i)) + " --\n")
		if err, ok := looks[i-1].(error); ok {
			return nil, err
		}
		return looks[i-1].([]certEntry), nil
	}}
	if err := w.run(ctx); !errors.Is(err, errInterrupted) {
		t.Errorf("got %v, want %v", err, errInterrupted)
	}
	if got, want := time.Since(start), time.Duration(len(looks))*watchInterval; got != want {
		t.Errorf("%d looks took %v, want %v", len(looks), got, want)
	}
	return o.String(), n.String()
}

// TestCertsWatch: appended is what changes, redrawn is all.
func TestCertsWatch(t *testing.T) {
	for name, tt := range map[string]struct {
		output   outputFormat
		terminal bool
		color    bool
		within   time.Duration
	}{
		"watch_lines":          {output: "short"},
		"watch_lines_expiring": {output: "short", within: 2 * time.Hour},
		"watch_json":           {output: "json"},
		"watch_terminal":       {output: "short", terminal: true},
		"watch_terminal_wide":  {output: "wide", terminal: true, color: true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				now := time.Now()
				entries := testEntries(t, now)
				renewed := append([]certEntry{}, entries[2], entries[5])
				renewed[0].CertChain = []certInfo{testCert(t, 9, now, now.Add(24*time.Hour))}
				arrived := append([]certEntry{}, renewed...)
				arrived[1].State, arrived[1].CertChain, arrived[1].RootCerts = "Available", entries[3].CertChain, entries[3].RootCerts
				c := &certsCommand{output: tt.output, color: tt.color}
				if tt.within != 0 {
					c.expiring = &tt.within
				}
				away := errors.New("read the dump: connection refused")
				out, notes := watchScript(t, c, tt.terminal,
					[]certEntry{entries[2], entries[5]}, []certEntry{entries[2], entries[5]}, renewed, away, away, arrived, arrived[1:])
				if tt.output == "json" {
					for line := range strings.Lines(out) {
						if !strings.HasPrefix(line, "--") && !json.Valid([]byte(line)) {
							t.Errorf("no JSON: %s", line)
						}
					}
				}
				golden(t, "certs/"+name, out+"-- stderr --\n"+notes)
			})
		})
	}
}

// TestCertsWatchFails: where nothing answers at first, there is nothing to watch.
func TestCertsWatchFails(t *testing.T) {
	refused := errors.New("connection refused")
	w := &certWatch{cmd: &certsCommand{output: "short"}, read: func(context.Context) ([]certEntry, error) { return nil, refused }}
	if err := w.run(t.Context()); !errors.Is(err, refused) {
		t.Errorf("got %v, want %v", err, refused)
	}
}

// TestCertsWatchInterrupted: a signal ends the watch with 130.
func TestCertsWatchInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	dump := testDumps(t, time.Now())["go.json"]
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, dump)
		cancel(errInterrupted)
	}))
	defer srv.Close()
	a := &app{stdout: io.Discard, stderr: io.Discard, readFile: os.ReadFile}
	if got := a.run(ctx, []string{"certs", "--watch", "--admin", srv.Listener.Addr().String()}); got != exitInterrupt {
		t.Errorf("got exit code %d, want 130", got)
	}
}
