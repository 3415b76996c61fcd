package dns

import (
	"context"
	"log/slog"
	"net/netip"
	"testing"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/ztunnel-go/ztunnel/proxy/netns/memnet"
)

// An answer from the store costs the text of its name and no more, as long as nobody
// wants to read about it.
func TestLocalAnswersHardlyAllocate(t *testing.T) {
	store := fixture(t)
	s, err := NewServer(ServerConfig{
		Store: store, Local: localOf(store, client1), Network: memnet.New(memnet.Config{}).Host(ourIP),
		Addrs: []netip.AddrPort{proxyAddr}, IPv6: true, Metrics: NewMetrics(prometheus.NewRegistry()),
		Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	m := new(dns.Msg).SetQuestion("www.google.com.ns1.svc.cluster.local.", dns.TypeA)
	m.SetEdns0(1232, true)
	raw := packed(t, m)
	w := takeWork()
	allocs := testing.AllocsPerRun(1000, func() {
		if _, _, v := s.now(ended, w, raw, overUDP); v != answered {
			t.Fatal(v)
		}
	})
	if allocs > 2 {
		t.Errorf("%v allocations, want at most 2", allocs)
	}
}

func BenchmarkLocalAnswer(b *testing.B) {
	store := fixture(b)
	s, err := NewServer(ServerConfig{
		Store: store, Local: localOf(store, client1), Network: memnet.New(memnet.Config{}).Host(ourIP),
		Addrs: []netip.AddrPort{proxyAddr}, IPv6: true, Metrics: NewMetrics(prometheus.NewRegistry()),
	})
	if err != nil {
		b.Fatal(err)
	}
	ended, cancel := context.WithCancel(b.Context())
	cancel()
	raw := packed(b, new(dns.Msg).SetQuestion("www.google.com.ns1.svc.cluster.local.", dns.TypeA))
	w := takeWork()
	b.ReportAllocs()
	for b.Loop() {
		s.now(ended, w, raw, overUDP)
	}
}
