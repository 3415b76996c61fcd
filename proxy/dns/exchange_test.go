package dns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

// Messages that are not the answer are passed over: the real one, which comes
// after them, counts. By TCP they end the try.
func TestPoison(t *testing.T) {
	const host = "victim.example."
	evil := func(r *request, change func(*dns.Msg)) []byte {
		m := r.reply(t, dns.RcodeSuccess, host+" 3600 IN A 203.0.113.66")
		change(m)
		return packed(t, m)
	}
	from := func(spy net.PacketConn) func(r *request) {
		return func(r *request) { _, _ = spy.WriteTo(evil(r, func(*dns.Msg) {}), r.from) }
	}
	for name, attack := range map[string]func(n *internet) func(r *request){
		"ID": func(*internet) func(*request) { return changed(evil, func(m *dns.Msg) { m.Id++ }) },
		"name": func(*internet) func(*request) {
			return changed(evil, func(m *dns.Msg) { m.Question[0].Name = "w" + host[1:] })
		},
		"longer name": func(*internet) func(*request) {
			return changed(evil, func(m *dns.Msg) { m.Question[0].Name = "x." + host })
		},
		"type": func(*internet) func(*request) {
			return changed(evil, func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeTXT })
		},
		"class": func(*internet) func(*request) {
			return changed(evil, func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS })
		},
		"no response": func(*internet) func(*request) { return changed(evil, func(m *dns.Msg) { m.Response = false }) },
		"opcode":      func(*internet) func(*request) { return changed(evil, func(m *dns.Msg) { m.Opcode = dns.OpcodeNotify }) },
		"no question": func(*internet) func(*request) { return changed(evil, func(m *dns.Msg) { m.Question = nil }) },
		"two questions": func(*internet) func(*request) {
			return changed(evil, func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) })
		},
		"short":   func(*internet) func(*request) { return func(r *request) { r.send(r.raw[:5]) } },
		"empty":   func(*internet) func(*request) { return func(r *request) { r.send(nil) } },
		"cut off": func(*internet) func(*request) { return func(r *request) { r.send(evil(r, func(*dns.Msg) {})[:20]) } },
		"address": func(n *internet) func(*request) {
			return from(n.socket(netip.AddrPortFrom(spyIP, port)))
		},
		"port": func(n *internet) func(*request) {
			return from(n.socket(netip.AddrPortFrom(firstIP, 5353)))
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newInternet(t, plainConf, nil)
				n.resolver = n.newResolver(ResolverConfig{})
				attack, honest := attack(n), zone(t, host+" 60 IN A 192.0.2.1")
				n.first.set(func(r *request) {
					for range 3 {
						attack(r)
					}
					honest(r)
				})
				start := time.Now()
				n.expect(host, "192.0.2.1")
				if d := time.Since(start); d != 0 {
					t.Errorf("took %v: the attack has cost the try", d)
				}
				if name == "address" || name == "port" {
					return
				}
				n.write("resolv.conf", plainConf+"options use-vc\n")
				time.Sleep(time.Second)
				if got, err := n.resolver.Lookup(t.Context(), host); err == nil {
					t.Errorf("by TCP: got %v, want an error", got)
				}
			})
		})
	}
}

func changed(evil func(*request, func(*dns.Msg)) []byte, change func(*dns.Msg)) func(*request) {
	return func(r *request) { r.send(evil(r, change)) }
}

func (n *internet) socket(addr netip.AddrPort) net.PacketConn {
	n.t.Helper()
	pc, err := n.net.Host(addr.Addr()).ListenPacket(n.t.Context(), addr)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { pc.Close() })
	return pc
}

// Records that the question does not lead to are not believed, whatever the
// section.
func TestBailiwick(t *testing.T) {
	n := newInternet(t, plainConf, func(r *request) {
		m := r.reply(t, dns.RcodeSuccess,
			"other.example. 60 IN A 203.0.113.1", "a.example. 60 CH A 203.0.113.2", "a.example. 60 IN AAAA 2001:db8::66",
			"A.Example. 60 IN CNAME b.example.", "a.example. 60 IN CNAME c.example.", "c.example. 60 IN A 203.0.113.3",
			"a.example. 60 IN A 203.0.113.4", "B.example. 60 IN A 192.0.2.1", "b.example. 60 IN A 0.0.0.0", "b.example. 60 IN A 224.0.0.1",
			"b.example. 60 CH A 203.0.113.5")
		m.Extra = m.Answer[:1]
		r.send(packed(t, m))
	})
	n.resolver = n.newResolver(ResolverConfig{})
	n.expect("a.example.", "192.0.2.1")
	n.first.questions()
	if got, err := n.resolver.Lookup(t.Context(), "other2.example."); err == nil && len(got) > 0 {
		t.Errorf("got %v, want none", got)
	}
	n.resolver.mu.Lock()
	defer n.resolver.mu.Unlock()
	for k := range n.resolver.cache.byKey {
		if k.name != "a.example." && k.name != "other2.example." {
			t.Errorf("%v is kept, which nobody has asked for", k)
		}
	}
}

