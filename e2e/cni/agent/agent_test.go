//go:build linux

package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/ztunnel-go/ztunnel/proxy/inpod/zdspb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// start runs an agent until the test ends.
func start(t *testing.T, cfg Config) *Agent {
	t.Helper()
	cfg.Path = filepath.Join(t.TempDir(), "zds.sock")
	a, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("agent: %v", err)
		}
	})
	return a
}

// proxy is the other end, made by hand.
type proxy struct {
	t *testing.T
	u *net.UnixConn
}

func connect(t *testing.T, a *Agent) *proxy {
	t.Helper()
	u, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: a.cfg.Path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = u.Close() })
	p := &proxy{t, u}
	if err := u.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	p.send(&zdspb.ZdsHello{Version: zdspb.Version_V1})
	return p
}

func (p *proxy) send(m proto.Message) {
	p.t.Helper()
	b, err := proto.Marshal(m)
	if err == nil {
		_, err = p.u.Write(b)
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

// receive tells a request as one word and a UID, and closes its descriptor.
func (p *proxy) receive() (string, error) {
	buf, oob := make([]byte, 2048), make([]byte, 256)
	n, oobn, _, _, err := p.u.ReadMsgUnix(buf, oob)
	if err != nil {
		return "", err
	}
	var req zdspb.WorkloadRequest
	if err := proto.Unmarshal(buf[:n], &req); err != nil {
		return "", err
	}
	fds := 0
	scms, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return "", err
	}
	for _, scm := range scms {
		rights, err := unix.ParseUnixRights(&scm)
		if err != nil {
			return "", err
		}
		for _, fd := range rights {
			fds++
			_ = unix.Close(fd)
		}
	}
	switch r := req.GetPayload().(type) {
	case *zdspb.WorkloadRequest_Add:
		return fmt.Sprintf("add %s %s fds=%d", r.Add.GetUid(), r.Add.GetWorkloadInfo().GetName(), fds), nil
	case *zdspb.WorkloadRequest_Keep:
		return fmt.Sprintf("keep %s fds=%d", r.Keep.GetUid(), fds), nil
	case *zdspb.WorkloadRequest_Del:
		return fmt.Sprintf("del %s fds=%d", r.Del.GetUid(), fds), nil
	}
	return fmt.Sprintf("snapshot sent fds=%d", fds), nil
}

// serve answers what comes, one request for each error text, and returns it.
func (p *proxy) serve(answers ...string) []string {
	p.t.Helper()
	var got []string
	for _, text := range answers {
		req, err := p.receive()
		if err != nil {
			p.t.Fatalf("after %v: %v", got, err)
		}
		got = append(got, req)
		p.send(&zdspb.WorkloadResponse{Payload: &zdspb.WorkloadResponse_Ack{Ack: &zdspb.Ack{Error: text}}})
	}
	return got
}

func pod(t *testing.T, uid string) Pod {
	t.Helper()
	f, err := os.Open(t.TempDir()) // what the descriptor leads to is the same to an agent
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return Pod{UID: uid, Name: "name-" + uid, Namespace: "default", ServiceAccount: "sa", NetNS: f}
}

// add adds in the background and returns where the result comes.
func add(t *testing.T, a *Agent, p Pod) chan error {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- a.Add(t.Context(), p) }()
	return done
}

func expect(t *testing.T, got []string, want ...string) {
	t.Helper()
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("requests (-want +got):\n%s", d)
	}
}

func await(t *testing.T, a *Agent, ok func(Status) bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := a.Wait(ctx, ok); err != nil {
		t.Fatal(err)
	}
}

func TestIstio_SnapshotAndChanges(t *testing.T) {
	a := start(t, Config{})
	kept := pod(t, "kept")
	kept.NetNS = nil
	a.Put(kept)
	if err := a.Add(t.Context(), pod(t, "a")); !errors.Is(err, ErrNoProxy) {
		t.Errorf("add without a proxy: got %v, want %v", err, ErrNoProxy)
	}
	p := connect(t, a)
	expect(t, p.serve("", "busy", ""), "keep kept fds=0", "add a name-a fds=1", "snapshot sent fds=0")
	await(t, a, func(s Status) bool { return s.Snapshots == 1 })

	done := add(t, a, pod(t, "b"))
	expect(t, p.serve(""), "add b name-b fds=1")
	if err := <-done; err != nil {
		t.Errorf("add: %v", err)
	}
	done = add(t, a, pod(t, "c"))
	p.serve("no room")
	var refused *RefusedError
	if err := <-done; !errors.As(err, &refused) || refused.Text != "no room" {
		t.Errorf("add that is refused: got %v", err)
	}

	// A second proxy hears of new pods, both of deletions.
	q := connect(t, a)
	q.serve("", "", "", "", "")
	await(t, a, func(s Status) bool { return s.Snapshots == 2 })
	done = add(t, a, pod(t, "d"))
	expect(t, q.serve(""), "add d name-d fds=1")
	if err := <-done; err != nil {
		t.Errorf("add: %v", err)
	}
	deleted := make(chan error, 1)
	go func() { deleted <- a.Delete(t.Context(), "d") }()
	expect(t, p.serve(""), "del d fds=0")
	expect(t, q.serve(""), "del d fds=0")
	if err := <-deleted; err != nil {
		t.Errorf("delete: %v", err)
	}
	s := a.Status()
	if d := cmp.Diff([]string{"busy", "no room"}, s.Refusals); d != "" || len(s.Violations) > 0 {
		t.Errorf("refusals (-want +got):\n%s\nviolations: %q", d, s.Violations)
	}
}

