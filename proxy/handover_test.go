package proxy

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/proxy/netns/memnet"
)

// sharedHost is a host on which several proxies may listen on one port, as
// SO_REUSEPORT lets them: a connection goes to one of them in turn and waits in
// that one's queue.
type sharedHost struct {
	*memnet.Host
	// slow is how long it takes from a connection's arrival in a queue until Accept
	// returns it, so that there always are some in the queues.
	slow time.Duration
	// deaf makes Yield say that it steers, and do nothing.
	deaf bool

	mu    sync.Mutex // guards ports and what their members hold
	ports map[netip.AddrPort]*sharedPort
}

type sharedPort struct {
	real    netns.Listener
	members []*member
	next    int
}

// member is one proxy's listener.
type member struct {
	host    *sharedHost
	port    *sharedPort
	addr    netip.AddrPort
	queue   chan netns.Conn
	closed  chan struct{}
	yielded bool
}

var (
	_ netns.Listener = (*member)(nil)
	_ netns.Yielder  = (*member)(nil)
)

type memberBound struct {
	h    *sharedHost
	addr netip.AddrPort
}

func (b memberBound) Addr() netip.AddrPort { return b.addr }
func (b memberBound) Listen(ctx context.Context) (netns.Listener, error) {
	return b.h.Listen(ctx, b.addr)
}
func (b memberBound) Close() error { return nil }

func (h *sharedHost) Bind(_ context.Context, addr netip.AddrPort) (netns.Bound, error) {
	return memberBound{h, addr}, nil
}

func (h *sharedHost) Listen(ctx context.Context, addr netip.AddrPort) (netns.Listener, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	port := h.ports[addr]
	if port == nil {
		real, err := h.Host.Listen(ctx, addr)
		if err != nil {
			return nil, err
		}
		port = &sharedPort{real: real}
		h.ports[addr] = port
		go h.distribute(port)
	}
	m := &member{host: h, port: port, addr: addr, queue: make(chan netns.Conn, netns.DefaultBacklog), closed: make(chan struct{})}
	port.members = append(port.members, m)
	return m, nil
}

// distribute is the kernel.
func (h *sharedHost) distribute(port *sharedPort) {
	for {
		c, err := port.real.Accept()
		if err != nil {
			return
		}
		h.mu.Lock()
		all := slices.DeleteFunc(slices.Clone(port.members), func(m *member) bool { return m.yielded })
		if len(all) == 0 {
			all = port.members
		}
		if len(all) == 0 {
			_ = c.Abort()
		} else {
			all[port.next%len(all)].queue <- c
			port.next++
		}
		h.mu.Unlock()
	}
}

func (m *member) Accept() (netns.Conn, error) {
	select {
	case c := <-m.queue:
		select {
		case <-time.After(m.host.slow):
			return c, nil
		case <-m.closed:
			_ = c.Abort() // it was still in the queue
		}
	case <-m.closed:
	}
	return nil, net.ErrClosed
}

// Close resets what is in the queue.
func (m *member) Close() error {
	m.host.mu.Lock()
	defer m.host.mu.Unlock()
	if isClosed(m.closed) {
		return net.ErrClosed
	}
	close(m.closed)
	m.port.members = slices.DeleteFunc(m.port.members, func(o *member) bool { return o == m })
	for len(m.queue) > 0 {
		_ = (<-m.queue).Abort()
	}
	if len(m.port.members) == 0 {
		delete(m.host.ports, m.addr)
		return m.port.real.Close()
	}
	return nil
}

func (m *member) Addr() netip.AddrPort { return m.addr }
func (m *member) Transparent() bool    { return true }

func (m *member) Yield() (bool, error) {
	m.host.mu.Lock()
	defer m.host.mu.Unlock()
	if m.host.deaf {
		return true, nil
	}
	m.yielded = slices.ContainsFunc(m.port.members, func(o *member) bool { return o != m && !o.yielded })
	return m.yielded, nil
}

func (m *member) Others() (int, error) {
	m.host.mu.Lock()
	defer m.host.mu.Unlock()
	return len(m.port.members) - 1, nil
}

// onSharedHost puts a node on a host that its successor shares.
func onSharedHost(h **sharedHost) nodeOption {
	return withConfig(func(c *Config) {
		*h = &sharedHost{Host: c.Network.(*memnet.Host), slow: 10 * time.Millisecond, ports: map[netip.AddrPort]*sharedPort{}}
		c.Network = *h
	})
}

