package main

import "time"

var caVars = group{name: "Certificates", doc: "Who signs for the workloads, and which certificates are believed. [ca-providers.md](ca-providers.md) explains providers, routes and the file.", vars: []variable{
	{name: "CA_PROVIDER", typ: "list of `istio`, `spire-delegated`, `spire-broker`, `spire-workload`, `local`", def: "istio",
		doc: "The certificate providers, separated by commas. The first signs for all workloads that no route sends to another; the roots of all of them are believed. `istio_ca` and `spiffe_broker` are accepted as `istio` and `spire-broker`.", set: setProviders},
	{name: "CA_ROUTES", typ: "list of rules", doc: "Which provider signs for which workloads: `ns=NAMESPACE:PROVIDER`, `td=TRUST-DOMAIN:PROVIDER` or `*:PROVIDER`, separated by commas. The most specific rule wins. Empty = none. Ours.",
		set: func(l *loader, v value) (err error) { l.routes, err = parseRoutes(v.text); return err }},
	{name: "CA_CONFIG", typ: "path", doc: "A YAML file with providers, their settings and routes, in place of `CA_PROVIDER` and `CA_ROUTES`. It is read again when it changes. Empty = none. Ours.",
		set: to(text, func(c *Config) *string { return &c.CA.ConfigFile })},
	{name: "FAKE_CA", typ: "bool", def: "false", doc: "`true` is the same as `CA_PROVIDER=local`.",
		set: to(parseBool, func(c *Config) *bool { return &c.CA.Fake })},
	{name: "CA_LOCAL_DIR", typ: "path", doc: "Where the local CA keeps its root certificate and key. Empty: in memory, a new root with each start.",
		set: to(text, func(c *Config) *string { return &c.CA.LocalDir })},
	{name: "SECRET_TTL", typ: "duration", def: "24h", doc: "The validity to ask for, at least `1s`. SPIRE decides by itself.",
		set: to(atLeast(time.Second), func(c *Config) *time.Duration { return &c.CA.SecretTTL })},
	{name: "CA_LINGER", typ: "duration", def: "5m", doc: "How long a certificate is kept and renewed after its last use.",
		set: to(parseDuration, func(c *Config) *time.Duration { return &c.CA.Linger })},
	{name: "SVID_VALIDATION", typ: "`strict`, `compatible`", defDoc: "`strict` for SPIRE, `compatible` for `istio` and `local`",
		doc: "`strict`: SPIFFE to the letter. `compatible`: absent key usages are tolerated, and counted.",
		set: to(oneOf("strict", "compatible"), func(c *Config) *string { return &c.CA.Validation })},
	{name: "DEFAULT_TRUST_DOMAIN", typ: "string", def: "cluster.local", doc: "The trust domain of a workload that names none.", set: setTrustDomain},
	{name: "TRUST_DOMAIN_ALIASES", meta: "TRUST_DOMAIN_ALIASES", typ: "list", doc: "Trust domains that are equal to our own in identities and policies, separated by commas.", set: setTrustDomainAliases},
	{name: "CRL_PATH", typ: "path", doc: "The certificate revocation lists, PEM or DER, read again when the file changes; it may come later. Empty: nothing is revoked.",
		set: to(text, func(c *Config) *string { return &c.CA.CRLPath })},
	{name: "CA_ADDRESS", typ: "URI", defDoc: "`https://istiod.istio-system.svc:15012` in Kubernetes, else `https://localhost:15012`", parseEmpty: true,
		doc: "The Istio CA. `https://` is assumed.", set: setCAAddress},
	{name: "CA_ROOT_CA", typ: "path, `SYSTEM` or PEM", def: defaultRootFile, doc: "The roots of the connection to the CA.",
		set: setRoot(func(c *Config) *RootCert { return &c.CA.RootCert })},
	{name: "ALT_CA_HOSTNAME", typ: "string", doc: "One more accepted name of the CA's server certificate.",
		set: to(serverName, func(c *Config) *string { return &c.CA.AltHostname })},
	{name: "CA_HEADER_*", typ: "string", prefix: true, doc: "Extra gRPC metadata; the rest of the name, in lower case, is the key.",
		set: setHeader("CA_HEADER_", func(c *Config) *[]HeaderField { return &c.CA.Headers })},
	{name: "CA_CERT_SIGNER", meta: "CERT_SIGNER", typ: "string", doc: "Asks a CA that has several signers for this one. Also read from the metadata `CERT_SIGNER`.",
		set: to(text, func(c *Config) *string { return &c.CA.CertSigner })},
	{name: "AUTH_TOKEN", typ: "path or token", defDoc: "`./var/run/secrets/tokens/istio-token` if it exists", secret: true, parseEmpty: true,
		doc: "The bearer token for the CA and xDS: the file that holds it, or itself.", set: setToken},
}}

