package istio_test

import (
	"flag"
	"fmt"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/ca/catest/istiod"
	"github.com/ztunnel-go/ztunnel/ca/istio"
)

// all are the times of all requests, sorted.
func (r *requests) all() (times []time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, at := range r.at {
		times = append(times, at...)
	}
	slices.SortFunc(times, time.Time.Compare)
	return times
}

// most is the largest number of times within any window.
func most(times []time.Time, window time.Duration) (n int) {
	first := 0
	for i, at := range times {
		for at.Sub(times[first]) >= window {
			first++
		}
		n = max(n, i-first+1)
	}
	return n
}

// TestTwelveHours: twenty identities, a new root in the middle, an outage, and at
// no time one without a valid certificate.
func TestTwelveHours(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, istiod.Config{}, nil)
		m := w.manager()
		var leases []*ca.Lease
		for i := range 20 {
			leases = append(leases, w.lease(m, fmt.Sprint("id", i)))
		}
		for _, l := range leases {
			get(t, l, time.Minute, nil)
		}
		start := time.Now()
		for minute := range 12 * 60 {
			switch minute {
			case 4 * 60:
				w.setDown(true)
			case 4*60 + 20:
				w.setDown(false)
			case 6 * 60:
				w.server.SetCA(openCA(t, time.Hour))
			}
			sleep(time.Minute)
			for _, l := range leases {
				svid, err := l.SVID(t.Context())
				if err != nil {
					t.Fatalf("after %v: %v", time.Since(start), err)
				}
				if left := time.Until(svid.NotAfter); left <= 0 {
					t.Fatalf("after %v a certificate with %v left", time.Since(start), left)
				}
			}
		}
		for _, l := range leases {
			if svid := get(t, l, 0, nil); !anchors(svid)[0].Equal(w.server.Root()) {
				t.Errorf("%v has not learned of the new root", svid.ID)
			}
		}
		// 61 minutes, renewed at 50 to 60 %: at least every 37 and at most every 29.
		if n := len(w.server.Requests()) / 20; n < 12*60/37 || n > 12*60/29+2 {
			t.Errorf("%d requests for each identity in 12 hours, want 20 to 26", n)
		}
	})
}

// TestHerd: 500 identities at once. Never more than 8 requests at a time, and the
// renewals drift apart: no two rounds have a peak like the start.
func TestHerd(t *testing.T) {
	const identities, latency = 500, 50 * time.Millisecond
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, istiod.Config{}, nil)
		var asked requests
		w.server.SetReply(func(r istiod.Request) *istiod.Reply {
			asked.note(r.Identity)
			return &istiod.Reply{Delay: latency, Sign: true}
		})
		m := w.manager()
		start := time.Now()
		leases := make([]*ca.Lease, identities)
		for i := range leases {
			leases[i] = w.lease(m, fmt.Sprint("id", i))
		}
		for _, l := range leases {
			get(t, l, time.Minute, nil)
		}
		if took, want := time.Since(start), latency*identities/8; took > want+time.Second {
			t.Errorf("all had a certificate after %v, want %v", took, want)
		}
		sleep(3 * time.Hour)
		times := asked.all()
		if n := most(times, latency); n != 8 {
			t.Errorf("%d requests within the time of one, want the 8 slots and no more", n)
		}
		renewals := times[identities:]
		if n := most(renewals, time.Second); n > 12 {
			t.Errorf("%d renewals within a second, want them apart: the start had %d", n, most(times[:identities], time.Second))
		}
		// The spread adds up from round to round.
		gap := func(round int) (width time.Duration) {
			var at []time.Time
			for i := range identities {
				of := asked.of(workload(fmt.Sprint("id", i)).ID)
				if len(of) <= round {
					t.Fatalf("id%d was asked for %d times in 3 hours", i, len(of))
				}
				at = append(at, of[round])
			}
			slices.SortFunc(at, time.Time.Compare)
			return at[identities*9/10].Sub(at[identities/10])
		}
		if first, third := gap(1), gap(3); first < 4*time.Minute || third < first*5/4 {
			t.Errorf("80 %% of the first renewals within %v, of the third within %v, want them to drift apart", first, third)
		}
	})
}

