package spire

import (
	"context"

	workloadapi "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/ztunnel-go/ztunnel/ca"
)

// workloadProvider speaks the SPIFFE Workload API for one workload, the one that
// the agent attests this process to be.
type workloadProvider struct {
	cfg WorkloadConfig
	api *workloadAPI
}

var _ ca.Provider = (*workloadProvider)(nil)

// NewWorkload makes the provider "spire-workload": dedicated mode, in which the
// proxy stands in for one workload and is attested in its place.
func NewWorkload(cfg WorkloadConfig) (ca.Provider, error) {
	if err := cfg.complete("spire-workload"); err != nil {
		return nil, err
	}
	return &workloadProvider{cfg: cfg, api: newWorkloadAPI(&cfg.Common)}, nil
}

// Name implements ca.Provider.
func (p *workloadProvider) Name() string { return p.cfg.Name }

// Key implements ca.Provider: the agent knows one workload, whatever its pod.
func (p *workloadProvider) Key(w ca.WorkloadRef) ca.Key {
	return ca.Key{Provider: p.cfg.Name, ID: w.ID}
}

// Run implements ca.Provider: it owns the connection.
func (p *workloadProvider) Run(ctx context.Context) error { return p.api.link.run(ctx) }

// Watch implements ca.Provider.
func (p *workloadProvider) Watch(ctx context.Context, w ca.WorkloadRef, update func(ca.Event)) error {
	return p.api.watch(ctx, w.ID, update)
}

// WatchBundles implements ca.Provider. It contributes the trust domain in which
// the agent knows this process; federated ones are granted with an SVID.
func (p *workloadProvider) WatchBundles(ctx context.Context, _ ca.WorkloadRef, update func(*ca.Bundles)) error {
	var latest *ca.Bundles
	return p.api.watch(ctx, spiffeid.ID{}, func(ev ca.Event) {
		next := latest
		switch ev.State {
		case ca.Available:
			next = domainOf(ev.SVID.Bundles, ev.SVID.ID.TrustDomain())
		case ca.Withdrawn:
			next = ca.NewBundles(nil)
		}
		if !next.Equal(latest) {
			latest = next
			update(next)
		}
	})
}

// domainOf is the part of b that is of td.
func domainOf(b *ca.Bundles, td spiffeid.TrustDomain) *ca.Bundles {
	if !b.Has(td) {
		return ca.NewBundles(nil)
	}
	return ca.NewBundles(map[spiffeid.TrustDomain][]ca.Anchor{td: b.Anchors(td)})
}

// workloadAPI is a client of the SPIFFE Workload API, by which the agent tells
// this process who it is.
type workloadAPI struct {
	cfg   *Common
	link  *link
	known *bundleStore
}

func newWorkloadAPI(cfg *Common) *workloadAPI {
	return &workloadAPI{
		cfg:   cfg,
		link:  newLink(cfg.Dial, insecure.NewCredentials()), // the socket's peer credentials attest us
		known: newBundleStore(cfg.Name),
	}
}

// watch reports the SVID of want, of a zero want the default one, with the
// bundles of its own trust domain and of those that it federates with.
func (a *workloadAPI) watch(ctx context.Context, want spiffeid.ID, update func(ca.Event)) error {
	s := &subscription{
		cfg: a.cfg, link: a.link, want: want, explain: a.explain,
		nothing: "the Workload API sent no SVID: no SPIRE entry matches this proxy",
		open: func(ctx context.Context, conn *grpc.ClientConn) (func() (*answer, error), error) {
			return a.open(ctx, conn, want)
		},
	}
	return s.watch(ctx, update)
}

func (a *workloadAPI) open(ctx context.Context, conn *grpc.ClientConn, want spiffeid.ID) (func() (*answer, error), error) {
	// SPIFFE Workload Endpoint §3 (R38): no request without it.
	ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
	recv, err := workloadapi.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(ctx, &workloadapi.X509SVIDRequest{})
	if err != nil {
		return nil, err
	}
	return func() (*answer, error) {
		message, err := recv.Recv()
		if err != nil {
			return nil, err
		}
		return readProfile(a.known, want, message.GetSvids(), message.GetFederatedBundles())
	}, nil
}

// workloadAdvice is what the errors of the Workload API mean.
var workloadAdvice = []advice{
	{codes.PermissionDenied, "", errRedacted,
		"make a SPIRE entry for this node whose selectors match the proxy's own pod"},
	adviceUnattested,
	adviceTooLarge,
	{codes.ResourceExhausted, "", nil, "the agent limits the rate of requests"},
	{codes.InvalidArgument, "", ca.ErrConfig, "the agent refuses the request; something on the way to it may drop the header workload.spiffe.io"},
	{codes.Unimplemented, "", ca.ErrConfig,
		"this is not the socket of the Workload API; it must name socket_path of the agent"},
}

func (a *workloadAPI) explain(err error) error {
	return explain(err, a.link.lastDial(), workloadAdvice)
}
