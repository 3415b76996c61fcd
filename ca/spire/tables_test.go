package spire

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/ca/catest/spireagent"
)

func TestParseSocket(t *testing.T) {
	long := "/" + strings.Repeat("a", maxSocketPath)
	for _, tt := range []struct {
		in, network, address string
		tcp                  bool
		want                 string // of the error
	}{
		{in: "unix:///run/spire/admin.sock", network: "unix", address: "/run/spire/admin.sock"},
		{in: "/run/spire/admin.sock", network: "unix", address: "/run/spire/admin.sock"},
		{in: long[:maxSocketPath], network: "unix", address: long[:maxSocketPath]},
		{in: "tcp://host:8443", tcp: true, network: "tcp", address: "host:8443"},
		{in: "tcp://[::1]:8443", tcp: true, network: "tcp", address: "[::1]:8443"},
		{in: "", want: "is not set: want unix:///path or /path"},
		{in: "run/admin.sock", want: "the path is not absolute"},
		{in: "unix://run/admin.sock", want: "the path is not absolute"},
		{in: "unix://", want: "the path is not absolute"},
		{in: "unix:///a?b", want: "a query or a fragment"},
		{in: "unix:///a#b", want: "a query or a fragment"},
		{in: long, want: "has 108 bytes, at most 107"},
		{in: "tcp://host:1", want: "unknown scheme: want unix:///path or /path"},
		{in: "http://host", want: "unknown scheme"},
		{in: "tcp://host", tcp: true, want: "no host and port: want unix:///path, /path or tcp://host:port"},
		{in: "tcp://:1", tcp: true, want: "no host and port"},
		{in: "tcp://host:", tcp: true, want: "no host and port"},
	} {
		var schemes []string
		if tt.tcp {
			schemes = []string{"tcp"}
		}
		network, address, err := parseSocket(tt.in, schemes...)
		switch {
		case tt.want == "" && (err != nil || network != tt.network || address != tt.address):
			t.Errorf("%q: got %s %s, %v", tt.in, network, address, err)
		case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want) || tt.in != "" && !strings.Contains(err.Error(), tt.in)):
			t.Errorf("%q: got error %v, want one with %q and the value", tt.in, err, tt.want)
		}
	}
}

// TestSelectors is the table of what a workload is to the agent.
func TestSelectors(t *testing.T) {
	noUID := web
	noUID.UID = ""
	noName := web
	noName.Pod = ""
	odd := web
	odd.ID = catest.ID("spiffe://cluster.local/somebody")
	for _, tt := range []struct {
		name      string
		w         ca.WorkloadRef
		templates []string
		node      string
		want      string
		err       string
	}{
		{name: "pod", w: web, want: "k8s:ns:shop k8s:sa:web k8s:pod-uid:uid-1 k8s:pod-name:web-1"},
		{name: "without UID", w: noUID, want: "k8s:ns:shop k8s:sa:web"},
		{name: "without name", w: noName, want: "k8s:ns:shop k8s:sa:web k8s:pod-uid:uid-1"},
		{
			name: "templates", w: web, node: "node-1",
			templates: []string{
				"k8s:node-name:{{.Node}}", "istio:td:{{.TrustDomain}}", "x:{{.Namespace}}/{{.ServiceAccount}}/{{.PodName}}/{{.PodUID}}",
				"unix:path:/usr/bin/x", `k8s:pod-label:app:{{printf "%.3s" .ServiceAccount}}`,
			},
			want: "k8s:ns:shop k8s:sa:web k8s:pod-uid:uid-1 k8s:pod-name:web-1 k8s:node-name:node-1 istio:td:cluster.local x:shop/web/web-1/uid-1 unix:path:/usr/bin/x k8s:pod-label:app:web",
		},
		{
			name: "templates of what is not known are left out", w: noUID,
			templates: []string{"k8s:pod-label:uid:{{.PodUID}}", "k8s:x:{{.PodName}}", "k8s:node-name:{{.Node}}", "k8s:y:{{.Namespace}}"},
			want:      "k8s:ns:shop k8s:sa:web k8s:y:shop",
		},
		{name: "no Istio identity", w: odd, err: "does not name a namespace and a service account"},
	} {
		templates, err := parseSelectors(tt.templates)
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		got, err := templates.selectorsOf(tt.w, tt.node)
		switch {
		case tt.err == "" && (err != nil || selectorsText(got) != tt.want):
			t.Errorf("%s: got %s, %v\nwant %s", tt.name, selectorsText(got), err, tt.want)
		case tt.err != "" && (!errors.Is(err, ca.ErrConfig) || !strings.Contains(err.Error(), tt.err)):
			t.Errorf("%s: got %v, want ErrConfig with %q", tt.name, err, tt.err)
		}
	}
}

