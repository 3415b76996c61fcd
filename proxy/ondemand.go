package proxy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ztunnel-go/ztunnel/state"
)

// The bounds on looking up what the store does not know (design §3): of one
// decision, and of all connections of a proxy together, so that a pod that scans
// addresses waits for itself and not the control plane for it.
const (
	lookUpRounds = 4
	lookUpBudget = 5 * time.Second
	maxDemands   = 64
	maxSources   = 16
)

// lookUps are the places for look-ups on demand. Each kind of connection has its
// own: what the pod's peers make us ask must not take them from the pod, and what
// only telemetry wants to know not from anyone.
type lookUps struct {
	outbound chan struct{} // for what the pod connects to
	inbound  chan struct{} // for what its peers ask for
	sources  chan struct{} // for who its peers are

	// sourceLate is when the look-up of a source last took too long.
	sourceLate atomic.Pointer[time.Time]
}

func newLookUps() *lookUps {
	return &lookUps{
		outbound: make(chan struct{}, maxDemands), inbound: make(chan struct{}, maxDemands), sources: make(chan struct{}, maxSources),
	}
}

// errLookUpTime ends a look-up that took too long.
var errLookUpTime = fmt.Errorf("no answer within %v: %w", lookUpBudget, context.DeadlineExceeded)

// route decides about an outbound connection, with everything that the decision
// needs: resources that must be demanded, and a host name that must be resolved.
func (p *Proxy) route(ctx context.Context, q state.Query) (state.Route, error) {
	r, err := p.cfg.Store.Route(q)
	if err != nil {
		r, err = p.routeOnDemand(ctx, q, err)
	}
	if err != nil || r.Resolve == "" {
		return r, err
	}
	return p.resolve(ctx, q.Source, q.Dst.Addr(), r)
}

// routeOnDemand goes on after a first answer of the store that was an error. It
// is apart from route so that what its closure holds costs the others nothing.
func (p *Proxy) routeOnDemand(ctx context.Context, q state.Query, err error) (state.Route, error) {
	// Each round draws the same: another endpoint could need what nobody has
	// demanded yet, round after round.
	seed := rand.Uint64()
	return lookUp(ctx, p, p.lookUps.outbound, err, func(asked []string) (state.Route, error) {
		q.Asked, q.Draw = asked, rand.New(rand.NewPCG(seed, 0)).Uint64N
		return p.cfg.Store.Route(q)
	})
}

// inboundRoute decides about an inbound request in the same way.
func (p *Proxy) inboundRoute(ctx context.Context, q state.InboundQuery) (state.InboundRoute, error) {
	r, err := p.cfg.Store.Inbound(q)
	if err == nil {
		return r, nil
	}
	return lookUp(ctx, p, p.lookUps.inbound, err, func(asked []string) (state.InboundRoute, error) {
		q.Asked = asked
		return p.cfg.Store.Inbound(q)
	})
}

// lookUp demands what a *state.Miss names and asks again, until the answer is
// something else. What cannot be looked up is an error: nothing is passed
// through, or around a waypoint, because the control plane did not answer.
func lookUp[R any](ctx context.Context, p *Proxy, places chan struct{}, err error, ask func(asked []string) (R, error)) (r R, _ error) {
	var (
		miss  *state.Miss
		asked []string
	)
	for round := 0; errors.As(err, &miss); round++ {
		switch {
		case p.cfg.Demand == nil:
			return r, fmt.Errorf("%w, and this proxy has nobody to ask on demand", err)
		case round == lookUpRounds:
			return r, fmt.Errorf("%w, after %d look-ups", err, round)
		case round == 0:
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeoutCause(ctx, lookUpBudget, errLookUpTime)
			defer cancel()
		}
		if err := p.demand(ctx, places, miss.Keys); err != nil {
			return r, err
		}
		asked = append(asked, miss.Keys...)
		r, err = ask(asked)
	}
	return r, err
}

// demand asks the control plane for all keys, and returns when each was answered
// or one was not.
func (p *Proxy) demand(ctx context.Context, places chan struct{}, keys []string) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for _, key := range keys {
		select {
		case places <- struct{}{}:
		case <-ctx.Done():
			continue
		}
		wg.Go(func() {
			defer func() { <-places }()
			if err := p.cfg.Demand(ctx, key); err != nil {
				cancel(&lookUpError{key, err}) // the first failure, or nothing if ctx has ended before
			}
		})
	}
	wg.Wait()
	err := context.Cause(ctx)
	var failed *lookUpError
	if err == nil || errors.As(err, &failed) {
		return err
	}
	return &lookUpError{strings.Join(keys, ", "), err}
}

