package proxy

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/proxy/netns/memnet"
	"github.com/ztunnel-go/ztunnel/state"
)

var podAddr = netip.MustParseAddr("10.0.1.2")

// observed is a Network that tells what was bound, and keeps the listeners.
type observed struct {
	*memnet.Host
	binding func(netip.AddrPort) // called before each Bind; nil: nothing

	mu        sync.Mutex // guards what follows
	bound     []netip.AddrPort
	listeners map[uint16]netns.Listener
}

func (o *observed) Bind(ctx context.Context, addr netip.AddrPort) (netns.Bound, error) {
	if o.binding != nil {
		o.binding(addr)
	}
	b, err := o.Host.Bind(ctx, addr)
	if err != nil {
		return nil, err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.bound = append(o.bound, addr)
	return observedBound{b, o}, nil
}

type observedBound struct {
	netns.Bound
	o *observed
}

func (b observedBound) Listen(ctx context.Context) (netns.Listener, error) {
	ln, err := b.Bound.Listen(ctx)
	if err == nil {
		b.o.mu.Lock()
		defer b.o.mu.Unlock()
		b.o.listeners[ln.Addr().Port()] = ln
	}
	return ln, err
}

// lone is a proxy on a network of its own that nothing has been done with.
type lone struct {
	t       *testing.T
	network *observed
	proxy   *Proxy
}

func newLone(t *testing.T, change ...func(*Config)) *lone {
	t.Helper()
	l := &lone{t: t, network: &observed{Host: memnet.New(memnet.Config{}).Host(podAddr), listeners: map[uint16]netns.Listener{}}}
	cfg := Config{
		Network: l.network, Store: state.New(state.Config{}), Metrics: NewMetrics(prometheus.NewRegistry(), MetricsConfig{}),
		Certs:        ca.NewManager(one{catest.NewProvider("test")}, ca.ManagerConfig{}),
		Local:        state.Ref{Namespace: "default", Name: "pod", ServiceAccount: "pod"},
		OutboundAddr: netip.MustParseAddrPort("[::]:15001"), InboundAddr: netip.MustParseAddrPort("[::]:15008"),
		PassthroughAddr: netip.MustParseAddrPort("[::]:15006"), SOCKSAddr: socksListener,
	}
	for _, c := range change {
		c(&cfg)
	}
	var err error
	if l.proxy, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	return l
}

// wantFree asserts that nobody holds any of the ports.
func (l *lone) wantFree() {
	l.t.Helper()
	for _, port := range []uint16{15001, 15006, 15008, 15080} {
		b, err := l.network.Host.Bind(l.t.Context(), netip.AddrPortFrom(netip.IPv6Unspecified(), port))
		if err != nil {
			l.t.Errorf("port %d: %v", port, err)
			continue
		}
		b.Close()
	}
}

// dial connects to a port of the pod.
func (l *lone) dial(port uint16) error {
	c, err := l.network.Dial(l.t.Context(), netip.Addr{}, netip.AddrPortFrom(podAddr, port))
	if err == nil {
		c.Close()
	}
	return err
}

// run is Run until the test's bubble has nothing more to do; stop ends it.
func (l *lone) run() (stop func()) {
	ctx, cut := context.WithCancel(l.t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := l.proxy.Run(ctx); err != nil {
			l.t.Error(err)
		}
	}()
	return func() { cut(); <-done }
}

// D13: bound is not listening, so a connection is refused until Listen; the order
// is that of the in-pod spec §7.5.
func TestBindThenListen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLone(t)
		if err := l.proxy.Bind(t.Context()); err != nil {
			t.Fatal(err)
		}
		var order []uint16
		for _, a := range l.network.bound {
			order = append(order, a.Port())
		}
		if want := []uint16{15008, 15006, 15001, 15080}; !slices.Equal(order, want) {
			t.Errorf("bound %v, want %v", order, want)
		}
		if err := l.dial(15008); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("a port that is only bound: %v, want it refused", err)
		}
		if _, err := l.network.Host.Bind(t.Context(), l.network.bound[0]); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("another one binds it: %v, want that it is in use", err)
		}
		if a := l.proxy.InboundAddr(); a.IsValid() {
			t.Errorf("bound only, it listens at %v", a)
		}
		if err := l.proxy.Check(); err != nil {
			t.Errorf("Check before Listen: %v", err)
		}
		if err := l.proxy.Listen(t.Context()); err != nil {
			t.Fatal(err)
		}
		if a := l.proxy.InboundAddr(); a.Port() != 15008 {
			t.Errorf("listens at %v", a)
		}
		if err := l.dial(15008); err != nil {
			t.Errorf("after Listen: %v", err)
		}
		l.run()()
		l.wantFree()
	})
}

