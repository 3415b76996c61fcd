package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/ztunnel-go/ztunnel/ca/router"
)

// providerKey is one setting of a provider in CA_CONFIG. Where a row of the
// table is named, the setting means what that row means, and is the row's when
// the file does not have it.
type providerKey struct {
	name  string
	row   string // "" = in the file only
	types []string
	list  bool // of strings
	table bool // of strings by name
	doc   string
}

var spireTypes = []string{providerSPIREDelegated, providerSPIREBroker, providerSPIREWorkload}

// providerKeys are the settings of each type of provider.
var providerKeys = []providerKey{
	{name: "address", row: "CA_ADDRESS", types: []string{providerIstio}},
	{name: "rootCA", row: "CA_ROOT_CA", types: []string{providerIstio}},
	{name: "altHostname", row: "ALT_CA_HOSTNAME", types: []string{providerIstio}},
	{name: "headers", row: "CA_HEADER_*", types: []string{providerIstio}, table: true},
	{name: "authToken", row: "AUTH_TOKEN", types: []string{providerIstio}},
	{name: "certSigner", row: "CA_CERT_SIGNER", types: []string{providerIstio}},
	{name: "roots", types: []string{providerIstio}, doc: "A PEM file with the roots of the CA's certificates, in place of what the CA answers."},
	{name: "dir", row: "CA_LOCAL_DIR", types: []string{providerLocal}},
	{name: "secretTTL", row: "SECRET_TTL", types: []string{providerIstio, providerLocal}},
	{name: "requestTimeout", row: "CA_REQUEST_TIMEOUT", types: []string{providerIstio, providerLocal}},
	{name: "adminEndpointSocket", row: "SPIRE_ADMIN_ENDPOINT_SOCKET", types: []string{providerSPIREDelegated}},
	{name: "reference", row: "SPIRE_REFERENCE", types: []string{providerSPIREDelegated}},
	{name: "selectors", row: "SPIRE_SELECTORS", types: []string{providerSPIREDelegated}, list: true},
	{name: "bundleResync", row: "SPIRE_BUNDLE_RESYNC", types: []string{providerSPIREDelegated}},
	{name: "timeout", row: "SPIRE_TIMEOUT", types: []string{providerSPIREDelegated, providerSPIREWorkload}},
	{name: "socket", row: "SPIFFE_BROKER_SOCKET", types: []string{providerSPIREBroker}},
	{name: "workloadAPISocket", row: "SPIFFE_BROKER_WORKLOAD_API_SOCKET", types: []string{providerSPIREBroker}},
	{name: "workloadAPISPIFFEID", row: "SPIFFE_BROKER_WORKLOAD_API_SPIFFE_ID", types: []string{providerSPIREBroker}},
	{name: "attestation", row: "SPIFFE_BROKER_ATTESTATION", types: []string{providerSPIREBroker}},
	{name: "timeout", row: "SPIFFE_BROKER_TIMEOUT", types: []string{providerSPIREBroker}},
	{name: "endpointSocket", row: "SPIFFE_ENDPOINT_SOCKET", types: []string{providerSPIREWorkload}},
	{name: "withdrawGrace", row: "SVID_WITHDRAW_GRACE", types: spireTypes},
}

// keysOf are the settings of one type.
func keysOf(providerType string) []providerKey {
	var keys []providerKey
	for _, k := range providerKeys {
		if slices.Contains(k.types, providerType) {
			keys = append(keys, k)
		}
	}
	return keys
}

// variableOf finds a row of the table.
func variableOf(name string) variable {
	for _, g := range configTable {
		for _, v := range g.vars {
			if v.name == name {
				return v
			}
		}
	}
	panic("no row " + name) // providerKeys names it
}

// names are those of the listed providers, in order.
func (c *CAConfig) names() []string {
	names := make([]string, 0, len(c.Providers))
	for _, p := range c.Providers {
		names = append(names, p.Name)
	}
	return names
}

// incomplete says what a provider lacks of its own settings and of those of the
// proxy. setting names one of its settings as the operator knows it.
func (p ProviderConfig) incomplete(proxy ProxyConfig, setting func(row string) string) []error {
	var problems []error
	lacks := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	byPID := false
	switch p.Type {
	case providerIstio:
		if p.Address == "" {
			lacks("%s is empty: the provider istio needs the address of a CA", setting("CA_ADDRESS"))
		}
	case providerSPIREDelegated:
		byPID = p.ByPID
	case providerSPIREBroker:
		byPID = p.BrokerByPID
		if p.BrokerSocket == "" {
			lacks("%s is not set: the provider spire-broker needs it", setting("SPIFFE_BROKER_SOCKET"))
		}
		if p.BrokerWorkloadAPI == "" && p.EndpointSocket == "" {
			lacks("%s is not set, nor is SPIFFE_ENDPOINT_SOCKET: the provider spire-broker needs one of them", setting("SPIFFE_BROKER_WORKLOAD_API_SOCKET"))
		}
		if !byPID && proxy.Mode == ModeDedicated && proxy.PodUID == "" {
			lacks("POD_UID is not set: the provider spire-broker needs it in dedicated mode, unless %s is pid", setting("SPIFFE_BROKER_ATTESTATION"))
		}
		if byPID && strings.HasPrefix(p.BrokerSocket, "tcp:") {
			lacks("%s is on the network, where a PID means nothing: it must be a unix socket with %s=pid", setting("SPIFFE_BROKER_SOCKET"), setting("SPIFFE_BROKER_ATTESTATION"))
		}
	case providerSPIREWorkload:
		if p.EndpointSocket == "" {
			lacks("%s is not set: the provider spire-workload needs it", setting("SPIFFE_ENDPOINT_SOCKET"))
		}
	}
	row := "SPIRE_REFERENCE"
	if p.Type == providerSPIREBroker {
		row = "SPIFFE_BROKER_ATTESTATION"
	}
	switch {
	case byPID && proxy.Mode == ModeShared:
		lacks("%s=pid needs PROXY_MODE=dedicated: the CNI agent tells no PIDs of pods", setting(row))
	case byPID && proxy.WorkloadPID == 0:
		lacks("%s=pid needs PROXY_WORKLOAD_PID, the PID of a process of the workload, which is not set", setting(row))
	}
	return problems
}