// TestHerdAfterOutage: 500 identities wait for a CA that comes back.
func TestHerdAfterOutage(t *testing.T) {
	const identities = 500
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, istiod.Config{}, nil)
		var asked requests
		w.server.SetReply(func(r istiod.Request) *istiod.Reply {
			asked.note(r.Identity)
			return &istiod.Reply{Err: status.Error(codes.Unavailable, "starting")}
		})
		m := w.manager()
		leases := make([]*ca.Lease, identities)
		for i := range leases {
			leases[i] = w.lease(m, fmt.Sprint("id", i))
		}
		sleep(12 * time.Minute)
		times := asked.all()
		late := times[len(times)-identities*2:]
		if n := most(late, time.Second); n > 60 {
			t.Errorf("%d retries within a second after minutes of outage, want them jittered", n)
		}
		w.server.SetReply(nil)
		for _, l := range leases {
			get(t, l, 3*time.Minute, nil)
		}
	})
}

// TestClockSkew: the CA's clock is ahead, or far behind.
func TestClockSkew(t *testing.T) {
	for _, tt := range []struct {
		name     string
		from, to time.Duration
		wait     time.Duration
		most     int // requests within ten minutes
	}{
		{"valid in some seconds", 5 * time.Second, time.Hour, 5 * time.Second, 1},
		{"past its half-life", -3 * time.Hour, time.Hour, 0, 3},
		{"about to expire", -24 * time.Hour, 30 * time.Second, 0, 250},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				authority := catest.NewCA(t, "cluster.local", catest.Between(-48*time.Hour, 48*time.Hour))
				w := newWorld(t, istiod.Config{}, nil)
				w.server.SetReply(func(r istiod.Request) *istiod.Reply {
					return &istiod.Reply{Chain: leafOf(catest.Between(tt.from, tt.to))(t, authority, r.CSR.PublicKey)}
				})
				start := time.Now()
				l := w.lease(w.manager(), "web")
				get(t, l, time.Minute, nil)
				if took := time.Since(start); took != tt.wait {
					t.Errorf("it took %v, want %v", took, tt.wait)
				}
				for range 600 {
					sleep(time.Second)
					if _, err := l.SVID(t.Context()); err != nil {
						t.Fatal(err)
					}
				}
				if n := len(w.server.Requests()); n > tt.most {
					t.Errorf("%d requests in ten minutes, want %d at most", n, tt.most)
				}
			})
		})
	}
}

var scale = flag.Int("scale", 1000, "identities of TestScaleIstio; the goal is 5000")

// TestScaleIstio: thousands of identities with real requests over TLS, and what
// they cost.
func TestScaleIstio(t *testing.T) {
	const limit = 20 << 10 // bytes of heap per identity
	identities := *scale
	if raceEnabled || testing.Short() {
		identities = 300
	}
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, istiod.Config{}, func(c *istio.Config) { c.Logger = nil })
		m := w.manager()
		leases := make([]*ca.Lease, identities)
		empty := heap()
		before := cpu()
		for i := range leases {
			leases[i] = w.lease(m, fmt.Sprint("id", i))
		}
		for _, l := range leases {
			get(t, l, time.Minute, nil)
		}
		t.Logf("%d identities: %v of CPU each, CA included", identities, (cpu()-before)/time.Duration(identities))
		sleep(28 * time.Minute)
		before = cpu()
		sleep(10 * time.Minute) // all renewals
		t.Logf("renewals: %v of CPU each, CA included", (cpu()-before)/time.Duration(identities))
		if n := len(w.server.Requests()); n != 2*identities {
			t.Errorf("%d requests, want each identity renewed once", n)
		}
		w.server.Forget()
		per := (heap() - empty) / int64(identities)
		t.Logf("%d bytes of heap per identity", per)
		if per > limit {
			t.Errorf("%d bytes of heap per identity, at most %d are allowed", per, limit)
		}
	})
}

func cpu() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// heap is what is in use after garbage collection, with stacks.
func heap() int64 {
	runtime.GC()
	runtime.GC() // what finalizers let go
	var s runtime.MemStats
	runtime.ReadMemStats(&s)
	return int64(s.HeapAlloc + s.StackInuse)
}
