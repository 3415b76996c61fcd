package proxy

import (
	"crypto/rand"
	"crypto/x509"
	"math/big"
	"os"
	"testing"
	"time"
)

// BenchmarkCRLReload loads lists of 100 000 entries beside 1 000 tunnels, of which
// one list ends none, and the other, after which the tunnels are made anew, all.
func BenchmarkCRLReload(b *testing.B) {
	const entries, tunnels = 100_000, 1_000
	r := newRegistry(b)
	ia := r.root.Intermediate(b)
	chain, _ := ia.Leaf(b, clientID)
	random := make([]byte, 16*entries)
	if _, err := rand.Read(random); err != nil {
		b.Fatal(err)
	}
	crowd := func(l *x509.RevocationList) {
		for i := range entries {
			l.RevokedCertificateEntries = append(l.RevokedCertificateEntries, x509.RevocationListEntry{
				SerialNumber: new(big.Int).SetBytes(random[16*i : 16*i+16]), RevocationTime: l.ThisUpdate,
			})
		}
	}
	harmless, deadly := r.root.CRL(b, 1, nil, crowd), r.root.CRL(b, 2, chain[1:2], crowd)
	var load, none, all time.Duration
	round := func(list []byte) time.Duration {
		if err := os.WriteFile(r.path, list, 0o600); err != nil {
			b.Fatal(err)
		}
		start := time.Now()
		if err := r.crls.Load(); err != nil {
			b.Fatal(err)
		}
		loaded := time.Now()
		load += loaded.Sub(start)
		r.proxy.judgeTunnels(b.Context(), r.proxy.trust())
		return time.Since(loaded)
	}
	r.load(b)
	for b.Loop() {
		clear(r.proxy.tunnels.all)
		r.load(b)
		establish := r.handshake(b, reporterDestination, chain)
		first := establish()
		for range tunnels - 1 {
			r.handshake(b, reporterDestination, chain)()
		}
		none += round(harmless)
		if first.cause != nil {
			b.Fatal(first.cause)
		}
		all += round(deadly)
		if first.cause == nil {
			b.Fatal("a revoked tunnel goes on")
		}
	}
	ms := func(d time.Duration, n int) float64 { return d.Seconds() * 1000 / float64(n) }
	b.ReportMetric(ms(load, 2*b.N), "ms-load")
	b.ReportMetric(ms(none, b.N), "ms-judge-none-ended")
	b.ReportMetric(ms(all, b.N), "ms-judge-all-ended")
}
