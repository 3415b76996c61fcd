package xds_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ztunnel-go/ztunnel/state"
	"github.com/ztunnel-go/ztunnel/xds"
	"github.com/ztunnel-go/ztunnel/xds/discoverypb"
	"github.com/ztunnel-go/ztunnel/xds/securitypb"
	"github.com/ztunnel-go/ztunnel/xds/xdstest"
)

// away disconnects, lets change change the world meanwhile, and returns when the
// first responses of the next stream were processed.
func (w *world) away(change func()) {
	w.t.Helper()
	w.setDown(fmt.Errorf("connection refused"))
	sleep(time.Second)
	change()
	w.setDown(nil)
	w.settle()
}

// fill sets workloads uid0 to uid(n-1).
func (w *world) fill(n int) {
	for i := range n {
		w.server.Set(xdstest.Workload(workload(fmt.Sprintf("uid%d", i), fmt.Sprintf("10.0.0.%d", i+1))))
	}
}

// TestStale: D15 in time. What is not named any more stays for the grace, loses its
// address to others, and goes.
func TestStale(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{Personality: xdstest.Cilium}, nil)
		w.fill(5)
		w.settle()
		w.away(func() { w.server.Remove(xdstest.AddressType, "uid0", "uid1") })
		if got := w.status(xdstest.AddressType); got.Stale != 2 || got.Resources != 5 {
			t.Errorf("status %+v, want 2 stale of 5", got)
		}
		if strings.Contains(w.log.String(), "more than half") {
			t.Error("a warning for less than half")
		}
		if got, ok := w.store.Workload("", netip.MustParseAddr("10.0.0.1")); !ok || got.UID != "uid0" {
			t.Errorf("a stale workload is not found: %v", got)
		}
		// An older claim to the address wins against the stale one, wherever it stands.
		w.server.Set(xdstest.Workload(workload("new", "10.0.0.1")))
		w.settle()
		if got, _ := w.store.Workload("", netip.MustParseAddr("10.0.0.1")); got.UID != "new" {
			t.Errorf("%s has the address", got.UID)
		}
		sleep(9 * time.Second)
		if !w.has("uid0") || !w.has("uid1") {
			t.Error("stale workloads went before the grace ended")
		}
		sleep(time.Second)
		if w.has("uid0") || w.has("uid1") || !w.has("uid2") {
			t.Error("stale workloads are still there, or others are not")
		}
		if got := w.status(xdstest.AddressType); got.Stale != 0 || got.Resources != 4 {
			t.Errorf("status %+v", got)
		}
	})
}

// TestStaleComesAgain: a stale name that the server sends after all, be it in a
// version that is rejected, stays; one that it removes goes at once.
func TestStaleComesAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{Personality: xdstest.Cilium}, nil)
		w.fill(5)
		w.settle()
		w.away(func() { w.server.Remove(xdstest.AddressType, "uid0", "uid1", "uid2") })
		w.server.Set(xdstest.Workload(workload("uid0", "10.0.0.1")), badWorkload("uid1"))
		w.server.Inject(&discoverypb.DeltaDiscoveryResponse{TypeUrl: xdstest.AddressType, RemovedResources: []string{"uid2"}})
		w.settle()
		if w.has("uid2") {
			t.Error("a removed name waits for the grace")
		}
		if got := w.status(xdstest.AddressType); got.Stale != 0 {
			t.Errorf("status %+v, want nothing stale", got)
		}
		sleep(time.Minute)
		if !w.has("uid0") || !w.has("uid1") {
			t.Errorf("uid0 %t, uid1 %t: names that came again were removed", w.has("uid0"), w.has("uid1"))
		}
	})
}

// TestStaleEndsWithTheStream: nobody is there to give anything up.
func TestStaleEndsWithTheStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{Personality: xdstest.Cilium}, nil)
		w.fill(5)
		w.settle()
		w.away(func() { w.server.Remove(xdstest.AddressType, "uid0") })
		sleep(5 * time.Second)
		w.setDown(fmt.Errorf("connection refused"))
		sleep(time.Hour)
		if !w.has("uid0") || w.status(xdstest.AddressType).Stale != 0 {
			t.Error("it was removed, or is stale, without a stream")
		}
		w.setDown(nil)
		w.settle()
		sleep(9 * time.Second)
		if !w.has("uid0") {
			t.Error("the grace did not start anew")
		}
		sleep(2 * time.Second)
		if w.has("uid0") {
			t.Error("it is still there")
		}
	})
}

