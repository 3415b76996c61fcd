package main

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
)

// finish computes what several rows decide together, and checks rows against
// each other.
func (l *loader) finish() {
	c := l.cfg
	c.TLS.CryptoProvider = ca.CryptoProvider()
	if id, ok := l.env["ISTIO_META_CLUSTER_ID"]; ok {
		l.show("CLUSTER_ID", id, "env ISTIO_META_CLUSTER_ID")
	}
	l.show("RUST_LOG", c.Log.Filter, "")
	l.show("CA_ADDRESS", c.CA.Address, "")
	l.show("XDS_ADDRESS", c.XDS.Address, "")
	if f, ok := l.proxy.fields["discoveryAddress"]; ok && !l.isSet("XDS_ADDRESS") {
		l.show("XDS_ADDRESS", c.XDS.Address, f.origin)
	}
	l.finishDeadline()
	l.finishThreads()
	l.finishAddresses()
	l.finishProviders()
	l.finishState()
	l.finishPorts()
	l.finishWorkload()

	if c.Proxy.Mode == ModeShared && !l.isSet("PACKET_MARK") {
		c.Sockets.Mark = 1337
	}
	l.show("PACKET_MARK", strconv.FormatUint(uint64(c.Sockets.Mark), 10), "")
	l.finishShared()
	if c.Proxy.Mode == ModeDedicated && !l.isSet("PROXY_WORKLOAD_INFO") {
		l.configProblem("PROXY_MODE=dedicated requires PROXY_WORKLOAD_INFO to be set")
	}
	if !c.Proxy.Enabled && !c.DNS.Enabled {
		l.problems = append(l.problems, errors.New("error parsing proxy config: ztunnel run without any servers enabled"))
	}
}

func (l *loader) configProblem(format string, args ...any) {
	l.problems = append(l.problems, fmt.Errorf("invalid configuration: %w", fmt.Errorf(format, args...)))
}

func (l *loader) finishDeadline() {
	const byDefault = 5 * time.Second
	p, origin := &l.cfg.Proxy, ""
	if l.isSet("CONNECTION_TERMINATION_DEADLINE") {
		return
	}
	p.TerminationDeadline = byDefault
	if l.grace > 0 {
		p.TerminationDeadline, origin = l.grace, "env TERMINATION_GRACE_PERIOD_SECONDS"
	}
	l.show("CONNECTION_TERMINATION_DEADLINE", p.TerminationDeadline.String(), origin)
}

// finishThreads implements the table of spec §5.4.
func (l *loader) finishThreads() {
	cpus := l.cpus
	switch {
	case l.cpuQuota > 0:
		cpus = l.cpuQuota
	case l.cpuLimit > 0:
		cpus = l.cpuLimit
	}
	threads, origin := 0, ""
	explicit := l.values["ZTUNNEL_WORKER_THREADS"]
	concurrency, hasConcurrency := l.proxy.fields["concurrency"]
	switch {
	case explicit.set:
		threads, _ = parseThreads(explicit.text, cpus) // checked by the row
	case hasConcurrency:
		origin = concurrency.origin
		n, _ := parseUint(concurrency.text, 0, maxU16) // checked by merge
		if threads = int(n); n == 0 {
			threads = cpus
		}
	case l.cpuQuota > 0:
		threads, origin = max(l.cpuQuota, l.cpuReq), "env ZTUNNEL_RESOURCE_CPU_LIMIT"
	default:
		threads = max(int(math.Ceil(float64(cpus)*0.25)), l.cpuReq, 2)
	}
	l.cfg.Proxy.WorkerThreads = max(1, threads)
	l.show("ZTUNNEL_WORKER_THREADS", strconv.Itoa(l.cfg.Proxy.WorkerThreads), origin)
}

func (l *loader) finishAddresses() {
	c := l.cfg
	c.Sockets.LoopbackIPv6 = c.Sockets.IPv6
	if c.Sockets.IPv6 {
		const sysctl = "/proc/sys/net/ipv6/conf/lo/disable_ipv6"
		b, err := l.readFile(sysctl)
		if err != nil {
			l.warn("IPV6_ENABLED", "cannot read %s (%v): ::1 is assumed to exist", sysctl, err)
		}
		c.Sockets.LoopbackIPv6 = strings.TrimSpace(string(b)) != "1"
	}
	wildcard := netip.IPv4Unspecified()
	if c.Sockets.IPv6 {
		wildcard = netip.IPv6Unspecified()
	}
	wildcardPort := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(wildcard, port) }
	c.Listeners = ListenerConfig{
		Inbound:          wildcardPort(15008),
		InboundPlaintext: wildcardPort(15006),
		Outbound:         wildcardPort(15001),
		Admin:            BindAddr{Localhost: true, IPv6: c.Sockets.LoopbackIPv6, Port: l.adminPort},
		Stats:            BindAddr{Addr: wildcardPort(l.statsPort)},
		Readiness:        BindAddr{Addr: wildcardPort(readinessPort)},
		IllegalPorts:     []uint16{15001, 15006, 15008},
	}
	if c.Proxy.SOCKS5 {
		c.Listeners.SOCKS5 = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 15080)
		c.Listeners.IllegalPorts = append(c.Listeners.IllegalPorts, 15080)
	}
	if l.readiness.IsValid() {
		c.Listeners.Readiness.Addr = l.readiness
	}
	l.show("READINESS_BIND_ADDRESS", c.Listeners.Readiness.String(), "")
	// Whether a pod has ::1 is found out there.
	c.DNS.Addr.IPv6 = c.DNS.Addr.Localhost && (c.Sockets.LoopbackIPv6 || c.Sockets.IPv6 && c.Proxy.Mode == ModeShared)
}

