//go:build linux

// Package rules holds the redirection rules that a CNI plugin sets in the
// network namespace of a pod, so that its connections come to the proxy: those of
// Istio (spec/identity-admin-inpod.md §7.11) and those of Cilium
// (spec/cilium-spire.md §1.8).
package rules

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Set names whose rules are meant.
type Set string

// The sets. Both redirect TCP, use the same marks and the same route table; only
// Istio's also redirects DNS and lets the kubelet's probes pass.
const (
	Istio  Set = "istio"
	Cilium Set = "cilium"
)

// Marks of the proxy's packets and of the connections that it opened, and where
// packets of the latter are routed. The proxy has to use the same PACKET_MARK.
const (
	PacketMark = "0x539/0xfff"
	ConnMark   = "0x111/0xfff"

	routeTable   = "100"
	rulePriority = "32764"
)

// Ports of the proxy to which the rules lead.
const (
	OutboundPort = 15001
	InboundPort  = 15006
	HBONEPort    = 15008
	DNSPort      = 15053
)

// Addresses that the kubelet's probes come from: the node's CNI plugin gives
// them this source.
var (
	ProbeAddr  = netip.MustParseAddr("169.254.7.127")
	ProbeAddr6 = netip.MustParseAddr("fd16:9254:7127:1337:ffff:ffff:ffff:ffff")
)

// Config is what varies between pods. The zero value is Istio's set without DNS,
// for IPv4 and, where the namespace has it, IPv6.
type Config struct {
	Set Set // empty: Istio
	// DNS redirects port 53, UDP and TCP. Istio only.
	DNS bool
	// Ingress leaves inbound connections alone, as those of an ingress gateway
	// are. Istio only.
	Ingress bool
	// Interfaces are those of virtual machines in the pod: what they send is
	// outbound. Istio only.
	Interfaces []string
}

// Validate names what a set does not have.
func (c Config) Validate() error {
	switch c.Set {
	case "", Istio:
		return nil
	case Cilium:
		if c.DNS || c.Ingress || len(c.Interfaces) > 0 {
			return fmt.Errorf("rule set %s has no DNS, ingress or virtual interfaces: want none of them, or the set %s", Cilium, Istio)
		}
		return nil
	}
	return fmt.Errorf("rule set %q: want %s or %s", c.Set, Istio, Cilium)
}

// family is what differs between IPv4 and IPv6.
type family struct {
	v6       bool
	program  string // prefix of iptables' programs
	loopback string
	probe    string
	all      string // every address
}

var (
	ipv4 = family{program: "iptables", loopback: "127.0.0.1/32", probe: ProbeAddr.String() + "/32", all: "0.0.0.0/0"}
	ipv6 = family{v6: true, program: "ip6tables", loopback: "::1/128", probe: ProbeAddr6.String() + "/128", all: "::/0"}
)

// table is one table of a set: chains of its own, which built-in ones jump to.
type table struct {
	name  string
	jumps [][2]string // built-in chain, chain
	rules []string    // as after iptables -A
}

