//go:build e2e

package netns

import (
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/ztunnel-go/ztunnel/e2e/netlab"
	"github.com/ztunnel-go/ztunnel/proxy/inpod/zdspb"
)

// bareEnv makes the test binary a node that does no more for its pods than to open
// sockets: the value is a bareTask.
const bareEnv = "ZTUNNEL_E2E_BARE"

// bareTask is where the agent is, and what to open in a pod.
type bareTask struct {
	Path    string
	Sockets []socketSpec
}

// bareReport is the output of a bare node, when all pods have their sockets.
type bareReport struct{ Connected, Served time.Time }

// bareNode runs one as a process of its own, and returns how long it took.
func (f *fleet) bareNode(specs []socketSpec) time.Duration {
	f.tb.Helper()
	task, err := json.Marshal(bareTask{f.path, specs})
	if err != nil {
		f.tb.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		f.tb.Fatal(err)
	}
	node, err := netlab.Start("bare node", f.dir, []string{bareEnv + "=" + string(task)}, f.home.In(self)...)
	if err != nil {
		f.tb.Fatal(err)
	}
	defer node.Kill()
	line, err := node.Find(f.ctx, 30*time.Second, func(line string) bool { return strings.HasPrefix(line, "{") })
	var report bareReport
	if err == nil {
		err = json.Unmarshal([]byte(line), &report)
	}
	if err != nil {
		f.tb.Fatalf("bare node: %v\n%s", err, node.Tail(10))
	}
	return report.Served.Sub(report.Connected)
}

// runBare is the process. It lasts until it is killed: then the agent sees it go.
func runBare(task string) int {
	var t bareTask
	err := json.Unmarshal([]byte(task), &t)
	if err == nil {
		err = t.run()
	}
	fmt.Fprintln(os.Stderr, err)
	return 1
}

func (t *bareTask) run() error {
	runtime.LockOSThread() // it stays in the namespace of the last pod
	agent, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Connect(agent, &unix.SockaddrUnix{Name: t.Path}); err != nil {
		return err
	}
	var report bareReport
	report.Connected = time.Now()
	if err := sendTo(agent, &zdspb.ZdsHello{Version: zdspb.Version_V1}); err != nil {
		return err
	}
	data, oob := make([]byte, 1024), make([]byte, unix.CmsgSpace(4))
	for {
		n, oobn, _, _, err := unix.Recvmsg(agent, data, oob, unix.MSG_CMSG_CLOEXEC)
		if err != nil || n == 0 {
			return fmt.Errorf("the agent has gone: %w", err)
		}
		var req zdspb.WorkloadRequest
		if err := proto.Unmarshal(data[:n], &req); err != nil {
			return err
		}
		if req.GetAdd() != nil {
			err = t.open(oob[:oobn])
			report.Served = time.Now()
		}
		if err != nil {
			return err
		}
		if err := sendTo(agent, &zdspb.WorkloadResponse{Payload: &zdspb.WorkloadResponse_Ack{Ack: &zdspb.Ack{}}}); err != nil {
			return err
		}
		if req.GetSnapshotSent() != nil {
			if err := json.NewEncoder(os.Stdout).Encode(report); err != nil {
				return err
			}
		}
	}
}

// open opens the sockets in the namespace whose descriptor has come.
func (t *bareTask) open(oob []byte) error {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(messages) != 1 {
		return fmt.Errorf("%d control messages: %w", len(messages), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return fmt.Errorf("%d descriptors: %w", len(fds), err)
	}
	if err := unix.Setns(fds[0], unix.CLONE_NEWNET); err != nil {
		return err
	}
	for _, s := range t.Sockets {
		if _, err := s.open(); err != nil {
			return err
		}
	}
	return nil
}

func sendTo(fd int, m proto.Message) error {
	data, err := proto.Marshal(m)
	if err != nil {
		return err
	}
	return unix.Sendto(fd, data, unix.MSG_NOSIGNAL, nil)
}
