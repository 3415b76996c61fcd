//go:build e2e

package world

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// Main is the TestMain of a suite. It is also the application in the pods: the
// test binary started with the name of one in appEnv. It does not return.
func Main(m *testing.M) {
	if mode := os.Getenv(appEnv); mode != "" {
		os.Exit(runApp(mode))
	}
	if os.Geteuid() == 0 {
		removeLeftovers()
	}
	var err error
	if runDir, err = os.MkdirTemp("", fmt.Sprintf("%s%d-run-", prefix, os.Getpid())); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	cleanup := func() {
		removeNamespaces(os.Getpid())
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

const prefix = "zt-"

// removeLeftovers removes what runs that no longer live have left behind.
func removeLeftovers() {
	for _, name := range namespaces() {
		if ownerGone(name) {
			removeNamespace(name)
		}
	}
	dirs, _ := filepath.Glob(filepath.Join(os.TempDir(), prefix+"*-run-*"))
	for _, dir := range dirs {
		if ownerGone(filepath.Base(dir)) {
			_ = os.RemoveAll(dir)
		}
	}
}

// ownerGone tells whether the run that name is called after has ended. A
// process that has ended and was not waited for has no executable either.
func ownerGone(name string) bool {
	pid, err := strconv.Atoi(strings.Split(strings.TrimPrefix(name, prefix), "-")[0])
	if err != nil {
		return false
	}
	_, err = os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	return errors.Is(err, fs.ErrNotExist)
}

// Dir is a new directory with a short path, which goes at the end of the run: a
// unix socket in it has at most 107 bytes.
func Dir() (string, error) { return os.MkdirTemp(runDir, "") }

// SharedNamespace makes a network namespace with an address on lo that lasts
// until the end of the run, as do the programs in it. They are out of the way of
// what listens on the machine, and those of a killed run are found by the next.
func SharedNamespace(name string) (*netns.Pod, string, error) {
	ns := fmt.Sprintf("%s%d-%s", prefix, os.Getpid(), name)
	ctx, cancel := context.WithTimeout(context.Background(), testTime)
	defer cancel()
	for _, args := range [][]string{{"ip", "netns", "add", ns}, {"ip", "-n", ns, "link", "set", "lo", "up"}} {
		if _, err := Command(ctx, "", args...); err != nil {
			return nil, "", err
		}
	}
	f, err := os.Open("/run/netns/" + ns)
	if err != nil {
		return nil, "", err
	}
	p, err := netns.NewPod(f, netns.PodConfig{OriginalSource: netns.OriginalSourceOff})
	return p, ns, err
}

func removeNamespaces(pid int) {
	for _, name := range namespaces() {
		if strings.HasPrefix(name, fmt.Sprintf("%s%d-", prefix, pid)) {
			removeNamespace(name)
		}
	}
}

func namespaces() []string {
	entries, err := os.ReadDir("/run/netns")
	if err != nil {
		return nil // no namespace was ever made here
	}
	var names []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), prefix) {
			names = append(names, e.Name())
		}
	}
	return names
}

// removeNamespace ends the processes in a namespace of ours, then the namespace.
func removeNamespace(name string) {
	out, _ := exec.Command("ip", "netns", "pids", name).Output()
	for _, field := range strings.Fields(string(out)) {
		if pid, err := strconv.Atoi(field); err == nil && pid != os.Getpid() {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	if out, err := exec.Command("ip", "netns", "del", name).CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "remove namespace %s: %v: %s\n", name, err, out)
	}
	_ = os.RemoveAll(filepath.Join(etcDir, name))
}

// RequireRoot skips without root, except where a skip would hide that the
// tests never run.
func RequireRoot(t *testing.T) {
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
func Binary(t *testing.T, env string) string {
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
func Context(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), testTime)
	t.Cleanup(cancel)
	return ctx
}

// Command runs a program to its end, with input, and returns its output.
func Command(ctx context.Context, input string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.WaitDelay = time.Second
	cmd.Stdin = strings.NewReader(input)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, stderr.String())
	}
	return stdout.String(), nil
}

// Eventually repeats check until it is satisfied; the time between two tries
// doubles from 10 ms. What it waits for is another process, so there is no
// event to wait on.
func Eventually(t *testing.T, ctx context.Context, limit time.Duration, check func() error) {
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
