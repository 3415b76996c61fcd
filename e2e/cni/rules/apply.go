//go:build linux

package rules

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// commandTime bounds each program that is called.
const commandTime = 30 * time.Second

// Run runs a program in the namespace behind ns, with input as its standard
// input, and returns its standard output. The error carries what it printed.
func Run(ctx context.Context, ns *os.File, input string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	// The descriptor becomes number 3 of the child.
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--net=/proc/self/fd/3"}, args...)...)
	cmd.ExtraFiles = []*os.File{ns}
	cmd.WaitDelay = time.Second
	cmd.Stdin = strings.NewReader(input)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// Apply sets the rules in the namespace behind ns. It may be called again: what
// is there is replaced. Rules of others are left alone.
func Apply(ctx context.Context, ns *os.File, c Config) error {
	if err := c.Validate(); err != nil {
		return err
	}
	families, err := familiesOf(ns)
	if err != nil {
		return err
	}
	for _, f := range families {
		if err := f.set(ctx, ns, c); err != nil {
			return err
		}
		// Packets of connections that the proxy opened with a client's address are
		// delivered here, not sent to the client.
		for _, args := range f.routes("add") {
			if _, err := Run(ctx, ns, "", args...); err != nil && !strings.Contains(err.Error(), "File exists") {
				return err
			}
		}
	}
	return nil
}

// Remove takes the rules of either set away. It is no error if there are none.
func Remove(ctx context.Context, ns *os.File) error {
	families, err := familiesOf(ns)
	if err != nil {
		return err
	}
	for _, f := range families {
		if err := f.unset(ctx, ns); err != nil {
			return err
		}
		for _, args := range f.routes("del") {
			_, err := Run(ctx, ns, "", args...)
			if err != nil && !strings.Contains(err.Error(), "No such") && !strings.Contains(err.Error(), "does not exist") {
				return err
			}
		}
	}
	return nil
}

// familiesOf are those that the namespace has: IPv6 may be switched off in it.
func familiesOf(ns *os.File) ([]family, error) {
	p, err := netns.NewPod(ns, netns.PodConfig{})
	if err != nil {
		return nil, err
	}
	out := []family{ipv4}
	err = p.Do(func() error {
		off, err := os.ReadFile("/proc/sys/net/ipv6/conf/lo/disable_ipv6")
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err == nil && strings.TrimSpace(string(off)) == "0" {
			out = append(out, ipv6)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("look for IPv6 in the namespace: %w", err)
	}
	return out, nil
}

// routes are the commands that send packets with the connection mark to the
// namespace itself; verb is add or del.
func (f family) routes(verb string) [][]string {
	version := "-4"
	if f.v6 {
		version = "-6"
	}
	return [][]string{
		{"ip", version, "route", verb, "local", f.all, "dev", "lo", "table", routeTable},
		{"ip", version, "rule", verb, "fwmark", ConnMark, "pref", rulePriority, "lookup", routeTable},
	}
}

// set brings in the rules with the iptables that the machine prefers, or with the
// other where its kernel has only that.
func (f family) set(ctx context.Context, ns *os.File, c Config) error {
	var failed []error
	for _, variant := range []string{"", "-legacy"} {
		err := f.change(ctx, ns, variant, c.tables(f))
		if err == nil {
			return nil
		}
		failed = append(failed, err)
	}
	return fmt.Errorf("set rules: %w", errors.Join(failed...))
}

// unset looks in both: whoever set the rules may have had the other.
func (f family) unset(ctx context.Context, ns *os.File) error {
	err := f.change(ctx, ns, "", nil)
	if _, lookErr := exec.LookPath(f.program + "-legacy-save"); lookErr == nil && err == nil {
		err = f.change(ctx, ns, "-legacy", nil)
	}
	if err != nil {
		return fmt.Errorf("remove rules: %w", err)
	}
	return nil
}

// change replaces what is there by tables.
func (f family) change(ctx context.Context, ns *os.File, variant string, tables []table) error {
	saved, err := Run(ctx, ns, "", f.program+variant+"-save")
	if err != nil {
		return err
	}
	text := transaction(tables, savedLines(saved))
	if text == "" {
		return nil
	}
	return f.restore(ctx, ns, variant, text)
}

// restore waits for the lock, which is one for all namespaces of the machine.
func (f family) restore(ctx context.Context, ns *os.File, variant, text string) error {
	_, err := Run(ctx, ns, text, f.program+variant+"-restore", "--noflush", "-w", "10")
	return err
}

// ApplyHost gives the connections that programs of the node itself open to a pod
// the source that the pod's rules let pass: kubelet's probes. ns is the node's
// namespace. Istio keeps one rule and a set of addresses; here each pod has one.
func ApplyHost(ctx context.Context, ns *os.File, pods ...netip.Addr) error {
	for _, pod := range pods {
		f, source, bits := ipv4, ProbeAddr, "/32"
		if pod.Is6() {
			f, source, bits = ipv6, ProbeAddr6, "/128"
		}
		rule := fmt.Sprintf("*nat\n-A POSTROUTING -d %v%s -p tcp -m owner --socket-exists -j SNAT --to-source %v\nCOMMIT\n", pod, bits, source)
		err := f.restore(ctx, ns, "", rule)
		if err != nil {
			err = f.restore(ctx, ns, "-legacy", rule)
		}
		if err != nil {
			return fmt.Errorf("set rule of the node for probes of %v: %w", pod, err)
		}
	}
	return nil
}
