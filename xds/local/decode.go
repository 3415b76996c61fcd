package local

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// maxErrors bounds how much is said of one file.
const maxErrors = 100

// decoder walks a YAML tree and collects what is wrong with it. It works on
// nodes because decoding into values loses the tags of string matches and the
// lines that errors name.
type decoder struct {
	file   string
	budget int // nodes that may still be visited; aliases can multiply them
	errs   []error
	more   int // errors beyond maxErrors
}

// fail notes an error at a node. path is the way to it through the keys.
func (d *decoder) fail(n *yaml.Node, path, format string, args ...any) {
	if len(d.errs) >= maxErrors {
		d.more++
		return
	}
	where := d.file
	if n != nil && n.Line > 0 {
		where += ":" + strconv.Itoa(n.Line)
	}
	if path != "" {
		where += ": " + path
	}
	d.errs = append(d.errs, fmt.Errorf("%s: %s", where, fmt.Sprintf(format, args...)))
}

// count is how many errors were found so far.
func (d *decoder) count() int { return len(d.errs) + d.more }

func (d *decoder) err() error {
	if d.more > 0 {
		return errors.Join(append(d.errs, fmt.Errorf("%s: %d more errors", d.file, d.more))...)
	}
	return errors.Join(d.errs...)
}

// document returns the root of the only document, nil if there is none.
func (d *decoder) document(data string) *yaml.Node {
	dec := yaml.NewDecoder(strings.NewReader(data))
	var doc, second yaml.Node
	if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
		return nil
	} else if err != nil {
		d.fail(nil, "", "%s", strings.TrimPrefix(err.Error(), "yaml: "))
		return nil
	}
	if err := dec.Decode(&second); err == nil {
		d.fail(&second, "", "a second document: want one")
	} else if !errors.Is(err, io.EOF) {
		d.fail(nil, "", "%s", strings.TrimPrefix(err.Error(), "yaml: "))
	}
	if len(doc.Content) == 0 {
		return nil
	}
	root := doc.Content[0]
	if isNull(root) {
		return nil
	}
	return root
}

// visit follows an alias and charges the budget. It returns nil once that is
// spent.
func (d *decoder) visit(n *yaml.Node, path string) *yaml.Node {
	d.budget--
	if d.budget < 0 {
		if d.budget == -1 {
			d.fail(n, path, "too large: aliases multiply its content")
		}
		return nil
	}
	if n.Kind == yaml.AliasNode {
		return n.Alias
	}
	return n
}

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" }

// found says in an error what stands where something else was wanted.
func found(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	case yaml.ScalarNode:
		if isNull(n) {
			return "nothing"
		}
		return strconv.Quote(n.Value)
	}
	return "something else"
}

// entry is a key of a mapping with its value.
type entry struct {
	key, value *yaml.Node
}

// entries returns a mapping whose keys are scalars and stand there once.
func (d *decoder) entries(n *yaml.Node, path string) ([]entry, bool) {
	if n = d.visit(n, path); n == nil {
		return nil, false
	}
	if n.Kind != yaml.MappingNode {
		d.fail(n, path, "got %s, want a mapping", found(n))
		return nil, false
	}
	seen := map[string]bool{}
	var list []entry
	for i := 0; i+1 < len(n.Content); i += 2 {
		key := d.visit(n.Content[i], path)
		if key == nil {
			return nil, false
		}
		if key.Kind != yaml.ScalarNode {
			d.fail(key, path, "got %s as a key, want a string", found(key))
			continue
		}
		if seen[key.Value] {
			d.fail(key, join(path, key.Value), "duplicate key")
			continue
		}
		seen[key.Value] = true
		list = append(list, entry{key, n.Content[i+1]})
	}
	return list, true
}

// object is a mapping with known keys.
type object struct {
	d      *decoder
	node   *yaml.Node
	path   string
	fields map[string]*yaml.Node // without those that are null
}

