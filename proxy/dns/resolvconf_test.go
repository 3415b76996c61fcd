package dns

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestParseResolvConf(t *testing.T) {
	ip := netip.MustParseAddr
	defaults := func(change func(*resolvConf)) *resolvConf {
		c := &resolvConf{ndots: 1, timeout: 5 * time.Second, attempts: 2}
		change(c)
		return c
	}
	for _, tt := range []struct {
		name, text string
		want       *resolvConf
	}{
		{"empty", "", defaults(func(c *resolvConf) {})},
		{"of a pod", "search default.svc.cluster.local svc.cluster.local cluster.local\nnameserver 10.96.0.10\noptions ndots:5\n", defaults(func(c *resolvConf) {
			c.search = []string{"default.svc.cluster.local.", "svc.cluster.local.", "cluster.local."}
			c.nameservers = []netip.Addr{ip("10.96.0.10")}
			c.ndots = 5
		})},
		{"nameservers", "nameserver 10.0.0.1\nnameserver nonsense\nnameserver\nnameserver fe80::1%eth0\n nameserver\t::ffff:10.0.0.3 # third\nnameserver 10.0.0.4", defaults(func(c *resolvConf) {
			c.nameservers = []netip.Addr{ip("10.0.0.1"), ip("fe80::1%eth0"), ip("10.0.0.3")}
		})},
		{"last list wins", "search a b\ndomain C.\n", defaults(func(c *resolvConf) { c.search = []string{"c."} })},
		{"bad names", "search a..b ok ä .\n; search x\n#search y\n", defaults(func(c *resolvConf) { c.search = []string{"ok."} })},
		{"options", "options timeout:1 attempts:3 ndots:0 rotate\noptions use-vc edns0 trust-ad\n", defaults(func(c *resolvConf) {
			c.timeout, c.attempts, c.ndots, c.rotate, c.tcp, c.edns = time.Second, 3, 0, true, true, true
		})},
		{"beyond the limits", "options timeout:99999999999 attempts:99 ndots:99\n", defaults(func(c *resolvConf) {
			c.timeout, c.attempts, c.ndots = maxTimeout, maxAttempts, maxNdots
		})},
		{"long", "options timeout:600 attempts:0\n", defaults(func(c *resolvConf) { c.timeout, c.attempts = maxTimeout, 1 })},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := parseResolvConf(tt.text)
			if d := cmp.Diff(tt.want, got, cmp.AllowUnexported(resolvConf{}), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestParseHosts(t *testing.T) {
	got := parseHosts("127.0.0.1\tlocalhost lo # all\n#10.0.0.1 commented\nnonsense a\n10.0.0.2\n10.0.0.3 A.b b..c\n::ffff:10.0.0.4 a.b.\n")
	want := hosts{"localhost.": {loopback4}, "lo.": {loopback4}, "a.b.": {netip.MustParseAddr("10.0.0.3"), netip.MustParseAddr("10.0.0.4")}}
	if d := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
		t.Error(d)
	}
}
