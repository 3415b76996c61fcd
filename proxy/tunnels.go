package proxy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/proxy/hbone"
)

// tunnel is the record of one HBONE connection, of either role: what its
// handshake found out, by which it is judged again when certificates or
// revocation lists change (design §3, tunnels and certificates; the identity
// spec §3.9).
type tunnel struct {
	p        *Proxy
	reporter string
	usage    ca.Usage        // of the peer
	svid     *ca.SVID        // ours
	epoch    ca.Epoch        // of svid
	peer     ca.Verified     // set by the handshake
	info     *hbone.ConnInfo // set when it is established

	mu        sync.Mutex // guards what follows; held while the tunnel is judged
	over      bool       // told to end at once
	retired   bool       // told to take no new streams
	untracked bool       // said to be out of reach of the revocation lists
}

// tunnels are the established ones of a proxy. Nothing about streams or bytes
// passes through here.
type tunnels struct {
	mu  sync.Mutex // guards all
	all map[*tunnel]struct{}
}

func (ts *tunnels) add(t *tunnel) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	if ts.all == nil {
		ts.all = make(map[*tunnel]struct{})
	}
	ts.all[t] = struct{}{}
}

func (ts *tunnels) remove(t *tunnel) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	delete(ts.all, t)
}

func (ts *tunnels) list() []*tunnel {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	all := make([]*tunnel, 0, len(ts.all))
	for t := range ts.all {
		all = append(all, t)
	}
	return all
}

// newTunnel is the record of a tunnel whose handshake is about to begin, as seen
// by the role in which we report.
func (p *Proxy) newTunnel(reporter string, svid *ca.SVID) *tunnel {
	t := &tunnel{p: p, reporter: reporter, usage: ca.Client, svid: svid, epoch: svid.Epoch()}
	if reporter == reporterSource {
		t.usage = ca.Server
	}
	return t
}

// options are those of its handshake.
func (t *tunnel) options() ca.TLSOptions {
	opts := t.p.cfg.TLS
	opts.Judged = t.judged
	return opts
}

// judged notes the result of the verification, and counts refusals by CRL.
func (t *tunnel) judged(peer ca.Verified, err error) {
	t.peer = peer
	if isRevoked(err) {
		t.p.cfg.Metrics.revoked.WithLabelValues(t.reporter).Inc()
	}
}

// established enters the tunnel, and only then looks whether anything has
// changed since the handshake: whoever changes it sees the tunnel, or the tunnel
// sees the change.
func (t *tunnel) established(info *hbone.ConnInfo) (ended func()) {
	t.info = info
	t.p.tunnels.add(t)
	t.judge(t.p.trust())
	return func() { t.p.tunnels.remove(t) }
}

// trust is by what the tunnels of a proxy are judged at a moment.
type trust struct {
	svid      *ca.SVID // nil: there is none, or it is not known yet
	withdrawn error    // the provider took the identity back
	lists     uint64   // generation of the revocation lists
}

// same tells whether tunnels need not be judged again. It does not compare
// errors: not all of them can be.
func (t trust) same(o trust) bool {
	return t.svid == o.svid && t.lists == o.lists && (t.withdrawn == nil) == (o.withdrawn == nil)
}

// trust is the one of now.
func (p *Proxy) trust() trust {
	now := trust{lists: p.cfg.CRLs.Generation()}
	if lease := p.identity.current(); lease != nil {
		if svid, ok := lease.Current(); ok {
			now.svid = svid
		}
		now.withdrawn = lease.Withdrawn()
	}
	return now
}

// followTrust judges the tunnels by what has changed since the last look. It
// returns what is closed when our certificate changes.
func (p *Proxy) followTrust(ctx context.Context, w *watched) (renewed <-chan struct{}) {
	renewed = never
	if lease := p.identity.current(); lease != nil { // also of a workload that the store has lost
		renewed = lease.Changed()
	}
	if now := p.trust(); !now.same(w.judged) {
		w.judged = now
		p.judgeTunnels(ctx, now)
	}
	return renewed
}

