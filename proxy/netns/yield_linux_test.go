package netns

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// generation is the listener of one proxy among several that share a port.
type generation struct {
	t        *testing.T
	name     string
	ln       Listener
	accepted atomic.Int64
	draining atomic.Bool
	done     chan struct{}
}

// sharers makes the generations of one port, each of which echoes one byte.
type sharers struct {
	t    *testing.T
	ns   *os.File
	pod  *Pod // from where connections come
	addr netip.AddrPort
	all  []*generation
}

func newSharers(t *testing.T, addr string) *sharers {
	ns := newNamespace(t)
	return &sharers{t: t, ns: ns, pod: newPod(t, ns, PodConfig{Mark: testMark}), addr: netip.MustParseAddrPort(addr)}
}

func (s *sharers) start(name string) *generation { return s.startOn(name, s.addr) }

func (s *sharers) startOn(name string, addr netip.AddrPort) *generation {
	s.t.Helper()
	p := newPod(s.t, s.ns, PodConfig{Mark: testMark, PortReuse: true, IPv6Enabled: true})
	g := &generation{t: s.t, name: name, ln: listen(s.t, p, addr), done: make(chan struct{})}
	s.t.Cleanup(g.close)
	go g.serve()
	s.all = append(s.all, g)
	return g
}

func (g *generation) serve() {
	defer close(g.done)
	var conns sync.WaitGroup
	defer conns.Wait()
	for {
		c, err := g.ln.Accept()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) && !errors.Is(err, os.ErrDeadlineExceeded) {
				g.t.Errorf("%s: accept: %v", g.name, err)
			}
			return
		}
		g.accepted.Add(1)
		if g.draining.Load() {
			g.quiet()
		}
		conns.Go(func() {
			defer c.Close()
			_, _ = io.CopyN(c, c, 1)
			_, _ = c.Read(make([]byte, 1)) // the client closes first
		})
	}
}

func (g *generation) close() {
	_ = g.ln.Close()
	<-g.done
}

// drain accepts until nothing has come for a while, and closes.
func (g *generation) drain() {
	g.draining.Store(true)
	g.quiet()
	<-g.done
	_ = g.ln.Close()
}

func (g *generation) quiet() {
	if err := g.ln.(DeadlineSetter).SetDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
		g.t.Errorf("%s: %v", g.name, err)
	}
}

func (g *generation) yield(want bool) {
	g.t.Helper()
	got, err := g.ln.(Yielder).Yield()
	if err != nil || got != want {
		g.t.Errorf("%s: Yield: got %v, %v, want %v", g.name, got, err, want)
	}
}

// exchange makes one connection and sends a byte there and back.
func (s *sharers) exchange(dst netip.AddrPort) error {
	c, err := s.pod.Dial(s.t.Context(), netip.Addr{}, dst)
	if err != nil {
		return err
	}
	defer c.Abort()
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	b := []byte{1}
	if _, err := c.Write(b); err != nil {
		return err
	}
	if _, err := io.ReadFull(c, b); err != nil {
		return err
	}
	return nil
}

func (s *sharers) exchanges(n int, dst netip.AddrPort) {
	s.t.Helper()
	for i := range n {
		if err := s.exchange(dst); err != nil {
			s.t.Fatalf("connection %d to %v: %v", i, dst, err)
		}
	}
}

// wantAll checks that n new connections to dst all reach one of to.
func (s *sharers) wantAll(n int, dst netip.AddrPort, to ...*generation) {
	s.t.Helper()
	before := make([]int64, len(s.all))
	for i, g := range s.all {
		before[i] = g.accepted.Load()
	}
	s.exchanges(n, dst)
	var got []string
	there := 0
	for i, g := range s.all {
		d := int(g.accepted.Load() - before[i])
		got = append(got, fmt.Sprintf("%s %d", g.name, d))
		if slices.Contains(to, g) {
			there += d
		}
	}
	if there != n {
		s.t.Errorf("%d connections to %v reached %v", n, dst, got)
	}
}

