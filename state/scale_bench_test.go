package state

import (
	"bytes"
	"math/bits"
	"math/rand/v2"
	"net/netip"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"sync/atomic"
	"testing"
	"time"
)

// BenchmarkApplyFullSet is the first response of a large cluster.
func BenchmarkApplyFullSet(b *testing.B) {
	u := scaleUpdate(0)
	runtime.GC()
	b.ReportAllocs()
	for b.Loop() {
		apply(b, New(Config{Network: "network-1"}), u)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/scaleWorkloads, "ns/workload")
}

// BenchmarkApplyFullSetAgain is the same when everything is known already, as
// after a reconnect.
func BenchmarkApplyFullSetAgain(b *testing.B) {
	u := scaleUpdate(0)
	s := New(Config{Network: "network-1"})
	apply(b, s, u)
	runtime.GC()
	for b.Loop() {
		apply(b, s, u)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/scaleWorkloads, "ns/workload")
}

// heap returns the bytes that live, and those of the memory that they occupy.
func heap() (live, inUse int64) {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc), int64(m.HeapInuse)
}

// residentSet is the memory of the process as the kernel counts it, in bytes.
func residentSet(b *testing.B) int64 {
	debug.FreeOSMemory()
	statm, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		b.Fatal(err)
	}
	pages, err := strconv.ParseInt(string(bytes.Fields(statm)[1]), 10, 64)
	if err != nil {
		b.Fatal(err)
	}
	return pages * int64(os.Getpagesize())
}

// BenchmarkMemory holds a Store with both copies of its indexes to 1.2 KB of heap
// in use for each workload, services and endpoints included, and what lives to
// 110 % of that of the beginning after ten rounds in which everything was replaced:
// by workloads of other names, by the same, and by a new set. An iteration is all
// of that; the time says nothing.
func BenchmarkMemory(b *testing.B) {
	const limit = 1200
	for b.Loop() {
		live, inUse := heap()
		rss := residentSet(b)
		s := New(Config{Network: "network-1", NodeName: "node-0001"})
		apply(b, s, scaleUpdate(0))
		firstLive, firstInUse := heap()
		firstLive, firstInUse = firstLive-live, firstInUse-inUse
		firstRSS := residentSet(b) - rss
		for round := 1; round <= 10; round++ {
			replaceRound(b, s, round)
		}
		lastLive, lastInUse := heap()
		lastLive, lastInUse = lastLive-live, lastInUse-inUse
		b.ReportMetric(float64(firstInUse)/scaleWorkloads, "B/workload")
		b.ReportMetric(float64(firstLive)/scaleWorkloads, "live-B/workload")
		b.ReportMetric(float64(firstRSS)/scaleWorkloads, "RSS-B/workload")
		b.ReportMetric(float64(lastLive)/float64(firstLive), "last/first")
		b.ReportMetric(float64(lastInUse)/float64(firstInUse), "in-use-last/first")
		if firstInUse > limit*scaleWorkloads {
			b.Errorf("%d bytes of heap in use for each workload, want at most %d", firstInUse/scaleWorkloads, limit)
		}
		if lastLive > firstLive+firstLive/10 {
			b.Errorf("the heap grew from %d to %d bytes in ten rounds", firstLive, lastLive)
		}
		runtime.KeepAlive(s)
	}
}

