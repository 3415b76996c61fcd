// Command ztunnel is the per-node layer 4 proxy of an Istio ambient mesh, and
// the tool to look into a running one.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/ztunnel-go/ztunnel/admin"
)

func main() {
	// Room for the second signal: it must not get lost while the first one is
	// being handled.
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, os.Interrupt)
	a := &app{
		stdin:       os.Stdin,
		stdout:      os.Stdout,
		stderr:      os.Stderr,
		environ:     os.Environ(),
		readFile:    os.ReadFile,
		adminSocket: admin.SocketName,
	}
	ctx, stop := drainOnSignal(context.Background(), signals, os.Exit)
	code := a.run(ctx, os.Args[1:])
	stop()
	os.Exit(code)
}
