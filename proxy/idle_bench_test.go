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
	"github.com/ztunnel-go/ztunnel/proxy/netns/memnet"
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
func newFleet(tb testing.TB, n int) *fleet {
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
	metrics := NewMetrics(prometheus.NewRegistry(), MetricsConfig{})
	network := memnet.New(memnet.Config{})
	for i := range n {
		name, addr := fmt.Sprintf("pod-%d", i), netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})
		world.Workloads = append(world.Workloads, state.WorkloadUpdate{Workload: &state.Workload{
			UID: "cluster//Pod/default/" + name, Name: name, Namespace: "default", ServiceAccount: name, TrustDomain: "cluster.local",
			Node: "node", IPs: []netip.Addr{addr}, Protocol: state.HBONE, Capacity: 1,
		}})
		p, err := New(Config{
			Network: network.Host(addr), Store: f.store, Certs: certs, Metrics: metrics,
			Local:        state.Ref{Namespace: "default", Name: name, ServiceAccount: name},
			OutboundAddr: netip.MustParseAddrPort("[::]:15001"), InboundAddr: netip.MustParseAddrPort("[::]:15008"),
			PassthroughAddr: netip.MustParseAddrPort("[::]:15006"), SOCKSAddr: netip.MustParseAddrPort("127.0.0.1:15080"),
			Verify: func(context.Context, *state.Workload) error { return nil },
		})
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

// BenchmarkIdlePods is what 110 pods cost that nobody speaks to, per pod: of the
// 150 KB that one may cost with everything, its DNS server and the node agent's
// connection included.
func BenchmarkIdlePods(b *testing.B) {
	const bound = 60 << 10
	var made, bound1, running, goroutines float64
	for b.Loop() {
		before, routines := memory(), runtime.NumGoroutine()
		f := newFleet(b, podsPerNode)
		m0 := memory()
		f.listen(b)
		m1 := memory()
		f.run(b)
		m2 := memory()
		goroutines = float64(runtime.NumGoroutine()-routines) / podsPerNode
		made, bound1, running = (m0-before)/podsPerNode, (m1-m0)/podsPerNode, (m2-m1)/podsPerNode
		f.end()
	}
	b.ReportMetric(made/1024, "new-KiB/pod")
	b.ReportMetric(bound1/1024, "listen-KiB/pod")
	b.ReportMetric(running/1024, "run-KiB/pod")
	b.ReportMetric(goroutines, "goroutines/pod")
	if total := made + bound1 + running; total > bound {
		b.Errorf("an idle pod costs %.0f bytes, want at most %d", total, bound)
	}
}
