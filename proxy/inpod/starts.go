package inpod

import (
	"context"
	"sync/atomic"
	"time"
)

// startPatience is how long pods wait for others that start while none of them
// gets on: one that hangs must not keep the others from starting.
const startPatience = 100 * time.Millisecond

// starts bounds how many pods are at work in their namespaces at a time: each
// takes a thread, and threads that the runtime has made stay.
type starts struct {
	tokens chan struct{}
	epoch  time.Time
	moved  atomic.Int64 // when one began or ended last, since epoch
}

func newStarts(n int) *starts {
	s := &starts{tokens: make(chan struct{}, n), epoch: time.Now()}
	for range n {
		s.tokens <- struct{}{}
	}
	return s
}

// begin waits for a turn, which end gives to the next one. Where nothing moves one
// of those who wait goes on without: what it gives back then takes the place of
// the token that is stuck.
func (s *starts) begin(ctx context.Context) (end func()) {
	select {
	case <-s.tokens:
		return s.end
	default:
	}
	timer := time.NewTimer(startPatience)
	defer timer.Stop()
	for {
		select {
		case <-s.tokens:
			s.moved.Store(int64(time.Since(s.epoch)))
			return s.end
		case <-ctx.Done():
			return func() {}
		case <-timer.C:
		}
		now, last := int64(time.Since(s.epoch)), s.moved.Load()
		still := time.Duration(now - last)
		if still >= startPatience && s.moved.CompareAndSwap(last, now) {
			return s.end
		}
		timer.Reset(max(startPatience-still, time.Millisecond))
	}
}

func (s *starts) end() {
	s.moved.Store(int64(time.Since(s.epoch)))
	select {
	case s.tokens <- struct{}{}:
	default: // one that was stuck has come back
	}
}