func replaceRound(b *testing.B, s *Store, round int) {
	switch generation := round / 3; round % 3 {
	case 0:
		u := scaleUpdate(generation)
		u.Removed = scaleRemoval(generation - 1)
		apply(b, s, u)
	case 1:
		apply(b, s, scaleUpdate(generation))
	case 2:
		if err := s.Replace(scaleUpdate(generation)); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkRouteBesideReplacement compares the latencies of Route while nothing is
// written and while all of a large cluster is replaced again and again. Beside each
// route, lookups in a map that nobody writes are timed: what keeps these waiting
// (the scheduler, the collector, other work on the machine) is nothing that the
// tables do, and a route may wait for it as long.
func BenchmarkRouteBesideReplacement(b *testing.B) {
	u := scaleUpdate(0)
	s := New(Config{Network: "network-1"})
	apply(b, s, u)
	runtime.GC()
	for b.Loop() {
		quiet, _ := routeLatencies(b, s, nil)
		var rounds atomic.Int64
		stop, done := make(chan struct{}), make(chan error)
		go func() {
			done <- replaceUntil(s, u, &rounds, stop)
		}()
		busy, control := routeLatencies(b, s, func() bool { return rounds.Load() >= 6 })
		close(stop)
		if err := <-done; err != nil {
			b.Fatal(err)
		}
		checkLatencies(b, quiet, busy, control)
	}
}

func checkLatencies(b *testing.B, quiet, busy, control *latencies) {
	b.Helper()
	q999, p999, p9999 := quiet.quantile(.999), busy.quantile(.999), busy.quantile(.9999)
	c999, c9999 := control.quantile(.999), control.quantile(.9999)
	b.ReportMetric(float64(q999.Nanoseconds()), "quiet-p99.9-ns")
	b.ReportMetric(float64(p999.Nanoseconds()), "p99.9-ns")
	b.ReportMetric(float64(p9999.Nanoseconds()), "p99.99-ns")
	b.ReportMetric(float64(c999.Nanoseconds()), "control-p99.9-ns")
	b.ReportMetric(float64(c9999.Nanoseconds()), "control-p99.99-ns")
	if limit := max(5*q999, 100*time.Microsecond, 2*c999); p999 > limit {
		b.Errorf("p99.9 is %v beside replacement, %v without and %v of the control, want at most %v", p999, q999, c999, limit)
	}
	if limit := max(10*time.Millisecond, 2*c9999); p9999 > limit {
		b.Errorf("p99.99 is %v beside replacement, and %v of the control, want at most %v", p9999, c9999, limit)
	}
}

func replaceUntil(s *Store, u Update, rounds *atomic.Int64, stop <-chan struct{}) error {
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		write := s.Apply
		if rounds.Load()%2 == 1 {
			write = s.Replace
		}
		if err := write(u); err != nil {
			return err
		}
		rounds.Add(1)
	}
}

// routeLatencies measures half a million routes by VIP, and on until enough says
// that it is, and the control beside each.
func routeLatencies(b *testing.B, s *Store, enough func() bool) (routes, control *latencies) {
	r := rand.New(rand.NewPCG(1, 2))
	q := Query{Source: &Workload{Namespace: "ns", Network: "network-1"}}
	routes, control = &latencies{}, &latencies{}
	reference, sum := routeReference(), 0
	for i := 0; i < 500_000 || enough != nil && !enough(); i++ {
		first := r.IntN(scaleServices - routeMaxRatio)
		q.Dst = netip.AddrPortFrom(scaleVIP(first), 80)
		start := time.Now()
		_, err := s.Route(q)
		middle := time.Now()
		for k := range routeMaxRatio {
			sum += reference[scaleVIP(first+k)]
		}
		control.add(time.Since(middle))
		routes.add(middle.Sub(start))
		if err != nil {
			b.Fatal(err)
		}
	}
	runtime.KeepAlive(sum)
	return routes, control
}

// latencies counts durations by their leading bits, which costs no memory while
// they are measured.
type latencies struct {
	counts [64 * latencySteps]int
	n      int
}

const latencySteps = 32 // between powers of two: an error of at most 3 %

func (l *latencies) add(d time.Duration) {
	v := uint64(d) | latencySteps
	shift := bits.Len64(v) - bits.Len64(latencySteps)
	l.counts[shift*latencySteps+int(v>>shift)%latencySteps]++
	l.n++
}

func (l *latencies) quantile(q float64) time.Duration {
	left := int(float64(l.n) * q)
	for i, n := range l.counts {
		if left -= n; left < 0 {
			return time.Duration(latencySteps+i%latencySteps) << (i / latencySteps)
		}
	}
	return 0
}

// quantile sorts d.
func quantile(d []time.Duration, q float64) time.Duration {
	slices.Sort(d)
	return d[int(float64(len(d)-1)*q)]
}
