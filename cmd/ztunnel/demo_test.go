package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
)

// The demo is the product's first impression: it must pass, and say so.
func TestDemo(t *testing.T) {
	var out, errs bytes.Buffer
	if err := runDemo(t.Context(), &out, &errs, true, false); err != nil {
		t.Fatalf("%v\n%s%s", err, &out, &errs)
	}
	var report map[string]any
	if err := json.Unmarshal(out.Bytes(), &report); err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]any{
		"passed": true, "protocol": "HBONE", "sourceIdentity": demoClientID, "destinationIdentity": demoServerID,
		"denied": map[string]any{"policy": demoPolicy, "ok": true}, "rotation": map[string]any{"ok": true},
		"requests": report["ok"],
	} {
		if fmt.Sprint(report[key]) != fmt.Sprint(want) {
			t.Errorf("%s = %v, want %v", key, report[key], want)
		}
	}
}

// interruptAt calls interrupt when text has been written.
type interruptAt struct {
	syncBuffer
	text      string
	interrupt func()
}

func (w *interruptAt) Write(p []byte) (int, error) {
	n, err := w.syncBuffer.Write(p)
	if strings.Contains(w.String(), w.text) {
		w.interrupt()
	}
	return n, err
}

// SIGINT ends a demo that stays up: both nodes drain, and the exit code is that
// of an interrupted command.
func TestDemoKeep(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	var out bytes.Buffer
	errs := &interruptAt{text: "stays up", interrupt: func() { cancel(errInterrupted) }}
	a := &app{stdout: &out, stderr: errs}
	if got := a.run(ctx, []string{"demo", "--keep", "-o", "json"}); got != exitInterrupt {
		t.Errorf("exit code = %d, want %d", got, exitInterrupt)
	}
	if !strings.Contains(out.String(), `"passed":true`) {
		t.Errorf("report: %s", &out)
	}
	if got := errs.String(); strings.Count(got, "\n") != 1 {
		t.Errorf("stderr = %q, want the one line that it stays up", got)
	}
}
