package main

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/ztunnel-go/ztunnel/ca/router"
	"github.com/ztunnel-go/ztunnel/internal/istiod"
)

// Config is the effective configuration of one process: plain values, checked.
// The table in config_table.go says where each comes from; run.go hands them to
// the packages.
type Config struct {
	// Args is the command line without the program's name, for the dump only.
	Args string

	Proxy     ProxyConfig
	Sockets   SocketConfig
	Listeners ListenerConfig
	HBONE     HBONEConfig
	Timeouts  TimeoutConfig
	CA        CAConfig
	XDS       XDSConfig
	State     StateConfig
	Authz     AuthzConfig
	TLS       TLSConfig
	DNS       DNSConfig
	Inpod     InpodConfig
	Metrics   MetricsConfig
	Log       LogConfig

	settings []Setting
}

// ProxyMode says whose connections the process carries.
type ProxyMode string

// The modes of PROXY_MODE.
const (
	ModeShared    ProxyMode = "shared"
	ModeDedicated ProxyMode = "dedicated"
)

// WorkloadInfo names a workload.
type WorkloadInfo struct {
	Namespace, Name, ServiceAccount string
}

// ProxyConfig is what the proxy is and where it stands.
type ProxyConfig struct {
	Enabled        bool
	Mode           ProxyMode
	Workload       WorkloadInfo // dedicated mode: the only workload
	WorkloadPID    int          // dedicated mode: a process of it, 0 = unknown
	PodUID         string       // dedicated mode: of its pod
	Node           string
	Network        string
	ClusterID      string
	ClusterDomain  string
	PodName        string // POD_NAME, POD_NAMESPACE and SERVICE_ACCOUNT: the proxy's own pod
	PodNamespace   string
	ServiceAccount string
	InstanceIP     string
	TrustDomain    string // display only
	// Metadata is the merged proxyMetadata, without the ISTIO_META_ prefix.
	Metadata map[string]string
	// MetadataJSON holds the ISTIO_METAJSON_* values, without the prefix.
	MetadataJSON       map[string]string
	LocalhostAppTunnel bool
	ResponseBaggage    bool
	SOCKS5             bool
	// WorkerThreads bounds the parallelism of the process (GOMAXPROCS), at least 1.
	WorkerThreads int
	// MemoryLimit is in bytes; 0 means the limit of the control group.
	MemoryLimit uint64
	// TerminationDeadline bounds the drain.
	TerminationDeadline time.Duration
}

// OriginalSource is ENABLE_ORIG_SRC.
type OriginalSource string

// Whether outgoing connections carry the original source address.
const (
	OriginalSourceAuto  OriginalSource = ""      // where the socket allows it
	OriginalSourceOn    OriginalSource = "true"  // required: a bind error otherwise
	OriginalSourceNever OriginalSource = "false" // never
)

// SocketConfig holds the options of the proxy's sockets.
type SocketConfig struct {
	IPv6           bool // wildcard binds are dual stack
	LoopbackIPv6   bool // ::1 exists
	OriginalSource OriginalSource
	Mark           uint32 // SO_MARK, 0 = none
	ReusePort      bool   // SO_REUSEPORT on the listeners of pods

	KeepAlive         bool
	KeepAliveTime     time.Duration
	KeepAliveInterval time.Duration
	KeepAliveRetries  uint32
	UserTimeout       bool // TCP_USER_TIMEOUT = time + retries × interval
}

// BindAddr is an address to listen on: one socket address, or the loopback of
// each family.
type BindAddr struct {
	Localhost bool
	IPv6      bool           // Localhost only: also ::1
	Port      uint16         // Localhost only
	Addr      netip.AddrPort // otherwise
}

// Addrs lists the socket addresses to bind.
func (b BindAddr) Addrs() []netip.AddrPort {
	if !b.Localhost {
		return []netip.AddrPort{b.Addr}
	}
	out := []netip.AddrPort{netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), b.Port)}
	if b.IPv6 {
		out = append(out, netip.AddrPortFrom(netip.IPv6Loopback(), b.Port))
	}
	return out
}

