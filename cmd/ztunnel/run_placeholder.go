package main

import (
	"context"
	"errors"
	"io"

	"github.com/spf13/cobra"
)

var errNoProxy = errors.New("this build has no data path")

func runProxy(context.Context, *Config, io.Writer) error { return errNoProxy }

func newDemoCommand() *cobra.Command {
	return &cobra.Command{Use: "demo", Args: noArgs, RunE: func(*cobra.Command, []string) error { return errNoProxy }}
}
