package state

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// String returns the name that logs and dumps use.
func (p Protocol) String() string {
	switch p {
	case TCP:
		return "TCP"
	case HBONE:
		return "HBONE"
	case DoubleHBONE:
		return "DOUBLEHBONE"
	}
	return fmt.Sprintf("Protocol(%d)", uint8(p))
}

// String returns the name that dumps use.
func (m NetworkMode) String() string {
	if m == HostNetwork {
		return "HostNetwork"
	}
	return "Standard"
}

// String returns the name that dumps use.
func (h Health) String() string {
	if h == Healthy {
		return "Healthy"
	}
	return "Unhealthy"
}

// String returns namespace/hostname.
func (n NamespacedHostname) String() string { return n.Namespace + "/" + n.Hostname }

// String returns network/IP.
func (a NetworkAddress) String() string { return a.Network + "/" + a.Addr.String() }

// String returns the destination without the port: network/IP or
// namespace/hostname.
func (g *GatewayAddress) String() string {
	if g.Address.Addr.IsValid() {
		return g.Address.String()
	}
	return g.Hostname.String()
}

// String names the workload in error texts.
func (w *Workload) String() string {
	return fmt.Sprintf("Workload{%s with uid %s (%s)}", w.Name, w.UID, w.Protocol)
}

// WorkloadUpdate is a workload as a control plane sends it.
type WorkloadUpdate struct {
	// Workload may lack its trust domain, service account and cluster, for which
	// Config has defaults. Identity and Services are derived and ignored here.
	Workload *Workload
	// Endpoints are the services that the workload is a member of, each with the
	// ports that the workload maps on its own account.
	Endpoints map[NamespacedHostname][]Port
}

// workload is a Workload with what is derived from it once.
type workload struct {
	Workload
	ids  []spiffeid.ID // Identity and its aliases: what the workload may present
	rank uint8         // who wins an address that several workloads claim
	ip   [1]netip.Addr // what IPs refers to if there is one only, as nearly always
}

// The ranks of workloads that share an address. The UID of a pod contains
// "//Pod/" (a "//v1/Pod/" is none).
const (
	rankOther uint8 = iota
	rankHBONE
	rankPod
	rankPodHBONE
)

// newWorkload completes and checks the workload of u. It copies the struct, not
// what it points to.
func (s *Store) newWorkload(u *WorkloadUpdate, pool *interner) (*workload, error) {
	if u.Workload == nil {
		return nil, errors.New("no workload")
	}
	w := &workload{Workload: *u.Workload}
	if w.UID == "" {
		return nil, errors.New("uid is empty")
	}
	if w.Protocol > HBONE {
		return nil, fmt.Errorf("unknown enum: protocol %d", w.Protocol)
	}
	if w.NetworkMode > HostNetwork {
		return nil, fmt.Errorf("unknown enum: network mode %d", w.NetworkMode)
	}
	if w.Health > Unhealthy {
		return nil, fmt.Errorf("unknown enum: status %d", w.Health)
	}
	if err := w.unmap(); err != nil {
		return nil, err
	}
	w.TrustDomain = or(w.TrustDomain, s.cfg.DefaultTrustDomain)
	w.ServiceAccount = or(w.ServiceAccount, "default")
	w.ClusterID = or(w.ClusterID, s.cfg.ClusterID)
	w.own()
	pool.workload(&w.Workload)
	var err error
	if w.Identity, w.ids, err = s.identities(&w.Workload, pool); err != nil {
		return nil, err
	}
	w.Services = pool.services(u.Endpoints)
	if strings.Contains(w.UID, "//Pod/") {
		w.rank += rankPod
	}
	if w.Protocol == HBONE {
		w.rank += rankHBONE
	}
	return w, nil
}

// own copies what is the workload's alone next to it. It is little, and what it
// lay in may be the whole of a response.
func (w *workload) own() {
	n := len(w.UID)
	if strings.HasSuffix(w.UID, w.Name) {
		w.UID = strings.Clone(w.UID)
		w.Name = w.UID[n-len(w.Name):]
	} else {
		both := w.UID + w.Name
		w.UID, w.Name = both[:n], both[n:]
	}
	if len(w.IPs) == 1 {
		w.ip[0] = w.IPs[0]
		w.IPs = w.ip[:]
	}
}

// identities returns the identity of w, and what w may present.
func (s *Store) identities(w *Workload, pool *interner) (spiffeid.ID, []spiffeid.ID, error) {
	key := account{w.TrustDomain, w.Namespace, w.ServiceAccount}
	if ids, ok := pool.ids.get(key); ok {
		return ids[0], ids, nil
	}
	id, err := identity(w.TrustDomain, w.Namespace, w.ServiceAccount)
	if err != nil {
		return spiffeid.ID{}, nil, err
	}
	ids := slices.Clip(s.withAliases(id))
	pool.ids.put(key, ids)
	return id, ids, nil
}

// identity joins the parts of an identity by the rules of SPIFFE-ID.md §2; in
// particular none may be empty and the trust domain must be lower case.
func identity(trustDomain, namespace, serviceAccount string) (spiffeid.ID, error) {
	td, err := spiffeid.TrustDomainFromString(trustDomain)
	if err != nil || td.Name() != trustDomain || len(trustDomain) > 255 {
		return spiffeid.ID{}, fmt.Errorf("trust domain %q: want 1 to 255 characters of a-z, 0-9, '.', '-', '_'", trustDomain)
	}
	if err := spiffeid.ValidatePathSegment(namespace); err != nil {
		return spiffeid.ID{}, fmt.Errorf("namespace %q in a SPIFFE ID: %w", namespace, err)
	}
	if err := spiffeid.ValidatePathSegment(serviceAccount); err != nil {
		return spiffeid.ID{}, fmt.Errorf("service account %q in a SPIFFE ID: %w", serviceAccount, err)
	}
	return spiffeid.FromSegments(td, "ns", namespace, "sa", serviceAccount)
}

// withAliases returns id and, if its trust domain is one of ours, the same
// identity in the other trust domains that are ours (decision D2).
func (s *Store) withAliases(id spiffeid.ID) []spiffeid.ID {
	ids := []spiffeid.ID{id}
	if !s.ours(id.TrustDomain().Name()) {
		return ids
	}
	for _, td := range s.trustDomains {
		if other, err := spiffeid.FromString("spiffe://" + td + id.Path()); err == nil && other != id {
			ids = append(ids, other)
		}
	}
	return ids
}

// owns tells whether ip is an address of w.
func (w *workload) owns(ip netip.Addr) bool {
	for _, a := range w.IPs {
		if a == ip {
			return true
		}
	}
	return false
}

// unmap brings the addresses of w into the form of the Store.
func (w *workload) unmap() error {
	var ipErr, waypointErr, gatewayErr error
	w.IPs, ipErr = unmapAll("workload IPs", w.IPs, unmapAddr)
	w.Waypoint, waypointErr = unmapGateway("waypoint", w.Waypoint)
	w.NetworkGateway, gatewayErr = unmapGateway("network gateway", w.NetworkGateway)
	return errors.Join(ipErr, waypointErr, gatewayErr)
}

func (w *workload) localRef() Ref {
	return Ref{Namespace: w.Namespace, Name: w.Name, ServiceAccount: w.ServiceAccount}
}

func (w *workload) hostKey() NamespacedHostname {
	return NamespacedHostname{Namespace: w.Namespace, Hostname: w.Hostname}
}

// lists tells whether w says that it is a member of a service.
func (w *workload) lists(key NamespacedHostname) bool { return slices.Contains(w.Services, key) }

func or(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}
