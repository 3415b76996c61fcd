package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/ztunnel-go/ztunnel/proxy/netns/memnet"
	"github.com/ztunnel-go/ztunnel/state"
)

// A query of a pod that the control plane has not told of waits for it, for others
// not at all, and is refused after 5 s (spec/state-xds-dns.md §5.2).
func TestUnknownClient(t *testing.T) {
	for _, proto := range protocols {
		synctest.Test(t, func(t *testing.T) {
			n := newInternet(t, plainConf, zone(t, "www.example. 60 IN A 192.0.2.1"))
			store := state.New(state.Config{Network: "nw1"})
			p := n.newPod(t, ServerConfig{Store: store, Local: localOf(store, client1)})
			start := time.Now()
			reply := p.ask(t, proto, query1("productpage.", dns.TypeA))
			if got := told(reply); got != "SERVFAIL" || reply.RecursionAvailable || len(reply.Question) != 1 {
				t.Errorf("%s: got %v", proto, reply)
			}
			if d := time.Since(start); d != DefaultWorkloadWait {
				t.Errorf("%s: took %v, want %v", proto, d, DefaultWorkloadWait)
			}
			if n := p.series(t, "istio_dns_requests_total"); !slices.Equal(n, []string{"a/" + proto + "/unknown/unknown 1"}) {
				t.Errorf("%s: got %q", proto, n)
			}
			// One that waits is answered when it is known, and malformed ones meanwhile.
			pc := p.socket(t)
			defer pc.Close()
			sendTo(t, pc, packed(t, query1("productpage.", dns.TypeA)))
			sendTo(t, pc, packed(t, query1("www.example.", dns.TypeA)))
			sendTo(t, pc, packed(t, query1("x.", dns.TypeA))[:14])
			if reply := receiveFrom(t, pc); rcode(reply) != dns.RcodeFormatError {
				t.Errorf("%s: got %x, want FORMERR at once", proto, reply)
			}
			time.Sleep(time.Second)
			start = time.Now()
			mesh := state.Update{
				Services: []*state.Service{serviceOf(t, "productpage.ns1.svc.cluster.local ns1 9.9.9.9")},
				Workloads: []state.WorkloadUpdate{{Workload: &state.Workload{
					UID: "u", Name: "client", Namespace: "ns1", ServiceAccount: "sa", Network: "nw1", CanonicalName: "c",
				}}},
			}
			if err := store.Apply(mesh); err != nil {
				t.Fatal(err)
			}
			var got []string
			for range 2 {
				m := new(dns.Msg)
				if err := m.Unpack(receiveFrom(t, pc)); err != nil {
					t.Fatal(err)
				}
				got = append(got, told(m))
			}
			slices.Sort(got)
			if want := []string{"AA productpage. A 9.9.9.9", "www.example. A 192.0.2.1"}; !slices.Equal(got, want) || time.Since(start) != 0 {
				t.Errorf("%s: got %q after %v, want %q at once", proto, got, time.Since(start), want)
			}
		})
	}
}

// outcomes is a nameserver whose answers are as different as their names.
func outcomes(t *testing.T) func(*request) {
	return func(r *request) {
		switch r.name() {
		case "slow.example.":
			time.Sleep(2 * time.Millisecond)
			r.answer(t, dns.RcodeSuccess, "slow.example. 60 IN A 192.0.2.1")
		case "tc.example.":
			m := r.reply(t, dns.RcodeSuccess)
			m.Truncated = true
			r.send(packed(t, m))
		case "none.example.", "example.": // the latter is updated, to which there are no records
			r.answer(t, dns.RcodeSuccess)
		case "silent.example.":
		default:
			r.answer(t, dns.RcodeNameError)
		}
	}
}

