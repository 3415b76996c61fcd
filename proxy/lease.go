package proxy

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/state"
)

// leaseHolder keeps the one lease of a proxy. It follows the local workload's
// identity, which the store may change.
type leaseHolder struct {
	cfg     *Config
	standIn *state.Workload // while the store does not know the local workload

	mu    sync.Mutex // guards id, lease
	id    spiffeid.ID
	lease *ca.Lease
}

// leaseFor is the lease for w's identity. Only the workload that the store has
// now can change it: a connection that still holds an older one must not take
// the certificate from the others, and gets an error.
func (h *leaseHolder) leaseFor(w *state.Workload, podUID string) (*ca.Lease, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.lease != nil && h.id == w.Identity {
		return h.lease, nil
	}
	now, ok := h.cfg.Store.Local(h.cfg.Local)
	if !ok {
		now = h.standIn
	}
	if now == nil || now.Identity != w.Identity {
		return nil, fmt.Errorf("the local workload is no longer %s", w.Identity)
	}
	old := h.lease
	h.id, h.lease = w.Identity, h.cfg.Certs.Acquire(ca.WorkloadRef{
		ID: w.Identity, Namespace: w.Namespace, ServiceAccount: w.ServiceAccount, Pod: w.Name, UID: podUID, PIDFD: h.cfg.PIDFD,
	})
	if old != nil {
		old.Release()
	}
	return h.lease, nil
}

// current is the lease, nil while there is none.
func (h *leaseHolder) current() *ca.Lease {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.lease
}

func (h *leaseHolder) release() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.lease != nil {
		h.lease.Release()
	}
	h.lease, h.id = nil, spiffeid.ID{}
}

// followLease acquires the certificate of a workload that the store knows before
// the first connection asks for it, and with Prefetch already that of the
// stand-in. One that is not captured gets none unasked (spec/state-xds-dns.md
// §4.2).
func (p *Proxy) followLease(seen *watched, local *state.Workload, known bool) {
	switch {
	case known && captured(local):
		// The error is that the store has another one by now: it has changed, too.
		_, _ = p.identity.leaseFor(local, p.cfg.PodUID)
	case known && local != seen.local && (seen.local == nil || captured(seen.local)):
		p.identity.release() // it was captured, or we did not know better
	case !known && p.cfg.Prefetch && seen.local == nil:
		_, _ = p.identity.leaseFor(p.standIn.workload, p.cfg.PodUID)
	}
}

// captured tells whether a workload speaks HBONE.
func captured(w *state.Workload) bool { return w.NativeTunnel || w.Protocol == state.HBONE }

// svid is the certificate with which we act for w.
func (p *Proxy) svid(ctx context.Context, w *state.Workload) (*ca.SVID, error) {
	lease, err := p.identity.leaseFor(w, p.cfg.PodUID)
	if err != nil {
		return nil, &identityError{err}
	}
	if svid, ok := lease.Current(); ok {
		return svid, nil
	}
	ctx, cancel := context.WithTimeout(ctx, p.cfg.CertificateWait)
	defer cancel()
	svid, err := lease.SVID(ctx)
	if errors.Is(err, ca.ErrReleased) { // between the two: the workload has changed, and this is the lease of today
		if lease, err = p.identity.leaseFor(w, p.cfg.PodUID); err != nil {
			return nil, &identityError{err}
		}
		svid, err = lease.SVID(ctx)
	}
	if err != nil {
		return nil, &identityError{fmt.Errorf("no certificate since %s: %w", lease.Since().UTC().Format(time.RFC3339), err)}
	}
	return svid, nil
}
