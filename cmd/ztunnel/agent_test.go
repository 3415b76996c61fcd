package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/ztunnel-go/ztunnel/proxy/inpod/zdspb"
)

// agent is a CNI agent on a real socket, which says what the test wants.
type agent struct {
	t    *testing.T
	path string
	ln   *net.UnixListener
}

// newAgent chooses a path. Nobody listens there before serve.
func newAgent(t *testing.T) *agent {
	t.Helper()
	dir, err := os.MkdirTemp("", "zds") // t.TempDir may be longer than a socket's path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return &agent{t: t, path: filepath.Join(dir, "s")}
}

func (a *agent) serve() {
	a.t.Helper()
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: a.path, Net: "unixpacket"})
	if err != nil {
		a.t.Fatal(err)
	}
	a.ln = ln
	a.t.Cleanup(func() { ln.Close() })
}

// session is one connection of a proxy to the agent.
type session struct {
	t *testing.T
	c *net.UnixConn
}

// accept takes a connection and reads its hello.
func (a *agent) accept() *session {
	a.t.Helper()
	deadline := time.Now().Add(directPatience)
	if err := a.ln.SetDeadline(deadline); err != nil {
		a.t.Fatal(err)
	}
	c, err := a.ln.AcceptUnix()
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(deadline); err != nil {
		a.t.Fatal(err)
	}
	s := &session{a.t, c}
	var hello zdspb.ZdsHello
	if b, err := s.read(); err != nil || proto.Unmarshal(b, &hello) != nil || hello.GetVersion() != zdspb.Version_V1 {
		a.t.Fatalf("hello %x, %v", b, err)
	}
	return s
}

func (s *session) read() ([]byte, error) {
	b := make([]byte, 1024)
	n, err := s.c.Read(b)
	if err == nil && n == 0 {
		err = io.EOF
	}
	return b[:n], err
}

// ask sends a request, with the descriptor of ns unless that is nil, and returns
// the text of the answer.
func (s *session) ask(r *zdspb.WorkloadRequest, ns *os.File) (refusal string, _ error) {
	b, err := proto.Marshal(r)
	if err != nil {
		return "", err
	}
	var oob []byte
	if ns != nil {
		oob = unix.UnixRights(int(ns.Fd()))
	}
	if _, _, err := s.c.WriteMsgUnix(b, oob, nil); err != nil {
		return "", err
	}
	if b, err = s.read(); err != nil {
		return "", err
	}
	var answer zdspb.WorkloadResponse
	if err := proto.Unmarshal(b, &answer); err != nil {
		return "", err
	}
	if answer.GetAck() == nil {
		return "", errors.New("an answer without ack")
	}
	return answer.GetAck().GetError(), nil
}

// tell is ask for what has to be accepted.
func (s *session) tell(r *zdspb.WorkloadRequest, ns *os.File) {
	s.t.Helper()
	if refusal, err := s.ask(r, ns); err != nil || refusal != "" {
		s.t.Fatalf("%v: refused with %q, %v", r, refusal, err)
	}
}

// ended waits until the proxy has left.
func (s *session) ended() {
	s.t.Helper()
	if b, err := s.read(); !errors.Is(err, io.EOF) {
		s.t.Fatalf("got %x and %v from the proxy, want the end of the connection", b, err)
	}
}

var snapshotSent = &zdspb.WorkloadRequest{Payload: &zdspb.WorkloadRequest_SnapshotSent{SnapshotSent: &zdspb.SnapshotSent{}}}

// addPod names a pod of namespace default.
func addPod(name string) *zdspb.WorkloadRequest {
	return &zdspb.WorkloadRequest{Payload: &zdspb.WorkloadRequest_Add{Add: &zdspb.AddWorkload{
		Uid: podUID(name), WorkloadInfo: &zdspb.WorkloadInfo{Name: name, Namespace: "default", ServiceAccount: "default"},
	}}}
}

func delPod(name string) *zdspb.WorkloadRequest {
	return &zdspb.WorkloadRequest{Payload: &zdspb.WorkloadRequest_Del{Del: &zdspb.DelWorkload{Uid: podUID(name)}}}
}

func podUID(name string) string { return fmt.Sprintf("%s-uid", name) }
