package proxy

import (
	"cmp"
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/state"
)

// standInWait is how long an outbound connection waits for the store to learn
// the local workload before it goes on without (decision D22).
const standInWait = time.Second

// standIn takes the place of a local workload that the control plane has not
// told us of, for outbound connections: a pod may speak before istiod knows it.
// It holds what we know from elsewhere, and nothing of it is granted by anyone:
// the identity is the one that our own certificate authority gives us.
type standIn struct {
	workload *state.Workload
	used     atomic.Bool // a connection has waited in vain; the next ones need not
}

// newStandIn makes the workload. It is an error if there is no SPIFFE ID for it.
func newStandIn(cfg *Config) (*state.Workload, error) {
	td := cfg.TLS.DefaultTrustDomain
	if td.IsZero() {
		td = spiffeid.RequireTrustDomainFromString("cluster.local")
	}
	id, err := ca.NewIdentity(td, cfg.Local.Namespace, cfg.Local.ServiceAccount)
	if err != nil {
		return nil, fmt.Errorf("proxy: the local workload %+v has no identity: %w", cfg.Local, err)
	}
	return &state.Workload{
		Name: cfg.Local.Name, Namespace: cfg.Local.Namespace, ServiceAccount: cfg.Local.ServiceAccount,
		TrustDomain: td.Name(), Identity: id, Protocol: state.HBONE,
		Network: cfg.NetworkID, Node: cfg.NodeName, ClusterID: cmp.Or(cfg.ClusterID, "Kubernetes"),
	}, nil
}

// localWorkload is the workload for which we stand in; the store may need a
// moment to learn of it. It is an *unverifiedError if it is not the pod's.
func (p *Proxy) localWorkload(ctx context.Context) (*state.Workload, error) {
	w, ok := p.cfg.Store.Local(p.cfg.Local)
	if !ok {
		var err error
		if w, err = p.awaitLocal(ctx, p.cfg.WorkloadWait); err != nil {
			return nil, err
		}
	}
	return w, p.verifier.verify(ctx, w)
}

// outboundWorkload is localWorkload for outbound connections, which go on as the
// stand-in when the wait is over.
func (p *Proxy) outboundWorkload(ctx context.Context) (*state.Workload, error) {
	w, err := p.knownOrStandIn(ctx)
	if err != nil {
		return nil, err
	}
	return w, p.verifier.verify(ctx, w)
}

// knownOrStandIn is the local workload, or its stand-in if the store does not
// learn of it in time (decision D22). Nothing is left of that once the store knows
// the workload: new connections are that workload's, and if its identity is
// another one, followTrust retires the tunnels.
func (p *Proxy) knownOrStandIn(ctx context.Context) (*state.Workload, error) {
	w, ok := p.cfg.Store.Local(p.cfg.Local)
	switch {
	case ok:
		if p.standIn.used.Load() {
			p.standIn.used.Store(false)
		}
		return w, nil
	case p.standIn.used.Load():
		return p.standIn.workload, nil
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	}
	w, err := p.awaitLocal(ctx, min(standInWait, p.cfg.WorkloadWait))
	if err == nil || ctx.Err() != nil {
		return w, err
	}
	if p.standIn.used.CompareAndSwap(false, true) {
		p.log.WarnContext(ctx, "the control plane does not know the local workload: outbound connections go on with its identity alone",
			"workload", p.cfg.Local.Name, "namespace", p.cfg.Local.Namespace, "identity", p.standIn.workload.Identity)
	}
	return p.standIn.workload, nil
}

// awaitLocal waits for the store to learn the local workload.
func (p *Proxy) awaitLocal(ctx context.Context, wait time.Duration) (*state.Workload, error) {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for {
		changed := p.cfg.Store.Changed()
		if w, ok := p.cfg.Store.Local(p.cfg.Local); ok {
			return w, nil
		}
		select {
		case <-changed:
		case <-timer.C:
			return nil, &unknownWorkloadError{p.cfg.Local}
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}