// finishProviders decides who the providers are: CA_CONFIG, or CA_PROVIDER with
// the switches that mean the same, and CA_ROUTES.
func (l *loader) finishProviders() {
	c := l.cfg
	if !l.isSet("SPIFFE_BROKER_WORKLOAD_API_SPIFFE_ID") {
		c.CA.BrokerOwnID = "spiffe://" + c.CA.DefaultTrustDomain + "/ns/istio-system/sa/ztunnel"
		l.show("SPIFFE_BROKER_WORKLOAD_API_SPIFFE_ID", c.CA.BrokerOwnID, "")
	}
	if c.CA.ConfigFile != "" {
		l.providersFromFile()
		return
	}
	if !l.joinSwitches() || l.providers == nil {
		return
	}
	for _, name := range l.providers {
		c.CA.Providers = append(c.CA.Providers, ProviderConfig{Name: name, Type: name, ProviderSettings: c.CA.ProviderSettings})
	}
	if err := router.Check(c.CA.names(), l.routes, nil); err != nil {
		l.problem(l.values["CA_ROUTES"], false, err)
	}
	c.CA.Routes = l.routes
	for _, p := range c.CA.Providers {
		for _, err := range p.incomplete(c.Proxy, func(row string) string { return row }) {
			l.configProblem("%w", err)
		}
	}
}

// joinSwitches joins CA_PROVIDER with FAKE_CA and SPIRE_ENABLED, and reports
// whether they agree.
func (l *loader) joinSwitches() bool {
	explicit := l.values["CA_PROVIDER"]
	on := l.switches()
	if len(on) > 1 {
		l.configProblem("%s contradicts %s", assignment(l.values[on[0].row], false), assignment(l.values[on[1].row], false))
		return false
	}
	for _, s := range on {
		want := []string{s.provider}
		if explicit.set && !slices.Equal(l.providers, want) {
			l.configProblem("%s contradicts %s, which means CA_PROVIDER=%s",
				assignment(explicit, false), assignment(l.values[s.row], false), s.provider)
			return false
		}
		l.providers = want
		l.show("CA_PROVIDER", s.provider, l.values[s.row].origin)
	}
	return true
}

type providerSwitch struct{ row, provider string }

// switches are the variables that mean a provider, and are on.
func (l *loader) switches() (on []providerSwitch) {
	if l.cfg.CA.Fake {
		on = append(on, providerSwitch{"FAKE_CA", providerLocal})
	}
	if l.spire {
		on = append(on, providerSwitch{"SPIRE_ENABLED", providerSPIREDelegated})
	}
	return on
}

// providersFromFile reads CA_CONFIG. Nothing else may choose providers beside it,
// but the default may be spelt out.
func (l *loader) providersFromFile() {
	c, file := l.cfg, l.values["CA_CONFIG"]
	contradicts := func(row string) {
		l.configProblem("%s contradicts %s: the file lists the providers, unset one of them", assignment(l.values[row], false), assignment(file, false))
	}
	if v := l.values["CA_PROVIDER"]; v.set && !slices.Equal(l.providers, []string{providerIstio}) {
		contradicts("CA_PROVIDER")
	}
	if l.values["CA_ROUTES"].text != "" {
		contradicts("CA_ROUTES")
	}
	for _, s := range l.switches() {
		contradicts(s.row)
	}
	b, err := l.readFile(c.CA.ConfigFile)
	if err != nil {
		l.problem(file, false, err)
		return
	}
	if l.caFile, err = parseCAFile(c, b, l.readFile); err != nil {
		l.problems = append(l.problems, unjoin(err)...)
		return
	}
	c.CA.Providers, c.CA.Routes = l.caFile.configs(), l.caFile.routes
	l.show("CA_PROVIDER", strings.Join(c.CA.names(), ","), c.CA.ConfigFile)
}

// unjoin gives the parts of a joined error.
func unjoin(err error) []error {
	if j, ok := errors.AsType[interface {
		error
		Unwrap() []error
	}](err); ok {
		return j.Unwrap()
	}
	return []error{err}
}
