package spire

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
)

// ownSVID is the proxy's own, with which it reaches the broker endpoint. It comes
// from the Workload API. It is safe for concurrent use.
type ownSVID struct {
	api  *workloadAPI
	want spiffeid.ID // zero: the first
	// withdrawn is called when the SVID is taken back: what was reached with it is
	// to be let go.
	withdrawn func()

	mu      sync.Mutex // guards what follows
	svid    *ca.SVID   // the latest, until it is taken back
	err     error      // why there is none, or no newer one
	changed chan struct{}
}

func newOwnSVID(api *workloadAPI, want spiffeid.ID) *ownSVID {
	return &ownSVID{api: api, want: want, err: errEarly, changed: make(chan struct{})}
}

// follow keeps the SVID current until ctx ends.
func (o *ownSVID) follow(ctx context.Context) {
	// watch returns only when ctx ends, and says nothing else.
	_ = o.api.watch(ctx, o.want, func(ev ca.Event) { o.take(ctx, ev) })
}

func (o *ownSVID) take(ctx context.Context, ev ca.Event) {
	log := o.api.cfg.Logger
	if ev.State == ca.Available {
		if err := acceptable(ev.SVID); err != nil {
			ev = ca.Event{State: ca.Unavailable, Err: err}
			log.WarnContext(ctx, "the proxy's own SVID is rejected, the broker endpoint cannot be reached with it", "error", err.Error())
		}
	}
	o.mu.Lock()
	before := o.svid
	o.err = ev.Err
	switch ev.State {
	case ca.Available:
		o.svid = ev.SVID
	case ca.Withdrawn:
		o.svid = nil
	}
	now := o.svid
	close(o.changed)
	o.changed = make(chan struct{})
	o.mu.Unlock()
	switch {
	case before != nil && now == nil:
		log.WarnContext(ctx, "the proxy's own SVID was taken back, the broker endpoint is no longer used", "error", ev.Err.Error())
		o.withdrawn()
	case before == nil && now != nil:
		log.InfoContext(ctx, "the proxy has its own SVID for the broker endpoint", "svid", now)
	}
}

// acceptable judges an SVID as the endpoint will.
func acceptable(svid *ca.SVID) error {
	chain, err := svid.Chain()
	if err != nil {
		return err
	}
	_, err = ca.VerifySVID(chain, svid.Bundles, ca.VerifyOptions{Usage: ca.Client})
	return err
}

// current is the SVID, or why there is none.
func (o *ownSVID) current() (*ca.SVID, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.look()
}

// ready is the error of current, with a channel that is closed when it may have
// changed.
func (o *ownSVID) ready() (<-chan struct{}, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	_, err := o.look()
	return o.changed, err
}

// look is called with the lock held. Its errors have only the text of what is
// wrong with the proxy: the class of that is not the workloads'.
func (o *ownSVID) look() (*ca.SVID, error) {
	switch {
	case o.svid == nil && errors.Is(o.err, errEarly):
		return nil, errEarly
	case o.svid == nil:
		return nil, fmt.Errorf("%w: %s", errNoOwnSVID, text(o.err))
	case time.Now().Before(o.svid.NotAfter):
		return o.svid, nil
	}
	why := "there is no newer one"
	if o.err != nil {
		why = o.err.Error()
	}
	return nil, fmt.Errorf("%w: the certificate of %s has expired, at %s: %s", errNoOwnSVID, o.svid.ID, o.svid.NotAfter.UTC().Format(time.RFC3339), why)
}

// errNoOwnSVID keeps the endpoint from being reached.
var errNoOwnSVID = errors.New("waiting for the proxy's own SVID from the Workload API")
