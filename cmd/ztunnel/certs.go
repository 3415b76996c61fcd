package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// certsCommand is `ztunnel certs`.
type certsCommand struct {
	app       *app
	src       dumpSource
	output    outputFormat
	pem       bool
	watch     bool
	expiring  *time.Duration // nil without --expiring
	namespace string
	names     []string // of identities; empty is all
	color     bool
}

func (a *app) newCertsCommand() *cobra.Command {
	c := &certsCommand{app: a}
	cmd := &cobra.Command{
		Use:     "certs [identity]...",
		Aliases: []string{"cert", "certificate", "certificates"},
		Short:   "List the certificates of a running proxy",
		Long: `List the certificates of a running proxy: for each identity its leaf, the intermediates
and the roots. They come from /config_dump of the admin port, or from a file that holds it,
also one of another ztunnel. An identity is a SPIFFE ID or NAMESPACE/SERVICE-ACCOUNT.

With --expiring the exit code is 3 if a certificate is listed: one that expires within that
time, that is not valid now, or that is not there (Unavailable, Initializing). Without any
certificate to list, as on a node without pods, it is 0. An identity that was named and is
not there always is 3.`,
		Example: `  ztunnel certs -o wide
  ztunnel certs --expiring 1h
  ztunnel certs default/web --pem
  kubectl exec -n istio-system ztunnel-abcde -- ztunnel certs --watch
  ztunnel certs -f config_dump.json -o json`,
		Args: certArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			c.names = args
			return c.run(cmd)
		},
	}
	c.output.flag(cmd, "short", "wide", "json", "yaml", "name")
	cmd.Flags().BoolVar(&c.pem, "pem", false, "write chains and roots as PEM")
	cmd.Flags().BoolVarP(&c.watch, "watch", "w", false, "go on until interrupted: redraw on a terminal, else write what changes")
	cmd.Flags().Var(&durationFlag{&c.expiring}, "expiring", "only what expires within this time, is invalid or missing; exit code 3 if there is any")
	cmd.Flags().StringVar(&c.namespace, "workload-namespace", "", "only identities of this namespace")
	c.src.flags(cmd)
	cmd.AddCommand(a.newCertsVerifyCommand())
	return cmd
}

// certArgs accepts names of identities.
func certArgs(_ *cobra.Command, args []string) error {
	for _, arg := range args {
		if _, err := spiffeid.FromString(arg); err == nil {
			continue
		}
		if ns, sa, ok := strings.Cut(arg, "/"); !ok || ns == "" || sa == "" || strings.Contains(sa, "/") {
			return usageError{fmt.Errorf("identity %q: want a SPIFFE ID or NAMESPACE/SERVICE-ACCOUNT", arg)}
		}
	}
	return nil
}

// durationFlag is a duration as the configuration has it: 1h, 90, 2d.
type durationFlag struct{ to **time.Duration }

func (f *durationFlag) Type() string { return "duration" }
func (f *durationFlag) String() string {
	if f.to == nil || *f.to == nil {
		return ""
	}
	return (*f.to).String()
}

func (f *durationFlag) Set(s string) error {
	d, err := parseDuration(s)
	if err != nil {
		return err
	}
	*f.to = &d
	return nil
}

func (c *certsCommand) run(cmd *cobra.Command) error {
	if err := c.check(cmd); err != nil {
		return err
	}
	c.color = isTerminal(cmd.OutOrStdout()) && !c.app.noColor()
	if c.watch {
		return c.newWatch(cmd).run(cmd.Context())
	}
	entries, err := c.read(cmd.Context())
	if err != nil {
		return err
	}
	chosen, missing := c.choose(entries)
	now := time.Now()
	rows := c.rows(chosen, now)
	if err := c.write(cmd.OutOrStdout(), rows, now); err != nil {
		return err
	}
	if len(chosen) == 0 && len(missing) == 0 {
		fmt.Fprintln(cmd.ErrOrStderr(), "there is no certificate to list")
	}
	return c.verdict(cmd.ErrOrStderr(), rows, missing, now)
}

// check refuses flags that contradict each other.
func (c *certsCommand) check(cmd *cobra.Command) error {
	switch {
	case c.pem && cmd.Flags().Changed("output"):
		return usageError{errors.New("--pem and --output exclude each other")}
	case c.watch && c.src.file != "":
		return usageError{errors.New("--watch and --file exclude each other: a file does not change")}
	case c.watch && (c.pem || c.output == "yaml" || c.output == "name"):
		return usageError{errors.New("--watch writes the formats short, wide and json only")}
	}
	return nil
}

func (c *certsCommand) read(ctx context.Context) ([]certEntry, error) {
	b, err := c.src.read(ctx, c.app)
	if err != nil {
		return nil, err
	}
	return parseCerts(b, c.src.name)
}

