package main

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// variable is one row of the table: everything that is known of one setting.
// Parsing, `ztunnel config` and docs/configuration.md are made from it.
type variable struct {
	name    string
	aliases []string // further names; two that contradict each other are an error
	typ     string   // shown in the docs; lists the choices of an enumeration
	def     string   // parsed like a value when nothing is set
	defDoc  string   // shown instead of def where the default is computed
	doc     string

	field      bool   // a field of ProxyConfig, not an environment variable
	meta       string // also read from this key of the merged proxyMetadata
	prefix     bool   // name ends in *: a family of variables
	secret     bool   // never shown
	bulky      bool   // only its length is shown
	parseEmpty bool   // call set with the empty default, too

	set func(*loader, value) error
}

type group struct {
	name string
	doc  string
	vars []variable
}

// to makes the setter of a row that is one value of one field.
func to[T any](parse func(string) (T, error), field func(*Config) *T) func(*loader, value) error {
	return func(l *loader, v value) error {
		x, err := parse(v.text)
		if err != nil {
			return err
		}
		*field(l.cfg) = x
		return nil
	}
}

// check makes the setter of a row that is validated and changes nothing by itself.
func check[T any](parse func(string) (T, error)) func(*loader, value) error {
	return func(_ *loader, v value) error { _, err := parse(v.text); return err }
}

func text(s string) (string, error) { return s, nil }

func nonEmpty(s string) (string, error) {
	if s == "" {
		return "", errors.New("must not be empty")
	}
	return s, nil
}

// positive is parseDuration without zero.
func positive(s string) (time.Duration, error) {
	d, err := parseDuration(s)
	if err == nil && d <= 0 {
		return 0, errors.New("must be longer than 0")
	}
	return d, err
}

// atLeast is parseDuration with a lower bound.
func atLeast(least time.Duration) func(string) (time.Duration, error) {
	return func(s string) (time.Duration, error) {
		d, err := parseDuration(s)
		if err == nil && d < least {
			return 0, fmt.Errorf("must be at least %s", least)
		}
		return d, err
	}
}

func number[T uint16 | uint32 | uint64 | int](lo, hi uint64) func(string) (T, error) {
	return func(s string) (T, error) {
		n, err := parseUint(s, lo, hi)
		return T(n), err
	}
}

// oneOf makes a parser that takes the choices and nothing else.
func oneOf[T ~string](choices ...T) func(string) (T, error) {
	return func(s string) (T, error) {
		names := make([]string, 0, len(choices))
		for _, c := range choices {
			if s == string(c) {
				return c, nil
			}
			names = append(names, string(c))
		}
		return "", fmt.Errorf("must be one of %s", strings.Join(names, ", "))
	}
}

func list(s string) ([]string, error) {
	var out []string
	for p := range strings.SplitSeq(s, ",") {
		if p = strings.TrimSpace(p); p != "" {
			out = append(out, p)
		}
	}
	return out, nil
}

const (
	maxU16    = 1<<16 - 1
	maxU32    = 1<<32 - 1
	maxWindow = 1<<31 - 1 // RFC 9113 §6.9.1
	maxPID    = 1 << 22   // PID_MAX_LIMIT of Linux
)

// configTable is every setting, in the order of the documentation.
var configTable = []group{
	proxyVars, resourceVars, socketVars, hboneVars, timeoutVars,
	caVars, spireVars, xdsVars, localVars, authzVars, tlsVars, dnsVars, inpodVars, adminVars, logVars, metadataVars,
}

