//go:build linux

// Package netlab makes network namespaces, links between them and programs in
// them, for the end-to-end suites and the demos. It needs root, ip(8) and
// nsenter(1).
//
// Every namespace is called zt-<pid>-<name>, so that those of a killed run are
// found by the next one, and nobody else's are touched.
package netlab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// Prefix begins the names of all namespaces, and of all directories that a run
// leaves behind when it is killed.
const Prefix = "zt-"

const (
	runDir = "/run/netns"
	// etcDir holds, by namespace, what "ip netns exec" mounts over /etc.
	etcDir = "/etc/netns"
	// commandTime bounds each program that Command runs.
	commandTime = 30 * time.Second
)

// Namespace is a network namespace with a name. Close removes it.
type Namespace struct {
	Name string
	// File is open until Close; it may be lent to others, such as a CNI agent.
	File *os.File
	// Net opens the sockets of applications in it, without a mark.
	Net *netns.Pod
}

// New makes a namespace of this process, with its loopback up.
func New(ctx context.Context, name string) (*Namespace, error) {
	n := &Namespace{Name: fmt.Sprintf("%s%d-%s", Prefix, os.Getpid(), name)}
	if _, err := Command(ctx, "", "ip", "netns", "add", n.Name); err != nil {
		return nil, err
	}
	err := n.open(ctx)
	if err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

func (n *Namespace) open(ctx context.Context) (err error) {
	if n.File, err = os.Open(filepath.Join(runDir, n.Name)); err != nil {
		return fmt.Errorf("open namespace: %w", err)
	}
	if n.Net, err = netns.NewPod(n.File, netns.PodConfig{OriginalSource: netns.OriginalSourceOff}); err != nil {
		return err
	}
	// A router does not look for neighbours before its link-local address has
	// been checked for duplicates, which takes seconds.
	if err := n.Sysctl(map[string]string{"net/ipv6/conf/default/accept_dad": "0"}); err != nil {
		return err
	}
	return n.IP(ctx, "link set lo up")
}

// Close ends the programs in the namespace and removes it.
func (n *Namespace) Close() error {
	err := Remove(n.Name)
	if n.File != nil {
		_ = n.File.Close()
	}
	return err
}

// Sysctl sets what /proc/sys shows of the namespace to a thread that is there.
// Names are those below /proc/sys.
func (n *Namespace) Sysctl(values map[string]string) error {
	for name, value := range values {
		if err := n.Net.Do(func() error { return os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0o644) }); err != nil {
			return fmt.Errorf("sysctl in %s: %w", n.Name, err)
		}
	}
	return nil
}

// IP runs commands of iproute2 in the namespace.
func (n *Namespace) IP(ctx context.Context, lines ...string) error {
	for _, line := range lines {
		if _, err := Command(ctx, "", append([]string{"ip", "-n", n.Name}, strings.Fields(line)...)...); err != nil {
			return err
		}
	}
	return nil
}

// In is the command line that runs a program in the namespace, with the /etc
// that WriteEtc has made for it.
func (n *Namespace) In(args ...string) []string {
	return append([]string{"ip", "netns", "exec", n.Name}, args...)
}

// WriteEtc gives programs that start in the namespace a file of /etc of their
// own, such as resolv.conf. It goes with the namespace.
func (n *Namespace) WriteEtc(name, content string) error {
	dir := filepath.Join(etcDir, n.Name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644)
}

// Link joins two namespaces by a pair of interfaces, both up, of which b's is
// eth0.
func Link(ctx context.Context, a *Namespace, name string, b *Namespace) error {
	if err := a.IP(ctx, "link add "+name+" type veth peer name eth0 netns "+b.Name, "link set "+name+" up"); err != nil {
		return err
	}
	return b.IP(ctx, "link set eth0 up")
}

// Command runs a program to its end, with input, and returns its output. The
// error carries what the program said.
func Command(ctx context.Context, input string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, commandTime)
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

// Names are those of the namespaces of a process, or of all with 0.
func Names(pid int) []string {
	prefix := Prefix
	if pid != 0 {
		prefix = fmt.Sprintf("%s%d-", Prefix, pid)
	}
	entries, err := os.ReadDir(runDir)
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

// RemoveAll removes the namespaces of a process.
func RemoveAll(pid int) error {
	var errs []error
	for _, name := range Names(pid) {
		errs = append(errs, Remove(name))
	}
	return errors.Join(errs...)
}

// RemoveLeftovers removes the namespaces of processes that no longer live, and
// what they have called zt-<pid>-run-… in the given directories.
func RemoveLeftovers(dirs ...string) {
	for _, name := range Names(0) {
		if OwnerGone(name) {
			_ = Remove(name)
		}
	}
	for _, dir := range dirs {
		found, _ := filepath.Glob(filepath.Join(dir, Prefix+"*-run-*"))
		for _, path := range found {
			if OwnerGone(filepath.Base(path)) {
				_ = os.RemoveAll(path)
			}
		}
	}
}

// OwnerGone tells whether the process that name is called after has ended. One
// that has ended and was not waited for has no executable either.
func OwnerGone(name string) bool {
	pid, err := strconv.Atoi(strings.Split(strings.TrimPrefix(name, Prefix), "-")[0])
	if err != nil {
		return false
	}
	_, err = os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	return errors.Is(err, fs.ErrNotExist)
}

// Remove ends the processes in a namespace, except this one, then the
// namespace.
func Remove(name string) error {
	out, _ := exec.Command("ip", "netns", "pids", name).Output()
	for _, field := range strings.Fields(string(out)) {
		if pid, err := strconv.Atoi(field); err == nil && pid != os.Getpid() {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	defer os.RemoveAll(filepath.Join(etcDir, name))
	if out, err := exec.Command("ip", "netns", "del", name).CombinedOutput(); err != nil {
		return fmt.Errorf("remove namespace %s: %w: %s", name, err, out)
	}
	return nil
}
