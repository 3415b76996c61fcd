// Package local is the embedded CA: a root key in memory, or in a directory
// that several nodes share. It serves FAKE_CA, the demo, tests, and single
// nodes without a control plane. Whoever holds the directory can be anybody in
// the trust domain; it is no substitute for a CA that attests workloads.
package local

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"net/url"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
)

// Config configures the embedded CA.
type Config struct {
	// Name is the provider's name. Default "local".
	Name string
	// Dir holds the root key and certificate in the file ca.pem (CA_LOCAL_DIR). It
	// and they are created when absent, for us alone. What is there must belong to
	// root or to us, the directory must not be writable by others unless it is
	// sticky, and the file not even readable. Hard links are not looked for: a
	// second name of the file elsewhere is as good a key. "" keeps root and key in
	// memory: then the root changes with every start, and no other node trusts it.
	Dir string
	// TrustDomain is the only one for which the CA signs, but for Aliases.
	// Default cluster.local.
	TrustDomain spiffeid.TrustDomain
	// Aliases are other names of TrustDomain (TRUST_DOMAIN_ALIASES).
	Aliases []spiffeid.TrustDomain
	// TTL is the life of certificates (SECRET_TTL). Default 24 h. It ends with
	// the root's at the latest.
	TTL time.Duration
	// Poll configures renewal and retry.
	Poll ca.PollConfig
	// Logger; nil discards.
	Logger *slog.Logger
}

// rootLife is the life of a new root.
const rootLife = 10 * 365 * 24 * time.Hour

// CA is a root with its key. It is a ca.Fetcher and a ca.RootWatcher. All
// methods are safe for concurrent use.
type CA struct {
	cfg     Config
	root    *x509.Certificate
	key     crypto.Signer
	bundles *ca.Bundles
}

var (
	_ ca.Fetcher     = (*CA)(nil)
	_ ca.RootWatcher = (*CA)(nil)
)

// New is the provider of an embedded CA.
func New(cfg Config) (ca.Provider, error) {
	c, err := Open(cfg)
	if err != nil {
		return nil, err
	}
	return c.Provider(), nil
}

// Open loads the root from cfg.Dir, or makes one.
func Open(cfg Config) (*CA, error) {
	if cfg.Name == "" {
		cfg.Name = "local"
	}
	if cfg.TrustDomain.IsZero() {
		cfg.TrustDomain = spiffeid.RequireTrustDomainFromString("cluster.local")
	}
	if cfg.TTL == 0 {
		cfg.TTL = 24 * time.Hour
	}
	if cfg.TTL < time.Second {
		return nil, fmt.Errorf("local CA: the certificate life is %v, at least 1s is allowed", cfg.TTL)
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Poll.Logger == nil {
		cfg.Poll.Logger = cfg.Logger
	}
	c := &CA{cfg: cfg}
	var err error
	if cfg.Dir == "" {
		c.root, c.key, err = newRoot(cfg.TrustDomain)
	} else {
		c.root, c.key, err = loadOrCreate(cfg.Dir, cfg.TrustDomain)
	}
	if err != nil {
		return nil, fmt.Errorf("local CA: %w", err)
	}
	anchor := ca.Anchor{Cert: c.root, Provider: cfg.Name, Mode: ca.Compatible}
	c.bundles = ca.NewBundles(map[spiffeid.TrustDomain][]ca.Anchor{cfg.TrustDomain: {anchor}}).
		WithAliases(cfg.TrustDomain, cfg.Aliases...)
	return c, nil
}

// Provider is the CA with renewal and retry. Each call makes another one.
func (c *CA) Provider() ca.Provider { return ca.Poll(c.cfg.Name, c, c.cfg.Poll) }

// Root is the CA's certificate.
func (c *CA) Root() *x509.Certificate { return c.root }

// Bundles are the root, for the trust domain and its aliases.
func (c *CA) Bundles() *ca.Bundles { return c.bundles }

// TrustDomain is the trust domain of the CA.
func (c *CA) TrustDomain() spiffeid.TrustDomain { return c.cfg.TrustDomain }

// Fetch makes a key and signs a certificate for id.
func (c *CA) Fetch(_ context.Context, id spiffeid.ID) (*ca.SVID, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("generate a key for %s: %w", id, err)
	}
	leaf, err := c.Sign(key.Public(), id, c.cfg.TTL)
	if err != nil {
		return nil, err
	}
	return ca.NewSVID(c.cfg.Name, []*x509.Certificate{leaf}, key, c.bundles)
}