var spireVars = group{name: "SPIRE", doc: "Settings of the SPIRE providers. A socket is an absolute path, plain or as `unix:///path`, of at most 107 bytes.", vars: []variable{
	{name: "SPIRE_ENABLED", aliases: []string{"USE_SPIRE"}, typ: "bool", def: "false", doc: "`true` is the same as `CA_PROVIDER=spire-delegated`.",
		set: func(l *loader, v value) (err error) { l.spire, err = parseBool(v.text); return err }},
	{name: "SPIRE_ADMIN_ENDPOINT_SOCKET", typ: "URI or path", def: "unix:///run/spire/sockets/admin.sock", doc: "`spire-delegated`: the agent's admin socket.",
		set: to(unixSocket, func(c *Config) *string { return &c.CA.AdminSocket })},
	{name: "SPIRE_TIMEOUT", typ: "duration", def: "10s", doc: "`spire-delegated`, `spire-workload`: the wait for the agent's first answer.",
		set: to(positive, func(c *Config) *time.Duration { return &c.CA.SPIRETimeout })},
	{name: "SPIRE_REFERENCE", typ: "`selectors`, `pid`", def: "selectors", doc: "`spire-delegated`: how a workload is named to the agent. `pid` needs `PROXY_WORKLOAD_PID`. Ours.",
		set: setChoice("selectors", "pid", func(c *Config) *bool { return &c.CA.ByPID })},
	{name: "SPIRE_SELECTORS", typ: "list of templates", doc: "`spire-delegated`: selectors on top of namespace, service account, pod UID and pod name, separated by commas, as in `k8s:node-name:{{.Node}}`. Known are `.Namespace`, `.ServiceAccount`, `.PodName`, `.PodUID`, `.Node` and `.TrustDomain`. Ours.",
		set: to(parseSelectors, func(c *Config) *[]string { return &c.CA.Selectors })},
	{name: "SPIRE_BUNDLE_RESYNC", typ: "duration", def: "5m", doc: "`spire-delegated`: how often the bundles are asked for anew, give or take a fifth: the agent does not take back a federated bundle within a stream. Ours.",
		set: to(positive, func(c *Config) *time.Duration { return &c.CA.BundleResync })},
	{name: "SVID_WITHDRAW_GRACE", typ: "duration", def: "5s", doc: "How long an identity that SPIRE took back is still used; `0s` = not at all. Ours.",
		set: to(parseDuration, func(c *Config) *time.Duration { return &c.CA.WithdrawGrace })},
	{name: "CONTAINER_RUNTIME_SOCK_PATH", typ: "path", def: "/run/containerd/containerd.sock", doc: "Accepted for compatibility; no effect.", set: check(text)},
	{name: "SPIFFE_BROKER_SOCKET", typ: "URI or path", doc: "`spire-broker`: the broker. Also `tcp://host:port`. Required.",
		set: to(brokerSocket, func(c *Config) *string { return &c.CA.BrokerSocket })},
	{name: "SPIFFE_BROKER_WORKLOAD_API_SOCKET", typ: "URI or path", defDoc: "`SPIFFE_ENDPOINT_SOCKET`", doc: "`spire-broker`: the Workload API that gives the proxy its own identity towards the broker. One of the two is required.",
		set: to(unixSocket, func(c *Config) *string { return &c.CA.BrokerWorkloadAPI })},
	{name: "SPIFFE_BROKER_WORKLOAD_API_SPIFFE_ID", typ: "SPIFFE ID", defDoc: "`spiffe://<DEFAULT_TRUST_DOMAIN>/ns/istio-system/sa/ztunnel`", doc: "`spire-broker`: the proxy's own identity towards the broker.",
		set: to(parseID, func(c *Config) *string { return &c.CA.BrokerOwnID })},
	{name: "SPIFFE_BROKER_ATTESTATION", typ: "`k8s_object`, `pid`", def: "k8s_object", doc: "`spire-broker`: how a workload is named to the broker. `pid` needs `PROXY_WORKLOAD_PID`.",
		set: setChoice("k8s_object", "pid", func(c *Config) *bool { return &c.CA.BrokerByPID })},
	{name: "SPIFFE_BROKER_TIMEOUT", typ: "duration", def: "10s", doc: "`spire-broker`: the wait for the broker's first answer.",
		set: to(positive, func(c *Config) *time.Duration { return &c.CA.BrokerTimeout })},
	{name: "SPIFFE_ENDPOINT_SOCKET", typ: "URI or path", doc: "`spire-workload`: the Workload API. Required there.",
		set: to(unixSocket, func(c *Config) *string { return &c.CA.EndpointSocket })},
}}

