package ca

import (
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// NewIdentity is the identity of a service account:
// spiffe://<td>/ns/<namespace>/sa/<service account>. Parts that make no SPIFFE
// ID, such as empty ones, are errors (design D19).
func NewIdentity(td spiffeid.TrustDomain, namespace, serviceAccount string) (spiffeid.ID, error) {
	if td.IsZero() {
		return spiffeid.ID{}, fmt.Errorf("invalid spiffe identity: the trust domain is empty (namespace %q, service account %q)", namespace, serviceAccount)
	}
	id, err := spiffeid.FromSegments(td, "ns", namespace, "sa", serviceAccount)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("invalid spiffe identity: trust domain %q, namespace %q, service account %q: %w", td.Name(), namespace, serviceAccount, err)
	}
	return id, nil
}

// ParseIdentity reads spiffe://<td>/ns/<namespace>/sa/<service account>, and
// nothing else.
func ParseIdentity(s string) (spiffeid.ID, error) {
	id, err := spiffeid.FromString(s)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("invalid spiffe identity: %q: %w", s, err)
	}
	if _, _, ok := SplitIdentity(id); !ok {
		return spiffeid.ID{}, fmt.Errorf("invalid spiffe identity: %q: want spiffe://<trust domain>/ns/<namespace>/sa/<service account>", s)
	}
	return id, nil
}

// SplitIdentity is the namespace and the service account of id; ok is false
// when its path has another form, as identities from elsewhere may.
func SplitIdentity(id spiffeid.ID) (namespace, serviceAccount string, ok bool) {
	rest, found := strings.CutPrefix(id.Path(), "/ns/")
	if !found {
		return "", "", false
	}
	namespace, rest, found = strings.Cut(rest, "/sa/")
	if !found || strings.Contains(namespace, "/") || strings.Contains(rest, "/") {
		return "", "", false
	}
	return namespace, rest, namespace != "" && rest != ""
}

// uriRule names the SPIFFE-ID rule that a URI breaks, "" when it is an
// identity of a workload. It judges the text, since url.Parse forgets an empty
// fragment, and it normalises nothing.
func uriRule(s string) (rule, reason string) {
	if len(s) > 2048 {
		return "R15", "the SPIFFE ID is longer than 2048 bytes"
	}
	rest, ok := strings.CutPrefix(s, "spiffe://")
	switch {
	case !ok:
		return "R1", "the URI SAN's scheme is not spiffe"
	case strings.Contains(rest, "#"):
		return "R4", "the SPIFFE ID has a fragment"
	case strings.Contains(rest, "?"):
		return "R3", "the SPIFFE ID has a query"
	}
	host, path, hasPath := strings.Cut(rest, "/")
	if rule, reason = hostRule(host); rule != "" {
		return rule, reason
	}
	if !hasPath || path == "" {
		return "R19", "the SPIFFE ID of a workload needs a path"
	}
	return pathRule(path)
}

func hostRule(host string) (rule, reason string) {
	switch {
	case host == "":
		return "R2", "the trust domain is empty"
	case strings.Contains(host, "@"):
		return "R5", "the SPIFFE ID has user information"
	case strings.ContainsAny(host, "[]"):
		return "R10", "the trust domain is an IPv6 address"
	case strings.Contains(host, ":"):
		return "R6", "the SPIFFE ID has a port"
	case strings.Contains(host, "%"):
		return "R9", "the trust domain is percent-encoded"
	case len(host) > 255:
		return "R15", "the trust domain is longer than 255 bytes"
	}
	for _, c := range []byte(host) {
		switch {
		case 'A' <= c && c <= 'Z':
			return "R7", "the trust domain has upper-case letters"
		case !idByte(c):
			return "R8", "the trust domain has a character outside [a-z0-9.-_]"
		}
	}
	return "", ""
}

func pathRule(path string) (rule, reason string) {
	if strings.Contains(path, "%") {
		return "R11", "the path is percent-encoded"
	}
	if strings.HasSuffix(path, "/") {
		return "R13", "the path ends in a slash"
	}
	for seg := range strings.SplitSeq(path, "/") {
		if seg == "" || seg == "." || seg == ".." {
			return "R12", "the path has an empty or a dot segment"
		}
		for _, c := range []byte(seg) {
			if !idByte(c) && (c < 'A' || c > 'Z') {
				return "R14", "the path has a character outside [a-zA-Z0-9.-_]"
			}
		}
	}
	return "", ""
}

// idByte reports whether c may stand in a trust domain; paths allow upper-case
// letters too.
func idByte(c byte) bool {
	return 'a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '.' || c == '-' || c == '_'
}
