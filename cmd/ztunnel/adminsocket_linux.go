package main

import (
	"fmt"
	"os"
	"syscall"
)

// adminSocket names the abstract unix socket of the proxy of this PID namespace
// (decision D26).
func adminSocket() (string, error) {
	fi, err := os.Stat("/proc/self/ns/pid")
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("@ztunnel-admin-%d", fi.Sys().(*syscall.Stat_t).Ino), nil
}
