package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/state"
)

// asking is a proxy that can only look up.
func asking(demand func(context.Context, string) error) *Proxy {
	return &Proxy{cfg: Config{Demand: demand}, lookUps: newLookUps()}
}

func missing(keys ...string) error { return fmt.Errorf("route: %w", &state.Miss{Keys: keys}) }

// A decision is asked again after what it missed was demanded, with all keys that
// were; four times at most.
func TestLookUpRounds(t *testing.T) {
	for _, tt := range []struct {
		name   string
		misses int
		want   string
	}{
		{"none", 0, ""},
		{"one", 1, ""},
		{"four", 4, ""},
		{"five", 5, "route: not known yet: k4, after 4 look-ups"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var demanded []string
			p := asking(func(_ context.Context, key string) error { demanded = append(demanded, key); return nil })
			var first error
			if tt.misses > 0 {
				first = missing("k0")
			}
			rounds := 0
			got, err := lookUp(t.Context(), p, p.lookUps.outbound, first, func(asked []string) (string, error) {
				rounds++
				if !slices.Equal(asked, demanded) {
					t.Errorf("asked %v, demanded %v", asked, demanded)
				}
				if rounds < tt.misses {
					return "", missing(fmt.Sprintf("k%d", rounds))
				}
				return "there", nil
			})
			switch {
			case tt.want == "" && (err != nil || got != "there" && tt.misses > 0):
				t.Errorf("got %q, %v", got, err)
			case tt.want != "" && (err == nil || err.Error() != tt.want):
				t.Errorf("got %v, want %s", err, tt.want)
			}
			if want := min(tt.misses, 4); rounds != want {
				t.Errorf("%d rounds, want %d", rounds, want)
			}
		})
	}
}

// What cannot be looked up is an error, and no reason to go on without.
func TestLookUpFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		refused := errors.New("stream lost")
		forever := func(ctx context.Context, _ string) error { <-ctx.Done(); return ctx.Err() }
		for _, tt := range []struct {
			name   string
			demand func(context.Context, string) error
			want   string
			after  time.Duration
		}{
			{"nobody to ask", nil, "route: not known yet: a, b, and this proxy has nobody to ask on demand", 0},
			{"refused", func(ctx context.Context, key string) error {
				if key == "b" {
					return refused
				}
				return forever(ctx, key)
			}, "look up b on demand: stream lost", 0},
			{"no answer", forever, "look up a, b on demand: no answer within 5s: context deadline exceeded", 5 * time.Second},
		} {
			start := time.Now()
			p := asking(tt.demand)
			_, err := lookUp(t.Context(), p, p.lookUps.outbound, missing("a", "b"), func([]string) (int, error) {
				t.Errorf("%s: asked again", tt.name)
				return 0, nil
			})
			if err == nil || err.Error() != tt.want {
				t.Errorf("%s: got %v, want %s", tt.name, err, tt.want)
			}
			if d := time.Since(start); d != tt.after {
				t.Errorf("%s: after %v, want %v", tt.name, d, tt.after)
			}
		}
	})
}

// Case 92: the keys are demanded in parallel, and all connections of a pod
// together keep to a bound.
func TestFault_092_DemandsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var (
			mu        sync.Mutex
			now, most int
		)
		p := asking(func(context.Context, string) error {
			mu.Lock()
			now++
			most = max(most, now)
			mu.Unlock()
			time.Sleep(time.Second)
			mu.Lock()
			now--
			mu.Unlock()
			return nil
		})
		start := time.Now()
		if err := p.demand(t.Context(), p.lookUps.outbound, []string{"a", "b", "c"}); err != nil || time.Since(start) != time.Second {
			t.Errorf("three keys: %v after %v, want 1s", err, time.Since(start))
		}
		var all sync.WaitGroup
		for range 4 * maxDemands {
			all.Go(func() { _ = p.demand(t.Context(), p.lookUps.outbound, []string{"a", "b"}) })
		}
		all.Wait()
		if most != maxDemands {
			t.Errorf("%d at a time, want %d", most, maxDemands)
		}
	})
}

