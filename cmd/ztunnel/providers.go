package main

import (
	"fmt"
	"log/slog"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/local"
)

// newProvider makes the certificate provider that the configuration names. It
// is the only place that knows the backends.
func newProvider(cfg *Config, log *slog.Logger) (ca.Provider, error) {
	td, aliases, err := trustDomains(cfg)
	if err != nil {
		return nil, err
	}
	switch name := cfg.CA.Providers[0]; name {
	case "local":
		return local.New(local.Config{
			Dir: cfg.CA.LocalDir, TrustDomain: td, Aliases: aliases, TTL: cfg.CA.SecretTTL, Logger: log,
		})
	default:
		return nil, fmt.Errorf("certificate provider %q: want local", name)
	}
}

// trustDomains are the mesh's trust domain and its aliases (design D2).
func trustDomains(cfg *Config) (td spiffeid.TrustDomain, aliases []spiffeid.TrustDomain, err error) {
	if td, err = spiffeid.TrustDomainFromString(cfg.CA.DefaultTrustDomain); err != nil {
		return td, nil, fmt.Errorf("DEFAULT_TRUST_DOMAIN %q: %w", cfg.CA.DefaultTrustDomain, err)
	}
	for _, name := range cfg.CA.TrustDomainAliases {
		alias, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			return td, nil, fmt.Errorf("TRUST_DOMAIN_ALIASES %q: %w", name, err)
		}
		aliases = append(aliases, alias)
	}
	return td, aliases, nil
}

// single is a ca.Router with one provider.
type single struct{ provider ca.Provider }

// For returns the one provider.
func (s single) For(ca.WorkloadRef) ca.Provider { return s.provider }

// All returns the one provider.
func (s single) All() []ca.Provider { return []ca.Provider{s.provider} }
