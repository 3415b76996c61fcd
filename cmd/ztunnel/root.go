package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

// The exit codes of every command (design §6).
const (
	exitOK        = 0
	exitRuntime   = 1
	exitUsage     = 2
	exitCondition = 3
	exitInterrupt = 130
)

// app is what a command may touch of the world outside. Only main makes one of
// the real process.
type app struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	environ        []string
	readFile       func(string) ([]byte, error)
	adminSocket    func() (string, error) // the abstract unix socket of this PID namespace
}

// usageError is a mistake on the command line.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// conditionError says that a command worked, and that what it was asked about
// does not hold.
type conditionError struct{ error }

func (e conditionError) Unwrap() error { return e.error }

// errInterrupted is the cause of a context that a signal ended.
var errInterrupted = errors.New("interrupted")

// drainOnSignal returns a context that the first signal ends, with the cause
// errInterrupted. The second one calls exit(130) at once. stop ends the
// goroutine behind it and waits for it.
func drainOnSignal(parent context.Context, signals <-chan os.Signal, exit func(int)) (ctx context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(parent)
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for first := true; ; first = false {
			select {
			case s := <-signals:
				if !first {
					exit(exitInterrupt)
					return
				}
				cancel(fmt.Errorf("%w by %s", errInterrupted, s))
			case <-quit:
				return
			}
		}
	}()
	return ctx, func() {
		close(quit)
		<-done
		cancel(nil)
	}
}

// run executes one command line and returns the exit code.
func (a *app) run(ctx context.Context, args []string) int {
	root := a.newRootCommand()
	root.SetArgs(args)
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	cmd, err := root.ExecuteContextC(ctx)
	interrupted := errors.Is(context.Cause(ctx), errInterrupted) && cmd.Annotations[drains] == ""
	if err == nil && !interrupted {
		return exitOK
	}
	if interrupted {
		return exitInterrupt
	}
	fmt.Fprintln(a.stderr, "Error:", err)
	if _, ok := errors.AsType[usageError](err); ok {
		fmt.Fprintf(a.stderr, "Run '%s --help' for usage.\n", cmd.CommandPath())
	}
	return exitCode(err)
}

func exitCode(err error) int {
	if err == nil {
		return exitOK
	}
	if _, ok := errors.AsType[usageError](err); ok {
		return exitUsage
	}
	if _, ok := errors.AsType[*ConfigError](err); ok {
		return exitUsage
	}
	if _, ok := errors.AsType[conditionError](err); ok {
		return exitCondition
	}
	if errors.Is(err, errInterrupted) {
		return exitInterrupt
	}
	return exitRuntime
}

// drains marks the commands for which a signal is an ordinary end.
const drains = "drains"

func (a *app) newRootCommand() *cobra.Command {
	proxy := a.newProxyCommand()
	root := &cobra.Command{
		Use:   "ztunnel",
		Short: "Layer 4 proxy of an ambient mesh node",
		Long: `ztunnel carries the TCP connections of the workloads of a node in mutually
authenticated tunnels, under the identity of each workload. Without a command it runs
the proxy. It is configured by environment variables; see "ztunnel config".`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError{fmt.Errorf("unknown command: %s", args[0])}
			}
			return nil
		},
		RunE:          proxy.RunE,
		Annotations:   proxy.Annotations,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddCommand(proxy, a.newConfigCommand(), a.newCACommand(), a.newCertsCommand(), a.newPodsCommand(), newVersionCommand(), newDemoCommand())
	return root
}

func (a *app) newProxyCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "proxy [name]",
		Short: "Run the proxy",
		Long: `Run the proxy until SIGTERM or SIGINT, then drain: open connections may go on until
the deadline (CONNECTION_TERMINATION_DEADLINE). A second signal ends the process at once.
The name has no effect; charts give one.`,
		Args:        cobra.ArbitraryArgs,
		Annotations: map[string]string{drains: "true"},
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, warnings, err := Load(a.environ, a.readFile)
			a.note(warnings)
			if err != nil {
				return err
			}
			cfg.Args = strings.Join(slices.Concat([]string{"proxy"}, args), " ")
			return runProxy(cmd.Context(), cfg, cmd.OutOrStdout())
		},
	}
}

// noArgs is cobra.NoArgs as a usage error.
func noArgs(cmd *cobra.Command, args []string) error {
	if err := cobra.NoArgs(cmd, args); err != nil {
		return usageError{err}
	}
	return nil
}

// outputFormat is the value of -o: one of a fixed set, the first by default.
type outputFormat string

// flag registers -o on cmd.
func (o *outputFormat) flag(cmd *cobra.Command, choices ...string) {
	*o = outputFormat(choices[0])
	cmd.Flags().VarP(&outputFlag{o, choices}, "output", "o", "output format: "+strings.Join(choices, ", "))
}

type outputFlag struct {
	to      *outputFormat
	choices []string
}

func (f *outputFlag) String() string { return string(*f.to) }
func (f *outputFlag) Type() string   { return "format" }
func (f *outputFlag) Set(s string) error {
	if !slices.Contains(f.choices, s) {
		return fmt.Errorf("must be one of %s", strings.Join(f.choices, ", "))
	}
	*f.to = outputFormat(s)
	return nil
}
