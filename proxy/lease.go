package proxy

import (
	"context"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/state"
)

// leaseHolder keeps the one lease of a proxy. It follows the local workload's
// identity, which the store may change.
type leaseHolder struct {
	certs *ca.Manager

	mu    sync.Mutex // guards id, lease
	id    spiffeid.ID
	lease *ca.Lease
}

// leaseFor is the lease for w's identity.
func (h *leaseHolder) leaseFor(w *state.Workload, podUID string) *ca.Lease {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.lease != nil && h.id == w.Identity {
		return h.lease
	}
	old := h.lease
	h.id, h.lease = w.Identity, h.certs.Acquire(ca.WorkloadRef{
		ID: w.Identity, Namespace: w.Namespace, ServiceAccount: w.ServiceAccount, Pod: w.Name, UID: podUID,
	})
	if old != nil {
		old.Release()
	}
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

// svid is the certificate with which we act for w.
func (p *Proxy) svid(ctx context.Context, w *state.Workload) (*ca.SVID, error) {
	ctx, cancel := context.WithTimeout(ctx, p.cfg.CertificateWait)
	defer cancel()
	svid, err := p.identity.leaseFor(w, p.cfg.PodUID).SVID(ctx)
	if err != nil {
		return nil, &identityError{err}
	}
	return svid, nil
}
