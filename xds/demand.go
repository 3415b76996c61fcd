package xds

import (
	"cmp"
	"container/list"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/ztunnel-go/ztunnel/xds/discoverypb"
)

// The bounds of asking on demand. Whatever addresses a pod may scan, the server
// sees no more than one request of demandBatch names per demandPace, and a
// subscription to maxDemands names that it does not know; we remember no more.
const (
	demandTimeout = 5 * time.Second
	demandBatch   = 128
	demandPace    = 25 * time.Millisecond
	maxWaiting    = 4096
	maxDemands    = 8192
	// answerTTL is how long an answer counts for those who ask again: "there is no
	// such thing", mostly.
	answerTTL = 5 * time.Second
)

// ErrTooManyDemands says that too many resources are being asked for already.
var ErrTooManyDemands = errors.New("too many resources are being asked for on demand, which a scan of addresses may do")

// ErrDemandTimeout says that the control plane did not answer in time.
var ErrDemandTimeout = errors.New("the control plane did not answer in time")

// The outcomes in the metric.
const (
	demandAnswered = "answered"
	demandCached   = "cached"
	demandTimedOut = "timeout"
	demandRefused  = "refused"
	demandCanceled = "canceled"
)

// demands are the resources that were asked for by name: network/IP,
// namespace/hostname or a UID. A name is asked for once at a time, whoever waits
// for it. What the server knows under other names it names canonically and keeps
// us informed of, so what is remembered of an answered name is only that it was
// answered, for answerTTL; the least recently used of those beyond maxDemands are
// forgotten, and unsubscribed from unless they are canonical names of what is
// there. All methods are safe for concurrent use.
type demands struct {
	metrics *Metrics
	ready   chan struct{} // has a token when there is something to send

	mu      sync.Mutex // guards what follows
	keys    map[string]*demand
	waited  int        // of keys, for which somebody waits
	idle    *list.List // of the others, the latest used in front
	queue   []*demand  // to be sent; those that are not queued any more are skipped
	dropped []string   // to be unsubscribed from
}

type demandState uint8

const (
	demandQueued demandState = iota
	demandSent
	demandDone
)

type demand struct {
	key        string
	state      demandState
	subscribed bool      // on this stream
	name       string    // canonical, of what has answered it and is still there
	at         time.Time // of the state
	waiters    int
	done       chan struct{} // closed when it is answered
	idle       *list.Element // when there are no waiters
}

func newDemands(m *Metrics) *demands {
	return &demands{metrics: m, ready: make(chan struct{}, 1), keys: make(map[string]*demand), idle: list.New()}
}

// wait asks for key unless it was answered just now, and waits for the answer.
func (d *demands) wait(ctx context.Context, key string) error {
	a, err := d.join(key)
	if err != nil {
		d.metrics.demanded(demandRefused)
		return fmt.Errorf("ask for %s: %w", key, err)
	}
	if a == nil {
		d.metrics.demanded(demandCached)
		return nil
	}
	timer := time.NewTimer(demandTimeout)
	defer timer.Stop()
	outcome := demandAnswered
	select {
	case <-a.done:
	case <-timer.C:
		outcome, err = demandTimedOut, ErrDemandTimeout
	case <-ctx.Done():
		outcome, err = demandCanceled, context.Cause(ctx)
	}
	d.leave(a)
	d.metrics.demanded(outcome)
	if err != nil {
		return fmt.Errorf("ask for %s: %w", key, err)
	}
	return nil
}

// join returns the demand to wait for, nil if there is nothing to wait for.
func (d *demands) join(key string) (*demand, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := time.Now()
	a := d.keys[key]
	if a != nil && a.state == demandDone && now.Sub(a.at) < answerTTL {
		if a.idle != nil {
			d.idle.MoveToFront(a.idle)
		}
		return nil, nil
	}
	if (a == nil || a.waiters == 0) && d.waited >= maxWaiting {
		return nil, ErrTooManyDemands
	}
	switch {
	case a == nil:
		a = &demand{key: key}
		d.keys[key] = a
		d.enqueue(a, now)
		d.evict()
	case a.state == demandDone, a.state == demandSent && now.Sub(a.at) >= demandTimeout:
		d.enqueue(a, now)
	}
	if a.waiters++; a.waiters == 1 {
		if a.idle != nil {
			d.idle.Remove(a.idle)
			a.idle = nil
		}
		d.waited++
		d.metrics.waiting(d.waited)
	}
	return a, nil
}

