package dns

import (
	"encoding/binary"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

// inTCP runs a test in a bubble with a pod whose nameserver answers slow.<n>.example.
// after n seconds.
func inTCP(t *testing.T, cfg ServerConfig, f func(t *testing.T, n *internet, p *pod)) {
	synctest.Test(t, func(t *testing.T) {
		n := newInternet(t, "nameserver 10.0.0.53\noptions timeout:20\n", func(r *request) {
			var seconds int
			if _, err := fmt.Sscanf(r.name(), "slow.%d.example.", &seconds); err != nil {
				return
			}
			go func() {
				time.Sleep(time.Duration(seconds) * time.Second)
				r.answer(t, dns.RcodeSuccess, r.name()+" 60 IN A 192.0.2.1")
			}()
		})
		if cfg.Store == nil {
			cfg.Store = fixture(t)
		}
		f(t, n, n.newPod(t, cfg))
		time.Sleep(time.Minute) // until the nameserver has no more to say
	})
}

func (c *stub) ask(t testing.TB, names ...string) {
	t.Helper()
	for _, name := range names {
		c.send(t, packed(t, query1(name, dns.TypeA)))
	}
}

// names are those in the questions of the next answers.
func (c *stub) names(t testing.TB, n int) (out []string) {
	t.Helper()
	for range n {
		m := new(dns.Msg)
		raw := c.receive(t)
		if raw == nil {
			return append(out, "end")
		}
		if err := m.Unpack(raw); err != nil {
			t.Fatal(err)
		}
		out = append(out, m.Question[0].Name)
	}
	return out
}

// Answers come in the order of the queries, though nameservers are asked at once.
func TestStreamOrder(t *testing.T) {
	inTCP(t, ServerConfig{}, func(t *testing.T, n *internet, p *pod) {
		c := p.dial(t)
		defer c.Close()
		start := time.Now()
		c.ask(t, "productpage.", "slow.3.example.", "productpage.ns1.", "slow.1.example.", "slow.2.example.", "example.ns2.")
		want := "[productpage. slow.3.example. productpage.ns1. slow.1.example. slow.2.example. example.ns2.]"
		if got := fmt.Sprint(c.names(t, 6)); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
		if d := time.Since(start); d != 3*time.Second {
			t.Errorf("took %v, want that of the slowest", d)
		}
	})
}

// No more than 32 answers wait behind one; the queries after them wait in the
// connection, and are answered, too.
func TestStreamQueue(t *testing.T) {
	inTCP(t, ServerConfig{}, func(t *testing.T, n *internet, p *pod) {
		var asked atomic.Int32
		handle := n.first.handle
		n.first.set(func(r *request) {
			asked.Add(1)
			handle(r)
		})
		c := p.dial(t)
		defer c.Close()
		const all = 50
		for range all {
			c.ask(t, "slow.1.example.")
		}
		synctest.Wait()
		if got := asked.Load(); got != maxQueued+1 {
			t.Errorf("%d are asked at a time, want %d", got, maxQueued+1)
		}
		if got := c.names(t, all); len(got) != all || got[all-1] == "end" {
			t.Errorf("got %d answers: %q", len(got), got)
		}
		equals(t, float64(p.server.pending.taken.Load()), 0)
	})
}

// A client has 5 s for each query, however it spends them, from when it has all its
// answers.
func TestStreamTimeouts(t *testing.T) {
	inTCP(t, ServerConfig{}, func(t *testing.T, n *internet, p *pod) {
		ends := func(c *stub, after time.Duration) {
			t.Helper()
			start := time.Now()
			if got := c.receive(t); got != nil || time.Since(start) != after {
				t.Errorf("got %x after %v, want the end after %v", got, time.Since(start), after)
			}
			c.Close()
		}
		ends(p.dial(t), 5*time.Second)

		c := p.dial(t)
		raw := packed(t, query1("productpage.", dns.TypeA))
		raw = append(binary.BigEndian.AppendUint16(nil, uint16(len(raw))), raw...)
		dripping := make(chan struct{})
		go func() {
			defer close(dripping)
			for _, b := range raw {
				if _, err := c.Write([]byte{b}); err != nil {
					return
				}
				time.Sleep(time.Second)
			}
		}()
		ends(c, 5*time.Second)
		<-dripping

		c = p.dial(t)
		c.ask(t, "slow.8.example.")
		start := time.Now()
		if got := c.names(t, 1); got[0] != "slow.8.example." || time.Since(start) != 8*time.Second {
			t.Errorf("got %q after %v", got, time.Since(start))
		}
		ends(c, 5*time.Second)

		c = p.dial(t)
		for _, name := range []string{"slow.1.example.", "productpage.", "productpage.", "slow.2.example.", "productpage."} {
			c.ask(t, name)
			if got := c.names(t, 1); got[0] != name {
				t.Errorf("got %q, want %q", got, name)
			}
			time.Sleep(4 * time.Second)
		}
		ends(c, time.Second)
	})
}

// A client that has no more to ask gets its answers; one that has gone costs nothing.
func TestStreamHalfClose(t *testing.T) {
	inTCP(t, ServerConfig{}, func(t *testing.T, n *internet, p *pod) {
		c := p.dial(t)
		c.ask(t, "slow.2.example.", "productpage.")
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprint(c.names(t, 3)); got != "[slow.2.example. productpage. end]" {
			t.Errorf("got %s", got)
		}
		c.Close()
		c = p.dial(t)
		c.ask(t, "slow.9.example.")
		synctest.Wait()
		equals(t, float64(p.server.pending.taken.Load()), 1)
		if err := c.Abort(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		equals(t, float64(p.server.pending.taken.Load()), 0)
		equals(t, float64(p.server.cfg.Limits.conns.taken.Load()), 0)
	})
}

// A client that takes no answers is cut off, and holds up nobody.
func TestStreamNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newInternet(t, plainConf, nil)
		p := n.newPod(t, ServerConfig{Store: large(t, "large.com")})
		c := p.dial(t)
		defer c.Close()
		start := time.Now()
		var err error
		query := packed(t, query1("large.com.", dns.TypeA))
		query = append(binary.BigEndian.AppendUint16(nil, uint16(len(query))), query...)
		for range 100_000 {
			if _, err = c.Write(query); err != nil {
				break
			}
		}
		if err == nil || time.Since(start) != streamWait {
			t.Errorf("%v after %v, want to be cut off after %v", err, time.Since(start), streamWait)
		}
		synctest.Wait()
		equals(t, float64(p.server.cfg.Limits.conns.taken.Load()), 0)
	})
}

