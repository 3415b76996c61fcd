package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"os"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ztunnel-go/ztunnel/admin"
	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/internal/zlog"
	"github.com/ztunnel-go/ztunnel/proxy"
	"github.com/ztunnel-go/ztunnel/proxy/dns"
	"github.com/ztunnel-go/ztunnel/proxy/hbone"
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
	proxy    *proxy.Proxy

	ready                         *admin.Ready
	stateReady, proxyReady        func() // complete the readiness tasks "state manager" and "proxy"
	admin, stats, readiness       *admin.Server
	adminLn, statsLn, readinessLn []net.Listener

	quit chan struct{} // one slot: POST /quitquitquit
}

// nodeParts are what distinguishes the demo's nodes from a real one.
type nodeParts struct {
	network  netns.Network
	backends map[string]backend // nil = the real ones
	pidfd    *os.File           // of PROXY_WORKLOAD_PID, or nil; remains the caller's
	// resolvConf names the nameservers for workloads that are known by host name
	// alone, "" = the system's.
	resolvConf string
	log        *zlog.Log // remains the caller's
}

// newNode makes the parts and loads the state. It starts and opens nothing.
func newNode(cfg *Config, parts nodeParts) (*node, error) {
	n := &node{cfg: cfg, log: parts.log, slog: parts.log.Logger(), quit: make(chan struct{}, 1)}
	n.app = n.slog.With("component", "app")
	registry, err := admin.NewRegistry(cfg.Metrics.BuildTag)
	if err != nil {
		return nil, err
	}
	n.registry = registry
	registerLog(registry, parts.log)
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
	data := dataPathConfig(cfg)
	data.Network, data.Store, data.Certs, data.Log = parts.network, n.store, n.certs, n.slog
	data.PIDFD = parts.pidfd
	if n.xds != nil && cfg.XDS.OnDemand {
		data.Demand = n.xds.Demand
	}
	data.Metrics = proxy.NewMetrics(registry, metricsConfig(cfg))
	data.TLS = tlsOptions(cfg, trust)
	data.TLS.Tolerated = countTolerated(registry)
	n.loadCRLs(registry)
	data.CRLs = n.crls
	n.watchTunnels(&data.HBONE, registry)
	names := resolverConfig(cfg)
	names.Dial, names.ResolvConf, names.Logger = dns.Over(parts.network), parts.resolvConf, n.slog
	resolver, err := dns.NewResolver(names)
	if err != nil {
		return nil, err
	}
	data.Resolve = resolver.Lookup
	if n.proxy, err = proxy.New(data); err != nil {
		return nil, err
	}
	return n, n.newServers(registry)
}

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

// countTolerated shows the certificates that only compatible mode accepts.
func countTolerated(registry *prometheus.Registry) func(rule string) {
	tolerated := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "istio_svid_compatible_accept_total", Help: "The number of peer certificates accepted although they break a SPIFFE rule (unstable)",
	}, []string{"rule"})
	registry.MustRegister(tolerated)
	return func(rule string) { tolerated.WithLabelValues(rule).Inc() }
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

// registerLog shows the lines that the log's output did not take.
func registerLog(registry *prometheus.Registry, log *zlog.Log) {
	registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name: "istio_log_lines_dropped_total", Help: "The number of log lines that could not be written (unstable)",
	}, func() float64 { return float64(log.Dropped()) }))
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

// watchTunnels adds to the configuration of the tunnels what they share in this
// process: the budget, the counters and the log.
func (n *node) watchTunnels(c *hbone.Config, registry *prometheus.Registry) {
	c.Stats, c.Logger = new(hbone.Stats), n.slog.With("component", "proxy::hbone")
	if limit := queueLimit(n.cfg); limit > 0 {
		c.Budget = hbone.NewBudget(limit)
	}
	registerStats(registry, c.Stats, c.Budget)
}

// registerStats shows what the tunnels count.
func registerStats(registry *prometheus.Registry, s *hbone.Stats, b *hbone.Budget) {
	counter := func(name, help string, read func() uint64) {
		registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name + "_total", Help: help + " (unstable)"},
			func() float64 { return float64(read()) }))
	}
	counter("istio_hbone_panics", "The number of panics that ended one tunnel or stream only", s.Panics.Load)
	counter("istio_hbone_floods", "The number of tunnels ended because the peer exceeded a limit on abuse", s.Floods.Load)
	counter("istio_hbone_budget_resets", "The number of streams reset because the bytes queued for slow applications reached the limit", s.BudgetResets.Load)
	counter("istio_hbone_budget_refusals", "The number of requests refused because the bytes queued for slow applications came near the limit", s.BudgetRefused.Load)
	counter("istio_hbone_refused_streams", "The number of requests answered REFUSED_STREAM", s.Refused.Load)
	counter("istio_hbone_ping_timeouts", "The number of tunnels ended because the peer did not answer a ping", s.PingTimeouts.Load)
	registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "istio_hbone_queued_bytes", Help: "The bytes queued for slow applications (unstable)",
	}, func() float64 { return float64(b.Used()) }))
}

// newServers makes the three HTTP servers.
func (n *node) newServers(registry *prometheus.Registry) (err error) {
	const drain = time.Second
	n.ready = admin.NewReady(n.slog)
	n.proxyReady = n.ready.Register("proxy")
	n.stateReady = n.ready.Register("state manager")
	n.ready.Explain("state manager", n.gateReason)
	n.readiness = admin.NewReadiness(n.ready, drain, n.slog)
	n.stats = admin.NewStats(registry, drain, n.slog)
	n.admin, err = admin.New(admin.Config{
		Dump: n.dump, Levels: n.log, Drain: drain, Log: n.slog, Pages: n.pages(),
		Quit: func() {
			select {
			case n.quit <- struct{}{}:
			default: // asked already
			}
		},
	})
	if err != nil {
		return err
	}
	for _, s := range []*admin.Server{n.admin, n.stats, n.readiness} {
		s.HeaderTimeout = n.cfg.serverConfig().headerTimeout
	}
	return nil
}

