package spire

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	brokerapi "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"google.golang.org/grpc"

	"github.com/ztunnel-go/ztunnel/ca"
)

// WatchBundles implements ca.Provider. It contributes to w only what a stream of
// w's own delivers, and of that only the trust domain of the agent: SPIRE lists
// every trust domain that it knows, whomever it federates with.
func (b *broker) WatchBundles(ctx context.Context, w ca.WorkloadRef, update func(*ca.Bundles)) error {
	ref, err := b.reference(w)
	if err != nil {
		b.endpoint.complaints.log(ctx, b.cfg.Logger, err)
		update(ca.NewBundles(nil))
		<-ctx.Done()
		return ctx.Err()
	}
	var receiver sync.WaitGroup
	defer receiver.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	reports := make(chan bundleReport)
	tell := func(r bundleReport) {
		select {
		case reports <- r:
		case <-ctx.Done():
		}
	}
	follower := &stream[*ca.Bundles]{
		cfg: &b.cfg.Common, link: b.endpoint, explain: b.explain, ready: b.own.ready,
		open: func(ctx context.Context, conn *grpc.ClientConn) (func() (*ca.Bundles, error), error) {
			return b.openBundles(ctx, conn, ref)
		},
		report: func(bundles *ca.Bundles, _ bool) { tell(bundleReport{bundles: bundles}) },
		broken: func(err error, _ time.Time) { tell(bundleReport{gone: errors.Is(err, errGone)}) },
	}
	receiver.Go(func() { follower.follow(ctx) })
	return b.contribute(ctx, reports, update)
}

// bundleReport is what the stream's goroutine tells.
type bundleReport struct {
	bundles *ca.Bundles // nil: the stream is broken
	gone    bool        // the agent takes back what it sent
}

// contribute reports the bundles. They outlast a broken stream, and go after the
// grace period when the agent takes them back, or has none for w: an earlier watch
// may have had some.
func (b *broker) contribute(ctx context.Context, reports <-chan bundleReport, update func(*ca.Bundles)) error {
	grace := time.NewTimer(0)
	grace.Stop()
	defer grace.Stop()
	var said *ca.Bundles // nil: nothing yet
	none := ca.NewBundles(nil)
	going := false
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case r := <-reports:
			switch {
			case r.bundles != nil:
				grace.Stop()
				going = false
				if !r.bundles.Equal(said) {
					said = r.bundles
					update(said)
				}
			case r.gone && said != none && !going:
				going = true
				grace.Reset(b.cfg.WithdrawGrace)
			}
		case <-grace.C:
			said, going = none, false
			update(none)
		}
	}
}

func (b *broker) openBundles(ctx context.Context, conn *grpc.ClientConn, ref *reference) (func() (*ca.Bundles, error), error) {
	own, err := b.own.current()
	if err != nil {
		return nil, err
	}
	if err := ref.guard(); err != nil {
		return nil, err
	}
	recv, err := brokerapi.NewAPIClient(conn).SubscribeToX509Bundles(withHeader(ctx), &brokerapi.SubscribeToX509BundlesRequest{Reference: ref.message})
	if err != nil {
		return nil, err
	}
	return func() (*ca.Bundles, error) {
		message, err := recv.Recv()
		if gone := ref.guard(); gone != nil {
			return nil, gone
		}
		if err != nil {
			return nil, err
		}
		if len(message.GetBundles()) == 0 {
			return nil, fmt.Errorf("%w: there is no bundle in the message", ca.ErrRejected) // R43
		}
		anchors, err := parseBundles(b.cfg.Name, message.GetBundles())
		if err != nil {
			return nil, err
		}
		return domainOf(ca.NewBundles(anchors), own.ID.TrustDomain()), nil
	}, nil
}
