package main

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/ztunnel-go/ztunnel/ca/router"
)

// value is the text of one setting and where it comes from.
type value struct {
	text   string
	origin string // as in Setting.Origin
	name   string // the name under which it was found
	set    bool   // false: text is the default
}

// loader carries one Load. Rows of the table write into cfg; what several rows
// decide together waits in the fields below until finish.
type loader struct {
	cfg      *Config
	env      map[string]string
	readFile func(string) ([]byte, error)
	goos     string
	cpus     int // logical CPUs
	proxy    proxyConfig
	rows     map[string]int // name → index in cfg.settings

	problems []error
	warnings []Warning

	values    map[string]value // by table name, as found
	cpuLimit  int              // ZTUNNEL_CPU_LIMIT, 0 = unset
	cpuQuota  int              // ZTUNNEL_RESOURCE_CPU_LIMIT, 0 = unset
	cpuReq    int              // ZTUNNEL_RESOURCE_CPU_REQUEST, 0 = unset
	grace     time.Duration    // from TERMINATION_GRACE_PERIOD_SECONDS, 0 = unset
	spire     bool             // SPIRE_ENABLED
	providers []string         // CA_PROVIDER, canonical names; nil = invalid
	routes    []router.Rule    // CA_ROUTES
	caFile    *caFile          // CA_CONFIG, nil without or when it is invalid
	adminPort uint16
	statsPort uint16
	readiness netip.AddrPort // READINESS_BIND_ADDRESS, invalid = unset
}

func newLoader(environ []string, readFile func(string) ([]byte, error)) *loader {
	l := &loader{
		cfg:      &Config{},
		env:      make(map[string]string, len(environ)),
		readFile: readFile,
		goos:     runtime.GOOS,
		cpus:     runtime.NumCPU(),
		rows:     map[string]int{},
		values:   map[string]value{},
	}
	for _, kv := range environ {
		name, text, ok := strings.Cut(kv, "=")
		if _, seen := l.env[name]; !ok || seen || !utf8.ValidString(text) {
			continue // not UTF-8 counts as unset
		}
		l.env[name] = text
	}
	return l
}

// load reads every source. It goes on after an error, in order to find them all.
func (l *loader) load() {
	l.loadProxyConfig()
	for _, g := range configTable {
		for _, v := range g.vars {
			if v.prefix {
				l.loadPrefix(g, v)
				continue
			}
			l.loadVariable(g, v)
		}
	}
	l.finish()
}

func (l *loader) loadVariable(g group, v variable) {
	val := l.lookup(v)
	l.values[v.name] = val
	if !val.set && v.def == "" && !v.parseEmpty {
		l.addSetting(g, v, val)
		return
	}
	if err := v.set(l, val); err != nil {
		v.secret = v.secret || errors.Is(err, errUserinfo)
		l.problem(val, v.secret, err)
	}
	l.addSetting(g, v, val)
}

// lookup finds the value of v: environment under its name and aliases, merged
// metadata, field of the proxy configuration, default.
func (l *loader) lookup(v variable) value {
	if v.field {
		if f, ok := l.proxy.fields[v.name]; ok {
			return value{text: f.text, origin: f.origin, name: v.name, set: true}
		}
		return value{text: v.def, origin: originDefault, name: v.name}
	}
	var found []value
	for _, name := range slices.Concat([]string{v.name}, v.aliases) {
		if text, ok := l.env[name]; ok {
			found = append(found, value{text: text, origin: "env " + name, name: name, set: true})
		}
	}
	if len(found) > 0 {
		for _, other := range found[1:] {
			if other.text != found[0].text {
				l.problem(found[0], v.secret, fmt.Errorf("contradicts %s: both name the same setting, set one of them", assignment(other, v.secret)))
			}
		}
		return found[0]
	}
	if f, ok := l.proxy.metadata[v.meta]; ok && v.meta != "" {
		return value{text: f.text, origin: f.origin, name: v.name, set: true}
	}
	return value{text: v.def, origin: originDefault, name: v.name}
}

// loadPrefix reads a family of variables that share a prefix.
func (l *loader) loadPrefix(g group, v variable) {
	base := strings.TrimSuffix(v.name, "*")
	for _, name := range slices.Sorted(maps.Keys(l.env)) {
		if !strings.HasPrefix(name, base) || hasOwnRow(name) {
			continue
		}
		val := value{text: l.env[name], origin: "env " + name, name: name, set: true}
		secret := v.secret || sensitive(name)
		if err := v.set(l, val); err != nil {
			l.problem(val, secret, err)
		}
		row := v
		row.name, row.secret = name, secret
		l.addSetting(g, row, val)
	}
}

// hasOwnRow tells whether the table names the variable outside of a family.
func hasOwnRow(name string) bool {
	for _, g := range configTable {
		for _, v := range g.vars {
			if v.name == name {
				return true
			}
		}
	}
	return false
}

func (l *loader) addSetting(g group, v variable, val value) {
	text := val.text
	if v.secret && text != "" {
		text = redacted
	}
	if v.bulky && text != "" {
		text = fmt.Sprintf("<%d bytes>", len(val.text))
	}
	l.rows[v.name] = len(l.cfg.settings)
	l.cfg.settings = append(l.cfg.settings, Setting{
		Group: g.name, Name: v.name, Type: v.typ, Value: text, Origin: val.origin,
	})
}

// show replaces the displayed value of a row whose effective value is computed.
func (l *loader) show(name, text, origin string) {
	s := &l.cfg.settings[l.rows[name]]
	s.Value = text
	if origin != "" {
		s.Origin = origin
	}
}

func (l *loader) problem(v value, secret bool, err error) {
	if strings.HasPrefix(v.origin, "env ") || v.origin == originDefault {
		l.problems = append(l.problems, fmt.Errorf("invalid env var %s (%w)", assignment(v, secret), err))
		return
	}
	l.problems = append(l.problems, fmt.Errorf("invalid configuration: %s in %s (%w)", assignment(v, secret), v.origin, err))
}

func (l *loader) warn(name, format string, args ...any) {
	l.warnings = append(l.warnings, Warning{Name: name, Text: fmt.Sprintf(format, args...)})
}

// assignment renders NAME=VALUE for a message: secrets hidden, long values cut.
func assignment(v value, secret bool) string {
	const most = 200
	text := v.text
	switch {
	case secret && text != "":
		text = redacted
	case len(text) > most:
		text = strings.ToValidUTF8(text[:most], "") + "…"
	}
	return v.name + "=" + text
}

const (
	originDefault = "default"
	redacted      = "<redacted>"
)

// sensitive tells whether the value under a name of the operator's choice may
// be a secret.
func sensitive(name string) bool {
	name = strings.ToLower(name)
	for _, word := range []string{"auth", "token", "secret", "password", "key", "cookie", "credential"} {
		if strings.Contains(name, word) {
			return true
		}
	}
	return false
}

// exists tells whether a value that may be a path or a literal is a path.
func (l *loader) exists(path string) bool {
	if path == "" || strings.ContainsAny(path, "\n\x00") {
		return false
	}
	_, err := l.readFile(path)
	return err == nil || errors.Is(err, fs.ErrPermission)
}

// isSet tells whether the operator gave a value for a row of the table.
func (l *loader) isSet(name string) bool { return l.values[name].set }
