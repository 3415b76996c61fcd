package main

import (
	"errors"
	"os"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// withoutCaps runs f on a thread that lacks capabilities, and is of no use
// afterwards.
func withoutCaps(t *testing.T, f func() error, caps ...uint) error {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for ever: the thread ends with the goroutine
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		if err := unix.Capget(&header, &data[0]); err != nil {
			done <- err
			return
		}
		for _, c := range caps {
			data[c/32].Effective &^= 1 << (c % 32)
		}
		if err := unix.Capset(&header, &data[0]); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

// Spec §6.2, 17a: what a start in shared mode says when it lacks a privilege.
func TestCheckPrivileges(t *testing.T) {
	check := func() error { return checkPrivileges(1337) }
	if os.Geteuid() != 0 {
		if err := check(); err == nil || !strings.HasPrefix(err.Error(), "failed to set netns: ") {
			t.Errorf("without privileges: %v", err)
		}
		if os.Getenv("CI") != "" || os.Getenv("ZTUNNEL_REQUIRE_ROOT") == "1" {
			t.Fatal("needs root, and CI or ZTUNNEL_REQUIRE_ROOT=1 forbids to skip")
		}
		t.Skip("needs root for the rest")
	}
	if err := check(); err != nil {
		t.Errorf("as root: %v", err)
	}
	err := withoutCaps(t, check, unix.CAP_SYS_ADMIN)
	if !errors.Is(err, unix.EPERM) || !strings.HasPrefix(err.Error(), "failed to set netns: ") || !strings.Contains(err.Error(), "CAP_SYS_ADMIN") {
		t.Errorf("without SYS_ADMIN: %v", err)
	}
	err = withoutCaps(t, check, unix.CAP_NET_ADMIN, unix.CAP_NET_RAW)
	if !errors.Is(err, unix.EPERM) || !strings.HasPrefix(err.Error(), "failed to set socket mark: ") || !strings.Contains(err.Error(), "CAP_NET_RAW, CAP_NET_ADMIN") {
		t.Errorf("without NET_ADMIN and NET_RAW: %v", err)
	}
	if err := withoutCaps(t, func() error { return checkPrivileges(0) }, unix.CAP_NET_ADMIN, unix.CAP_NET_RAW); err != nil {
		t.Errorf("without NET_ADMIN and NET_RAW, and without a mark: %v", err)
	}
}