// The counters of every kind of query, by type, protocol and client.
func TestMetrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newInternet(t, plainConf, outcomes(t))
		p := n.newPod(t, ServerConfig{Store: fixture(t), IPv6: true})
		for _, proto := range protocols {
			p.ask(t, proto, query1("productpage.", dns.TypeA))
			p.ask(t, proto, query1("productpage.", dns.TypeAAAA))
			p.ask(t, proto, query1("localhost.", dns.TypeA))
			p.ask(t, proto, query1("nothing.example.", dns.TypeSRV))
			p.ask(t, proto, query1("nothing.example.", 61234))
			p.ask(t, proto, query1("nothing.example.", 61235))
			p.exchange(t, proto, head(recursive, 1))
		}
		for _, name := range []string{"slow", "none", "tc", "silent"} {
			p.ask(t, "udp", query1(name+".example.", dns.TypeA))
		}
		update := new(dns.Msg).SetUpdate("example.")
		update.RecursionDesired = true // which the nameserver insists on
		p.ask(t, "udp", update)
		const who = "canonical-client/v1"
		for family, want := range map[string][]string{
			"istio_dns_requests_total": {
				"a/tcp/" + who + " 2", "a/udp/" + who + " 6", "aaaa/tcp/" + who + " 1", "aaaa/udp/" + who + " 1",
				"soa/udp/" + who + " 1", "srv/tcp/" + who + " 1", "srv/udp/" + who + " 1",
				"unknown/tcp/" + who + " 2", "unknown/udp/" + who + " 2",
			},
			"istio_dns_upstream_requests_total": {
				"a/udp/" + who + " 4", "soa/udp/" + who + " 1", "srv/tcp/" + who + " 1", "srv/udp/" + who + " 1",
				"unknown/tcp/" + who + " 2", "unknown/udp/" + who + " 2",
			},
			"istio_dns_upstream_failures_total": {
				"a/udp/" + who + " 2", "srv/tcp/" + who + " 1", "srv/udp/" + who + " 1", "unknown/tcp/" + who + " 2", "unknown/udp/" + who + " 2",
			},
			"istio_dns_upstream_request_duration_seconds": {
				"a/udp/" + who + " 4", "soa/udp/" + who + " 1", "srv/tcp/" + who + " 1", "srv/udp/" + who + " 1",
				"unknown/tcp/" + who + " 2", "unknown/udp/" + who + " 2",
			},
		} {
			if got := p.series(t, family); !slices.Equal(got, want) {
				t.Errorf("%s:\ngot  %q\nwant %q", family, got, want)
			}
		}
		testHelpAndBuckets(t, p)
	})
}

func testHelpAndBuckets(t *testing.T, p *pod) {
	families, err := p.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if !strings.Contains(f.GetHelp(), "unstable") {
			t.Errorf("%s: help %q does not say unstable", f.GetName(), f.GetHelp())
		}
		for _, m := range f.GetMetric() {
			if !strings.Contains(m.String(), `value:"a"`) {
				continue
			}
			for _, b := range m.GetHistogram().GetBucket() { // of three that are fast, and one that took too long
				if want := map[float64]uint64{.0005: 2, .001: 2, .01: 3, .1: 3, 1: 3, 5: 3}[b.GetUpperBound()]; b.GetCumulativeCount() != want {
					t.Errorf("bucket %v: got %d, want %d", b.GetUpperBound(), b.GetCumulativeCount(), want)
				}
			}
		}
	}
}

// series are "type/protocol/service/revision count", sorted.
func (p *pod) series(t testing.TB, family string) (out []string) {
	t.Helper()
	families, err := p.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != family {
			continue
		}
		for _, m := range f.GetMetric() {
			labels := map[string]string{}
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = l.GetValue()
			}
			out = append(out, fmt.Sprintf("%s/%s/%s/%s %v", labels["request_query_type"], labels["request_protocol"],
				labels["source_canonical_service"], labels["source_canonical_revision"],
				m.GetCounter().GetValue()+float64(m.GetHistogram().GetSampleCount())))
		}
	}
	slices.Sort(out)
	return out
}

