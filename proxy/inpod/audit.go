package inpod

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/ztunnel-go/ztunnel/internal/backoff"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/state"
)

const (
	// auditEvery is how often all that can go wrong with a pod is looked at.
	auditEvery = 30 * time.Second
	// auditSoon is how often a pod is looked at that is not who it should be.
	auditSoon = time.Second
	// auditPause is the least time between two looks, however often the state
	// changes.
	auditPause = 100 * time.Millisecond
)

// audit looks after the pods until ctx ends: everything every auditEvery, and
// what depends on the state when the state changes.
func (m *Manager) audit(ctx context.Context) {
	var whole time.Time
	for {
		changed := m.cfg.Store.Changed() // before the look, so that no change is lost
		now := time.Now()
		all := !now.Before(whole)
		if all {
			whole = now.Add(auditEvery)
		}
		again := m.auditPods(ctx, all)
		m.evaluate()
		wait := whole.Sub(now)
		if again {
			wait = min(wait, auditSoon)
		}
		if !backoff.Sleep(ctx, min(wait, auditPause)) {
			return
		}
		timer := time.NewTimer(time.Until(now.Add(wait)))
		select {
		case <-changed:
		case <-m.look:
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

// auditPods looks at each pod. It is true if that should be soon again.
func (m *Manager) auditPods(ctx context.Context, all bool) (again bool) {
	m.mu.Lock()
	open := m.open
	pods := make([]*pod, 0, len(m.pods))
	for _, p := range m.pods {
		pods = append(pods, p)
	}
	again = len(m.held()) > 0
	m.mu.Unlock()
	if !open { // nobody is served yet, and nobody known
		return again
	}
	for _, p := range pods {
		if ctx.Err() != nil {
			return false
		}
		w, known := m.cfg.Store.Local(p.about.Ref())
		if p.auditAddresses(ctx, w, all) {
			again = true
		}
		if all || p.isNew() {
			p.auditListeners()
		}
		if all && !known {
			p.auditNamespace(ctx)
		}
	}
	return again
}

// auditAddresses checks that w, nil if the state does not know the pod, is the pod.
// It is true if it is not.
func (p *pod) auditAddresses(ctx context.Context, w *state.Workload, all bool) bool {
	p.m.mu.Lock()
	network, before := p.network, p.mismatch
	look := all || w != p.checked || before != nil && time.Since(p.checkedAt) >= auditSoon-auditPause
	p.m.mu.Unlock()
	if network == nil || !look {
		return before != nil
	}
	err := verify(network, w)
	p.m.mu.Lock()
	if p.m.pods[p.about.UID] != p { // it has gone meanwhile, and its namespace with it
		p.m.mu.Unlock()
		return false
	}
	p.checked, p.checkedAt, p.mismatch = w, time.Now(), err
	if err != nil && before == nil {
		p.mismatched = time.Now()
	}
	if isMismatch(err) && !isMismatch(before) && p.proxy != nil && !p.m.drained { // it may act with the identity already
		p.restart(&restartError{err})
	}
	p.m.mu.Unlock()
	switch {
	case err != nil && before == nil:
		p.log.WarnContext(ctx, "a pod gets no identity: the node agent and the control plane disagree about who it is; recreate it if that lasts", "error", err.Error())
	case err == nil && before != nil:
		p.log.InfoContext(ctx, "the control plane and the node agent agree about a pod again")
	}
	return err != nil
}

// verify tells whether w may be the pod in network (decision D13).
func verify(network Namespace, w *state.Workload) error {
	if w == nil || len(w.IPs) == 0 {
		return nil
	}
	have, err := network.Addresses()
	if err != nil {
		return fmt.Errorf("addresses of the pod's network namespace: %w", err)
	}
	for _, ip := range w.IPs {
		if slices.Contains(have, ip) {
			return nil
		}
	}
	return &mismatchError{fmt.Errorf("workload %s has the addresses %v, the pod's network namespace %v: it may be that of another pod", w.UID, w.IPs, have)}
}

// mismatchError says that the workload is not the pod. Other errors say that this
// could not be found out, for which nothing that is open has to end.
type mismatchError struct{ error }

func isMismatch(err error) bool {
	var m *mismatchError
	return errors.As(err, &m)
}

// isNew tells, once, that the proxy has started since the last look.
func (p *pod) isNew() bool {
	p.m.mu.Lock()
	defer p.m.mu.Unlock()
	was := p.fresh
	p.fresh = false
	return was
}

// auditListeners starts the proxy again if it does not listen any more. One that
// is not alone on its ports ends: the pod has failed, until it is.
func (p *pod) auditListeners() {
	p.m.mu.Lock()
	proxy := p.proxy
	active := p.state == Active
	p.m.mu.Unlock()
	if !active || proxy == nil { // a drain has begun
		return
	}
	err := proxy.Check()
	if err == nil {
		return
	}
	p.m.mu.Lock()
	defer p.m.mu.Unlock()
	if p.proxy != proxy || p.m.drained {
		return
	}
	if !errors.Is(err, netns.ErrShared) {
		err = &restartError{err}
	}
	p.restart(err)
}

// auditNamespace ends a pod that the state does not know and that has no network
// any more: the agent may have had no way to say so.
func (p *pod) auditNamespace(ctx context.Context) {
	p.m.mu.Lock()
	network := p.network
	p.m.mu.Unlock()
	if network == nil || time.Since(p.added) < auditEvery {
		return
	}
	if alive, err := network.Alive(); alive || err != nil {
		return
	}
	p.m.mu.Lock()
	gone := p.m.pods[p.about.UID] == p && !p.m.drained
	if gone {
		p.m.remove(p, errDead)
	}
	p.m.mu.Unlock()
	if gone {
		p.log.WarnContext(ctx, "removed a pod of which the node agent has not said that it is gone: its network namespace has no interface, and the control plane does not know it")
	}
}