// listen opens every listener: a bind error ends the start (spec §6.2).
func (n *node) listen(ctx context.Context) (err error) {
	defer func() {
		if err != nil {
			n.closeListeners()
		}
	}()
	servers := n.cfg.serverConfig()
	for _, l := range []struct {
		name string
		addr BindAddr
		to   *[]net.Listener
	}{
		{"readiness", servers.readiness, &n.readinessLn},
		{"admin", servers.admin, &n.adminLn},
		{"stats", servers.stats, &n.statsLn},
	} {
		for _, addr := range l.addr.Addrs() {
			ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", addr.String())
			if err != nil {
				return fmt.Errorf("%s: failed to bind to address %s: %w", l.name, addr, err)
			}
			*l.to = append(*l.to, ln)
		}
	}
	return n.proxy.Listen(ctx)
}

func (n *node) closeListeners() {
	for _, lns := range [][]net.Listener{n.readinessLn, n.adminLn, n.statsLn} {
		for _, ln := range lns {
			ln.Close()
		}
	}
}

func (n *node) adminAddr() string { return n.adminLn[0].Addr().String() }
func (n *node) statsAddr() string { return n.statsLn[0].Addr().String() }

// errQuit is the cause of a drain that POST /quitquitquit began.
var errQuit = errors.New("asked to quit by the admin server")

// errEnded is the failure of a data path that nobody has asked to end.
var errEnded = errors.New("ended by itself")

// logPatience is how long after the deadline of the drain a log whose output
// takes no lines may hold up the end.
const logPatience = time.Second

// run serves what listen opened, until ctx ends, the admin server is asked to
// quit, or a part fails. Then it drains (design §6): not ready, nothing accepted
// any more, open connections go on until the deadline, and what they need ends
// after them. The error is the first failure of a part.
func (n *node) run(ctx context.Context) error {
	// What the drain needs outlives ctx, and the connections outlive a part that
	// has failed: only the deadline cuts them.
	base := context.WithoutCancel(ctx)
	support, stop := context.WithCancel(base)
	probes, notReady := context.WithCancel(support)
	data, cut := context.WithCancelCause(base)
	late := time.AfterFunc(math.MaxInt64, n.releaseLog)
	defer late.Stop()
	defer cut(nil)
	failed := make(chan error, 1)
	parts := n.startParts(support, probes, failed)
	defer parts.Wait()
	defer stop()
	defer notReady()
	done := make(chan error, 1)
	parts.Go(func() { done <- n.runDataPath(data, probes) })

	var cause, failure error
	select {
	case <-ctx.Done():
		cause = context.Cause(ctx)
	case <-n.quit:
		cause = errQuit
	case failure = <-failed:
		cause = failure
	case err := <-done:
		failure = fmt.Errorf("data path: %w", cmp.Or(err, errEnded))
		cause = failure
		done <- nil
	}
	notReady()
	n.proxy.Drain()
	deadline := time.NewTimer(n.cfg.Proxy.TerminationDeadline)
	defer deadline.Stop()
	late.Reset(min(n.cfg.Proxy.TerminationDeadline, math.MaxInt64-logPatience) + logPatience)
	n.app.Info("draining", "cause", cause.Error(), "deadline", n.cfg.Proxy.TerminationDeadline.String())
	var err error
	select {
	case err = <-done:
	case <-deadline.C:
		cut(proxy.ErrDraining)
		n.app.Warn("drain duration expired with pending connections, forcefully shutting down")
		err = <-done
	}
	if failure == nil {
		select {
		case failure = <-failed: // during the drain
		default:
		}
	}
	return cmp.Or(failure, err)
}

// startParts starts everything but the data path. Each part ends with support,
// readiness with probes already. failed, which has room for one, gets the first
// error of a part that ended before.
func (n *node) startParts(support, probes context.Context, failed chan<- error) *sync.WaitGroup {
	var parts sync.WaitGroup
	part := func(ctx context.Context, what string, run func(context.Context) error) {
		parts.Go(func() {
			err := run(ctx)
			if err == nil || ctx.Err() != nil {
				return
			}
			select {
			case failed <- fmt.Errorf("%s: %w", what, err):
			default: // not the first
			}
			n.app.Error("part failed", "part", what, "error", err.Error())
		})
	}
	part(probes, "readiness server", func(ctx context.Context) error { return n.readiness.Serve(ctx, n.readinessLn...) })
	part(support, "admin server", func(ctx context.Context) error { return n.admin.Serve(ctx, n.adminLn...) })
	part(support, "stats server", func(ctx context.Context) error { return n.stats.Serve(ctx, n.statsLn...) })
	part(support, "certificate manager", n.certs.Run)
	if n.crls != nil {
		part(support, "certificate revocation lists", n.crls.Run)
	}
	if n.caConfig != nil {
		part(support, "certificate provider configuration", n.caConfig.run)
	}
	if n.world != nil {
		part(support, "local state", n.world.Run)
	}
	if n.xds != nil {
		part(support, "xDS", n.runXDS)
	}
	return &parts
}

// releaseLog closes the log, so that nobody waits any longer for an output that
// takes no lines: connections that end, or run itself. Whatever is not over by
// now hangs.
func (n *node) releaseLog() {
	now, cancel := context.WithCancel(context.Background())
	cancel()
	_ = n.log.Close(now) // who owns the log closes it again, and learns of it
}
