package proxy

import (
	"errors"
	"io"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/internal/zlog"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/state"
)

// BenchmarkTelemetry is what one connection pays for its counters and its
// access-log line.
func BenchmarkTelemetry(b *testing.B) {
	log, err := zlog.New(zlog.Config{Out: io.Discard, Filter: "info", Sync: true})
	if err != nil {
		b.Fatal(err)
	}
	workload := func(name string) *state.Workload {
		return &state.Workload{
			Name: name, WorkloadName: name, Namespace: "default", CanonicalName: name, CanonicalRevision: "v1", ClusterID: "Kubernetes",
			Identity: spiffeid.RequireFromString("spiffe://cluster.local/ns/default/sa/" + name),
		}
	}
	local := workload("client")
	route := state.Route{
		Protocol: state.HBONE, NextHop: netip.MustParseAddrPort("10.0.0.2:15008"), Authority: state.Authority{Addr: netip.MustParseAddrPort("10.0.0.2:80")}, Workload: workload("server"),
		Service: &state.ServiceRef{Hostname: "server.default.svc.cluster.local", Name: "server", Namespace: "default"},
	}
	src := netip.MustParseAddrPort("10.0.0.1:40000")
	for _, tt := range []struct {
		name string
		log  *slog.Logger
	}{
		{"log", log.Logger().With("component", "access")},
		{"nolog", slog.New(slog.DiscardHandler)},
	} {
		b.Run(tt.name, func(b *testing.B) {
			m := NewMetrics(prometheus.NewRegistry(), MetricsConfig{})
			b.ReportAllocs()
			for b.Loop() {
				c := outboundConnection(src, local, route, "10.0.0.2:80")
				c.open(b.Context(), m, tt.log, time.Now())
				c.end(b.Context(), outcome{toUp: 11, toDown: 22})
			}
		})
	}
}

// BenchmarkConnection is a connection from accept to the last log line, with one
// byte to and fro: through two proxies and a tunnel that is there, or through one
// alone. The networks are in memory, so the time says little and the allocations,
// which are those of both proxies and the applications, much.
func BenchmarkConnection(b *testing.B) {
	m, end := newMesh(b)
	defer end()
	client, server := m.add("client", "10.0.1.2"), m.add("server", "10.0.2.2")
	plain := m.add("plain", "10.0.3.2", uncaptured)
	for _, n := range []*node{client, server} {
		n.proxy.access = slog.New(slog.DiscardHandler)
	}
	for _, tt := range []struct {
		name string
		dst  netip.AddrPort
	}{{"hbone", server.echoAddr()}, {"tcp", plain.echoAddr()}} {
		b.Run(tt.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := client.request(tt.dst, "x"); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkDoubleHBONE is a connection through a gateway against one to a proxy of
// our own network, turn by turn: new ones with one byte to and fro, over tunnels
// that are there (the outer and the inner ones, which are renewed as they age),
// and a mebibyte to and fro over one that stays. The networks are in memory: what
// counts is the ratio, of processor time and without any distance.
func BenchmarkDoubleHBONE(b *testing.B) {
	m, end := newMesh(b)
	defer end()
	w := m.makeNetworks()
	near := m.certify("near", "10.0.4.2", w.root, false, inNetwork("near"))
	for _, n := range m.nodes {
		if n.proxy != nil {
			n.proxy.access = slog.New(slog.DiscardHandler)
		}
	}
	single, double := near.echoAddr(), remoteVIP
	b.Run("connect", func(b *testing.B) {
		turns(b, func(dst netip.AddrPort) error { return w.client.request(dst, "x") }, single, double)
	})
	b.Run("bulk", func(b *testing.B) {
		conns := map[netip.AddrPort]netns.Conn{}
		for _, dst := range []netip.AddrPort{single, double} {
			conns[dst] = w.client.mustDial(dst)
			defer conns[dst].Close()
		}
		chunk, echo := make([]byte, 1<<20), make([]byte, 1<<20)
		b.SetBytes(int64(2 * len(chunk)))
		turns(b, func(dst netip.AddrPort) error {
			c := conns[dst]
			written := make(chan error, 1)
			go func() {
				_, err := c.Write(chunk)
				written <- err
			}()
			_, err := io.ReadFull(c, echo)
			return errors.Join(err, <-written)
		}, single, double)
	})
}

// turns runs both destinations alternately, and reports how many times as long
// the second one takes.
func turns(b *testing.B, run func(netip.AddrPort) error, first, second netip.AddrPort) {
	b.Helper()
	var took [2]time.Duration
	for b.Loop() {
		for i, dst := range []netip.AddrPort{first, second} {
			start := time.Now()
			if err := run(dst); err != nil {
				b.Fatal(err)
			}
			took[i] += time.Since(start)
		}
	}
	b.ReportMetric(float64(took[0].Nanoseconds())/float64(b.N), "single-ns")
	b.ReportMetric(float64(took[1].Nanoseconds())/float64(b.N), "double-ns")
	b.ReportMetric(float64(took[1])/float64(took[0]), "double/single")
}

// BenchmarkCopy is plain TCP through us, one direction, over loopback.
func BenchmarkCopy(b *testing.B) {
	app, down := tcpPair(b)
	up, server := tcpPair(b)
	var toUp, toDown atomic.Uint64
	var parts sync.WaitGroup
	parts.Go(func() { pipeTCP(b.Context(), down, up, &toUp, &toDown) })
	chunk := make([]byte, 128<<10)
	parts.Go(func() {
		_, _ = io.Copy(io.Discard, server)
		server.Close()
	})
	b.SetBytes(int64(len(chunk)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := app.Write(chunk); err != nil {
			b.Fatal(err)
		}
	}
	app.Close()
	parts.Wait()
}