// choose returns the entries that were asked for, and the names that fit none.
func (c *certsCommand) choose(entries []certEntry) (chosen []certEntry, missing []string) {
	found := map[string]bool{}
	for _, e := range entries {
		if c.namespace != "" && !strings.HasPrefix(workloadPath(e.Identity), "/ns/"+c.namespace+"/") {
			continue
		}
		wanted := len(c.names) == 0
		for _, name := range c.names {
			if named(e.Identity, name) {
				wanted, found[name] = true, true
			}
		}
		if wanted {
			chosen = append(chosen, e)
		}
	}
	for _, name := range c.names {
		if !found[name] {
			missing = append(missing, name)
		}
	}
	return chosen, missing
}

// named tells whether name is id, or its namespace and service account.
func named(id, name string) bool {
	if id == name {
		return true
	}
	ns, sa, _ := strings.Cut(name, "/")
	return workloadPath(id) == "/ns/"+ns+"/sa/"+sa
}

func workloadPath(id string) string {
	parsed, err := spiffeid.FromString(id)
	if err != nil {
		return ""
	}
	return parsed.Path()
}

func (c *certsCommand) rows(entries []certEntry, now time.Time) []certRow {
	rows := certRows(entries)
	if c.expiring == nil {
		return rows
	}
	return slices.DeleteFunc(rows, func(r certRow) bool { return !r.expires(now, *c.expiring) })
}

// entriesOf are the entries of rows, each once: where not lines are written but
// entries, they are whole.
func entriesOf(rows []certRow) []*certEntry {
	entries := []*certEntry{}
	for _, r := range rows {
		if len(entries) == 0 || entries[len(entries)-1] != r.entry {
			entries = append(entries, r.entry)
		}
	}
	return entries
}

// write writes rows, or the entries that they are of, in the format of c.
func (c *certsCommand) write(w io.Writer, rows []certRow, now time.Time) error {
	switch {
	case c.pem:
		for _, r := range rows {
			if r.kind == "NA" {
				continue // the verdict tells
			}
			if err := r.writePEM(w); err != nil {
				return err
			}
		}
		return nil
	case c.output == "json":
		return writeJSON(w, entriesOf(rows))
	case c.output == "yaml":
		return writeYAML(w, entriesOf(rows))
	case c.output == "name":
		var last string
		for _, e := range entriesOf(rows) {
			if name := cell(e.Identity); name != last {
				last = name
				if _, err := fmt.Fprintln(w, name); err != nil {
					return err
				}
			}
		}
		return nil
	}
	var t table
	return t.write(w, slices.Concat(c.header(), c.lines(rows, now)), c.painter(rows, now))
}

func (c *certsCommand) header() [][]string {
	if c.output == "wide" {
		return [][]string{strings.Split(wideHeader, "|")}
	}
	return [][]string{strings.Split(certHeader, "|")}
}

func (c *certsCommand) lines(rows []certRow, now time.Time) [][]string {
	lines := make([][]string, 0, len(rows))
	for _, r := range rows {
		if c.output == "wide" {
			lines = append(lines, r.wideCells(now))
		} else {
			lines = append(lines, r.cells(now))
		}
	}
	return lines
}

// painter colours lines below a header: red without a valid certificate, yellow
// while it is awaited.
func (c *certsCommand) painter(rows []certRow, now time.Time) func(int, string) string {
	if !c.color {
		return nil
	}
	const red, yellow, plain = "\x1b[31m", "\x1b[33m", "\x1b[0m"
	return func(line int, text string) string {
		if line == 0 {
			return text
		}
		switch r := rows[line-1]; {
		case r.valid(now):
			return text
		case r.kind == "NA" && r.entry.status() == certInitializing:
			return yellow + text + plain
		}
		return red + text + plain
	}
}

// verdict tells on notes what the output cannot, and returns an error with exit
// code 3 if what was asked for is not so.
func (c *certsCommand) verdict(notes io.Writer, rows []certRow, missing []string, now time.Time) error {
	absent := 0
	for _, r := range rows {
		if r.kind != "NA" {
			continue
		}
		absent++
		if c.pem {
			fmt.Fprintf(notes, "%s has no certificate: %s\n", cell(r.entry.Identity), cell(r.entry.State))
		}
	}
	var problems []string
	if len(missing) > 0 {
		problems = append(problems, "no certificate of "+strings.Join(missing, ", "))
	}
	if c.expiring != nil && len(rows) > absent {
		problems = append(problems, fmt.Sprintf("certificates that are invalid or expire before %s: %d",
			now.Add(*c.expiring).UTC().Format(time.RFC3339), len(rows)-absent))
	}
	if absent > 0 && (c.expiring != nil || c.pem && len(c.names) > 0) {
		problems = append(problems, fmt.Sprintf("identities without a certificate: %d", absent))
	}
	if len(problems) == 0 {
		return nil
	}
	return conditionError{errors.New(strings.Join(problems, "; "))}
}

// writeCerts writes the table of `istioctl ztunnel-config certificate`.
func writeCerts(w io.Writer, entries []certEntry, now time.Time) error {
	c := &certsCommand{output: "short"}
	return c.write(w, c.rows(entries, now), now)
}
