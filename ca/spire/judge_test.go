package spire

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztunnel-go/ztunnel/ca"
)

// TestTurns: one at a time, each once, and those of one goroutine in their order.
func TestTurns(t *testing.T) {
	const goroutines, each = 8, 1000
	var turns turns
	var all sync.WaitGroup
	seen := make([]int, goroutines) // written by whose turn it is; the race detector looks on
	var total int
	done := make(chan struct{})
	for g := range goroutines {
		all.Go(func() {
			for i := range each {
				turns.take(func() {
					if seen[g] != i {
						t.Errorf("goroutine %d: turn %d came after %d others", g, i, seen[g])
					}
					seen[g]++
					if total++; total == goroutines*each {
						close(done)
					}
				})
			}
		})
	}
	all.Wait()
	<-done
	nested := false
	turns.take(func() { turns.take(func() { nested = true }) })
	if !nested {
		t.Error("a turn that was taken during another one was lost")
	}
}

// TestJudgeEnd: nothing is heard after the end, and no timer outlives it.
func TestJudgeEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := &judge{
			s:      &subscription{cfg: &Common{WithdrawGrace: time.Hour}},
			update: func(ev ca.Event) { t.Errorf("reported %v", ev) },
		}
		j.hear(t.Context(), func() { j.startGrace(t.Context()) })
		j.end()
		j.hear(t.Context(), func() { t.Error("heard of something after the end") })
	})
}

// TestJudgeLateTimer: a period of grace that was over in the moment in which it
// was stopped does not end the next one.
func TestJudgeLateTimer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := &judge{s: &subscription{cfg: &Common{WithdrawGrace: time.Minute}}}
		j.hear(t.Context(), func() {
			j.startGrace(t.Context())
			pass(2 * time.Minute) // the timer has come, and waits for its turn
			j.stopGrace()
			j.startGrace(t.Context())
		})
		over := func(want bool) {
			t.Helper()
			synctest.Wait()
			j.turns.take(func() {
				if j.graceOver != want {
					t.Errorf("the second period is over: %v, want %v", j.graceOver, want)
				}
			})
		}
		over(false)
		pass(time.Minute)
		over(true)
		j.end()
	})
}
