package dns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

const plainConf = "nameserver 10.0.0.53\n"

// The resolver over real sockets: UDP, and TCP for what does not fit.
func TestLoopback(t *testing.T) {
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	long := func(r *request) {
		if r.name() != "long.example." || r.Question[0].Qtype != dns.TypeA {
			reflected(t)(r)
			return
		}
		var records []string
		for i := range 300 {
			records = append(records, fmt.Sprintf("long.example. 5 IN A 10.1.%d.%d", i/200, i%200))
		}
		r.answer(t, dns.RcodeSuccess, records...)
	}
	s := &nameserver{t: t, handle: long}
	s.wg.Go(func() { s.serveUDP(pc) })
	s.wg.Go(func() { s.serveTCP(ln.Accept) })
	defer s.wg.Wait()
	defer pc.Close()
	defer ln.Close()

	over := Over(netns.NewHost(netns.HostConfig{}))
	conf := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(conf, []byte("nameserver 127.0.0.1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := NewResolver(ResolverConfig{ResolvConf: conf, IPv6: true, Dial: func(ctx context.Context, network string, addr netip.AddrPort) (net.Conn, error) {
		if addr != netip.MustParseAddrPort("127.0.0.1:53") {
			t.Errorf("dials %v", addr)
		}
		to := map[string]net.Addr{"udp": pc.LocalAddr(), "tcp": ln.Addr()}[network]
		return over(ctx, network, netip.MustParseAddrPort(to.String()))
	}})
	if err != nil {
		t.Fatal(err)
	}
	got, err := r.Lookup(t.Context(), "127.0.0.4.reflect.internal.")
	if err != nil {
		t.Fatal(err)
	}
	equalAddrs(t, "reflect", got, "127.0.0.4")
	if got, err := r.Lookup(t.Context(), "long.example."); err != nil || len(got) != 300 {
		t.Errorf("got %d addresses, %v, want 300", len(got), err)
	}
}

func TestLiterals(t *testing.T) {
	n := newInternet(t, plainConf, nil)
	n.expect("192.0.2.1", "192.0.2.1")
	n.expect("2001:db8::1", "2001:db8::1")
	n.expect("::ffff:192.0.2.1", "192.0.2.1")
	equalQuestions(t, n.first)
}

// Names that are no host names never leave the process.
func TestBadNames(t *testing.T) {
	n := newInternet(t, plainConf, reflected(t))
	for _, host := range []string{
		"", ".", "..", "a..b", ".a", "a b", "a\x00b", "ä.example", "*.example", "a/b", "1.2.3.4:80", "[::1]",
		strings.Repeat("a", 64), strings.Repeat("a.", 126) + "aa", strings.Repeat("x", 100_000),
	} {
		if addrs, err := n.resolver.Lookup(t.Context(), host); err == nil || len(err.Error()) > 1000 {
			t.Errorf("Lookup(%.40q) = %v, %v, want a short error", host, addrs, err)
		}
	}
	for _, host := range []string{"a.invalid", "invalid", "x.onion."} {
		if addrs, err := n.resolver.Lookup(t.Context(), host); !errors.Is(err, ErrNoSuchHost) {
			t.Errorf("Lookup(%q) = %v, %v, want %v", host, addrs, err, ErrNoSuchHost)
		}
	}
	n.expect("localhost", "127.0.0.1", "::1")
	n.expect("a.LOCALHOST.", "127.0.0.1", "::1")
	equalQuestions(t, n.first)
}

// A and AAAA are asked at the same time, each once while its answer is valid; a
// family that is off is not asked.
func TestFamilies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		records := zone(t, "both.example. 60 IN A 192.0.2.1", "both.example. 60 IN AAAA 2001:db8::1",
			"six.example. 60 IN AAAA 2001:db8::6", "none.example. 60 IN TXT x",
			"alias.example. 60 IN CNAME six.example.")
		n := newInternet(t, plainConf, func(r *request) {
			time.Sleep(100 * time.Millisecond)
			records(r)
		})
		start := time.Now()
		n.expect("Both.Example", "192.0.2.1", "2001:db8::1")
		if d := time.Since(start); d >= 300*time.Millisecond {
			t.Errorf("took %v, want the families asked together", d)
		}
		n.expect("both.example.", "192.0.2.1", "2001:db8::1")
		equalQuestions(t, n.first, "udp A both.example.", "udp AAAA both.example.")
		n.expect("six.example", "2001:db8::6")
		n.expect("none.example")
		n.first.questions()
		n.expect("alias.example", "2001:db8::6")
		equalQuestions(t, n.first, "udp A alias.example.", "udp AAAA alias.example.")
		if _, err := n.resolver.Lookup(t.Context(), "nobody.example"); !errors.Is(err, ErrNoSuchHost) {
			t.Errorf("got %v, want %v", err, ErrNoSuchHost)
		}
		n.first.questions()

		n.write("hosts", "2001:db8::9 named.example\n192.0.2.9 named.example\n")
		n.resolver = n.newResolver(ResolverConfig{})
		n.expect("both.example", "192.0.2.1")
		n.expect("named.example", "192.0.2.9")
		n.expect("localhost", "127.0.0.1")
		n.expect("six.example")
		equalQuestions(t, n.first, "udp A both.example.", "udp A six.example.")
	})
}

