package main

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/ztunnel-go/ztunnel/ca/router"
)

// caFile is the content of CA_CONFIG.
type caFile struct {
	entries []caEntry
	routes  []router.Rule
}

// caEntry is one provider of the file, and the settings that the file gives it,
// by key.
type caEntry struct {
	ProviderConfig
	given map[string]caGiven
}

// caGiven is a setting as the file has it, fit to be shown.
type caGiven struct {
	line int
	text string
}

func (f *caFile) configs() []ProviderConfig {
	out := make([]ProviderConfig, 0, len(f.entries))
	for _, e := range f.entries {
		out = append(out, e.ProviderConfig)
	}
	return out
}

// parseCAFile reads the text of base.CA.ConfigFile. What a provider does not set
// it inherits from base. The error joins all problems, each with file and line.
func parseCAFile(base *Config, text []byte, readFile func(string) ([]byte, error)) (*caFile, error) {
	d := &caDecoder{file: base.CA.ConfigFile, base: base, readFile: readFile}
	root := d.document(text)
	if root == nil {
		if len(d.problems) == 0 {
			d.fail(nil, "", "the file is empty: it must list providers")
		}
		return nil, errors.Join(d.problems...)
	}
	f := &caFile{}
	places := map[int]*yaml.Node{} // of routes
	for _, e := range d.entries(root, "") {
		switch e.key.Value {
		case "providers":
			f.entries = d.providers(e.value)
		case "routes":
			f.routes, places = d.routes(e.value)
		default:
			d.fail(e.key, e.key.Value, "unknown key: must be providers or routes")
		}
	}
	if f.entries == nil && len(d.problems) == 0 {
		d.fail(root, "providers", "at least one provider must be listed")
	}
	if len(d.problems) > 0 {
		return nil, errors.Join(d.problems...)
	}
	names := make([]string, 0, len(f.entries))
	for _, e := range f.entries {
		names = append(names, e.Name)
	}
	if err := router.Check(names, f.routes, func(i int) string { return d.place(places[i], fmt.Sprintf("routes[%d]", i)) }); err != nil {
		return nil, err
	}
	return f, nil
}

// caDecoder walks the YAML tree and collects what is wrong with it.
type caDecoder struct {
	file     string
	base     *Config
	readFile func(string) ([]byte, error)
	problems []error
}

type caPair struct{ key, value *yaml.Node }

func (d *caDecoder) place(n *yaml.Node, path string) string {
	where := d.file
	if n != nil && n.Line > 0 {
		where += ":" + strconv.Itoa(n.Line)
	}
	if path != "" {
		where += ": " + path
	}
	return where
}

func (d *caDecoder) fail(n *yaml.Node, path, format string, args ...any) {
	d.problems = append(d.problems, fmt.Errorf("%s: %w", d.place(n, path), fmt.Errorf(format, args...)))
}

// document returns the root of the only document, nil if there is none.
func (d *caDecoder) document(text []byte) *yaml.Node {
	dec := yaml.NewDecoder(bytes.NewReader(text))
	var doc, second yaml.Node
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		return nil
	case err != nil:
		d.fail(nil, "", "%s", strings.TrimPrefix(err.Error(), "yaml: "))
		return nil
	}
	if err := dec.Decode(&second); !errors.Is(err, io.EOF) {
		d.fail(&second, "", "a second document: want one")
		return nil
	}
	if len(doc.Content) == 0 || doc.Content[0].Tag == "!!null" {
		return nil
	}
	return doc.Content[0]
}

// entries are those of a mapping. Keys that stand twice are reported.
func (d *caDecoder) entries(n *yaml.Node, path string) []caPair {
	if n.Kind != yaml.MappingNode {
		d.fail(n, path, "got %s, want a mapping", kindOf(n))
		return nil
	}
	var pairs []caPair
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		switch {
		case key.Kind != yaml.ScalarNode || key.Tag != "!!str":
			d.fail(key, path, "got %s as a key, want a string", kindOf(key))
		case slices.ContainsFunc(pairs, func(p caPair) bool { return p.key.Value == key.Value }):
			d.fail(key, at(path, key.Value), "duplicate key")
		default:
			pairs = append(pairs, caPair{key, value})
		}
	}
	return pairs
}

