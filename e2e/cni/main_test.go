//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"github.com/ztunnel-go/ztunnel/proxy/inpod/zdspb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// What is wrong with a command line is said, and is exit code 2.
func TestUsage(t *testing.T) {
	for _, tc := range []struct {
		args string
		want string // part of what is said
	}{
		{"", "usage: cni COMMAND"},
		{"fly", `unknown command "fly"`},
		{"rules", `"": want print, apply or remove`},
		{"rules fly", `"fly": want print, apply or remove`},
		{"rules print -set calico", `rule set "calico": want istio or cilium`},
		{"rules print -set cilium -dns", "rule set cilium has no DNS"},
		{"rules print more", "1 arguments: want 0"},
		{"rules apply", "apply needs -netns"},
		{"add -pod default/web", "-netns is missing"},
		{"add -pod web -netns x", `-pod "web": want namespace/name`},
		{"del", `-pod "": want namespace/name`},
		{"serve -what", "flag provided but not defined: -what"},
	} {
		t.Run(tc.args, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			err := run(t.Context(), strings.Fields(tc.args), &stdout, &stderr)
			if !errors.Is(err, errUsage) || !strings.Contains(stderr.String(), tc.want) {
				t.Errorf("got %v and %q, want %q", err, stderr.String(), tc.want)
			}
		})
	}
	var stdout, stderr bytes.Buffer
	if err := run(t.Context(), []string{"rules", "print", "-set", "cilium", "-ipv6"}, &stdout, &stderr); err != nil || !strings.Contains(stdout.String(), "! -d ::1/128") {
		t.Errorf("rules print: %v, %q", err, stdout.String())
	}
}

// startServer runs "cni serve" until the test ends, and returns its socket and
// what gives it orders.
func startServer(t *testing.T) (socket string, order func(line string) error) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "zds.sock")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	served := make(chan error, 1)
	go func() {
		served <- run(ctx, []string{"serve", "-socket", socket}, io.Discard, io.Discard)
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return socket, func(line string) error {
		return run(ctx, strings.Fields(line+" -socket "+socket), io.Discard, io.Discard)
	}
}

// A server takes orders, and a proxy hears of them.
func TestServeAddDel(t *testing.T) {
	dir := t.TempDir()
	socket, order := startServer(t)
	// The server is another goroutine: ask until it is there.
	for deadline := time.Now().Add(10 * time.Second); ; {
		err := order("add -set none -pod demo/first/web -netns " + dir)
		if err != nil && strings.Contains(err.Error(), "no proxy is connected") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the server does not answer: %v", err)
		}
	}
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	proxy := newFakeProxy(t, c)
	if got := proxy.answer(""); got.GetAdd().GetUid() != "demo.first" || got.GetAdd().GetWorkloadInfo().GetServiceAccount() != "web" {
		t.Errorf("the snapshot begins with %v", got)
	}
	if got := proxy.answer(""); got.GetSnapshotSent() == nil {
		t.Errorf("the snapshot ends with %v", got)
	}
	for _, tc := range []struct {
		order, answer, want string
	}{
		{"add -set none -pod demo/web -uid u1 -netns " + dir, "", "u1"},
		{"add -set none -pod demo/web -uid u2 -netns " + dir, "no room", "u2"},
		{"del -pod demo/first", "", "demo.first"},
	} {
		done := make(chan error, 1)
		go func() { done <- order(tc.order) }()
		got := proxy.answer(tc.answer)
		if uid := got.GetAdd().GetUid() + got.GetDel().GetUid(); uid != tc.want {
			t.Errorf("%s: the proxy hears %v", tc.order, got)
		}
		err := <-done
		if tc.answer == "" && err != nil || tc.answer != "" && (err == nil || !strings.Contains(err.Error(), tc.answer)) {
			t.Errorf("%s: got %v, want %q", tc.order, err, tc.answer)
		}
	}
	if err := order("add -set none -pod demo/web -netns " + filepath.Join(dir, "none")); err == nil || !strings.Contains(err.Error(), "open network namespace") {
		t.Errorf("a namespace that is not there: got %v", err)
	}
}

func TestSend_NoServer(t *testing.T) {
	err := send(t.Context(), filepath.Join(t.TempDir(), "none"), order{Op: "add"})
	if err == nil || !strings.Contains(err.Error(), `is "cni serve" running?`) {
		t.Errorf("got %v", err)
	}
}

// All that is missing is said at once.
func TestCheckMachine(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	_, err := checkMachine(filepath.Join(t.TempDir(), "ztunnel"))
	if err == nil {
		t.Fatal("got no error")
	}
	for _, want := range []string{"curl is not installed", "nsenter is not installed", `run "make build" first`} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("got %q, want %q in it", err, want)
		}
	}
	if os.Geteuid() != 0 && !strings.Contains(err.Error(), "needs root") {
		t.Errorf("got %q, want a word about root", err)
	}
}

type fakeProxy struct {
	t *testing.T
	c *net.UnixConn
}

func newFakeProxy(t *testing.T, c *net.UnixConn) *fakeProxy {
	t.Helper()
	p := &fakeProxy{t, c}
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	p.send(&zdspb.ZdsHello{Version: zdspb.Version_V1})
	return p
}

func (p *fakeProxy) send(m proto.Message) {
	p.t.Helper()
	b, err := proto.Marshal(m)
	if err == nil {
		_, err = p.c.Write(b)
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

// answer takes a request and answers it.
func (p *fakeProxy) answer(text string) *zdspb.WorkloadRequest {
	p.t.Helper()
	buf := make([]byte, 1024)
	n, err := p.c.Read(buf) // descriptors are dropped by the kernel
	if err != nil {
		p.t.Fatal(err)
	}
	var req zdspb.WorkloadRequest
	if err := proto.Unmarshal(buf[:n], &req); err != nil {
		p.t.Fatal(err)
	}
	p.send(&zdspb.WorkloadResponse{Payload: &zdspb.WorkloadResponse_Ack{Ack: &zdspb.Ack{Error: text}}})
	return &req
}