// TestStaleMarkIsTakenBack: what was stale when the stream broke is told without
// its version, so that a server which skips what is unchanged sends it.
func TestStaleMarkIsTakenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{EchoLimit: 2}, nil)
		r := xdstest.Workload(workload("uid", "10.0.1.1"))
		r.Version = "unchanged"
		w.fill(5)
		w.server.Set(r)
		w.settle()
		w.away(func() { w.server.Remove(xdstest.AddressType, r.Name) }) // refused with versions, and then without
		w.server.Set(xdstest.Workload(workload("other", "10.0.1.1")))
		w.settle()
		holder := func() string {
			got, _ := w.store.Workload("", netip.MustParseAddr("10.0.1.1"))
			return got.UID
		}
		if got := w.status(xdstest.AddressType); got.Stale != 1 || holder() != "other" {
			t.Fatalf("status %+v, want 1 stale; %s has the address", got, holder())
		}
		w.server.Remove(xdstest.AddressType, "uid0", "uid1", "uid2") // so few that versions are told again
		w.settle()
		w.away(func() {
			w.server.SetEchoLimit(0)
			w.server.Set(r)
		})
		told := w.initial(xdstest.AddressType).GetInitialResourceVersions()
		if version, ok := told["uid"]; len(told) == 0 || !ok || version != "" {
			t.Errorf("told %v, want uid without a version", told)
		}
		sleep(time.Minute)
		if w.status(xdstest.AddressType).Stale != 0 || holder() != "uid" {
			t.Errorf("%+v; %s has the address, want the one that came last", w.status(xdstest.AddressType), holder())
		}
	})
}

// TestStaleMost: more than half is worth a warning, and is removed all the same.
func TestStaleMost(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*xds.Config)
		kept   bool
		after  time.Duration
	}{
		{name: "default", after: 11 * time.Second},
		{name: "longer", change: func(c *xds.Config) { c.StaleGrace = time.Hour }, after: 59 * time.Minute, kept: true},
		{name: "none", change: func(c *xds.Config) { c.StaleGrace = -1 }},
		{name: "never", change: func(c *xds.Config) { c.FullSet = xds.FullSetNever }, after: 24 * time.Hour, kept: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, xdstest.Config{Personality: xdstest.IstiodUnversioned, EchoLimit: 1}, tt.change)
				w.fill(5)
				w.settle()
				w.away(func() { w.server.Remove(xdstest.AddressType, "uid0", "uid1", "uid2") })
				sleep(tt.after)
				if w.has("uid0") != tt.kept || !w.has("uid4") {
					t.Errorf("uid0 %t, uid4 %t", w.has("uid0"), w.has("uid4"))
				}
				if warned := strings.Contains(w.log.String(), "more than half"); warned == (tt.name == "never") {
					t.Errorf("warned: %t", warned)
				}
			})
		})
	}
}

// TestStalePolicies: a policy stays enforced until it is removed, and a tombstone
// whose policy is gone goes, too.
func TestStalePolicies(t *testing.T) {
	everyPersonality(t, func(t *testing.T, cfg xdstest.Config) {
		if cfg.Personality == xdstest.Cilium {
			t.Skip("it has no policies")
		}
		w := newWorld(t, cfg, nil)
		never := denyPort("never good", 1)
		never.Scope = securitypb.Scope(99)
		w.server.Set(xdstest.Workload(workload("uid", "10.0.0.1")),
			xdstest.Authorization(denyPort("one", 81)), xdstest.Authorization(denyPort("two", 82)), xdstest.Authorization(never))
		w.settle()
		denied := func(port uint16) bool {
			dst, _ := w.store.WorkloadByUID("uid")
			return w.store.Authorize(state.Conn{Src: netip.MustParseAddrPort("9.9.9.9:1"), Dst: netip.AddrPortFrom(netip.MustParseAddr("10.0.0.1"), port), Destination: dst}).Denied != nil
		}
		tombstone := denied(80)
		w.setDown(fmt.Errorf("connection refused"))
		sleep(time.Second)
		w.server.Pause()
		w.setDown(nil)
		sleep(time.Second)
		w.server.Remove(xdstest.AuthorizationType, "istio-system/one", "istio-system/never good")
		if !denied(81) {
			t.Error("a policy went with the stream")
		}
		w.server.Resume()
		w.settle()
		sleep(time.Minute)
		if denied(81) || !denied(82) || denied(80) {
			t.Errorf("denied: removed policy %t, policy %t, tombstone %t (before: %t)", denied(81), denied(82), denied(80), tombstone)
		}
		if got := w.status(xdstest.AuthorizationType); got.RejectedCount != 0 || got.Resources != 1 {
			t.Errorf("status %+v", got)
		}
	})
}

