package filewatch

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"
)

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func check(t *testing.T, w *Watcher, want bool) {
	t.Helper()
	got, err := w.Check()
	if err != nil || got != want {
		t.Fatalf("Check() = %v, %v, want %v", got, err, want)
	}
}

func TestCheck(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	w := New(path)
	if changed, err := w.Check(); changed || !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("Check() of a missing file = %v, %v", changed, err)
	}
	write(t, path, "one")
	check(t, w, true)
	check(t, w, false)

	write(t, path, "longer")
	check(t, w, true)
	check(t, w, false)

	if err := os.Chtimes(path, time.Time{}, time.Unix(1e9, 0)); err != nil {
		t.Fatal(err)
	}
	check(t, w, true)
	check(t, w, false)

	other := path + ".new"
	write(t, other, "longer")
	if err := os.Chtimes(other, time.Time{}, time.Unix(1e9, 0)); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(other, path); err != nil {
		t.Fatal(err)
	}
	check(t, w, true) // same size and time, another inode
	check(t, w, false)

	saved := path + ".saved"
	if err := os.Rename(path, saved); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Check(); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("Check() of a removed file: %v", err)
	}
	if err := os.Rename(saved, path); err != nil {
		t.Fatal(err)
	}
	check(t, w, false)
}

// A volume of Kubernetes: file → ..data/file, ..data → a directory per version.
func TestCheckDataSwap(t *testing.T) {
	dir := t.TempDir()
	link := func(target, name string) {
		t.Helper()
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, version := range []string{"..v1", "..v2"} {
		if err := os.Mkdir(filepath.Join(dir, version), 0o700); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, version, "file")
		write(t, path, "same size")
		if err := os.Chtimes(path, time.Time{}, time.Unix(1e9, 0)); err != nil {
			t.Fatal(err)
		}
	}
	link("..v1", "..data")
	link("..data/file", "file")
	w := New(filepath.Join(dir, "file"))
	check(t, w, true)
	check(t, w, false)
	link("..v2", "..data_tmp")
	if err := os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")); err != nil {
		t.Fatal(err)
	}
	check(t, w, true)
	check(t, w, false)
}

func TestRun(t *testing.T) {
	for interval, want := range map[time.Duration]time.Duration{0: DefaultInterval, 3 * time.Second: 3 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			cause := errors.New("enough")
			ctx, cancel := context.WithCancelCause(t.Context())
			var looks []time.Duration
			start := time.Now()
			err := Run(ctx, interval, func() {
				if looks = append(looks, time.Since(start)); len(looks) == 3 {
					cancel(cause)
				}
			})
			if !errors.Is(err, cause) {
				t.Errorf("Run() = %v, want %v", err, cause)
			}
			if len(looks) != 3 || looks[0] != want || looks[2] != 3*want {
				t.Errorf("interval %v: looked after %v", interval, looks)
			}
		})
	}
}
