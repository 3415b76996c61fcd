package main

import (
	"cmp"
	"log/slog"
	"net"
	"os"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ztunnel-go/ztunnel/admin"
	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/internal/zlog"
	"github.com/ztunnel-go/ztunnel/proxy"
	"github.com/ztunnel-go/ztunnel/proxy/dns"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/state"
	"github.com/ztunnel-go/ztunnel/xds"
	"github.com/ztunnel-go/ztunnel/xds/local"
)

// node is one proxy process, wired: `ztunnel proxy` runs one, the demo two.
type node struct {
	cfg  *Config
	log  *zlog.Log
	slog *slog.Logger // of all parts; they add their component
	app  *slog.Logger // of the node itself

	registry *prometheus.Registry
	store    *state.Store
	world    *local.Source // nil without a local file
	xds      *xds.Client   // nil when xDS is off
	certs    *ca.Manager
	crls     *ca.CRLs       // nil without a file
	caConfig *caConfigWatch // nil without CA_CONFIG
	data     dataPath

	gate   chan struct{} // closed when the state is known
	opened []func()      // complete the readiness tasks that end then

	ready       *admin.Ready
	ports       *hostPorts
	http        []*httpPort
	adminSocket net.Listener // one more of the admin server, or nil

	quit chan struct{} // one slot: POST /quitquitquit
}

// nodeParts are what distinguishes the demo's nodes from a real one.
type nodeParts struct {
	network  netns.Network      // that of the process
	pods     podPlatform        // shared mode
	backends map[string]backend // nil = the real ones
	pidfd    *os.File           // of PROXY_WORKLOAD_PID, or nil; remains the caller's
	// resolvConf names the nameservers, for workloads that are known by host name
	// alone and for the DNS proxy; "" = the system's.
	resolvConf string
	log        *zlog.Log // remains the caller's
}

// newNode makes the parts and loads the state. It starts and opens nothing.
func newNode(cfg *Config, parts nodeParts) (*node, error) {
	n := &node{cfg: cfg, log: parts.log, slog: parts.log.Logger(), quit: make(chan struct{}, 1), gate: make(chan struct{})}
	n.app = n.slog.With("component", "app")
	registry, err := admin.NewRegistry(cfg.Metrics.BuildTag)
	if err != nil {
		return nil, err
	}
	n.registry = registry
	registerLog(registry, parts.log)
	n.ports = newHostPorts(cfg.Proxy.Mode, registry, n.app)
	n.newReadiness()
	trust, err := trustOf(cfg)
	if err != nil {
		return nil, err
	}
	n.store = state.New(stateConfig(cfg))
	if err := n.loadState(registry); err != nil {
		return nil, err
	}
	if err := n.newControlPlane(registry); err != nil {
		return nil, err
	}
	if err := n.newManager(trust, parts.backends); err != nil {
		return nil, err
	}
	if err := n.newDataPath(trust, parts); err != nil {
		return nil, err
	}
	return n, n.newServers(registry)
}

// newReadiness registers what the process waits for before it is ready.
func (n *node) newReadiness() {
	n.ready = admin.NewReady(n.slog)
	task := func(name string) { n.opened = append(n.opened, n.ready.Register(name)) }
	task("state manager")
	n.ready.Explain("state manager", n.gateReason)
	if n.cfg.Proxy.Enabled {
		task("proxy")
	}
	if n.cfg.DNS.Enabled {
		task("dns proxy")
	}
}

// newDataPath makes what serves connections.
func (n *node) newDataPath(t trust, parts nodeParts) error {
	common, err := n.proxyConfig(t, parts)
	if err != nil {
		return err
	}
	if n.cfg.Proxy.Mode == ModeShared {
		n.data, err = n.newShared(common, parts)
	} else {
		n.data, err = n.newDedicated(common, parts)
	}
	return err
}

// proxyConfig is what all proxies of the process have in common.
func (n *node) proxyConfig(t trust, parts nodeParts) (proxy.Config, error) {
	c := dataPathConfig(n.cfg)
	c.Store, c.Certs, c.Log = n.store, n.certs, n.slog
	if n.xds != nil && n.cfg.XDS.OnDemand {
		c.Demand = n.xds.Demand
	}
	c.Metrics = proxy.NewMetrics(n.registry, metricsConfig(n.cfg))
	c.TLS = tlsOptions(n.cfg, t)
	c.TLS.Tolerated = countTolerated(n.registry)
	n.loadCRLs(n.registry)
	c.CRLs = n.crls
	n.watchTunnels(&c.HBONE, n.registry)
	c.DNS = n.dnsServer(parts.resolvConf)
	names := resolverConfig(n.cfg)
	names.Dial, names.ResolvConf, names.Logger = dns.Over(parts.network), parts.resolvConf, n.slog
	resolver, err := dns.NewResolver(names)
	c.Resolve = resolver.Lookup
	return c, err
}