func at(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

func kindOf(n *yaml.Node) string {
	switch {
	case n.Kind == yaml.MappingNode:
		return "a mapping"
	case n.Kind == yaml.SequenceNode:
		return "a list"
	case n.Kind == yaml.AliasNode:
		return "an alias, which is not supported here"
	case n.Tag == "!!null":
		return "nothing"
	case n.Tag == "!!str":
		return "a string"
	case n.Tag == "!!bool":
		return "a bool"
	case n.Tag == "!!int", n.Tag == "!!float":
		return "a number"
	}
	return "something else (" + n.Tag + ")"
}

// str takes a string. That it is none is reported.
func (d *caDecoder) str(n *yaml.Node, path string) (string, bool) {
	if n.Kind != yaml.ScalarNode || n.Tag != "!!str" {
		hint := ""
		if n.Kind == yaml.ScalarNode && n.Tag != "!!null" {
			hint = ": quote it"
		}
		d.fail(n, path, "got %s, want a string%s", kindOf(n), hint)
		return "", false
	}
	return n.Value, true
}

// items are the elements of a list.
func (d *caDecoder) items(n *yaml.Node, path string) []*yaml.Node {
	if n.Kind != yaml.SequenceNode {
		d.fail(n, path, "got %s, want a list", kindOf(n))
		return nil
	}
	return n.Content
}

func (d *caDecoder) providers(n *yaml.Node) []caEntry {
	var entries []caEntry
	lines := map[string]int{} // by name
	for i, item := range d.items(n, "providers") {
		path := fmt.Sprintf("providers[%d]", i)
		e, ok := d.provider(item, path)
		if !ok {
			continue
		}
		if line, again := lines[e.Name]; again {
			d.fail(item, path, "name %q: the provider of line %d has it, names must differ", e.Name, line)
			continue
		}
		lines[e.Name] = item.Line
		entries = append(entries, e)
	}
	return entries
}

func (d *caDecoder) provider(n *yaml.Node, path string) (e caEntry, ok bool) {
	before := len(d.problems)
	pairs := d.entries(n, path)
	if n.Kind != yaml.MappingNode {
		return e, false
	}
	e = caEntry{ProviderConfig: ProviderConfig{ProviderSettings: d.base.CA.ProviderSettings}, given: map[string]caGiven{}}
	for _, p := range pairs {
		switch p.key.Value {
		case "name":
			e.Name, _ = d.str(p.value, at(path, "name"))
		case "type":
			e.Type, _ = d.str(p.value, at(path, "type"))
		}
	}
	if len(d.problems) == before {
		d.identify(n, path, &e)
	}
	if len(d.problems) > before {
		return e, false // whose settings they are is not known
	}
	for _, p := range pairs {
		if p.key.Value != "name" && p.key.Value != "type" {
			d.setting(p, path, &e)
		}
	}
	if len(d.problems) == before {
		for _, err := range e.incomplete(d.base.Proxy, func(row string) string { return keyOf(e.Type, row) + " (" + row + ")" }) {
			d.fail(n, path, "%w", err)
		}
	}
	return e, len(d.problems) == before
}

// keyOf is the key that stands for a row of the table.
func keyOf(providerType, row string) string {
	for _, k := range keysOf(providerType) {
		if k.row == row {
			return k.name
		}
	}
	return row
}

// identify checks name and type.
func (d *caDecoder) identify(n *yaml.Node, path string, e *caEntry) {
	const allowed = "abcdefghijklmnopqrstuvwxyz0123456789-_."
	if e.Name == "" || len(e.Name) > 63 || strings.Trim(e.Name, allowed) != "" {
		d.fail(n, at(path, "name"), "%q: must be 1 to 63 lower case letters, digits, dots, dashes and underscores", e.Name)
		return
	}
	if e.Type == "" {
		e.Type = e.Name
	}
	e.Type = canonicalProvider(e.Type)
	if !slices.Contains(providerTypes, e.Type) {
		d.fail(n, at(path, "type"), "unknown provider %q: must be one of %s", e.Type, strings.Join(providerTypes, ", "))
	}
}

// setting takes one setting of a provider.
func (d *caDecoder) setting(p caPair, path string, e *caEntry) {
	keys := keysOf(e.Type)
	i := slices.IndexFunc(keys, func(k providerKey) bool { return k.name == p.key.Value })
	if i < 0 {
		names := []string{"name", "type"}
		for _, k := range keys {
			names = append(names, k.name)
		}
		d.fail(p.key, at(path, p.key.Value), "unknown key of a provider of type %s: must be one of %s", e.Type, strings.Join(names, ", "))
		return
	}
	k := keys[i]
	path = at(path, k.name)
	e.given[k.name] = caGiven{p.key.Line, k.show(p.value)}
	switch {
	case k.row == "":
		d.roots(p.value, path, e)
	case k.table:
		d.headers(p.value, path, e)
	case k.list:
		d.selectors(p.value, path, e)
	default:
		d.scalar(k, p.value, path, e)
	}
}

// show is the value of a setting without its secrets.
func (k providerKey) show(n *yaml.Node) string {
	if k.row != "" && variableOf(k.row).secret {
		return redacted
	}
	if n.Kind == yaml.ScalarNode {
		return n.Value
	}
	var parts []string
	for i, c := range n.Content {
		switch {
		case n.Kind == yaml.SequenceNode:
			parts = append(parts, c.Value)
		case i%2 == 0 && sensitive(c.Value):
			parts = append(parts, c.Value+"="+redacted)
		case i%2 == 0:
			parts = append(parts, c.Value+"="+n.Content[i+1].Value)
		}
	}
	return strings.Join(parts, ",")
}

// scalar sets what one row of the table means. A duration may be a number.
func (d *caDecoder) scalar(k providerKey, n *yaml.Node, path string, e *caEntry) {
	row := variableOf(k.row)
	text := n.Value
	if row.typ != "duration" || n.Kind != yaml.ScalarNode || n.Tag != "!!int" {
		var ok bool
		if text, ok = d.str(n, path); !ok {
			return
		}
	}
	d.apply(row, value{text: text, name: row.name, set: true}, n, path, e)
}

// apply lets a row of the table parse v into e.
func (d *caDecoder) apply(row variable, v value, n *yaml.Node, path string, e *caEntry) {
	scratch := *d.base
	scratch.CA.ProviderSettings = e.ProviderSettings
	l := &loader{cfg: &scratch, readFile: d.readFile}
	if err := row.set(l, v); err != nil {
		shown := strconv.Quote(v.text)
		if row.secret || row.prefix && sensitive(v.name) || errors.Is(err, errUserinfo) {
			shown = redacted
		}
		d.fail(n, path, "%s: %w", shown, err)
		return
	}
	e.ProviderSettings = scratch.CA.ProviderSettings
}

func (d *caDecoder) headers(n *yaml.Node, path string, e *caEntry) {
	e.Headers = nil
	row := variableOf("CA_HEADER_*")
	for _, p := range d.entries(n, path) {
		if text, ok := d.str(p.value, at(path, p.key.Value)); ok {
			d.apply(row, value{text: text, name: "CA_HEADER_" + p.key.Value, set: true}, p.value, at(path, p.key.Value), e)
		}
	}
}

func (d *caDecoder) selectors(n *yaml.Node, path string, e *caEntry) {
	e.Selectors = nil
	for i, item := range d.items(n, path) {
		path := fmt.Sprintf("%s[%d]", path, i)
		text, ok := d.str(item, path)
		if !ok {
			continue
		}
		if err := checkSelectors([]string{text}); err != nil {
			d.fail(item, path, "%w", err)
			continue
		}
		e.Selectors = append(e.Selectors, text)
	}
}

// roots takes the path of a PEM file, which must hold a certificate now.
func (d *caDecoder) roots(n *yaml.Node, path string, e *caEntry) {
	file, ok := d.str(n, path)
	if !ok {
		return
	}
	b, err := d.readFile(file)
	if err != nil {
		d.fail(n, path, "%w", err)
		return
	}
	found := 0
	for block, rest := pem.Decode(b); block != nil; block, rest = pem.Decode(rest) {
		if _, err := x509.ParseCertificate(block.Bytes); block.Type != "CERTIFICATE" || err != nil {
			d.fail(n, path, "%q: PEM block %d is no certificate: must be a file of certificates in PEM", file, found+1)
			return
		}
		found++
	}
	if found == 0 {
		d.fail(n, path, "%q: must be a file of certificates in PEM, and has none", file)
		return
	}
	e.Roots = file
}

func (d *caDecoder) routes(n *yaml.Node) ([]router.Rule, map[int]*yaml.Node) {
	var rules []router.Rule
	places := map[int]*yaml.Node{}
	for i, item := range d.items(n, "routes") {
		path := fmt.Sprintf("routes[%d]", i)
		before := len(d.problems)
		var namespace, domain, provider string
		for _, p := range d.entries(item, path) {
			field := map[string]*string{"namespace": &namespace, "trustDomain": &domain, "provider": &provider}[p.key.Value]
			if field == nil {
				d.fail(p.key, at(path, p.key.Value), "unknown key: must be namespace, trustDomain or provider")
				continue
			}
			if s, ok := d.str(p.value, at(path, p.key.Value)); ok && s == "" {
				d.fail(p.value, at(path, p.key.Value), "must not be empty")
			} else {
				*field = s
			}
		}
		if len(d.problems) > before {
			continue
		}
		if provider == "" {
			d.fail(item, path, "missing key provider")
			continue
		}
		rule, err := router.NewRule(namespace, domain, provider)
		if err != nil {
			d.fail(item, path, "%w", err)
			continue
		}
		places[len(rules)] = item
		rules = append(rules, rule)
	}
	return rules, places
}
