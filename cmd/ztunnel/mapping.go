package main

import (
	"cmp"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/istio"
	calocal "github.com/ztunnel-go/ztunnel/ca/local"
	"github.com/ztunnel-go/ztunnel/ca/spire"
	"github.com/ztunnel-go/ztunnel/internal/zlog"
	"github.com/ztunnel-go/ztunnel/proxy"
	"github.com/ztunnel-go/ztunnel/proxy/dns"
	"github.com/ztunnel-go/ztunnel/proxy/hbone"
	"github.com/ztunnel-go/ztunnel/proxy/inpod"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/state"
	"github.com/ztunnel-go/ztunnel/xds"
	worldlocal "github.com/ztunnel-go/ztunnel/xds/local"
)

// The functions of this file say what each package gets of the configuration,
// and nothing else: the caller adds loggers, counters and the other parts.

// explicit is a duration of which 0 is meant, for packages in which 0 means the
// default and a negative one means what 0 means here.
func explicit(d time.Duration) time.Duration {
	if d == 0 {
		return -1
	}
	return d
}

// trust is what the configuration says of trust, parsed. Load has checked it.
type trust struct {
	domain     spiffeid.TrustDomain
	aliases    []spiffeid.TrustDomain
	validation ca.Validation
}

func trustOf(cfg *Config) (t trust, err error) {
	if t.domain, err = parseTrustDomain(cfg.CA.DefaultTrustDomain); err != nil {
		return trust{}, err
	}
	for _, name := range cfg.CA.TrustDomainAliases {
		alias, err := parseTrustDomain(name)
		if err != nil {
			return trust{}, err
		}
		t.aliases = append(t.aliases, alias)
	}
	t.validation, err = ca.ParseValidation(cfg.CA.Validation)
	return t, err
}

func localCAConfig(t trust, p ProviderConfig) calocal.Config {
	return calocal.Config{
		Name: p.Name, Dir: p.LocalDir, TrustDomain: t.domain, Aliases: t.aliases, TTL: p.SecretTTL,
		Poll: ca.PollConfig{Timeout: p.RequestTimeout, Validation: t.validation},
	}
}

// istioConfig: only a shared proxy impersonates. In dedicated mode the CA alone
// decides who we are.
func istioConfig(cfg *Config, t trust, p ProviderConfig) istio.Config {
	return istio.Config{
		Name: p.Name, Address: p.Address, RootFile: p.RootCert.File, RootPEM: p.RootCert.Inline, AltHostname: p.AltHostname,
		Headers: p.Headers, TokenFile: p.Token.File, Token: p.Token.Token, ClusterID: cfg.Proxy.ClusterID, CertSigner: p.CertSigner,
		Impersonate: cfg.Proxy.Mode == ModeShared, TrustDomain: t.domain, Aliases: t.aliases, TTL: p.SecretTTL, Roots: p.Roots,
		TLS12: cfg.TLS.AllowTLS12 && !cfg.TLS.PostQuantum, PQC: cfg.TLS.PostQuantum,
		Poll: ca.PollConfig{Timeout: p.RequestTimeout, Validation: t.validation},
	}
}

func delegatedConfig(cfg *Config, t trust, p ProviderConfig) spire.DelegatedConfig {
	return spire.DelegatedConfig{
		Common:      spire.Common{Name: p.Name, Socket: p.AdminSocket, Timeout: p.SPIRETimeout, WithdrawGrace: explicit(p.WithdrawGrace)},
		TrustDomain: t.domain, Selectors: p.Selectors, Node: cfg.Proxy.Node, ByPID: p.ByPID, Resync: p.BundleResync,
	}
}

func brokerConfig(p ProviderConfig) (spire.BrokerConfig, error) {
	own, err := spiffeid.FromString(p.BrokerOwnID)
	return spire.BrokerConfig{
		Common:      spire.Common{Name: p.Name, Socket: p.BrokerSocket, Timeout: p.BrokerTimeout, WithdrawGrace: explicit(p.WithdrawGrace)},
		WorkloadAPI: cmp.Or(p.BrokerWorkloadAPI, p.EndpointSocket), OwnID: own, ByPID: p.BrokerByPID,
	}, err
}

func workloadConfig(p ProviderConfig) spire.WorkloadConfig {
	return spire.WorkloadConfig{
		Common: spire.Common{Name: p.Name, Socket: p.EndpointSocket, Timeout: p.SPIRETimeout, WithdrawGrace: explicit(p.WithdrawGrace)},
	}
}

