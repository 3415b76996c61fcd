package inpod

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/state"
)

const (
	// retryEvery is how long a pod that has failed waits for its next try
	// (spec/identity-admin-inpod.md §7.6).
	retryEvery = 5 * time.Second
	// startTimeout bounds one try.
	startTimeout = 5 * time.Second
	// predecessorPatience is how long a pod waits for the end of the proxy that has
	// its ports.
	predecessorPatience = 500 * time.Millisecond
	// repeatLogAfter is when a failure is told again that has not changed.
	repeatLogAfter = 5 * time.Minute
)

// pod is one pod of the node, from Add to the end of its proxy. Its goroutine is
// supervise.
type pod struct {
	m      *Manager
	about  Pod      // without Network and Verify
	ns     *os.File // the pod's own; closed when its proxy has ended
	id     netns.NamespaceID
	added  time.Time
	after  []*pod // in the same namespace: their proxies have to end first
	log    *slog.Logger
	cut    context.CancelCauseFunc
	done   chan struct{} // closed at the end of supervise
	result chan error    // one slot: of the first try

	// The rest is guarded by Manager.mu.
	state      State
	reason     string
	since      time.Time
	network    Namespace               // as ns was entered last
	proxy      Proxy                   // nil between two
	restart    context.CancelCauseFunc // ends proxy, for another one
	failures   int                     // since it ran last
	settled    bool                    // it has run, or was tried again in vain
	fresh      bool                    // the audit has not seen that it runs
	listed     bool                    // on this connection
	initial    bool                    // in the snapshot of this connection
	told       string                  // the failure that was logged last
	toldAt     time.Time
	checked    *state.Workload // of which mismatch speaks
	checkedAt  time.Time
	mismatch   error // the workload is not the pod
	mismatched time.Time
}

// set changes the state. The caller holds Manager.mu.
func (p *pod) set(s State, reason string) {
	if p.state != s {
		p.state, p.since = s, time.Now()
	}
	p.reason = reason
}

// supervise starts the proxy of the pod and keeps it running until ctx ends, or
// the drain is over.
func (p *pod) supervise(ctx context.Context) {
	defer p.end()
	p.awaitPredecessors(ctx)
	for p.wanted(ctx) {
		err := p.serve(ctx)
		if !p.wanted(ctx) {
			break
		}
		var again *restartError
		if errors.As(err, &again) {
			p.log.WarnContext(ctx, "the proxy of a pod is started again", "error", again.err.Error())
			continue
		}
		p.failed(ctx, err)
		p.report(err) // when it shows: the next message may be about that
		timer := time.NewTimer(retryEvery)
		select {
		case <-timer.C:
		case <-ctx.Done():
		case <-p.m.draining:
		}
		timer.Stop()
	}
	p.report(errDraining)
}

// wanted tells whether there is to be a proxy.
func (p *pod) wanted(ctx context.Context) bool { return ctx.Err() == nil && !p.m.isDrained() }

// awaitPredecessors waits for the proxies that have the ports, which matters
// where ports cannot be shared.
func (p *pod) awaitPredecessors(ctx context.Context) {
	if len(p.after) == 0 {
		return
	}
	defer func() { p.after = nil }()
	timer := time.NewTimer(predecessorPatience)
	defer timer.Stop()
	for _, other := range p.after {
		select {
		case <-other.done:
		case <-timer.C:
			return
		case <-ctx.Done():
			return
		}
	}
}

// report answers for the first try.
func (p *pod) report(err error) {
	select {
	case p.result <- err:
	default: // not the first
	}
}

// end gives up the namespace and forgets the pod.
func (p *pod) end() {
	if err := p.ns.Close(); err != nil {
		p.log.Error("the network namespace of a pod could not be closed", "error", err.Error())
	}
	m := p.m
	m.mu.Lock()
	delete(m.ending, p)
	if m.pods[p.about.UID] == p { // at the end of the drain
		delete(m.pods, p.about.UID)
	}
	m.mu.Unlock()
	close(p.done)
	m.evaluate()
}

// failed shows why there is no proxy.
func (p *pod) failed(ctx context.Context, err error) {
	reason := err.Error()
	p.m.mu.Lock()
	p.failures++
	p.settled = p.settled || p.failures > 1
	p.set(Failed, reason)
	level := slog.LevelDebug
	if now := time.Now(); reason != p.told || now.Sub(p.toldAt) >= repeatLogAfter {
		p.told, p.toldAt, level = reason, now, slog.LevelWarn
	}
	p.m.mu.Unlock()
	p.m.evaluate()
	p.log.Log(ctx, level, "a pod is not served: its proxy has failed and is started again", "error", reason,
		"is_network_namespace", isNetNS(p.ns), "retry_in", retryEvery.String())
}

// restartError ends a proxy in order to start another one.
type restartError struct{ err error }

func (e *restartError) Error() string {
	return "connection closed: the proxy restarts: " + e.err.Error()
}
func (e *restartError) Unwrap() error { return e.err }

var errEnded = errors.New("the proxy has ended by itself")

// serve makes a proxy and runs it to its end, of which the error tells the
// reason.
func (p *pod) serve(ctx context.Context) error {
	if err := p.claim(); err != nil {
		return err
	}
	defer p.unclaim()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	proxy, err := p.start(ctx, cancel)
	if proxy != nil {
		defer p.stopped()
	}
	if err != nil {
		if proxy != nil {
			proxy.Drain()
		}
		return err
	}
	p.running()
	p.report(nil)
	err = proxy.Run(ctx)
	p.m.cfg.Metrics.stopped.Inc()
	switch cause := context.Cause(ctx); {
	case cause != nil:
		return cause
	case err != nil:
		return fmt.Errorf("serve: %w", err)
	}
	return errEnded
}

