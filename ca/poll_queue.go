package ca

import (
	"container/heap"
	"time"
)

// queue holds the entries of a poll that wait for a request: thousands, of which
// a few change at a time. It is guarded by the poll's lock. The zero value is
// empty.
type queue struct {
	ready entryHeap // due: by priority, then by time
	// Not due, soonest first. Times with a monotonic reading (retries) and without
	// one (certificates) are apart: their order changes when the wall clock steps,
	// and a heap cannot have that.
	running, wall entryHeap
}

// add puts e in its place.
func (q *queue) add(e *entry, now time.Time) {
	switch {
	case !e.due.After(now):
		q.ready.before = (*entry).before
		q.ready.add(e)
	case e.due == e.due.Round(0): // no monotonic reading
		q.wall.before = (*entry).sooner
		q.wall.add(e)
	default:
		q.running.before = (*entry).sooner
		q.running.add(e)
	}
}

// remove takes e out, wherever it is.
func (q *queue) remove(e *entry) {
	if e.queued != nil {
		heap.Remove(e.queued, e.index)
	}
}

// next takes out the entry to request now, if there is one.
func (q *queue) next(now time.Time) *entry {
	for _, later := range []*entryHeap{&q.running, &q.wall} {
		for later.Len() > 0 && !later.list[0].due.After(now) {
			e := later.list[0]
			q.remove(e)
			q.add(e, now)
		}
	}
	if q.ready.Len() == 0 {
		return nil
	}
	e := q.ready.list[0]
	q.remove(e)
	return e
}

// wait is the time until another entry is due, at most maxSleep.
func (q *queue) wait(now time.Time) time.Duration {
	sleep := maxSleep
	for _, later := range []*entryHeap{&q.running, &q.wall} {
		if later.Len() > 0 {
			sleep = min(sleep, max(0, later.list[0].due.Sub(now)))
		}
	}
	return sleep
}

func (e *entry) before(o *entry) bool {
	if e.pri != o.pri {
		return e.pri > o.pri
	}
	return e.sooner(o)
}

func (e *entry) sooner(o *entry) bool {
	if c := e.due.Compare(o.due); c != 0 {
		return c < 0
	}
	return e.seq < o.seq
}

// entryHeap implements heap.Interface. An entry knows its place.
type entryHeap struct {
	list   []*entry
	before func(a, b *entry) bool
}

func (h *entryHeap) add(e *entry) { heap.Push(h, e) }

func (h *entryHeap) Len() int           { return len(h.list) }
func (h *entryHeap) Less(i, j int) bool { return h.before(h.list[i], h.list[j]) }

func (h *entryHeap) Swap(i, j int) {
	h.list[i], h.list[j] = h.list[j], h.list[i]
	h.list[i].index, h.list[j].index = i, j
}

// Push implements heap.Interface.
func (h *entryHeap) Push(x any) {
	e := x.(*entry)
	e.queued, e.index = h, len(h.list)
	h.list = append(h.list, e)
}

// Pop implements heap.Interface.
func (h *entryHeap) Pop() any {
	last := len(h.list) - 1
	e := h.list[last]
	h.list[last] = nil
	h.list = h.list[:last]
	e.queued = nil
	return e
}
