package ca

import (
	"cmp"
	"crypto/x509"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Status is what an operator may know of one certificate. It holds no key.
type Status struct {
	ID       spiffeid.ID
	UID      string // of the workload, when the certificate is not shared by identity
	Provider string
	State    State
	// Text is the state in the words of the reference implementation:
	// Initializing, Available, or "Unavailable: " and the reason.
	Text      string
	Err       error // the newest failure, also of a renewal while State is Available
	Chain     []*x509.Certificate
	Roots     []Anchor // anchors of the identity's own trust domain
	Bundles   *Bundles // those that all leases trust; nil without an SVID
	NotBefore time.Time
	NotAfter  time.Time
	Renewal   time.Time // of the provider's next attempt; zero if its backend pushes
	Leases    int       // 0 while it lingers; those of Arriving are among them
	// Arriving are the leases of a live move that keep another certificate until
	// this one is Available.
	Arriving int
	// Moves are the live moves under way from this certificate, one for each
	// provider, sorted by its name.
	Moves []Move
	// Pods are the workloads that hold a lease, as namespace/name, sorted, each
	// once. Leases whose WorkloadRef names no pod are not among them.
	Pods []string
}

// Move is a live move that waits for a certificate of another provider (or of
// the same one with other settings). The leases keep the one that they have.
type Move struct {
	Provider string // that they wait for
	Leases   int
	Since    time.Time
	Err      error // why there is none; nil while there is no answer yet
}

// String is the state as Go names it; [Status].Text has the words for users.
func (s State) String() string {
	switch s {
	case Pending:
		return "Pending"
	case Available:
		return "Available"
	case Unavailable:
		return "Unavailable"
	case Withdrawn:
		return "Withdrawn"
	}
	return fmt.Sprintf("State(%d)", uint8(s))
}

// Snapshot is the state of all certificates, sorted by identity, then UID, then
// provider.
func (m *Manager) Snapshot() []Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	list := make([]Status, 0, len(m.holds))
	for _, h := range m.holds {
		list = append(list, h.status())
	}
	slices.SortFunc(list, func(a, b Status) int {
		return cmp.Or(cmp.Compare(a.ID.String(), b.ID.String()), cmp.Compare(a.UID, b.UID), cmp.Compare(a.Provider, b.Provider))
	})
	return list
}

func (h *hold) status() Status {
	s := Status{
		ID:       h.id,
		UID:      h.key.key.UID,
		Provider: h.key.key.Provider,
		State:    h.all.view.state,
		Err:      h.lastErr,
		Renewal:  h.next,
		Leases:   len(h.leases) + len(h.moving),
		Arriving: len(h.moving),
		Moves:    h.moves(),
		Pods:     h.podNames(),
	}
	switch h.all.view.state {
	case Pending:
		s.Text = "Initializing"
	case Available:
		s.Text = "Available"
	default:
		s.Text = fmt.Sprintf("Unavailable: %v", h.all.view.err)
	}
	if svid := h.all.view.svid; svid != nil {
		s.ID = svid.ID
		s.NotBefore, s.NotAfter = svid.NotBefore, svid.NotAfter
		s.Bundles = svid.Bundles
		s.Roots = svid.Bundles.Anchors(svid.ID.TrustDomain())
		if chain, err := svid.Chain(); err == nil { // it was parsed when it was checked
			s.Chain = chain
		}
	}
	return s
}

func (h *hold) moves() []Move {
	byProvider := make(map[string]*Move)
	for l := range h.leases {
		if l.next == nil {
			continue
		}
		name := l.next.key.key.Provider
		m := byProvider[name]
		if m == nil {
			m = &Move{Provider: name, Since: l.since}
			byProvider[name] = m
		}
		m.Leases++
		if l.since.Before(m.Since) {
			m.Since = l.since
		}
		if err := cmp.Or(l.next.lastErr, l.next.all.view.err); err != nil && (m.Err == nil || err.Error() < m.Err.Error()) {
			m.Err = err
		}
	}
	var list []Move
	for _, name := range slices.Sorted(maps.Keys(byProvider)) {
		list = append(list, *byProvider[name])
	}
	return list
}

func (h *hold) podNames() []string {
	pods := make(map[string]struct{})
	for l := range h.eachLease {
		if l.ref.Pod != "" {
			pods[l.ref.Namespace+"/"+l.ref.Pod] = struct{}{}
		}
	}
	return slices.Sorted(maps.Keys(pods))
}
