//go:build linux

package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/ztunnel-go/ztunnel/e2e/cni/rules"
	"github.com/ztunnel-go/ztunnel/proxy/inpod/zdspb"
)

var (
	errReplaced     = errors.New("replaced by a newer connection")
	errDisconnected = errors.New("the agent disconnects")
	// errClosed: the connection ended before the answer came.
	errClosed = errors.New("the proxy has disconnected")
)

// conn is one proxy's connection. Its goroutine alone reads and writes.
type conn struct {
	a        *Agent
	u        *net.UnixConn
	ctx      context.Context // ends with the agent, and with this connection
	cancel   context.CancelCauseFunc
	ops      chan *change  // Istio: of this connection
	previous chan struct{} // Cilium: closed when the connection before has ended; nil if none
	done     chan struct{} // closed when this one has ended
}

func newConn(ctx context.Context, a *Agent, u *net.UnixConn) *conn {
	c := &conn{a: a, u: u, ops: make(chan *change, 100), done: make(chan struct{})}
	c.ctx, c.cancel = context.WithCancelCause(ctx)
	return c
}

// tell sends a change to some connections and waits for all answers.
func (a *Agent) tell(ctx context.Context, conns []*conn, ch *change) error {
	if len(conns) == 0 {
		return ErrNoProxy
	}
	var errs []error
	for _, c := range conns {
		one := &change{pod: ch.pod, req: ch.req, done: make(chan error, 1)}
		select {
		case c.ops <- one:
			errs = append(errs, one.wait(ctx, c.done))
		case <-c.done:
			errs = append(errs, errClosed)
		case <-ctx.Done():
			errs = append(errs, ctx.Err())
		}
	}
	return errors.Join(errs...)
}

// queue waits until a proxy has answered.
func (a *Agent) queue(ctx context.Context, ch *change) error {
	ch.done = make(chan error, 1)
	select {
	case a.ops <- ch:
		return ch.wait(ctx, nil)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// wait returns the answer, unless ended is closed before.
func (ch *change) wait(ctx context.Context, ended <-chan struct{}) error {
	select {
	case err := <-ch.done:
		return err
	case <-ended:
		select {
		case err := <-ch.done:
			return err
		default:
			return errClosed
		}
	case <-ctx.Done():
		return ctx.Err()
	}
}

// serveIstio is the life of a connection at Istio's agent.
func (c *conn) serveIstio() error {
	stop := context.AfterFunc(c.ctx, func() { _ = c.u.Close() })
	defer stop()
	deadline := c.a.cfg.Deadline
	if err := c.readHello(deadline); err != nil {
		return err
	}
	for _, pod := range c.a.snapshot() {
		req := addRequest(pod)
		if pod.NetNS == nil {
			req = &zdspb.WorkloadRequest{Payload: &zdspb.WorkloadRequest_Keep{Keep: &zdspb.KeepWorkload{Uid: pod.UID}}}
		}
		// A pod that is refused is logged, and the snapshot goes on.
		if err := c.exchange(req, pod.NetNS, deadline); err != nil && !isRefusal(err) {
			return err
		}
	}
	if err := c.sendSnapshotSent(deadline); err != nil && !isRefusal(err) {
		return err
	}
	idle := time.NewTimer(c.a.cfg.Idle)
	defer idle.Stop()
	for {
		select {
		case ch := <-c.ops:
			err := c.exchange(ch.req, ch.pod.NetNS, deadline)
			ch.done <- err
			if errors.Is(err, unix.EPIPE) {
				return err
			}
		case <-idle.C:
			if err := c.checkAlive(); err != nil {
				return err
			}
		case <-c.ctx.Done():
			return context.Cause(c.ctx)
		}
		idle.Reset(c.a.cfg.Idle)
	}
}

// serveCilium is the life of a connection at Cilium's agent. A handler that waits
// for an answer is not interrupted by the next connection.
func (c *conn) serveCilium() error {
	stop := context.AfterFunc(c.ctx, func() {
		if !errors.Is(context.Cause(c.ctx), errReplaced) {
			_ = c.u.Close()
		}
	})
	defer stop()
	if c.previous != nil {
		<-c.previous
	}
	if err := c.readHello(0); err != nil {
		return err
	}
	for _, pod := range c.a.snapshot() {
		if pod.Rules != nil {
			if err := rules.Apply(c.ctx, pod.NetNS, *pod.Rules); err != nil {
				return fmt.Errorf("snapshot: pod %s/%s: %w", pod.Namespace, pod.Name, err)
			}
		}
		if pod.NetNS == nil {
			return fmt.Errorf("snapshot: pod %s/%s has no network namespace", pod.Namespace, pod.Name)
		}
		if err := c.exchange(addRequest(pod), pod.NetNS, 0); err != nil {
			return err
		}
	}
	if err := c.sendSnapshotSent(0); err != nil {
		return err
	}
	for {
		if c.ctx.Err() != nil {
			return context.Cause(c.ctx)
		}
		select {
		case ch := <-c.a.ops:
			err := c.exchange(ch.req, ch.pod.NetNS, 0)
			ch.done <- err
			if err != nil {
				return err
			}
		case <-c.ctx.Done():
			return context.Cause(c.ctx)
		}
	}
}

func (c *conn) sendSnapshotSent(deadline time.Duration) error {
	err := c.exchange(&zdspb.WorkloadRequest{Payload: &zdspb.WorkloadRequest_SnapshotSent{SnapshotSent: &zdspb.SnapshotSent{}}}, nil, deadline)
	if err == nil {
		c.a.update(func(s *Status) { s.Snapshots++ })
	}
	return err
}

func (c *conn) readHello(deadline time.Duration) error {
	var hello zdspb.ZdsHello
	if err := c.read(&hello, deadline); err != nil {
		return fmt.Errorf("read hello: %w", err)
	}
	if hello.GetVersion() != zdspb.Version_V1 {
		c.a.violation(fmt.Sprintf("hello of version %v, want %v", hello.GetVersion(), zdspb.Version_V1))
	}
	return nil
}

// exchange sends a request, with a descriptor if there is one, and reads the
// answer. Deadline 0 = none.
func (c *conn) exchange(req *zdspb.WorkloadRequest, ns *os.File, deadline time.Duration) error {
	data, err := proto.Marshal(req)
	if err != nil {
		return err
	}
	if err := c.u.SetWriteDeadline(until(deadline)); err != nil {
		return err
	}
	if err := c.send(data, ns); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	var resp zdspb.WorkloadResponse
	if err := c.read(&resp, deadline); err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			c.a.violation(fmt.Sprintf("no answer within %v to %v", deadline, req))
		}
		return fmt.Errorf("read answer: %w", err)
	}
	ack, ok := resp.GetPayload().(*zdspb.WorkloadResponse_Ack)
	if !ok {
		c.a.violation(fmt.Sprintf("an answer without ack to %v", req))
		return nil // as agents see it, it has no error
	}
	if text := ack.Ack.GetError(); text != "" {
		c.a.log.Error("proxy refuses", "error", text)
		c.a.update(func(s *Status) { s.Refusals = append(s.Refusals, text) })
		return &RefusedError{text}
	}
	return nil
}

