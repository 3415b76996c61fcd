package istiod

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestReadToken: whatever may stand where the token should.
func TestReadToken(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, path, want, err string }{
		{name: "ordinary", path: file("ordinary", "jwt"), want: "jwt"},
		{name: "newline", path: file("newline", "jwt\n"), want: "jwt"},
		{name: "largest", path: file("largest", strings.Repeat("a", maxToken)), want: strings.Repeat("a", maxToken)},
		{name: "empty", path: file("empty", ""), err: "token file exists, but was empty"},
		{name: "blank", path: file("blank", " \n\t"), err: "token file exists, but was empty"},
		{name: "two lines", path: file("two", "jwt\njwt"), err: "byte 3 (0x0a) is not allowed"},
		{name: "not ASCII", path: file("utf8", "jwt\u00e9"), err: "is not allowed in a header"},
		{name: "too large", path: file("large", strings.Repeat("a", maxToken+1)), err: "more than 65536 bytes"},
		{name: "missing", path: filepath.Join(dir, "missing"), err: "no such file"},
		{name: "directory", path: dir, err: "no regular file"},
		{name: "pipe", path: pipe, err: "no regular file"},
		{name: "endless", path: "/dev/zero", err: "no regular file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := readToken(tt.path)
			if tt.err == "" {
				if err != nil || got != tt.want {
					t.Errorf("got %.20q, %v, want %.20q", got, err, tt.want)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.err) || !strings.Contains(err.Error(), tt.path) {
				t.Errorf("got %v, want %q with the path", err, tt.err)
			}
			if err != nil && strings.Contains(err.Error(), "jwt") {
				t.Errorf("%q shows the token", err)
			}
		})
	}
}
