package dns

import (
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// Limits of resolv.conf(5). maxSearch is ours: the C library has none, and every
// name can cost as many questions.
const (
	maxNameservers = 3
	maxSearch      = 16
	maxNdots       = 15
	maxTimeout     = 30 * time.Second
	maxAttempts    = 5
)

// resolvConf is resolv.conf(5), as far as we follow it. It never changes: its
// pointer tells one version of the file from another.
type resolvConf struct {
	nameservers []netip.Addr
	search      []string // lower case, with the final dot
	ndots       int
	timeout     time.Duration // of one nameserver, per attempt
	attempts    int
	rotate      bool
	tcp         bool // never UDP
	edns        bool
}

// parseResolvConf ignores what it does not understand, as the C library does.
// Unlike it, it makes no search list from our own host name.
func parseResolvConf(text string) *resolvConf {
	c := &resolvConf{ndots: 1, timeout: 5 * time.Second, attempts: 2}
	for line := range strings.Lines(text) {
		if i := strings.IndexAny(line, "#;"); i >= 0 {
			line = line[:i]
		}
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		switch f[0] {
		case "nameserver":
			if ip, err := netip.ParseAddr(f[1]); err == nil && len(c.nameservers) < maxNameservers {
				c.nameservers = append(c.nameservers, ip.Unmap())
			}
		case "domain":
			c.setSearch(f[1:2])
		case "search":
			c.setSearch(f[1:])
		case "options":
			c.setOptions(f[1:])
		}
	}
	return c
}

// setSearch replaces the list: the last line wins.
func (c *resolvConf) setSearch(domains []string) {
	c.search = nil
	for _, d := range domains {
		if d, err := canonical(d); err == nil && len(c.search) < maxSearch {
			c.search = append(c.search, d)
		}
	}
}

func (c *resolvConf) setOptions(options []string) {
	for _, o := range options {
		name, value, _ := strings.Cut(o, ":")
		n, err := strconv.Atoi(value)
		if err != nil || n < 0 {
			n = 0
		}
		switch name {
		case "ndots":
			c.ndots = min(n, maxNdots)
		case "timeout":
			c.timeout = max(time.Second, min(time.Duration(min(n, 1000))*time.Second, maxTimeout))
		case "attempts":
			c.attempts = max(1, min(n, maxAttempts))
		case "rotate":
			c.rotate = true
		case "use-vc":
			c.tcp = true
		case "edns0":
			c.edns = true
		}
	}
}

// candidates are the names to ask for, in order, when host is looked up. absolute
// says that host ended with a dot; name is canonical.
func (c *resolvConf) candidates(name string, absolute bool) []string {
	if absolute {
		return []string{name}
	}
	var searched []string
	for _, d := range c.search {
		if full := name + d; len(full) <= maxName+1 {
			searched = append(searched, full)
		}
	}
	if strings.Count(name, ".")-1 >= c.ndots { // the final dot is ours
		return append([]string{name}, searched...)
	}
	return append(searched, name)
}