// enqueue is called with the lock held.
func (d *demands) enqueue(a *demand, now time.Time) {
	if a.state == demandDone || a.done == nil {
		a.done = make(chan struct{})
	}
	a.state, a.at = demandQueued, now
	if len(d.queue) >= 2*maxWaiting {
		// Without a stream nobody takes what was given up long ago.
		d.queue = slices.DeleteFunc(d.queue, func(a *demand) bool { return a.state != demandQueued })
	}
	d.queue = append(d.queue, a)
	signal(d.ready)
}

// evict forgets the demand that nobody has waited for the longest. It is called
// with the lock held.
func (d *demands) evict() {
	if len(d.keys) <= maxDemands {
		return
	}
	if last := d.idle.Back(); last != nil {
		d.forget(last.Value.(*demand))
	}
}

// forget is called with the lock held.
func (d *demands) forget(a *demand) {
	if a.idle != nil {
		d.idle.Remove(a.idle)
	}
	delete(d.keys, a.key)
	if a.subscribed && a.name != a.key { // by its canonical name we are kept informed of what the store has
		d.dropped = append(d.dropped, a.key)
		signal(d.ready)
	}
	a.state = demandDone // not in the queue any more
}

// leave ends one wait. What nobody waits for any more is not sent; what was sent
// stays until it is answered.
func (d *demands) leave(a *demand) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if a.waiters--; a.waiters > 0 {
		return
	}
	d.waited--
	d.metrics.waiting(d.waited)
	if d.keys[a.key] != a {
		return
	}
	if a.state == demandQueued {
		d.forget(a)
		return
	}
	a.idle = d.idle.PushFront(a)
	d.evict()
}

// take returns the names to be unsubscribed from and then those to be subscribed
// to, and whether there are more. What is subscribed to would not be answered
// again, and that may hold for any name, since the server subscribes us to what it
// sends, be it rejected or removed later. So each name is unsubscribed from first.
func (d *demands) take() (unsubscribe, subscribe []string, more bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	unsubscribe, d.dropped = d.dropped, nil
	now := time.Now()
	i := 0
	for ; i < len(d.queue) && len(subscribe) < demandBatch; i++ {
		a := d.queue[i]
		d.queue[i] = nil
		if a.state != demandQueued {
			continue
		}
		unsubscribe = append(unsubscribe, a.key)
		a.state, a.subscribed, a.at = demandSent, true, now
		subscribe = append(subscribe, a.key)
	}
	d.queue = d.queue[i:]
	return unsubscribe, subscribe, len(d.queue) > 0
}

// answer wakes those who wait for what r names, canonically or by an alias, be it
// there or not. The store must have it by now.
func (d *demands) answer(r *discoverypb.DeltaDiscoveryResponse) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.keys) == 0 {
		return
	}
	for _, res := range r.GetResources() {
		d.answered(res.GetName(), res.GetName())
		for _, alias := range res.GetAliases() {
			d.answered(alias, res.GetName())
		}
	}
	d.removed(r.GetRemovedResources())
}

// removed answers names, and ends the answers that named what is gone by an alias:
// the server tells nothing of who has the alias next, and whoever asks now may mean
// that. It is called with the lock held.
func (d *demands) removed(names []string) {
	gone := make(map[string]bool, len(names))
	for _, name := range names {
		gone[name] = true
		d.answered(name, "")
	}
	if len(gone) == 0 {
		return
	}
	for _, a := range d.keys {
		if gone[a.name] {
			a.name = ""
			if a.state == demandDone {
				a.at = time.Time{}
			}
		}
	}
}

// answered is called with the lock held. name is canonical, "" where there is
// nothing.
func (d *demands) answered(key, name string) {
	a := d.keys[key]
	if a == nil {
		return
	}
	a.name = name
	if a.state == demandDone {
		return
	}
	a.state, a.at = demandDone, time.Now()
	close(a.done)
}

// reset forgets the subscriptions of a stream that is gone. What somebody waits
// for is asked for again, in the order of asking.
func (d *demands) reset() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dropped, d.queue = nil, nil
	d.idle.Init()
	for key, a := range d.keys {
		a.subscribed, a.idle = false, nil
		if a.state == demandDone || a.waiters == 0 {
			delete(d.keys, key)
			a.state = demandDone
			continue
		}
		a.state = demandQueued
		d.queue = append(d.queue, a)
	}
	slices.SortFunc(d.queue, func(a, b *demand) int { return cmp.Or(a.at.Compare(b.at), cmp.Compare(a.key, b.key)) })
	if len(d.queue) > 0 {
		signal(d.ready)
	}
}