// claim makes the namespace that of p. Two pods in one namespace would share their
// ports, and each would carry connections of the other under its own identity: the
// second one is not served. One that is on its way out has no claim, and one that is
// known not to be the pod of its workload gives way.
func (p *pod) claim() error {
	m := p.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if other := m.claims[p.id]; other != nil && other != p && m.pods[other.about.UID] == other {
		err := fmt.Errorf("its network namespace is that of pod %s/%s, UID %s", other.about.Namespace, other.about.Name, other.about.UID)
		if other.mismatch == nil || other.restart == nil || p.mismatch != nil {
			return err
		}
		other.restart(&restartError{errors.New("another pod has its network namespace")})
	}
	m.claims[p.id] = p
	return nil
}

// unclaim gives the namespace to whoever comes.
func (p *pod) unclaim() {
	p.m.mu.Lock()
	defer p.m.mu.Unlock()
	if p.m.claims[p.id] == p {
		delete(p.m.claims, p.id)
	}
}

// start makes a proxy that listens. The proxy may be there without being of use.
// The agent is answered when the ports are taken; it has to wait for their
// listeners, too, if it has told of all pods: the pod is about to begin then, and
// should find us.
func (p *pod) start(ctx context.Context, restart context.CancelCauseFunc) (proxy Proxy, err error) {
	open, later := p.m.phase()
	if proxy, err = p.bind(ctx, restart, open && later); err != nil || open && later {
		return proxy, err
	}
	if !open {
		p.bound()
	}
	p.report(nil)
	select {
	case <-p.m.opened:
	case <-p.m.draining:
		return proxy, errDraining
	case <-ctx.Done():
		return proxy, context.Cause(ctx)
	}
	return proxy, p.step(ctx, "listen", func(ctx context.Context) error {
		return p.visit(ctx, "listen", proxy.Listen)
	})
}

// bind makes a proxy that has its ports, and listens on them if it should.
func (p *pod) bind(ctx context.Context, restart context.CancelCauseFunc, listen bool) (proxy Proxy, err error) {
	const what = "start"
	err = p.step(ctx, what, func(ctx context.Context) error {
		about := p.about
		network, err := p.m.cfg.Network(p.ns)
		if err != nil {
			return fmt.Errorf("network namespace: %w", err)
		}
		about.Network = network
		about.Verify = func(_ context.Context, w *state.Workload) error { return verify(network, w) }
		p.enters(network)
		made, err := p.m.cfg.New(about)
		if err != nil {
			return err
		}
		if !p.takes(made, restart) {
			return errDraining
		}
		proxy = made
		return p.visit(ctx, what, func(ctx context.Context) error {
			if err := proxy.Bind(ctx); err != nil || !listen {
				return err
			}
			return proxy.Listen(ctx)
		})
	})
	return proxy, err
}

// visit does what opens sockets of the pod, in one visit of its namespace.
func (p *pod) visit(ctx context.Context, what string, do func(context.Context) error) error {
	v, ok := p.network.(Visitor) // only this goroutine sets it
	if !ok {
		return do(ctx)
	}
	return v.Visit(ctx, func(ctx context.Context) error { return p.m.recovered(ctx, what, do) })
}

// step does one part of a start: bounded, one of few at a time, and with its
// panics recovered.
func (p *pod) step(ctx context.Context, what string, do func(context.Context) error) error {
	defer p.m.starts.begin(ctx)()
	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("%s: not done within %s", what, startTimeout))
	defer cancel()
	return p.m.recovered(ctx, what, do)
}

// enters lets the audit look at the namespace.
func (p *pod) enters(network Namespace) {
	p.m.mu.Lock()
	defer p.m.mu.Unlock()
	p.network = network
}

// takes makes proxy that of the pod, unless the drain has begun.
func (p *pod) takes(proxy Proxy, restart context.CancelCauseFunc) bool {
	p.m.mu.Lock()
	defer p.m.mu.Unlock()
	if p.m.drained {
		return false
	}
	p.proxy, p.restart = proxy, restart
	return true
}

// bound says that the proxy has its ports, and waits.
func (p *pod) bound() {
	p.m.mu.Lock()
	defer p.m.mu.Unlock()
	if p.m.pods[p.about.UID] == p {
		p.set(Starting, "it has its ports and listens as soon as the control plane has answered")
	}
}

// running says that the proxy listens.
func (p *pod) running() {
	p.m.cfg.Metrics.started.Inc()
	p.m.mu.Lock()
	p.failures, p.settled, p.fresh = 0, true, true
	switch {
	case p.m.pods[p.about.UID] != p: // it is to end already, as draining says
	case p.m.drained:
		p.set(Draining, "")
	default:
		p.set(Active, "")
	}
	p.m.mu.Unlock()
	p.m.wake() // its addresses
	p.m.evaluate()
	p.log.Info("the proxy of a pod has started")
}

// stopped says that there is no proxy.
func (p *pod) stopped() {
	p.m.mu.Lock()
	defer p.m.mu.Unlock()
	p.proxy, p.restart = nil, nil
	if p.m.pods[p.about.UID] == p && !p.m.drained {
		p.set(Starting, "")
	}
}
