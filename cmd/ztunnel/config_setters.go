package main

import (
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/router"
	"github.com/ztunnel-go/ztunnel/internal/zlog"
)

const (
	defaultRootFile  = "./var/run/secrets/istio/root-cert.pem"
	defaultTokenFile = "./var/run/secrets/tokens/istio-token"
)

// The provider names of CA_PROVIDER.
const (
	providerIstio          = "istio"
	providerLocal          = "local"
	providerSPIREDelegated = "spire-delegated"
	providerSPIREBroker    = "spire-broker"
	providerSPIREWorkload  = "spire-workload"
)

// setClusterID lets ISTIO_META_CLUSTER_ID win, as the reference does; the two
// are no aliases, since charts set both.
func setClusterID(l *loader, v value) error {
	l.cfg.Proxy.ClusterID = v.text
	if id, ok := l.env["ISTIO_META_CLUSTER_ID"]; ok {
		l.cfg.Proxy.ClusterID = id
	}
	return nil
}

func setGracePeriod(l *loader, v value) error {
	const most = 365 * 24 * 3600
	s, err := parseUint(v.text, 0, most)
	if err != nil {
		return err
	}
	if s > 10 {
		s -= 5
	} else {
		s = max(s, 2) - 1
	}
	l.grace = time.Duration(s) * time.Second
	return nil
}

// setWorkerThreads only checks: the CPUs are known at the end.
func setWorkerThreads(l *loader, v value) error {
	_, err := parseThreads(v.text, l.cpus)
	return err
}

// providerTypes are the names of CA_PROVIDER.
var providerTypes = []string{providerIstio, providerSPIREDelegated, providerSPIREBroker, providerSPIREWorkload, providerLocal}

// canonicalProvider maps the names that other implementations use to ours.
func canonicalProvider(name string) string {
	switch name {
	case "istio_ca":
		return providerIstio
	case "spiffe_broker":
		return providerSPIREBroker
	}
	return name
}

func setProviders(l *loader, v value) error {
	var out []string
	for p := range strings.SplitSeq(v.text, ",") {
		p = canonicalProvider(strings.TrimSpace(p))
		if !slices.Contains(providerTypes, p) {
			return fmt.Errorf("unknown provider %q: must be one of %s", p, strings.Join(providerTypes, ", "))
		}
		if slices.Contains(out, p) {
			return fmt.Errorf("provider %q stands twice", p)
		}
		out = append(out, p)
	}
	l.providers = out
	return nil
}

// parseRoutes reads CA_ROUTES, in which providers go by the names of CA_PROVIDER.
func parseRoutes(s string) ([]router.Rule, error) {
	if s == "" {
		return nil, nil
	}
	rules, err := router.Parse(s)
	for i := range rules {
		rules[i].Provider = canonicalProvider(rules[i].Provider)
	}
	return rules, err
}

// parseTrustDomain takes the name of a trust domain and nothing else: of the ID
// of a workload, which go-spiffe takes too, the path would be lost.
func parseTrustDomain(s string) (spiffeid.TrustDomain, error) {
	td, err := spiffeid.TrustDomainFromString(s)
	if err == nil && td.Name() != s {
		err = errors.New("must be the name of a trust domain alone, as in cluster.local, and no URI")
	}
	if err != nil {
		return spiffeid.TrustDomain{}, fmt.Errorf("%q: %w", s, err)
	}
	return td, nil
}

func setTrustDomain(l *loader, v value) error {
	td, err := parseTrustDomain(v.text)
	if err != nil {
		return err
	}
	l.cfg.CA.DefaultTrustDomain = td.Name()
	return nil
}

func setTrustDomainAliases(l *loader, v value) error {
	names, _ := list(v.text)
	for _, n := range names {
		td, err := parseTrustDomain(n)
		if err != nil {
			return err
		}
		l.cfg.CA.TrustDomainAliases = append(l.cfg.CA.TrustDomainAliases, td.Name())
	}
	return nil
}