var proxyVars = group{name: "Proxy", doc: "What this process is and where it stands.", vars: []variable{
	{name: "ENABLE_PROXY", typ: "bool", def: "true", doc: "Run the proxy's listeners: 15008 HBONE, 15006 inbound plaintext, 15001 outbound.",
		set: to(parseBool, func(c *Config) *bool { return &c.Proxy.Enabled })},
	{name: "PROXY_MODE", typ: "`shared`, `dedicated`", def: "shared", doc: "`shared`: one proxy for all pods of a node, which the CNI agent names; on Linux only. `dedicated`: a proxy for one workload, in its own network namespace.",
		set: to(oneOf(ModeShared, ModeDedicated), func(c *Config) *ProxyMode { return &c.Proxy.Mode })},
	{name: "PROXY_WORKLOAD_INFO", typ: "namespace/name/service-account", doc: "The workload of `dedicated` mode, where it is required. Without effect in `shared` mode.",
		set: to(parseWorkloadInfo, func(c *Config) *WorkloadInfo { return &c.Proxy.Workload })},
	{name: "PROXY_WORKLOAD_PID", typ: "number", doc: "The PID of a process of that workload, as this process sees it. `SPIRE_REFERENCE=pid` and `SPIFFE_BROKER_ATTESTATION=pid` need it. Ours.",
		set: to(number[int](1, maxPID), func(c *Config) *int { return &c.Proxy.WorkloadPID })},
	{name: "POD_UID", typ: "string", doc: "The UID of the pod, by which SPIRE knows it: of the workload in `dedicated` mode, of the proxy itself in `shared` mode. Ours.",
		set: to(text, func(c *Config) *string { return &c.Proxy.PodUID })},
	{name: "NODE_NAME", typ: "string", doc: "The name of this node. Workloads with the same node are local.",
		set: to(text, func(c *Config) *string { return &c.Proxy.Node })},
	{name: "NETWORK", typ: "string", doc: "The network of this node.",
		set: to(text, func(c *Config) *string { return &c.Proxy.Network })},
	{name: "CLUSTER_ID", typ: "string", def: "Kubernetes", doc: "The cluster of this node. `ISTIO_META_CLUSTER_ID` wins over it.", set: setClusterID},
	{name: "CLUSTER_DOMAIN", typ: "string", def: "cluster.local", doc: "The DNS domain of the cluster, for the DNS proxy.",
		set: to(parseDomain, func(c *Config) *string { return &c.Proxy.ClusterDomain })},
	{name: "POD_NAME", typ: "string", doc: "The proxy's own pod. Together with the next two it gives the proxy an identity of its own, which is shown in `/config_dump`; in shared mode the proxy is then reached over HBONE, as by a Prometheus of the mesh. With `INSTANCE_IP` it also is the ID of the xDS node.",
		set: to(text, func(c *Config) *string { return &c.Proxy.PodName })},
	{name: "POD_NAMESPACE", typ: "string", doc: "The namespace of the proxy's own pod.",
		set: to(text, func(c *Config) *string { return &c.Proxy.PodNamespace })},
	{name: "SERVICE_ACCOUNT", typ: "string", doc: "The service account of the proxy's own pod.",
		set: to(text, func(c *Config) *string { return &c.Proxy.ServiceAccount })},
	{name: "INSTANCE_IP", typ: "string", def: "1.1.1.1", doc: "The address of the proxy's own pod, a part of its xDS node.",
		set: to(text, func(c *Config) *string { return &c.Proxy.InstanceIP })},
	{name: "TRUST_DOMAIN", typ: "string", def: "cluster.local", doc: "Shown in the proxy's own identity in `/config_dump`, nothing else. See `DEFAULT_TRUST_DOMAIN`.",
		set: to(text, func(c *Config) *string { return &c.Proxy.TrustDomain })},
	{name: "LOCALHOST_APP_TUNNEL", typ: "bool", def: "true", doc: "Reach an application that takes PROXY headers over loopback.",
		set: to(parseBool, func(c *Config) *bool { return &c.Proxy.LocalhostAppTunnel })},
	{name: "ENABLE_RESPONSE_BAGGAGE", typ: "bool", def: "true", doc: "Answer a CONNECT with the baggage of the destination, and use that of a peer.",
		set: to(parseBool, func(c *Config) *bool { return &c.Proxy.ResponseBaggage })},
	{name: "UNSTABLE_ENABLE_SOCKS5", typ: "bool", def: "false", doc: "Take outbound connections by SOCKS5 on 127.0.0.1:15080, too, in each pod.",
		set: to(parseBool, func(c *Config) *bool { return &c.Proxy.SOCKS5 })},
	{name: "CONNECTION_TERMINATION_DEADLINE", typ: "duration", defDoc: "from `TERMINATION_GRACE_PERIOD_SECONDS`, else `5s`", doc: "How long open connections may go on after the first SIGTERM or SIGINT.",
		set: to(parseDuration, func(c *Config) *time.Duration { return &c.Proxy.TerminationDeadline })},
	{name: "TERMINATION_GRACE_PERIOD_SECONDS", typ: "number", doc: "The pod's grace period. The deadline above becomes 5 s less for more than 10 s, otherwise 1 s less, and at least 1 s.", set: setGracePeriod},
}}