// WatchRoots reports the root once, and returns when ctx ends.
func (c *CA) WatchRoots(ctx context.Context, update func(*ca.Bundles)) error {
	update(c.bundles)
	<-ctx.Done()
	return ctx.Err()
}

// Sign makes a certificate for id over pub, such as the key of a certificate
// request whose signature the caller has checked. It is valid for ttl, but not
// longer than the root; ttl ≤ 0 means the CA's own. An identity of a foreign
// trust domain is refused with ca.ErrDenied.
func (c *CA) Sign(pub crypto.PublicKey, id spiffeid.ID, ttl time.Duration) (*x509.Certificate, error) {
	if id.Path() == "" {
		return nil, fmt.Errorf("%w: %q names no workload", ca.ErrDenied, id)
	}
	if td := id.TrustDomain(); td != c.cfg.TrustDomain && !slices.Contains(c.cfg.Aliases, td) {
		return nil, fmt.Errorf("%w: the local CA signs for trust domain %q, not for %q", ca.ErrDenied, c.cfg.TrustDomain.Name(), id)
	}
	if ttl <= 0 {
		ttl = c.cfg.TTL
	}
	now := time.Now()
	notAfter := now.Add(ttl)
	if notAfter.After(c.root.NotAfter) {
		notAfter = c.root.NotAfter
	}
	// With an empty subject and URIs, the SAN becomes critical (SPIFFE
	// X509-SVID §2).
	template := &x509.Certificate{
		NotBefore:             now.Add(-min(time.Minute, ttl/20)), // for clocks that are behind
		NotAfter:              notAfter,
		URIs:                  []*url.URL{id.URL()},
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	return sign(template, c.root, pub, c.key)
}

// SignServer makes a certificate for a server of the control plane, which is
// known by DNS names and addresses.
func (c *CA) SignServer(pub crypto.PublicKey, names []string, addrs []netip.Addr) (*x509.Certificate, error) {
	template := &x509.Certificate{
		NotBefore:             time.Now().Add(-time.Minute),
		NotAfter:              c.root.NotAfter,
		DNSNames:              names,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}
	for _, a := range addrs {
		template.IPAddresses = append(template.IPAddresses, a.Unmap().AsSlice())
	}
	return sign(template, c.root, pub, c.key)
}

func newRoot(td spiffeid.TrustDomain) (*x509.Certificate, crypto.Signer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("generate the root key: %w", err)
	}
	now := time.Now()
	template := &x509.Certificate{
		Subject:               pkix.Name{Organization: []string{td.Name()}, CommonName: "ztunnel local CA"},
		NotBefore:             now.Add(-time.Minute),
		NotAfter:              now.Add(rootLife),
		URIs:                  []*url.URL{td.ID().URL()},
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	root, err := sign(template, template, key.Public(), key)
	if err != nil {
		return nil, nil, err
	}
	return root, key, nil
}

func sign(template, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, key)
	if err != nil {
		return nil, fmt.Errorf("sign a certificate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("read the signed certificate: %w", err)
	}
	return cert, nil
}

// checkRoot judges a loaded root.
func checkRoot(root *x509.Certificate, key crypto.Signer, td spiffeid.TrustDomain, now time.Time) error {
	pub, ok := root.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	switch {
	case !ok || !pub.Equal(key.Public()):
		return errors.New("the key is not the key of the certificate")
	case !root.IsCA || root.KeyUsage&x509.KeyUsageCertSign == 0:
		return errors.New("the certificate is not a CA's")
	case now.After(root.NotAfter):
		return fmt.Errorf("the certificate expired at %s", root.NotAfter.UTC().Format(time.RFC3339))
	case now.Before(root.NotBefore):
		return fmt.Errorf("the certificate is not valid before %s", root.NotBefore.UTC().Format(time.RFC3339))
	}
	for _, u := range root.URIs {
		if u.Scheme == "spiffe" && u.String() != td.IDString() {
			return fmt.Errorf("the certificate is of %s, configured is %s", u, td.IDString())
		}
	}
	if err := root.CheckSignatureFrom(root); err != nil {
		return fmt.Errorf("the certificate is not a root: %w", err)
	}
	return nil
}
