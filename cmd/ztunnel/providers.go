package main

import (
	"fmt"
	"log/slog"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/local"
)

// newProvider makes the certificate provider that the configuration names. It
// is the only place that knows the backends. A directory that does not do is an
// error of the configuration.
func newProvider(cfg *Config, log *slog.Logger) (ca.Provider, error) {
	trust, err := trustOf(cfg)
	if err != nil {
		return nil, err
	}
	switch name := cfg.CA.Providers[0]; name {
	case providerLocal:
		c := localCAConfig(cfg, trust)
		c.Logger = log
		p, err := local.New(c)
		if err != nil && c.Dir != "" {
			return nil, cfg.invalid("CA_LOCAL_DIR", err)
		}
		return p, err
	default:
		return nil, fmt.Errorf("certificate provider %q: want %s", name, providerLocal)
	}
}

// single is a ca.Router with one provider.
type single struct{ provider ca.Provider }

// For returns the one provider.
func (s single) For(ca.WorkloadRef) ca.Provider { return s.provider }

// All returns the one provider.
func (s single) All() []ca.Provider { return []ca.Provider{s.provider} }