// Case 92: what peers make us look up does not keep the pod from looking up what
// it needs, and the look-ups for telemetry neither of the two.
func TestFault_092_PeersDoNotStarveThePod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := asking(func(ctx context.Context, key string) error {
			if key == "there" {
				return nil
			}
			<-ctx.Done()
			return ctx.Err()
		})
		var all sync.WaitGroup
		defer all.Wait()
		for i := range 2 * maxDemands {
			all.Go(func() { p.demandSource(t.Context(), netip.AddrFrom4([4]byte{192, 0, 2, byte(i)})) })
		}
		synctest.Wait()
		start := time.Now()
		if err := p.demand(t.Context(), p.lookUps.inbound, []string{"there"}); err != nil || time.Since(start) != 0 {
			t.Errorf("a request beside look-ups of sources: %v after %v", err, time.Since(start))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		for range 2 * maxDemands {
			all.Go(func() { _ = p.demand(ctx, p.lookUps.inbound, []string{"nowhere"}) })
		}
		synctest.Wait()
		if err := p.demand(t.Context(), p.lookUps.outbound, []string{"there"}); err != nil || time.Since(start) != 0 {
			t.Errorf("the pod's own beside those of its peers: %v after %v", err, time.Since(start))
		}
	})
}

// A control plane that does not answer costs one client a second, not all of them.
func TestSourceLookUpsPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		p := asking(func(ctx context.Context, key string) error { asked++; <-ctx.Done(); return ctx.Err() })
		ip := netip.MustParseAddr("192.0.2.1")
		gone, leave := context.WithCancel(t.Context())
		leave()
		p.demandSource(gone, ip) // of a client that has left: no reason to pause
		for _, want := range []time.Duration{sourceWait, 0, 0, sourcePause} {
			if want == sourcePause {
				time.Sleep(sourcePause)
				want = sourceWait
			}
			start := time.Now()
			if _, ok := p.demandSource(t.Context(), ip); ok || time.Since(start) != want {
				t.Errorf("found %v after %v, want nothing after %v", ok, time.Since(start), want)
			}
		}
		if asked != 3 {
			t.Errorf("asked %d times, want 3", asked)
		}
		time.Sleep(sourcePause)
		p.cfg.Demand = func(context.Context, string) error { asked++; return errors.New("stream lost") }
		for range 2 * maxSources { // a quick failure is no reason to pause
			p.demandSource(t.Context(), ip)
		}
		if want := 3 + 2*maxSources; asked != want {
			t.Errorf("asked %d times, want %d", asked, want)
		}
	})
}

func TestPickAddr(t *testing.T) {
	addrs := func(s ...string) (list []netip.Addr) {
		for _, a := range s {
			list = append(list, netip.MustParseAddr(a))
		}
		return list
	}
	for _, tt := range []struct {
		name string
		in   []netip.Addr
		v4   bool
		want []string // the ones that are drawn
	}{
		{"nothing", nil, true, nil},
		{"the family of the caller", addrs("2001:db8::1", "10.0.0.1", "2001:db8::2", "10.0.0.2"), true, []string{"10.0.0.1", "10.0.0.2"}},
		{"the family of the caller, v6", addrs("10.0.0.1", "2001:db8::1", "10.0.0.2"), false, []string{"2001:db8::1"}},
		{"else the other", addrs("10.0.0.1", "10.0.0.2"), false, []string{"10.0.0.1", "10.0.0.2"}},
		{"v4-mapped is v4", addrs("::ffff:10.0.0.1"), true, []string{"10.0.0.1"}},
		{"nobody listens there", addrs("0.0.0.0", "::", "224.0.0.1", "fe80::1%eth0"), true, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			drawn := map[string]bool{}
			for range 200 {
				if ip, ok := pickAddr(tt.in, tt.v4); ok {
					drawn[ip.String()] = true
				}
			}
			for _, w := range tt.want {
				if !drawn[w] {
					t.Errorf("%s was never drawn", w)
				}
			}
			if len(drawn) != len(tt.want) {
				t.Errorf("drawn %v, want %v", drawn, tt.want)
			}
		})
	}
}