// The addresses of a service come in any order, so that clients spread.
func TestRandomOrder(t *testing.T) {
	n := newInternet(t, plainConf, nil)
	p := n.newPod(t, ServerConfig{Store: fixture(t)})
	first := map[string]bool{}
	for range 200 {
		a := p.ask(t, "udp", query1("details.ns2.svc.cluster.remote.", dns.TypeA)).Answer[0].(*dns.A)
		first[a.A.String()] = true
	}
	if len(first) != 4 {
		t.Errorf("only %v come first", first)
	}
}

// The line of every kind of query.
func TestLogLines(t *testing.T) {
	n := newInternet(t, plainConf, bing(t))
	p := n.newPod(t, ServerConfig{Store: fixture(t), IPv6: true})
	for _, tt := range []struct{ name, qtype, want string }{
		{"details.ns2.svc.cluster.remote.", "A", "query=A domain=details.ns2.svc.cluster.remote result=success endpoints=4"},
		{"nw2-only.ns1.", "A", "query=A domain=nw2-only.ns1 result=no records endpoints=0"},
		{"headless-ipv6.ns1.", "A", "query=A domain=headless-ipv6.ns1 result=service does not support this record type endpoints=0"},
		{"WWW.bing.com.", "A", "query=A domain=www.bing.com result=forwarded endpoints=0"},
		{"unknown.", "MX", "query=MX domain=unknown result=forwarding failed (NXDOMAIN) endpoints=0"},
		{"localhost.", "AAAA", "query=AAAA domain=localhost result=success endpoints=1"},
	} {
		p.ask(t, "udp", query1(tt.name, dns.StringToType[tt.qtype]))
		if want := "DEBUG query src.workload=client src.namespace=ns1 " + tt.want; p.log.count(want) != 1 {
			t.Errorf("no line %q in\n%s", want, strings.Join(p.log.lines, "\n"))
		}
	}
}

// A panic ends its query alone, and is counted.
func TestPanic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newInternet(t, plainConf, bing(t))
		store := fixture(t)
		local := localOf(store, client1)
		var panics atomic.Int32
		p := n.newPod(t, ServerConfig{Store: store, Panicked: func() { panics.Add(1) }, Local: func(ctx context.Context) (*state.Workload, error) {
			if panics.Load() < 2 {
				panic("for the test")
			}
			return local(ctx)
		}})
		pc := p.socket(t)
		defer pc.Close()
		sendTo(t, pc, packed(t, query1("productpage.", dns.TypeA)))
		synctest.Wait()
		c := p.dial(t)
		defer c.Close()
		c.send(t, packed(t, query1("productpage.", dns.TypeA)))
		if got := c.receive(t); got != nil {
			t.Errorf("got %x", got)
		}
		for _, proto := range protocols {
			if got := told(p.ask(t, proto, query1("productpage.", dns.TypeA))); got != "AA productpage. A 9.9.9.9" {
				t.Errorf("%s: got %q", proto, got)
			}
		}
		if panics.Load() != 2 || p.log.count("DNS query panicked") != 2 {
			t.Errorf("%d panics, %d lines", panics.Load(), p.log.count("DNS query panicked"))
		}
	})
}

