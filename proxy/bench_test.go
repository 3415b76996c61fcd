package proxy

import (
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
