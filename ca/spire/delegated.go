package spire

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	delegatedv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/ztunnel-go/ztunnel/ca"
)

// delegated speaks the Delegated Identity API of SPIRE
// (spire.api.agent.delegatedidentity.v1): a stream of SVIDs for each workload,
// one of bundles for all.
type delegated struct {
	cfg       DelegatedConfig
	selectors selectorTemplates
	link      *link
	board     *board
}

var _ ca.Provider = (*delegated)(nil)

// NewDelegated makes the provider "spire-delegated". The agent trusts the
// selectors that it sends: whoever holds the admin socket, and is a delegate, can
// be any workload of the node.
func NewDelegated(cfg DelegatedConfig) (ca.Provider, error) {
	if err := cfg.complete("spire-delegated"); err != nil {
		return nil, err
	}
	if cfg.TrustDomain.IsZero() {
		cfg.TrustDomain = spiffeid.RequireTrustDomainFromString("cluster.local")
	}
	if cfg.Resync <= 0 {
		cfg.Resync = 5 * time.Minute
	}
	selectors, err := parseSelectors(cfg.Selectors)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", cfg.Name, err)
	}
	return &delegated{
		cfg: cfg, selectors: selectors,
		link:  newLink(cfg.Dial, insecure.NewCredentials()), // the socket's mode and SO_PEERCRED authenticate
		board: newBoard(),
	}, nil
}

// Name implements ca.Provider.
func (d *delegated) Name() string { return d.cfg.Name }

// Key implements ca.Provider: SPIRE issues one SVID for each pod.
func (d *delegated) Key(w ca.WorkloadRef) ca.Key {
	return ca.Key{Provider: d.cfg.Name, ID: w.ID, UID: w.UID}
}

// Run implements ca.Provider: it owns the connection and the stream of bundles.
func (d *delegated) Run(ctx context.Context) error {
	var bundles sync.WaitGroup
	defer bundles.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	follower := &stream[map[spiffeid.TrustDomain][]ca.Anchor]{
		cfg: &d.cfg.Common, link: d.link, open: d.openBundles, explain: d.explain,
		// The agent never takes back a federated bundle within a stream.
		life: d.cfg.Resync, again: d.board.again,
		report: func(anchors map[spiffeid.TrustDomain][]ca.Anchor, _ bool) { d.board.set(anchors) },
		broken: func(err error, _ time.Time) { d.board.fail(err) },
	}
	bundles.Go(func() { follower.follow(ctx) })
	return d.link.run(ctx)
}

// Watch implements ca.Provider.
func (d *delegated) Watch(ctx context.Context, w ca.WorkloadRef, update func(ca.Event)) error {
	s, err := d.subscription(w)
	if err != nil {
		update(ca.Event{State: ca.Unavailable, Err: err})
		<-ctx.Done()
		return ctx.Err()
	}
	return s.watch(ctx, update)
}

func (d *delegated) subscription(w ca.WorkloadRef) (*subscription, error) {
	request, _, err := d.request(w)
	if err != nil {
		return nil, err
	}
	what := "the agent knows no entry for the process of the workload"
	if len(request.GetSelectors()) > 0 {
		what = "no SPIRE entry for this agent matches the selectors " + selectorsText(request.GetSelectors())
	}
	return &subscription{
		cfg: &d.cfg.Common, link: d.link, want: w.ID, board: d.board, explain: d.explain, nothing: what,
		open: func(ctx context.Context, conn *grpc.ClientConn) (func() (*answer, error), error) {
			return d.openSVIDs(ctx, conn, w)
		},
	}, nil
}

// request names w to the agent. guard says before and after each answer whether
// the process, if it names one, is still the same.
func (d *delegated) request(w ca.WorkloadRef) (_ *delegatedv1.SubscribeToX509SVIDsRequest, guard func() error, err error) {
	if d.cfg.ByPID {
		p, err := newProcess(w)
		if err != nil {
			return nil, nil, err
		}
		return &delegatedv1.SubscribeToX509SVIDsRequest{Pid: p.pid}, p.alive, nil
	}
	selectors, err := d.selectors.selectorsOf(w, d.cfg.Node)
	if err != nil {
		return nil, nil, err
	}
	return &delegatedv1.SubscribeToX509SVIDsRequest{Selectors: selectors}, func() error { return nil }, nil
}