// defaultControlPlane is where istiod is expected.
func (l *loader) defaultControlPlane() string {
	if _, ok := l.env["KUBERNETES_SERVICE_HOST"]; ok {
		return "https://istiod.istio-system.svc:15012"
	}
	return "https://localhost:15012"
}

func setCAAddress(l *loader, v value) (err error) {
	if !v.set {
		v.text = l.defaultControlPlane()
	}
	if l.cfg.CA.Address, err = parseAddress(v.text); err == nil && strings.HasPrefix(l.cfg.CA.Address, "http://") {
		err = errors.New("invalid uri: http is refused, since token and certificates would cross the network in the clear: want https or unix")
	}
	return err
}

func setXDSAddress(l *loader, v value) (err error) {
	if !v.set {
		v.text = l.defaultControlPlane()
		if f, ok := l.proxy.fields["discoveryAddress"]; ok {
			l.cfg.XDS.Address, _ = parseXDSAddress(f.text) // checked by its own row
			return nil
		}
	}
	l.cfg.XDS.Address, err = parseXDSAddress(v.text)
	return err
}

// setRoot tells the path of a file from PEM text by its looks, not by whether the
// file is there: it may come later.
func setRoot(field func(*Config) *RootCert) func(*loader, value) error {
	return func(l *loader, v value) error {
		switch {
		case strings.Contains(v.text, "-----BEGIN"):
			if !x509.NewCertPool().AppendCertsFromPEM([]byte(v.text)) {
				return errors.New("the PEM text holds no certificate that can be read")
			}
			*field(l.cfg) = RootCert{Inline: v.text}
		case v.text == "SYSTEM":
			*field(l.cfg) = RootCert{}
		case !v.set || l.exists(v.text) || strings.ContainsAny(v.text, "/.") && !strings.ContainsAny(v.text, "\n\x00"):
			*field(l.cfg) = RootCert{File: v.text}
		default:
			return errors.New("must be the path of a file, SYSTEM, or PEM text; a file that is not there yet needs a / or a . in its path")
		}
		return nil
	}
}

func setToken(l *loader, v value) error {
	l.cfg.CA.Token = TokenSource{}
	switch {
	case !v.set && l.exists(defaultTokenFile):
		l.cfg.CA.Token.File = defaultTokenFile
	case v.set && (l.exists(v.text) || strings.HasPrefix(v.text, "/") || strings.HasPrefix(v.text, "./") || strings.HasPrefix(v.text, "../")):
		l.cfg.CA.Token.File = v.text // it may come later
	case v.set:
		l.cfg.CA.Token.Token = v.text
	}
	return nil
}

func setHeader(prefix string, field func(*Config) *[]HeaderField) func(*loader, value) error {
	return func(l *loader, v value) error {
		name := strings.ToLower(strings.TrimPrefix(v.name, prefix))
		if !validHeaderName(name) || strings.HasPrefix(name, "grpc-") {
			return fmt.Errorf("failed to parse header key: %s", v.name)
		}
		if !validHeaderValue(v.text) {
			return errors.New("failed to parse header value: control characters are not allowed")
		}
		*field(l.cfg) = append(*field(l.cfg), HeaderField{Name: name, Value: v.text})
		return nil
	}
}

// setChoice is for a choice of two words: field becomes true for the second.
func setChoice(no, yes string, field func(*Config) *bool) func(*loader, value) error {
	return func(l *loader, v value) error {
		s, err := oneOf(no, yes)(v.text)
		*field(l.cfg) = s == yes
		return err
	}
}

// setTrueOnly is for a switch that knows one value; others are ignored with a
// warning.
func setTrueOnly(field func(*Config) *bool) func(*loader, value) error {
	return func(l *loader, v value) error {
		*field(l.cfg) = v.text == "true"
		if v.text != "true" && v.text != "false" && v.text != "" {
			l.warn(v.name, "%q has no effect: only true turns it on", v.text)
		}
		return nil
	}
}

func setAuthzLogging(l *loader, v value) error {
	return setTrueOnly(func(c *Config) *bool { return &c.Authz.InfoLogging })(l, v)
}