// second makes another proxy for the pod of n, with the same store. It has not
// listened.
func (n *node) second() *node {
	n.m.t.Helper()
	next := &node{m: n.m, w: n.w, addr: n.addr, host: n.host, store: n.store, done: make(chan struct{})}
	cfg := n.proxy.cfg
	certs := ca.NewManager(one{n.m.ca}, ca.ManagerConfig{})
	cfg.Certs = certs
	var err error
	if next.proxy, err = New(cfg); err != nil {
		n.m.t.Fatal(err)
	}
	if err := next.proxy.Bind(n.m.ctx); err != nil {
		n.m.t.Fatal(err)
	}
	n.m.parts.Go(func() { _ = certs.Run(n.m.ctx) })
	return next
}

// start serves. The mesh's end ends it.
func (n *node) start() {
	n.m.t.Helper()
	if err := n.proxy.Listen(n.m.ctx); err != nil {
		n.m.t.Fatal(err)
	}
	ctx, cut := context.WithCancelCause(n.m.ctx)
	n.cut = cut
	n.m.parts.Go(func() {
		if err := n.proxy.Run(ctx); err != nil {
			n.m.t.Error(err)
		}
		close(n.done)
	})
}

// load sends a request every twenty milliseconds on each path through the pod, until
// stop is called; none may fail.
func (n *node) load(others ...*node) (stop func()) {
	var parts sync.WaitGroup
	end := make(chan struct{})
	for _, other := range others {
		for _, path := range []struct {
			name     string
			from, to *node
		}{{"inbound", other, n}, {"outbound", n, other}} {
			parts.Go(func() {
				for !isClosed(end) {
					parts.Go(func() {
						if err := path.from.request(path.to.echoAddr(), "x"); err != nil {
							n.m.t.Errorf("%s, %s and %s: %v", path.name, path.from.w.Name, path.to.w.Name, err)
						}
					})
					time.Sleep(20 * time.Millisecond)
				}
			})
		}
	}
	return func() { close(end); parts.Wait() }
}

// D14: the proxy of a pod is replaced by another while connections come on every
// path, and none is lost; those that are open go on to their end.
func TestHandOver(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		var host *sharedHost
		old := m.add("pod", "10.0.1.2", onSharedHost(&host))
		peer, bare := m.add("peer", "10.0.2.2"), m.add("bare", "10.0.3.2", uncaptured)
		held := peer.mustDial(old.echoAddr())
		stop := old.load(peer, bare)
		for range 3 {
			next := old.second() // bound, and not in anyone's way
			time.Sleep(time.Second)
			next.start()
			time.Sleep(303 * time.Millisecond) // so that some are in the queues when they are closed
			begin := time.Now()
			old.proxy.Drain()
			if err := roundTrip(held, "still here"); err != nil {
				t.Errorf("a connection that was open: %v", err)
			}
			time.Sleep(2 * time.Second)
			if open := old.proxy.InboundAddr(); open.IsValid() {
				t.Errorf("the old one still listens after %v", time.Since(begin))
			}
			if err := roundTrip(held, "still here"); err != nil {
				t.Errorf("a connection that was open: %v", err)
			}
			held.Close()
			<-old.done
			if d := time.Since(begin); d > 4*time.Second {
				t.Errorf("the old one ended after %v", d)
			}
			old = next
			held = peer.mustDial(old.echoAddr())
			if err := roundTrip(held, "hello"); err != nil {
				t.Fatal(err)
			}
		}
		held.Close()
		stop()
		old.stop(nil)
	})
}

// On a shared host network the next proxy starts only when this one has been told
// to stop: it serves on until the other listens.
func TestHandOverToLateSuccessor(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		var host *sharedHost
		old := m.add("pod", "10.0.1.2", onSharedHost(&host), withConfig(func(c *Config) { c.HandOver = 10 * time.Second }))
		peer, bare := m.add("peer", "10.0.2.2"), m.add("bare", "10.0.3.2", uncaptured)
		stop := old.load(peer, bare)
		next := old.second()
		time.Sleep(3 * time.Millisecond) // as above
		old.proxy.Drain()
		time.Sleep(7 * time.Second)
		if !old.proxy.InboundAddr().IsValid() {
			t.Error("it does not wait for the other")
		}
		next.start()
		begin := time.Now()
		<-old.done
		if d := time.Since(begin); d > 4*time.Second {
			t.Errorf("it ended %v after the other had begun", d)
		}
		time.Sleep(time.Second)
		stop()
		next.stop(nil)
	})
}

