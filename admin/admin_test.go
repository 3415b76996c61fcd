package admin

import (
	"context"
	"errors"
	"flag"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/ztunnel-go/ztunnel/internal/zlog"
)

var update = flag.Bool("update", false, "rewrite the files in testdata")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", path, diff)
	}
}

// do answers one request as if it had come to 127.0.0.1:15000.
func do(h http.Handler, method, target string, header ...string) *http.Response {
	r := httptest.NewRequest(method, target, nil)
	r.Host = "localhost:15000"
	local := net.Addr(&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 15000})
	for i := 0; i < len(header); i += 2 {
		if header[i] == "Host" {
			r.Host = header[i+1]
			continue
		}
		r.Header.Add(header[i], header[i+1])
	}
	r = r.WithContext(context.WithValue(r.Context(), http.LocalAddrContextKey, local))
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Result()
}

func body(t *testing.T, resp *http.Response) string {
	t.Helper()
	var b strings.Builder
	if err := resp.Write(&b); err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(b.String(), "\r\n\r\n")
	return text
}

func newAdmin(t *testing.T, cfg Config) *Server {
	t.Helper()
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// AD-03, X-07: the exact answers of /logging.
func TestID_AD03_ChangeLogLevel(t *testing.T) {
	log, err := zlog.New(zlog.Config{Out: t.Output(), Sync: true})
	if err != nil {
		t.Fatal(err)
	}
	s := newAdmin(t, Config{Levels: log})
	const current = "current log level is hickory_server::server=off,"
	steps := []struct {
		method, target string
		status         int
		want           string
	}{
		{"POST", "/logging", 200, current + "info\n"},
		{"POST", "/logging?level=", 200, current + "info\n"},
		{"POST", "/logging?reset", 200, current + "info\n"},
		{"POST", "/logging?level=invalid_level", 400, "Invalid level provided: invalid_level\n" + loggingHelp},
		{"POST", "/logging?level=debug", 200, current + "debug\n"},
		{"POST", "/logging?level=access%3Ddebug,info&reset=1", 200, current + "access=debug,info\n"},
		{"POST", "/logging?level=warn&reset", 200, current + "warn\n"},
		{"POST", "/logging?level=error", 200, current + "error\n"},
		{"POST", "/logging?level=trace", 200, current + "trace\n"},
		{"POST", "/logging?level=info", 200, current + "info\n"},
		{"POST", "/logging?level=warn&level=off", 200, current + "off\n"},
		{"POST", "/logging?level=access:debug", 200, current + "access=debug,off\n"},
		{"POST", "/logging?level=INFO", 400, "Invalid level provided: INFO\n" + loggingHelp},
		{"POST", "/logging?level=ztunnel::proxy:debug", 200, "current log level is hickory_server::server=off,ztunnel::proxy=debug,access=debug,off\n"},
		{"POST", "/logging?level&reset", 200, current + "info\n"},
		{"GET", "/logging", 405, "Invalid HTTP method\n" + loggingHelp},
		{"PUT", "/logging?level=debug", 405, "Invalid HTTP method\n" + loggingHelp},
	}
	for _, st := range steps {
		resp := do(s, st.method, st.target)
		if got := body(t, resp); got != st.want || resp.StatusCode != st.status {
			t.Errorf("%s %s: got %d %q, want %d %q", st.method, st.target, resp.StatusCode, got, st.status, st.want)
		}
		if got, want := resp.Header.Get("Content-Type"), "text/plain; charset=utf-8"; got != want {
			t.Errorf("%s %s: got Content-Type %q, want %q", st.method, st.target, got, want)
		}
	}
	golden(t, "logging_help.golden", loggingHelp)
	if resp := do(newAdmin(t, Config{}), "POST", "/logging"); resp.StatusCode != 500 || !strings.HasPrefix(body(t, resp), "failed to get the log level: ") {
		t.Errorf("without levels: got status %d", resp.StatusCode)
	}
}

func TestID_4_2_Endpoints(t *testing.T) {
	quits := 0
	s := newAdmin(t, Config{
		Quit: func() { quits++ },
		Dump: func(context.Context) (map[string]any, error) {
			return map[string]any{"version": map[string]string{"version": "1"}}, nil
		},
		Pages: []Page{{"/xds", "state of <xDS>", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { text(w, 200, "xds\n") })}},
	})
	const plain = "text/plain; charset=utf-8"
	tests := []struct {
		method, target string
		status         int
		contentType    string
		want           string // "*" for anything but nothing
	}{
		{"GET", "/", 200, "text/html; charset=utf-8", "*"},
		{"GET", "/config_dump", 200, "application/json", "{\n  \"version\": {\n    \"version\": \"1\"\n  }\n}"},
		{"POST", "/config_dump", 200, "application/json", "*"},
		{"GET", "/quitquitquit", 405, "", ""},
		{"GET", "/debug/pprof/heap", 200, "application/octet-stream", "*"},
		{"GET", "/debug/pprof/heap?gc=1", 200, "application/octet-stream", "*"},
		{"GET", "/debug/pprof/heap?gc=2", 400, plain, "invalid gc value; expected 0-1\n"},
		{"GET", "/debug/pprof/goroutine", 200, "application/octet-stream", "*"},
		{"GET", "/debug/pprof/goroutine?debug=2", 200, plain, "*"},
		{"GET", "/debug/pprof/goroutine?debug=3", 400, plain, "invalid debug value; expected 0-2\n"},
		{"GET", "/debug/pprof/profile?seconds=0", 400, plain, "invalid seconds value; expected 1-300\n"},
		{"GET", "/debug/pprof/profile?seconds=301", 400, plain, "invalid seconds value; expected 1-300\n"},
		{"GET", "/debug/pprof/profile?seconds=x", 400, plain, "invalid seconds value; expected 1-300\n"},
		{"GET", "/debug/pprof/profile?frequency=1001", 400, plain, "invalid frequency value; expected 1-1000\n"},
		{"GET", "/debug/pprof/heap/profiling", 200, plain, "heap profiling active: true\n"},
		{"GET", "/debug/pprof/heap/profiling?activate=false", 200, plain, "heap profiling active: true\n"},
		{"GET", "/debug/pprof/heap/profiling?activate=maybe", 400, plain, "invalid activate value \"maybe\"; expected true or false\n"},
		{"GET", "/xds", 200, plain, "xds\n"},
		{"GET", "/drain", 404, "", ""},
		{"GET", "/stats", 404, "", ""},
		{"GET", "/certs", 404, "", ""},
		{"GET", "/ready", 404, "", ""},
		{"GET", "/config_dump/", 404, "", ""},
		{"GET", "/debug/pprof", 404, "", ""},
		{"POST", "/quitquitquit", 200, plain, "shutdown now\n"},
	}
	for _, tt := range tests {
		resp := do(s, tt.method, tt.target)
		got := body(t, resp)
		if resp.StatusCode != tt.status || resp.Header.Get("Content-Type") != tt.contentType {
			t.Errorf("%s %s: got %d %q, want %d %q", tt.method, tt.target, resp.StatusCode, resp.Header.Get("Content-Type"), tt.status, tt.contentType)
		}
		if tt.want == "*" && got == "" || tt.want != "*" && got != tt.want {
			t.Errorf("%s %s: got body %q, want %q", tt.method, tt.target, got, tt.want)
		}
	}
	if quits != 1 {
		t.Errorf("got %d shutdowns, want 1", quits)
	}
	golden(t, "dashboard.golden.html", body(t, do(s, "GET", "/")))
	if resp := do(newAdmin(t, Config{}), "POST", "/quitquitquit"); resp.StatusCode != http.StatusNotImplemented {
		t.Errorf("without Quit: got %d", resp.StatusCode)
	}
}