// finishPorts refuses two listeners on one port, which would fail when they bind.
func (l *loader) finishPorts() {
	c := l.cfg
	pod := map[uint16]string{
		15001: "the outbound listener", 15006: "the inbound plaintext listener", 15008: "the HBONE listener",
	}
	if socks := c.Listeners.SOCKS5; socks.IsValid() {
		pod[socks.Port()] = "SOCKS5"
	}
	host := pod
	if c.Proxy.Mode == ModeShared {
		host = maps.Clone(pod) // another namespace, in which nobody should look for the others
	}
	claim := func(users map[uint16]string, row, user string, port uint16) {
		if port == 0 {
			return // any free one, or an error that is reported
		}
		if other, taken := users[port]; taken {
			l.problem(l.values[row], false, fmt.Errorf("the port of %s: must be another one", other))
			return
		}
		users[port] = user
	}
	if c.DNS.Enabled {
		claim(pod, "ISTIO_META_DNS_PROXY_ADDR", "the DNS proxy", c.DNS.Addr.Addrs()[0].Port())
	}
	claim(host, "READINESS_BIND_ADDRESS", "readiness", c.Listeners.Readiness.Addr.Port())
	// A port that somebody set is the wrong one, not the default of the other.
	ports := []struct {
		name string
		port uint16
	}{{"proxyAdminPort", l.adminPort}, {"statsPort", l.statsPort}}
	if l.isSet("proxyAdminPort") && !l.isSet("statsPort") {
		slices.Reverse(ports)
	}
	for _, p := range ports {
		claim(host, p.name, p.name, p.port)
	}
}

// finishWorkload checks that the workload has an identity.
func (l *loader) finishWorkload() {
	w := l.cfg.Proxy.Workload
	if w == (WorkloadInfo{}) {
		return // not set, or reported
	}
	td, err := parseTrustDomain(l.cfg.CA.DefaultTrustDomain)
	if err != nil {
		td = spiffeid.RequireTrustDomainFromString("cluster.local") // the other is reported
	}
	if _, err := ca.NewIdentity(td, w.Namespace, w.ServiceAccount); err != nil {
		l.problem(l.values["PROXY_WORKLOAD_INFO"], false,
			fmt.Errorf("%w; namespace and service account must be of letters, digits, dots, dashes and underscores, and not . or .. alone", err))
	}
}

func (l *loader) finishState() {
	c := l.cfg
	if l.isSet("LOCAL_XDS_PATH") && l.isSet("LOCAL_XDS") {
		l.configProblem("only one of LOCAL_XDS_PATH and LOCAL_XDS may be set")
	}
	if c.XDS.OnDemand && c.DNS.Enabled {
		l.problems = append(l.problems, errors.New("error parsing proxy config: DNS proxy does not currently support on-demand mode: set ISTIO_META_DNS_CAPTURE=false"))
	}
	// A bad address is a problem, and xDS is not off for it.
	off := c.XDS.Address == "" && len(l.problems) == 0
	if off && !l.isSet("LOCAL_XDS_PATH") && !l.isSet("LOCAL_XDS") {
		l.warn("LOCAL_XDS_PATH", "xDS is off and there is no local file: no workload is known")
	}
	if off && c.XDS.OnDemand {
		l.warn("XDS_ON_DEMAND", "has no effect without XDS_ADDRESS")
	}
}

// finishShared checks what shared mode cannot do.
func (l *loader) finishShared() {
	c := l.cfg
	if c.Proxy.Mode != ModeShared {
		return
	}
	if l.goos != "linux" {
		l.configProblem("in-pod mode is not supported on non-linux platforms: set PROXY_MODE=dedicated and PROXY_WORKLOAD_INFO")
	}
	if l.isSet("PROXY_WORKLOAD_INFO") {
		l.warn("PROXY_WORKLOAD_INFO", "has no effect in shared mode: set PROXY_MODE=dedicated for a proxy of one workload")
	}
	if c.Sockets.Mark == 0 {
		l.warn("PACKET_MARK", "without a mark the rules in the pods redirect the proxy's own connections to itself")
	}
	for _, p := range c.CA.Providers {
		if p.Type == providerSPIREWorkload {
			l.warn("CA_PROVIDER", "%s gives the proxy's own certificate, and none to a pod: in shared mode take %s or %s for pods", p.Name, providerSPIREDelegated, providerSPIREBroker)
		}
	}
}
