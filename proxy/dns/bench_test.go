package dns

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// BenchmarkServer measures answers for a local name over real sockets of loopback
// against a bare server of the library that echoes the question, both in turns of
// the same run. It fails when we are slower than the issue allows.
func BenchmarkServer(b *testing.B) {
	const clients, perTurn, bound = 8, 250, 0.7
	query := packed(b, new(dns.Msg).SetQuestion("productpage.ns1.svc.cluster.local.", dns.TypeA))
	ours, bare := crowd(b, clients, serverOnLoopback(b)), crowd(b, clients, echoOnLoopback(b))
	for range 4 {
		ours.turn(b, query, perTurn)
		bare.turn(b, query, perTurn)
	}
	var ratios []float64
	var took time.Duration
	for b.Loop() {
		t, ref := ours.turn(b, query, perTurn), bare.turn(b, query, perTurn)
		took += t
		ratios = append(ratios, ref.Seconds()/t.Seconds())
	}
	slices.Sort(ratios)
	ratio := ratios[len(ratios)/2]
	b.ReportMetric(ratio, "ratio")
	b.ReportMetric(float64(len(ratios)*clients*perTurn)/took.Seconds(), "answers/s")
	b.ReportMetric(0, "ns/op")
	if len(ratios) >= 20 && ratio < bound {
		b.Errorf("answers at %.2f of the rate of a bare server, want at least %.2f", ratio, bound)
	}
}

// clients ask one server.
type askers []*net.UDPConn

func crowd(b *testing.B, n int, addr netip.AddrPort) askers {
	var a askers
	for range n {
		c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(addr))
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { c.Close() })
		a = append(a, c)
	}
	return a
}

// turn has every client ask n times, one query after the other.
func (a askers) turn(b *testing.B, query []byte, n int) time.Duration {
	var asking sync.WaitGroup
	start := time.Now()
	for _, c := range a {
		asking.Go(func() {
			buf := make([]byte, 512)
			_ = c.SetDeadline(time.Now().Add(time.Minute))
			for range n {
				_, err := c.Write(query)
				if err == nil {
					_, err = c.Read(buf)
				}
				if err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	asking.Wait()
	return time.Since(start)
}

func serverOnLoopback(b *testing.B) netip.AddrPort {
	store := fixture(b)
	s, err := NewServer(ServerConfig{
		Store: store, Local: localOf(store, client1), Network: netns.NewHost(netns.HostConfig{}),
		Addrs: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")}, IPv6: true,
		Metrics: NewMetrics(prometheus.NewRegistry()), Files: NewFiles(filepath.Join(b.TempDir(), "none"), "", nil),
	})
	if err == nil {
		err = s.Listen(b.Context())
	}
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	b.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			b.Error(err)
		}
	})
	return s.sockets[0].addr
}

// echoOnLoopback answers each query with its question.
func echoOnLoopback(b *testing.B) netip.AddrPort {
	pc, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		b.Fatal(err)
	}
	echo := &dns.Server{PacketConn: pc, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, m *dns.Msg) {
		_ = w.WriteMsg(new(dns.Msg).SetReply(m))
	})}
	done := make(chan error, 1)
	go func() { done <- echo.ActivateAndServe() }()
	b.Cleanup(func() {
		if err := errors.Join(echo.Shutdown(), <-done); err != nil {
			b.Error(err)
		}
	})
	return pc.LocalAddr().(*net.UDPAddr).AddrPort()
}

// BenchmarkIdleServer measures what one server holds while nobody asks: heap and
// stacks. Before that, each of its sockets has answered one query.
func BenchmarkIdleServer(b *testing.B) {
	const servers, bound = 200, 25 << 10
	store := fixture(b)
	cfg := ServerConfig{
		Store: store, Local: localOf(store, client1), Metrics: NewMetrics(prometheus.NewRegistry()), Limits: NewLimits(0, 0),
		Files: NewFiles("", "", nil), IPv6: true,
	}
	for b.Loop() {
		ctx, cancel := context.WithCancel(b.Context())
		var running sync.WaitGroup
		before, goroutines := memory(), runtime.NumGoroutine()
		for i := range byte(servers) {
			cfg.Addrs = cfg.Addrs[:0]
			for _, n := range []byte{7, 8} {
				cfg.Addrs = append(cfg.Addrs, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, n, 0, i}), proxyAddr.Port()))
			}
			cfg.Network = netns.NewHost(netns.HostConfig{})
			serveOnce(ctx, b, cfg, &running)
		}
		each := float64(memory()-before) / servers
		b.ReportMetric(each/1024, "KB/server")
		b.ReportMetric(float64(runtime.NumGoroutine()-goroutines)/servers, "goroutines/server")
		if each > bound {
			b.Errorf("an idle server holds %.1f KB, want at most %d", each/1024, bound>>10)
		}
		cancel()
		running.Wait()
	}
}

// serveOnce runs a server and asks each of its sockets.
func serveOnce(ctx context.Context, b *testing.B, cfg ServerConfig, running *sync.WaitGroup) {
	s, err := NewServer(cfg)
	if err == nil {
		err = s.Listen(ctx)
	}
	if err != nil {
		b.Fatal(err)
	}
	running.Go(func() { _ = s.Run(ctx) })
	asker, err := net.ListenUDP("udp", nil)
	if err != nil {
		b.Fatal(err)
	}
	defer asker.Close()
	for _, k := range s.sockets {
		_, err := asker.WriteToUDPAddrPort(packed(b, query1("productpage.ns1.", dns.TypeA)), k.addr)
		if err == nil {
			_, _, err = asker.ReadFrom(make([]byte, 512))
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}

// memory is what the heap and the stacks of goroutines hold.
func memory() uint64 {
	debug.FreeOSMemory()
	debug.FreeOSMemory() // the second one empties the pools
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc + m.StackInuse
}