// Nobody comes: the wait is bounded, and what comes meanwhile is served.
func TestHandOverToNobody(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		var host *sharedHost
		pod := m.add("pod", "10.0.1.2", onSharedHost(&host), withConfig(func(c *Config) { c.HandOver = 3 * time.Second }))
		peer := m.add("peer", "10.0.2.2")
		synctest.Wait() // Run has begun
		begin := time.Now()
		pod.proxy.Drain()
		time.Sleep(2900 * time.Millisecond)
		if err := errors.Join(peer.request(pod.echoAddr(), "x"), pod.request(peer.echoAddr(), "x")); err != nil {
			t.Error(err)
		}
		<-pod.done
		if d := time.Since(begin); d < 3*time.Second || d > 6*time.Second {
			t.Errorf("ended after %v", d)
		}
		pod.wantLog(map[string]string{"level": "warn", "message": "no other proxy has come to listen on our port: new connections fail until one does", "waited": "3s"})
	})
}

// A successor that comes a moment after the drain has begun is given what comes,
// also where nobody waits for it.
func TestHandOverAtTheLastMoment(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		var host *sharedHost
		old := m.add("pod", "10.0.1.2", onSharedHost(&host))
		peer, bare := m.add("peer", "10.0.2.2"), m.add("bare", "10.0.3.2", uncaptured)
		stop := old.load(peer, bare)
		next := old.second()
		time.Sleep(3 * time.Millisecond)
		old.proxy.Drain()
		time.Sleep(drainAlone - 50*time.Millisecond)
		next.start()
		begin := time.Now()
		<-old.done
		if d := time.Since(begin); d < drainQuiet {
			t.Errorf("it closed its listeners %v after the other had come, want after %v", d, drainQuiet)
		}
		time.Sleep(time.Second)
		stop()
		next.stop(nil)
	})
}

// The queues are emptied for a bounded time, also if connections keep coming that
// should go elsewhere.
func TestDrainUnderFlood(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		var host *sharedHost
		pod := m.add("pod", "10.0.1.2", onSharedHost(&host))
		host.deaf = true
		peer := m.add("peer", "10.0.2.2")
		synctest.Wait() // Run has begun
		begin := time.Now()
		pod.proxy.Drain()
		for pod.request(peer.echoAddr(), "x") == nil {
			time.Sleep(50 * time.Millisecond)
		}
		if d := time.Since(begin); d < drainMost-100*time.Millisecond || d > drainMost+100*time.Millisecond {
			t.Errorf("it accepted for %v, want %v", d, drainMost)
		}
	})
}

// N-18, LC-10: a pod that is deleted takes its connections with it at once. A new
// one is accepted by the client's proxy, and carries nothing.
func TestDP_N18_ID_LC10_Deletion(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		client, server := m.add("client", "10.0.1.2"), m.add("server", "10.0.2.2")
		bare := m.add("bare", "10.0.3.2", uncaptured)
		long, plain, own := client.mustDial(server.echoAddr()), bare.mustDial(server.echoAddr()), server.mustDial(client.echoAddr())
		for _, c := range []netns.Conn{long, plain, own} {
			if err := roundTrip(c, "before"); err != nil {
				t.Fatal(err)
			}
		}
		begin := time.Now()
		server.stop(errors.New("the pod was deleted"))
		for _, c := range []netns.Conn{long, plain, own} {
			if _, err := c.Read(make([]byte, 1)); err == nil {
				t.Error("an open connection goes on")
			}
		}
		if d := time.Since(begin); d != 0 {
			t.Errorf("they ended after %v, want at once", d)
		}
		c, err := client.dial(server.echoAddr())
		if err != nil {
			t.Fatalf("connect: %v", err)
		}
		if err := roundTrip(c, "x"); err == nil {
			t.Error("a new connection carried data")
		}
		c.Close()
		if n := server.proxy.Connections(); len(n.Inbound)+len(n.Outbound) != 0 {
			t.Errorf("connections after the end: %+v", n)
		}
		synctest.Wait()
		if n := len(server.logs.find(map[string]string{"scope": "access", "message": "connection complete"})); n != 3 {
			t.Errorf("%d connections are told of, want 3:\n%s", n, server.logs.text("access"))
		}
	})
}
