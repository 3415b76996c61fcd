package inpod

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

const (
	// maxFiles is the most that the kernel lets come with a packet (SCM_MAX_FD). With
	// room for all of them we can say how many there were, and close them.
	maxFiles = 253
	// sendTimeout bounds the sending of a packet, which blocks only if the agent has
	// stopped to read.
	sendTimeout = 5 * time.Second
)

var (
	_ Namespace = (*netns.Pod)(nil)
	_ Visitor   = (*netns.Pod)(nil)
)

// socket is a SOCK_SEQPACKET connection to the agent.
type socket struct {
	conn *net.UnixConn
	log  *slog.Logger
	data [maxPacket]byte
	oob  []byte
}

// dialAgent connects to the agent. A full backlog is an error, too: the next try
// is near.
func (m *Manager) dialAgent(ctx context.Context) (agentConn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unixpacket", m.cfg.Path)
	if err != nil {
		var op *net.OpError
		if errors.As(err, &op) {
			err = op.Err // the rest says that we dial the path
		}
		return nil, err
	}
	return newSocket(c.(*net.UnixConn), m.log), nil
}

func newSocket(c *net.UnixConn, log *slog.Logger) *socket {
	// Room for credentials, too, which a socket that was made for us may ask for.
	return &socket{conn: c, log: log, oob: make([]byte, unix.CmsgSpace(maxFiles*4)+unix.CmsgSpace(unix.SizeofUcred))}
}

// receive implements agentConn. The data are those of the socket until the next
// call. A packet of no bytes is taken for the end.
func (s *socket) receive() (packet, error) {
	n, oobn, flags, _, err := s.conn.ReadMsgUnix(s.data[:], s.oob) // sets close-on-exec
	n, oobn = max(n, 0), max(oobn, 0)
	files, rightsErr := s.rights(s.oob[:oobn])
	p := packet{data: s.data[:n], files: files, truncated: flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0}
	if rightsErr != nil {
		p.truncated = true
	}
	return p, err
}

// rights takes the descriptors out of control messages.
func (s *socket) rights(oob []byte) ([]*os.File, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("parse control message: %w", err)
	}
	var files []*os.File
	for i := range messages {
		m := &messages[i]
		if m.Header.Level != unix.SOL_SOCKET || m.Header.Type != unix.SCM_RIGHTS {
			s.log.Warn("ignoring a control message of the node agent that is not about descriptors", "level", m.Header.Level, "type", m.Header.Type)
			continue
		}
		fds, err := unix.ParseUnixRights(m)
		if err != nil {
			closeAll(files)
			return nil, fmt.Errorf("parse descriptors: %w", err)
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "network namespace"))
		}
	}
	return files, nil
}

// send implements agentConn.
func (s *socket) send(b []byte) error {
	if err := s.conn.SetWriteDeadline(time.Now().Add(sendTimeout)); err != nil {
		return err
	}
	_, err := s.conn.Write(b)
	return err
}

// Close implements agentConn.
func (s *socket) Close() error { return s.conn.Close() }

// isNetNS tells what f is, if it can be told. It is for the log: what is no network
// namespace fails when somebody enters it.
func isNetNS(f *os.File) bool {
	raw, err := f.SyscallConn()
	if err != nil {
		return true
	}
	is := true
	_ = raw.Control(func(fd uintptr) {
		kind, err := unix.IoctlRetInt(int(fd), unix.NS_GET_NSTYPE)
		is = err == nil && kind == unix.CLONE_NEWNET
	})
	return is
}