// D14: after Yield every new connection reaches the other one, whoever of the two
// yields.
func TestYieldBetweenTwo(t *testing.T) {
	for _, tc := range []struct {
		addr string
		dst  []string
	}{
		{"[::]:15008", []string{"10.1.0.1:15008", "[fd00::1]:15008", "127.0.0.1:15008"}},
		{"0.0.0.0:15008", []string{"10.1.0.1:15008", "127.0.0.1:15008"}},
		{"127.0.0.1:15053", []string{"127.0.0.1:15053"}},
		{"[::1]:15053", []string{"[::1]:15053"}},
	} {
		for _, rollback := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s rollback=%v", tc.addr, rollback), func(t *testing.T) {
				s := newSharers(t, tc.addr)
				stays := s.start("first")
				goes := stays
				if rollback {
					goes = s.start("second")
				} else {
					stays.yield(false)
					stays = s.start("second")
				}
				for _, g := range s.all {
					if n, err := g.ln.(Yielder).Others(); err != nil || n != 1 {
						t.Errorf("%s: others: got %d, %v, want 1", g.name, n, err)
					}
				}
				goes.yield(true)
				goes.yield(true)
				for _, dst := range tc.dst {
					s.wantAll(2000/len(tc.dst), netip.MustParseAddrPort(dst), stays)
				}
				goes.drain()
				stays.yield(false)
				if n, err := stays.ln.(Yielder).Others(); err != nil || n != 0 {
					t.Errorf("alone: others: got %d, %v, want 0", n, err)
				}
				for _, dst := range tc.dst {
					s.wantAll(10, netip.MustParseAddrPort(dst), stays)
				}
			})
		}
	}
}

// Three generations, also when the order of the listeners is not that of their
// numbers any more: the last takes the number of the one that closes.
func TestYieldAmongThree(t *testing.T) {
	const nobody = 3
	dst := netip.MustParseAddrPort("10.1.0.1:15008")
	for _, addr := range []string{"[::]:15008", "0.0.0.0:15008"} {
		for _, tc := range []struct{ closes, yields, number int }{
			{nobody, 0, 0}, {nobody, 1, 1}, {nobody, 2, 2},
			{0, 1, 1}, {0, 2, 0},
			{1, 0, 0}, {1, 2, 1},
			{2, 0, 0}, {2, 1, 1},
		} {
			t.Run(fmt.Sprintf("%s %d closes, %d yields", addr, tc.closes, tc.yields), func(t *testing.T) {
				s := newSharers(t, addr)
				for _, name := range []string{"0", "1", "2"} {
					s.start(name)
				}
				var others []*generation
				for i, g := range s.all {
					switch i {
					case tc.closes:
						g.close()
					case tc.yields:
					default:
						others = append(others, g)
					}
				}
				goes := s.all[tc.yields]
				goes.yield(true)
				if y := &goes.ln.(*tcpListener).yielding; y.index != tc.number || !y.sure {
					t.Errorf("number %d, sure %v, want %d", y.index, y.sure, tc.number)
				}
				s.wantAll(200, dst, others...)
				goes.yield(true) // to another one, if there is
				s.wantAll(200, dst, others...)
			})
		}
	}
}

// Where probes don't get through, the order of the listeners is believed, and if
// that is wrong the next call tries another number.
func TestYieldWithoutProbes(t *testing.T) {
	dst := netip.MustParseAddrPort("10.1.0.1:15008")
	s := newSharers(t, "0.0.0.0:15008")
	command(t, s.ns, "iptables -A INPUT -p tcp --tcp-flags RST RST --sport 0 -j DROP")
	first, second, third := s.start("0"), s.start("1"), s.start("2")
	third.close()
	first.yield(true)
	if first.ln.(*tcpListener).yielding.sure {
		t.Error("is sure of its number")
	}
	s.wantAll(200, dst, second)
	third = s.start("2")
	first.close() // the numbers are 2, 1
	second.yield(true)
	s.wantAll(20, dst, second)
	second.yield(true)
	s.wantAll(200, dst, third)
}

