// Package istiod is how to reach a control plane such as istiod, be it for
// certificates or for xDS: where it listens, by which roots it is judged, and the
// metadata that say who we are.
package istiod

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strings"
)

// Endpoint is where a server listens.
type Endpoint struct {
	Network string // tcp or unix
	Address string // host:port, or the path of a socket
	Host    string // whose name the server certificate has; "" for a socket
}

const wantAddress = "want https://host:port or unix:///path"

// ParseAddress reads https://host:port or unix:///path. A unix socket is used
// without TLS: whoever owns the socket is the server, and sees the token.
func ParseAddress(s string) (Endpoint, error) {
	if s == "" {
		return Endpoint{}, errors.New("field Address is empty, " + wantAddress)
	}
	u, err := url.Parse(s)
	switch {
	case err != nil && strings.Contains(s, "@"): // with a password, which the error repeats
		return Endpoint{}, errors.New("field Address is no URL, and has a user in it, " + wantAddress)
	case err != nil:
		return Endpoint{}, fmt.Errorf("field Address %q: %w, "+wantAddress, s, err)
	}
	s = u.Redacted()
	switch {
	case u.Scheme == "http":
		return Endpoint{}, fmt.Errorf("field Address %q: http is refused, since token and certificates would cross the network in the clear; "+wantAddress, s)
	case u.Scheme != "https" && u.Scheme != "unix":
		return Endpoint{}, fmt.Errorf("field Address %q: unknown scheme %q, "+wantAddress, s, u.Scheme)
	case u.User != nil || u.RawQuery != "" || u.Fragment != "" || u.Opaque != "":
		return Endpoint{}, fmt.Errorf("field Address %q: there is more than an address, "+wantAddress, s)
	}
	if u.Scheme == "unix" {
		if u.Host != "" || !strings.HasPrefix(u.Path, "/") || strings.HasSuffix(u.Path, "/") {
			return Endpoint{}, fmt.Errorf("field Address %q: no absolute path of a socket, "+wantAddress, s)
		}
		return Endpoint{Network: "unix", Address: u.Path}, nil
	}
	if u.Hostname() == "" || u.Path != "" && u.Path != "/" {
		return Endpoint{}, fmt.Errorf("field Address %q: no host, or a path behind it, "+wantAddress, s)
	}
	port := u.Port()
	if port == "" {
		port = "443"
	}
	return Endpoint{Network: "tcp", Address: net.JoinHostPort(u.Hostname(), port), Host: u.Hostname()}, nil
}

// CheckHostname wants "", a DNS name or an IP address, as names that a server's
// certificate may have.
func CheckHostname(name string) error {
	if name == "" {
		return nil
	}
	if _, err := netip.ParseAddr(name); err == nil {
		return nil
	}
	if !dnsName(name) {
		return fmt.Errorf("invalid alt hostname: %q, want a DNS name or an IP address", name)
	}
	return nil
}

// dnsName reports whether s is a host name, RFC 1123 §2.1; underscores are
// tolerated, as resolvers do.
func dnsName(s string) bool {
	s = strings.TrimSuffix(s, ".")
	if s == "" || len(s) > 253 {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for _, c := range []byte(label) {
			if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '_') {
				return false
			}
		}
	}
	return true
}
