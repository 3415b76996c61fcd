package inpod

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/ztunnel-go/ztunnel/proxy"
	"github.com/ztunnel-go/ztunnel/proxy/inpod/zdspb"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// fakeConn is a connection, seen from the agent.
type fakeConn struct {
	t      testing.TB
	in     chan packet
	out    chan []byte
	closed chan struct{} // by us
	gone   chan struct{} // closed: the agent has gone
	once   sync.Once

	greeted bool // the test has read the hello
}

func (c *fakeConn) receive() (packet, error) {
	select {
	case p := <-c.in:
		return p, nil
	case <-c.gone:
		return packet{}, io.EOF
	case <-c.closed:
		return packet{}, net.ErrClosed
	}
}

func (c *fakeConn) send(b []byte) error {
	select {
	case <-c.gone:
		return syscall.EPIPE
	case <-c.closed:
		return net.ErrClosed
	default:
	}
	select {
	case c.out <- b:
		return nil
	case <-c.gone:
		return syscall.EPIPE
	case <-c.closed:
		return net.ErrClosed
	}
}

func (c *fakeConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return nil
}

func (c *fakeConn) isClosed() bool {
	select {
	case <-c.closed:
		return true
	default:
		return false
	}
}

// put sends a packet and returns the answer's error text.
func (c *fakeConn) put(p packet) string {
	c.t.Helper()
	select {
	case c.in <- p:
	case <-c.closed:
		closeAll(p.files)
		c.t.Fatal("the connection is closed")
	}
	var r zdspb.WorkloadResponse
	b := <-c.out
	if err := proto.Unmarshal(b, &r); err != nil || r.GetAck() == nil {
		c.t.Fatalf("answer %x: %v", b, err)
	}
	if len(b) > 1024 {
		c.t.Errorf("an answer of %d bytes", len(b))
	}
	return r.GetAck().GetError()
}

func (c *fakeConn) ask(r *zdspb.WorkloadRequest, files ...*os.File) string {
	c.t.Helper()
	b, err := proto.Marshal(r)
	if err != nil {
		c.t.Fatal(err)
	}
	return c.put(packet{data: b, files: files})
}

func addRequest(uid string) *zdspb.WorkloadRequest {
	return &zdspb.WorkloadRequest{Payload: &zdspb.WorkloadRequest_Add{Add: &zdspb.AddWorkload{
		Uid: uid, WorkloadInfo: &zdspb.WorkloadInfo{Name: uid, Namespace: "default", ServiceAccount: "sa-" + uid},
	}}}
}

func delRequest(uid string) *zdspb.WorkloadRequest {
	return &zdspb.WorkloadRequest{Payload: &zdspb.WorkloadRequest_Del{Del: &zdspb.DelWorkload{Uid: uid}}}
}

func keepRequest(uid string) *zdspb.WorkloadRequest {
	return &zdspb.WorkloadRequest{Payload: &zdspb.WorkloadRequest_Keep{Keep: &zdspb.KeepWorkload{Uid: uid}}}
}

func sentRequest() *zdspb.WorkloadRequest {
	return &zdspb.WorkloadRequest{Payload: &zdspb.WorkloadRequest_SnapshotSent{SnapshotSent: &zdspb.SnapshotSent{}}}
}

func (c *fakeConn) add(uid string, ns *os.File) string {
	c.t.Helper()
	return c.ask(addRequest(uid), ns)
}
func (c *fakeConn) del(uid string) string  { c.t.Helper(); return c.ask(delRequest(uid)) }
func (c *fakeConn) keep(uid string) string { c.t.Helper(); return c.ask(keepRequest(uid)) }
func (c *fakeConn) sent() string           { c.t.Helper(); return c.ask(sentRequest()) }

// eof is the end of the agent's side.
func (c *fakeConn) eof() { close(c.gone) }

// accept fails the test if an answer is a refusal.
func accept(t testing.TB, answers ...string) {
	t.Helper()
	for i, a := range answers {
		if a != "" {
			t.Errorf("answer %d: refused: %s", i, a)
		}
	}
}

