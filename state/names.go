package state

import (
	"bytes"
	"net/netip"
	"slices"
	"strings"
)

// maxHostname is the longest host name in text, without a final dot (RFC 1035
// §2.3.4: 255 octets on the wire).
const maxHostname = 253

// NameQuery asks what a host name means to a client (spec/state-xds-dns.md §5.3).
type NameQuery struct {
	// Client asks: the services that its namespace may see count, and the addresses
	// of its network.
	Client *Workload
	// Name is in lower case and has no final dot. It is not modified.
	Name []byte
	// IPv6 asks for IPv6 addresses, otherwise IPv4 ones are wanted.
	IPv6 bool
	// Domain is that of the cluster, such as cluster.local.
	Domain string
	// Search are the domains that the client's resolver appends to names, in the
	// form of Name: where one of them is the end of Name, what is before it is tried,
	// too.
	Search []string
	// Preferred is a namespace whose services come before those of others, but after
	// those of the client's namespace and canonical ones. It may be empty.
	Preferred string
}

// NameAnswer is the service that a name means, and its addresses.
type NameAnswer struct {
	// Service is shared and must not be modified.
	Service *ServiceRef
	// Bare is how many bytes of the query's Name are left when the search domain is
	// taken off that led to the service; 0 if none was.
	Bare int
	// Wildcard says that the service's hostname begins with *.
	Wildcard bool
	// OtherFamily says that the service has no addresses of the wanted family by
	// its own declaration.
	OtherFamily bool
	// Addrs are in no particular order and no two of them are equal. There may be
	// none: the name exists all the same.
	Addrs []netip.Addr
}

// ResolveName returns the service that a name means to a client. It is false if
// the name is none of the mesh's: nothing is said about whether it exists then.
// The addresses are put in buf, which grows if need be; nothing else is allocated.
func (s *Store) ResolveName(q *NameQuery, buf []netip.Addr) (NameAnswer, bool) {
	t := s.read()
	defer s.release(t)
	f := nameFinder{t: t, q: q}
	a := NameAnswer{Addrs: buf[:0]}
	svc := f.find(&a)
	if svc == nil {
		return NameAnswer{}, false
	}
	a.Service = &svc.ref
	a.Wildcard = strings.HasPrefix(svc.Hostname, "*.")
	if a.OtherFamily = svc.IPFamilies == IPv4Only && q.IPv6 || svc.IPFamilies == IPv6Only && !q.IPv6; !a.OtherFamily {
		a.Addrs = t.serviceAddrs(svc, q, a.Addrs)
	}
	return a, true
}

// nameFinder tries the names that may be meant, in order of precedence.
type nameFinder struct {
	t   *tables
	q   *NameQuery
	buf [maxHostname]byte // the name that is tried
}

// find tries the name as it is, and then what is left of it without each of the
// search domains, which it notes in a.Bare.
func (f *nameFinder) find(a *NameAnswer) *service {
	name := f.q.Name
	if len(name) == 0 || len(name) > maxHostname {
		return nil
	}
	if svc := f.expanded(name); svc != nil {
		return svc
	}
	for _, domain := range f.q.Search {
		bare := len(name) - len(domain) - 1
		if bare <= 0 || domain == "" || name[bare] != '.' || string(name[bare+1:]) != domain {
			continue
		}
		if svc := f.expanded(name[:bare]); svc != nil {
			a.Bare = bare
			return svc
		}
	}
	return nil
}

// expanded tries a name, and the names of Kubernetes services that it may be
// short for in the client's namespace.
func (f *nameFinder) expanded(name []byte) *service {
	svc := f.try(name)
	if svc != nil {
		return svc
	}
	ns, domain := f.q.Client.Namespace, f.q.Domain
	labels := bytes.Count(name, []byte{'.'}) + 1
	switch {
	case labels == 1:
		svc = f.try(name, ns, "svc", domain)
	case labels == 2:
		if svc = f.try(name, "svc", domain); svc == nil {
			svc = f.try(name, ns, "svc", domain)
		}
	case labels <= 4 && bytes.HasSuffix(name, []byte(".svc")):
		svc = f.try(name, domain)
	}
	if svc == nil && labels == 3 {
		svc = f.try(name, "svc", domain)
	}
	return svc
}

// try looks for the services that have the name with the given ends, or else a
// wildcard for it, the longest first.
func (f *nameFinder) try(name []byte, ends ...string) *service {
	b := append(f.buf[:0], name...)
	for _, end := range ends {
		if len(b)+1+len(end) > maxHostname {
			return nil
		}
		b = append(append(b, '.'), end...)
	}
	if svc := f.named(b); svc != nil {
		return svc
	}
	for {
		dot := bytes.IndexByte(b[1:], '.') + 1 // no label is empty
		if dot == 0 {
			return nil
		}
		b = b[dot-1:]
		b[0] = '*'
		if svc := f.named(b); svc != nil {
			return svc
		}
		b = b[1:]
	}
}

// named picks from the services with that hostname those that are for the client
// and have addresses of their own, or names of the cluster.
func (f *nameFinder) named(hostname []byte) *service {
	var best *service
	top := -1
	for _, svc := range f.t.hosts[string(hostname)] {
		if !svc.visible(f.q.Client.Namespace) || len(svc.VIPs) == 0 && !inCluster(svc.Hostname, f.q.Domain) {
			continue
		}
		rank := svc.rankFor(f.q.Client.Namespace) << 1
		if !svc.Canonical && svc.Namespace == f.q.Preferred {
			rank |= 1
		}
		lastWins := svc.Canonical && rank&(rankNear<<1) == 0
		if rank > top || rank == top && lastWins {
			best, top = svc, rank
		}
	}
	return best
}

// inCluster tells whether hostname is that of a Kubernetes service of the cluster
// with that domain.
func inCluster(hostname, domain string) bool {
	rest, ok := strings.CutSuffix(hostname, domain)
	return ok && strings.HasSuffix(rest, ".svc.")
}

// serviceAddrs appends the addresses of a service for a client: its VIPs, or those
// of its endpoints if it has none at all.
func (t *tables) serviceAddrs(svc *service, q *NameQuery, addrs []netip.Addr) []netip.Addr {
	for _, vip := range svc.VIPs {
		if vip.Network == q.Client.Network && vip.Addr.Is4() != q.IPv6 {
			addrs = append(addrs, vip.Addr)
		}
	}
	if len(svc.VIPs) == 0 {
		for i := range svc.Endpoints {
			w := t.endpointWorkload(&svc.Endpoints[i])
			if w == nil {
				continue
			}
			if first := slices.IndexFunc(w.IPs, func(ip netip.Addr) bool { return ip.Is4() != q.IPv6 }); first >= 0 {
				addrs = append(addrs, w.IPs[first])
			}
		}
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return slices.Compact(addrs)
}