func TestParseSelectorsErrors(t *testing.T) {
	for _, text := range []string{
		"k8s", "k8s:", ":x", "", "{{.Namespace}}", "k8s:{{.Pod}}", "k8s:{{.Namespace", "k8s:{{template \"x\"}}", "k8s:{{if false}}x{{end}}",
	} {
		err := ParseSelectors([]string{"k8s:ns:good", text})
		if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("selector %q", text)) {
			t.Errorf("%q: got %v, want an error that names it", text, err)
		}
		if _, err := NewDelegated(DelegatedConfig{Common: Common{Socket: "/s"}, Selectors: []string{text}}); err == nil {
			t.Errorf("%q: the constructor accepts it", text)
		}
	}
}

// TestConfig: what cannot work is an error of the constructor.
func TestConfig(t *testing.T) {
	if _, err := NewDelegated(DelegatedConfig{Common: Common{Socket: "admin.sock"}}); err == nil || !strings.Contains(err.Error(), `spire-delegated: socket "admin.sock"`) {
		t.Errorf("got %v", err)
	}
	p, err := NewDelegated(DelegatedConfig{Common: Common{Name: "mine", Socket: "/s"}})
	if err != nil {
		t.Fatal(err)
	}
	if key := p.Key(web); p.Name() != "mine" || key != (ca.Key{Provider: "mine", ID: web.ID, UID: "uid-1"}) {
		t.Errorf("got name %s, key %v", p.Name(), key)
	}
}

// TestConfiguredWrongly: a workload that cannot be named is told so, and asks the
// agent nothing.
func TestConfiguredWrongly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, DelegatedConfig{}, webEntry)
		odd := web
		odd.ID = catest.ID("spiffe://cluster.local/somebody")
		e := watch(t, w.provider, odd)
		pass(time.Hour)
		if ev := e.want(t, ca.Unavailable, "spiffe://cluster.local/somebody"); !errors.Is(ev.Err, ca.ErrConfig) {
			t.Errorf("%v is no ErrConfig", ev.Err)
		}
		byPID := watch(t, newRunning(t, DelegatedConfig{ByPID: true, Common: Common{Dial: w.agent.Dial}}), web)
		pass(time.Hour)
		if ev := byPID.want(t, ca.Unavailable, "names no process"); !errors.Is(ev.Err, ca.ErrConfig) {
			t.Errorf("%v is no ErrConfig", ev.Err)
		}
	})
}

// TestExplain: every error has its class, and says what to do.
func TestExplain(t *testing.T) {
	dial := func(err error) error {
		return &net.OpError{Op: "dial", Net: "unix", Addr: &net.UnixAddr{Name: "/s", Net: "unix"}, Err: os.NewSyscallError("connect", err)}
	}
	for _, tt := range []struct {
		err, dialErr error
		want         string
		is           error
	}{
		{err: status.Error(codes.PermissionDenied, "no identity issued"), want: "the delegate needs one, whatever the workloads have", is: ca.ErrDenied},
		{err: status.Error(codes.PermissionDenied, "caller not configured as an authorized delegate"), want: "add the proxy's SPIFFE ID to authorized_delegates", is: ca.ErrDenied},
		{err: status.Error(codes.PermissionDenied, "other"), want: "does not accept this proxy as a delegate (PermissionDenied: other)", is: ca.ErrDenied},
		{err: status.Error(codes.Unimplemented, "unknown service"), want: "must name admin_socket_path, not socket_path", is: ca.ErrConfig},
		{err: status.Error(codes.InvalidArgument, "must provide either selectors or non-zero PID, but not both"), want: "refuses the reference", is: ca.ErrConfig},
		{err: status.Error(codes.Unavailable, "workload attestation failed: x"), want: "could not attest this proxy"},
		{err: status.Error(codes.Unavailable, "EOF"), want: "lost the agent: EOF"},
		{err: status.Error(codes.Internal, "could not serialize response"), want: "the agent answered Internal: could not serialize response"},
		{err: io.EOF, want: "the agent ended the stream"},
		{err: status.Error(codes.Unavailable, "x"), dialErr: dial(syscall.ENOENT), want: "the agent does not run, or the directory of the socket is not mounted", is: fs.ErrNotExist},
		{err: status.Error(codes.Unavailable, "x"), dialErr: dial(syscall.EACCES), want: "give the proxy the group of the socket", is: fs.ErrPermission},
		{err: status.Error(codes.Unavailable, "x"), dialErr: dial(syscall.ECONNREFUSED), want: "/s: connect: connection refused: the agent does not run", is: syscall.ECONNREFUSED},
		{err: status.Error(codes.Unavailable, "x"), dialErr: fmt.Errorf("%w: %w", dial(syscall.ECONNREFUSED), errNotSocket), want: "mount the directory", is: errNotSocket},
		{err: status.Error(codes.Internal, "x"), dialErr: dial(syscall.ENOENT), want: "the agent answered Internal: x"},
		{err: errEnded, want: "it has ended", is: errGone},
	} {
		got := explain(tt.err, tt.dialErr, delegatedAdvice)
		if !strings.Contains(got.Error(), tt.want) || tt.is != nil && !errors.Is(got, tt.is) {
			t.Errorf("%v: got %q, want %q, and %v", tt.err, got, tt.want, tt.is)
		}
		if tt.is == nil && (errors.Is(got, ca.ErrDenied) || errors.Is(got, ca.ErrConfig)) {
			t.Errorf("%v: got %q, which is not to be retried soon", tt.err, got)
		}
	}
	if explain(nil, nil, delegatedAdvice) != nil {
		t.Error("no error became one")
	}
}

