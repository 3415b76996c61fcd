package inpod

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/ztunnel-go/ztunnel/proxy/inpod/zdspb"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// listenAgent is the agent's socket.
func listenAgent(t testing.TB) *net.UnixListener {
	t.Helper()
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Net: "unixpacket", Name: filepath.Join(t.TempDir(), "z.sock")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return ln
}

// pair is one connection, seen from both sides.
func pair(t *testing.T) (ours *socket, agent *net.UnixConn) {
	t.Helper()
	ln := listenAgent(t)
	w := newWorld(t, func(cfg *Config) { cfg.Path = ln.Addr().String() })
	c, err := w.m.dialAgent(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if agent, err = ln.AcceptUnix(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = agent.Close() })
	return c.(*socket), agent
}

func rights(all []*os.File) []byte {
	if len(all) == 0 {
		return nil
	}
	var fds []int
	for _, f := range all {
		fds = append(fds, int(f.Fd()))
	}
	return unix.UnixRights(fds...)
}

// The rows IP-05 to IP-08 and the rules of spec §7.2, over a real socket.
func TestID_IP05_IP08_Decoding(t *testing.T) {
	add := mustMarshal(t, &zdspb.WorkloadRequest{Payload: &zdspb.WorkloadRequest_Add{Add: &zdspb.AddWorkload{Uid: "a"}}})
	long := addRequest("a")
	long.GetAdd().WorkloadInfo.Name = strings.Repeat("x", 1100)
	for _, tt := range []struct {
		name  string
		data  []byte
		files int
		want  string // the error, its beginning if it ends in …
	}{
		{"IP-05 add", add, 1, ""},
		{"IP-06 add with info", mustMarshal(t, addRequest("a")), 1, ""},
		{"IP-07 del with descriptor", mustMarshal(t, delRequest("a")), 1, "Unexpected control message"},
		{"IP-08 del", mustMarshal(t, delRequest("a")), 0, ""},
		{"keep", mustMarshal(t, keepRequest("a")), 0, ""},
		{"keep with descriptor", mustMarshal(t, keepRequest("a")), 1, "Unexpected control message"},
		{"snapshot sent", mustMarshal(t, sentRequest()), 0, ""},
		{"snapshot sent with descriptor", mustMarshal(t, sentRequest()), 1, "Unexpected control message"},
		{"add without descriptor", mustMarshal(t, addRequest("a")), 0, "No control message"},
		{"IP-24 two descriptors", mustMarshal(t, addRequest("a")), 2, "Expected 1 FD, got 2"},
		{"as many as there can be", mustMarshal(t, addRequest("a")), maxFiles, "Expected 1 FD, got 253"},
		{"two with a message that is too long", mustMarshal(t, long), 2, "Expected 1 FD, got 2"},
		{"too long", mustMarshal(t, long), 1, "received truncated message"},
		{"too long, and of no meaning", make([]byte, 1025), 0, "received truncated message"},
		{"of no meaning", []byte{0xff}, 1, "decode the message: …"},
		{"no payload", []byte{0x98, 0x06, 1}, 1, "no payload"},
		{"the longest", mustMarshal(t, longest(t)), 1, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ours, agent := pair(t)
			dir := t.TempDir()
			sent := tempFiles(t, dir, tt.files)
			_, _, err := agent.WriteMsgUnix(tt.data, rights(sent), nil)
			closeAll(sent)
			if err != nil {
				t.Fatal(err)
			}
			p, err := ours.receive()
			if err != nil {
				t.Fatal(err)
			}
			if len(p.files) != tt.files {
				t.Errorf("%d descriptors came, want %d", len(p.files), tt.files)
			}
			m, err := decode(p)
			if tt.want != "" {
				want, begins := strings.CutSuffix(tt.want, "…")
				if err == nil || err.Error() != want && (!begins || !strings.HasPrefix(err.Error(), want)) {
					t.Errorf("got %v, want %s", err, tt.want)
				}
				if open := openFiles(t, dir); len(open) > 0 {
					t.Errorf("descriptors that are still open: %v", open)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var want zdspb.WorkloadRequest
			if err := proto.Unmarshal(tt.data, &want); err != nil || !proto.Equal(&want, m.request) {
				t.Errorf("got %v, want %v", m.request, &want)
			}
			if (m.ns != nil) != (tt.files == 1) {
				t.Errorf("descriptor: got %v", m.ns)
			}
			if m.ns != nil {
				wantCloseOnExec(t, m.ns)
				_ = m.ns.Close()
			}
			if open := openFiles(t, dir); len(open) > 0 {
				t.Errorf("descriptors that are still open: %v", open)
			}
		})
	}
}

// longest is an Add of exactly maxPacket bytes.
func longest(t *testing.T) *zdspb.WorkloadRequest {
	r := addRequest("a")
	r.GetAdd().WorkloadInfo.Name = strings.Repeat("x", 900)
	r.GetAdd().WorkloadInfo.Namespace = strings.Repeat("y", maxPacket-proto.Size(r)+len("default"))
	if n := proto.Size(r); n != maxPacket {
		t.Fatalf("%d bytes, want %d", n, maxPacket)
	}
	return r
}

func wantCloseOnExec(t *testing.T, f *os.File) {
	t.Helper()
	raw, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	err = raw.Control(func(fd uintptr) {
		if flags, err := unix.FcntlInt(fd, unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("descriptor flags %x, %v: want close on exec", flags, err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A packet of no bytes is the end, and what came with it is closed.
func TestEmptyPacketIsTheEnd(t *testing.T) {
	ours, agent := pair(t)
	dir := t.TempDir()
	sent := tempFiles(t, dir, 1)
	sendEmpty(t, agent, rights(sent))
	closeAll(sent)
	m := newWorld(t).m
	if err := m.exchange(t.Context(), ours); !errors.Is(err, errClosed) {
		t.Errorf("got %v, want %v", err, errClosed)
	}
	if open := openFiles(t, dir); len(open) > 0 {
		t.Errorf("descriptors that are still open: %v", open)
	}
	_ = agent.Close()
	if p, err := ours.receive(); !errors.Is(err, io.EOF) || len(p.files) > 0 {
		t.Errorf("after the end: got %v, %v", p, err)
	}
}

// sendEmpty sends control messages with no bytes, to which the standard library
// would add one.
func sendEmpty(t *testing.T, c *net.UnixConn, oob []byte) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	msg := unix.Msghdr{Control: &oob[0]}
	msg.SetControllen(len(oob))
	var errno syscall.Errno
	if err := raw.Control(func(fd uintptr) {
		_, _, errno = unix.Syscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&msg)), 0)
	}); err != nil || errno != 0 {
		t.Fatal(err, errno)
	}
}

// Control messages that are not about descriptors are ignored.
func TestOtherControlMessages(t *testing.T) {
	ours, agent := pair(t)
	raw, err := ours.conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
	}), err); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	sent := tempFiles(t, dir, 1)
	credentials := unix.UnixCredentials(&unix.Ucred{Pid: int32(os.Getpid()), Uid: uint32(os.Getuid()), Gid: uint32(os.Getgid())})
	_, _, err = agent.WriteMsgUnix(mustMarshal(t, addRequest("a")), slices.Concat(rights(sent), credentials), nil)
	closeAll(sent)
	if err != nil {
		t.Fatal(err)
	}
	p, err := ours.receive()
	if err != nil {
		t.Fatal(err)
	}
	m, err := decode(p)
	if err != nil || m.ns == nil {
		t.Fatalf("got %v, %v", m, err)
	}
	_ = m.ns.Close()
}