var xdsVars = group{name: "xDS", doc: "The control plane: delta xDS of istiod, or of Cilium's agent. [control-plane.md](control-plane.md) explains what is fetched and what happens without it. The token is that of `AUTH_TOKEN`.", vars: []variable{
	{name: "XDS_ADDRESS", typ: "URI", defDoc: "`discoveryAddress` of ProxyConfig, else as `CA_ADDRESS`", parseEmpty: true,
		doc: "The control plane, as `https://host:port` or `unix:///path`. `https://` is assumed; `http://` is refused. Empty: xDS is off.", set: setXDSAddress},
	{name: "discoveryAddress", field: true, typ: "string", doc: "The same in ProxyConfig.", set: check(parseXDSAddress)},
	{name: "XDS_ROOT_CA", typ: "path, `SYSTEM` or PEM", def: defaultRootFile, doc: "The roots of the connection to the control plane. A file is read again for each connection, and may come later.",
		set: setRoot(func(c *Config) *RootCert { return &c.XDS.RootCert })},
	{name: "ALT_XDS_HOSTNAME", typ: "string", doc: "One more accepted name of the control plane's server certificate.",
		set: to(serverName, func(c *Config) *string { return &c.XDS.AltHostname })},
	{name: "XDS_HEADER_*", typ: "string", prefix: true, doc: "Extra gRPC metadata; the rest of the name, in lower case, is the key.",
		set: setHeader("XDS_HEADER_", func(c *Config) *[]HeaderField { return &c.XDS.Headers })},
	{name: "XDS_ON_DEMAND", typ: "bool", def: "false", doc: "Ask for workloads and services when they are needed, instead of holding all of them. Excludes the DNS proxy.",
		set: to(parseBool, func(c *Config) *bool { return &c.XDS.OnDemand })},
	{name: "XDS_STALE_GRACE", typ: "duration", def: "10s", doc: "How long an entry that the server no longer names stays usable after a reconnect; `0s` = not at all. Ours.",
		set: to(parseDuration, func(c *Config) *time.Duration { return &c.XDS.StaleGrace })},
	{name: "XDS_FULL_SET", typ: "`auto`, `never`", def: "auto", doc: "Whether the first answer of a stream may delete what it does not name, where we could not tell the server what we hold. Ours.",
		set: setChoice("auto", "never", func(c *Config) *bool { return &c.XDS.KeepUnnamed })},
}}