// Long answers that wait for their turn, found or not, are counted: what a client
// makes us keep without reading is bounded for the pod, not for each connection.
func TestStreamMemory(t *testing.T) {
	const behind = 20 // answers, of one connection
	for name, asked := range map[string]string{"forwarded": "slow.0.example.", "local": "large.com."} {
		t.Run(name, func(t *testing.T) {
			inTCP(t, ServerConfig{Store: large(t, "large.com")}, func(t *testing.T, n *internet, p *pod) {
				var clients []*stub
				for range 2 + maxPending/(1+behind) {
					c := p.dial(t)
					defer c.Close()
					clients = append(clients, c)
					c.ask(t, "slow.3.example.")
					synctest.Wait()
					for range behind {
						c.ask(t, asked)
					}
					synctest.Wait()
				}
				equals(t, float64(p.server.pending.taken.Load()), maxPending)
				if got := p.log.count("DNS queries are refused"); got != 1 {
					t.Errorf("%d warnings, want 1", got)
				}
				if got := clients[0].names(t, 1+behind); got[behind] != asked {
					t.Errorf("got %q, want all answers", got)
				}
				for _, c := range clients[1:] {
					c.names(t, 1+behind)
				}
				synctest.Wait()
				equals(t, float64(p.server.pending.taken.Load()), 0)
				equals(t, float64(p.server.cfg.Limits.pending.taken.Load()), 0)
			})
		})
	}
}

// One pod has so many connections; more wait for their turn. When all pods have as
// many as there may be, more are refused.
func TestStreamLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newInternet(t, plainConf, nil)
		limits := NewLimits(0, maxConns+3)
		p := n.newPod(t, ServerConfig{Store: fixture(t), Limits: limits})
		other := n.newOtherPod(t, ServerConfig{Store: fixture(t), Limits: limits})
		for range maxConns {
			defer p.dial(t).Close()
		}
		synctest.Wait()
		start := time.Now()
		late := p.dial(t)
		defer late.Close()
		late.ask(t, "productpage.")
		for range 2 {
			defer other.dial(t).Close()
		}
		synctest.Wait()
		refused := other.dial(t)
		defer refused.Close()
		if got := refused.receive(t); got != nil || time.Since(start) != 0 {
			t.Errorf("one too many: got %x after %v", got, time.Since(start))
		}
		if got := told(p.ask(t, "udp", query1("productpage.", dns.TypeA))); !strings.HasPrefix(got, "AA") {
			t.Errorf("udp: got %q", got)
		}
		if got := late.names(t, 1); got[0] != "productpage." || time.Since(start) != streamWait {
			t.Errorf("got %q after %v, want to wait %v", got, time.Since(start), streamWait)
		}
	})
}