// Whoever waits for a message is woken by Close, and a send ends with the agent.
func TestSocketEnds(t *testing.T) {
	ours, _ := pair(t)
	done := make(chan error, 1)
	go func() {
		_, err := ours.receive()
		done <- err
	}()
	_ = ours.Close()
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Errorf("receive: got %v, want %v", err, net.ErrClosed)
	}
	ours, agent := pair(t)
	_ = agent.Close()
	if err := ours.send([]byte{1}); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("send: got %v, want %v", err, syscall.EPIPE)
	}
}

func TestDialErrors(t *testing.T) {
	w := newWorld(t, func(cfg *Config) { cfg.Path = filepath.Join(t.TempDir(), "z.sock") })
	if _, err := w.m.dialAgent(t.Context()); !errors.Is(err, syscall.ENOENT) || err.Error() != "connect: no such file or directory" {
		t.Errorf("got %v", err)
	}
}

// The whole Manager over a real socket, with real network namespaces and an agent
// that does as Istio's.
func TestManagerOverSocket(t *testing.T) {
	ln := listenAgent(t)
	w := newWorld(t, func(cfg *Config) { cfg.Path = ln.Addr().String() })
	w.m.dial = w.m.dialAgent
	w.m.Open()
	ctx, cut := context.WithCancel(t.Context())
	defer cut()
	ended := make(chan error, 1)
	go func() { ended <- w.m.Run(ctx) }()
	a := acceptAgent(t, ln)
	if got := a.ask(addRequest("a"), ownNamespace(t, w)); got != "" {
		t.Errorf("add: %s", got)
	}
	if got := a.ask(sentRequest()); got != "" {
		t.Errorf("snapshot: %s", got)
	}
	// The same namespace by another descriptor.
	if got := a.ask(addRequest("a"), ownNamespace(t, w)); got != "" {
		t.Errorf("add: %s", got)
	}
	if n := len(w.proxies("a")); n != 1 {
		t.Errorf("%d proxies, want one", n)
	}
	_ = a.conn.Close()
	a = acceptAgent(t, ln)
	if got := a.ask(keepRequest("a")); got != "" {
		t.Errorf("keep: %s", got)
	}
	if got := a.ask(sentRequest()); got != "" {
		t.Errorf("snapshot: %s", got)
	}
	w.m.Drain()
	if err := <-ended; err != nil {
		t.Errorf("Run: %v", err)
	}
	if n, err := a.conn.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("the agent's side: got %d, %v, want the end", n, err)
	}
}