func setTLS12(l *loader, v value) error {
	return setTrueOnly(func(c *Config) *bool { return &c.TLS.AllowTLS12 })(l, v)
}

func setCompliance(l *loader, v value) error {
	switch v.text {
	case "":
	case "pqc":
		if !ca.HasPostQuantum() {
			return fmt.Errorf("the crypto provider %s of this build has no X25519MLKEM768: take a build with CRYPTO=go or CRYPTO=fips140", ca.CryptoProvider())
		}
		l.cfg.TLS.PostQuantum = true
	case "fips-140-2", "fips-140-3":
		l.cfg.TLS.FIPSRequested = true
		if !ca.FIPS() {
			l.warn(v.name, "%s asks for a FIPS module, which is not active here (crypto provider %s): take a build with CRYPTO=fips140 or CRYPTO=boring", v.text, ca.CryptoProvider())
		}
	default:
		l.warn(v.name, "%q has no effect: known are pqc, fips-140-2, fips-140-3", v.text)
	}
	return nil
}

// setDNSCapture follows the reference: present means on only for "true", in any
// case of letters.
func setDNSCapture(l *loader, v value) error {
	l.cfg.DNS.Enabled = strings.EqualFold(v.text, "true")
	if !l.cfg.DNS.Enabled && !strings.EqualFold(v.text, "false") {
		l.warn(v.name, "%q turns the DNS proxy off: only true leaves it on", v.text)
	}
	return nil
}

func setDNSAddr(l *loader, v value) error {
	addr, err := parseBindAddr(v.text)
	if err != nil {
		return fmt.Errorf("failed to parse DNS_PROXY_ADDR: %s (%w)", v.text, err)
	}
	if !addr.Localhost && !addr.Addr.Addr().IsLoopback() {
		return errors.New("must be a loopback address: on any other the DNS proxy would answer strangers")
	}
	l.cfg.DNS.Addr = addr
	return nil
}

func parseBindAddr(s string) (BindAddr, error) {
	if port, ok := strings.CutPrefix(s, "localhost:"); ok {
		n, err := number[uint16](1, maxU16)(port)
		if err != nil {
			return BindAddr{}, fmt.Errorf("port %w", err)
		}
		return BindAddr{Localhost: true, Port: n}, nil
	}
	ap, err := netip.ParseAddrPort(s)
	if err != nil || ap.Port() == 0 {
		return BindAddr{}, errors.New("must be localhost:port or ip:port")
	}
	return BindAddr{Addr: netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())}, nil
}

// readinessPort is where the probes of the charts look.
const readinessPort = 15021

func setReadinessAddr(l *loader, v value) error {
	if ip, err := netip.ParseAddr(v.text); err == nil {
		l.readiness = netip.AddrPortFrom(ip.Unmap(), readinessPort)
		return nil
	}
	ap, err := netip.ParseAddrPort(v.text)
	if err != nil || ap.Port() == 0 {
		return errors.New("must be an IP address or ip:port")
	}
	l.readiness = netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	return nil
}

func setLogFilter(l *loader, v value) error {
	l.cfg.Log.Filter = v.text
	if v.text == "" {
		l.cfg.Log.Filter = "info"
	}
	_, err := zlog.New(zlog.Config{Out: io.Discard, Sync: true, Filter: v.text})
	return err
}

func setLogFormat(l *loader, v value) error {
	l.cfg.Log.JSON = v.text == "json"
	if v.text != "json" && v.text != "plain" && v.text != "" {
		l.warn(v.name, "%q has no effect: known are json and plain", v.text)
	}
	return nil
}

func setMetadataJSON(l *loader, v value) error {
	if !json.Valid([]byte(v.text)) {
		l.warn(v.name, "the value is not JSON and is skipped")
		return nil
	}
	if l.cfg.Proxy.MetadataJSON == nil {
		l.cfg.Proxy.MetadataJSON = map[string]string{}
	}
	l.cfg.Proxy.MetadataJSON[strings.TrimPrefix(v.name, "ISTIO_METAJSON_")] = v.text
	return nil
}