// send writes one packet, with a descriptor that stays open meanwhile.
func (c *conn) send(data []byte, ns *os.File) error {
	if ns == nil {
		_, _, err := c.u.WriteMsgUnix(data, nil, nil)
		return err
	}
	raw, err := ns.SyscallConn()
	if err != nil {
		return err
	}
	var sendErr error
	err = raw.Control(func(fd uintptr) {
		_, _, sendErr = c.u.WriteMsgUnix(data, unix.UnixRights(int(fd)), nil)
	})
	return errors.Join(err, sendErr)
}

// checkAlive reads for a moment: nothing may come.
func (c *conn) checkAlive() error {
	err := c.read(&zdspb.WorkloadResponse{}, 10*time.Millisecond)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil
	case err == nil:
		err = errors.New("a message that nobody asked for")
		c.a.violation(err.Error())
	}
	return err
}

// maxMessage is what an agent reads of an answer.
const maxMessage = 1024

func (c *conn) read(m proto.Message, deadline time.Duration) error {
	if err := c.u.SetReadDeadline(until(deadline)); err != nil {
		return err
	}
	buf := make([]byte, maxMessage)
	n, _, flags, _, err := c.u.ReadMsgUnix(buf, nil)
	if err != nil {
		return err
	}
	if n == 0 {
		return io.EOF
	}
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		c.a.violation(fmt.Sprintf("a message of more than %d bytes, or with descriptors", maxMessage))
		return errors.New("truncated message")
	}
	if err := proto.Unmarshal(buf[:n], m); err != nil {
		c.a.violation("a message that is no protobuf: " + err.Error())
		return err
	}
	return nil
}

func until(d time.Duration) time.Time {
	if d == 0 {
		return time.Time{}
	}
	return time.Now().Add(d)
}

func isRefusal(err error) bool {
	var refused *RefusedError
	return errors.As(err, &refused)
}

func addRequest(p Pod) *zdspb.WorkloadRequest {
	return &zdspb.WorkloadRequest{Payload: &zdspb.WorkloadRequest_Add{Add: &zdspb.AddWorkload{
		Uid: p.UID, WorkloadInfo: &zdspb.WorkloadInfo{Name: p.Name, Namespace: p.Namespace, ServiceAccount: p.ServiceAccount},
	}}}
}