// judgeTunnels ends the tunnels that may not go on and lets those end whose
// trust is no longer ours.
func (p *Proxy) judgeTunnels(ctx context.Context, now trust) {
	if now.svid != nil {
		p.retireEpoch(now.svid.Epoch())
	}
	ended := 0
	for _, t := range p.tunnels.list() {
		if t.judge(now) {
			ended++
		}
	}
	if ended > 0 {
		p.log.WarnContext(ctx, "tunnels ended because their certificates are no longer good", "tunnels", ended)
	}
}

// judge does with the tunnel what now demands, and reports whether it ended it.
func (t *tunnel) judge(now trust) (ended bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.over {
		return false
	}
	cause := t.verdict(now)
	if cause == nil {
		if now.svid != nil && !t.retired && (now.svid.ID != t.svid.ID || now.svid.Epoch() != t.epoch) {
			t.retired = true
			t.info.Drain()
		}
		return false
	}
	t.over = true
	if errors.Is(cause, ErrCertificateRevoked) {
		t.p.cfg.Metrics.revoked.WithLabelValues(t.reporter).Inc()
	}
	t.p.log.Info("tunnel ended", "direction", direction(t.reporter), "peer", t.info.Remote, "peer.identity", t.peer.ID, "cause", cause.Error())
	t.info.Terminate(cause)
	return true
}

// verdict is why the tunnel must end at once, nil if it need not. The caller
// holds t.mu.
func (t *tunnel) verdict(now trust) error {
	if len(t.peer.Path) == 0 {
		t.untrack(errors.New("its handshake verified no certificate"))
		return nil
	}
	// The path that was verified stands for the peer as long as it can; only
	// when it falls, the chain is verified anew, for it may have another one.
	if t.p.cfg.CRLs.Check(t.peer.Path) != nil {
		if err := t.reverify(t.svid.Bundles); isRevoked(err) {
			return fmt.Errorf("%w: %w", ErrCertificateRevoked, err)
		} else if err != nil {
			t.untrack(err)
		}
	}
	switch {
	case now.withdrawn != nil:
		return fmt.Errorf("%w: %w", errIdentityWithdrawn, now.withdrawn)
	case now.svid == nil || t.anchored(now.svid.Bundles):
		return nil
	}
	if err := t.reverify(now.svid.Bundles); isRevoked(err) {
		return fmt.Errorf("%w: %w", ErrCertificateRevoked, err)
	} else if err != nil {
		return fmt.Errorf("%w: %w", errAnchorRemoved, err)
	}
	return nil
}

// isRevoked tells a certificate on a CRL from other refusals.
func isRevoked(err error) bool {
	var revoked *ca.RevokedError
	return errors.As(err, &revoked)
}

// anchored tells whether the anchor of the peer is still one.
func (t *tunnel) anchored(bundles *ca.Bundles) bool {
	return bundles == t.svid.Bundles || slices.ContainsFunc(bundles.Anchors(t.peer.ID.TrustDomain()), func(a ca.Anchor) bool {
		return a.Cert.Equal(t.peer.Anchor.Cert)
	})
}

// reverify judges the peer's chain again, as of its handshake: that a certificate
// has expired since must not hide anything, nor end a tunnel. If another path is
// good, it is the tunnel's from now on.
func (t *tunnel) reverify(bundles *ca.Bundles) error {
	peer, err := ca.VerifySVID(t.info.TLS.PeerCertificates, bundles, ca.VerifyOptions{
		Usage: t.usage, Validation: t.p.cfg.TLS.Validation, Now: t.peer.At, Revoked: t.p.cfg.TLS.Revoked,
	})
	if err == nil {
		t.peer = peer
	}
	return err
}

// untrack says, once, that the revocation lists cannot be applied to the tunnel.
// It goes on (the identity spec §3.9). The caller holds t.mu.
func (t *tunnel) untrack(why error) {
	if t.untracked || t.p.cfg.CRLs == nil {
		return
	}
	t.untracked = true
	t.p.cfg.Metrics.untracked.WithLabelValues(t.reporter).Inc()
	t.p.log.Warn("revocation lists cannot be applied to a tunnel, which goes on: repair the lists of its CA",
		"direction", direction(t.reporter), "peer", t.info.Remote, "error", why.Error())
}
