package xds_test

import (
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztunnel-go/ztunnel/xds"
	"github.com/ztunnel-go/ztunnel/xds/workloadpb"
	"github.com/ztunnel-go/ztunnel/xds/xdstest"
)

// TestFault_92_ScanKeepsWhatIsThere: what was asked for by its canonical name, and is
// in the store, is followed however many other names were asked for since.
func TestFault_92_ScanKeepsWhatIsThere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{}, onDemand)
		service := func(ip byte) xdstest.Resource {
			return xdstest.Service(&workloadpb.Service{
				Name: "s", Namespace: "ns", Hostname: "s.example", Addresses: []*workloadpb.NetworkAddress{{Address: []byte{10, 0, 0, ip}}},
			})
		}
		w.server.Set(service(1), xdstest.Workload(workload("uid1", "1.2.3.4")), xdstest.Workload(workload("uid2", "1.2.3.5")))
		for _, key := range []string{"ns/s.example", "uid1", "uid2"} {
			if err := w.client.Demand(t.Context(), key); err != nil {
				t.Fatal(err)
			}
		}
		var scanners sync.WaitGroup
		for k := range 256 {
			scanners.Go(func() {
				for i := k; i < 10_000; i += 256 {
					if err := w.client.Demand(t.Context(), fmt.Sprintf("/11.0.%d.%d", i/250, i%250)); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		scanners.Wait()
		sleep(time.Minute)
		if names := w.server.Subscribed(xdstest.AddressType); names > 8192+3+128 {
			t.Errorf("the server holds subscriptions to %d names", names)
		}
		w.server.Set(service(2), xdstest.Workload(workload("uid1", "1.2.3.6")))
		w.server.Remove(xdstest.AddressType, "uid2")
		sleep(time.Minute)
		if d := w.store.Dump(); len(d.Services) != 1 || !slices.Equal(d.Services[0].VIPs, []string{"/10.0.0.2"}) {
			t.Errorf("the services: %+v, want one at its new address", d.Services)
		}
		if _, ok := w.store.Workload("", netip.MustParseAddr("1.2.3.6")); !ok || w.has("uid2") {
			t.Errorf("the workload is at its new address: %t; the removed one is there: %t", ok, w.has("uid2"))
		}
	})
}

// TestDemandAfterRemoval: an answer that named something by an address does not
// outlive it: the address may have gone to somebody else.
func TestDemandAfterRemoval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{}, onDemand)
		w.server.Set(xdstest.Workload(workload("uid1", "1.2.3.4")), xdstest.Workload(workload("uid2", "1.2.3.5")))
		demand := func(key string, asked int) {
			t.Helper()
			if err := w.client.Demand(t.Context(), key); err != nil {
				t.Fatal(err)
			}
			if sub, _, _ := w.asked(); len(sub) != asked {
				t.Errorf("asked for %q, want %d names", sub, asked)
			}
		}
		demand("/1.2.3.4", 1)
		demand("/1.2.3.5", 2)
		demand("/1.2.3.6", 3)
		w.server.Remove(xdstest.AddressType, "uid1")
		w.settle()
		demand("/1.2.3.5", 3) // is still there
		demand("/1.2.3.6", 3) // was never there
		demand("/1.2.3.4", 4)
		demand("/1.2.3.4", 4)
		w.server.Remove(xdstest.AddressType, "uid2")
		w.settle()
		demand("uid2", 5)
		demand("uid2", 5)
	})
}

// TestDemandIsNotEvictedWhileWaitedFor: of all that is remembered, what somebody waits
// for again goes last.
func TestDemandIsNotEvictedWhileWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{}, func(c *xds.Config) { c.OnDemand, c.Logger = true, nil })
		w.server.Set(xdstest.Workload(workload("uid1", "1.2.3.4")))
		demand := func(key string) {
			if err := w.client.Demand(t.Context(), key); err != nil {
				t.Error(err)
			}
		}
		demand("/1.2.3.4")
		var others sync.WaitGroup
		for k := range 128 {
			others.Go(func() {
				for i := k; i < 8191; i += 128 {
					demand(fmt.Sprint("other", i))
				}
			})
		}
		others.Wait()
		sleep(6 * time.Second)
		w.server.Pause()
		others.Go(func() { demand("/1.2.3.4") })
		synctest.Wait()
		others.Go(func() { demand("one more") })
		sleep(time.Second)
		w.server.Resume()
		others.Wait()
	})
}

// TestDemandAcrossReconnect: nobody has to ask again for the next stream to ask.
func TestDemandAcrossReconnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{}, onDemand)
		w.server.Set(xdstest.Workload(workload("uid1", "1.2.3.4")))
		w.settle()
		w.server.Pause()
		var waiter sync.WaitGroup
		waiter.Go(func() {
			if err := w.client.Demand(t.Context(), "/1.2.3.4"); err != nil {
				t.Error(err)
			}
		})
		sleep(time.Second)
		w.server.Disconnect(nil)
		sleep(time.Second)
		w.server.Resume()
		waiter.Wait()
		if !w.has("uid1") {
			t.Error("it is not there")
		}
	})
}
