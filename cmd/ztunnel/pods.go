package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// podsCommand is `ztunnel pods`.
type podsCommand struct {
	app       *app
	src       dumpSource
	output    outputFormat
	namespace string
	names     []string // empty is all
}

func (a *app) newPodsCommand() *cobra.Command {
	c := &podsCommand{app: a}
	cmd := &cobra.Command{
		Use:     "pods [pod]...",
		Aliases: []string{"pod"},
		Short:   "List the pods that a running proxy serves",
		Long: `List the pods that the CNI agent has named to a running proxy (shared mode), the state of
each, and why one is not served. They come from /config_dump of the admin port, or from a
file that holds it, also one of another ztunnel. A pod is NAME, NAMESPACE/NAME or its UID.

STATE is starting, active, draining or failed. The proxy of a pod that has failed is started
again every 5 s. The exit code is 3 if a pod that was named is not there.`,
		Example: `  ztunnel pods
  ztunnel pods default/web-0 -o wide
  kubectl exec -n istio-system ztunnel-abcde -- ztunnel pods --workload-namespace shop
  ztunnel pods -f config_dump.json -o json`,
		RunE: func(cmd *cobra.Command, args []string) error {
			c.names = args
			return c.run(cmd)
		},
	}
	c.output.flag(cmd, "short", "wide", "json", "yaml")
	cmd.Flags().StringVar(&c.namespace, "workload-namespace", "", "only pods of this namespace")
	c.src.flags(cmd)
	return cmd
}

// podEntry is a pod as the command writes it.
type podEntry struct {
	podDump
	// Connections are those that are open; nil where there is no proxy.
	Connections *podConnections `json:"connections,omitempty"`
}

type podConnections struct {
	Inbound  int `json:"inbound"`
	Outbound int `json:"outbound"`
}

// podsDump is what the command reads of a dump.
type podsDump struct {
	Config *struct {
		ProxyMode string `json:"proxyMode"`
	} `json:"config"`
	WorkloadState map[string]workloadDump `json:"workloadState"`
	ZtunnelGo     *struct {
		Pods []podDump `json:"pods"`
		ZDS  *zdsDump  `json:"zds"`
	} `json:"ztunnelGo"`
}

func parsePods(dump []byte, name string) (*podsDump, error) {
	var d podsDump
	if err := json.Unmarshal(dump, &d); err != nil {
		return nil, fmt.Errorf("%s is no configuration dump: %w", name, err)
	}
	if d.Config == nil {
		return nil, fmt.Errorf("%s is no configuration dump: it has no config", name)
	}
	return &d, nil
}

// entries are the pods by namespace, name and UID. A dump of the reference knows
// two states.
func (d *podsDump) entries() []podEntry {
	entries := []podEntry{}
	known := map[string]podDump{}
	if d.ZtunnelGo != nil {
		for _, p := range d.ZtunnelGo.Pods {
			known[p.UID] = p
		}
	}
	for uid, w := range d.WorkloadState {
		p, ok := known[uid]
		if !ok {
			p = podDump{UID: uid, Namespace: w.Info.Namespace, Name: w.Info.Name, ServiceAccount: w.Info.ServiceAccount, State: w.State}
		}
		e := podEntry{podDump: p}
		if w.Connections != nil {
			e.Connections = &podConnections{Inbound: len(w.Connections.Inbound), Outbound: len(w.Connections.Outbound)}
		}
		entries = append(entries, e)
	}
	slices.SortFunc(entries, func(a, b podEntry) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.UID, b.UID))
	})
	return entries
}

func (c *podsCommand) run(cmd *cobra.Command) error {
	b, err := c.src.read(cmd.Context(), c.app)
	if err != nil {
		return err
	}
	dump, err := parsePods(b, c.src.name)
	if err != nil {
		return err
	}
	chosen, missing := c.choose(dump.entries())
	if err := c.write(cmd.OutOrStdout(), chosen); err != nil {
		return err
	}
	c.note(cmd.ErrOrStderr(), dump, len(chosen))
	if len(missing) > 0 {
		return conditionError{errors.New("no pod " + strings.Join(missing, ", "))}
	}
	return nil
}

// note tells what the output cannot.
func (c *podsCommand) note(w io.Writer, dump *podsDump, listed int) {
	ours := dump.ZtunnelGo
	switch {
	case dump.WorkloadState == nil:
		fmt.Fprintf(w, "%s serves one workload and no pods of a node (mode %s)\n", c.src.name, cell(dump.Config.ProxyMode))
		return
	case listed == 0 && len(c.names) == 0:
		fmt.Fprintln(w, "there is no pod to list")
	}
	if ours == nil || ours.ZDS == nil {
		return
	}
	switch z := ours.ZDS; {
	case !z.Connected:
		fmt.Fprintf(w, "not connected to the CNI agent at %s: %s\n", cell(z.Path), cell(z.LastError))
	case z.Snapshot == nil:
		fmt.Fprintf(w, "the CNI agent at %s has not named all pods yet\n", cell(z.Path))
	}
}

// choose returns the pods that were asked for, and the names that fit none.
func (c *podsCommand) choose(entries []podEntry) (chosen []podEntry, missing []string) {
	chosen = []podEntry{}
	found := map[string]bool{}
	for _, e := range entries {
		if c.namespace != "" && e.Namespace != c.namespace {
			continue
		}
		wanted := len(c.names) == 0
		for _, name := range c.names {
			if name == e.Name || name == e.UID || name == e.Namespace+"/"+e.Name {
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

func (c *podsCommand) write(w io.Writer, entries []podEntry) error {
	switch c.output {
	case "json":
		return writeJSON(w, entries)
	case "yaml":
		return writeYAML(w, entries)
	}
	header := []string{"NAMESPACE", "POD", "STATE", "SINCE", "IN", "OUT", "REASON"}
	if c.output == "wide" {
		header = []string{"NAMESPACE", "POD", "STATE", "SINCE", "IN", "OUT", "SERVICE ACCOUNT", "UID", "NETNS", "RETRIES", "REASON"}
	}
	rows := [][]string{header}
	for _, e := range entries {
		rows = append(rows, e.cells(c.output == "wide"))
	}
	var t table
	return t.write(w, rows, nil)
}

// cells are the columns; "-" is none, NA what the dump does not say.
func (e podEntry) cells(wide bool) []string {
	since, in, out, retries := "NA", "-", "-", "NA"
	if !e.Since.IsZero() {
		since, retries = e.Since.UTC().Format(time.RFC3339), strconv.Itoa(e.Retries)
	}
	if e.Connections != nil {
		in, out = strconv.Itoa(e.Connections.Inbound), strconv.Itoa(e.Connections.Outbound)
	}
	cells := []string{e.Namespace, e.Name, e.State, since, in, out}
	if wide {
		cells = append(cells, e.ServiceAccount, e.UID, cmp.Or(e.NetNS, "NA"), retries)
	}
	cells = append(cells, cmp.Or(e.Reason, "-"))
	for i, c := range cells {
		cells[i] = cell(c)
	}
	return cells
}
