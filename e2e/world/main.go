//go:build e2e

package world

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/netlab"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// Main is the TestMain of a suite. It is also the application in the pods: the
// test binary started with the name of one in appEnv. It does not return.
func Main(m *testing.M) {
	if mode := os.Getenv(appEnv); mode != "" {
		os.Exit(runApp(mode))
	}
	if os.Geteuid() == 0 {
		netlab.RemoveLeftovers(os.TempDir(), ciliumDir)
	}
	var err error
	if runDir, err = os.MkdirTemp("", fmt.Sprintf("%s%d-run-", netlab.Prefix, os.Getpid())); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	cleanup := func() {
		if err := netlab.RemoveAll(os.Getpid()); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		_ = os.RemoveAll(runDir)
	}
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		<-interrupted
		cleanup()
		os.Exit(1)
	}()
	code := m.Run()
	cleanup()
	os.Exit(code)
}

// Dir is a new directory with a short path, which goes at the end of the run: a
// unix socket in it has at most 107 bytes.
func Dir() (string, error) { return os.MkdirTemp(runDir, "") }

// SharedNamespace makes a network namespace with an address on lo that lasts
// until the end of the run, as do the programs in it. They are out of the way of
// what listens on the machine, and those of a killed run are found by the next.
func SharedNamespace(name string) (*netns.Pod, string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), testTime)
	defer cancel()
	n, err := netlab.New(ctx, name)
	if err != nil {
		return nil, "", err
	}
	return n.Net, n.Name, nil
}

// RequireRoot skips without root, except where a skip would hide that the
// tests never run.
func RequireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") != "" || os.Getenv("ZTUNNEL_REQUIRE_ROOT") == "1" {
		t.Fatal("needs root, and CI or ZTUNNEL_REQUIRE_ROOT=1 forbids to skip")
	}
	t.Skip("needs root")
}

// Binary finds a program that a variable names.
func Binary(t testing.TB, env string) string {
	t.Helper()
	path := os.Getenv(env)
	if path == "" {
		t.Fatalf("%s names no binary; use make e2e", env)
	}
	if !filepath.IsAbs(path) {
		path = filepath.Join("..", "..", path)
	}
	path, err := filepath.Abs(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%s: %v", env, err)
	}
	return path
}

// testTime bounds one test with all that it waits for.
const testTime = 2 * time.Minute

// Context ends with the test, and after testTime.
func Context(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), testTime)
	t.Cleanup(cancel)
	return ctx
}

// Command runs a program to its end, with input, and returns its output.
func Command(ctx context.Context, input string, args ...string) (string, error) {
	return netlab.Command(ctx, input, args...)
}

// Eventually repeats check until it is satisfied; the time between two tries
// doubles from 10 ms. What it waits for is another process, so there is no
// event to wait on.
func Eventually(t testing.TB, ctx context.Context, limit time.Duration, check func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, 500*time.Millisecond) {
		err := check()
		if err == nil {
			return
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			t.Fatalf("after %v: %v", limit, err)
		}
	}
}