// A name that does not exist has no addresses, whatever else the answer holds.
func TestAbsentWithAddresses(t *testing.T) {
	n := newInternet(t, plainConf, func(r *request) { r.answer(t, dns.RcodeNameError, r.name()+" 60 IN A 203.0.113.1") })
	n.resolver = n.newResolver(ResolverConfig{})
	if got, err := n.resolver.Lookup(t.Context(), "a.example."); !errors.Is(err, ErrNoSuchHost) {
		t.Errorf("got %v, %v, want %v", got, err, ErrNoSuchHost)
	}
}

// A nameserver may return the name in other letters.
func TestCaseOfTheAnswer(t *testing.T) {
	n := newInternet(t, plainConf, func(r *request) {
		m := r.reply(t, dns.RcodeSuccess, "A.EXAMPLE. 60 IN A 192.0.2.1")
		m.Question[0].Name = "A.eXample."
		r.send(packed(t, m))
	})
	n.resolver = n.newResolver(ResolverConfig{})
	n.expect("a.example.", "192.0.2.1")
}

// Every try has an ID and a port of its own, which cannot be guessed.
func TestUnpredictable(t *testing.T) {
	n := newInternet(t, plainConf, reflected(t))
	n.resolver = n.newResolver(ResolverConfig{})
	const tries = 300
	for i := range tries {
		n.expect(fmt.Sprintf("10.9.%d.%d.reflect.internal.", i/200, i%200), fmt.Sprintf("10.9.%d.%d", i/200, i%200))
	}
	n.first.mu.Lock()
	defer n.first.mu.Unlock()
	high, steps := 0, map[uint16]int{}
	for i, id := range n.first.ids {
		if id >= 1<<15 {
			high++
		}
		if i > 0 {
			steps[id-n.first.ids[i-1]]++
		}
	}
	if len(n.first.ids) != tries || high < tries/4 || high > tries*3/4 {
		t.Errorf("%d of %d IDs are in the upper half", high, len(n.first.ids))
	}
	for step, c := range steps {
		if c > 5 {
			t.Errorf("%d IDs are %d above the one before", c, step)
		}
	}
	slices.Sort(n.first.ports)
	if c := len(slices.Compact(n.first.ports)); c != tries {
		t.Errorf("%d ports, want %d", c, tries)
	}
}

// What does not fit into a datagram comes by TCP, also when the datagram is as
// long as our buffer.
func TestTruncated(t *testing.T) {
	var records []string
	for i := range 2000 {
		records = append(records, fmt.Sprintf("huge.example. 60 IN A 10.1.%d.%d", i/250, i%250))
	}
	for name, udp := range map[string]func(r *request){
		"truncated": func(r *request) { r.answer(t, dns.RcodeSuccess, records...) },
		"empty": func(r *request) {
			m := r.reply(t, dns.RcodeSuccess)
			m.Truncated = true
			r.send(packed(t, m))
		},
		"too long": func(r *request) { r.send(packed(t, r.reply(t, dns.RcodeSuccess, records...))) },
	} {
		t.Run(name, func(t *testing.T) {
			n := newInternet(t, plainConf, func(r *request) {
				if r.proto == "udp" {
					udp(r)
					return
				}
				r.answer(t, dns.RcodeSuccess, records...)
			})
			n.resolver = n.newResolver(ResolverConfig{})
			got, err := n.resolver.Lookup(t.Context(), "huge.example.")
			if err != nil || len(got) != maxAddrs {
				t.Errorf("got %d addresses, %v, want %d", len(got), err, maxAddrs)
			}
			equalQuestions(t, n.first, "tcp A huge.example.", "udp A huge.example.")
		})
	}
}

