package spire

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest/spireagent"
)

// pods is what a node holds at most by default.
const pods = 110

// fullNode is a world with that many workloads, all of which have an SVID.
func fullNode(t *testing.T) (*world, []*events) {
	t.Helper()
	var entries []spireagent.Entry
	var refs []ca.WorkloadRef
	for i := range pods {
		ref, entry := numbered(i)
		entries, refs = append(entries, entry), append(refs, ref)
	}
	w := newWorld(t, DelegatedConfig{Resync: time.Hour}, entries...)
	var all []*events
	for _, ref := range refs {
		all = append(all, watch(t, w.provider, ref))
	}
	pass(time.Minute)
	for _, e := range all {
		e.want(t, ca.Available)
	}
	return w, all
}

// after are the times since start of the streams that were opened after it.
func after(a *spireagent.Agent, start time.Time) (times []time.Duration) {
	for _, r := range a.Requests() {
		if r.At.After(start) {
			times = append(times, r.At.Sub(start))
		}
	}
	slices.Sort(times)
	return times
}

// spread fails unless times are spread over within, none of them later, and no
// tenth of it has more than a third of them.
func spread(t *testing.T, times []time.Duration, within time.Duration) {
	t.Helper()
	if len(times) == 0 {
		t.Error("no stream was opened")
		return
	}
	if last := times[len(times)-1]; last > within {
		t.Errorf("the last stream was opened after %v, want at most %v", last, within)
	}
	tenths := make([]int, 11)
	for _, at := range times {
		tenths[min(at*10/within, 10)]++
	}
	if n := slices.Max(tenths); n > len(times)/3 {
		t.Errorf("of %d streams %d were opened within a tenth of %v: %v", len(times), n, within, tenths)
	}
}

// TestFault_108_Restart: all streams of a node break at one moment. They are
// opened anew soon, once each, not in one moment, and no certificate changes.
func TestFault_108_Restart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, all := fullNode(t)
		var before []*ca.SVID
		for _, e := range all {
			before = append(before, e.want(t, ca.Available).SVID)
		}
		start, dials := time.Now(), w.agent.Dials()
		w.agent.Stop()
		w.agent.Start()
		pass(time.Minute)
		times := after(w.agent, start)
		if len(times) != pods+1 {
			t.Errorf("%d streams were opened anew, want %d and that of the bundles", len(times), pods)
		}
		spread(t, times, 500*time.Millisecond)
		if n := w.agent.Dials() - dials; n != 1 {
			t.Errorf("%d connections, want one", n)
		}
		for i, e := range all {
			if ev := e.want(t, ca.Available); ev.SVID != before[i] {
				t.Errorf("workload %d has another SVID", i)
			}
		}
	})
}

// TestFault_108_LongOutage: the attempts of a node while the agent is away are
// bounded, and come back spread out.
func TestFault_108_LongOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, all := fullNode(t)
		w.agent.Stop()
		dials := w.agent.Dials()
		pass(10 * time.Minute)
		// The connection's own pace is at most one attempt in 2 s, of all streams
		// together.
		if n := w.agent.Dials() - dials; n > 10*60/2*6/5+10 {
			t.Errorf("%d connections were tried within 10 min", n)
		}
		var next []time.Duration
		for _, e := range all {
			ev := e.want(t, ca.Available, "the agent does not run")
			next = append(next, time.Until(ev.Next))
		}
		slices.Sort(next)
		spread(t, next, 36*time.Second)
		start := time.Now()
		w.agent.Start()
		pass(time.Minute)
		times := after(w.agent, start)
		if len(times) != pods+1 {
			t.Errorf("%d streams were opened anew, want %d and that of the bundles", len(times), pods)
		}
		// One that tries before the connection does, which is up to 2.4 s late, has
		// to wait once more.
		spread(t, times, 39*time.Second)
		for _, e := range all {
			e.want(t, ca.Available)
		}
	})
}

// TestFault_108_CrashLoop: an agent that ends every stream soon after its first
// message is not asked more and more often.
func TestFault_108_CrashLoop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, all := fullNode(t)
		start := time.Now()
		for range 3 * 60 * 4 {
			w.agent.Cut(nil)
			pass(250 * time.Millisecond)
		}
		// 0.5, 1, 2 … 30 s make 11 attempts of one stream.
		n := len(after(w.agent, start))
		if n > 14*(pods+1) || n < 9*pods {
			t.Errorf("%d streams within 3 min, %d of each workload", n, n/pods)
		}
		for _, e := range all {
			if ev, _ := e.last(t); ev.State != ca.Available {
				t.Errorf("got %v, %v", ev.State, ev.Err)
			}
		}
	})
}