var resourceVars = group{name: "Resources", doc: "CPU and memory. The number of CPUs is the first of `ZTUNNEL_RESOURCE_CPU_LIMIT`, `ZTUNNEL_CPU_LIMIT` and the logical CPUs of the machine.", vars: []variable{
	{name: "ZTUNNEL_WORKER_THREADS", typ: "number or percentage", defDoc: "`concurrency`; else the CPU limit or the request, whichever is greater, if there is a limit; else a quarter of the CPUs, at least the request and 2",
		doc: "The parallelism of the process (GOMAXPROCS). `0` = all CPUs, `50%` = half of them.", set: setWorkerThreads},
	{name: "concurrency", field: true, typ: "number", doc: "The same in ProxyConfig; `0` = all CPUs.", set: func(*loader, value) error { return nil }},
	{name: "ZTUNNEL_RESOURCE_CPU_LIMIT", typ: "CPU quantity", doc: "The pod's CPU limit, as in `2`, `1.5`, `500m`. Rounded up.",
		set: func(l *loader, v value) (err error) { l.cpuQuota, err = parseCPU(v.text); return err }},
	{name: "ZTUNNEL_RESOURCE_CPU_REQUEST", typ: "CPU quantity", doc: "The pod's CPU request.",
		set: func(l *loader, v value) (err error) { l.cpuReq, err = parseCPU(v.text); return err }},
	{name: "ZTUNNEL_CPU_LIMIT", typ: "number", doc: "The number of CPUs, where there is no quantity.",
		set: func(l *loader, v value) (err error) {
			l.cpuLimit, err = number[int](1, maxU16)(v.text)
			return err
		}},
	{name: "ZTUNNEL_MEMORY_LIMIT", typ: "memory quantity", defDoc: "the limit of the control group, if there is one",
		doc: "What the process may use, as in `512Mi`. A quarter of it may hold bytes that wait for slow applications.",
		set: to(parseMemory, func(c *Config) *uint64 { return &c.Proxy.MemoryLimit })},
}}

var socketVars = group{name: "Sockets", vars: []variable{
	{name: "IPV6_ENABLED", typ: "bool", def: "true", doc: "Wildcard listeners are dual stack. `false`: 0.0.0.0 only.",
		set: to(parseBool, func(c *Config) *bool { return &c.Sockets.IPv6 })},
	{name: "ENABLE_ORIG_SRC", typ: "bool", defDoc: "where the socket allows it", doc: "Keep the source address of the application towards the destination. `true`: IP_TRANSPARENT is required, and start-up fails without. `false`: never.",
		set: to(oneOf(OriginalSourceOn, OriginalSourceNever), func(c *Config) *OriginalSource { return &c.Sockets.OriginalSource })},
	{name: "PACKET_MARK", typ: "number", defDoc: "`1337` in shared mode, none in dedicated mode", doc: "SO_MARK: of all sockets in pods in shared mode, where the rules of the CNI agent must know it; of outgoing ones in dedicated mode. `0` = none.",
		set: to(number[uint32](0, maxU32), func(c *Config) *uint32 { return &c.Sockets.Mark })},
	{name: "KEEPALIVE_ENABLED", typ: "bool", def: "true", doc: "TCP keepalive on the proxy's sockets.",
		set: to(parseBool, func(c *Config) *bool { return &c.Sockets.KeepAlive })},
	{name: "KEEPALIVE_TIME", typ: "duration", def: "180s", doc: "Idle time before the first probe.",
		set: to(parseDuration, func(c *Config) *time.Duration { return &c.Sockets.KeepAliveTime })},
	{name: "KEEPALIVE_INTERVAL", typ: "duration", def: "180s", doc: "Time between probes.",
		set: to(parseDuration, func(c *Config) *time.Duration { return &c.Sockets.KeepAliveInterval })},
	{name: "KEEPALIVE_RETRIES", typ: "number", def: "9", doc: "Unanswered probes before the connection is dead.",
		set: to(number[uint32](0, maxU32), func(c *Config) *uint32 { return &c.Sockets.KeepAliveRetries })},
	{name: "USER_TIMEOUT_ENABLED", typ: "bool", def: "false", doc: "TCP_USER_TIMEOUT = time + retries × interval.",
		set: to(parseBool, func(c *Config) *bool { return &c.Sockets.UserTimeout })},
}}