var localVars = group{name: "Local state", doc: "Workloads, services and policies from a file, in place of a control plane or before it: with both, the file is loaded first and xDS adds to it. Only one of the two may be set.", vars: []variable{
	{name: "LOCAL_XDS_PATH", typ: "path", doc: "A YAML file; it is read again when it changes, unless xDS is on.",
		set: to(nonEmpty, func(c *Config) *string { return &c.XDS.LocalPath })},
	{name: "LOCAL_XDS", typ: "YAML", doc: "The same as text.", bulky: true,
		set: to(text, func(c *Config) *string { return &c.XDS.LocalInline })},
	{name: "PREFERED_SERVICE_NAMESPACE", typ: "string", doc: "The namespace that wins where several services share a host name. (The spelling is the reference's.)",
		set: to(text, func(c *Config) *string { return &c.State.PreferredServiceNamespace })},
}}

var authzVars = group{name: "Authorization", vars: []variable{
	{name: "AUTHZ_POLICY_INFO_LOGGING", typ: "`true`", doc: "Log each decision at level info. Any other value is ignored.", set: setAuthzLogging},
	{name: "AUTHZ_MISSING_POLICY", typ: "`allow`, `deny`", def: "allow", doc: "What a policy that a workload names, but nobody has sent, means for its connections. Ours.",
		set: setChoice("allow", "deny", func(c *Config) *bool { return &c.Authz.MissingPolicyDeny })},
	{name: "AUTHZ_FOREIGN_TRUST_DOMAIN", typ: "`ignore`, `match`", def: "ignore", doc: "Whether `namespaces` and `serviceAccounts` of a policy match identities of other trust domains. Ours.",
		set: setChoice("ignore", "match", func(c *Config) *bool { return &c.Authz.MatchForeignIdentity })},
}}

var tlsVars = group{name: "TLS", vars: []variable{
	{name: "TLS12_ENABLED", typ: "`true`", doc: "Allow TLS 1.2. Any other value is ignored.", set: setTLS12},
	{name: "COMPLIANCE_POLICY", typ: "`pqc`, `fips-140-2`, `fips-140-3`", doc: "`pqc`: only the key exchange X25519MLKEM768; an error in a build with `CRYPTO=boring`, which does not have it. `fips-…` asks for a build with a FIPS module (`make build CRYPTO=fips140` or `CRYPTO=boring`); another build warns. Any other value is ignored.", set: setCompliance},
}}

var dnsVars = group{name: "DNS proxy", doc: "It answers the names of the mesh's services and forwards all others to the nameservers of `/etc/resolv.conf`. Who asks it is up to the redirection rules.", vars: []variable{
	{name: "ISTIO_META_DNS_CAPTURE", meta: "DNS_CAPTURE", typ: "bool", def: "true", doc: "Run the DNS proxy. Any value other than `true` turns it off.", set: setDNSCapture},
	{name: "ISTIO_META_DNS_PROXY_ADDR", meta: "DNS_PROXY_ADDR", typ: "address", def: "localhost:15053", doc: "Where the DNS proxy listens, by UDP and TCP: `localhost:port` = both loopbacks, else `ip:port`. Only a loopback address is taken: an open resolver would answer strangers.", set: setDNSAddr},
}}

var inpodVars = group{name: "Shared mode", doc: "The CNI agent names the pods of the node and passes their network namespaces (ZDS). Listeners are opened inside of them.", vars: []variable{
	{name: "INPOD_UDS", typ: "path", def: "/var/run/ztunnel/ztunnel.sock", doc: "The socket of the CNI agent. Below `/var/run/cilium` or `/run/cilium` it is Cilium's: see `INPOD_NACK`, and a proxy that drains goes on taking connections until its successor serves the pod.",
		set: to(agentSocket, func(c *Config) *string { return &c.Inpod.UDS })},
	{name: "INPOD_PORT_REUSE", typ: "bool", def: "true", doc: "SO_REUSEPORT on the listeners in pods, so that a new proxy can stand beside the old one. Without it an upgrade interrupts.",
		set: to(parseBool, func(c *Config) *bool { return &c.Sockets.ReusePort })},
	{name: "INPOD_NACK", typ: "`auto`, `always`, `never`", def: "auto", doc: "Whether a pod that cannot be served is refused to the CNI agent. `auto`: not to Cilium's, which would close the connection and leave the pod without a proxy. Either way the pod is tried again every 5 s. Ours.",
		set: to(oneOf("auto", "always", "never"), func(c *Config) *string { return &c.Inpod.NACK })},
	{name: "INPOD_ENABLED", typ: "string", doc: "Accepted for compatibility with charts; no effect.", set: check(text)},
}}

