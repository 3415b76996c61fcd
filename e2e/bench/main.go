//go:build linux

// Command bench measures the proxy against reference modes of its own, all as separate processes in network
// namespaces that it makes and that vanish with it. It needs root, ip(8), iptables(8) and ss(8).
//
//	go build -o bin/ztunnel ./cmd/ztunnel
//	go run ./e2e/bench -ztunnel bin/ztunnel -out docs/performance.md
//
// What is measured and how stands at the head of the report that -out writes.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
)

func main() {
	if len(os.Args) == 3 && os.Args[1] == childCommand {
		// A child's life is bound to its standard input, not to the terminal's signals.
		exit(runChild(context.Background(), os.Args[2], os.Stdin, os.Stdout))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	o, err := parseOptions(os.Args[1:], os.Stderr)
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(2)
	}
	err = execute(ctx, o, os.Stdout, os.Stderr)
	stop()
	exit(err)
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// parseOptions reads the command line.
func parseOptions(args []string, stderr io.Writer) (options, error) {
	var o options
	var only, modes string
	set := flag.NewFlagSet("bench", flag.ContinueOnError)
	set.SetOutput(stderr)
	set.StringVar(&o.ztunnel, "ztunnel", "", "`path` of the ztunnel binary; without it only the reference modes run")
	set.IntVar(&o.reps, "reps", 5, "repetitions")
	set.StringVar(&only, "only", "", "comma-separated measurements or groups: bulk, latency, connect, stalled, idle-streams, idle-tunnels, handshake")
	set.StringVar(&modes, "modes", "", "comma-separated modes: direct, relay2, relay2buf, tlsB, h2tun, bare, ztunnel, ztunnel-plain")
	set.StringVar(&o.out, "out", "", "`file` for the Markdown report")
	set.StringVar(&o.json, "json", "", "`file` for every sample and verdict")
	set.StringVar(&o.profile, "profile", "", "`directory` for profiles of ztunnel, one pair for each measurement; without it only rows that miss are profiled")
	if err := set.Parse(args); err != nil {
		return options{}, err
	}
	if set.NArg() > 0 {
		return options{}, fmt.Errorf("unexpected argument %q", set.Arg(0))
	}
	if o.reps < 1 {
		return options{}, fmt.Errorf("-reps %d: want at least 1", o.reps)
	}
	o.only, o.modes = list(only), list(modes)
	for _, mode := range o.modes {
		if !knownMode(mode) {
			return options{}, fmt.Errorf("-modes %s: no such mode", mode)
		}
	}
	if o.ztunnel != "" {
		path, err := filepath.Abs(o.ztunnel)
		if err != nil {
			return options{}, fmt.Errorf("-ztunnel: %w", err)
		}
		if _, err := os.Stat(path); err != nil {
			return options{}, fmt.Errorf("-ztunnel: %w", err)
		}
		o.ztunnel = path
	}
	o.command = strings.Join(append([]string{"go run ./e2e/bench"}, args...), " ")
	return o, nil
}

func list(text string) []string {
	if text == "" {
		return nil
	}
	return strings.Split(text, ",")
}

func knownMode(mode string) bool {
	switch mode {
	case modeDirect, modeRelay, modeRelayBuf, modeTLS, modeH2, modeBare, modeZtunnel, modeZtunnelPlain:
		return true
	}
	return false
}