// Case 128 k: whatever this server has is safe from web pages (DNS rebinding).
func TestHostCheck(t *testing.T) {
	quits := 0
	s := newAdmin(t, Config{Quit: func() { quits++ }})
	tests := []struct {
		host string
		ok   bool
	}{
		{"localhost", true}, {"LocalHost:15000", true}, {"127.0.0.1:15000", true}, {"127.8.8.8", true}, {"[::1]:15000", true}, {"[::1]", true},
		{"", true}, {"[::ffff:127.0.0.1]:1", true}, {"localhost:34567", true}, {"ztunnel", true}, {"ztunnel:15000", true},
		{"evil.example", false}, {"evil.example:15000", false}, {"localhost.evil.example", false}, {"10.0.0.1:15000", false}, {"127.0.0.1.evil.example", false}, {"[::2]", false}, {"ztunnel.evil.example", false},
	}
	want := 0
	for _, tt := range tests {
		resp := do(s, "POST", "/quitquitquit", "Host", tt.host)
		if tt.ok {
			want++
		}
		if got := resp.StatusCode == 200; got != tt.ok || !tt.ok && resp.StatusCode != http.StatusForbidden {
			t.Errorf("host %q: got status %d, want it accepted: %t", tt.host, resp.StatusCode, tt.ok)
		}
		for _, method := range []string{"GET", "HEAD", "OPTIONS"} {
			for _, path := range []string{"/config_dump", "/debug/pprof/heap", "/nothing"} {
				if got := do(s, method, path, "Host", tt.host).StatusCode != http.StatusForbidden; got != tt.ok {
					t.Errorf("%s %s of host %q: accepted %t, want %t", method, path, tt.host, got, tt.ok)
				}
			}
		}
	}
	if quits != want {
		t.Errorf("got %d shutdowns, want %d", quits, want)
	}
	for name, local := range map[string]net.Addr{
		"10.0.0.1:15000": &net.TCPAddr{IP: net.IPv4(10, 0, 0, 1), Port: 15000},
		"any.example":    &net.UnixAddr{Name: "@ztunnel-admin-1", Net: "unix"},
	} {
		r := httptest.NewRequest("POST", "/quitquitquit", nil)
		r.Host = name
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), http.LocalAddrContextKey, local)))
		if w.Code != 200 {
			t.Errorf("host %q on %s: got %d, want 200", name, local, w.Code)
		}
	}
}

