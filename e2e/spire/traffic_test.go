//go:build e2e

package spire

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/world"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

const greeting = "hello world"

// try is one new connection from the client's application to the server's.
func (m *mesh) try() error {
	c, err := m.Client.Net.Dial(m.Ctx, netip.Addr{}, m.Server.At(world.ChatPort))
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(15 * time.Second)); err != nil {
		return err
	}
	return world.Exchange(c, greeting, greeting)
}

// works waits until new connections work.
func (m *mesh) works() {
	m.T.Helper()
	world.Eventually(m.T, m.Ctx, 20*time.Second, m.try)
}

// refuses waits until new connections fail: by an end, not by silence.
func (m *mesh) refuses() {
	m.T.Helper()
	world.Eventually(m.T, m.Ctx, 20*time.Second, func() error {
		switch err := m.try(); {
		case err == nil:
			return errors.New("a connection works")
		case errors.Is(err, os.ErrDeadlineExceeded):
			return fmt.Errorf("a connection hangs: %w", err)
		}
		return nil
	})
}

// checkTraffic sends traffic and looks at what both proxies say of who spoke
// with whom.
func (m *mesh) checkTraffic() {
	t := m.T
	t.Helper()
	c := m.Dial(world.DoublePort)
	if err := world.Exchange(c, greeting, greeting+greeting); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	line := world.Fields{
		"message": "connection complete", "scope": "access", "error": "",
		"src.identity": m.Client.Identity(), "dst.identity": m.Server.Identity(),
		"dst.hbone_addr": m.Server.At(world.DoublePort).String(),
	}
	line["direction"] = "outbound"
	m.Source.Expect(m.Ctx, line)
	line["direction"] = "inbound"
	m.Dest.Expect(m.Ctx, line)
	labels := map[string]string{"connection_security_policy": "mutual_tls", "reporter": "destination", "source_principal": m.Client.Identity()}
	if n, err := m.Dest.Metric("istio_tcp_connections_opened_total", labels); err != nil || n == 0 {
		t.Errorf("no connection of %s is counted as mutual TLS: %v, %v", m.Client.Identity(), n, err)
	}
}

// fleet are connections that say something and hear it back, again and again.
type fleet struct {
	m     *mesh
	stop  chan struct{}
	tasks sync.WaitGroup

	mu     sync.Mutex // guards what follows
	rounds []int
	lost   []error
}

// openFleet opens n connections, which all live until checkFleet.
func (m *mesh) openFleet(n int, pause time.Duration) *fleet {
	m.T.Helper()
	f := &fleet{m: m, stop: make(chan struct{}), rounds: make([]int, n)}
	conns := make([]netns.Conn, n)
	for i := range conns {
		c, err := m.Client.Net.Dial(m.Ctx, netip.Addr{}, m.Server.At(world.ChatPort))
		if err != nil {
			m.T.Fatal(err)
		}
		m.T.Cleanup(func() { _ = c.Close() })
		conns[i] = c
	}
	for i, c := range conns {
		f.tasks.Go(func() { f.sail(i, c, pause) })
	}
	m.T.Cleanup(f.end)
	world.Eventually(m.T, m.Ctx, 30*time.Second, func() error { return f.heard(1) })
	return f
}

// sail is one connection.
func (f *fleet) sail(i int, c netns.Conn, pause time.Duration) {
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for n := 1; ; n++ {
		text := fmt.Sprintf("%d/%d.", i, n)
		err := c.SetDeadline(time.Now().Add(20 * time.Second))
		if err == nil {
			err = world.Exchange(c, text, text)
		}
		f.mu.Lock()
		if err != nil {
			f.lost = append(f.lost, fmt.Errorf("connection %d, message %d, at %s: %w", i, n, time.Now().UTC().Format(time.TimeOnly), err))
		} else {
			f.rounds[i] = n
		}
		f.mu.Unlock()
		if err != nil {
			return
		}
		select {
		case <-tick.C:
		case <-f.stop:
			return
		}
	}
}

// heard says whether every connection has had n answers, counted from the start,
// and none was lost.
func (f *fleet) heard(n int) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.lost) > 0 {
		return fmt.Errorf("%d of %d connections lost, first %w", len(f.lost), len(f.rounds), f.lost[0])
	}
	for i, r := range f.rounds {
		if r < n {
			return fmt.Errorf("connection %d has heard %d answers, want %d", i, r, n)
		}
	}
	return nil
}

// leastRounds is what the slowest connection has heard.
func (f *fleet) leastRounds() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	least := f.rounds[0]
	for _, r := range f.rounds {
		least = min(least, r)
	}
	return least
}

// check has every connection speak once more and fails the test if one was lost.
func (f *fleet) check() {
	f.m.T.Helper()
	world.Eventually(f.m.T, f.m.Ctx, 30*time.Second, func() error { return f.heard(f.leastRounds()) })
	goal := 0
	f.mu.Lock()
	for _, r := range f.rounds {
		goal = max(goal, r+1)
	}
	f.mu.Unlock()
	world.Eventually(f.m.T, f.m.Ctx, 30*time.Second, func() error { return f.heard(goal) })
}

// allLost waits until every connection has ended.
func (f *fleet) allLost(limit time.Duration) {
	f.m.T.Helper()
	world.Eventually(f.m.T, f.m.Ctx, limit, func() error {
		f.mu.Lock()
		defer f.mu.Unlock()
		if len(f.lost) < len(f.rounds) {
			return fmt.Errorf("%d of %d connections still live", len(f.rounds)-len(f.lost), len(f.rounds))
		}
		return nil
	})
}

func (f *fleet) end() {
	select {
	case <-f.stop:
	default:
		close(f.stop)
	}
	f.tasks.Wait()
}

// arrivals are new connections, one after the other, at a bounded rate.
type arrivals struct {
	m    *mesh
	stop chan struct{}
	done chan struct{}

	mu     sync.Mutex // guards what follows
	number int
	failed []error
}

// arrive begins; it ends with check, or with the test.
func (m *mesh) arrive(pause time.Duration) *arrivals {
	a := &arrivals{m: m, stop: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(a.done)
		tick := time.NewTicker(pause)
		defer tick.Stop()
		for {
			err := m.try()
			a.mu.Lock()
			a.number++
			if err != nil {
				a.failed = append(a.failed, fmt.Errorf("connection %d, at %s: %w", a.number, time.Now().UTC().Format(time.TimeOnly), err))
			}
			a.mu.Unlock()
			select {
			case <-tick.C:
			case <-a.stop:
				return
			}
		}
	}()
	m.T.Cleanup(func() { _ = a.end() })
	return a
}

func (a *arrivals) end() int {
	select {
	case <-a.stop:
	default:
		close(a.stop)
	}
	<-a.done
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.number
}

// check ends the arrivals and fails the test if one did not work.
func (a *arrivals) check() {
	a.m.T.Helper()
	n := a.end()
	if len(a.failed) > 0 {
		a.m.T.Errorf("%d of %d new connections failed, first %v", len(a.failed), n, a.failed[0])
	}
	a.m.T.Logf("%d new connections, all good", n-len(a.failed))
}