// All or none, with Bind and without.
func TestBindConflict(t *testing.T) {
	for _, bind := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			l := newLone(t)
			other, err := l.network.Host.Bind(t.Context(), netip.MustParseAddrPort("[::]:15001"))
			if err != nil {
				t.Fatal(err)
			}
			open := l.proxy.Listen
			if bind {
				open = l.proxy.Bind
			}
			err = open(t.Context())
			const want = "outbound listener: failed to bind to address [::]:15001: "
			if !errors.Is(err, syscall.EADDRINUSE) || !strings.HasPrefix(err.Error(), want) {
				t.Errorf("Bind %v: got %v, want %q…", bind, err, want)
			}
			other.Close()
			l.wantFree()
			// Nothing is left that would stand in the way of another try.
			if err := l.proxy.Bind(t.Context()); err != nil {
				t.Error(err)
			}
			if err := l.proxy.Listen(t.Context()); err != nil {
				t.Error(err)
			}
			l.proxy.Drain()
			l.wantFree()
		})
	}
}

// A drain before there is anything to drain leaves nothing open, whenever it comes.
func TestDrainBeforeRun(t *testing.T) {
	bind := func(t *testing.T, l *lone) {
		t.Helper()
		if err := l.proxy.Bind(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	listen := func(t *testing.T, l *lone) {
		t.Helper()
		if err := l.proxy.Listen(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	refused := func(t *testing.T, err error) {
		t.Helper()
		if !errors.Is(err, ErrDraining) {
			t.Errorf("got %v, want %v", err, ErrDraining)
		}
	}
	for _, tt := range []struct {
		name string
		run  func(t *testing.T, l *lone)
	}{
		{"before Bind", func(t *testing.T, l *lone) {
			l.proxy.Drain()
			refused(t, l.proxy.Bind(t.Context()))
			refused(t, l.proxy.Listen(t.Context()))
		}},
		{"between Bind and Listen", func(t *testing.T, l *lone) {
			bind(t, l)
			l.proxy.Drain()
			refused(t, l.proxy.Listen(t.Context()))
		}},
		{"during Bind", func(t *testing.T, l *lone) {
			l.network.binding = func(a netip.AddrPort) {
				if a.Port() == 15006 {
					l.proxy.Drain()
				}
			}
			refused(t, l.proxy.Bind(t.Context()))
		}},
		{"after Listen", func(t *testing.T, l *lone) {
			bind(t, l)
			listen(t, l)
			l.proxy.Drain()
			l.proxy.Drain()
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newLone(t)
				tt.run(t, l)
				l.wantFree()
				if err := l.proxy.Check(); err != nil {
					t.Errorf("Check: %v", err)
				}
				if err := l.proxy.Run(t.Context()); err != nil {
					t.Errorf("Run: %v", err)
				}
			})
		})
	}
}

// Run leaves nothing open, whatever it returns.
func TestRunClosesEverything(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLone(t)
		if err := l.proxy.Bind(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := l.proxy.Run(t.Context()); err == nil {
			t.Error("Run without Listen: no error")
		}
		l.wantFree()

		// The context has ended before, or ends while it drains.
		for _, drain := range []bool{false, true} {
			l := newLone(t)
			if err := l.proxy.Listen(t.Context()); err != nil {
				t.Fatal(err)
			}
			stop := l.run()
			if drain {
				synctest.Wait()
				l.proxy.Drain()
				synctest.Wait()
			}
			begin := time.Now()
			stop()
			if d := time.Since(begin); d != 0 {
				t.Errorf("drain %v: it ended after %v, want at once", drain, d)
			}
			l.wantFree()
			if err := l.proxy.Run(t.Context()); err == nil {
				t.Error("a second Run: no error")
			}
		}
	})
}

// Whoever may administer the namespace can take our sockets away.
func TestCheckMissesListener(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLone(t)
		if err := l.proxy.Bind(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := l.proxy.Listen(t.Context()); err != nil {
			t.Fatal(err)
		}
		defer l.run()()
		if err := l.proxy.Check(); err != nil {
			t.Errorf("while all listen: %v", err)
		}
		l.network.listeners[15006].Close()
		const want = "inbound plaintext listener: the socket at [::]:15006 listens no more"
		if err := l.proxy.Check(); fmt.Sprint(err) != want {
			t.Errorf("got %v, want %q", err, want)
		}
		if err := l.dial(15008); err != nil {
			t.Errorf("the others: %v", err)
		}
		l.proxy.Drain()
		time.Sleep(5 * time.Second)
		if err := l.proxy.Check(); err != nil {
			t.Errorf("after Drain: %v", err)
		}
	})
}