// A page of another site can send requests to a name of ours, and browsers say so.
func TestCrossOrigin(t *testing.T) {
	quits := 0
	s := newAdmin(t, Config{Quit: func() { quits++ }})
	tests := []struct {
		name, method, target string
		header               []string
		status               int
	}{
		{"curl", "POST", "/quitquitquit", nil, 200},
		{"own page", "POST", "/quitquitquit", []string{"Origin", "http://localhost:15000", "Sec-Fetch-Site", "same-origin"}, 200},
		{"typed by the user", "POST", "/quitquitquit", []string{"Sec-Fetch-Site", "none"}, 200},
		{"other site", "POST", "/quitquitquit", []string{"Origin", "https://evil.example", "Sec-Fetch-Site", "cross-site"}, 403},
		{"other port", "POST", "/quitquitquit", []string{"Origin", "http://localhost:8080", "Sec-Fetch-Site", "same-site"}, 403},
		{"older browser", "POST", "/quitquitquit", []string{"Origin", "https://evil.example"}, 403},
		{"opaque origin", "POST", "/logging", []string{"Origin", "null"}, 403},
		{"link from another site", "GET", "/config_dump", []string{"Sec-Fetch-Site", "cross-site"}, 200},
	}
	want := 0
	for _, tt := range tests {
		if got := do(s, tt.method, tt.target, tt.header...).StatusCode; got != tt.status {
			t.Errorf("%s: got %d, want %d", tt.name, got, tt.status)
		}
		if tt.method == "POST" && tt.status == 200 {
			want++
		}
	}
	if quits != want {
		t.Errorf("got %d shutdowns, want %d", quits, want)
	}
}

func TestDumpError(t *testing.T) {
	s := newAdmin(t, Config{Dump: func(context.Context) (map[string]any, error) { return nil, errors.New("no config") }})
	resp := do(s, "GET", "/config_dump")
	if got, want := body(t, resp), "dump: no config"; got != want || resp.StatusCode != 500 {
		t.Errorf("got %d %q, want 500 %q", resp.StatusCode, got, want)
	}
	s = newAdmin(t, Config{Dump: func(context.Context) (map[string]any, error) {
		return map[string]any{"config": make(chan int)}, nil
	}})
	if resp := do(s, "GET", "/config_dump"); resp.StatusCode != 500 {
		t.Errorf("a value without JSON: got %d, want 500", resp.StatusCode)
	}
	if got := body(t, do(newAdmin(t, Config{}), "GET", "/config_dump")); got != "{}" {
		t.Errorf("without Dump: got %q, want {}", got)
	}
}

func TestBadPages(t *testing.T) {
	h := http.NotFoundHandler()
	for _, p := range []Page{{"/logging", "taken", h}, {"xds", "relative", h}, {"", "empty", h}, {"/", "root", h}, {"/xds", "nothing", nil}} {
		if _, err := New(Config{Pages: []Page{p}}); err == nil {
			t.Errorf("page %q (%s): got no error", p.Path, p.Description)
		}
	}
}