// tables are the rules of one family, in the order in which they are set.
func (c Config) tables(f family) []table {
	prerouting, output := "ISTIO_PRERT", "ISTIO_OUTPUT"
	if c.Set == Cilium {
		prerouting, output = "CILIUM_PREROUTING", "CILIUM_OUTPUT"
	}
	jumps := [][2]string{{"PREROUTING", prerouting}, {"OUTPUT", output}}
	notLoopback := "! -d " + f.loopback
	unmarked := "-m mark ! --mark " + PacketMark

	mangle := table{name: "mangle", jumps: jumps, rules: []string{
		// Answers of the application to the proxy, which took the client's address,
		// come back to this namespace: see Apply for the route.
		output + " -m connmark --mark " + ConnMark + " -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff",
		prerouting + " -m mark --mark " + PacketMark + " -j CONNMARK --set-xmark " + ConnMark,
	}}
	nat := table{name: "nat", jumps: jumps}
	add := func(rule ...string) { nat.rules = append(nat.rules, strings.Join(rule, " ")) }
	for _, name := range c.Interfaces {
		add(prerouting, "-i", name, "-p tcp -j REDIRECT --to-ports", fmt.Sprint(OutboundPort))
		add(prerouting, "-i", name, "-p tcp -j RETURN")
	}
	if c.Set != Cilium {
		add(output, "-d", f.probe, "-p tcp -m tcp -j ACCEPT")
	}
	if c.DNS {
		add(output, "! -o lo -p udp -m udp --dport 53", unmarked, "-j REDIRECT --to-ports", fmt.Sprint(DNSPort))
		add(output, notLoopback, "-p tcp -m tcp --dport 53", unmarked, "-j REDIRECT --to-ports", fmt.Sprint(DNSPort))
	}
	add(output, "-p tcp -m mark --mark", ConnMark, "-j ACCEPT")
	add(output, notLoopback, "-o lo -j ACCEPT")
	add(output, notLoopback, "-p tcp", unmarked, "-j REDIRECT --to-ports", fmt.Sprint(OutboundPort))
	if !c.Ingress {
		if c.Set != Cilium {
			add(prerouting, "-s", f.probe, "-p tcp -m tcp -j ACCEPT")
		}
		add(prerouting, notLoopback, "-p tcp -m tcp ! --dport", fmt.Sprint(HBONEPort), unmarked, "-j REDIRECT --to-ports", fmt.Sprint(InboundPort))
	}
	out := []table{mangle, nat}
	if c.DNS {
		// A query of the application and the proxy's own for the same name may have
		// the same addresses and ports: in zones of their own they are two.
		out = append(out, table{name: "raw", jumps: jumps, rules: []string{
			output + " -p udp -m mark --mark " + PacketMark + " -m udp --dport 53 -j CT --zone 1",
			prerouting + " -p udp " + unmarked + " -m udp --sport 53 -j CT --zone 1",
		}})
	}
	return out
}

// Text is what iptables-restore reads to set the rules where there are none, or
// ip6tables-restore if v6 is set.
func (c Config) Text(v6 bool) string {
	f := ipv4
	if v6 {
		f = ipv6
	}
	return transaction(c.tables(f), nil)
}

// tableNames are all that a set may use.
var tableNames = []string{"raw", "mangle", "nat"}

// chains are those of all sets, with the built-in one that jumps there.
var chains = [][2]string{
	{"PREROUTING", "ISTIO_PRERT"}, {"OUTPUT", "ISTIO_OUTPUT"}, {"PREROUTING", "CILIUM_PREROUTING"}, {"OUTPUT", "CILIUM_OUTPUT"},
}

// transaction is what iptables-restore --noflush reads to replace whatever set
// is there by the given one, which may be none. Each table changes at once: there
// is no moment at which a captured pod is not.
func transaction(want []table, there []string) string {
	var b strings.Builder
	for _, name := range tableNames {
		var t table
		if i := slices.IndexFunc(want, func(t table) bool { return t.name == name }); i >= 0 {
			t = want[i]
		}
		var lines []string
		for _, jump := range t.jumps {
			lines = append(lines, ":"+jump[1]+" - [0:0]") // a chain that is there is emptied
		}
		for _, jump := range chains {
			jumps := slices.Contains(there, fmt.Sprintf("%s -A %s -j %s", name, jump[0], jump[1]))
			switch wanted := slices.Contains(t.jumps, jump); {
			case wanted && !jumps:
				lines = append(lines, fmt.Sprintf("-A %s -j %s", jump[0], jump[1]))
			case !wanted && jumps:
				lines = append(lines, fmt.Sprintf("-D %s -j %s", jump[0], jump[1]))
			}
			if !slices.Contains(t.jumps, jump) && slices.Contains(there, name+" :"+jump[1]) {
				lines = append(lines, "-F "+jump[1], "-X "+jump[1])
			}
		}
		for _, rule := range t.rules {
			lines = append(lines, "-A "+rule)
		}
		if len(lines) > 0 {
			fmt.Fprintf(&b, "*%s\n%s\nCOMMIT\n", name, strings.Join(lines, "\n"))
		}
	}
	return b.String()
}

// savedLines makes lines of iptables-save comparable: each with its table.
func savedLines(saved string) []string {
	var out []string
	name := ""
	for line := range strings.Lines(saved) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "*"):
			name = line[1:]
		case strings.HasPrefix(line, ":"):
			out = append(out, name+" "+strings.Fields(line)[0])
		case strings.HasPrefix(line, "-A "):
			out = append(out, name+" "+line)
		}
	}
	return out
}
