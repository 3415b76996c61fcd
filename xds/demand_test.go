package xds_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ztunnel-go/ztunnel/xds"
	"github.com/ztunnel-go/ztunnel/xds/workloadpb"
	"github.com/ztunnel-go/ztunnel/xds/xdstest"
)

func onDemand(c *xds.Config) { c.OnDemand = true }

// asked are the names of all requests to subscribe and to unsubscribe, but for the
// first ones.
func (w *world) asked() (subscribed, unsubscribed []string, requests int) {
	for _, r := range w.server.Requests() {
		if r.GetNode() == nil && len(r.GetResourceNamesSubscribe())+len(r.GetResourceNamesUnsubscribe()) > 0 {
			requests++
			subscribed = append(subscribed, r.GetResourceNamesSubscribe()...)
			unsubscribed = append(unsubscribed, r.GetResourceNamesUnsubscribe()...)
		}
	}
	nothing := func(name string) bool { return strings.HasPrefix(name, "nothing/") }
	return slices.DeleteFunc(subscribed, nothing), slices.DeleteFunc(unsubscribed, nothing), requests
}

// TestST_XDS04_OnDemandCoherency: who waited for a resource finds it, however much
// came with it.
func TestST_XDS04_OnDemandCoherency(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{}, onDemand)
		var resources []xdstest.Resource
		for i := range 10_000 {
			r := xdstest.Workload(workload(fmt.Sprintf("foo%d", i), fmt.Sprintf("10.0.%d.%d", i/250, i%250+1)))
			if i > 0 {
				r.Aliases = append(r.Aliases, "foo0") // what belongs together is sent together
			}
			resources = append(resources, r)
		}
		slices.Reverse(resources)
		w.server.Set(resources...)
		w.settle()
		if err := w.client.Demand(t.Context(), "foo0"); err != nil {
			t.Fatal(err)
		}
		// No wait: it is there when Demand returns.
		if !w.has("foo0") || !w.has("foo9999") {
			t.Errorf("foo0: %t, foo9999: %t", w.has("foo0"), w.has("foo9999"))
		}
	})
}

// TestST_XDS16_Wakes: by canonical name, by alias, by a removal; all who wait for
// a name are woken by one answer to one question.
func TestST_XDS16_Wakes(t *testing.T) {
	service := &workloadpb.Service{Name: "s", Namespace: "ns", Hostname: "s.example", Addresses: []*workloadpb.NetworkAddress{{Network: "net", Address: []byte{10, 0, 0, 9}}}}
	for _, key := range []string{"uid1", "/1.2.3.4", "/2001:db8::1", "ns/s.example", "net/10.0.0.9", "uid404", "/9.9.9.9", "ns/none.example", "bad"} {
		t.Run(strings.ReplaceAll(key, "/", "|"), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, xdstest.Config{}, onDemand)
				both := workload("uid1", "1.2.3.4")
				both.Addresses = append(both.Addresses, netip.MustParseAddr("2001:db8::1").AsSlice())
				w.server.Set(xdstest.Workload(both), xdstest.Service(service), xdstest.Bad(xdstest.AddressType, "bad"))
				w.settle()
				w.server.Pause()
				var waiters sync.WaitGroup
				start := time.Now()
				for range 10 {
					waiters.Go(func() {
						if err := w.client.Demand(t.Context(), key); err != nil {
							t.Errorf("Demand: %v", err)
						}
					})
				}
				sleep(time.Second)
				w.server.Resume()
				waiters.Wait()
				if d := time.Since(start); d > 2*time.Second {
					t.Errorf("woken after %v", d)
				}
				if sub, _, _ := w.asked(); !slices.Equal(sub, []string{key}) {
					t.Errorf("asked for %q, want %q once", sub, key)
				}
			})
		})
	}
}

// TestST_XDS16_Bounded: without an answer a wait ends after 5 s or with its
// context, and the name is asked for again later.
func TestST_XDS16_Bounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{}, onDemand)
		w.settle()
		w.server.Pause()
		for i := range 2 {
			start := time.Now()
			err := w.client.Demand(t.Context(), "uid1")
			if !errors.Is(err, xds.ErrDemandTimeout) || time.Since(start) != 5*time.Second {
				t.Errorf("%v after %v", err, time.Since(start))
			}
			synctest.Wait()
			// A question without an answer is repeated only with an end to the first.
			if sub, unsub, _ := w.asked(); len(sub) != i+1 || len(unsub) != i+1 {
				t.Errorf("subscribed %q, unsubscribed %q", sub, unsub)
			}
		}
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, errors.New("the connection is gone"))
		defer cancel()
		if err := w.client.Demand(ctx, "uid2"); err == nil || !strings.Contains(err.Error(), "the connection is gone") || !strings.Contains(err.Error(), "uid2") {
			t.Errorf("got %v, want the cause and the name", err)
		}
		w.server.Set(xdstest.Workload(workload("uid1", "1.2.3.4")))
		w.server.Resume()
		if err := w.client.Demand(t.Context(), "uid1"); err != nil || !w.has("uid1") {
			t.Errorf("%v, there %t", err, w.has("uid1"))
		}
	})
}

