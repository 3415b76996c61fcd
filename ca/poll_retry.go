package ca

import (
	"errors"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/internal/backoff"
)

// retries are the failures of one identity since its last success.
type retries struct {
	ordinary, denied *backoff.Sequence // nil before the first failure of the kind
	latest           time.Time
}

// retryDelay is the time to wait after a failure at now. It is called with the
// lock held.
func (p *poll) retryDelay(id spiffeid.ID, err error, now time.Time) time.Duration {
	r := p.retries[id]
	if r == nil {
		r = new(retries)
		p.retries[id] = r
	}
	r.latest = now
	seq, policy := &r.ordinary, p.cfg.Backoff
	if errors.Is(err, ErrDenied) {
		seq, policy = &r.denied, p.cfg.Denied
	}
	if *seq == nil {
		*seq = policy.New()
	}
	return (*seq).Next(now)
}

// pruneRetries drops the counters of identities that nobody watches and whose
// failures are long past. It is called with the lock held.
func (p *poll) pruneRetries() {
	const keep = time.Hour
	for id, r := range p.retries {
		if p.entries[id] == nil && time.Since(r.latest) > keep {
			delete(p.retries, id)
		}
	}
}