// Answers are kept for their TTL, absences for what the SOA record says, and at
// most 30 s, failures for a second.
func TestTTL(t *testing.T) {
	for _, tt := range []struct {
		name   string
		handle func(*testing.T) func(*request)
		keeps  time.Duration
	}{
		{"reflected", func(t *testing.T) func(*request) { return reflected(t) }, 5 * time.Second},
		{"smallest of the chain", func(t *testing.T) func(*request) {
			return zone(t, "192.0.2.1.reflect.internal. 7 IN CNAME b.example.", "b.example. 50 IN A 192.0.2.7", "b.example. 40 IN A 192.0.2.8")
		}, 7 * time.Second},
		{"smallest of the steps", func(t *testing.T) func(*request) {
			return func(r *request) {
				if r.name() == "b.example." {
					r.answer(t, dns.RcodeSuccess, "b.example. 50 IN A 192.0.2.7")
					return
				}
				r.answer(t, dns.RcodeSuccess, r.name()+" 7 IN CNAME b.example.")
			}
		}, 7 * time.Second},
		{"more than a day", func(t *testing.T) func(*request) {
			return zone(t, "192.0.2.1.reflect.internal. 1000000 IN A 192.0.2.1")
		}, 24 * time.Hour},
		{"beyond 2^31", func(t *testing.T) func(*request) {
			return zone(t, "192.0.2.1.reflect.internal. 3000000000 IN A 192.0.2.1")
		}, 0},
		{"zero", func(t *testing.T) func(*request) {
			return zone(t, "192.0.2.1.reflect.internal. 0 IN A 192.0.2.1")
		}, 0},
		{"absent name", func(t *testing.T) func(*request) { return zone(t) }, 20 * time.Second},
		{"absent type", func(t *testing.T) func(*request) {
			return zone(t, "192.0.2.1.reflect.internal. 9 IN TXT x")
		}, 20 * time.Second},
		{"absent for long", func(t *testing.T) func(*request) {
			return func(r *request) { r.answer(t, dns.RcodeNameError, "example. 9000 IN SOA a. b. 1 2 3 4 9000") }
		}, 30 * time.Second},
		{"absent without SOA", func(t *testing.T) func(*request) {
			return func(r *request) { r.answer(t, dns.RcodeNameError) }
		}, 0},
		{"failure", func(t *testing.T) func(*request) {
			return func(r *request) { r.answer(t, dns.RcodeServerFailure) }
		}, time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newInternet(t, plainConf, tt.handle(t))
				n.resolver = n.newResolver(ResolverConfig{})
				lookup := func() int {
					_, _ = n.resolver.Lookup(t.Context(), "192.0.2.1.reflect.internal.")
					return min(1, len(n.first.questions()))
				}
				if c := lookup(); c != 1 {
					t.Errorf("%d questions, want some", c)
				}
				if tt.keeps > 0 {
					time.Sleep(tt.keeps - time.Millisecond)
					if c := lookup(); c != 0 {
						t.Errorf("%d questions shortly before the end, want none", c)
					}
					time.Sleep(time.Millisecond)
				}
				if c := lookup(); c != 1 {
					t.Errorf("%d questions after the end, want some", c)
				}
			})
		})
	}
}

// The caller owns what it gets.
func TestAnswersAreCopies(t *testing.T) {
	for _, ipv6 := range []bool{true, false} {
		n := newInternet(t, plainConf, zone(t, "a.example. 60 IN A 192.0.2.1", "a.example. 60 IN A 192.0.2.2"))
		n.resolver = n.newResolver(ResolverConfig{IPv6: ipv6})
		for range 2 {
			got, err := n.resolver.Lookup(t.Context(), "a.example")
			if err != nil || len(got) != 2 || got[0] != netip.MustParseAddr("192.0.2.1") {
				t.Fatalf("got %v, %v", got, err)
			}
			got[0] = netip.MustParseAddr("192.0.2.66")
		}
	}
}

