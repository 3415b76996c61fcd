//go:build linux

package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// namespace is a network namespace without a name: one locked thread of this process lives in it, and it is gone
// with that thread and the processes that were started in it. Nothing is left behind, however the benchmark ends.
type namespace struct {
	calls chan func()
	done  chan struct{}
	file  *os.File // open while the namespace is, so that ip(8) can be told where to put a link
}

// newNamespace makes a namespace and brings its loopback up. The caller closes it.
func newNamespace() (*namespace, error) {
	ns := &namespace{calls: make(chan func()), done: make(chan struct{})}
	ready := make(chan error)
	go ns.live(ready)
	if err := <-ready; err != nil {
		<-ns.done
		return nil, fmt.Errorf("make a network namespace (this needs root): %w", err)
	}
	if err := ns.run("ip", "link", "set", "lo", "up"); err != nil {
		return nil, errors.Join(err, ns.close())
	}
	return ns, nil
}

func (ns *namespace) live(ready chan<- error) {
	defer close(ns.done)
	runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
	err := unix.Unshare(unix.CLONE_NEWNET)
	if err == nil {
		ns.file, err = os.Open("/proc/thread-self/ns/net")
	}
	ready <- err
	if err != nil {
		return
	}
	for call := range ns.calls {
		call()
	}
}

// do runs f on the namespace's thread: sockets, processes and /proc/sys/net of f belong to the namespace.
func (ns *namespace) do(f func() error) error {
	result := make(chan error)
	ns.calls <- func() { result <- f() }
	return <-result
}

// run executes a command in the namespace.
func (ns *namespace) run(name string, args ...string) error {
	_, err := ns.output(name, args...)
	return err
}

func (ns *namespace) output(name string, args ...string) (string, error) {
	var out []byte
	err := ns.do(func() error {
		var err error
		if out, err = exec.Command(name, args...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
		}
		return nil
	})
	return string(out), err
}

// sysctl sets a network sysctl of the namespace; the key is written with slashes.
func (ns *namespace) sysctl(key, value string) error {
	return ns.do(func() error {
		if err := os.WriteFile(filepath.Join("/proc/sys/net", key), []byte(value), 0); err != nil {
			return fmt.Errorf("set sysctl net/%s to %s: %w", key, value, err)
		}
		return nil
	})
}

// setCongestionControl makes algorithm the default of the namespace. A namespace may only choose what the host allows
// to everybody; where that list lacks the algorithm, it is on it for as long as this call takes.
func (ns *namespace) setCongestionControl(algorithm string) error {
	const key = "ipv4/tcp_congestion_control"
	err := ns.sysctl(key, algorithm)
	if !errors.Is(err, os.ErrPermission) {
		return err
	}
	const allowed = "/proc/sys/net/ipv4/tcp_allowed_congestion_control"
	before, err := os.ReadFile(allowed)
	if err != nil {
		return fmt.Errorf("allow congestion control %s: %w", algorithm, err)
	}
	if err := os.WriteFile(allowed, []byte(strings.TrimSpace(string(before))+" "+algorithm), 0); err != nil {
		return fmt.Errorf("allow congestion control %s: %w", algorithm, err)
	}
	return errors.Join(ns.sysctl(key, algorithm), os.WriteFile(allowed, before, 0))
}

// path names the namespace for other programs of this machine.
func (ns *namespace) path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.file.Fd()) }

func (ns *namespace) close() error {
	close(ns.calls)
	<-ns.done
	return ns.file.Close()
}