func (d *delegated) openSVIDs(ctx context.Context, conn *grpc.ClientConn, w ca.WorkloadRef) (func() (*answer, error), error) {
	request, guard, err := d.request(w)
	if err != nil {
		return nil, err
	}
	if err := guard(); err != nil {
		return nil, err
	}
	recv, err := delegatedv1.NewDelegatedIdentityClient(conn).SubscribeToX509SVIDs(ctx, request)
	if err != nil {
		return nil, err
	}
	return func() (*answer, error) {
		message, err := recv.Recv()
		if gone := guard(); gone != nil {
			return nil, gone // the agent may have attested the successor of a process that ended
		}
		if err != nil {
			return nil, err
		}
		return delegatedAnswer(message)
	}, nil
}

// delegatedAnswer reads a message.
func delegatedAnswer(message *delegatedv1.SubscribeToX509SVIDsResponse) (*answer, error) {
	a := new(answer)
	for _, s := range message.GetX509Svids() {
		svid := s.GetX509Svid()
		a.grants = append(a.grants, grant{id: idText(svid.GetId()), chain: joinDER(svid.GetCertChain()), key: s.GetX509SvidKey()})
	}
	for _, name := range message.GetFederatesWith() {
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			return nil, fmt.Errorf("%w: federated trust domain %.300q: %w", ca.ErrRejected, name, err)
		}
		a.federates = append(a.federates, td)
	}
	slices.SortFunc(a.federates, byName)
	a.federates = slices.Compact(a.federates)
	return a, nil
}

func idText(id *types.SPIFFEID) string {
	return "spiffe://" + id.GetTrustDomain() + id.GetPath()
}

func (d *delegated) openBundles(ctx context.Context, conn *grpc.ClientConn) (func() (map[spiffeid.TrustDomain][]ca.Anchor, error), error) {
	recv, err := delegatedv1.NewDelegatedIdentityClient(conn).SubscribeToX509Bundles(ctx, &delegatedv1.SubscribeToX509BundlesRequest{})
	if err != nil {
		return nil, err
	}
	return func() (map[spiffeid.TrustDomain][]ca.Anchor, error) {
		message, err := recv.Recv()
		if err != nil {
			return nil, err
		}
		if len(message.GetCaCertificates()) == 0 {
			return nil, fmt.Errorf("%w: there is no bundle in the message", ca.ErrRejected) // the agent always has its own
		}
		return parseBundles(d.cfg.Name, message.GetCaCertificates())
	}, nil
}

// CommonBundles is an optional interface of the manager: what WatchBundles reports
// is the same for all pods.
func (d *delegated) CommonBundles() bool { return true }

// WatchBundles implements ca.Provider. The agent's own trust domain is what the
// operator trusts by listing the provider; federated ones are granted to single
// workloads with their SVIDs.
func (d *delegated) WatchBundles(ctx context.Context, _ ca.WorkloadRef, update func(*ca.Bundles)) error {
	changed := make(chan struct{}, 1)
	defer d.board.subscribe(func() {
		select {
		case changed <- struct{}{}:
		default: // knows it already
		}
	})()
	var said *ca.Bundles
	for {
		if bundles, err := d.board.bundles(d.cfg.TrustDomain, nil); err == nil && bundles != said {
			said = bundles
			update(bundles)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// delegatedAdvice is what the errors of the Delegated Identity API mean.
var delegatedAdvice = []advice{
	{codes.PermissionDenied, "no identity issued", ca.ErrDenied,
		"SPIRE has no entry for this proxy on this node yet; the delegate needs one, whatever the workloads have"},
	{codes.PermissionDenied, "not configured as an authorized delegate", ca.ErrDenied,
		"add the proxy's SPIFFE ID to authorized_delegates of the agent"},
	{codes.PermissionDenied, "", ca.ErrDenied, "the agent does not accept this proxy as a delegate"},
	{codes.Unimplemented, "", ca.ErrConfig,
		"this is not the admin socket of a SPIRE agent; SPIRE_ADMIN_ENDPOINT_SOCKET must name admin_socket_path, not socket_path"},
	{codes.InvalidArgument, "", ca.ErrConfig, "the agent refuses the reference to the workload"},
	adviceUnattested,
	adviceTooLarge,
}

// byPIDAdvice goes before, when processes are referenced: the agent says of both
// with the same words that it could not attest them.
var byPIDAdvice = advice{codes.Unavailable, "workload attestation failed", nil,
	"the agent could not attest the process of the workload, or this proxy: see the agent's log"}

func (d *delegated) explain(err error) error {
	advices := delegatedAdvice
	if d.cfg.ByPID {
		advices = slices.Insert(slices.Clone(advices), 0, byPIDAdvice)
	}
	return explain(err, d.link.lastDial(), advices)
}