// Programs that a generation leaves behind are no trap for the next ones.
func TestYieldGenerations(t *testing.T) {
	s := newSharers(t, "[::]:15008")
	dst := netip.MustParseAddrPort("10.1.0.1:15008")
	a, b := s.start("a"), s.start("b")
	a.yield(true)
	a.drain()
	s.wantAll(50, dst, b)
	c := s.start("c")
	s.wantAll(50, dst, b, c)
	c.yield(true) // rolled back
	s.wantAll(50, dst, b)
	c.drain()
	s.wantAll(50, dst, b)
	d := s.start("d")
	s.wantAll(50, dst, b, d)
	b.yield(true)
	s.wantAll(50, dst, d)
	e := s.start("e") // before b has closed
	s.wantAll(50, dst, d, e)
	b.drain()
	s.wantAll(50, dst, d, e)
	d.close() // dies
	s.wantAll(50, dst, e)
	f := s.start("f")
	e.yield(true)
	s.wantAll(50, dst, f)
	e.drain()
	s.wantAll(50, dst, f)
}

// One generation had IPv6, the other had not: two groups on one port.
func TestYieldToOtherFamily(t *testing.T) {
	v4, v6 := netip.MustParseAddrPort("10.1.0.1:15008"), netip.MustParseAddrPort("[fd00::1]:15008")
	t.Run("from IPv4 to both", func(t *testing.T) {
		s := newSharers(t, "[::]:15008")
		old := s.startOn("old", wildcard4(15008))
		dual := s.start("dual")
		s.wantAll(50, v6, dual)
		old.yield(true)
		old.yield(true)
		s.wantAll(2000, v4, dual)
		dual.close()
		old.yield(false) // and takes connections again
		s.wantAll(50, v4, old)
	})
	t.Run("from both to IPv4", func(t *testing.T) {
		s := newSharers(t, "[::]:15008")
		dual := s.start("dual")
		next := s.startOn("next", wildcard4(15008))
		dual.yield(true)
		s.wantAll(2000, v4, next)
		s.wantAll(50, v6, dual) // there is nobody else
	})
}

func TestYieldWithoutGroup(t *testing.T) {
	ln := listen(t, NewHost(HostConfig{OriginalSource: OriginalSourceOff}), localhost)
	y := ln.(Yielder)
	if there, err := y.Yield(); there || err != nil {
		t.Errorf("alone: got %v, %v", there, err)
	}
	if n, err := y.Others(); n != 0 || err != nil {
		t.Errorf("alone: %d others, %v", n, err)
	}
	_ = ln.Close()
	if _, err := y.Yield(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed: got %v, want %v", err, net.ErrClosed)
	}
	if _, err := y.Others(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed: got %v, want %v", err, net.ErrClosed)
	}
}

// What comes while one yields, empties its queue and closes is not lost.
func TestYieldUnderLoad(t *testing.T) {
	for _, addr := range []string{"[::]:15008", "0.0.0.0:15008"} {
		t.Run(addr, func(t *testing.T) {
			s := newSharers(t, addr)
			stop := make(chan struct{})
			var clients sync.WaitGroup
			var failed, made atomic.Int64
			last := s.start("0")
			for i := range 4 {
				dst := netip.MustParseAddrPort([]string{"10.1.0.1:15008", "127.0.0.1:15008"}[i%2])
				clients.Go(func() {
					for {
						select {
						case <-stop:
							return
						default:
						}
						made.Add(1)
						if err := s.exchange(dst); err != nil {
							failed.Add(1)
							t.Errorf("a connection to %v: %v", dst, err)
							return
						}
					}
				})
			}
			for i := range 8 {
				next := s.start(fmt.Sprint(i + 1))
				if i%3 == 2 { // the new one goes
					last, next = next, last
				}
				last.yield(true)
				last.drain()
				last = next
			}
			close(stop)
			clients.Wait()
			t.Logf("%d connections", made.Load())
			if made.Load() < 100 {
				t.Errorf("only %d connections were made", made.Load())
			}
		})
	}
}
