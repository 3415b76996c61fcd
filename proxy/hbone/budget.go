package hbone

import (
	"sync"
	"sync/atomic"
)

// Budget bounds the bytes that all tunnels sharing it hold for applications that
// are slower than their peers (decision D10). From 75 % on no stream gets credit,
// but for those that are read by their owner (pull mode), and servers answer new
// requests with 503; at 100 % the stream with the longest queue is reset with
// ENHANCE_YOUR_CALM. A nil *Budget has no bound.
type Budget struct {
	limit int64
	used  atomic.Int64

	mu      sync.Mutex           // guards the rest
	queued  map[*stream]struct{} // streams that hold bytes
	starved map[*stream]struct{} // streams whose credit was withheld
}

// NewBudget returns a budget of limit bytes.
func NewBudget(limit int64) *Budget {
	return &Budget{
		limit:   max(limit, 1),
		queued:  make(map[*stream]struct{}),
		starved: make(map[*stream]struct{}),
	}
}

// Used is how many bytes are held, as allocated.
func (b *Budget) Used() int64 {
	if b == nil {
		return 0
	}
	return b.used.Load()
}

// Tight tells whether the budget is at 75 % or more.
func (b *Budget) Tight() bool { return b != nil && b.used.Load() >= b.limit-b.limit/4 }

// add charges st's queue, and tells whether the budget is now used up.
func (b *Budget) add(st *stream, n int) (over bool) {
	if b == nil || n == 0 {
		return false
	}
	used := b.used.Add(int64(n))
	b.mu.Lock()
	b.queued[st] = struct{}{}
	b.mu.Unlock()
	return used > b.limit
}

// sub refunds. The caller calls relieve once it holds no lock.
func (b *Budget) sub(st *stream, n int, empty bool) {
	if b == nil {
		return
	}
	b.used.Add(-int64(n))
	if empty {
		b.mu.Lock()
		delete(b.queued, st)
		b.mu.Unlock()
	}
}

// starve remembers a stream whose credit is withheld.
func (b *Budget) starve(st *stream) {
	b.mu.Lock()
	b.starved[st] = struct{}{}
	b.mu.Unlock()
}

// forget drops a stream that has ended.
func (b *Budget) forget(st *stream) {
	if b == nil {
		return
	}
	b.mu.Lock()
	delete(b.starved, st)
	b.mu.Unlock()
}

// relieve gives the withheld credit once there is room again.
func (b *Budget) relieve() {
	if b == nil || b.Tight() {
		return
	}
	b.mu.Lock()
	var starved []*stream
	for st := range b.starved {
		starved = append(starved, st)
	}
	clear(b.starved)
	b.mu.Unlock()
	for _, st := range starved {
		st.returnCredit(0)
	}
}

// shed resets the stream with the longest queue.
func (b *Budget) shed() {
	for b.used.Load() > b.limit {
		b.mu.Lock()
		var victim *stream
		var longest int64
		for st := range b.queued {
			if n := st.held.Load(); n > longest {
				victim, longest = st, n
			}
		}
		if victim != nil {
			delete(b.queued, victim)
		}
		b.mu.Unlock()
		if victim == nil {
			return
		}
		victim.c.cfg.Stats.BudgetResets.Add(1)
		victim.Reset(ErrEnhanceYourCalm)
	}
}