func TestOptions(t *testing.T) {
	n := newInternet(t, "nameserver 10.0.0.53\noptions use-vc edns0\n", func(r *request) {
		if opt := r.IsEdns0(); opt == nil || opt.UDPSize() != ednsPayload || opt.Do() {
			t.Errorf("OPT is %v", opt)
		}
		reflected(t)(r)
	})
	n.resolver = n.newResolver(ResolverConfig{})
	n.expect("192.0.2.1.reflect.internal.", "192.0.2.1")
	equalQuestions(t, n.first, "tcp A 192.0.2.1.reflect.internal.")
}

// Who cannot be reached, is silent or can't tell is passed over for the next
// nameserver, and the one that has answered comes first from then on.
func TestFailover(t *testing.T) {
	const conf = "nameserver 10.0.0.53\nnameserver 10.0.0.54\noptions timeout:5\n"
	for _, tt := range []struct {
		name   string
		handle func(r *request)
		took   time.Duration
	}{
		{"silent", nil, stagger},
		{"SERVFAIL", func(r *request) { r.answer(t, dns.RcodeServerFailure) }, 0},
		{"REFUSED", func(r *request) { r.answer(t, dns.RcodeRefused) }, 0},
		{"garbage", func(r *request) { r.send([]byte("garbage")) }, stagger},
		{"guessing", func(r *request) {
			if r.proto == "udp" {
				for range maxStrays {
					r.send([]byte("garbage"))
				}
			}
		}, stagger},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newInternet(t, conf, tt.handle)
				n.next.set(reflected(t))
				n.resolver = n.newResolver(ResolverConfig{})
				start := time.Now()
				n.expect("192.0.2.1.reflect.internal.", "192.0.2.1")
				if d := time.Since(start); d != tt.took {
					t.Errorf("took %v, want %v", d, tt.took)
				}
				n.first.questions()
				n.expect("192.0.2.2.reflect.internal.", "192.0.2.2")
				equalQuestions(t, n.first)
			})
		})
	}
}

// Two nameservers are asked at a time, the second one when the first is late.
func TestStagger(t *testing.T) {
	for _, tt := range []struct {
		name   string
		handle func(*request)
		took   time.Duration
	}{
		{"silence", nil, 5 * time.Second},
		{"a late failure", func(r *request) {
			time.Sleep(stagger / 2)
			r.answer(t, dns.RcodeServerFailure)
		}, stagger / 2 * 3},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newInternet(t, "nameserver 10.0.0.53\nnameserver 10.0.0.54\nnameserver 10.0.0.66\n", tt.handle)
				n.next.set(nil)
				n.serve(spyIP, reflected(t))
				n.resolver = n.newResolver(ResolverConfig{})
				start := time.Now()
				n.expect("192.0.2.1.reflect.internal.", "192.0.2.1")
				if d := time.Since(start); d != tt.took {
					t.Errorf("took %v, want %v", d, tt.took)
				}
			})
		})
	}
}

// A flood of guesses is answered by asking through TCP.
func TestGuessing(t *testing.T) {
	n := newInternet(t, plainConf, func(r *request) {
		if r.proto == "udp" {
			for range 100 {
				r.send([]byte("guess"))
			}
			return
		}
		reflected(t)(r)
	})
	n.resolver = n.newResolver(ResolverConfig{})
	n.expect("192.0.2.1.reflect.internal.", "192.0.2.1")
	equalQuestions(t, n.first, "tcp A 192.0.2.1.reflect.internal.", "udp A 192.0.2.1.reflect.internal.")
}

// The time that silence costs is bounded by resolv.conf and by the caller.
func TestTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newInternet(t, "nameserver 10.0.0.53\nnameserver 10.0.0.54\noptions timeout:3 attempts:2\n", nil)
		start := time.Now()
		if _, err := n.resolver.Lookup(t.Context(), "a.example."); !errors.Is(err, errNoAnswer) || !strings.Contains(err.Error(), "nameserver 10.0.0.5") {
			t.Errorf("got %v, want %v", err, errNoAnswer)
		}
		if d := time.Since(start); d != 2*(3*time.Second+stagger) {
			t.Errorf("took %v, want %v", d, 2*(3*time.Second+stagger))
		}
		time.Sleep(2 * failureTTL)
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		start = time.Now()
		if _, err := n.resolver.Lookup(ctx, "a.example."); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want %v", err, context.DeadlineExceeded)
		}
		if d := time.Since(start); d != 2*time.Second {
			t.Errorf("took %v, want 2s", d)
		}
		n.resolver.mu.Lock()
		defer n.resolver.mu.Unlock()
		if len(n.resolver.flights) != 0 || len(n.resolver.slots) != 0 {
			t.Errorf("%d flights, %d slots are left", len(n.resolver.flights), len(n.resolver.slots))
		}
	})
}