// lookUpError is a resource, or several, that could not be looked up.
type lookUpError struct {
	key string
	err error
}

func (e *lookUpError) Error() string { return "look up " + e.key + " on demand: " + e.err.Error() }
func (e *lookUpError) Unwrap() error { return e.err }

// sourceWait bounds the look-up of a client's workload: it is for telemetry only,
// and the client waits. sourcePause is how long it is not tried after it took too
// long, so that not every client waits for a control plane that is gone.
const (
	sourceWait  = time.Second
	sourcePause = 10 * time.Second
)

// demandSource looks for the workload at a client's address, as well as it can:
// no failure is told, and when too many others are looked up, or the control plane
// has just been silent, it is not tried.
func (p *Proxy) demandSource(ctx context.Context, ip netip.Addr) (*state.Workload, bool) {
	if p.cfg.Demand == nil {
		return nil, false
	}
	if late := p.lookUps.sourceLate.Load(); late != nil && time.Since(*late) < sourcePause {
		return nil, false
	}
	select {
	case p.lookUps.sources <- struct{}{}:
	default:
		return nil, false
	}
	defer func() { <-p.lookUps.sources }()
	bounded, cancel := context.WithTimeout(ctx, sourceWait)
	defer cancel()
	if err := p.cfg.Demand(bounded, p.cfg.NetworkID+"/"+ip.Unmap().String()); err != nil {
		if bounded.Err() != nil && ctx.Err() == nil { // a quick error costs the others nothing, and that the client has gone says nothing
			now := time.Now()
			p.lookUps.sourceLate.Store(&now)
		}
		return nil, false
	}
	return p.cfg.Store.Workload(p.cfg.NetworkID, ip)
}

// resolveWait bounds a resolution, as connecting is bounded.
const resolveWait = 10 * time.Second

// resolve completes the route to a workload that has a host name and no address
// (spec/state-xds-dns.md §4.10).
func (p *Proxy) resolve(ctx context.Context, source *state.Workload, dst netip.Addr, r state.Route) (state.Route, error) {
	failed := &resolveError{}
	if hop := r.Hop(); hop != nil {
		failed.uid = hop.UID
	}
	if p.cfg.Resolve == nil {
		failed.err = fmt.Errorf("there is no resolver for %q", r.Resolve)
		return state.Route{}, failed
	}
	p.cfg.Metrics.onDemandDNS.Inc(onDemandDNSLabels(source, r.Resolve)...)
	wait := cmp.Or(p.cfg.ResolveTimeout, resolveWait)
	ctx, cancel := context.WithTimeoutCause(ctx, wait, fmt.Errorf("no answer within %v: %w", wait, context.DeadlineExceeded))
	defer cancel()
	addrs, err := p.cfg.Resolve(ctx, r.Resolve)
	if err != nil {
		p.log.DebugContext(ctx, "host name not resolved", "host", r.Resolve, "workload.uid", failed.uid, "error", err.Error())
		failed.err = err
		return state.Route{}, failed
	}
	ip, ok := pickAddr(addrs, dst.Unmap().Is4())
	if !ok {
		failed.answered = true
		return state.Route{}, failed
	}
	return r.Resolved(ip), nil
}

// pickAddr draws one of the addresses to which one can connect: of the wanted
// family if there is any, else of the other.
func pickAddr(addrs []netip.Addr, v4 bool) (picked netip.Addr, ok bool) {
	seen, same := 0, false
	for _, ip := range addrs {
		ip = ip.Unmap()
		if !connectable(ip) {
			continue
		}
		is := ip.Is4() == v4
		switch {
		case same && !is:
			continue
		case is && !same:
			seen, same = 0, true
		}
		if seen++; rand.IntN(seen) == 0 {
			picked = ip
		}
	}
	return picked, seen > 0
}

// connectable tells whether somebody may be at ip. The unspecified address is
// none: to the kernel it means our own loopback address.
func connectable(ip netip.Addr) bool {
	ip = ip.Unmap()
	return ip.IsValid() && !ip.IsUnspecified() && !ip.IsMulticast() && ip.Zone() == ""
}

// resolveError is a workload without address whose host name gave none.
type resolveError struct {
	uid      string
	answered bool // by a response without addresses
	err      error
}

// Error has the words of the reference implementation.
func (e *resolveError) Error() string {
	if e.answered {
		return fmt.Sprintf("ip addresses were resolved for workload %s, but valid dns response had no A/AAAA records", e.uid)
	}
	return fmt.Sprintf("no ip addresses were resolved for workload: %s", e.uid)
}
func (e *resolveError) Unwrap() error { return e.err }
