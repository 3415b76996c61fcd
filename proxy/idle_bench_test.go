package proxy

import (
	"context"
	"fmt"
	"net/netip"
	"runtime"
	"runtime/debug"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/local"
	"github.com/ztunnel-go/ztunnel/proxy/dns"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/state"
)

// podsPerNode is what a node of Kubernetes holds by default.
const podsPerNode = 110

// fleet is a node full of pods that nobody speaks to: one store, one certificate
// manager, one set of counters, and a proxy for each pod.
type fleet struct {
	store   *state.Store
	proxies []*Proxy
	cut     context.CancelFunc
	parts   sync.WaitGroup
}

// newFleet makes the proxies of n pods. Nothing is running but the certificates.
func newFleet(tb testing.TB, n int, withDNS bool) *fleet {
	tb.Helper()
	root, err := local.Open(local.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("cluster.local")})
	if err != nil {
		tb.Fatal(err)
	}
	ctx, cut := context.WithCancel(tb.Context())
	f := &fleet{store: state.New(state.Config{NodeName: "node"}), cut: cut}
	certs := ca.NewManager(one{root.Provider()}, ca.ManagerConfig{})
	f.parts.Go(func() { _ = certs.Run(ctx) })
	var world state.Update
	metrics, names, limits := NewMetrics(prometheus.NewRegistry(), MetricsConfig{}), dns.NewMetrics(prometheus.NewRegistry()), dns.NewLimits(0, 0)
	network := netns.NewHost(netns.HostConfig{})
	any := netip.MustParseAddrPort("127.0.0.1:0") // as good as a pod's, and free
	for i := range n {
		name, addr := fmt.Sprintf("pod-%d", i), netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})
		world.Workloads = append(world.Workloads, state.WorkloadUpdate{Workload: &state.Workload{
			UID: "cluster//Pod/default/" + name, Name: name, Namespace: "default", ServiceAccount: name, TrustDomain: "cluster.local",
			Node: "node", IPs: []netip.Addr{addr}, Protocol: state.HBONE, Capacity: 1,
		}})
		cfg := Config{
			Network: network, Store: f.store, Certs: certs, Metrics: metrics,
			Local:        state.Ref{Namespace: "default", Name: name, ServiceAccount: name},
			OutboundAddr: any, InboundAddr: any, PassthroughAddr: any, SOCKSAddr: any,
			Verify: func(context.Context, *state.Workload) error { return nil },
		}
		if withDNS {
			cfg.DNS = &dns.ServerConfig{Addrs: []netip.AddrPort{any, netip.MustParseAddrPort("127.0.0.2:0")}, Metrics: names, Limits: limits}
		}
		p, err := New(cfg)
		if err != nil {
			tb.Fatal(err)
		}
		f.proxies = append(f.proxies, p)
	}
	if err := f.store.Replace(world); err != nil {
		tb.Fatal(err)
	}
	return f
}

func (f *fleet) listen(tb testing.TB) {
	tb.Helper()
	for _, p := range f.proxies {
		if err := p.Listen(tb.Context()); err != nil {
			tb.Fatal(err)
		}
	}
}

// run serves all pods, and returns when each has its certificate.
func (f *fleet) run(tb testing.TB) {
	tb.Helper()
	ctx, cut := context.WithCancel(tb.Context())
	stop := f.cut
	f.cut = func() { cut(); stop() }
	for _, p := range f.proxies {
		f.parts.Go(func() {
			if err := p.Run(ctx); err != nil {
				tb.Error(err)
			}
		})
	}
	for _, p := range f.proxies {
		for p.trust().svid == nil {
			time.Sleep(time.Millisecond)
		}
	}
}

func (f *fleet) end() {
	f.cut()
	f.parts.Wait()
}

// memory is what the process holds of the kernel for its heap and its stacks.
func memory() float64 {
	runtime.GC()
	debug.FreeOSMemory()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapInuse + m.StackInuse)
}

// BenchmarkIdlePods is what a pod costs that nobody speaks to, on a node that is
// full of them, without its DNS server and with it: a part of the 150 KB that it
// may cost with everything.
func BenchmarkIdlePods(b *testing.B) {
	for _, tt := range []struct {
		name  string
		dns   bool
		bound float64
	}{{"proxy", false, 60 << 10}, {"dns", true, 90 << 10}} {
		b.Run(tt.name, func(b *testing.B) {
			var made, opened, served float64
			var routines int
			for b.Loop() {
				before, others := memory(), runtime.NumGoroutine()
				f := newFleet(b, podsPerNode, tt.dns)
				m0 := memory()
				f.listen(b)
				m1 := memory()
				f.run(b)
				m2 := memory()
				routines = runtime.NumGoroutine() - others
				made, opened, served = (m0-before)/podsPerNode, (m1-m0)/podsPerNode, (m2-m1)/podsPerNode
				f.end()
			}
			b.ReportMetric(made/1024, "new-KiB/pod")
			b.ReportMetric(opened/1024, "listen-KiB/pod")
			b.ReportMetric(served/1024, "run-KiB/pod")
			b.ReportMetric(float64(routines)/podsPerNode, "goroutines/pod")
			if total := made + opened + served; total > tt.bound {
				b.Errorf("an idle pod costs %.0f bytes, want at most %.0f", total, tt.bound)
			}
		})
	}
}