// object checks the keys of a mapping. With ok == false there is none.
func (d *decoder) object(n *yaml.Node, path string, required, optional []string) (o *object, ok bool) {
	entries, ok := d.entries(n, path)
	if !ok {
		return nil, false
	}
	o = &object{d: d, node: n, path: path, fields: map[string]*yaml.Node{}}
	for _, e := range entries {
		key := e.key.Value
		if !slices.Contains(required, key) && !slices.Contains(optional, key) {
			allowed := slices.Sorted(slices.Values(slices.Concat(required, optional)))
			d.fail(e.key, join(path, key), "unknown key, want one of %s", strings.Join(allowed, ", "))
			continue
		}
		if v := d.visit(e.value, path); v != nil && !isNull(v) {
			o.fields[key] = v
		}
	}
	for _, key := range required {
		if o.fields[key] == nil {
			d.fail(n, path, "missing key %s", key)
		}
	}
	return o, true
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

func (o *object) at(key string) string { return join(o.path, key) }

func (o *object) fail(key, format string, args ...any) {
	o.d.fail(o.fields[key], o.at(key), format, args...)
}

// str returns a string; "" without the key.
func (o *object) str(key string) string {
	n := o.fields[key]
	if n == nil {
		return ""
	}
	s, _ := o.d.str(n, o.at(key))
	return s
}

func (d *decoder) str(n *yaml.Node, path string) (string, bool) {
	if n = d.visit(n, path); n == nil {
		return "", false
	}
	if n.Kind == yaml.ScalarNode {
		switch n.ShortTag() {
		case "!!str", "!!timestamp":
			return n.Value, true
		case "!!int", "!!float", "!!bool":
			d.fail(n, path, "got %s, want a string: put it in quotes", n.Value)
			return "", false
		}
	}
	d.fail(n, path, "got %s, want a string", found(n))
	return "", false
}

// boolean returns a bool; false without the key.
func (o *object) boolean(key string) bool {
	n := o.fields[key]
	if n == nil {
		return false
	}
	if n.Kind == yaml.ScalarNode && n.ShortTag() == "!!bool" {
		switch strings.ToLower(n.Value) {
		case "true":
			return true
		case "false":
			return false
		}
	}
	o.fail(key, "got %s, want true or false", found(n))
	return false
}

// number returns an unsigned number of that many bits; otherwise without the key.
func (o *object) number(key string, bits int, otherwise uint64) uint64 {
	n := o.fields[key]
	if n == nil {
		return otherwise
	}
	return o.d.number(n, o.at(key), bits)
}

func (d *decoder) number(n *yaml.Node, path string, bits int) uint64 {
	if n = d.visit(n, path); n == nil {
		return 0
	}
	if n.Kind == yaml.ScalarNode && n.ShortTag() == "!!int" {
		if v, err := strconv.ParseUint(n.Value, 10, bits); err == nil {
			return v
		}
	}
	d.fail(n, path, "got %s, want a number from 0 to %d", found(n), uint64(1)<<bits-1)
	return 0
}

// named is a value of an enumeration.
type named[T any] struct {
	name  string
	value T
}

// choice returns a value of an enumeration, the zero value without the key.
func choice[T any](o *object, key string, choices ...named[T]) T {
	var zero T
	n := o.fields[key]
	if n == nil {
		return zero
	}
	return choose(o.d, n, o.at(key), choices...)
}

func choose[T any](d *decoder, n *yaml.Node, path string, choices ...named[T]) T {
	var zero T
	if n = d.visit(n, path); n == nil {
		return zero
	}
	names := make([]string, len(choices))
	for i, c := range choices {
		if n.Kind == yaml.ScalarNode && n.Value == c.name {
			return c.value
		}
		names[i] = c.name
	}
	d.fail(n, path, "got %s, want one of %s", found(n), strings.Join(names, ", "))
	return zero
}

// list maps a list; without the key it is nil.
func list[T any](o *object, key string, f func(n *yaml.Node, path string) (T, bool)) []T {
	n := o.fields[key]
	if n == nil {
		return nil
	}
	return items(o.d, n, o.at(key), f)
}

func items[T any](d *decoder, n *yaml.Node, path string, f func(n *yaml.Node, path string) (T, bool)) []T {
	if n = d.visit(n, path); n == nil {
		return nil
	}
	if n.Kind != yaml.SequenceNode {
		d.fail(n, path, "got %s, want a list", found(n))
		return nil
	}
	out := make([]T, 0, len(n.Content))
	for i, item := range n.Content {
		if d.budget < 0 {
			break
		}
		if v, ok := f(item, path+"["+strconv.Itoa(i)+"]"); ok {
			out = append(out, v)
		}
	}
	return out
}