// TCP that accepts and says nothing, or less than it announced, ends in time.
func TestStalledStream(t *testing.T) {
	for name, say := range map[string]string{"nothing": "", "less": "\x00\x20abc", "little": "\x00"} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newInternet(t, "nameserver 10.0.0.54\noptions use-vc timeout:2 attempts:1\n", nil)
				n.resolver = n.newResolver(ResolverConfig{Dial: func(ctx context.Context, network string, addr netip.AddrPort) (net.Conn, error) {
					a, b := net.Pipe()
					go func() {
						buf := make([]byte, 1024)
						_, _ = b.Read(buf)
						_, _ = b.Write([]byte(say))
						for {
							if _, err := b.Read(buf); err != nil {
								b.Close()
								return
							}
						}
					}()
					return a, nil
				}})
				start := time.Now()
				if got, err := n.resolver.Lookup(t.Context(), "a.example."); !errors.Is(err, errNoAnswer) {
					t.Errorf("got %v, %v, want %v", got, err, errNoAnswer)
				}
				if d := time.Since(start); d != 2*time.Second {
					t.Errorf("took %v, want 2s", d)
				}
			})
		})
	}
}

// A nameserver that drops the questions for one family costs the first caller a
// moment, and those after it nothing for a while.
func TestOneFamilyDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		records := zone(t, "a.example. 60 IN A 192.0.2.1", "a.example. 60 IN AAAA 2001:db8::1")
		var answers atomic.Bool
		n := newInternet(t, plainConf, func(r *request) {
			if answers.Load() || r.Question[0].Qtype == dns.TypeA {
				records(r)
			}
		})
		for _, want := range []time.Duration{secondFamily, 0, 0} {
			start := time.Now()
			n.expect("a.example", "192.0.2.1")
			if d := time.Since(start); d != want {
				t.Errorf("took %v, want %v", d, want)
			}
		}
		answers.Store(true)
		time.Sleep(lateTTL)
		n.expect("a.example", "192.0.2.1", "2001:db8::1")
	})
}

// All nameservers that can't tell: the error says what they said.
func TestAllLame(t *testing.T) {
	n := newInternet(t, "nameserver 10.0.0.53\nnameserver 10.0.0.54\nsearch example\n", func(r *request) { r.answer(t, dns.RcodeRefused) })
	if _, err := n.resolver.Lookup(t.Context(), "a"); err == nil || !strings.Contains(err.Error(), "REFUSED") {
		t.Errorf("got %v, want REFUSED", err)
	}
	// A name of the search list that nobody answers for does not hide the others.
	n = newInternet(t, plainConf+"search refused.example example\n", func(r *request) {
		if strings.HasSuffix(r.name(), ".refused.example.") {
			r.answer(t, dns.RcodeRefused)
			return
		}
		zone(t, "a.example. 60 IN A 192.0.2.1")(r)
	})
	n.expect("a", "192.0.2.1")
}

func TestRotate(t *testing.T) {
	n := newInternet(t, "nameserver 10.0.0.53\nnameserver 10.0.0.54\noptions rotate\n", reflected(t))
	n.resolver = n.newResolver(ResolverConfig{})
	for i := range 40 {
		n.expect(fmt.Sprintf("10.9.0.%d.reflect.internal.", i), fmt.Sprintf("10.9.0.%d", i))
	}
	if a, b := len(n.first.questions()), len(n.next.questions()); a == 0 || b == 0 {
		t.Errorf("the nameservers were asked %d and %d times, want both", a, b)
	}
}

// The answer to a forwarded query keeps its bytes.
func TestExchangeKeepsTheBytes(t *testing.T) {
	n := newInternet(t, plainConf, func(r *request) {
		r.send(append(packed(t, r.reply(t, dns.RcodeSuccess)), "whatever follows"...))
	})
	query := packed(t, new(dns.Msg).SetQuestion("AbC.example.", dns.TypeSVCB))
	before := slices.Clone(query)
	x := exchanger{dial: Over(n.net.Host(ourIP))}
	reply, err := x.exchange(t.Context(), n.resolver.conf.get(), asking{msg: query})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(query, before) {
		t.Error("the query was changed")
	}
	if !strings.HasSuffix(string(reply), "whatever follows") || !strings.Contains(string(reply), "\x03AbC\x07example\x00") {
		t.Errorf("got %q", reply)
	}
}