// realAgent is a connection, seen from an agent.
type realAgent struct {
	t    testing.TB
	conn *net.UnixConn
}

// acceptAgent waits for the next connection and its hello.
func acceptAgent(t testing.TB, ln *net.UnixListener) *realAgent {
	t.Helper()
	c, err := ln.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	a := &realAgent{t, c}
	if got := a.read(); string(got) != "\x08\x01" {
		t.Fatalf("hello: got %x, want 0801", got)
	}
	return a
}

// read takes a packet as an agent does, which has 5 s and 1024 bytes for it.
func (a *realAgent) read() []byte {
	a.t.Helper()
	if err := a.conn.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		a.t.Fatal(err)
	}
	b := make([]byte, 1024)
	n, _, flags, _, err := a.conn.ReadMsgUnix(b, nil)
	if err != nil || flags&unix.MSG_TRUNC != 0 {
		a.t.Fatalf("read: %v, flags %x", err, flags)
	}
	return b[:n]
}

// ask sends a request, closes the files and returns the answer's error text.
func (a *realAgent) ask(r *zdspb.WorkloadRequest, all ...*os.File) string {
	a.t.Helper()
	_, _, err := a.conn.WriteMsgUnix(mustMarshal(a.t, r), rights(all), nil)
	closeAll(all)
	if err != nil {
		a.t.Fatal(err)
	}
	var response zdspb.WorkloadResponse
	if err := proto.Unmarshal(a.read(), &response); err != nil || response.GetAck() == nil {
		a.t.Fatalf("answer: %v, %v", &response, err)
	}
	return response.GetAck().GetError()
}

// ownNamespace opens the network namespace of the test, which the world knows then.
func ownNamespace(t testing.TB, w *world) *os.File {
	t.Helper()
	f, err := os.Open("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	id, err := netns.ID(f)
	if err != nil {
		t.Fatal(err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.namespaces[id] == nil {
		w.namespaces[id] = &fakeNamespace{id: id}
	}
	return f
}

func TestIsNetNS(t *testing.T) {
	for path, want := range map[string]bool{"/proc/self/ns/net": true, "/proc/self/ns/uts": false, os.DevNull: false} {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		if got := isNetNS(f); got != want {
			t.Errorf("%s: got %v, want %v", path, got, want)
		}
		_ = f.Close()
	}
}
