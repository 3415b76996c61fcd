package memnet_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/proxy/netns/memnet"
)

// A port that is held takes no connection, and nobody else gets it (design D13).
func TestBind(t *testing.T) {
	n := memnet.New(memnet.Config{})
	a, b := n.Host(ipA), n.Host(ipB)
	held, err := b.Bind(t.Context(), any80)
	if err != nil {
		t.Fatal(err)
	}
	if held.Addr() != any80 {
		t.Errorf("got %v, want %v", held.Addr(), any80)
	}
	if _, err := a.Dial(t.Context(), netip.Addr{}, b80); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("before Listen: got %v, want %v", err, syscall.ECONNREFUSED)
	}
	if _, err := b.Listen(t.Context(), any80); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("a second holder: got %v, want %v", err, syscall.EADDRINUSE)
	}
	ln, err := held.Listen(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := held.Listen(t.Context()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("second Listen: got %v, want %v", err, net.ErrClosed)
	}
	if err := held.Close(); err != nil {
		t.Errorf("Close after Listen: %v", err)
	}
	client, server := dialAccept(t, a, ln, b80)
	defer client.Close()
	defer server.Close()
	if !ln.(netns.Checker).Listening() {
		t.Error("says that it doesn't listen")
	}
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	if ln.(netns.Checker).Listening() {
		t.Error("says that it listens, closed")
	}
	again, err := b.Bind(t.Context(), any80)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(again.Close(), again.Close()); err != nil {
		t.Error(err)
	}
	if _, err := again.Listen(t.Context()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Listen after Close: got %v, want %v", err, net.ErrClosed)
	}
	if held, err = b.Bind(t.Context(), any80); err != nil {
		t.Fatal(err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := held.Listen(ended); !errors.Is(err, context.Canceled) {
		t.Errorf("Listen too late: got %v, want %v", err, context.Canceled)
	}
	listen(t, b, any80).Close()
}

func TestListenerDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := memnet.New(memnet.Config{})
		ln := listen(t, n.Host(ipB), any80)
		until := ln.(netns.DeadlineSetter)
		start := time.Now()
		_ = until.SetDeadline(start.Add(time.Second))
		go func() {
			time.Sleep(500 * time.Millisecond)
			_ = until.SetDeadline(start.Add(2 * time.Second)) // also for who waits already
		}()
		_, err := ln.Accept()
		if after := time.Since(start); !errors.Is(err, os.ErrDeadlineExceeded) || after != 2*time.Second {
			t.Errorf("after %v: got %v, want %v after 2s", after, err, os.ErrDeadlineExceeded)
		}
		if _, err := ln.Accept(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("got %v, want %v", err, os.ErrDeadlineExceeded)
		}
		_ = until.SetDeadline(time.Time{})
		client, server := dialAccept(t, n.Host(ipA), ln, b80)
		client.Close()
		server.Close()
		ln.Close()
		if err := until.SetDeadline(time.Time{}); !errors.Is(err, net.ErrClosed) {
			t.Errorf("closed: got %v, want %v", err, net.ErrClosed)
		}
	})
}

// sharers are listeners that share a port of one host.
type sharers struct {
	t      *testing.T
	client *memnet.Host
	lns    [3]netns.Listener
}

// want checks who gets six connections. It must be called in a bubble.
func (s *sharers) want(when string, want [3]int) {
	s.t.Helper()
	for range 6 {
		c, err := s.client.Dial(s.t.Context(), netip.Addr{}, b80)
		if err != nil {
			s.t.Fatal(err)
		}
		defer c.Close()
	}
	var got [3]int
	for i, ln := range s.lns {
		_ = ln.(netns.DeadlineSetter).SetDeadline(time.Now().Add(time.Millisecond))
		for {
			c, err := ln.Accept()
			if err != nil {
				break
			}
			_ = c.Close()
			got[i]++
		}
	}
	if got != want {
		s.t.Errorf("%s: got %v, want %v", when, got, want)
	}
}

func (s *sharers) yield(i int, want bool) {
	s.t.Helper()
	if got, err := s.lns[i].(netns.Yielder).Yield(); err != nil || got != want {
		s.t.Errorf("%d yields: got %v, %v, want %v", i, got, err, want)
	}
}

// Listeners that share a port, and one that yields to the others (design D14).
func TestPortReuse(t *testing.T) { synctest.Test(t, testPortReuse) }

func testPortReuse(t *testing.T) {
	n := memnet.New(memnet.Config{PortReuse: true})
	b := n.Host(ipB)
	s := &sharers{t: t, client: n.Host(ipA)}
	for i := range s.lns {
		held, err := b.Bind(t.Context(), any80)
		if err != nil {
			t.Fatal(err)
		}
		if i > 0 {
			if got, err := s.lns[0].(netns.Yielder).Others(); err != nil || got != i-1 {
				t.Errorf("%d others, %v, want %d: one does not listen yet", got, err, i-1)
			}
		}
		if s.lns[i], err = held.Listen(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	s.want("in turn", [3]int{2, 2, 2})
	s.yield(0, true)
	s.want("the first yields", [3]int{0, 0, 6})
	s.yield(0, true)
	s.want("it yields again", [3]int{0, 6, 0})
	s.lns[0].Close()
	s.want("it closes", [3]int{0, 6, 0})
	s.lns[1].Close()
	s.want("its heir closes", [3]int{0, 0, 6})
	s.yield(2, false)
	if _, err := s.lns[1].(netns.Yielder).Yield(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a closed listener yields: %v", err)
	}
	if _, err := s.lns[1].(netns.Yielder).Others(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("others of a closed listener: %v", err)
	}
	s.lns[2].Close()
	if _, err := s.client.Dial(t.Context(), netip.Addr{}, b80); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("all closed: got %v, want %v", err, syscall.ECONNREFUSED)
	}
}

// The newest socket of a port gets the packets.
func TestPortReusePackets(t *testing.T) {
	n := memnet.New(memnet.Config{PortReuse: true})
	a, b := n.Host(ipA), n.Host(ipB)
	var pcs [2]net.PacketConn
	for i := range pcs {
		var err error
		if pcs[i], err = b.ListenPacket(t.Context(), any80); err != nil {
			t.Fatal(err)
		}
		defer pcs[i].Close()
	}
	from, err := a.ListenPacket(t.Context(), netip.MustParseAddrPort("[::]:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	for i := len(pcs) - 1; i >= 0; i-- { // the newest first
		if _, err := from.WriteTo([]byte{byte(i)}, net.UDPAddrFromAddrPort(b80)); err != nil {
			t.Fatal(err)
		}
		_ = pcs[i].SetReadDeadline(time.Now().Add(time.Second))
		buf := make([]byte, 2)
		if size, _, err := pcs[i].ReadFrom(buf); size != 1 || err != nil || buf[0] != byte(i) {
			t.Errorf("socket %d: got %d, %v", i, size, err)
		}
		_ = pcs[i].Close()
	}
}