func TestSearch(t *testing.T) {
	const conf = "nameserver 10.0.0.53\nsearch ns.svc.example svc.example\noptions ndots:2\n"
	for _, tt := range []struct {
		host string
		want string
		asks []string
	}{
		{"a", "192.0.2.1", []string{"udp A a.ns.svc.example."}},
		{"b", "192.0.2.2", []string{"udp A b.ns.svc.example.", "udp A b.svc.example."}},
		{"c", "192.0.2.3", []string{"udp A c.", "udp A c.ns.svc.example.", "udp A c.svc.example."}},
		{"c.", "192.0.2.3", []string{"udp A c."}},
		{"x.y.z", "192.0.2.4", []string{"udp A x.y.z."}},
		{"x.y.b", "192.0.2.5", []string{"udp A x.y.b.", "udp A x.y.b.ns.svc.example."}},
		{"a.", "", []string{"udp A a."}},
		{"empty", "192.0.2.6", []string{"udp A empty.ns.svc.example.", "udp A empty.svc.example."}},
	} {
		t.Run(tt.host, func(t *testing.T) {
			n := newInternet(t, conf, zone(t, "a.ns.svc.example. 60 IN A 192.0.2.1", "b.svc.example. 60 IN A 192.0.2.2", "c. 60 IN A 192.0.2.3",
				"x.y.z. 60 IN A 192.0.2.4", "x.y.b.ns.svc.example. 60 IN A 192.0.2.5", "empty.ns.svc.example. 60 IN TXT x", "empty.svc.example. 60 IN A 192.0.2.6"))
			n.resolver = n.newResolver(ResolverConfig{})
			got, err := n.resolver.Lookup(t.Context(), tt.host)
			switch {
			case tt.want == "":
				if !errors.Is(err, ErrNoSuchHost) {
					t.Errorf("got %v, %v, want %v", got, err, ErrNoSuchHost)
				}
			case err != nil:
				t.Error(err)
			default:
				equalAddrs(t, tt.host, got, tt.want)
			}
			equalQuestions(t, n.first, tt.asks...)
		})
	}
}

// Aliases that the nameserver leaves to us are followed, to a limit.
func TestCNAME(t *testing.T) {
	single := func(records map[string]string) func(*request) {
		return func(r *request) {
			if text, ok := records[r.name()]; ok {
				r.answer(t, dns.RcodeSuccess, r.name()+" 60 IN "+text)
				return
			}
			r.answer(t, dns.RcodeNameError)
		}
	}
	chain := map[string]string{"c9.": "A 192.0.2.9", "x.": "CNAME y.", "y.": "CNAME x."}
	var whole []string
	for i := range 9 {
		chain[fmt.Sprintf("c%d.", i)] = fmt.Sprintf("CNAME c%d.", i+1)
		whole = append(whole, fmt.Sprintf("c%d. 60 IN CNAME C%d.", i, i+1))
	}
	whole = append(whole, "c9. 60 IN A 192.0.2.9", "x. 60 IN CNAME y.", "y. 60 IN CNAME x.")
	for name, handle := range map[string]func(*request){"step by step": single(chain), "at once": zone(t, whole...)} {
		t.Run(name, func(t *testing.T) {
			n := newInternet(t, plainConf, handle)
			n.resolver = n.newResolver(ResolverConfig{})
			n.expect("c1.", "192.0.2.9")
			for _, host := range []string{"c0.", "x."} {
				if got, err := n.resolver.Lookup(t.Context(), host); err == nil || errors.Is(err, ErrNoSuchHost) {
					t.Errorf("Lookup(%q) = %v, %v, want an error", host, got, err)
				}
			}
		})
	}
}

// Both files are followed; what they say no longer stands only if they say
// something else.
func TestFilesFollowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newInternet(t, plainConf, zone(t, "a.example. 3600 IN A 192.0.2.1"))
		n.next.set(zone(t, "a.example. 3600 IN A 192.0.2.2"))
		n.expect("a.example", "192.0.2.1")
		later := func() { time.Sleep(time.Second) }

		n.write("resolv.conf", "nameserver 10.0.0.54\noptions ndots:5\n")
		later()
		n.expect("a.example", "192.0.2.2") // what another nameserver said is not asked for here
		n.write("resolv.conf", "# being written\n")
		later()
		n.expect("a.example", "192.0.2.2")
		if err := os.Remove(filepath.Join(n.dir, "resolv.conf")); err != nil {
			t.Fatal(err)
		}
		later()
		n.expect("a.example", "192.0.2.2")

		n.write("hosts", "192.0.2.3 other A.Example.\n2001:db8::3 a.example # comment\n")
		n.expect("a.example", "192.0.2.2")
		later()
		n.expect("a.example", "192.0.2.3", "2001:db8::3")
		n.write("hosts", "192.0.2.3 other\n")
		later()
		n.expect("a.example", "192.0.2.2")
	})
}