// LookupIP gives what the client of the server would get.
func TestLookupIP(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newInternet(t, plainConf, zone(t, "www.example. 60 IN A 192.0.2.1", "www.example. 60 IN AAAA 2001:db8::1",
			"alias.example. 60 IN CNAME www.example.", "only6.example. 60 IN AAAA 2001:db8::6"))
		n.write("hosts", "192.0.2.7 myself\n")
		p := n.newPod(t, ServerConfig{Store: fixture(t), IPv6: true})
		for _, tt := range []struct {
			name string
			v6   bool
			want string
			err  error
		}{
			{"productpage", false, "[9.9.9.9]", nil},
			{"ProductPage.ns1.svc.cluster.local.", false, "[9.9.9.9]", nil},
			{"dual.localhost", true, "[2001:db8::ff00:42:8329]", nil},
			{"productpage", true, "[]", errNoAddress},
			{"nw2-only.ns1", false, "[]", errNoAddress},
			{"nslocal.ns2.svc.cluster.local", false, "[]", ErrNoSuchHost},
			{"www.example", false, "[192.0.2.1]", nil},
			{"www.example", true, "[2001:db8::1]", nil},
			{"alias.example", false, "[192.0.2.1]", nil},
			{"only6.example", false, "[]", errNoAddress},
			{"unknown.example", false, "[]", ErrNoSuchHost},
			{"myself", false, "[192.0.2.7]", nil},
			{"localhost", true, "[::1]", nil},
			{"a.onion", false, "[]", ErrNoSuchHost},
		} {
			got, err := p.server.LookupIP(t.Context(), tt.name, tt.v6)
			if fmt.Sprint(got) != tt.want || !errors.Is(err, tt.err) || (err == nil) != (tt.err == nil) {
				t.Errorf("%s, IPv6 %t: got %v, %v; want %s, %v", tt.name, tt.v6, got, err, tt.want, tt.err)
			}
		}
		if _, err := p.server.LookupIP(t.Context(), strings.Repeat("a", 64)+".example", false); err == nil {
			t.Error("a name that is none: no error")
		}
		equals(t, p.value(t, "istio_dns_requests_total", "a", "tcp"), 10)
		n.first.set(nil)
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, errors.New("enough"))
		defer cancel()
		if _, err := p.server.LookupIP(ctx, "silent.example", false); err == nil || !strings.HasSuffix(err.Error(), "enough") {
			t.Errorf("got %v, want the cause", err)
		}
		unknown := n.newOtherPod(t, ServerConfig{})
		if _, err := unknown.server.LookupIP(t.Context(), "productpage", false); !errors.Is(err, errUnknownClient) {
			t.Errorf("unknown client: got %v", err)
		}
	})
}

// What NewServer refuses.
func TestServerConfig(t *testing.T) {
	store := state.New(state.Config{})
	good := ServerConfig{
		Store: store, Local: localOf(store, client1), Network: memnet.New(memnet.Config{}).Host(ourIP), Addrs: []netip.AddrPort{proxyAddr},
		Metrics: NewMetrics(prometheus.NewRegistry()), Logger: slog.New(slog.DiscardHandler),
	}
	if _, err := NewServer(good); err != nil {
		t.Errorf("good: %v", err)
	}
	for want, change := range map[string]func(*ServerConfig){
		"Store, Local, Network and Metrics are required": func(c *ServerConfig) { c.Store = nil },
		"an address to listen on":                        func(c *ServerConfig) { c.Addrs = nil },
		"address 10.0.0.1:15053: only loopback":          func(c *ServerConfig) { c.Addrs = append(c.Addrs, netip.MustParseAddrPort("10.0.0.1:15053")) },
		"address 0.0.0.0:15053: only loopback":           func(c *ServerConfig) { c.Addrs = []netip.AddrPort{netip.MustParseAddrPort("0.0.0.0:15053")} },
		"address [::]:15053: only loopback":              func(c *ServerConfig) { c.Addrs = []netip.AddrPort{netip.MustParseAddrPort("[::]:15053")} },
		"address invalid AddrPort: only loopback":        func(c *ServerConfig) { c.Addrs = []netip.AddrPort{{}} },
		"twice":                            func(c *ServerConfig) { c.Addrs = []netip.AddrPort{proxyAddr, proxyAddr} },
		`cluster domain: host name "a..b"`: func(c *ServerConfig) { c.ClusterDomain = "a..b" },
		`search domain: host name "a b"`:   func(c *ServerConfig) { c.Search = []string{"ok.example", "a b"} },
	} {
		cfg := good
		cfg.Addrs = slices.Clone(good.Addrs)
		change(&cfg)
		if _, err := NewServer(cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}
