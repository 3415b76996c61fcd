//go:build e2e

package netns

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/netlab"
	"github.com/ztunnel-go/ztunnel/e2e/world"
)

// The demo of docs/try-inpod.md does what it says, and leaves nothing behind,
// however it ends.
func TestTry(t *testing.T) {
	t.Parallel()
	world.RequireRoot(t)
	ztunnel := world.Binary(t, "ZTUNNEL_BIN")
	cni := filepath.Join(t.TempDir(), "cni")
	ctx := world.Context(t)
	if out, err := exec.CommandContext(ctx, "go", "build", "-o", cni, "../cni").CombinedOutput(); err != nil {
		t.Fatalf("build: %v: %s", err, out)
	}
	run := func(t *testing.T, args ...string) *world.Process {
		t.Helper()
		s, err := world.Run("cni", t.TempDir(), nil, append([]string{cni, "try", "-ztunnel", ztunnel}, args...)...)
		if err != nil {
			t.Fatal(err)
		}
		s.EndWith(t)
		return s
	}
	t.Run("to the end", func(t *testing.T) {
		s := run(t)
		if code := s.Wait(time.Minute); code != 0 {
			t.Fatalf("exit code %d", code)
		}
		text := strings.Join(s.Lines(), "\n")
		for _, want := range []string{
			"hello 10.0.0.2, you say", "src.identity=\"spiffe://cluster.local/ns/demo/sa/client\"", "dst.identity=\"spiffe://cluster.local/ns/demo/sa/web\"",
			`"open-sesame" in 0 packets`, "All namespaces, rules and processes of this are gone.",
		} {
			if !strings.Contains(text, want) {
				t.Errorf("no %q in what it says", want)
			}
		}
		expectGone(t, s.PID())
	})
	t.Run("interrupted", func(t *testing.T) {
		s := run(t, "-keep")
		if _, err := s.Find(ctx, time.Minute, func(line string) bool { return strings.Contains(line, "This stays until Ctrl-C") }); err != nil {
			t.Fatal(err)
		}
		if err := s.Signal(os.Interrupt); err != nil {
			t.Fatal(err)
		}
		s.Wait(20 * time.Second)
		expectGone(t, s.PID())
	})
	t.Run("interrupted early", func(t *testing.T) {
		s := run(t)
		if _, err := s.Find(ctx, time.Minute, func(line string) bool { return strings.HasPrefix(line, "2. ") }); err != nil {
			t.Fatal(err)
		}
		if err := s.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if code := s.Wait(20 * time.Second); code != 130 {
			t.Errorf("exit code %d, want 130", code)
		}
		expectGone(t, s.PID())
	})
}

// expectGone looks for what a process has left behind.
func expectGone(t *testing.T, pid int) {
	t.Helper()
	if names := netlab.Names(pid); len(names) > 0 {
		t.Errorf("namespaces are left: %v", names)
	}
	pattern := filepath.Join(os.TempDir(), fmt.Sprintf("%s%d-*", netlab.Prefix, pid))
	if dirs, _ := filepath.Glob(pattern); len(dirs) > 0 {
		t.Errorf("directories are left: %v", dirs)
	}
	// The proxy's settings name the directory of the demo.
	environs, _ := filepath.Glob("/proc/[0-9]*/environ")
	for _, path := range environs {
		if b, err := os.ReadFile(path); err == nil && strings.Contains(string(b), fmt.Sprintf("%s%d-run-", netlab.Prefix, pid)) {
			t.Errorf("a process is left: %s", path)
		}
	}
}
