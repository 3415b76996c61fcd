//go:build !linux

package main

import (
	"errors"
	"log/slog"
	"os"

	"github.com/ztunnel-go/ztunnel/proxy/inpod"
)

var errNotLinux = errors.New("in-pod mode is not supported on non-linux platforms")

// realPods are none.
var realPods = podPlatform{
	namespaces: func(*Config, *slog.Logger) func(*os.File) (inpod.Namespace, error) {
		return func(*os.File) (inpod.Namespace, error) { return nil, errNotLinux }
	},
	check: func(uint32) error { return errNotLinux },
}

func openPIDFD(int) (*os.File, error) {
	return nil, errors.New("processes are named by PID on linux only")
}
