// Package istio gets certificates from a CA that speaks the protocol of istiod,
// istio.v1.auth.IstioCertificateService: istiod itself, istio-csr, or the agent
// of Cilium. For each certificate it makes a key, sends a request that names the
// identity both in the request and in its metadata (Cilium reads the one, the
// others the second), and takes the trust anchors from the answer.
package istio

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/internal/istiod"
)

// Header is one gRPC metadata entry that goes with each request.
type Header = istiod.Header

// Config configures the client. Address is mandatory, everything else has a
// default.
type Config struct {
	// Name is the provider's name. Default "istio".
	Name string
	// Address of the CA (CA_ADDRESS): https://host:port, or unix:///path for a CA
	// on this node. A unix socket is used without TLS: whoever owns the socket is
	// the CA, and sees the token. http:// is refused.
	Address string
	// RootFile (a path) or RootPEM holds the roots by which the CA's server
	// certificate is judged (CA_ROOT_CA). Neither means those of the system. The
	// file need not exist yet, and is read again when it changes. RootFile and
	// RootPEM are also the trust anchors for peers until the CA's first answer,
	// whose own anchors replace them: the two are never joined.
	RootFile, RootPEM string
	// AltHostname is a name that the CA's server certificate may have instead of
	// the host in Address (ALT_CA_HOSTNAME): a DNS name or an IP address.
	AltHostname string
	// Headers are further metadata of each request (CA_HEADER_*).
	Headers []Header
	// TokenFile (a path, read for each request) or Token holds the bearer token.
	// Neither means that no authorization is sent.
	TokenFile, Token string
	// ClusterID goes with the token, and with Impersonate.
	ClusterID string
	// CertSigner asks the CA for one of several signers. "" leaves it the choice.
	CertSigner string
	// Impersonate asks for the identities of the workloads of this node, as a
	// shared proxy must. Without it the CA alone decides who we are, and any
	// identity in its answer is taken.
	Impersonate bool
	// TrustDomain is the one for which the CA's anchors count
	// (DEFAULT_TRUST_DOMAIN). Default cluster.local.
	TrustDomain spiffeid.TrustDomain
	// Aliases are other names of TrustDomain (TRUST_DOMAIN_ALIASES), for which they
	// count, too.
	Aliases []spiffeid.TrustDomain
	// TTL is the life that is asked for (SECRET_TTL), in whole seconds. Default
	// 24 h. CAs may grant another.
	TTL time.Duration
	// Roots is the path of a PEM file whose certificates are the trust anchors for
	// peers, instead of those of RootFile, RootPEM and the answers (roots: in
	// CA_CONFIG). It is looked at with each renewal.
	Roots string
	// TLS12 also allows TLS 1.2 to the CA (TLS12_ENABLED); PQC allows only
	// X25519MLKEM768, hence only TLS 1.3 (COMPLIANCE_POLICY=pqc). PQC wins.
	TLS12, PQC bool
	// Dial, if not nil, makes the connections to the CA: network is tcp or unix.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Poll configures renewal and retry. Logger, Observe and AnyID are set as
	// the fields here demand when they are not.
	Poll ca.PollConfig
	// Metrics counts the requests; nil counts nothing.
	Metrics *ca.ProviderMetrics
	// Logger; nil discards.
	Logger *slog.Logger
}

// New makes the provider. It touches neither the network nor the files that cfg
// names. Errors name the field that is wrong.
func New(cfg Config) (ca.Provider, error) {
	f, err := newFetcher(cfg)
	if err != nil {
		return nil, fmt.Errorf("istio CA: %w", err)
	}
	return ca.Poll(f.cfg.Name, f, f.cfg.Poll), nil
}

func (c *Config) setDefaults() {
	if c.Name == "" {
		c.Name = "istio"
	}
	if c.TrustDomain.IsZero() {
		c.TrustDomain = spiffeid.RequireTrustDomainFromString("cluster.local")
	}
	if c.TTL == 0 {
		c.TTL = 24 * time.Hour
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Poll.Logger == nil {
		c.Poll.Logger = c.Logger
	}
	if !c.Impersonate {
		c.Poll.AnyID = true
	}
	if metrics, other := c.Metrics, c.Poll.Observe; metrics != nil {
		c.Poll.Observe = func(err error, took time.Duration) {
			metrics.Request(err, took)
			if other != nil {
				other(err, took)
			}
		}
	}
}

func (c *Config) validate() error {
	switch {
	case c.TTL < time.Second:
		return fmt.Errorf("field TTL is %v, at least 1s is allowed", c.TTL)
	case c.RootFile != "" && c.RootPEM != "":
		return errors.New("fields RootFile and RootPEM are both set, only one is allowed")
	}
	if err := istiod.CheckHostname(c.AltHostname); err != nil {
		return fmt.Errorf("field AltHostname: %w", err)
	}
	return nil
}