// dnsServer is what all DNS servers of the process have in common, nil when there
// are none.
func (n *node) dnsServer(resolvConf string) *dns.ServerConfig {
	if !n.cfg.DNS.Enabled {
		return nil
	}
	c := dnsConfig(n.cfg)
	c.Files, c.Limits, c.Metrics, c.Logger = dns.NewFiles(resolvConf, "", n.slog), dns.NewLimits(0, 0), dns.NewMetrics(n.registry), n.slog
	if n.cfg.Proxy.Mode == ModeShared {
		return &c
	}
	var err error
	if c.Search, err = dns.SearchDomains(cmp.Or(resolvConf, systemResolvConf)); err != nil {
		n.app.Warn("no search domains: names of services are found by the DNS proxy as they are asked for", "error", err.Error())
		c.Search = []string{}
	}
	return &c
}

// systemResolvConf has the search domains that clients share with us in dedicated
// mode.
const systemResolvConf = "/etc/resolv.conf"

// newManager makes the listed certificate providers and what keeps their
// certificates. That one cannot be made is an error of the configuration.
func (n *node) newManager(t trust, kinds map[string]backend) error {
	if kinds == nil {
		kinds = backends
	}
	metrics := ca.NewMetrics(n.registry)
	set := &providerSet{cfg: n.cfg, trust: t, backends: kinds, metrics: metrics, log: n.slog}
	routes, _, err := set.router(n.cfg.CA.Providers, n.cfg.CA.Routes)
	if err != nil {
		return asConfigError(err)
	}
	announce(n.app, "certificate providers", n.cfg.CA.Providers, n.cfg.CA.Routes)
	manager := managerConfig(n.cfg, t)
	manager.Logger, manager.Metrics = n.slog, metrics
	n.certs = ca.NewManager(routes, manager)
	n.registry.MustRegister(n.certs)
	if n.caConfig = newCAConfigWatch(n.cfg, os.ReadFile, n.registry); n.caConfig != nil {
		n.caConfig.set, n.caConfig.replace, n.caConfig.log = set, n.certs.Replace, n.slog.With("component", "ca")
	}
	return nil
}

// loadCRLs reads the revocation lists before the first handshake. A file that is
// missing or bad is no error of the start: it is followed, and nothing is revoked
// until it can be read.
func (n *node) loadCRLs(registry *prometheus.Registry) {
	if n.cfg.CA.CRLPath == "" {
		return
	}
	loads := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "istio_crl_loads_total", Help: "The number of attempts to load the certificate revocation lists, by outcome (unstable)",
	}, []string{"outcome"})
	registry.MustRegister(loads)
	lists := crlConfig(n.cfg)
	lists.Logger = n.slog
	lists.Loaded = func(err error) {
		outcome := "ok"
		if err != nil {
			outcome = "error"
		}
		loads.WithLabelValues(outcome).Inc()
	}
	n.crls = ca.NewCRLs(lists)
	if err := n.crls.Load(); err != nil {
		n.app.Warn("nothing is revoked until the certificate revocation list can be read", "path", n.cfg.CA.CRLPath, "error", err.Error())
	}
}

// loadState fills the store from the local file. That it is bad is an error of the
// configuration.
func (n *node) loadState(registry *prometheus.Registry) error {
	if n.cfg.XDS.LocalPath == "" && n.cfg.XDS.LocalInline == "" {
		if n.cfg.XDS.Address == "" {
			n.app.Warn("no xDS and no local state: set XDS_ADDRESS, LOCAL_XDS_PATH or LOCAL_XDS; until then every destination is unknown, and so is the local workload")
		}
		return nil
	}
	loads := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "istio_local_config_loads_total", Help: "The number of attempts to load the local configuration, by outcome (unstable)",
	}, []string{"outcome"})
	registry.MustRegister(loads)
	world := worldConfig(n.cfg)
	world.Store, world.Logger = n.store, n.slog
	world.Loaded = func(err error) {
		outcome := "ok"
		if err != nil {
			outcome = "error"
		}
		loads.WithLabelValues(outcome).Inc()
	}
	source, err := local.New(world)
	if err != nil {
		return err
	}
	if err := source.Load(); err != nil {
		name := "LOCAL_XDS"
		if world.Path != "" {
			name = "LOCAL_XDS_PATH"
		}
		return n.cfg.invalid(name, err)
	}
	n.world = source
	return nil
}
