package xds

import (
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/ztunnel-go/ztunnel/state"
	"github.com/ztunnel-go/ztunnel/xds/discoverypb"
	"github.com/ztunnel-go/ztunnel/xds/workloadpb"
)

const (
	fullWorkloads = 100_000
	fullServices  = 10_000 // each has 10 of the workloads
	maxApply      = 3      // times what decoding takes
	fullRounds    = 7      // of which the median counts: a single one is moved by the collector
)

// fullSet is the first answer of istiod in a big mesh, services first, as its
// encoded resources.
func fullSet(b *testing.B) (names []string, payloads [][]byte) {
	for i := range fullServices {
		ns, host := serviceName(i)
		names = append(names, ns+"/"+host)
		payloads = append(payloads, marshal(b, serviceOf(&workloadpb.Service{
			Name: fmt.Sprintf("service-%05d", i), Namespace: ns, Hostname: host, Canonical: true,
			Addresses: []*workloadpb.NetworkAddress{{Network: "network-1", Address: ip4(172, i)}},
			Ports:     []*workloadpb.Port{{ServicePort: 80, TargetPort: 8080}, {ServicePort: 443, TargetPort: 8443}},
		})))
	}
	for i := range fullWorkloads {
		ns, host := serviceName(i / 10)
		name := fmt.Sprintf("service-%05d-6f7c9d8b5-%05d", i/10, i)
		uid := "cluster-1//Pod/" + ns + "/" + name
		names = append(names, uid)
		payloads = append(payloads, marshal(b, workloadOf(&workloadpb.Workload{
			Uid: uid, Name: name, Namespace: ns, Addresses: [][]byte{ip4(10, i)}, Network: "network-1",
			TunnelProtocol: workloadpb.TunnelProtocol_HBONE, ServiceAccount: fmt.Sprintf("account-%05d", i/10),
			Node: nodeName(i), ClusterId: "cluster-1",
			CanonicalName: fmt.Sprintf("service-%05d", i/10), CanonicalRevision: "v1", WorkloadName: fmt.Sprintf("service-%05d", i/10),
			Locality: &workloadpb.Locality{Region: "eu-central-1", Zone: fmt.Sprintf("eu-central-1%c", 'a'+rune(i%3))},
			Capacity: wrapperspb.UInt32(1),
			Services: map[string]*workloadpb.PortList{ns + "/" + host: {Ports: []*workloadpb.Port{{ServicePort: 80, TargetPort: 8080}, {ServicePort: 443, TargetPort: 8443}}}},
		})))
	}
	return names, payloads
}

func serviceName(i int) (ns, host string) {
	ns = fmt.Sprintf("namespace-%03d", i/20)
	return ns, fmt.Sprintf("service-%05d.%s.svc.cluster.local", i, ns)
}

func nodeName(i int) string {
	return fmt.Sprintf("ip-10-0-%d-%d.eu-central-1.compute.internal", i%1000/250, i%250)
}

func ip4(first byte, i int) []byte {
	a := netip.AddrFrom4([4]byte{first, byte(i >> 16), byte(i >> 8), byte(i)})
	return a.AsSlice()
}

// cost is the time that something takes: on the clock, and of the thread that does
// it, which other work on the machine and the collector beside it do not blur.
type cost struct{ wall, thread time.Duration }

func measure(b *testing.B, f func()) cost {
	var before, after unix.Rusage
	runtime.GC()
	start := time.Now()
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &before); err != nil {
		b.Fatal(err)
	}
	f()
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &after); err != nil {
		b.Fatal(err)
	}
	used := func(u *unix.Rusage) int64 { return u.Utime.Nano() + u.Stime.Nano() }
	return cost{time.Since(start), time.Duration(used(&after) - used(&before))}
}

// BenchmarkFirstFullSet applies the first full set to the empty store of one node.
// Decoding is part of that here, so it is measured alone beside it, in each round:
// what conversion and store add may take no more than three times as long, in the
// median of the rounds and in the time of the thread. It reports also the heap of
// the whole path per workload, once the response is gone.
func BenchmarkFirstFullSet(b *testing.B) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	names, payloads := fullSet(b)
	var thread, wall, heap []float64
	for b.Loop() {
		for range fullRounds {
			r := applyFullSet(b, names, payloads)
			thread, wall, heap = append(thread, r.thread), append(wall, r.wall), append(heap, r.heap)
		}
	}
	median := func(v []float64) float64 { return slices.Sorted(slices.Values(v))[len(v)/2] }
	b.ReportMetric(median(thread), "apply/decode")
	b.ReportMetric(median(wall), "apply/decode-wall")
	b.ReportMetric(median(heap), "heap-B/workload")
	if median(thread) > maxApply {
		b.Errorf("conversion and store take %.1f times as long as decoding (rounds: %.1f), want at most %d", median(thread), thread, maxApply)
	}
}

// fullSetRound are the ratios of apply to decode, and the bytes per workload.
type fullSetRound struct{ thread, wall, heap float64 }

func applyFullSet(b *testing.B, names []string, payloads [][]byte) fullSetRound {
	b.Helper()
	decode := measure(b, func() {
		for _, p := range payloads {
			var a workloadpb.Address
			if err := proto.Unmarshal(p, &a); err != nil {
				b.Fatal(err)
			}
		}
	})
	resources := make([]*discoverypb.Resource, len(names))
	for i, name := range names {
		resources[i] = &discoverypb.Resource{Name: name, Resource: &anypb.Any{Value: payloads[i]}}
	}
	before := heapInUse()
	store := state.New(state.Config{NodeName: nodeName(0), Network: "network-1"})
	all := measure(b, func() {
		if rejected := newAddresses(store).apply(resources, nil, nil); rejected != nil {
			b.Fatal(rejected)
		}
	})
	resources = nil
	heap := heapInUse() - before
	check(b, store)
	return fullSetRound{
		thread: float64(all.thread-decode.thread) / float64(decode.thread),
		wall:   float64(all.wall-decode.wall) / float64(decode.wall),
		heap:   float64(heap) / fullWorkloads,
	}
}

// check makes sure that the set is there, and keeps the store alive until then.
func check(b *testing.B, s *state.Store) {
	if w, ok := s.Workload("network-1", netip.MustParseAddr("10.0.1.1")); !ok || len(w.Services) != 1 {
		b.Fatalf("got %v, want a workload with a service", w)
	}
}

func heapInUse() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