// TestComplaints: the trouble that all workloads have is one line in a minute.
func TestComplaints(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out strings.Builder
		log := slog.New(slog.NewTextHandler(&out, nil))
		var c complaints
		for range 3 * 60 {
			for range 10 {
				c.log(t.Context(), log, errors.New("trouble"))
				c.log(t.Context(), log, errEnded)
			}
			pass(time.Second)
		}
		c.log(t.Context(), log, errors.New("other trouble"))
		if got := strings.Count(out.String(), "error=trouble"); got != 3 {
			t.Errorf("%d lines in 3 min", got)
		}
		if !strings.Contains(out.String(), `error="other trouble"`) || strings.Contains(out.String(), "ended") {
			t.Errorf("logged %s", out.String())
		}
		if len(c.logged) != 1 {
			t.Errorf("%d troubles are remembered", len(c.logged))
		}
	})
}

// TestManyComplaints: an agent that has another trouble with each message does not
// fill the log, and what comes after it is heard again.
func TestManyComplaints(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out strings.Builder
		cfg := DelegatedConfig{Common: Common{Logger: slog.New(slog.NewTextHandler(&out, nil))}}
		w := newWorld(t, cfg, webEntry)
		n := 0
		w.agent.SetTamper(spireagent.Tamper{SVIDs: func(m *svids) {
			n++
			m.FederatesWith = []string{fmt.Sprintf("NO TRUST DOMAIN %d", n)}
		}})
		watch(t, w.provider, web)
		const messages = 1000
		for range messages {
			w.agent.Repeat()
			pass(time.Millisecond)
		}
		if n < messages {
			t.Fatalf("the agent sent %d messages", n)
		}
		if got := strings.Count(out.String(), "\n"); got != maxComplaints+1 || !strings.Contains(out.String(), "ztunnel certs") {
			t.Errorf("%d lines within a second, want %d and one that there are more", got, maxComplaints)
		}
		pass(2 * time.Minute)
		w.agent.Cut(status.Error(codes.Internal, "something else"))
		pass(0)
		if !strings.Contains(out.String(), "something else") {
			t.Error("another trouble, two minutes later, is not logged")
		}
	})
}

// TestTooLarge: the limit is ours, and no rate, whatever the code is.
func TestTooLarge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, DelegatedConfig{}, webEntry)
		w.agent.SetTamper(spireagent.Tamper{SVIDs: func(m *svids) { m.X509Svids[0].X509SvidKey = make([]byte, maxMessage) }})
		e := watch(t, w.provider, web)
		pass(time.Minute)
		if ev := e.want(t, ca.Unavailable, "larger than this proxy takes"); !errors.Is(ev.Err, ca.ErrConfig) {
			t.Errorf("%v is no ErrConfig", ev.Err)
		}
		if got := w.agent.Opened(spireagent.SubscribeToX509SVIDs); got > 15 {
			t.Errorf("the message was asked for %d times", got)
		}
	})
}

// TestRefusalIsLogged: a workload for which SPIRE has nothing is a line that says
// what is missing, once, and many of them do not hide what else is wrong.
func TestRefusalIsLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out strings.Builder
		other := webEntry
		other.ID += "-other"
		other.Selectors = []string{"k8s:pod-uid:uid-0"}
		w := newWorld(t, DelegatedConfig{Common: Common{Logger: slog.New(slog.NewTextHandler(&out, nil))}}, other)
		for i := range 2 * maxComplaints {
			ref, _ := numbered(i)
			watch(t, w.provider, ref)
			pass(time.Millisecond)
		}
		pass(time.Hour)
		for want, n := range map[string]int{
			"SPIRE grants the workload no identity": maxComplaints, "more troubles": 1,
			"level=WARN msg=\"SPIRE grants the workload no identity\" component=ca provider=spire-delegated identity=" + webText + " error=\"did not find expected SAN":                                                                                     1,
			"level=INFO msg=\"SPIRE grants the workload no identity\" component=ca provider=spire-delegated identity=" + webText + " error=\"the certificate provider denied the identity: no SPIRE entry for this agent matches the selectors k8s:ns:shop": maxComplaints - 1,
		} {
			if got := strings.Count(out.String(), want); got != n {
				t.Errorf("%d lines with %q, want %d", got, want, n)
			}
		}
		w.agent.SetDelegate(spireagent.WithoutEntry)
		pass(0)
		if !strings.Contains(out.String(), "the delegate needs one") {
			t.Error("another trouble is not logged")
		}
		if t.Failed() {
			t.Log(out.String())
		}
	})
}
