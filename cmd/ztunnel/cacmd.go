package main

import (
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/ztunnel-go/ztunnel/ca/router"
)

func (a *app) newCACommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ca",
		Short: "Look at the configuration of the certificate providers",
		Long:  `Look at the configuration of the certificate providers: see "ztunnel ca validate".`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError{fmt.Errorf("unknown command: ca %s", args[0])}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.newCAValidateCommand())
	return cmd
}

func (a *app) newCAValidateCommand() *cobra.Command {
	var output outputFormat
	cmd := &cobra.Command{
		Use:   "validate FILE",
		Short: "Check a file for CA_CONFIG",
		Long: `Check a file for CA_CONFIG as the proxy would, with the environment of this process: what
a provider of the file does not set is inherited from there. Printed are the providers with
their settings and where each comes from, and the routes in the order in which they are
asked. Nothing is started, and no network is touched. If the file is invalid, all of its
problems go to standard error, and the exit code is 2.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageError{fmt.Errorf("got %d arguments, want the file", len(args))}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			l := newLoader(slices.Concat([]string{"CA_CONFIG=" + args[0]}, a.environ), a.readFile) // the first wins
			l.load()
			a.note(l.warnings)
			if l.caFile != nil {
				l.problems = append(l.problems, unmakeable(l.cfg)...)
			}
			if len(l.problems) > 0 {
				return &ConfigError{Problems: l.problems}
			}
			report := describeCA(l)
			if output == "json" {
				return writeJSON(cmd.OutOrStdout(), report)
			}
			return report.write(cmd.OutOrStdout())
		},
	}
	output.flag(cmd, "table", "json")
	return cmd
}

// unmakeable says which providers cannot be made. Making one opens nothing, but
// for the local one, which would write its root.
func unmakeable(cfg *Config) (problems []error) {
	t, err := trustOf(cfg)
	if err != nil {
		return nil // reported by Load
	}
	set := &providerSet{cfg: cfg, trust: t, backends: backends, log: slog.New(slog.DiscardHandler)}
	for _, p := range cfg.CA.Providers {
		if p.Type == providerLocal {
			continue
		}
		if _, err := set.make(p); err != nil {
			problems = append(problems, fmt.Errorf("%s: %w", cfg.CA.ConfigFile, err))
		}
	}
	return problems
}

// caReport is what `ztunnel ca validate` finds.
type caReport struct {
	File      string             `json:"file"`
	Providers []caProviderReport `json:"providers"`
	Routes    []caRouteReport    `json:"routes"`
}

type caProviderReport struct {
	Name     string            `json:"name"`
	Type     string            `json:"type"`
	Settings []caSettingReport `json:"settings"`
}

type caSettingReport struct {
	Name      string `json:"name"`
	Value     string `json:"value"`
	Origin    string `json:"origin"` // line N | default | env NAME | PROXY_CONFIG | mesh file
	Inherited bool   `json:"inherited"`
	Variable  string `json:"variable,omitempty"` // from which it is inherited, or would be
}

type caRouteReport struct {
	Match    string `json:"match"` // ns=NAMESPACE, td=TRUST-DOMAIN or *
	Provider string `json:"provider"`
}

func describeCA(l *loader) caReport {
	report := caReport{File: l.cfg.CA.ConfigFile}
	rows := map[string]Setting{}
	headers := map[string]Setting{}
	for _, s := range l.cfg.Settings() {
		rows[s.Name] = s
		if strings.HasPrefix(s.Name, "CA_HEADER_") {
			headers[s.Name] = s
		}
	}
	for _, e := range l.caFile.entries {
		p := caProviderReport{Name: e.Name, Type: e.Type}
		for _, k := range keysOf(e.Type) {
			s := caSettingReport{Name: k.name, Variable: k.row}
			given, ok := e.given[k.name]
			switch {
			case ok:
				s.Value, s.Origin = given.text, fmt.Sprintf("line %d", given.line)
			case k.row == "":
				s.Origin = originDefault
			case k.table:
				s.Value, s.Origin, s.Inherited = joinHeaders(headers), originOf(headers), true
			default:
				s.Value, s.Origin, s.Inherited = rows[k.row].Value, rows[k.row].Origin, true
			}
			p.Settings = append(p.Settings, s)
		}
		report.Providers = append(report.Providers, p)
	}
	for _, r := range router.Effective(l.cfg.CA.names(), l.cfg.CA.Routes) {
		report.Routes = append(report.Routes, caRouteReport{r.Match(), r.Provider})
	}
	return report
}

func joinHeaders(rows map[string]Setting) string {
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(rows)) {
		parts = append(parts, strings.ToLower(strings.TrimPrefix(name, "CA_HEADER_"))+"="+rows[name].Value)
	}
	return strings.Join(parts, ",")
}

func originOf(rows map[string]Setting) string {
	if len(rows) == 0 {
		return originDefault
	}
	return "env CA_HEADER_*"
}

// write is the report for people.
func (r caReport) write(w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 8, 3, ' ', 0)
	fmt.Fprintf(tw, "%s is valid.\n\nPROVIDER\tTYPE\tSETTING\tVALUE\tORIGIN\n", r.File)
	for _, p := range r.Providers {
		for _, s := range p.Settings {
			origin := s.Origin
			if s.Inherited {
				origin = "inherited: " + origin
				if s.Origin == originDefault {
					origin += " of " + s.Variable
				}
			}
			fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\n", p.Name, p.Type, s.Name, oneLine(s.Value), origin)
		}
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	tw = tabwriter.NewWriter(w, 0, 8, 3, ' ', 0)
	fmt.Fprint(tw, "\nWORKLOADS\tPROVIDER\n")
	for _, route := range r.Routes {
		fmt.Fprintf(tw, "%s\t%s\n", route.Match, route.Provider)
	}
	return tw.Flush()
}