// TestOnDemandKeepsWhatIsNotNamed: names that a server on demand does not send are
// not given up.
func TestOnDemandKeepsWhatIsNotNamed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{Personality: xdstest.IstiodUnversioned}, func(c *xds.Config) { c.OnDemand = true })
		w.fill(3)
		for i := range 3 {
			if err := w.client.Demand(t.Context(), fmt.Sprintf("uid%d", i)); err != nil {
				t.Fatal(err)
			}
		}
		w.server.Pause()
		w.server.Disconnect(nil)
		sleep(time.Second)
		w.server.Inject(&discoverypb.DeltaDiscoveryResponse{TypeUrl: xdstest.AddressType})
		sleep(time.Minute)
		if !w.has("uid0") || w.status(xdstest.AddressType).Stale != 0 {
			t.Errorf("there %t, %+v", w.has("uid0"), w.status(xdstest.AddressType))
		}
		w.server.Resume()
	})
}

// TestChangeToServerWithoutVersions: versions that another server gave say nothing
// about this one, which is asked again without them.
func TestChangeToServerWithoutVersions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{}, nil)
		w.fill(5)
		w.settle()
		w.away(func() {
			w.server.SetPersonality(xdstest.Cilium)
			w.server.Remove(xdstest.AddressType, "uid0")
		})
		if got := w.status(xdstest.AddressType); got.Stale != 0 {
			t.Errorf("status %+v: what was told with a version could be unchanged", got)
		}
		sleep(15 * time.Second)
		if r := w.initial(xdstest.AddressType); len(r.GetInitialResourceVersions()) != 0 {
			t.Errorf("told %v", r.GetInitialResourceVersions())
		}
		sleep(10 * time.Second)
		if opened, _ := w.server.Streams(); w.has("uid0") || !w.has("uid1") || opened != 3 {
			t.Errorf("uid0 %t, uid1 %t, %d streams, want 3", w.has("uid0"), w.has("uid1"), opened)
		}
	})
}

// TestResourceExhausted: the names that we tell can be too many. Then none are
// told, as long as there are as many.
func TestResourceExhausted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{EchoLimit: 4}, nil)
		w.fill(5)
		w.settle()
		told := func() int {
			w.server.Disconnect(nil)
			sleep(time.Minute)
			w.settle()
			return len(w.initial(xdstest.AddressType).GetInitialResourceVersions())
		}
		if n := told(); n != 0 {
			t.Errorf("told %d names", n)
		}
		if opened, _ := w.server.Streams(); opened != 3 {
			t.Errorf("%d streams, want one more that was refused", opened)
		}
		if n := told(); n != 0 {
			t.Errorf("told %d names", n)
		}
		if opened, _ := w.server.Streams(); opened != 4 {
			t.Errorf("%d streams: the same was refused again", opened)
		}
		w.server.Remove(xdstest.AddressType, "uid0", "uid1")
		w.settle()
		if n := told(); n != 3 {
			t.Errorf("told %d names, want 3", n)
		}
	})
}

// TestResourceExhaustedLater: on a stream whose first requests were answered, it
// does not speak of the names that were told.
func TestResourceExhaustedLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{}, nil)
		w.fill(4)
		w.settle()
		for range 2 { // the first stream has told nothing
			w.server.Disconnect(status.Error(codes.ResourceExhausted, "too many pushes"))
			sleep(time.Minute)
		}
		if n := len(w.initial(xdstest.AddressType).GetInitialResourceVersions()); n != 4 {
			t.Errorf("told %d names, want 4", n)
		}
	})
}

// TestStaleHalf: half is not more than half.
func TestStaleHalf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{Personality: xdstest.Cilium}, nil)
		w.fill(4)
		w.settle()
		w.away(func() { w.server.Remove(xdstest.AddressType, "uid0", "uid1") })
		if got := w.status(xdstest.AddressType); got.Stale != 2 || strings.Contains(w.log.String(), "more than half") {
			t.Errorf("status %+v, log:\n%s", got, w.log)
		}
	})
}

// TestFault_116_ManyReconnects: the cache stays, versions are told each time, and
// what was removed meanwhile goes.
func TestFault_116_ManyReconnects(t *testing.T) {
	n := 10_000
	if testing.Short() || raceEnabled {
		n = 500
	}
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{}, func(c *xds.Config) { c.Logger = nil })
		w.server.ForgetRequests()
		w.fill(20)
		w.settle()
		for i := range n {
			gone := fmt.Sprintf("uid%d", i%20)
			r := xdstest.Workload(workload(gone, fmt.Sprintf("10.0.0.%d", i%20+1)))
			w.server.Disconnect(status.Error(codes.Unavailable, "transport is closing"))
			synctest.Wait()
			if !w.has(gone) {
				t.Fatalf("round %d: the cache went with the stream", i)
			}
			w.server.Remove(xdstest.AddressType, gone)
			sleep(15 * time.Second)
			if w.has(gone) {
				t.Fatalf("round %d: %s is still there", i, gone)
			}
			w.server.Set(r)
		}
		w.settle()
		if got := w.status(xdstest.AddressType); got.Resources != 20 || got.Stale != 0 {
			t.Errorf("status %+v", got)
		}
	})
}
