package ca

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// TestID_TL02_Expiration is TL-02: the arithmetic of half-life.
func TestID_TL02_Expiration(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	at := func(d time.Duration) time.Time { return now.Add(d) }
	tests := []struct {
		name                string
		notBefore, notAfter time.Duration
		renew               time.Duration
		expired             bool
	}{
		{"fresh", 0, time.Hour, 30 * time.Minute, false},
		{"past half", -40 * time.Minute, 20 * time.Minute, -10 * time.Minute, false},
		{"no life", 0, 0, 0, true},
		{"future", time.Hour, 3 * time.Hour, 2 * time.Hour, false},
		{"over", -2 * time.Hour, -time.Hour, -90 * time.Minute, true},
		{"ends before it starts", time.Hour, -time.Hour, -time.Hour, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := renewAt(at(tt.notBefore), at(tt.notAfter), 0.5); !got.Equal(at(tt.renew)) {
				t.Errorf("renewal at %v, want %v", got, at(tt.renew))
			}
			s := &SVID{NotBefore: at(tt.notBefore), NotAfter: at(tt.notAfter)}
			if got := s.expired(now); got != tt.expired {
				t.Errorf("expired %v, want %v", got, tt.expired)
			}
		})
	}
}

// TestQueue: the heaps give what a look at all entries would, at any time, for
// random changes.
func TestQueue(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	now := time.Now()
	var q queue
	var all []*entry
	for step := range 20_000 {
		switch op := r.IntN(10); {
		case op < 5:
			e := &entry{pri: priority(r.IntN(3)), due: now.Add(time.Duration(r.IntN(200)-50) * time.Second), seq: uint64(step)}
			if r.IntN(2) == 0 {
				e.due = e.due.Round(0) // as the times of certificates
			}
			all = append(all, e)
			q.add(e, now)
		case op < 6 && len(all) > 0:
			i := r.IntN(len(all))
			q.remove(all[i])
			all = slices.Delete(all, i, i+1)
		case op < 7:
			now = now.Add(time.Duration(r.IntN(20)) * time.Second)
		default:
			var want *entry
			sleep := maxSleep
			for _, e := range all {
				if wait := e.due.Sub(now); wait > 0 {
					sleep = min(sleep, wait)
				} else if want == nil || e.before(want) {
					want = e
				}
			}
			got := q.next(now)
			if got != want {
				t.Fatalf("step %d: got %+v, want %+v", step, got, want)
			}
			if got == nil {
				if wait := q.wait(now); wait != sleep {
					t.Fatalf("step %d: sleep %v, want %v", step, wait, sleep)
				}
				continue
			}
			if got.queued != nil {
				t.Fatalf("step %d: the entry is still queued", step)
			}
			all = slices.Delete(all, slices.Index(all, got), slices.Index(all, got)+1)
		}
	}
}

// TestQueueClocks: retries and certificates go by different clocks, and are
// never compared while they wait.
func TestQueueClocks(t *testing.T) {
	now := time.Now()
	var q queue
	q.add(&entry{due: now.Add(time.Minute)}, now)
	q.add(&entry{due: now.Add(time.Minute).Round(0)}, now)
	if q.running.Len() != 1 || q.wall.Len() != 1 {
		t.Errorf("%d and %d entries wait, want one by each clock", q.running.Len(), q.wall.Len())
	}
}