// TestST_XDS16_NegativeAnswer: counts for some seconds, then the name is asked for
// again, and is answered because it was unsubscribed from.
func TestST_XDS16_NegativeAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{}, onDemand)
		demand := func() {
			t.Helper()
			start := time.Now()
			if err := w.client.Demand(t.Context(), "/1.2.3.4"); err != nil || time.Since(start) > time.Second {
				t.Errorf("%v after %v", err, time.Since(start))
			}
		}
		for range 100 {
			demand()
		}
		if sub, _, _ := w.asked(); len(sub) != 1 {
			t.Errorf("asked %d times", len(sub))
		}
		sleep(6 * time.Second)
		demand()
		if sub, _, _ := w.asked(); len(sub) != 2 {
			t.Errorf("asked %d times, want 2", len(sub))
		}
		sleep(6 * time.Second)
		w.server.Set(xdstest.Workload(workload("uid1", "1.2.3.4")))
		demand()
		if !w.has("uid1") {
			t.Error("the workload is not there")
		}
		// It goes, and its address comes back with another.
		w.server.Remove(xdstest.AddressType, "uid1")
		sleep(6 * time.Second)
		w.server.Set(xdstest.Workload(workload("uid2", "1.2.3.4")))
		demand()
		if w.has("uid1") || !w.has("uid2") {
			t.Errorf("uid1 %t, uid2 %t", w.has("uid1"), w.has("uid2"))
		}
	})
}

// TestST_XDS16_SurvivesReconnect: what somebody waits for is asked for on the next
// stream, what nobody waits for any more is not.
func TestST_XDS16_SurvivesReconnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{}, onDemand)
		w.server.Set(xdstest.Workload(workload("uid1", "1.2.3.4")), xdstest.Workload(workload("uid2", "1.2.3.5")))
		w.settle()
		w.server.Pause()
		var waiters sync.WaitGroup
		waiters.Go(func() {
			if err := w.client.Demand(t.Context(), "/1.2.3.4"); err != nil {
				t.Error(err)
			}
		})
		sleep(time.Second) // it is asked
		w.setDown(errors.New("connection refused"))
		sleep(time.Millisecond)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := w.client.Demand(ctx, "/1.2.3.5"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("disconnected: %v", err)
		}
		w.setDown(nil)
		w.server.Resume()
		waiters.Wait()
		w.settle()
		if sub, _, _ := w.asked(); !w.has("uid1") || w.has("uid2") || !slices.Equal(sub, []string{"/1.2.3.4", "/1.2.3.4"}) {
			t.Errorf("uid1 %t, uid2 %t, asked for %q", w.has("uid1"), w.has("uid2"), sub)
		}
	})
}

// TestOnDemandAfterResourceExhausted: without versions, names keep up the
// subscription.
func TestOnDemandAfterResourceExhausted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{EchoLimit: 2}, onDemand)
		for i := range 3 {
			w.server.Set(xdstest.Workload(workload(fmt.Sprintf("uid%d", i), fmt.Sprintf("1.2.3.%d", i+1))))
			if err := w.client.Demand(t.Context(), fmt.Sprintf("uid%d", i)); err != nil {
				t.Fatal(err)
			}
		}
		w.server.Disconnect(nil)
		w.server.Remove(xdstest.AddressType, "uid0")
		sleep(time.Minute)
		changed := workload("uid1", "1.2.3.200")
		w.server.Set(xdstest.Workload(changed))
		w.settle()
		if _, ok := w.store.Workload("", netip.MustParseAddr("1.2.3.200")); w.has("uid0") || !ok || !w.has("uid2") {
			t.Errorf("uid0 %t, uid1 at its new address %t, uid2 %t", w.has("uid0"), ok, w.has("uid2"))
		}
	})
}