// String is the address as an operator writes it.
func (b BindAddr) String() string {
	if b.Localhost {
		return fmt.Sprintf("localhost:%d", b.Port)
	}
	return b.Addr.String()
}

// ListenerConfig holds the addresses of all listeners.
type ListenerConfig struct {
	Inbound          netip.AddrPort
	InboundPlaintext netip.AddrPort
	Outbound         netip.AddrPort
	SOCKS5           netip.AddrPort // invalid when off
	Admin            BindAddr
	Stats            BindAddr
	Readiness        BindAddr
	// IllegalPorts may not be reached through the proxy: they are its own.
	IllegalPorts []uint16
}

// HBONEConfig holds the limits of tunnels.
type HBONEConfig struct {
	PoolMaxStreams       uint32        // streams on one pooled connection
	PoolConnections      int           // connections per key below that cap
	PoolUnusedTimeout    time.Duration // an idle pooled connection lives so long
	PoolMaxAge           time.Duration // a pooled connection takes streams so long, 0 = for ever
	MaxConcurrentStreams uint32        // streams on one accepted connection
	IdleTimeout          time.Duration // an accepted connection without streams lives so long
	StreamWindow         uint32        // bytes
	ConnectionWindow     uint32        // bytes
	FrameSize            uint32        // bytes
	PingInterval         time.Duration
	PingTimeout          time.Duration
}

// TimeoutConfig bounds the steps of one connection (design D5).
type TimeoutConfig struct {
	Handshake    time.Duration // TLS handshake and HTTP/2 preface
	Response     time.Duration // answer to a CONNECT
	TCPConnect   time.Duration
	WorkloadWait time.Duration // for a workload that the state does not know yet
	HTTPHeader   time.Duration // admin, stats and readiness: request header
}

// RootCert says where the roots of a control plane connection come from. At
// most one field is set; none means the system's roots.
type RootCert struct {
	File   string
	Inline string // PEM
}

// HeaderField is one extra gRPC metadata entry; the name is lower case.
type HeaderField = istiod.Header

// TokenSource is the bearer token for the control plane: a file that is read
// again for each request, or the token itself; neither = no authentication.
type TokenSource struct {
	File  string
	Token string
}

// CAConfig selects and configures the certificate providers.
type CAConfig struct {
	// Providers are the listed ones, the default first, and Routes say who is
	// served by another. Both come from the environment, or from ConfigFile.
	Providers  []ProviderConfig
	Routes     []router.Rule
	ConfigFile string // CA_CONFIG: read again when it changes

	// ProviderSettings are those of the environment.
	ProviderSettings

	Fake               bool // FAKE_CA
	Linger             time.Duration
	Validation         string // "", strict or compatible; "" = as the provider's nature demands (design D1)
	DefaultTrustDomain string
	TrustDomainAliases []string
	CRLPath            string
}

// ProviderConfig is one certificate provider.
type ProviderConfig struct {
	Name string // of the operator's choice with CA_CONFIG, otherwise its Type
	Type string // one of the names of CA_PROVIDER
	ProviderSettings
}

// ProviderSettings are the settings of all types of providers; each type has its
// own of them, as providerKeys lists them. They are values: equal ones make equal
// providers.
type ProviderSettings struct {
	SecretTTL      time.Duration // istio, local
	RequestTimeout time.Duration // istio, local

	LocalDir string // local; "" = in memory

	Address     string // istio, as all up to Roots
	RootCert    RootCert
	AltHostname string
	Headers     []HeaderField
	Token       TokenSource
	CertSigner  string
	Roots       string // path of a PEM file, "" = the CA's own (CA_CONFIG only)

	WithdrawGrace time.Duration // all of SPIRE
	SPIRETimeout  time.Duration // spire-delegated, spire-workload

	AdminSocket  string // spire-delegated, as all up to ByPID
	Selectors    []string
	BundleResync time.Duration
	ByPID        bool // SPIRE_REFERENCE=pid

	BrokerSocket      string // spire-broker, as all up to BrokerTimeout
	BrokerWorkloadAPI string
	BrokerOwnID       string
	BrokerByPID       bool // SPIFFE_BROKER_ATTESTATION=pid
	BrokerTimeout     time.Duration

	EndpointSocket string // spire-workload; spire-broker without BrokerWorkloadAPI
}

