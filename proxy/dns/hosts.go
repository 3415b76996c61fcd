package dns

import (
	"net/netip"
	"strings"
)

// hosts is hosts(5): canonical names and their addresses, in the file's order.
type hosts map[string][]netip.Addr

// parseHosts ignores what it does not understand.
func parseHosts(text string) hosts {
	h := hosts{}
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		ip, err := netip.ParseAddr(f[0])
		if err != nil {
			continue
		}
		for _, name := range f[1:] {
			if name, err := canonical(name); err == nil && len(h[name]) < maxAddrs {
				h[name] = append(h[name], ip.Unmap())
			}
		}
	}
	return h
}

var (
	loopback4 = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	loopback6 = netip.IPv6Loopback()
)

// builtin answers the names that no nameserver is asked for (RFC 6761 §6.3,
// §6.4, RFC 7686). Their subdomains are the same.
func builtin(name string) (addrs []netip.Addr, known bool) {
	within := func(domain string) bool { return name == domain || strings.HasSuffix(name, "."+domain) }
	switch {
	case within("localhost."):
		return []netip.Addr{loopback4, loopback6}, true
	case within("invalid."), within("onion."):
		return nil, true
	}
	return nil, false
}
