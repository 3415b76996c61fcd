package ca_test

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"runtime"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
)

// crowd fills a list with n serial numbers of certificates that nobody has.
func crowd(tb testing.TB, n int) catest.CRLOption {
	tb.Helper()
	random := make([]byte, 16*n)
	if _, err := rand.Read(random); err != nil {
		tb.Fatal(err)
	}
	return func(l *x509.RevocationList) {
		for i := range n {
			l.RevokedCertificateEntries = append(l.RevokedCertificateEntries, x509.RevocationListEntry{
				SerialNumber: new(big.Int).SetBytes(random[16*i : 16*i+16]), RevocationTime: l.ThisUpdate,
			})
		}
	}
}

// BenchmarkHandshakeCRL measures the same handshake without lists and with
// 100 000 entries on each side, in turns.
func BenchmarkHandshakeCRL(b *testing.B) {
	root := catest.NewCA(b, "td.test")
	client, server := root.SVID(b, web), root.SVID(b, web)
	lists := mustLoad(b, root.CRL(b, 1, nil, crowd(b, 100_000)))
	type pair struct{ client, server *tls.Config }
	with := func(opts ca.TLSOptions) pair {
		return pair{clientTLS(b, client, opts, web), ca.ServerTLS(server, opts)}
	}
	sides := [2]pair{with(ca.TLSOptions{}), with(ca.TLSOptions{Revoked: lists.Check})}
	var took [2]time.Duration
	for b.Loop() {
		for i, p := range sides {
			start := time.Now()
			handshakeOnce(b, p.client, p.server)
			took[i] += time.Since(start)
		}
	}
	b.ReportMetric(float64(took[0].Nanoseconds())/float64(b.N), "ns-without/op")
	b.ReportMetric(float64(took[1].Nanoseconds())/float64(b.N), "ns-with/op")
}

// BenchmarkCRLCheck is what the lists add to one verification.
func BenchmarkCRLCheck(b *testing.B) {
	root := catest.NewCA(b, "td.test")
	path := pathOf(b, root.Intermediate(b))
	lists := mustLoad(b, root.CRL(b, 1, nil, crowd(b, 100_000)))
	b.ReportAllocs()
	for b.Loop() {
		if err := lists.Check(path); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkCRLLoad loads a list of a million entries, and tells what is kept of
// it and what loading took at its peak.
func BenchmarkCRLLoad(b *testing.B) {
	root := catest.NewCA(b, "td.test")
	f := newCRLFile(b)
	f.write(root.CRL(b, 1, nil, crowd(b, 1_000_000)))
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	b.ReportAllocs()
	var lists *ca.CRLs
	for b.Loop() {
		lists = ca.NewCRLs(ca.CRLConfig{Path: f.path})
		if err := lists.Load(); err != nil {
			b.Fatal(err)
		}
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/1e6, "MB-kept")
	runtime.KeepAlive(lists)
}