// What is not configured is not bound, and a proxy without anything is none.
func TestOptionalListeners(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLone(t, func(c *Config) { *c = inboundOnly(*c) })
		if err := l.proxy.Listen(t.Context()); err != nil {
			t.Fatal(err)
		}
		stop := l.run()
		if err := l.dial(15008); err != nil {
			t.Error(err)
		}
		for _, port := range []uint16{15001, 15006, 15080} {
			if err := l.dial(port); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("port %d: %v, want it refused", port, err)
			}
		}
		stop()

		cfg := inboundOnly(l.proxy.cfg)
		cfg.InboundAddr = netip.AddrPort{}
		if _, err := New(cfg); err == nil {
			t.Error("a proxy without listeners was made")
		}
	})
}

// inboundOnly is the configuration of a self listener.
func inboundOnly(c Config) Config {
	c.OutboundAddr, c.PassthroughAddr, c.SOCKSAddr = netip.AddrPort{}, netip.AddrPort{}, netip.AddrPort{}
	return c
}

// plainHost is a network whose listeners are not transparent, as that of the
// self listener.
type plainHost struct{ *memnet.Host }

func (h plainHost) Listen(ctx context.Context, addr netip.AddrPort) (netns.Listener, error) {
	ln, err := h.Host.Listen(ctx, addr)
	return plainListener{ln}, err
}

type plainListener struct{ netns.Listener }

func (plainListener) Transparent() bool { return false }

// The self listener: HBONE to our own process, under the policies, never from the
// address of the client (the in-pod spec §7.9).
func TestSelfListener(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		client := m.add("client", "10.0.1.2")
		self := m.add("self", "10.0.2.2", withConfig(func(c *Config) {
			*c = inboundOnly(*c)
			c.Network = plainHost{c.Network.(*memnet.Host)}
		}))
		from := make(chan netip.AddrPort, 1)
		m.serve(self.host, self.at(15020), func(c netns.Conn) {
			from <- c.Remote()
			c.Close()
		})
		c := client.mustDial(self.at(15020))
		defer c.Close()
		if got := <-from; got.Addr() != self.addr {
			t.Errorf("the application saw %v, want our own address", got)
		}
		m.policies = []*state.Policy{denyPort(15020)}
		m.push()
		if err := client.request(self.at(15020), "x"); err == nil {
			t.Error("a denied request succeeded")
		}
		if _, err := m.net.Host(client.addr).Dial(m.ctx, netip.Addr{}, self.at(15006)); err == nil {
			t.Error("it listens on 15006")
		}
	})
}
