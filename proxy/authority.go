package proxy

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// authority is the parsed :authority of a CONNECT request: an address, or a
// host name with a port.
type authority struct {
	Addr netip.AddrPort // valid when the authority is an address
	Host string         // otherwise
	Port uint16
}

// maxHost is the longest DNS name (RFC 1035 §2.3.4).
const maxHost = 253

// parseAuthority reads host:port strictly. What is not an IP literal must be a
// DNS name: nothing that a lenient parser would take for an address (127.1,
// 2130706433, zones, userinfo) passes.
func parseAuthority(s string) (authority, error) {
	bad := func(why string) (authority, error) {
		return authority{}, fmt.Errorf("no valid authority pseudo header: %s (%s)", clip(s, 80), why)
	}
	if ap, err := netip.ParseAddrPort(s); err == nil {
		if ap.Addr().Zone() != "" {
			return bad("an address with a zone is not allowed")
		}
		if ap.Port() == 0 {
			return bad("port 0 is not allowed")
		}
		return authority{Addr: netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())}, nil
	}
	host, portText, ok := strings.Cut(s, ":")
	if !ok || host == "" || strings.Contains(portText, ":") {
		return bad("want IP:port, [IPv6]:port or host:port")
	}
	if portText == "" || len(portText) > 5 || strings.Trim(portText, "0123456789") != "" {
		return bad("the port must be a decimal number from 1 to 65535")
	}
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil || port == 0 {
		return bad("the port must be a decimal number from 1 to 65535")
	}
	if why := badHost(host); why != "" {
		return bad(why)
	}
	return authority{Host: host, Port: uint16(port)}, nil
}

// badHost says what is wrong with a host name, "" if nothing is.
func badHost(host string) string {
	if len(host) > maxHost {
		return "the host is longer than 253 bytes"
	}
	last := ""
	for label := range strings.SplitSeq(strings.TrimSuffix(host, "."), ".") {
		if label == "" || len(label) > 63 {
			return "a label of the host must have 1 to 63 bytes"
		}
		for i := range len(label) {
			c := label[i]
			if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_') {
				return "the host may hold letters, digits, '-', '_' and '.' only"
			}
		}
		last = label
	}
	// A name whose last label is numeric would be read as an IPv4 address by
	// lenient parsers (WHATWG URL §3.5); no DNS name ends so.
	if strings.Trim(last, "0123456789") == "" || strings.HasPrefix(last, "0x") || strings.HasPrefix(last, "0X") {
		return "the host looks like an address that is not written as one"
	}
	return ""
}

// clip shortens what a peer sent before it goes into an error.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return s[:n] + "…"
}
