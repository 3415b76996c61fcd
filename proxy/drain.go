package proxy

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// How the queues are emptied before the listeners close (decision D14).
const (
	drainTick  = 100 * time.Millisecond // between two looks
	drainQuiet = time.Second            // nothing came for so long: the queues are empty
	drainMost  = 3 * time.Second        // though connections keep coming
	drainAlone = 500 * time.Millisecond // though nobody else takes them

	handOverTick = 200 * time.Millisecond // between two looks for another process
)

// Drain lets the proxy end without losing a connection: Run steers new ones to
// another process that listens on the same ports, if there is any, serves what is
// in the queues, closes the listeners, tells the peers by GOAWAY, and returns
// when the last connection has ended. Before Run there is nobody to serve a
// queue: what Bind and Listen opened is closed at once. Idempotent, does not
// block.
func (p *Proxy) Drain() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.drained {
		return
	}
	p.drained = true
	close(p.draining)
	if !p.running {
		p.close()
		p.drainDNS()
	}
}

// drain is the part of Drain that takes time. Tunnels that are there are told to
// end as soon as there is somewhere to go, those that come meanwhile when the
// listeners are closed.
func (p *Proxy) drain(ctx context.Context) {
	p.awaitHeir(ctx)
	p.server.GoAway()
	p.drainDNS()
	p.serveQueues(ctx)
	p.closeListeners()
	p.server.Drain()
}

// awaitHeir waits for another process to listen on the HBONE port.
func (p *Proxy) awaitHeir(ctx context.Context) {
	if p.cfg.HandOver <= 0 {
		return
	}
	var others func() (int, error)
	for _, o := range p.listening() {
		if l, ok := o.ln.(netns.Yielder); ok && o.entry == p.inbound {
			others = l.Others
		}
	}
	if others == nil {
		return
	}
	late := time.NewTimer(p.cfg.HandOver)
	defer late.Stop()
	tick := time.NewTicker(handOverTick)
	defer tick.Stop()
	for {
		n, err := others()
		if err != nil {
			p.log.WarnContext(ctx, "cannot look for the next proxy on our port: new connections may fail until it listens",
				"address", p.cfg.InboundAddr, "error", err.Error())
			return
		}
		if n > 0 {
			return
		}
		select {
		case <-tick.C:
		case <-late.C:
			p.log.WarnContext(ctx, "no other proxy has come to listen on our port: new connections fail until one does",
				"address", p.cfg.InboundAddr, "waited", p.cfg.HandOver.String())
			return
		case <-ctx.Done():
			return
		}
	}
}

// serveQueues returns when no connection has come for a while. Where nobody else
// takes them, they come for as long as we listen: what was in the queues is served
// by then.
func (p *Proxy) serveQueues(ctx context.Context) {
	var queues []*queue
	var failed []error
	for _, o := range p.listening() {
		q := &queue{opened: o, seen: o.accepted.Load()}
		failed = append(failed, q.steer())
		queues = append(queues, q)
	}
	if err := errors.Join(failed...); err != nil {
		p.log.WarnContext(ctx, "new connections cannot be steered to the next proxy: a few may be reset when our listeners close",
			"error", err.Error())
	}
	tick := time.NewTicker(drainTick)
	defer tick.Stop()
	begin := time.Now()
	for last := begin; ; {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		now, alone := time.Now(), true
		for _, q := range queues {
			if q.look() {
				last = now
			}
			alone = alone && !q.steered
		}
		if now.Sub(last) >= drainQuiet || now.Sub(begin) >= drainMost || alone && now.Sub(begin) >= drainAlone {
			return
		}
	}
}

// queue is that of a listener which is about to close.
type queue struct {
	opened
	seen    uint64 // what it had accepted at the last look
	steered bool   // new connections go elsewhere
	fresh   bool   // since the last look
}

// look tells whether something has happened since the last one.
func (q *queue) look() bool {
	n, before := q.accepted.Load(), q.steered
	came := n != q.seen
	q.seen = n
	// What comes in the first moment was in the queue already. What comes later says
	// that another process has come or gone, or is on its way out itself.
	if !q.steered || came && !q.fresh {
		_ = q.steer() // told when it failed first
	} else {
		q.fresh = false
	}
	return came || q.steered != before
}

// steer sends new connections to another process, if there is one.
func (q *queue) steer() error {
	l, ok := q.ln.(netns.Yielder)
	if !ok {
		return nil
	}
	var err error
	if q.steered, err = l.Yield(); err != nil {
		return fmt.Errorf("%s listener: %w", q.component, err)
	}
	q.fresh = true
	return nil
}