// XDSConfig says where the state comes from.
type XDSConfig struct {
	Address     string // "" = xDS is off
	RootCert    RootCert
	AltHostname string
	Headers     []HeaderField
	OnDemand    bool
	StaleGrace  time.Duration
	KeepUnnamed bool   // XDS_FULL_SET=never
	LocalPath   string // LOCAL_XDS_PATH
	LocalInline string // LOCAL_XDS: YAML text
}

// StateConfig tunes the decisions of package state.
type StateConfig struct {
	PreferredServiceNamespace string
}

// AuthzConfig tunes L4 authorization.
type AuthzConfig struct {
	InfoLogging          bool
	MissingPolicyDeny    bool
	MatchForeignIdentity bool
}

// TLSConfig holds the switches of crypto/tls.
type TLSConfig struct {
	AllowTLS12     bool
	PostQuantum    bool // only X25519MLKEM768
	FIPSRequested  bool // COMPLIANCE_POLICY=fips-140-2 or fips-140-3
	CryptoProvider string
}

// DNSConfig configures the DNS proxy.
type DNSConfig struct {
	Enabled bool
	Addr    BindAddr // of the loopback
}

// InpodConfig configures shared mode.
type InpodConfig struct {
	UDS  string // path of the CNI agent's socket
	NACK string // auto, always or never
}

// MetricsConfig bounds the metrics.
type MetricsConfig struct {
	IdleTimeout time.Duration // 0 = never
	MaxSeries   int           // label sets of one metric.Set
	// BuildTag is the tag label of istio_build.
	BuildTag string
}

// LogConfig is the start-up state of the log.
type LogConfig struct {
	Filter string // RUST_LOG
	JSON   bool
}

// Warning is a value that has no effect, with the reason.
type Warning struct {
	Name string
	Text string
}

// String is the warning as it is shown to the operator.
func (w Warning) String() string { return w.Name + ": " + w.Text }

// Setting is one row of `ztunnel config`: a name, its effective value and where
// the value comes from.
type Setting struct {
	Group  string `json:"group"`
	Name   string `json:"name"`
	Type   string `json:"type"`
	Value  string `json:"value"`
	Origin string `json:"origin"` // default | env NAME | PROXY_CONFIG | mesh file
}

// Settings lists every setting with its effective value, in the order of the
// table. Secrets are redacted.
func (c *Config) Settings() []Setting { return c.settings }

// ConfigError reports every problem of a configuration at once.
type ConfigError struct{ Problems []error }

// Error gives one problem per line.
func (e *ConfigError) Error() string {
	text := "invalid configuration"
	for _, p := range e.Problems {
		text += "\n  " + p.Error()
	}
	return text
}

// Unwrap gives the single problems.
func (e *ConfigError) Unwrap() []error { return e.Problems }

// invalid is the error of a variable whose value was found bad when it was used.
// It shows the value as Settings does.
func (c *Config) invalid(name string, err error) error {
	for _, s := range c.settings {
		if s.Name == name {
			name += "=" + s.Value
			break
		}
	}
	return &ConfigError{Problems: []error{fmt.Errorf("invalid env var %s (%w)", name, err)}}
}

// asConfigError is err as an error of the configuration, which it may be already.
func asConfigError(err error) error {
	if _, ok := errors.AsType[*ConfigError](err); ok {
		return err
	}
	return &ConfigError{Problems: []error{err}}
}

// Load reads the configuration from environ ("NAME=value"), from PROXY_CONFIG
// in it, and from the mesh file through readFile, which is also asked for the
// files whose existence decides what a value means. The Config is never nil:
// with an error, a *ConfigError of all problems, it is fit for display only.
func Load(environ []string, readFile func(string) ([]byte, error)) (*Config, []Warning, error) {
	l := newLoader(environ, readFile)
	l.load()
	if len(l.problems) > 0 {
		return l.cfg, l.warnings, &ConfigError{Problems: l.problems}
	}
	return l.cfg, l.warnings, nil
}