// TestFault_92_AddressScan: a million random addresses cost neither us nor the
// server more than some thousands; the server is asked in batches, at a bounded
// pace, and others are still answered.
func TestFault_92_AddressScan(t *testing.T) {
	n := 1_000_000
	if testing.Short() || raceEnabled {
		n = 50_000
	}
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{}, func(c *xds.Config) { c.OnDemand, c.Logger = true, nil })
		w.server.ForgetRequests()
		w.server.Set(xdstest.Workload(workload("uid1", "1.2.3.4")))
		w.settle()
		heap := func() uint64 {
			var m runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&m)
			return m.HeapAlloc
		}
		scan := func(from, to int) {
			var scanners sync.WaitGroup
			for k := range 256 {
				scanners.Go(func() {
					for i := from + k; i < to; i += 256 {
						key := "/" + netip.AddrFrom4([4]byte{11, byte(i >> 16), byte(i >> 8), byte(i)}).String()
						if err := w.client.Demand(t.Context(), key); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			scanners.Wait()
		}
		scan(0, 20_000)
		before, start, requests := heap(), time.Now(), w.server.RequestCount()
		scan(20_000, n)
		took := time.Since(start)
		if grown := int64(heap()) - int64(before); grown > 8<<20 {
			t.Errorf("the heap has grown by %d bytes", grown)
		}
		if names := w.server.Subscribed(xdstest.AddressType); names > 8192+2*128 {
			t.Errorf("the server holds subscriptions to %d names", names)
		}
		if rate := float64(w.server.RequestCount()-requests) / took.Seconds(); rate > 4*41 { // two for the names, two for the answers
			t.Errorf("%.0f requests in a second", rate)
		}
		if err := w.client.Demand(t.Context(), "/1.2.3.4"); err != nil || !w.has("uid1") {
			t.Errorf("after the scan: %v, there %t", err, w.has("uid1"))
		}
	})
}

// TestFault_92_ScanWithoutServer: what was asked for while there is no stream, and
// given up, leaves nothing.
func TestFault_92_ScanWithoutServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{}, func(c *xds.Config) { c.OnDemand, c.Logger = true, nil })
		w.settle()
		w.setDown(errors.New("connection refused"))
		synctest.Wait()
		heap := func() int64 {
			var m runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&m)
			return int64(m.HeapAlloc)
		}
		canceled, cancel := context.WithCancel(t.Context())
		cancel()
		scan := func(from, to int) {
			for i := from; i < to; i++ {
				if err := w.client.Demand(canceled, fmt.Sprintf("/net-%040d/1.2.3.4", i)); !errors.Is(err, context.Canceled) {
					t.Fatalf("key %d: %v", i, err)
				}
			}
		}
		scan(0, 20_000)
		before := heap()
		scan(20_000, 120_000)
		if grown := heap() - before; grown > 4<<20 {
			t.Errorf("the heap has grown by %d bytes", grown)
		}
	})
}

// TestDemandLimit: beyond so many that wait, an error at once.
func TestDemandLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{}, onDemand)
		w.settle()
		w.server.Pause()
		ctx, cancel := context.WithCancel(t.Context())
		var waiters sync.WaitGroup
		for i := range 4096 {
			waiters.Go(func() {
				if err := w.client.Demand(ctx, fmt.Sprintf("uid%d", i)); !errors.Is(err, context.Canceled) {
					t.Errorf("waiter %d: %v", i, err)
				}
			})
		}
		synctest.Wait()
		start := time.Now()
		if err := w.client.Demand(ctx, "one more"); !errors.Is(err, xds.ErrTooManyDemands) || !time.Now().Equal(start) {
			t.Errorf("got %v", err)
		}
		cancel()
		waiters.Wait()
		w.server.Resume()
		if err := w.client.Demand(t.Context(), "one more"); err != nil {
			t.Errorf("after the others have left: %v", err)
		}
	})
}

// TestDemandKeys: what is no name of a resource is not asked for; where everything
// is subscribed to, nothing is.
func TestDemandKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{}, onDemand)
		for _, key := range []string{"", "*"} {
			if err := w.client.Demand(t.Context(), key); err == nil {
				t.Errorf("%q was asked for", key)
			}
		}
		all := newWorld(t, xdstest.Config{}, nil)
		if err := all.client.Demand(t.Context(), "uid1"); err != nil {
			t.Error(err)
		}
		w.settle()
		if sub, _, _ := all.asked(); len(sub) != 0 {
			t.Errorf("asked for %q", sub)
		}
	})
}

// TestDemandDroppedBeforeItsTurn: what is given up while others have their turn is
// not asked for.
func TestDemandDroppedBeforeItsTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{}, onDemand)
		w.settle()
		if err := w.client.Demand(t.Context(), "uid1"); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if err := w.client.Demand(ctx, "uid2"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		sleep(time.Minute)
		if sub, _, _ := w.asked(); !slices.Equal(sub, []string{"uid1"}) {
			t.Errorf("asked for %q", sub)
		}
	})
}

// TestDemandDroppedWhenCanceled: what nobody waits for is not asked for.
func TestDemandDroppedWhenCanceled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{}, onDemand)
		w.settle()
		w.setDown(status.Error(codes.Unavailable, "down"))
		ctx, cancel := context.WithCancel(t.Context())
		var waiters sync.WaitGroup
		waiters.Go(func() { _ = w.client.Demand(ctx, "uid1") })
		synctest.Wait()
		cancel()
		waiters.Wait()
		w.setDown(nil)
		sleep(time.Minute)
		w.settle()
		if sub, unsub, _ := w.asked(); len(sub)+len(unsub) != 0 {
			t.Errorf("asked for %q, unsubscribed from %q", sub, unsub)
		}
	})
}