var adminVars = group{name: "Admin and metrics", vars: []variable{
	{name: "READINESS_BIND_ADDRESS", typ: "IP or `ip:port`", defDoc: "all addresses, port 15021", doc: "Where `/healthz/ready` is served. The port is ours.", set: setReadinessAddr},
	{name: "proxyAdminPort", field: true, typ: "number", def: "15000", doc: "The admin port, on loopback. A field of ProxyConfig.",
		set: func(l *loader, v value) (err error) { l.adminPort, err = number[uint16](0, maxU16)(v.text); return err }},
	{name: "statsPort", field: true, typ: "number", def: "15020", doc: "The metrics port. A field of ProxyConfig.",
		set: func(l *loader, v value) (err error) { l.statsPort, err = number[uint16](0, maxU16)(v.text); return err }},
	{name: "METRICS_IDLE_TIMEOUT", typ: "duration", def: "15m", doc: "A series that has not changed for so long, and that no open connection holds, is dropped; `0s` = never. Ours.",
		set: to(parseDuration, func(c *Config) *time.Duration { return &c.Metrics.IdleTimeout })},
	{name: "METRICS_MAX_SERIES", typ: "number", def: "10000", doc: "Label sets of one group of metrics; what comes after goes into one overflow series. Ours.",
		set: to(number[int](1, maxWindow), func(c *Config) *int { return &c.Metrics.MaxSeries })},
}}

var logVars = group{name: "Logging", vars: []variable{
	{name: "RUST_LOG", typ: "filter", def: "info", doc: "Levels by target: `info,access=debug`. Levels: off, error, warn, info, debug, trace. Changed at run time with POST /logging.", set: setLogFilter},
	{name: "LOG_FORMAT", typ: "`plain`, `json`", def: "plain", doc: "`json`: one object per line. Any other value means `plain`.", set: setLogFormat},
	{name: "RUST_BACKTRACE", typ: "string", doc: "Accepted for compatibility with charts; no effect.", set: check(text)},
}}

var metadataVars = group{name: "ProxyConfig and metadata", doc: "ProxyConfig is read from `defaultConfig` of the file `./etc/istio/config/mesh` and from `PROXY_CONFIG`, which wins field by field. Its fields `proxyAdminPort`, `statsPort`, `concurrency` and `discoveryAddress` are listed above; `proxyMetadata` is a map from string to string.", vars: []variable{
	{name: "PROXY_CONFIG", typ: "YAML or JSON", bulky: true, doc: "ProxyConfig as text; empty = none.", set: check(text)},
	{name: "ISTIO_META_*", prefix: true, typ: "string", doc: "Metadata, without the prefix. It wins over `proxyMetadata`.", set: check(text)},
	{name: "ISTIO_METAJSON_*", prefix: true, bulky: true, typ: "JSON", doc: "Metadata of the xDS node. What is not JSON is skipped with a warning.", set: setMetadataJSON},
	{name: "ISTIO_META_ISTIO_VERSION", meta: "ISTIO_VERSION", typ: "string", def: "unknown", doc: "The tag label of `istio_build`.",
		set: to(text, func(c *Config) *string { return &c.Metrics.BuildTag })},
	{name: "KUBERNETES_SERVICE_HOST", typ: "string", doc: "Its presence decides the default of `CA_ADDRESS` and `XDS_ADDRESS`.", set: check(text)},
}}