var hboneVars = group{name: "HBONE", doc: "Tunnels between proxies: HTTP/2 CONNECT over mTLS.", vars: []variable{
	{name: "POOL_MAX_STREAMS_PER_CONNECTION", typ: "number", def: "100", doc: "Streams on one pooled tunnel; the peer may allow fewer.",
		set: to(number[uint32](1, maxU16), func(c *Config) *uint32 { return &c.HBONE.PoolMaxStreams })},
	{name: "POOL_CONNECTIONS_PER_KEY", typ: "number", def: "1", doc: "Tunnels to one destination before the cap above is reached. Ours.",
		set: to(number[int](1, maxU16), func(c *Config) *int { return &c.HBONE.PoolConnections })},
	{name: "POOL_UNUSED_RELEASE_TIMEOUT", typ: "duration", def: "5m", doc: "How long a pooled tunnel without streams is kept; `0s` = it is closed at once.",
		set: to(parseDuration, func(c *Config) *time.Duration { return &c.HBONE.PoolUnusedTimeout })},
	{name: "POOL_MAX_CONNECTION_AGE", typ: "duration", def: "0s", doc: "A pooled tunnel takes no new streams after this; `0s` = as long as its certificates are valid. Ours.",
		set: to(parseDuration, func(c *Config) *time.Duration { return &c.HBONE.PoolMaxAge })},
	{name: "HBONE_MAX_CONCURRENT_STREAMS", typ: "number", def: "200", doc: "Streams that a peer may hold open on one tunnel to us. Ours.",
		set: to(number[uint32](1, maxU32), func(c *Config) *uint32 { return &c.HBONE.MaxConcurrentStreams })},
	{name: "HTTP2_STREAM_WINDOW_SIZE", typ: "number", def: "4194304", doc: "The largest receive window of a stream, in bytes. A stream starts with less and grows.",
		set: to(number[uint32](65535, maxWindow), func(c *Config) *uint32 { return &c.HBONE.StreamWindow })},
	{name: "HTTP2_CONNECTION_WINDOW_SIZE", typ: "number", def: "16777216", doc: "The receive window of a tunnel, in bytes.",
		set: to(number[uint32](65535, maxWindow), func(c *Config) *uint32 { return &c.HBONE.ConnectionWindow })},
	{name: "HTTP2_FRAME_SIZE", typ: "number", def: "1048576", doc: "SETTINGS_MAX_FRAME_SIZE, in bytes.",
		set: to(number[uint32](16384, 1<<24-1), func(c *Config) *uint32 { return &c.HBONE.FrameSize })},
}}

// timeoutVars: names and values of design D5.
var timeoutVars = group{name: "Timeouts", doc: "Every wait of a connection is bounded. These names are ours; the values that the reference has are the same.", vars: []variable{
	{name: "TCP_CONNECT_TIMEOUT", typ: "duration", def: "10s", doc: "TCP connect to an application or a peer.",
		set: to(positive, func(c *Config) *time.Duration { return &c.Timeouts.TCPConnect })},
	{name: "HBONE_HANDSHAKE_TIMEOUT", typ: "duration", def: "10s", doc: "TLS handshake and HTTP/2 preface, in both directions.",
		set: to(positive, func(c *Config) *time.Duration { return &c.Timeouts.Handshake })},
	{name: "HBONE_RESPONSE_TIMEOUT", typ: "duration", def: "20s", doc: "The answer to a CONNECT. The peer may need 5 s for its workload and 10 s to connect.",
		set: to(positive, func(c *Config) *time.Duration { return &c.Timeouts.Response })},
	{name: "HBONE_IDLE_TIMEOUT", typ: "duration", def: "5m", doc: "A tunnel to us that carries no stream for so long is closed with GOAWAY. For tunnels from us see `POOL_UNUSED_RELEASE_TIMEOUT`.",
		set: to(positive, func(c *Config) *time.Duration { return &c.HBONE.IdleTimeout })},
	{name: "HBONE_PING_INTERVAL", typ: "duration", def: "10s", doc: "Time between HTTP/2 PINGs on a tunnel.",
		set: to(positive, func(c *Config) *time.Duration { return &c.HBONE.PingInterval })},
	{name: "HBONE_PING_TIMEOUT", typ: "duration", def: "20s", doc: "A tunnel is dead when a PING stays unanswered for so long.",
		set: to(positive, func(c *Config) *time.Duration { return &c.HBONE.PingTimeout })},
	{name: "WORKLOAD_WAIT_TIMEOUT", typ: "duration", def: "5s", doc: "How long a connection waits for its workload to become known.",
		set: to(positive, func(c *Config) *time.Duration { return &c.Timeouts.WorkloadWait })},
	{name: "CA_REQUEST_TIMEOUT", typ: "duration", def: "10s", doc: "One request for a certificate, and the wait of a connection for its first.",
		set: to(positive, func(c *Config) *time.Duration { return &c.CA.RequestTimeout })},
	{name: "HTTP_HEADER_TIMEOUT", typ: "duration", def: "2s", doc: "Reading a request header on the admin, metrics and readiness ports.",
		set: to(positive, func(c *Config) *time.Duration { return &c.Timeouts.HTTPHeader })},
}}