// fakeNamespace is a pod's, as far as the Manager looks at it.
type fakeNamespace struct {
	netns.Network
	path string
	id   netns.NamespaceID

	mu    sync.Mutex
	addrs []netip.Addr
	dead  bool
	err   error         // of Addresses
	bind  error         // of every Bind in it
	stuck chan struct{} // Addresses waits for its end; nil: it does not
}

func (n *fakeNamespace) Addresses() ([]netip.Addr, error) {
	n.mu.Lock()
	stuck := n.stuck
	n.mu.Unlock()
	if stuck != nil {
		<-stuck
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.addrs, n.err
}

func (n *fakeNamespace) Alive() (bool, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return !n.dead, nil
}

func (n *fakeNamespace) LoopbackIPv6() (bool, error) { return true, nil }

func (n *fakeNamespace) set(addrs ...string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.addrs = nil
	for _, a := range addrs {
		n.addrs = append(n.addrs, netip.MustParseAddr(a))
	}
}

// fakeProxy holds the ports of a namespace.
type fakeProxy struct {
	w       *world
	pod     Pod
	ns      netns.NamespaceID
	drained chan struct{}
	once    sync.Once
	release chan struct{} // closed: its last connection has ended; nil: it has none
	ended   chan struct{}

	mu        sync.Mutex
	listening bool
	ran       bool
	cause     error // with which Run was cut
	broken    error // what Check returns
}

func (w *world) newProxy(pod Pod) (Proxy, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	p := &fakeProxy{w: w, pod: pod, ns: pod.Network.(*fakeNamespace).id, drained: make(chan struct{}), ended: make(chan struct{})}
	w.made[pod.UID] = append(w.made[pod.UID], p)
	return p, nil
}

// errTaken is what a Bind gets whose port somebody has.
var errTaken = fmt.Errorf("inbound listener: failed to bind to address [::]:15008: %w", syscall.EADDRINUSE)

func (p *fakeProxy) Bind(ctx context.Context) error {
	p.w.mu.Lock()
	hostile := p.w.hostile[p.pod.UID]
	p.w.mu.Unlock()
	if hostile != nil {
		if err := hostile(ctx); err != nil {
			return err
		}
	}
	n := p.pod.Network.(*fakeNamespace)
	n.mu.Lock()
	bind := n.bind
	n.mu.Unlock()
	if bind != nil {
		return bind
	}
	p.w.mu.Lock()
	defer p.w.mu.Unlock()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if len(p.w.holders[p.ns]) > 0 && !p.w.shared {
		return errTaken
	}
	if p.w.holders[p.ns] == nil {
		p.w.holders[p.ns] = map[*fakeProxy]bool{}
	}
	p.w.holders[p.ns][p] = true
	return nil
}

func (p *fakeProxy) Listen(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.drained:
		return proxy.ErrDraining
	default:
	}
	p.listening = true
	return context.Cause(ctx)
}

func (p *fakeProxy) Run(ctx context.Context) error {
	defer close(p.ended)
	defer p.free()
	p.mu.Lock()
	p.ran = true
	p.mu.Unlock()
	select {
	case <-ctx.Done():
		p.mu.Lock()
		p.cause = context.Cause(ctx)
		p.mu.Unlock()
		return nil
	case <-p.drained:
	}
	if p.release != nil {
		select {
		case <-p.release:
		case <-ctx.Done():
			p.mu.Lock()
			p.cause = context.Cause(ctx)
			p.mu.Unlock()
		}
	}
	return nil
}

func (p *fakeProxy) Drain() {
	p.once.Do(func() { close(p.drained) })
	p.mu.Lock()
	ran := p.ran
	p.mu.Unlock()
	if !ran {
		p.free()
	}
}

// free gives up the ports.
func (p *fakeProxy) free() {
	p.w.mu.Lock()
	defer p.w.mu.Unlock()
	delete(p.w.holders[p.ns], p)
}

func (p *fakeProxy) Check() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.broken
}

func (p *fakeProxy) Connections() proxy.Connections { return proxy.Connections{} }
