//go:build linux

// Command cni is the CNI side of shared mode, for tests and demos: a server of
// ZDS that behaves as Istio's agent or as Cilium's, and the redirection rules of
// both.
//
//	go run ./e2e/cni try                       # all of it on one machine, see docs/try-inpod.md
//	go run ./e2e/cni serve -socket PATH        # a node's agent
//	go run ./e2e/cni add -netns NAME -pod NAMESPACE/NAME/SERVICE-ACCOUNT
//	go run ./e2e/cni del -pod NAMESPACE/NAME
//	go run ./e2e/cni rules print|apply|remove
//
// "cni COMMAND -h" lists the flags. All but "rules print" need root.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
)

const usage = `usage: cni COMMAND [flags]

  serve   serve ZDS on a socket until interrupted
  add     tell a running server of a pod, and set the rules in it
  del     tell a running server that a pod is gone, or (-leave) leaves the mesh
  rules   print, apply or remove the rules of Istio or Cilium
  try     pods, rules, proxy and requests on this machine, from nothing to nothing

"cni COMMAND -h" lists the flags.
`

// errUsage: the command line is wrong, and the user has been told.
var errUsage = errors.New("usage")

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	interrupted := ctx.Err() != nil
	stop()
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return
	case errors.Is(err, errUsage):
		os.Exit(2)
	case interrupted:
		fmt.Fprintln(os.Stderr, "cni: interrupted")
		os.Exit(130)
	}
	fmt.Fprintln(os.Stderr, "cni:", err)
	os.Exit(1)
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	commands := map[string]func(context.Context, []string, io.Writer, io.Writer) error{
		"serve": serve, "add": add, "del": del, "rules": rulesCommand, "try": try,
	}
	if len(args) == 0 {
		fmt.Fprint(stderr, usage)
		return errUsage
	}
	command, ok := commands[args[0]]
	if !ok {
		if args[0] == "help" || args[0] == "-h" || args[0] == "--help" {
			fmt.Fprint(stdout, usage)
			return nil
		}
		fmt.Fprintf(stderr, "cni: unknown command %q\n\n%s", args[0], usage)
		return errUsage
	}
	return command(ctx, args[1:], stdout, stderr)
}

// newFlags makes the flags of a command. Parse reports what is wrong.
func newFlags(name string, stderr io.Writer) *flag.FlagSet {
	set := flag.NewFlagSet(name, flag.ContinueOnError)
	set.SetOutput(stderr)
	set.Usage = func() {
		fmt.Fprintf(stderr, "usage: cni %s [flags]\n", name)
		set.PrintDefaults()
	}
	return set
}

// parse reads the flags of a command, which takes nothing else.
func parse(set *flag.FlagSet, args []string) error {
	if err := set.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return errUsage // set has told
	}
	if n := set.NArg(); n > 0 {
		return misuse(set, fmt.Errorf("%d arguments: want 0", n))
	}
	return nil
}

// misuse tells what is wrong with a command line.
func misuse(set *flag.FlagSet, err error) error {
	fmt.Fprintf(set.Output(), "cni %s: %v\n", set.Name(), err)
	return errUsage
}
