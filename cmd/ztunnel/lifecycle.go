package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"time"

	"github.com/ztunnel-go/ztunnel/proxy"
	"github.com/ztunnel-go/ztunnel/proxy/inpod"
)

// dataPath is what serves connections: the proxy of one workload, or one for each
// pod of the node.
type dataPath interface {
	// listen opens what has to be open before the start.
	listen(context.Context) error
	// run serves, connections once gate is closed, until the drain is over or, with
	// every connection cut, until ctx ends. waiting ends when the drain begins.
	run(ctx, waiting context.Context, gate <-chan struct{}) error
	// drain lets what is open end, so that run returns. It does not block.
	drain()
	// dump adds what there is to tell.
	dump(keys map[string]any, ours *ourDump)
}

// errQuit is the cause of a drain that POST /quitquitquit began.
var errQuit = errors.New("asked to quit by the admin server")

// errEnded is the failure of a data path that nobody has asked to end.
var errEnded = errors.New("ended by itself")

// logPatience is how long after the deadline of the drain a log whose output
// takes no lines may hold up the end.
const logPatience = time.Second

// listen opens every listener: a bind error ends the start (spec §6.2), save for
// ports that are waited for.
func (n *node) listen(ctx context.Context) (err error) {
	defer func() {
		if err != nil {
			n.closeListeners()
		}
	}()
	for _, p := range n.http {
		if err := p.openNow(ctx); err != nil {
			return err
		}
	}
	return n.data.listen(ctx)
}

// run serves what listen opened, until ctx ends, the admin server is asked to
// quit, or a part fails. Then it drains (design §6): not ready, the CNI agent is
// left, nothing accepted any more, open connections go on until the deadline, and
// what they need ends after them. The error is the first failure of a part. When
// the CNI agent speaks another protocol everything ends at once.
func (n *node) run(ctx context.Context) error {
	// What the drain needs outlives ctx, and the connections outlive a part that
	// has failed: only the deadline cuts them.
	base := context.WithoutCancel(ctx)
	support, stop := context.WithCancel(base)
	probes, notReady := context.WithCancel(support)
	data, cut := context.WithCancelCause(base)
	late := time.AfterFunc(math.MaxInt64, n.releaseLog)
	defer late.Stop()
	defer cut(nil)
	failed := make(chan error, 1)
	done := make(chan error, 1)
	var parts sync.WaitGroup
	defer parts.Wait()
	defer stop()
	defer notReady()
	// The data path first: a CNI agent that waits for its answer holds up pods.
	parts.Go(func() { done <- n.data.run(data, probes, n.gate) })
	n.startParts(&parts, support, probes, failed)

	var cause, failure error
	select {
	case <-ctx.Done():
		cause = context.Cause(ctx)
	case <-n.quit:
		cause = errQuit
	case failure = <-failed:
		cause = failure
	case err := <-done:
		failure = fmt.Errorf("data path: %w", cmp.Or(err, errEnded))
		if _, ok := errors.AsType[*inpod.ProtocolError](err); ok {
			late.Reset(logPatience)
			return failure
		}
		cause = failure
		done <- nil
	}
	notReady()
	n.data.drain()
	deadline := time.NewTimer(n.cfg.Proxy.TerminationDeadline)
	defer deadline.Stop()
	late.Reset(min(n.cfg.Proxy.TerminationDeadline, math.MaxInt64-logPatience) + logPatience)
	n.app.Info("draining", "cause", cause.Error(), "deadline", n.cfg.Proxy.TerminationDeadline.String())
	var err error
	select {
	case err = <-done:
	case <-deadline.C:
		cut(proxy.ErrDraining)
		n.app.Warn("drain duration expired with pending connections, forcefully shutting down")
		err = <-done
	}
	if failure == nil {
		select {
		case failure = <-failed: // during the drain
		default:
		}
	}
	return cmp.Or(failure, err)
}

// startParts starts everything but the data path. Each part ends with support,
// readiness and what waits for the start with probes already. failed, which has
// room for one, gets the first error of a part that ended before.
func (n *node) startParts(parts *sync.WaitGroup, support, probes context.Context, failed chan<- error) {
	part := func(ctx context.Context, what string, run func(context.Context) error) {
		parts.Go(func() {
			err := run(ctx)
			if err == nil || ctx.Err() != nil {
				return
			}
			select {
			case failed <- fmt.Errorf("%s: %w", what, err):
			default: // not the first
			}
			n.app.Error("part failed", "part", what, "error", err.Error())
		})
	}
	for _, p := range n.http {
		ctx := support
		if p.listener == listenReadiness {
			ctx = probes
		}
		part(ctx, p.listener+" server", func(ctx context.Context) error { return p.serve(ctx, probes) })
	}
	if n.adminSocket != nil {
		server := n.httpPorts(listenAdmin)[0].server
		part(support, "admin socket", func(ctx context.Context) error { return server.Serve(ctx, n.adminSocket) })
	}
	part(support, "certificate manager", n.certs.Run)
	if n.crls != nil {
		part(support, "certificate revocation lists", n.crls.Run)
	}
	if n.caConfig != nil {
		part(support, "certificate provider configuration", n.caConfig.run)
	}
	if n.world != nil {
		part(support, "local state", n.world.Run)
	}
	if n.xds != nil {
		part(support, "xDS", n.runXDS)
	}
	parts.Go(func() { n.openGate(probes) })
}

// openGate lets connections be served once the state is known. When waiting ends
// before, as it does with a drain, nothing is ever served.
func (n *node) openGate(waiting context.Context) {
	if n.xds != nil {
		select {
		case <-n.xds.Synced():
		case <-waiting.Done():
			return
		}
	}
	for _, complete := range n.opened {
		complete()
	}
	close(n.gate)
}

// releaseLog closes the log, so that nobody waits any longer for an output that
// takes no lines: connections that end, or run itself. Whatever is not over by
// now hangs.
func (n *node) releaseLog() {
	now, cancel := context.WithCancel(context.Background())
	cancel()
	_ = n.log.Close(now) // who owns the log closes it again, and learns of it
}
