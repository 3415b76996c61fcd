package main

import (
	"fmt"
	"log/slog"
	"reflect"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/istio"
	"github.com/ztunnel-go/ztunnel/ca/local"
	"github.com/ztunnel-go/ztunnel/ca/router"
	"github.com/ztunnel-go/ztunnel/ca/spire"
)

// providerParts are what a provider needs beside its configuration.
type providerParts struct {
	cfg     *Config
	trust   trust
	metrics *ca.ProviderMetrics
	log     *slog.Logger
}

// backend makes a provider. It starts and opens nothing.
type backend func(providerParts, ProviderConfig) (ca.Provider, error)

// backends are the certificate providers of this build, by type. This is the
// only place that knows them.
var backends = map[string]backend{
	providerIstio: func(b providerParts, p ProviderConfig) (ca.Provider, error) {
		c := istioConfig(b.cfg, b.trust, p)
		c.Metrics, c.Logger = b.metrics, b.log
		return istio.New(c)
	},
	providerLocal: func(b providerParts, p ProviderConfig) (ca.Provider, error) {
		c := localCAConfig(b.trust, p)
		c.Poll.Observe, c.Logger = b.metrics.Request, b.log
		made, err := local.New(c)
		if err != nil && c.Dir != "" && c.Dir == b.cfg.CA.LocalDir {
			return nil, b.cfg.invalid("CA_LOCAL_DIR", err)
		}
		return made, err
	},
	providerSPIREDelegated: func(b providerParts, p ProviderConfig) (ca.Provider, error) {
		c := delegatedConfig(b.cfg, b.trust, p)
		c.Metrics, c.Logger = b.metrics, b.log
		return spire.NewDelegated(c)
	},
	providerSPIREBroker: func(b providerParts, p ProviderConfig) (ca.Provider, error) {
		c, err := brokerConfig(p)
		if err != nil {
			return nil, err
		}
		c.Metrics, c.Logger = b.metrics, b.log
		c.TLS = tlsOptions(b.cfg, b.trust)
		return spire.NewBroker(c)
	},
	providerSPIREWorkload: func(b providerParts, p ProviderConfig) (ca.Provider, error) {
		c := workloadConfig(p)
		c.Metrics, c.Logger = b.metrics, b.log
		return spire.NewWorkload(c)
	},
}

// providerSet makes the listed providers, and keeps those whose settings stay as
// they are. It is not safe for concurrent use.
type providerSet struct {
	cfg      *Config
	trust    trust
	backends map[string]backend
	metrics  *ca.Metrics
	log      *slog.Logger

	// made are the providers of the last two lists: one that goes and comes back
	// before its leases have moved is the same.
	made, before []madeProvider
}

type madeProvider struct {
	ProviderConfig
	provider ca.Provider
}

// router makes the providers that are not there yet, and the router over all.
// On an error the set stays as it is. fresh counts the new ones.
func (s *providerSet) router(configs []ProviderConfig, routes []router.Rule) (r *router.Router, fresh int, err error) {
	var made []madeProvider
	var providers []ca.Provider
	for _, c := range configs {
		p := s.find(c)
		if p == nil {
			if p, err = s.make(c); err != nil {
				return nil, 0, err
			}
			fresh++
		}
		made = append(made, madeProvider{c, p})
		providers = append(providers, p)
	}
	if r, err = router.New(providers, routes); err != nil {
		return nil, 0, err
	}
	s.made, s.before = made, s.made
	return r, fresh, nil
}

func (s *providerSet) find(c ProviderConfig) ca.Provider {
	for _, list := range [][]madeProvider{s.made, s.before} {
		for _, m := range list {
			if reflect.DeepEqual(m.ProviderConfig, c) {
				return m.provider
			}
		}
	}
	return nil
}

func (s *providerSet) make(c ProviderConfig) (ca.Provider, error) {
	newBackend := s.backends[c.Type]
	if newBackend == nil {
		return nil, fmt.Errorf("certificate provider %s: this build does not support the type %s", c.Name, c.Type)
	}
	p, err := newBackend(providerParts{cfg: s.cfg, trust: s.trust, metrics: s.metrics.Provider(c.Name), log: s.log}, c)
	if err != nil {
		return nil, fmt.Errorf("certificate provider %s: %w", c.Name, err)
	}
	return p, nil
}

// announce logs who the providers are, and what that means for trust.
func announce(log *slog.Logger, text string, cfg []ProviderConfig, routes []router.Rule) {
	names := (&CAConfig{Providers: cfg}).names()
	effective := make([]string, 0, len(routes)+1)
	for _, r := range router.Effective(names, routes) {
		effective = append(effective, r.String())
	}
	log.Info(text, "providers", names, "routes", effective)
	if len(names) > 1 {
		log.Info("several certificate providers are listed: where they speak of one trust domain, the roots of all of them are trusted side by side", "providers", names)
	}
}
