package istio

import (
	"context"
	"crypto/x509"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/internal/istiod"
)

// trust makes bundles of anchors: for the trust domain and its aliases, judged
// as the Istio CAs of the field need it (design D1, D2).
type trust struct {
	provider string
	domain   spiffeid.TrustDomain
	aliases  []spiffeid.TrustDomain
}

func (t trust) bundles(certs []*x509.Certificate) *ca.Bundles {
	anchors := make([]ca.Anchor, len(certs))
	for i, c := range certs {
		anchors[i] = ca.Anchor{Cert: c, Provider: t.provider, Mode: ca.Compatible}
	}
	return ca.NewBundles(map[spiffeid.TrustDomain][]ca.Anchor{t.domain: anchors}).WithAliases(t.domain, t.aliases...)
}

// rootSet is one content of roots with the anchors that it makes. It is
// immutable.
type rootSet struct {
	*istiod.RootSet
	bundles *ca.Bundles // nil: none to contribute
}

// roots are root certificates that are trust anchors for peers, too. All methods
// are safe for concurrent use.
type roots struct {
	source *istiod.Roots
	trust  trust

	mu  sync.Mutex // guards what follows
	set *rootSet   // of the latest look
}

// look is the newest good content. A file is looked at unless that was done
// within maxAge. An error means that there was no good content so far.
func (r *roots) look(ctx context.Context, maxAge time.Duration) (*rootSet, error) {
	content, err := r.source.Look(ctx, maxAge)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.set == nil || r.set.RootSet != content {
		r.set = &rootSet{RootSet: content}
		if len(content.Certs) > 0 {
			r.set.bundles = r.trust.bundles(content.Certs)
		}
	}
	return r.set, nil
}