// A message that is not answered in time fails, the connection stays, and the
// late answer passes for that of the next message, as at the real one.
func TestIstio_Deadline(t *testing.T) {
	a := start(t, Config{Deadline: 50 * time.Millisecond})
	p := connect(t, a)
	p.serve("")
	if err := a.Add(t.Context(), pod(t, "a")); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("add that is not answered: got %v, want %v", err, os.ErrDeadlineExceeded)
	}
	if s := a.Status(); s.Connected != 1 || len(s.Violations) != 1 || !strings.HasPrefix(s.Violations[0], "no answer within 50ms") {
		t.Errorf("status %+v, want one connection and one violation", s)
	}
	p.serve("late")
	done := add(t, a, pod(t, "b"))
	var refused *RefusedError
	if err := <-done; !errors.As(err, &refused) || refused.Text != "late" {
		t.Errorf("the next add: got %v, want the late answer", err)
	}
}

func TestIstio_Unsolicited(t *testing.T) {
	a := start(t, Config{Idle: 10 * time.Millisecond})
	p := connect(t, a)
	p.serve("")
	p.send(&zdspb.WorkloadResponse{Payload: &zdspb.WorkloadResponse_Ack{Ack: &zdspb.Ack{}}})
	await(t, a, func(s Status) bool { return s.Connected == 0 })
	if s := a.Status(); len(s.Violations) != 1 || s.Violations[0] != "a message that nobody asked for" {
		t.Errorf("violations %q", s.Violations)
	}
}

func TestViolations(t *testing.T) {
	for _, tc := range []struct {
		name string
		say  func(*proxy)
		want string
	}{
		{"hello of another version", func(p *proxy) { p.send(&zdspb.ZdsHello{Version: 7}); p.serve("") }, "hello of version 7, want V1"},
		{"too long", func(p *proxy) {
			p.send(&zdspb.ZdsHello{Version: zdspb.Version_V1})
			p.serve(strings.Repeat("x", 1024))
		}, "a message of more than 1024 bytes, or with descriptors"},
		{"no ack", func(p *proxy) {
			p.send(&zdspb.ZdsHello{Version: zdspb.Version_V1})
			_, _ = p.receive()
			p.send(&zdspb.ZdsHello{Version: 5}) // field 1, but a number
		}, "an answer without ack to "},
		{"no protobuf", func(p *proxy) {
			if _, err := p.u.Write([]byte{0xff}); err != nil {
				p.t.Fatal(err)
			}
		}, "a message that is no protobuf: "},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a := start(t, Config{})
			u, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: a.cfg.Path, Net: "unixpacket"})
			if err != nil {
				t.Fatal(err)
			}
			defer u.Close()
			if err := u.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
				t.Fatal(err)
			}
			tc.say(&proxy{t, u})
			await(t, a, func(s Status) bool { return len(s.Violations) > 0 })
			if got := a.Status().Violations; !strings.HasPrefix(got[0], tc.want) {
				t.Errorf("violations %q, want %q", got, tc.want)
			}
		})
	}
}

func TestCilium(t *testing.T) {
	a := start(t, Config{Personality: Cilium})
	first := add(t, a, pod(t, "a")) // waits for a proxy
	p := connect(t, a)
	expect(t, p.serve("", ""), "snapshot sent fds=0", "add a name-a fds=1")
	if err := <-first; err != nil {
		t.Errorf("add: %v", err)
	}

	// A new connection ends the old one.
	q := connect(t, a)
	if req, err := p.receive(); err == nil {
		t.Errorf("the old connection gets %q, want its end", req)
	}
	expect(t, q.serve("", ""), "add a name-a fds=1", "snapshot sent fds=0")
	await(t, a, func(s Status) bool { return s.Snapshots == 2 && s.Connected == 1 })

	// A refusal ends the connection, and the pod is not remembered.
	done := add(t, a, pod(t, "b"))
	q.serve("no room")
	var refused *RefusedError
	if err := <-done; !errors.As(err, &refused) {
		t.Errorf("add that is refused: got %v", err)
	}
	if req, err := q.receive(); err == nil {
		t.Errorf("after a refusal: got %q, want the end", req)
	}
	r := connect(t, a)
	expect(t, r.serve("", ""), "add a name-a fds=1", "snapshot sent fds=0")

	// A pod without a namespace aborts the snapshot.
	gone := pod(t, "gone")
	gone.NetNS = nil
	a.Put(gone)
	s := connect(t, a)
	expect(t, s.serve(""), "add a name-a fds=1")
	if req, err := s.receive(); err == nil {
		t.Errorf("a pod without namespace: got %q, want the end", req)
	}
}

func TestNew_Errors(t *testing.T) {
	if _, err := New(Config{Path: filepath.Join(t.TempDir(), "s"), Personality: "calico"}); err == nil || !strings.Contains(err.Error(), `personality "calico": want istio or cilium`) {
		t.Errorf("unknown personality: got %v", err)
	}
	if _, err := New(Config{Path: filepath.Join(t.TempDir(), "no", "such", "directory")}); err == nil {
		t.Error("a socket in no directory: got no error")
	}
}
