package admin

import (
	"bytes"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztunnel-go/ztunnel/internal/zlog"
)

func TestID_4_7_Readiness(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		log, err := zlog.New(zlog.Config{Out: &out, Sync: true})
		if err != nil {
			t.Fatal(err)
		}
		r := NewReady(log.Logger())
		s := NewReadiness(r, 0, nil)
		expect := func(method, target string, status int, want string) {
			t.Helper()
			resp := do(s, method, target)
			if got := body(t, resp); got != want || resp.StatusCode != status {
				t.Errorf("%s %s: got %d %q, want %d %q", method, target, resp.StatusCode, got, status, want)
			}
		}
		state, proxy := r.Register("state manager"), r.Register("proxy")
		again := r.Register("proxy")
		expect("GET", "/healthz/ready", 500, "not ready, pending: proxy, state manager\n")
		<-time.After(1500 * time.Millisecond)
		proxy()
		again()
		expect("GET", "/healthz/ready", 500, "not ready, pending: state manager\n")
		state()
		expect("GET", "/healthz/ready", 200, "ready\n")
		expect("POST", "/healthz/ready", 405, "")
		expect("HEAD", "/healthz/ready", 405, "")
		expect("GET", "/healthz", 404, "")
		expect("GET", "/", 404, "")
		r.Register("draining")
		expect("GET", "/healthz/ready", 500, "not ready, pending: draining\n")

		want := []string{
			"Task 'proxy' complete (1.5s), still awaiting 1 tasks",
			"Task 'state manager' complete (1.5s), marking server ready",
		}
		lines := strings.Split(strings.TrimSpace(out.String()), "\n")
		if len(lines) != len(want) {
			t.Fatalf("got %q, want %d lines", lines, len(want))
		}
		for i := range want {
			if !strings.Contains(lines[i], "\tinfo\treadiness\t"+want[i]) {
				t.Errorf("got line %q, want %q", lines[i], want[i])
			}
		}
	})
}

// A pending task may say why; the first line stays what probes know, and a task
// that is complete says nothing.
func TestReadiness_Reasons(t *testing.T) {
	r := NewReady(nil)
	s := NewReadiness(r, 0, nil)
	expect := func(status int, want string) {
		t.Helper()
		resp := do(s, "GET", "/healthz/ready")
		if got := body(t, resp); got != want || resp.StatusCode != status {
			t.Errorf("got %d %q, want %d %q", resp.StatusCode, got, status, want)
		}
	}
	why := "connection refused"
	state, proxy := r.Register("state manager"), r.Register("proxy")
	r.Explain("state manager", func() string { return why })
	expect(500, "not ready, pending: proxy, state manager\nstate manager: connection refused\n")
	why = ""
	expect(500, "not ready, pending: proxy, state manager\n")
	why = "never asked for"
	state()
	expect(500, "not ready, pending: proxy\n")
	proxy()
	expect(200, "ready\n")
}
