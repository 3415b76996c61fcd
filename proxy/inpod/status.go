package inpod

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/ztunnel-go/ztunnel/proxy"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// State is where a pod is.
type State string

// The states.
const (
	Starting State = "starting" // its ports are being taken, or wait for Manager.Open
	Active   State = "active"   // it is served
	Draining State = "draining" // its connections end
	Failed   State = "failed"   // it is not served
)

var states = []State{Starting, Active, Draining, Failed}

// PodStatus describes one pod of the node.
type PodStatus struct {
	UID, Name, Namespace, ServiceAccount string
	State                                State
	// Reason is why it is in its state, one line, or "".
	Reason string
	// Since is when it came into its state.
	Since time.Time
	NetNS netns.NamespaceID
	// Retries is how often a start has failed since it was served last.
	Retries     int
	Connections proxy.Connections
}

// Snapshot describes the pods of this node, sorted by UID. A pod that was deleted
// is among them until its proxy has ended. It asks every proxy for its
// connections.
func (m *Manager) Snapshot() []PodStatus {
	m.mu.Lock()
	all := make(map[string]*pod, len(m.pods)+len(m.ending))
	for p := range m.ending {
		all[p.about.UID] = p
	}
	maps.Copy(all, m.pods)
	list := make([]PodStatus, 0, len(all))
	proxies := make([]Proxy, 0, len(all))
	for _, p := range all {
		list, proxies = append(list, p.status()), append(proxies, p.proxy)
	}
	m.mu.Unlock()
	for i, proxy := range proxies {
		if proxy != nil {
			list[i].Connections = proxy.Connections()
		}
	}
	slices.SortFunc(list, func(a, b PodStatus) int { return cmp.Compare(a.UID, b.UID) })
	return list
}

// status describes p. The caller holds Manager.mu.
func (p *pod) status() PodStatus {
	s := PodStatus{
		UID: p.about.UID, Name: p.about.Name, Namespace: p.about.Namespace, ServiceAccount: p.about.ServiceAccount,
		State: p.state, Reason: p.reason, Since: p.since, NetNS: p.id, Retries: p.failures,
	}
	if p.state == Active && p.mismatch != nil {
		s.State, s.Reason, s.Since = Failed, p.mismatch.Error(), p.mismatched
	}
	return s
}

// Status describes the connection to the node agent.
type Status struct {
	Path      string
	Connected bool
	// Since is when the connection was made or lost, zero before the first one.
	Since time.Time
	// Snapshot is when the agent had told of all pods, zero while it has not on this
	// connection.
	Snapshot time.Time
	// Error is why there is no connection.
	Error string
}

// Status describes the connection to the node agent.
func (m *Manager) Status() Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := Status{Path: m.cfg.Path, Connected: m.zds.up, Since: m.zds.since, Snapshot: m.zds.snapshot}
	if m.zds.err != nil {
		s.Error = m.zds.err.Error()
	}
	return s
}

// connection is what readiness needs to know of that to the agent. It is guarded
// by Manager.mu.
type connection struct {
	up       bool
	since    time.Time
	snapshot time.Time
	err      error     // why it is down, or went down last
	patience time.Time // no pod keeps the node from being ready after that
}

var errNotTried = errors.New("no attempt yet")

// holdMax bounds how long the pods of a snapshot are waited for: for a start that
// takes its whole time, and the try after it.
const holdMax = 2 * startTimeout

func (c *connection) hold() { c.patience = time.Now().Add(holdMax) }

// evaluate tells whoever asks about readiness, if there is something new.
func (m *Manager) evaluate() {
	m.reporting.Lock()
	defer m.reporting.Unlock()
	m.mu.Lock()
	why := m.unready()
	m.mu.Unlock()
	if m.reported == nil || *m.reported != why {
		m.reported = &why
		m.cfg.Ready(why)
		if why == "" && !m.hasSettled {
			m.hasSettled = true
			close(m.settled)
		}
	}
}

// unready is the reason for which this node is not ready, or "". The caller
// holds m.mu.
func (m *Manager) unready() string {
	c := &m.zds
	switch {
	case m.drained:
		return "draining"
	case !c.up:
		return fmt.Sprintf("not connected to the node agent at %s: %v", m.cfg.Path, c.err)
	case c.snapshot.IsZero():
		return "waiting for the ZDS snapshot since " + c.since.Format(time.RFC3339)
	case !m.open:
		return "waiting for the first answer of the control plane: until then the pods' ports are taken and nobody listens"
	}
	held := m.held()
	if len(held) == 0 {
		return ""
	}
	first := slices.MinFunc(held, func(a, b *pod) int { return cmp.Compare(a.about.UID, b.about.UID) })
	why := fmt.Sprintf("%d of %d pods not tried: %s/%s %s", len(held), len(m.pods), first.about.Namespace, first.about.Name, first.state)
	if first.reason != "" {
		why += ": " + first.reason
	}
	return why
}

// held are the pods of the snapshot that readiness waits for. The caller holds
// m.mu.
func (m *Manager) held() []*pod {
	if time.Now().After(m.zds.patience) {
		return nil
	}
	var held []*pod
	for _, p := range m.pods {
		if p.initial && !p.settled {
			held = append(held, p)
		}
	}
	return held
}
