package main

import (
	"fmt"
	"log/slog"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/ztunnel-go/ztunnel/proxy/inpod"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// realPods are the network namespaces of Linux.
var realPods = podPlatform{
	namespaces: func(cfg *Config, log *slog.Logger) func(*os.File) (inpod.Namespace, error) {
		sockets := podConfig(cfg)
		sockets.Logger = log
		return func(ns *os.File) (inpod.Namespace, error) { return netns.NewPod(ns, sockets) }
	},
	check: checkPrivileges,
}

// podConfig is the network namespace of a pod.
func podConfig(cfg *Config) netns.PodConfig {
	return netns.PodConfig{
		Keepalive: keepalive(cfg.Sockets), UserTimeout: userTimeout(cfg.Sockets), IPv6Enabled: cfg.Sockets.IPv6, ConnectTimeout: cfg.Timeouts.TCPConnect,
		Mark: cfg.Sockets.Mark, PortReuse: cfg.Sockets.ReusePort, OriginalSource: originalSource(cfg.Sockets),
	}
}

// checkPrivileges does once, in our own namespace, what every pod needs, so that
// a lack of it ends the start (spec §6.2).
func checkPrivileges(mark uint32) error {
	if err := reenter(); err != nil {
		return fmt.Errorf("failed to set netns: %w; shared mode needs CAP_SYS_ADMIN", err)
	}
	if mark == 0 {
		return nil
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open a socket: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(mark)); err != nil {
		return fmt.Errorf("failed to set socket mark: %w; shared mode needs CAP_NET_RAW, CAP_NET_ADMIN", err)
	}
	return nil
}

// reenter sets the network namespace of a thread to the one that it is in.
func reenter() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer own.Close()
	return os.NewSyscallError("setns", unix.Setns(int(own.Fd()), unix.CLONE_NEWNET))
}

// openPIDFD opens a process. The descriptor stays that process's when its PID is
// given to another.
func openPIDFD(pid int) (*os.File, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), fmt.Sprintf("pidfd:%d", pid)), nil
}
