package ca

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"
)

// Lease is a hold on the SVID of one workload: it can reach no other. All
// methods are safe for concurrent use.
type Lease struct {
	m    *Manager
	ref  WorkloadRef
	view atomic.Pointer[view] // written under m.mu

	// guarded by m.mu
	hold     *hold         // that fills view; nil when no provider serves the workload
	next     *hold         // of a live move under way
	since    time.Time     // when that move began
	changed  chan struct{} // closed and replaced when view changes
	empty    time.Time     // when view was Available last; when it was acquired, before
	lost     error         // why the identity was taken back; nil when there was an SVID since
	released bool
}

// SVID is the current SVID. When there is one this is one atomic load, and it
// has not expired. Before the provider's first answer it waits, until ctx ends;
// when the provider said no, or the SVID expired or was withdrawn, it returns
// the reason at once, and does not cause a new attempt. The result belongs to
// everyone: fetch it anew for each handshake, and do not keep it.
func (l *Lease) SVID(ctx context.Context) (*SVID, error) {
	if v := l.view.Load(); v.state == Available {
		return v.svid, nil
	}
	return l.wait(ctx)
}

// Current is the SVID if there is one at this moment. It does not wait.
func (l *Lease) Current() (*SVID, bool) {
	v := l.view.Load()
	return v.svid, v.state == Available
}

// Withdrawn is why the provider took the identity back, nil when it did not: an
// SVID that has expired, or was never there, is another matter. It stays so until
// there is an SVID again, also when a live move goes on to a provider that has not
// answered yet. It does not wait.
func (l *Lease) Withdrawn() error {
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	return l.lost
}

func (l *Lease) wait(ctx context.Context) (*SVID, error) {
	for {
		l.m.mu.Lock()
		v, changed := l.view.Load(), l.changed
		hold := l.hold
		if hold != nil && v.state == Pending {
			hold.wanted = true
		}
		l.m.mu.Unlock()
		switch v.state {
		case Available:
			return v.svid, nil
		case Unavailable, Withdrawn:
			return nil, v.err
		}
		if hold != nil {
			hold.hurry()
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, l.late(context.Cause(ctx))
		}
	}
}

// late is the error of a wait that cause has ended: it says who was to answer, and
// what is known of why it did not.
func (l *Lease) late(cause error) error {
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	h := l.hold
	if h == nil {
		return fmt.Errorf("wait for the certificate of %s: %w", l.ref.ID, cause)
	}
	err := fmt.Errorf("provider %s has not answered: %w", h.key.key.Provider, cause)
	if h.lastErr != nil {
		err = fmt.Errorf("provider %s: %w: %w", h.key.key.Provider, h.lastErr, cause)
	}
	return fmt.Errorf("wait for the certificate of %s: %w", l.ref.ID, err)
}

// Since is when the lease lost its SVID, or when it was acquired, if it had none
// yet: from when on there is none, if there is none. It does not wait.
func (l *Lease) Since() time.Time {
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	return l.empty
}

// Changed is closed when what SVID returns has changed: an SVID was renewed,
// lost or found, or the lease was released. Call it before looking at SVID.
func (l *Lease) Changed() <-chan struct{} {
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	return l.changed
}

// Ref is the workload for which the lease was acquired.
func (l *Lease) Ref() WorkloadRef { return l.ref }

// Release gives the lease back. SVID returns [ErrReleased] afterwards, also to
// those who wait. The last lease ends the watch: at once for a certificate of
// one workload, after [ManagerConfig].Linger for one of an identity. Further
// calls do nothing.
func (l *Lease) Release() {
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	if l.released {
		return
	}
	l.store(&view{state: Withdrawn, err: ErrReleased})
	l.released = true
	delete(l.m.leases, l)
	if h := l.stay(); h != nil {
		l.m.leave(h, l, true)
	}
	if h := l.hold; h != nil {
		l.hold = nil
		delete(h.leases, l)
		l.m.leave(h, l, true)
	}
}

// store shows v and wakes those who wait. It is called with the manager's lock
// held.
func (l *Lease) store(v *view) {
	if l.released || l.view.Load() == v {
		return
	}
	if l.view.Load().state == Available {
		l.empty = time.Now()
	}
	switch v.state {
	case Available:
		l.lost = nil
	case Withdrawn:
		if l.lost = v.err; errors.Is(v.err, ErrReleased) {
			l.lost = nil
		}
	}
	l.view.Store(v)
	close(l.changed)
	l.changed = make(chan struct{})
}

// head begins a live move to h. It is called with the manager's lock held.
func (l *Lease) head(h *hold) {
	l.next, l.since = h, time.Now()
	h.moving[l] = struct{}{}
	h.enter(l.ref)
	l.m.moving++
}

// stay ends a live move, whether it got there or not, and returns where it went,
// nil if there was none. It is called with the manager's lock held.
func (l *Lease) stay() *hold {
	h := l.next
	if h == nil {
		return nil
	}
	l.next = nil
	delete(h.moving, l)
	if l.m.moving--; l.m.moving == 0 {
		l.m.poke() // the sweeper tells
	}
	return h
}

// settle ends a live move when it can: the new key has an SVID, or there is
// none to keep. It is called with the manager's lock held.
func (l *Lease) settle() {
	next := l.next
	if next == nil || next.all.view.state != Available && l.view.Load().state == Available {
		return
	}
	old := l.hold
	l.hold = l.stay()
	next.leases[l] = struct{}{}
	l.store(next.audience(l.ref).view)
	if old != nil {
		delete(old.leases, l)
		l.m.leave(old, l, false)
	}
}
