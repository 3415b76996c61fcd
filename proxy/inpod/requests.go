package inpod

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/ztunnel-go/ztunnel/proxy/inpod/zdspb"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// answerWithin is how long an answer waits for the start of a proxy: an agent
// that is kept waiting keeps others waiting, and takes a late answer for that to
// its next message.
const answerWithin = 800 * time.Millisecond

// The reasons for which a message is refused, in a metric.
const (
	refusedStart   = "start"
	refusedMessage = "message"
	refusedRead    = "read"
)

// startError says that a pod is not served yet.
type startError struct{ err error }

func (e *startError) Error() string { return "start the proxy: " + e.err.Error() }
func (e *startError) Unwrap() error { return e.err }

// take carries out one packet. A refusal is what the agent is told, and a failure
// ends the connection (spec/identity-admin-inpod.md §7.4).
func (m *Manager) take(ctx context.Context, p packet) (refusal string, failure error) {
	msg, err := decode(p)
	if err != nil {
		m.cfg.Metrics.nacks.WithLabelValues(refusedRead).Inc()
		return "failure to read message : " + err.Error(), fmt.Errorf("read message: %w", err)
	}
	err = m.recovered(ctx, "message of the node agent", func(ctx context.Context) error { return m.handle(ctx, msg) })
	var start *startError
	switch {
	case err == nil:
		return "", nil
	case errors.As(err, &start):
		if m.cfg.NACK == NACKNever {
			return "", nil
		}
		m.cfg.Metrics.nacks.WithLabelValues(refusedStart).Inc()
		return "failure to start proxy : " + start.err.Error(), nil
	}
	m.cfg.Metrics.nacks.WithLabelValues(refusedMessage).Inc()
	var wrong *ProtocolError
	if errors.As(err, &wrong) {
		return "failure to process message : " + wrong.Err.Error(), wrong
	}
	return "failure to process message : " + err.Error(), err
}

// handle carries out one message. The error is a *startError or a *ProtocolError.
func (m *Manager) handle(ctx context.Context, msg message) error {
	switch r := msg.request.GetPayload().(type) {
	case *zdspb.WorkloadRequest_Add:
		return m.add(ctx, r.Add, msg.ns)
	case *zdspb.WorkloadRequest_Keep:
		return m.keep(r.Keep.GetUid())
	case *zdspb.WorkloadRequest_Del:
		m.del(r.Del.GetUid())
	case *zdspb.WorkloadRequest_SnapshotSent:
		return m.reconcile()
	}
	return nil
}

// add has a proxy for a pod. It owns ns.
func (m *Manager) add(ctx context.Context, add *zdspb.AddWorkload, ns *os.File) error {
	info := add.GetWorkloadInfo()
	if info == nil {
		_ = ns.Close()
		return &ProtocolError{errors.New("workload_info is required but not present")}
	}
	id, err := netns.ID(ns)
	if err != nil {
		_ = ns.Close()
		m.log.WarnContext(ctx, "a pod is not served: its network namespace cannot be told", "uid", add.GetUid(), "error", err.Error())
		return &startError{fmt.Errorf("network namespace: %w", err)}
	}
	p := &pod{
		m: m, ns: ns, id: id, added: time.Now(), done: make(chan struct{}), result: make(chan error, 1),
		about: Pod{UID: add.GetUid(), Name: info.GetName(), Namespace: info.GetNamespace(), ServiceAccount: info.GetServiceAccount(), Settled: m.settled},
	}
	p.log = m.log.With("uid", p.about.UID, "pod", p.about.Namespace+"/"+p.about.Name)
	pods, cut := context.WithCancelCause(ctx)
	p.cut = cut
	if !m.admit(p) {
		cut(nil)
		_ = ns.Close() // there is one for this namespace
		return nil
	}
	m.running.Go(func() {
		defer cut(nil)
		p.supervise(pods)
	})
	timer := time.NewTimer(answerWithin)
	defer timer.Stop()
	select {
	case err = <-p.result:
	case <-timer.C:
		err = fmt.Errorf("not done within %s", answerWithin)
	}
	if err != nil {
		return &startError{err}
	}
	return nil
}

// admit makes p the pod of its UID, unless there is one in the same namespace that
// has not failed.
func (m *Manager) admit(p *pod) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	old := m.pods[p.about.UID]
	initial := m.zds.snapshot.IsZero()
	if old != nil && old.id == p.id && old.state != Failed {
		old.listed, old.initial = true, old.initial || initial
		return false
	}
	p.listed, p.initial = true, initial
	if old != nil {
		if old.id == p.id { // its story goes on
			p.settled, p.failures, p.told, p.toldAt = old.settled, old.failures, old.told, old.toldAt
		}
		m.remove(old, errReplaced)
	}
	for other := range m.ending {
		if other.id == p.id {
			p.after = append(p.after, other)
		}
	}
	p.state, p.since = Starting, time.Now()
	m.pods[p.about.UID] = p
	return true
}

// remove ends the proxy of a pod at once. The caller holds m.mu.
func (m *Manager) remove(p *pod, cause error) {
	delete(m.pods, p.about.UID)
	m.ending[p] = struct{}{}
	p.set(Draining, cause.Error())
	p.cut(cause)
}

// keep says that the agent knows a pod and has lost its namespace.
func (m *Manager) keep(uid string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.zds.snapshot.IsZero() {
		return &ProtocolError{errors.New("pod keep received after snapshot")}
	}
	if p := m.pods[uid]; p != nil {
		p.listed, p.initial = true, true
	}
	return nil
}

// del ends a pod. Within a snapshot one that is served stays until the end of the
// snapshot.
func (m *Manager) del(uid string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.pods[uid]
	switch {
	case p == nil:
	case m.zds.snapshot.IsZero() && p.state != Failed:
		p.listed, p.initial = false, false
	default:
		m.remove(p, errDeleted)
	}
}

// reconcile ends the pods that the snapshot does not have.
func (m *Manager) reconcile() error {
	n, err := m.complete()
	if err != nil {
		return err
	}
	m.wake()
	m.log.Info("the node agent has told of all pods", "pods", n)
	return nil
}

// complete is the part of reconcile that needs m.mu. It returns how many pods
// there are.
func (m *Manager) complete() (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.zds.snapshot.IsZero() {
		return 0, &ProtocolError{errors.New("pod snapshot received already")}
	}
	for _, p := range m.pods {
		if !p.listed {
			m.remove(p, errMissing)
		}
	}
	m.zds.snapshot = time.Now()
	m.zds.hold()
	return len(m.pods), nil
}
