package istio

import (
	"context"
	"crypto"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/structpb"
	securityapi "istio.io/api/security/v1alpha1"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/internal/filewatch"
	"github.com/ztunnel-go/ztunnel/internal/istiod"
)

// The keys of the request's metadata. Of the cluster, istiod goes by the header
// clusterid; other CAs may look here.
const (
	metaIdentity   = "ImpersonatedIdentity"
	metaClusterID  = "ClusterID"
	metaCertSigner = "CertSigner"
)

// fetcher makes one certificate by one request. All methods are safe for
// concurrent use.
type fetcher struct {
	cfg      Config
	log      *slog.Logger
	endpoint istiod.Endpoint
	creds    *istiod.Credentials
	trust    trust
	server   *roots // by which the CA is judged; anchors until the first answer
	override *roots // the anchors, whatever the CA says; nil when there is none
	dial     istiod.Dial

	mu      sync.Mutex // guards what follows
	current *channel   // nil before the first request and after Disconnect
	answer  answered
}

var (
	_ ca.Fetcher      = (*fetcher)(nil)
	_ ca.RootWatcher  = (*fetcher)(nil)
	_ ca.Disconnecter = (*fetcher)(nil)
)

func newFetcher(cfg Config) (*fetcher, error) {
	cfg.setDefaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	f := &fetcher{
		cfg:   cfg,
		log:   cfg.Logger.With("component", "ca", "provider", cfg.Name),
		trust: trust{provider: cfg.Name, domain: cfg.TrustDomain, aliases: cfg.Aliases},
		dial:  cfg.Dial,
	}
	if f.dial == nil {
		f.dial = istiod.NewDialer()
	}
	var err error
	if f.endpoint, err = istiod.ParseAddress(cfg.Address); err != nil {
		return nil, err
	}
	creds := istiod.CredentialsConfig{Headers: cfg.Headers, TokenFile: cfg.TokenFile, Token: cfg.Token, ClusterID: cfg.ClusterID}
	if f.creds, err = istiod.NewCredentials(creds); err != nil {
		return nil, err
	}
	f.server = &roots{trust: f.trust}
	if cfg.RootFile != "" {
		f.server.source = istiod.FileRoots(cfg.RootFile, f.log)
	} else if f.server.source, err = istiod.TextRoots(cfg.RootPEM, f.log); err != nil {
		return nil, fmt.Errorf("field RootPEM: %w", err)
	}
	if cfg.Roots != "" {
		f.override = &roots{trust: f.trust, source: istiod.FileRoots(cfg.Roots, f.log)}
	}
	return f, nil
}

// Fetch makes a key and asks the CA for a certificate for id.
func (f *fetcher) Fetch(ctx context.Context, id spiffeid.ID) (*ca.SVID, error) {
	if err := f.checkDomain(id); err != nil {
		return nil, err
	}
	cctx, err := f.creds.Attach(ctx)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ca.ErrConfig, err)
	}
	ch, err := f.channel(ctx)
	if err != nil {
		return nil, fmt.Errorf("%w: failed to create CSR: %w", ca.ErrConfig, err)
	}
	defer f.release(ch)
	key, csr, err := newCSR(id)
	if err != nil {
		return nil, fmt.Errorf("failed to create CSR: %w", err)
	}
	out, err := securityapi.NewIstioCertificateServiceClient(ch.conn).CreateCertificate(cctx, f.request(id, csr))
	if err != nil {
		return nil, f.signingError(err)
	}
	return f.svid(ctx, id, key, out.GetCertChain())
}

// checkDomain spares the CA a request whose answer could not be accepted.
func (f *fetcher) checkDomain(id spiffeid.ID) error {
	td := id.TrustDomain()
	if !f.cfg.Impersonate || td == f.trust.domain || slices.Contains(f.trust.aliases, td) {
		return nil
	}
	return fmt.Errorf("%w: the CA signs for trust domain %q and its aliases, not for %s: set DEFAULT_TRUST_DOMAIN or TRUST_DOMAIN_ALIASES", ca.ErrConfig, f.trust.domain.Name(), id)
}

func (f *fetcher) request(id spiffeid.ID, csr string) *securityapi.IstioCertificateRequest {
	fields := make(map[string]*structpb.Value)
	if f.cfg.Impersonate {
		fields[metaIdentity] = structpb.NewStringValue(id.String())
		if f.cfg.ClusterID != "" {
			fields[metaClusterID] = structpb.NewStringValue(f.cfg.ClusterID)
		}
	}
	if f.cfg.CertSigner != "" {
		fields[metaCertSigner] = structpb.NewStringValue(f.cfg.CertSigner)
	}
	in := &securityapi.IstioCertificateRequest{Csr: csr, ValidityDuration: int64(f.cfg.TTL / time.Second)}
	if len(fields) > 0 {
		in.Metadata = &structpb.Struct{Fields: fields}
	}
	return in
}

// svid makes an SVID of an answer.
func (f *fetcher) svid(ctx context.Context, id spiffeid.ID, key crypto.Signer, elements []string) (*ca.SVID, error) {
	var override *ca.Bundles
	if f.override != nil {
		set, err := f.override.look(ctx, 0)
		if err != nil {
			return nil, fmt.Errorf("%w: trust anchors: %w", ca.ErrConfig, err)
		}
		override = set.bundles
	}
	parts, err := splitChain(id, elements, override != nil)
	if err != nil {
		return nil, ca.Rejected(err)
	}
	bundles := override
	if bundles == nil {
		if bundles, err = f.bundles(ctx, parts.anchors); err != nil {
			return nil, ca.Rejected(err)
		}
	}
	svid, err := ca.NewSVID(f.cfg.Name, parts.presented, key, bundles)
	if err != nil {
		return nil, ca.Rejected(fmt.Errorf("did not find expected SAN: %s: %w", id, err))
	}
	return svid, nil
}

// FixedRoots implements ca.FixedRoots: whoever sets Roots relies on the file, also
// while nobody asks the CA, as after a live move to another provider.
func (f *fetcher) FixedRoots() bool { return f.override != nil }

// WatchRoots reports the anchors that are configured: those that count whatever
// the CA says, or until it says something.
func (f *fetcher) WatchRoots(ctx context.Context, update func(*ca.Bundles)) error {
	source := f.server
	if f.override != nil {
		source = f.override
	}
	var last *rootSet
	look := func() {
		// Shared by all that watch: the file is looked at once per interval.
		set, err := source.look(ctx, filewatch.DefaultInterval/2)
		if err != nil || set == last {
			return
		}
		if last = set; set.bundles != nil {
			update(set.bundles)
		}
	}
	look()
	return filewatch.Run(ctx, filewatch.DefaultInterval, look)
}
