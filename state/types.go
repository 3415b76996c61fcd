package state

import (
	"errors"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Protocol is how a workload is reached.
type Protocol uint8

// The protocols. DoubleHBONE never stands in a workload; only a Route has it.
const (
	TCP Protocol = iota
	HBONE
	DoubleHBONE
)

// NetworkMode says whether a workload has an address of its own.
type NetworkMode uint8

// Workloads in HostNetwork mode are not found by address.
const (
	Standard NetworkMode = iota
	HostNetwork
)

// Health of a workload or endpoint.
type Health uint8

// The health states.
const (
	Healthy Health = iota
	Unhealthy
)

// NamespacedHostname names a service; its text form is namespace/hostname.
type NamespacedHostname struct{ Namespace, Hostname string }

// NetworkAddress is an address in one network; its text form is network/IP.
type NetworkAddress struct {
	Network string
	Addr    netip.Addr
}

// GatewayAddress refers to a waypoint or a network gateway, by address or, when
// Address.Addr is the zero value, by hostname.
type GatewayAddress struct {
	Address  NetworkAddress
	Hostname NamespacedHostname
	Port     uint16
}

// ApplicationTunnel says that a workload wants its traffic on Port (0: as sent),
// behind a PROXY header when Proxy is set.
type ApplicationTunnel struct {
	Proxy bool
	Port  uint16
}

// Locality is where a workload runs.
type Locality struct{ Region, Zone, Subzone string }

// Workload is a pod or VM instance. It is immutable once it is in a Store.
type Workload struct {
	UID, Name, Namespace, ServiceAccount, TrustDomain string
	Network, Node, ClusterID                          string
	IPs                                               []netip.Addr
	Hostname                                          string
	Protocol                                          Protocol
	NetworkMode                                       NetworkMode
	Health                                            Health
	Capacity                                          uint32
	NativeTunnel                                      bool
	WorkloadName, WorkloadType                        string // type: deployment, cronjob, pod, job
	CanonicalName, CanonicalRevision                  string
	Locality                                          Locality
	Services                                          []NamespacedHostname
	Waypoint, NetworkGateway                          *GatewayAddress
	ApplicationTunnel                                 *ApplicationTunnel
	AuthorizationPolicies                             []string // keys
	// Identity is derived from TrustDomain, Namespace and ServiceAccount when the
	// workload is applied. A workload whose parts make no SPIFFE ID is rejected.
	Identity spiffeid.ID
}

// Ref names the workload for which a proxy stands in (spec/datapath.md §2.4).
type Ref struct{ Namespace, Name, ServiceAccount string }

// ServiceRef is what logs and metrics need to know of a service.
type ServiceRef struct{ Hostname, Name, Namespace string }

// Query asks where an outbound connection goes.
type Query struct {
	Source   *Workload  // the local workload
	SourceIP netip.Addr // of the application's socket
	Dst      netip.AddrPort
	Avoid    []string // UIDs of endpoints that have just failed (design D8)
	// Asked are the keys of earlier Misses that were demanded for this question:
	// if one of them is still unknown, it does not exist.
	Asked []string
	// Draw returns a uniform number in [0, n); nil means math/rand/v2.
	Draw func(n uint64) uint64
}

// Route is where an outbound connection goes (spec/datapath.md §4.2).
type Route struct {
	Rule        string // the row of §4.4: A1, A2, C, D, E, F, G
	Protocol    Protocol
	NextHop     netip.AddrPort // the actual destination; only the port is set while Resolve is
	Authority   Authority      // of the CONNECT request (for double HBONE of both), zero for TCP
	Workload    *Workload      // to which the connection goes, nil if unknown; for double HBONE the one behind the gateway
	Gateway     *Workload      // at the next hop of double HBONE, else nil
	Service     *ServiceRef    // intended by the client, nil if none
	ExpectedIDs []spiffeid.ID  // identities, one of which the next hop must present
	FinalIDs    []spiffeid.ID  // the same for the inner tunnel of double HBONE
	// Resolve is the hostname of a workload without address: the caller resolves it
	// and goes on with Resolved.
	Resolve string
}

// Authority is what a CONNECT request asks for: Addr, or Host and Port if Host is
// set. The zero value is none. It is comparable, and making one costs nothing.
type Authority struct {
	Addr netip.AddrPort
	Host string
	Port uint16
}

// String returns host:port, in brackets if the host is an IPv6 address; "" for none.
func (a Authority) String() string {
	switch {
	case a.Host != "":
		return net.JoinHostPort(a.Host, strconv.Itoa(int(a.Port)))
	case a.Addr.IsValid():
		return a.Addr.String()
	}
	return ""
}

// Hop is the workload at the next hop, nil if unknown.
func (r *Route) Hop() *Workload {
	if r.Gateway != nil {
		return r.Gateway
	}
	return r.Workload
}

// InboundQuery asks what an HBONE request that reached the local workload means
// (spec/datapath.md §6.2).
type InboundQuery struct {
	Local         *Workload
	ConnDst       netip.AddrPort // local address of the tunnel
	Addr          netip.AddrPort // the authority, when it is an address
	Host          string         // the authority's host and Port, when it is a name
	Port          uint16
	ForwardedHost string   // host of the forwarded header, "" if absent
	Asked         []string // as in Query
}

// InboundRoute is the answer.
type InboundRoute struct {
	Upstream netip.AddrPort // the application's address, with the port of an application tunnel
	Service  *ServiceRef    // the guessed destination service, nil if none
	// Proxy says that the application wants a PROXY header before the data (an
	// application tunnel, spec/datapath.md §6.6), which names Target, the address
	// that the client asked for. Target is the zero value if there is none.
	Proxy  bool
	Target netip.AddrPort
}

// Conn is what a policy sees of a connection (spec/datapath.md §6.4).
type Conn struct {
	Src         netip.AddrPort
	Dst         netip.AddrPort // final port, after an application tunnel
	Identity    spiffeid.ID    // zero: plaintext, no identity
	Destination *Workload      // the local workload
}

// Verdict is the outcome of Authorize.
// Its slices are shared and must not be modified.
type Verdict struct {
	Denied  *Denied       // nil: allowed
	Policy  string        // namespace/name of the policy that decided, "" if none did
	Rule    int           // its rule that matched, from 0
	Events  []PolicyEvent // the policies that matched, dry-run or enforced, and the outcome: the lines of the policy log
	Missing []string      // policies that the workload names and nobody has sent
}

// PolicyEvent is one line of the policy log (spec/state-xds-dns.md §4.11).
type PolicyEvent struct {
	Message string
	Policy  string // namespace/name, "" if the line speaks of no single policy
}

// Denied is the error of a refused connection. Its text is the one that the
// access log carries (spec/datapath.md §10.6).
type Denied struct {
	Policy string // namespace/name of the DENY policy; "" when no ALLOW policy matched
}

// Miss is the error of a decision that needs resources which the Store does not
// know and which the control plane sends on demand only (Config.OnDemand). The
// caller demands the keys and asks again, with them in Asked.
type Miss struct {
	// Keys are names of resources: network/IP, namespace/hostname or a UID.
	Keys []string
}

// Error lists the keys.
func (m *Miss) Error() string { return "not known yet: " + strings.Join(m.Keys, ", ") }

// The errors on which callers branch. Each is wrapped with its subject.
var (
	ErrNoHealthyUpstream  = errors.New("no healthy upstream")
	ErrNoValidDestination = errors.New("no valid routing destination for workload")
	ErrUnknownWaypoint    = errors.New("unknown waypoint")
	ErrUnknownGateway     = errors.New("unknown network gateway")
	ErrNoService          = errors.New("no service for target address")
	ErrIPMismatch         = errors.New("ip mismatch")
)
