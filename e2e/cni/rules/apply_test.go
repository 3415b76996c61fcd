//go:build linux

package rules

import (
	"context"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ztunnel-go/ztunnel/e2e/netlab"
)

// skip skips, except where that would hide that the test never runs.
func skip(t *testing.T, why string) {
	t.Helper()
	if os.Getenv("CI") != "" || os.Getenv("ZTUNNEL_REQUIRE_ROOT") == "1" {
		t.Fatal(why + ", and CI or ZTUNNEL_REQUIRE_ROOT=1 forbids to skip")
	}
	t.Skip(why)
}

func newNamespace(t *testing.T, name string) (context.Context, *netlab.Namespace) {
	t.Helper()
	if os.Geteuid() != 0 {
		skip(t, "needs root")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	n, err := netlab.New(ctx, name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return ctx, n
}

// state is all that a set changes in a namespace.
func state(t *testing.T, ctx context.Context, n *netlab.Namespace) []string {
	t.Helper()
	var out []string
	for _, line := range []string{"iptables-save", "ip6tables-save", "ip -4 rule", "ip -6 rule", "ip -4 route show table all", "ip -6 route show table all"} {
		text, err := Run(ctx, n.File, "", strings.Fields(line)...)
		if err != nil && !strings.Contains(err.Error(), "FIB table does not exist") {
			t.Fatal(err)
		}
		for l := range strings.Lines(text) {
			// Built-in chains and counters say nothing of rules.
			if l = strings.TrimSpace(l); !strings.HasPrefix(l, "#") && !strings.Contains(l, " ACCEPT [") && l != "COMMIT" && !strings.HasPrefix(l, "*") {
				out = append(out, l)
			}
		}
	}
	return out
}

// Setting a set twice is setting it once, the sets replace each other, other
// rules stay, and removal leaves what was there before.
func TestApplyAndRemove(t *testing.T) {
	ctx, n := newNamespace(t, "rules")
	const foreign = "*nat\n:OTHER - [0:0]\n-A OUTPUT -j OTHER\n-A OTHER -p tcp --dport 9 -j ACCEPT\nCOMMIT\n"
	if _, err := Run(ctx, n.File, foreign, "iptables-restore", "--noflush"); err != nil {
		t.Fatal(err)
	}
	before := state(t, ctx, n)
	apply := func(c Config) []string {
		t.Helper()
		if err := Apply(ctx, n.File, c); err != nil {
			t.Fatal(err)
		}
		return state(t, ctx, n)
	}
	istio := apply(Config{DNS: true})
	if d := cmp.Diff(istio, apply(Config{DNS: true})); d != "" {
		t.Errorf("the same set again (-once +twice):\n%s", d)
	}
	for _, want := range []string{
		"-A OTHER -p tcp -m tcp --dport 9 -j ACCEPT",
		"-A ISTIO_OUTPUT ! -o lo -p udp -m udp --dport 53 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15053",
		"-A ISTIO_PRERT -s fd16:9254:7127:1337:ffff:ffff:ffff:ffff/128 -p tcp -m tcp -j ACCEPT",
		"32764:	from all fwmark 0x111/0xfff lookup 100",
		"local default dev lo table 100 scope host",
	} {
		if !slices.Contains(istio, want) {
			t.Errorf("no %q in\n%s", want, strings.Join(istio, "\n"))
		}
	}
	cilium := apply(Config{Set: Cilium})
	if text := strings.Join(cilium, "\n"); strings.Contains(text, "ISTIO_") || !strings.Contains(text, "-A OUTPUT -j CILIUM_OUTPUT") {
		t.Errorf("Cilium's set after Istio's:\n%s", text)
	}
	for range 2 {
		if err := Remove(ctx, n.File); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(before, state(t, ctx, n)); d != "" {
			t.Errorf("after removal (-before +after):\n%s", d)
		}
	}
}

// Rules that were set with the other iptables of the machine are removed, too.
func TestRemove_Legacy(t *testing.T) {
	ctx, n := newNamespace(t, "legacy")
	for _, f := range []family{ipv4, ipv6} {
		if _, err := exec.LookPath(f.program + "-legacy-restore"); err != nil {
			skip(t, "needs "+f.program+"-legacy-restore")
		}
		if err := f.change(ctx, n.File, "-legacy", Config{DNS: true}.tables(f)); err != nil {
			t.Fatal(err)
		}
		saved, err := Run(ctx, n.File, "", f.program+"-legacy-save")
		if err != nil || !strings.Contains(saved, "-A OUTPUT -j ISTIO_OUTPUT") {
			t.Fatalf("rules of %s-legacy: got %q, %v", f.program, saved, err)
		}
	}
	if err := Remove(ctx, n.File); err != nil {
		t.Fatal(err)
	}
	for _, f := range []family{ipv4, ipv6} {
		if saved, err := Run(ctx, n.File, "", f.program+"-legacy-save"); err != nil || strings.Contains(saved, "ISTIO") {
			t.Errorf("after removal %s-legacy has %q, %v", f.program, saved, err)
		}
	}
}

// A namespace without IPv6 gets the rules of IPv4.
func TestApply_NoIPv6(t *testing.T) {
	ctx, n := newNamespace(t, "rules4")
	if err := n.Sysctl(map[string]string{"net/ipv6/conf/all/disable_ipv6": "1"}); err != nil {
		t.Fatal(err)
	}
	if err := Apply(ctx, n.File, Config{}); err != nil {
		t.Fatal(err)
	}
	if got, err := Run(ctx, n.File, "", "ip6tables-save"); err != nil || strings.Contains(got, "ISTIO") {
		t.Errorf("rules of IPv6: got %q, %v, want none", got, err)
	}
	if got, err := Run(ctx, n.File, "", "iptables-save"); err != nil || !strings.Contains(got, "ISTIO_OUTPUT") {
		t.Errorf("rules of IPv4: got %q, %v", got, err)
	}
	if err := Remove(ctx, n.File); err != nil {
		t.Error(err)
	}
}

func TestApplyHost(t *testing.T) {
	ctx, n := newNamespace(t, "ruleshost")
	if err := ApplyHost(ctx, n.File, netip.MustParseAddr("10.0.1.2"), netip.MustParseAddr("fd10:1::2")); err != nil {
		t.Fatal(err)
	}
	got := strings.Join(state(t, ctx, n), "\n")
	for _, want := range []string{
		"-A POSTROUTING -d 10.0.1.2/32 -p tcp -m owner --socket-exists -j SNAT --to-source 169.254.7.127",
		"-A POSTROUTING -d fd10:1::2/128 -p tcp -m owner --socket-exists -j SNAT --to-source fd16:9254:7127:1337:ffff:ffff:ffff:ffff",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
}

// An error carries what the program said.
func TestRun_Error(t *testing.T) {
	ctx, n := newNamespace(t, "rulesrun")
	if _, err := Run(ctx, n.File, "nonsense\n", "iptables-restore"); err == nil || !strings.Contains(err.Error(), "iptables-restore") {
		t.Errorf("got %v", err)
	}
}