func managerConfig(cfg *Config, t trust) ca.ManagerConfig {
	return ca.ManagerConfig{Linger: explicit(cfg.CA.Linger), Validation: t.validation}
}

func tlsOptions(cfg *Config, t trust) ca.TLSOptions {
	return ca.TLSOptions{
		TLS12: cfg.TLS.AllowTLS12, PQC: cfg.TLS.PostQuantum,
		DefaultTrustDomain: t.domain, Aliases: t.aliases, Validation: t.validation,
	}
}

func crlConfig(cfg *Config) ca.CRLConfig { return ca.CRLConfig{Path: cfg.CA.CRLPath} }

func stateConfig(cfg *Config) state.Config {
	c := state.Config{
		NodeName: cfg.Proxy.Node, Network: cfg.Proxy.Network, ClusterID: cfg.Proxy.ClusterID,
		DefaultTrustDomain: cfg.CA.DefaultTrustDomain, TrustDomainAliases: cfg.CA.TrustDomainAliases,
		OnDemand: cfg.XDS.OnDemand && cfg.XDS.Address != "",
	}
	if cfg.Authz.MatchForeignIdentity {
		c.AuthzForeignTrustDomain = state.MatchForeign
	}
	if cfg.Authz.MissingPolicyDeny {
		c.AuthzMissingPolicy = state.DenyMissing
	}
	return c
}

func worldConfig(cfg *Config) worldlocal.Config {
	return worldlocal.Config{
		Path: cfg.XDS.LocalPath, Inline: cfg.XDS.LocalInline, ClusterID: cfg.Proxy.ClusterID, Once: cfg.XDS.Address != "",
	}
}

// xdsConfig is that of the control plane. The token is that for the CA.
func xdsConfig(cfg *Config) xds.Config {
	x, p := cfg.XDS, cfg.Proxy
	c := xds.Config{
		Address: x.Address, RootFile: x.RootCert.File, RootPEM: x.RootCert.Inline, AltHostname: x.AltHostname, Headers: x.Headers,
		TokenFile: cfg.CA.Token.File, Token: cfg.CA.Token.Token, ClusterID: p.ClusterID,
		TLS12: cfg.TLS.AllowTLS12 && !cfg.TLS.PostQuantum, PQC: cfg.TLS.PostQuantum,
		Node: xds.Node{
			PodName: p.PodName, PodNamespace: p.PodNamespace, InstanceIP: p.InstanceIP, NodeName: p.Node,
			Metadata: p.Metadata, MetadataJSON: p.MetadataJSON,
		},
		OnDemand: x.OnDemand, StaleGrace: explicit(x.StaleGrace),
	}
	if x.KeepUnnamed {
		c.FullSet = xds.FullSetNever
	}
	return c
}

// hboneConfig is that of the tunnels of both roles. 0 means the default there,
// or for ever; Load lets no 0 through.
func hboneConfig(cfg *Config) hbone.Config {
	h := cfg.HBONE
	return hbone.Config{
		StreamWindow: int(h.StreamWindow), ConnWindow: int(h.ConnectionWindow), FrameSize: int(h.FrameSize),
		MaxStreams: int(h.MaxConcurrentStreams), HandshakeTimeout: cfg.Timeouts.Handshake, ResponseTimeout: cfg.Timeouts.Response,
		PingInterval: h.PingInterval, PingTimeout: h.PingTimeout, IdleTimeout: h.IdleTimeout,
	}
}

// queueLimit is how many bytes the tunnels of the process may queue for slow
// applications: a quarter of the memory limit (design D10). 0 is no limit.
func queueLimit(cfg *Config) int64 { return int64(cfg.Proxy.MemoryLimit / 4) }

// dataPathConfig is what all proxies of the process have in common. Local and
// PodUID are those of dedicated mode.
func dataPathConfig(cfg *Config) proxy.Config {
	w := cfg.Proxy.Workload
	c := proxy.Config{
		Local:        state.Ref{Namespace: w.Namespace, Name: w.Name, ServiceAccount: w.ServiceAccount},
		PodUID:       cfg.Proxy.PodUID,
		IllegalPorts: cfg.Listeners.IllegalPorts, NetworkID: cfg.Proxy.Network,
		HBONE: hboneConfig(cfg), PoolMaxStreams: int(cfg.HBONE.PoolMaxStreams), PoolIdle: explicit(cfg.HBONE.PoolUnusedTimeout),
		PoolMaxAge: cfg.HBONE.PoolMaxAge, PoolConnsPerKey: cfg.HBONE.PoolConnections,
		ResponseBaggage: cfg.Proxy.ResponseBaggage, PolicyInfoLogging: cfg.Authz.InfoLogging, WorkloadWait: cfg.Timeouts.WorkloadWait,
		CertificateWait: cfg.CA.RequestTimeout,
		NodeName:        cfg.Proxy.Node, ClusterID: cfg.Proxy.ClusterID, LocalhostAppTunnel: cfg.Proxy.LocalhostAppTunnel,
		ResolveTimeout: cfg.Timeouts.TCPConnect,
	}
	if cfg.Proxy.Enabled {
		c.OutboundAddr, c.InboundAddr, c.PassthroughAddr = cfg.Listeners.Outbound, cfg.Listeners.Inbound, cfg.Listeners.InboundPlaintext
		c.SOCKSAddr = cfg.Listeners.SOCKS5
	}
	return c
}

