package proxy

import (
	"net/netip"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/proxy/hbone"
	"github.com/ztunnel-go/ztunnel/state"
)

// The header fields of HBONE (spec/datapath.md §5.2).
const (
	fieldBaggage     = "baggage"
	fieldForwarded   = "forwarded"
	fieldTraceparent = "traceparent"
	fieldNetwork     = "x-forwarded-network"
)

// maxBaggageValue bounds what a peer can put into a label or a log line.
const maxBaggageValue = 253

// baggage is what a peer tells of its workload. Its fields are "" when absent.
// It is a hint for telemetry; nothing is authorized by it.
type baggage struct {
	cluster, namespace, workloadType, workload string
	service, version, region, zone             string
}

// baggageOf is the baggage of one of our workloads; nil gives an empty one.
func baggageOf(w *state.Workload) baggage {
	if w == nil {
		return baggage{}
	}
	return baggage{
		cluster: w.ClusterID, namespace: w.Namespace,
		workloadType: w.WorkloadType, workload: w.WorkloadName,
		service: w.CanonicalName, version: w.CanonicalRevision,
		region: w.Locality.Region, zone: w.Locality.Zone,
	}
}

// String renders the header value (spec/datapath.md §5.3): fixed order, empty
// values left out. Characters that would break the list are dropped, so that
// what we send always parses back.
func (b baggage) String() string {
	var sb strings.Builder
	add := func(key, value string) {
		if value = baggageValue(value); value == "" {
			return
		}
		if sb.Len() > 0 {
			sb.WriteByte(',')
		}
		sb.WriteString(key)
		sb.WriteByte('=')
		sb.WriteString(value)
	}
	kind := b.workloadType
	if kind == "" {
		kind = "deployment"
	}
	add("k8s.cluster.name", b.cluster)
	add("k8s.namespace.name", b.namespace)
	add("k8s."+kind+".name", b.workload)
	add("service.name", b.service)
	add("service.version", b.version)
	add("cloud.region", b.region)
	add("cloud.availability_zone", b.zone)
	return sb.String()
}

// of narrows what a peer tells to what may be true of it: the namespace is the
// one of the identity that its certificate proves.
func (b *baggage) of(id spiffeid.ID) *baggage {
	if ns, ok := identityNamespace(id); ok && b.namespace != "" {
		b.namespace = ns
	}
	return b
}

// identityNamespace is the namespace of an identity of the usual form,
// /ns/<namespace>/sa/<service account>.
func identityNamespace(id spiffeid.ID) (string, bool) {
	parts := strings.Split(id.Path(), "/")
	if len(parts) != 5 || parts[1] != "ns" || parts[3] != "sa" {
		return "", false
	}
	return parts[2], true
}

// baggageValue drops what can't stand in a value.
func baggageValue(s string) string {
	if strings.IndexFunc(s, notBaggage) < 0 {
		return s
	}
	return strings.Map(func(r rune) rune {
		if notBaggage(r) {
			return -1
		}
		return r
	}, s)
}

func notBaggage(r rune) bool { return r <= ' ' || r >= 0x7f || r == ',' || r == '=' }

// parseBaggage reads all occurrences of the header. ok is false when a value
// holds anything but visible ASCII; then nothing of it is used.
func parseBaggage(fields []hbone.Field) (b baggage, ok bool) {
	for _, f := range fields {
		if f.Name == fieldBaggage && !visibleASCII(f.Value) {
			return baggage{}, false
		}
	}
	for _, f := range fields {
		if f.Name != fieldBaggage {
			continue
		}
		for entry := range strings.SplitSeq(f.Value, ",") {
			key, value, _ := strings.Cut(entry, "=")
			value, _, _ = strings.Cut(value, "=")
			b.set(key, clipBaggage(value))
		}
	}
	return b, true
}

// clipBaggage cuts a value to its bound, without a mark: it becomes a label.
func clipBaggage(s string) string { return s[:min(len(s), maxBaggageValue)] }

func (b *baggage) set(key, value string) {
	switch key {
	case "k8s.cluster.name":
		b.cluster = value
	case "k8s.namespace.name":
		b.namespace = value
	case "k8s.deployment.name", "k8s.cronjob.name", "k8s.pod.name", "k8s.job.name":
		b.workloadType = strings.TrimSuffix(strings.TrimPrefix(key, "k8s."), ".name")
		b.workload = value
	case "service.name":
		b.service = value
	case "service.version":
		b.version = value
	case "cloud.region":
		b.region = value
	case "cloud.availability_zone":
		b.zone = value
	}
}

func visibleASCII(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' {
			return false
		}
	}
	return true
}

// forwardedHeader renders the forwarded field of our requests (RFC 7239):
// for="ip:port", and the intended service's host when there is one.
func forwardedHeader(src netip.AddrPort, host string) string {
	s := `for="` + src.String() + `"`
	if host != "" {
		s += ";host=" + host
	}
	return s
}

// forwardedHost reads the host of a peer's forwarded field: the first
// occurrence only, "" when it is absent, empty or not ASCII.
func forwardedHost(fields []hbone.Field) string {
	value, ok := fieldValue(fields, fieldForwarded)
	if !ok || !visibleASCII(value) {
		return ""
	}
	for part := range strings.SplitSeq(value, ";") {
		host, found := strings.CutPrefix(strings.TrimSpace(part), "host=")
		if !found {
			continue
		}
		if n := len(host); n >= 2 && host[0] == '"' && host[n-1] == '"' {
			host = host[1 : n-1]
		}
		return clipBaggage(host)
	}
	return ""
}

// fieldValue is the first value of a field.
func fieldValue(fields []hbone.Field, name string) (string, bool) {
	for _, f := range fields {
		if f.Name == name {
			return f.Value, true
		}
	}
	return "", false
}
