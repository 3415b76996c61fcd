package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// writeYAML writes v as YAML with the names and the order of its JSON.
func writeYAML(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(b, &doc); err != nil { // JSON is YAML
		return fmt.Errorf("write as YAML: %w", err)
	}
	blockStyle(&doc)
	enc := yaml.NewEncoder(w)
	enc.SetIndent(2)
	enc.CompactSeqIndent()
	if err := enc.Encode(&doc); err != nil {
		return err
	}
	return enc.Close()
}

// blockStyle takes JSON's braces and quotes away; the encoder quotes what needs
// it.
func blockStyle(n *yaml.Node) {
	n.Style = 0
	for _, c := range n.Content {
		blockStyle(c)
	}
}

// table lays out rows under each other as istioctl does: five spaces between
// columns, none behind the last. It keeps the widths, so that rows which are
// written later stand under those written before, unless they are wider.
type table struct {
	widths []int
}

// write writes rows. paint, if not nil, may change a line that is laid out.
func (t *table) write(w io.Writer, rows [][]string, paint func(row int, line string) string) error {
	const gap = 5
	for _, row := range rows {
		for i, cell := range row {
			if i == len(t.widths) {
				t.widths = append(t.widths, 0)
			}
			t.widths[i] = max(t.widths[i], utf8.RuneCountInString(cell)+gap)
		}
	}
	var b bytes.Buffer
	for n, row := range rows {
		var line strings.Builder
		for i, cell := range row {
			line.WriteString(cell)
			if i < len(row)-1 {
				line.WriteString(strings.Repeat(" ", t.widths[i]-utf8.RuneCountInString(cell)))
			}
		}
		text := line.String()
		if paint != nil {
			text = paint(n, text)
		}
		b.WriteString(text)
		b.WriteByte('\n')
	}
	_, err := w.Write(b.Bytes())
	return err
}

// cell makes s one printable line: what is shown may come from a file or from
// another program, and must not steer the terminal.
func cell(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, s)
}

// isTerminal reports whether w is a terminal, or another character device.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// noColor reports whether the user wants no colours (no-color.org).
func (a *app) noColor() bool {
	return slices.ContainsFunc(a.environ, func(kv string) bool {
		v, ok := strings.CutPrefix(kv, "NO_COLOR=")
		return ok && v != ""
	})
}
