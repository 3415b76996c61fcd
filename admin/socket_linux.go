package admin

import (
	"context"
	"fmt"
	"net"
	"os"
	"syscall"
)

// SocketName is the abstract unix socket on which the admin server of this PID
// namespace also listens: on a shared host network localhost:15000 may belong
// to another pod.
func SocketName() (string, error) {
	info, err := os.Stat("/proc/self/ns/pid")
	if err != nil {
		return "", fmt.Errorf("find the PID namespace: %w", err)
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return "", fmt.Errorf("find the PID namespace: no inode of %s", info.Name())
	}
	return fmt.Sprintf("@ztunnel-admin-%d", stat.Ino), nil
}

// ListenSocket listens on SocketName. The error is of type *net.OpError if the
// name is taken.
func ListenSocket(ctx context.Context) (net.Listener, error) {
	name, err := SocketName()
	if err != nil {
		return nil, err
	}
	var cfg net.ListenConfig
	return cfg.Listen(ctx, "unix", name)
}