// resolverConfig is how host names of workloads are resolved.
func resolverConfig(cfg *Config) dns.ResolverConfig {
	return dns.ResolverConfig{IPv6: cfg.Sockets.IPv6}
}

// dnsConfig is what the DNS servers of all pods have in common.
func dnsConfig(cfg *Config) dns.ServerConfig {
	return dns.ServerConfig{
		Addrs: cfg.DNS.Addr.Addrs(), ClusterDomain: cfg.Proxy.ClusterDomain, PreferredNamespace: cfg.State.PreferredServiceNamespace,
		IPv6: cfg.Sockets.IPv6, WorkloadWait: cfg.Timeouts.WorkloadWait,
	}
}

func metricsConfig(cfg *Config) proxy.MetricsConfig {
	return proxy.MetricsConfig{Idle: explicit(cfg.Metrics.IdleTimeout), MaxSeries: cfg.Metrics.MaxSeries}
}

// hostConfig is the network namespace of the process. In shared mode that is not
// a pod's: nothing is marked there, and no source address is spoofed (spec §7.9).
func hostConfig(cfg *Config) netns.HostConfig {
	h := netns.HostConfig{
		Keepalive: keepalive(cfg.Sockets), UserTimeout: userTimeout(cfg.Sockets), IPv6Enabled: cfg.Sockets.IPv6, ConnectTimeout: cfg.Timeouts.TCPConnect,
		OriginalSource: netns.OriginalSourceOff,
	}
	if cfg.Proxy.Mode == ModeDedicated {
		h.Mark, h.OriginalSource = cfg.Sockets.Mark, originalSource(cfg.Sockets)
	}
	return h
}

func keepalive(s SocketConfig) netns.Keepalive {
	return netns.Keepalive{Enabled: s.KeepAlive, Time: s.KeepAliveTime, Interval: s.KeepAliveInterval, Retries: int(s.KeepAliveRetries)}
}

func userTimeout(s SocketConfig) time.Duration {
	if !s.UserTimeout {
		return 0
	}
	return s.KeepAliveTime + time.Duration(s.KeepAliveRetries)*s.KeepAliveInterval
}

func originalSource(s SocketConfig) netns.OriginalSource {
	switch s.OriginalSource {
	case OriginalSourceOn:
		return netns.OriginalSourceRequired
	case OriginalSourceNever:
		return netns.OriginalSourceOff
	}
	return netns.OriginalSourceAuto
}

func inpodConfig(cfg *Config) inpod.Config {
	return inpod.Config{
		Path: cfg.Inpod.UDS, HandOver: handOver(cfg) > 0,
		NACK: map[string]inpod.NACK{"auto": inpod.NACKAuto, "always": inpod.NACKAlways, "never": inpod.NACKNever}[cfg.Inpod.NACK],
	}
}

// handOver is how long a drain waits for the next proxy to serve a pod, 0 = not
// at all. Cilium's agent has one connection, and its proxies share the host's
// network: there the next one gets the pods when this one has left (design D14).
func handOver(cfg *Config) time.Duration {
	const most = 10 * time.Second
	if !inpod.Cilium(cfg.Inpod.UDS) {
		return 0
	}
	return min(most, cfg.Proxy.TerminationDeadline/2)
}

// serverConfig is that of the admin, metrics and readiness servers.
type serverConfig struct {
	admin, stats, readiness BindAddr
	headerTimeout           time.Duration
}

func (c *Config) serverConfig() serverConfig {
	return serverConfig{c.Listeners.Admin, c.Listeners.Stats, c.Listeners.Readiness, c.Timeouts.HTTPHeader}
}

func logConfig(cfg *Config) zlog.Config {
	return zlog.Config{JSON: cfg.Log.JSON, Filter: cfg.Log.Filter}
}