// Names that a domain of the search list would make too long are not asked.
func TestSearchTooLong(t *testing.T) {
	host := strings.Repeat("a.", 124) + "aa"
	n := newInternet(t, plainConf+"search svc.example\noptions ndots:15\n", zone(t, host+". 60 IN A 192.0.2.1"))
	n.resolver = n.newResolver(ResolverConfig{})
	c := &resolvConf{search: []string{"svc.example."}}
	if got := c.candidates(host+".", false); len(got) != 1 || got[0] != host+"." {
		t.Errorf("candidates are %q", got)
	}
	n.expect(host, "192.0.2.1")
}

func TestNoConfiguration(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newInternet(t, "search example\n", reflected(t))
		if got, err := n.resolver.Lookup(t.Context(), "192.0.2.1.reflect.internal"); !errors.Is(err, errNoNameserver) {
			t.Errorf("got %v, %v, want %v", got, err, errNoNameserver)
		}
		n.write("resolv.conf", plainConf)
		time.Sleep(time.Second)
		n.expect("192.0.2.1.reflect.internal", "192.0.2.1")
		if _, err := NewResolver(ResolverConfig{}); err == nil {
			t.Error("a resolver without Dial was made")
		}
	})
}

// Identical questions are one; who leaves does not take the answer from others,
// and the last one to leave ends it.
func TestCoalesced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		n := newInternet(t, plainConf, func(r *request) {
			<-release
			reflected(t)(r)
		})
		n.resolver = n.newResolver(ResolverConfig{})
		const host = "192.0.2.1.reflect.internal."
		impatient, leave := context.WithCancelCause(t.Context())
		cause := errors.New("left")
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := n.resolver.Lookup(impatient, host); !errors.Is(err, cause) {
				t.Errorf("got %v, want %v", err, cause)
			}
		})
		synctest.Wait()
		for range 100 {
			wg.Go(func() { n.expect(host, "192.0.2.1") })
		}
		synctest.Wait()
		leave(cause)
		synctest.Wait()
		close(release)
		wg.Wait()
		equalQuestions(t, n.first, "udp A "+host)

		n.first.set(nil)
		alone, leave := context.WithCancelCause(t.Context())
		done := make(chan error, 1)
		go func() { _, err := n.resolver.Lookup(alone, "192.0.2.2.reflect.internal."); done <- err }()
		synctest.Wait()
		leave(cause)
		if err := <-done; !errors.Is(err, cause) {
			t.Errorf("got %v, want %v", err, cause)
		}
		n.resolver.mu.Lock()
		defer n.resolver.mu.Unlock()
		if len(n.resolver.flights) != 0 || len(n.resolver.slots) != 0 {
			t.Errorf("%d flights, %d slots are left", len(n.resolver.flights), len(n.resolver.slots))
		}
	})
}

// More questions than may be in flight wait for their turn.
func TestInFlightLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		var held sync.WaitGroup
		n := newInternet(t, plainConf, func(r *request) {
			held.Go(func() { <-release; reflected(t)(r) })
		})
		n.resolver = n.newResolver(ResolverConfig{})
		var wg sync.WaitGroup
		for i := range 2 * maxInFlight {
			host := fmt.Sprintf("192.0.2.%d.reflect.internal.", i)
			wg.Go(func() { n.expect(host, fmt.Sprintf("192.0.2.%d", i)) })
		}
		synctest.Wait()
		if c := len(n.first.questions()); c != maxInFlight {
			t.Errorf("%d questions in flight, want %d", c, maxInFlight)
		}
		close(release)
		wg.Wait()
		held.Wait()
	})
}

// The cache has room for so many answers and so many addresses.
func TestCacheLimits(t *testing.T) {
	var c cache
	now := time.Now()
	put := func(i, addrs int) {
		c.put(&cached{key: key{question: question{fmt.Sprint(i), dns.TypeA}}, answer: answer{addrs: make([]netip.Addr, addrs)}, until: now.Add(time.Hour)})
	}
	for i := range 2 * maxCached {
		put(i, 1)
		if _, ok := c.get(key{question: question{"0", dns.TypeA}}, now); !ok {
			t.Fatal("the one that is used was dropped")
		}
	}
	if len(c.byKey) != maxCached || c.recent.Len() != maxCached || c.addrs != maxCached {
		t.Errorf("%d answers, %d in order, %d addresses, want %d of each", len(c.byKey), c.recent.Len(), c.addrs, maxCached)
	}
	for i := range 2 * maxCached {
		put(i, maxAddrs)
	}
	if c.addrs > maxCachedAddrs || c.addrs != maxAddrs*len(c.byKey) {
		t.Errorf("%d addresses of %d answers, want at most %d", c.addrs, len(c.byKey), maxCachedAddrs)
	}
}
