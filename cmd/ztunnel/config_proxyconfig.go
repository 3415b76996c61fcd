package main

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// meshFile is relative to the working directory, "/" in the image.
const meshFile = "./etc/istio/config/mesh"

const (
	originProxyConfig = "PROXY_CONFIG"
	originMesh        = "mesh file"
)

// proxyConfig is the merged ProxyConfig: each field and each key of the
// metadata with its origin.
type proxyConfig struct {
	fields   map[string]sourced
	metadata map[string]sourced
}

type sourced struct{ text, origin string }

// loadProxyConfig merges the mesh file, PROXY_CONFIG and the ISTIO_META_*
// variables; the later wins, key by key.
func (l *loader) loadProxyConfig() {
	l.proxy = proxyConfig{fields: map[string]sourced{}, metadata: map[string]sourced{}}

	b, err := l.readFile(meshFile)
	if err == nil {
		var mesh struct {
			DefaultConfig yaml.Node `yaml:"defaultConfig"`
		}
		if err = yaml.Unmarshal(b, &mesh); err == nil {
			err = l.proxy.merge(&mesh.DefaultConfig, originMesh)
		}
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		l.problems = append(l.problems, fmt.Errorf("error parsing proxy config: failed parsing mesh config file %s: %w", meshFile, err))
	}

	var doc yaml.Node
	err = yaml.Unmarshal([]byte(l.env["PROXY_CONFIG"]), &doc)
	if err == nil && len(doc.Content) > 0 {
		err = l.proxy.merge(doc.Content[0], originProxyConfig)
	}
	if err != nil {
		l.problems = append(l.problems, fmt.Errorf("error parsing proxy config: failed parsing proxy config env: %w", err))
	}

	l.mergeMetadataEnv()
	l.cfg.Proxy.Metadata = make(map[string]string, len(l.proxy.metadata))
	for name, v := range l.proxy.metadata {
		l.cfg.Proxy.Metadata[name] = v.text
	}
}

// metadataName is the key of the metadata that a name stands for: with the
// prefix or without, or with it several times.
func metadataName(name string) string {
	for {
		short, ok := strings.CutPrefix(name, "ISTIO_META_")
		if !ok {
			return name
		}
		name = short
	}
}

// mergeMetadataEnv takes the ISTIO_META_* variables.
func (l *loader) mergeMetadataEnv() {
	names := map[string]string{} // of the variable, by key
	for _, name := range slices.Sorted(maps.Keys(l.env)) {
		key := metadataName(name)
		if key == name || key == "" {
			continue
		}
		text := l.env[name]
		if first, ok := names[key]; ok {
			if l.env[first] != text {
				l.problem(value{text: text, origin: "env " + name, name: name}, sensitive(key), fmt.Errorf("contradicts %s: both name the metadata %s, set one of them",
					assignment(value{text: l.env[first], name: first}, sensitive(key)), key))
			}
			continue
		}
		names[key] = name
		l.proxy.metadata[key] = sourced{text, "env " + name}
	}
}

// merge takes the fields of one ProxyConfig. Unknown fields are ignored, wrong
// types are errors.
func (p *proxyConfig) merge(n *yaml.Node, origin string) error {
	for n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	if n.Kind == 0 || n.Tag == "!!null" {
		return nil
	}
	if n.Kind != yaml.MappingNode {
		return errors.New("must be an object")
	}
	var problems []error
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, val := n.Content[i].Value, n.Content[i+1]
		if val.Kind == yaml.AliasNode {
			val = val.Alias
		}
		if val.Tag == "!!null" {
			continue
		}
		var want string
		switch key {
		case "discoveryAddress":
			want = "!!str"
		case "proxyAdminPort", "statsPort", "concurrency":
			want = "!!int"
		case "proxyMetadata":
			problems = append(problems, p.mergeMetadata(val, origin))
			continue
		default:
			continue
		}
		if val.Kind != yaml.ScalarNode || val.Tag != want {
			problems = append(problems, fmt.Errorf("%s: must be a %s", key, map[string]string{"!!str": "string", "!!int": "number"}[want]))
			continue
		}
		if want == "!!int" {
			if _, err := parseUint(val.Value, 0, maxU16); err != nil {
				problems = append(problems, fmt.Errorf("%s: %s: %w", key, val.Value, err))
				continue
			}
		}
		p.fields[key] = sourced{val.Value, origin}
	}
	return errors.Join(problems...)
}

// mergeMetadata takes one proxyMetadata. It wins over what is there; within it,
// two values for one key are an error.
func (p *proxyConfig) mergeMetadata(n *yaml.Node, origin string) error {
	if n.Kind != yaml.MappingNode {
		return errors.New("proxyMetadata: must be a map from string to string")
	}
	var problems []error
	names := map[string]string{} // as they stand there, by key
	for i := 0; i+1 < len(n.Content); i += 2 {
		name, val := n.Content[i].Value, n.Content[i+1]
		if val.Kind == yaml.AliasNode {
			val = val.Alias
		}
		if val.Kind != yaml.ScalarNode || val.Tag != "!!str" {
			problems = append(problems, fmt.Errorf("proxyMetadata.%s: must be a string; quote the value", name))
			continue
		}
		key := metadataName(name)
		if key == "" {
			continue
		}
		if first, ok := names[key]; ok {
			if p.metadata[key].text != val.Value {
				problems = append(problems, fmt.Errorf("proxyMetadata.%s contradicts proxyMetadata.%s: both name the metadata %s, set one of them", name, first, key))
			}
			continue
		}
		names[key] = name
		p.metadata[key] = sourced{val.Value, origin}
	}
	return errors.Join(problems...)
}
