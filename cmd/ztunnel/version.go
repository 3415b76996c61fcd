package main

import (
	"encoding/json"
	"fmt"
	"io"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/ztunnel-go/ztunnel/ca"
)

// Set by the linker (Makefile); a plain `go build` falls back to what the
// toolchain records.
var (
	version      string
	gitRevision  string
	buildStatus  string
	istioVersion string
)

// BuildInfo says what this binary is. The JSON names are those of /config_dump;
// rustVersion carries the Go version.
type BuildInfo struct {
	BuildProfile   string `json:"buildProfile"`
	BuildStatus    string `json:"buildStatus"`
	CryptoProvider string `json:"cryptoProvider"`
	GitRevision    string `json:"gitRevision"`
	IstioVersion   string `json:"istioVersion"`
	RustVersion    string `json:"rustVersion"`
	Version        string `json:"version"`
}

// String is the one-line form that support scripts look for.
func (b BuildInfo) String() string {
	return fmt.Sprintf("version.BuildInfo{Version:%q, GitRevision:%q, RustVersion:%q, BuildProfile:%q, BuildStatus:%q, IstioVersion:%q, CryptoProvider:%q}",
		b.Version, b.GitRevision, b.RustVersion, b.BuildProfile, b.BuildStatus, b.IstioVersion, b.CryptoProvider)
}

// buildInfo describes this binary.
func buildInfo() BuildInfo {
	b := BuildInfo{
		BuildProfile:   "release",
		BuildStatus:    buildStatus,
		CryptoProvider: ca.CryptoProvider(),
		GitRevision:    gitRevision,
		IstioVersion:   istioVersion,
		RustVersion:    runtime.Version(),
		Version:        version,
	}
	if version == "" { // not by make
		b.BuildProfile = "debug"
	}
	if bi, ok := debug.ReadBuildInfo(); ok {
		for _, s := range bi.Settings {
			switch {
			case s.Key == "vcs.revision" && b.GitRevision == "":
				b.GitRevision = s.Value
			case s.Key == "vcs.modified" && b.BuildStatus == "":
				b.BuildStatus = map[string]string{"true": "Modified", "false": "Clean"}[s.Value]
			}
		}
	}
	for _, f := range []*string{&b.BuildStatus, &b.GitRevision, &b.IstioVersion, &b.Version} {
		if *f == "" {
			*f = "unknown"
		}
	}
	return b
}

func newVersionCommand() *cobra.Command {
	var output outputFormat
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print what this binary was built from",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output == "json" {
				return writeJSON(cmd.OutOrStdout(), buildInfo())
			}
			_, err := fmt.Fprintln(cmd.OutOrStdout(), buildInfo())
			return err
		},
	}
	output.flag(cmd, "short", "json")
	return cmd
}

// writeJSON writes v the way every command does: indented, one final newline.
func writeJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}
