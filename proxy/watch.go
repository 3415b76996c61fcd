package proxy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/ztunnel-go/ztunnel/proxy/hbone"
	"github.com/ztunnel-go/ztunnel/state"
)

// watched is what the last look has seen.
type watched struct {
	local    *state.Workload
	policies <-chan struct{} // nil: they have changed since the last look
	judged   trust
}

// watch follows the store, our certificate and the revocation lists until ctx
// ends, and begins the drain when it is asked for. There is one such goroutine
// per pod, and all of them wake at every change of the store: a look that finds
// nothing new compares pointers. spawn runs what takes longer.
func (p *Proxy) watch(ctx context.Context, spawn func(func())) {
	var w watched
	draining, unhurried := p.draining, p.cfg.PrefetchAfter
	for {
		// The channels before the look, so that no change is lost.
		changed, policiesChanged, revoked := p.cfg.Store.Changed(), p.cfg.Store.PoliciesChanged(), p.cfg.CRLs.Changed()
		local, known := p.cfg.Store.Local(p.cfg.Local)
		if unhurried == nil || isClosed(unhurried) {
			unhurried = nil
			p.followLease(&w, local, known)
		}
		renewed := p.followTrust(ctx, &w)
		if known && local != w.local {
			w.local, w.policies = local, nil // its policy list may be another one
			p.missing.Clear()
		}
		if w.policies == nil || isClosed(w.policies) {
			w.policies = policiesChanged
			p.recheckPolicies(ctx, spawn)
		}
		p.retireMoved()
		select {
		case <-changed:
		case <-policiesChanged:
		case <-revoked:
		case <-renewed:
		case <-unhurried:
		case <-draining:
			draining = nil
			spawn(func() { p.drain(ctx) })
		case <-ctx.Done():
			return
		}
	}
}

// never is not closed by anyone.
var never <-chan struct{}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// releaseWait bounds the wait for connections that a policy change has ended.
const releaseWait = 5 * time.Second

// recheckPolicies ends the inbound connections that the policies deny now
// (spec/datapath.md §12.2). It judges them with the workload as the store has
// it now, so that a new policy list counts too.
func (p *Proxy) recheckPolicies(ctx context.Context, spawn func(func())) {
	ended, wait := p.tracker.recheck(func(c state.Conn) bool {
		if w, ok := p.cfg.Store.Local(p.cfg.Local); ok {
			c.Destination = w
		}
		return p.cfg.Store.Authorize(c).Denied != nil
	})
	if len(ended) == 0 {
		return
	}
	spawn(func() { // a stuck one must not keep later changes from being enforced
		bounded, cancel := context.WithTimeout(ctx, releaseWait)
		defer cancel()
		wait(bounded)
		for _, c := range ended {
			p.log.InfoContext(ctx, "connection closed by a policy change",
				"connection", fmt.Sprintf("%s(%s)->%s (%s)", c.Src, c.Identity, c.Dst, c.Destination.UID))
		}
	})
}

// retireMoved lets tunnels end whose workload is no longer at their address:
// its IP may belong to another pod now (design D9).
func (p *Proxy) retireMoved() {
	moved := func(k poolKey) bool {
		if k.uid == "" {
			return false
		}
		w, ok := p.cfg.Store.WorkloadByUID(k.uid)
		// One without address was found by its host name, whose addresses change as they like.
		return !ok || len(w.IPs) > 0 && !slices.Contains(w.IPs, k.dst.Addr())
	}
	p.inner.Retire(func(k innerKey, _ *hbone.ConnInfo) bool { return moved(k.outer) }, errMoved)
	p.pool.Retire(func(k poolKey, _ *hbone.ConnInfo) bool { return moved(k) }, errMoved)
}

var errMoved = errors.New("the workload has moved")
