//go:build unix

package local

import (
	"errors"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/ztunnel-go/ztunnel/state"
)

// withoutDescriptors calls f while no file can be opened, though it can be seen.
func withoutDescriptors(t *testing.T, f func()) {
	t.Helper()
	var old syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	none := old
	none.Cur = 0
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &old); err != nil {
			t.Fatal(err)
		}
	}()
	f()
}

const denyAll = "policies:\n- {name: deny, namespace: ns, scope: Namespace, action: Deny, rules: [[]], dryRun: false}\n"

// A file that could not be read is read again, though it looks as it did then.
func TestFailedReadIsRepeated(t *testing.T) {
	for _, tt := range []struct {
		name string
		fail func(*Source) error
	}{
		{"Check", func(s *Source) error { _, err := s.Check(); return err }},
		{"Load", (*Source).Load},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "local.yaml")
			write(t, path, "workloads: []\n")
			store := state.New(state.Config{})
			src := newSource(t, Config{Path: path, Store: store})
			if err := src.Load(); err != nil {
				t.Fatal(err)
			}
			write(t, path, denyAll)
			withoutDescriptors(t, func() {
				if err := tt.fail(src); !errors.Is(err, syscall.EMFILE) {
					t.Errorf("without descriptors: %v, want %v", err, syscall.EMFILE)
				}
				if loaded, err := src.Check(); loaded || !errors.Is(err, syscall.EMFILE) {
					t.Errorf("without descriptors: Check() = %v, %v, want %v", loaded, err, syscall.EMFILE)
				}
			})
			if loaded, err := src.Check(); !loaded || err != nil || src.LastError() != nil {
				t.Errorf("Check() = %v, %v, LastError() = %v", loaded, err, src.LastError())
			}
			if v := store.Authorize(state.Conn{Destination: &state.Workload{Namespace: "ns"}}); v.Denied == nil {
				t.Error("the policy that came with the failed read is not in force")
			}
			if loaded, err := src.Check(); loaded || err != nil {
				t.Errorf("Check() of what was read = %v, %v", loaded, err)
			}
		})
	}
}

// What is wrong with the content does not change until the file does.
func TestBadContentIsNotRepeated(t *testing.T) {
	path := filepath.Join(t.TempDir(), "local.yaml")
	write(t, path, "workloads: 1\n")
	attempts := 0
	src := newSource(t, Config{Path: path, Loaded: func(error) { attempts++ }})
	if err := src.Load(); err == nil {
		t.Fatal("no error for a bad file")
	}
	if loaded, err := src.Check(); loaded || err != nil || attempts != 1 {
		t.Errorf("Check() = %v, %v after %d attempts", loaded, err, attempts)
	}
}