// §4.10 of spec/state-xds-dns.md: the texts, the bound, and the counter, which
// counts each use in one series.
func TestResolve(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := prometheus.NewRegistry()
		n := &node{m: &mesh{t: t}, w: &state.Workload{}, registry: reg}
		source := &state.Workload{
			Name: "client-1", WorkloadName: "client", Namespace: "default", CanonicalName: "client", CanonicalRevision: "v1", ClusterID: "c",
			Identity: spiffeid.RequireFromString(clientID),
		}
		route := state.Route{
			Protocol: state.TCP, NextHop: netip.AddrPortFrom(netip.Addr{}, 80), Workload: &state.Workload{UID: "vm1"}, Resolve: "vm.example",
		}
		hang := func(ctx context.Context, _ string) ([]netip.Addr, error) { <-ctx.Done(); return nil, ctx.Err() }
		answer := func(s ...string) func(context.Context, string) ([]netip.Addr, error) {
			var list []netip.Addr
			for _, a := range s {
				list = append(list, netip.MustParseAddr(a))
			}
			return func(context.Context, string) ([]netip.Addr, error) { return list, nil }
		}
		const none = "no ip addresses were resolved for workload: vm1"
		p := &Proxy{log: slog.New(slog.DiscardHandler), cfg: Config{Metrics: NewMetrics(reg, MetricsConfig{})}}
		for _, tt := range []struct {
			name    string
			resolve func(context.Context, string) ([]netip.Addr, error)
			want    string
			after   time.Duration
		}{
			{"answered", answer("127.0.0.4"), "127.0.0.4:80", 0},
			{"no addresses", answer(), "ip addresses were resolved for workload vm1, but valid dns response had no A/AAAA records", 0},
			{"no answer", hang, none, 10 * time.Second},
			{"no resolver", nil, none, 0},
		} {
			p.cfg.Resolve = tt.resolve
			start := time.Now()
			r, err := p.resolve(t.Context(), source, netip.MustParseAddr("10.0.0.9"), route)
			got := r.NextHop.String()
			if err != nil {
				got = err.Error()
			}
			if got != tt.want || time.Since(start) != tt.after {
				t.Errorf("%s: %s after %v, want %s after %v", tt.name, got, time.Since(start), tt.want, tt.after)
			}
		}
		n.wantMetric(3, "istio_on_demand_dns", map[string]string{
			"source_workload": "client", "source_canonical_service": "client", "source_canonical_revision": "v1", "source_workload_namespace": "default",
			"source_principal": clientID, "source_app": "client", "source_version": "v1", "source_cluster": "c", "hostname": "vm.example",
		})
	})
}

// All rounds of one connection choose the same endpoint, or each could need
// another gateway that is not known yet.
func TestLookUpDrawsOnce(t *testing.T) {
	const endpoints = 50
	vip := state.NetworkAddress{Addr: netip.MustParseAddr("10.96.0.1")}
	svc := &state.Service{
		Name: "svc", Namespace: "ns", Hostname: "svc.example", VIPs: []state.NetworkAddress{vip},
		Ports: []state.Port{{Service: 80, Target: 8080}}, SubjectAltNames: []string{"spiffe://cluster.local/ns/ns/sa/svc"},
	}
	update := state.Update{Services: []*state.Service{svc}}
	for i := range endpoints {
		update.Workloads = append(update.Workloads, state.WorkloadUpdate{
			Workload: &state.Workload{
				UID: fmt.Sprintf("w%d", i), Name: "w", Namespace: "ns", Network: "remote", Protocol: state.HBONE, Capacity: 1,
				NetworkGateway: &state.GatewayAddress{
					Hostname: state.NamespacedHostname{Namespace: "ns", Hostname: fmt.Sprintf("gw%d", i)}, Port: 15008,
				},
			},
			Endpoints: map[state.NamespacedHostname][]state.Port{svc.Key(): nil},
		})
	}
	store := state.New(state.Config{OnDemand: true})
	if err := store.Apply(update); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		demanded := map[string]bool{}
		var mu sync.Mutex
		p := asking(func(_ context.Context, key string) error {
			mu.Lock()
			defer mu.Unlock()
			demanded[key] = true
			return nil
		})
		p.cfg.Store = store
		source := &state.Workload{UID: "source", Namespace: "ns"}
		_, err := p.route(t.Context(), state.Query{Source: source, Dst: netip.AddrPortFrom(vip.Addr, 80)})
		if !errors.Is(err, state.ErrUnknownGateway) {
			t.Fatalf("got %v, want a gateway that does not exist", err)
		}
		gateways := 0
		for key := range demanded {
			if strings.HasPrefix(key, "ns/gw") {
				gateways++
			}
		}
		// The first answer of the store draws for itself.
		if gateways == 0 || gateways > 2 {
			t.Errorf("%d gateways demanded for one connection, want 1 or 2", gateways)
		}
	}
}
