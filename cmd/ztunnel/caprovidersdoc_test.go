package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestCAProvidersDoc: docs/ca-providers.md has all settings, its example is
// valid, and the log says what the document quotes.
func TestCAProvidersDoc(t *testing.T) {
	b, err := os.ReadFile("../../docs/ca-providers.md")
	if err != nil {
		t.Fatal(err)
	}
	doc := string(b)
	section := func(begin, end string) string {
		t.Helper()
		_, rest, ok := strings.Cut(doc, begin)
		text, _, also := strings.Cut(rest, end)
		if !ok || !also {
			t.Fatalf("no text between %q and %q", begin, end)
		}
		return text
	}

	var want, got []string
	for _, kind := range providerTypes {
		for _, k := range keysOf(kind) {
			row := "–"
			if k.row != "" {
				row = "`" + k.row + "`"
			}
			want = append(want, kind+" "+k.name+" "+row)
		}
	}
	kind := ""
	for line := range strings.Lines(section("| Type | Key | Variable |\n|---|---|---|\n", "\n\n")) {
		cells := strings.Split(line, "|")
		if c := strings.Trim(cells[1], " `"); c != "" {
			kind = c
		}
		key, _, _ := strings.Cut(strings.Trim(cells[2], " `"), "`")
		got = append(got, kind+" "+key+" "+strings.TrimSpace(cells[3]))
	}
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("settings: got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}

	code, _, stderr := command(t, nil, map[string]string{"/ca.yaml": section("```yaml\n", "```")}, "ca", "validate", "/ca.yaml")
	if code != exitOK || stderr != "" {
		t.Errorf("the example: exit code %d, %s", code, stderr)
	}

	var sources strings.Builder
	for _, dir := range []string{".", "../../ca", "../../internal/istiod"} {
		err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			b, err := os.ReadFile(path)
			sources.Write(b)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	quoted := []string{"the move to the listed certificate providers is complete", "certificates have not moved to their new provider and stay with the old one"}
	for line := range strings.Lines(section("| Provider | The log says | Do |\n|---|---|---|\n", "\n\n")) {
		quoted = append(quoted, strings.Trim(strings.Split(line, "|")[2], " `"))
	}
	for _, text := range quoted {
		if !strings.Contains(sources.String(), text) || text == "" || !strings.Contains(doc, text) {
			t.Errorf("nobody says %q", text)
		}
	}
}
