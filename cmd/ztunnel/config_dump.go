package main

import (
	"encoding/json"
	"slices"
	"time"
)

// Dump is the value of the "config" key of /config_dump: the keys and shapes of
// spec §4.3. Tokens and the local state are left out; headers and metadata whose
// name speaks of a secret are hidden, as in Settings. It marshals with sorted keys.
func (c *Config) Dump() map[string]any {
	p, s, h := c.Proxy, c.Sockets, c.HBONE
	return map[string]any{
		"adminAddr":                dumpAddr(c.Listeners.Admin),
		"altCaHostname":            orNull(c.CA.AltHostname),
		"altXdsHostname":           orNull(c.XDS.AltHostname),
		"caAddress":                orNull(c.CA.Address),
		"caHeaders":                dumpHeaders(c.CA.Headers),
		"caRootCert":               dumpRoot(c.CA.RootCert),
		"clusterDomain":            p.ClusterDomain,
		"clusterId":                p.ClusterID,
		"connectionWindowSize":     h.ConnectionWindow,
		"crlPath":                  orNull(c.CA.CRLPath),
		"dnsProxy":                 c.DNS.Enabled,
		"dnsProxyAddr":             dumpAddr(c.DNS.Addr),
		"dnsResolverCfg":           map[string]any{"domain": nil, "name_servers": []any{}, "search": []any{}},
		"dnsResolverOpts":          map[string]any{},
		"enableEnhancedBaggage":    p.ResponseBaggage,
		"fakeCa":                   c.CA.Fake,
		"fakeSelfInbound":          false,
		"frameSize":                h.FrameSize,
		"illegalPorts":             c.Listeners.IllegalPorts,
		"inboundAddr":              c.Listeners.Inbound.String(),
		"inboundPlaintextAddr":     c.Listeners.InboundPlaintext.String(),
		"inpodPortReuse":           s.ReusePort,
		"inpodUds":                 c.Inpod.UDS,
		"ipv6Enabled":              s.IPv6,
		"localNode":                orNull(p.Node),
		"localhostAppTunnel":       p.LocalhostAppTunnel,
		"network":                  p.Network,
		"numWorkerThreads":         p.WorkerThreads,
		"outboundAddr":             c.Listeners.Outbound.String(),
		"packetMark":               orNull(s.Mark),
		"poolMaxStreamsPerConn":    h.PoolMaxStreams,
		"poolUnusedReleaseTimeout": dumpDuration(h.PoolUnusedTimeout),
		"preferedServiceNamespace": orNull(c.State.PreferredServiceNamespace),
		"proxy":                    p.Enabled,
		"proxyArgs":                c.Args,
		"proxyMetadata":            dumpMetadata(p.Metadata),
		"proxyMode":                map[ProxyMode]string{ModeShared: "Shared", ModeDedicated: "Dedicated"}[p.Mode],
		"proxyWorkloadInformation": dumpWorkload(p.Workload),
		"readinessAddr":            dumpAddr(c.Listeners.Readiness),
		"requireOriginalSource":    dumpOriginalSource(s.OriginalSource),
		"secretTtl":                dumpDuration(c.CA.SecretTTL),
		"selfTerminationDeadline":  dumpDuration(p.TerminationDeadline),
		"socketConfig": map[string]any{
			"keepaliveEnabled":   s.KeepAlive,
			"keepaliveInterval":  dumpDuration(s.KeepAliveInterval),
			"keepaliveRetries":   s.KeepAliveRetries,
			"keepaliveTime":      dumpDuration(s.KeepAliveTime),
			"userTimeoutEnabled": s.UserTimeout,
		},
		"socks5Addr":      dumpSOCKS(c),
		"statsAddr":       dumpAddr(c.Listeners.Stats),
		"windowSize":      h.StreamWindow,
		"xdsAddress":      orNull(c.XDS.Address),
		"xdsHeaders":      dumpHeaders(c.XDS.Headers),
		"xdsOnDemand":     c.XDS.OnDemand,
		"xdsRootCert":     dumpRoot(c.XDS.RootCert),
		"ztunnelIdentity": dumpIdentity(p),
		"ztunnelWorkload": dumpWorkload(ownWorkload(p)),
	}
}

// MarshalJSON is Dump, so that a Config can be logged and dumped as it is.
func (c *Config) MarshalJSON() ([]byte, error) { return json.Marshal(c.Dump()) }

// orNull is nil for the zero value.
func orNull[T comparable](v T) any {
	var zero T
	if v == zero {
		return nil
	}
	return v
}

func dumpDuration(d time.Duration) map[string]any {
	return map[string]any{"secs": int64(d / time.Second), "nanos": int64(d % time.Second)}
}

func dumpAddr(b BindAddr) map[string]any {
	if b.Localhost {
		return map[string]any{"Localhost": []any{b.IPv6, b.Port}}
	}
	return map[string]any{"SocketAddr": b.Addr.String()}
}

func dumpHeaders(hs []HeaderField) [][2]string {
	out := make([][2]string, 0, len(hs))
	for _, h := range hs {
		value := h.Value
		if sensitive(h.Name) {
			value = redacted
		}
		out = append(out, [2]string{h.Name, value})
	}
	return out
}

func dumpMetadata(metadata map[string]string) map[string]string {
	out := make(map[string]string, len(metadata))
	for name, text := range metadata {
		if sensitive(name) && text != "" {
			text = redacted
		}
		out[name] = text
	}
	return out
}

func dumpRoot(r RootCert) any {
	switch {
	case r.File != "":
		return map[string]any{"File": r.File}
	case r.Inline != "":
		return "Static"
	}
	return "Default"
}

func dumpOriginalSource(o OriginalSource) any {
	if o == OriginalSourceAuto {
		return nil
	}
	return o == OriginalSourceOn
}

func dumpSOCKS(c *Config) any {
	if !c.Listeners.SOCKS5.IsValid() {
		return nil
	}
	return c.Listeners.SOCKS5.String()
}

func dumpWorkload(w WorkloadInfo) any {
	if w == (WorkloadInfo{}) {
		return nil
	}
	return map[string]any{"name": w.Name, "namespace": w.Namespace, "serviceAccount": w.ServiceAccount}
}

// ownWorkload is the proxy's own pod: all three of its variables are needed.
func ownWorkload(p ProxyConfig) WorkloadInfo {
	if slices.Contains([]string{p.PodName, p.PodNamespace, p.ServiceAccount}, "") {
		return WorkloadInfo{}
	}
	return WorkloadInfo{Namespace: p.PodNamespace, Name: p.PodName, ServiceAccount: p.ServiceAccount}
}

func dumpIdentity(p ProxyConfig) any {
	own := ownWorkload(p)
	if own == (WorkloadInfo{}) {
		return nil
	}
	return "spiffe://" + p.TrustDomain + "/ns/" + own.Namespace + "/sa/" + own.ServiceAccount
}
