package state

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
)

// ForeignTrustDomain says what a policy sees of an identity of another trust
// domain (decision D18).
type ForeignTrustDomain uint8

// With IgnoreForeign the namespace and service account of a foreign identity are
// unknown to policies, so that only principals match it. What is unknown opens
// nothing: in an ALLOW policy a Match that names namespaces or service accounts
// never holds for such an identity, not even if it only excludes some. In a DENY
// policy lists of what is denied do not hold, lists of what is exempt exempt
// nothing. With MatchForeign a foreign namespace or service account is as good as
// ours of that name.
const (
	IgnoreForeign ForeignTrustDomain = iota
	MatchForeign
)

// MissingPolicy says what becomes of connections to a workload that names a
// policy which nobody has sent (decision D7).
type MissingPolicy uint8

// AllowMissing skips the policy, DenyMissing refuses every connection.
const (
	AllowMissing MissingPolicy = iota
	DenyMissing
)

// Config is what a Store needs to know of its proxy. The zero value works.
type Config struct {
	// NodeName is our node. Only workloads on it are local; with "" all are.
	NodeName string
	// Network is ours, for the detection of services.
	Network string
	// ClusterID of workloads that come without one; "" means Kubernetes.
	ClusterID string
	// DefaultTrustDomain of workloads that come without one; "" means cluster.local.
	DefaultTrustDomain string
	// TrustDomainAliases are trust domains that are the same as ours. One that is
	// no valid trust domain never equals anything.
	TrustDomainAliases []string
	// HBONEPort of other proxies; 0 means 15008.
	HBONEPort               uint16
	AuthzForeignTrustDomain ForeignTrustDomain
	AuthzMissingPolicy      MissingPolicy
	// OnDemand says that the control plane sends workloads and services when they
	// are asked for: what is unknown is a *Miss then.
	OnDemand bool
}

// Store holds workloads, services and policies. All methods are safe for
// concurrent use. Those that read wait for nothing; those that write wait for each
// other and for readers that are about to end.
//
// There are two copies of the tables. Readers use the active one. A writer edits
// the other one, makes it the active one in one step, waits until the last reader
// has left the former one and repeats there what it has edited.
type Store struct {
	cfg          Config
	trustDomains []string // DefaultTrustDomain and its aliases
	notAllowed   *Denied

	active          atomic.Pointer[tables]
	changed         atomic.Pointer[chan struct{}]
	policiesChanged atomic.Pointer[chan struct{}]

	writing sync.Mutex // guards what follows
	idle    *tables    // the copy that is not active; equal to it unless a writer is at work
	edit    *editor
}

// New returns an empty store.
func New(cfg Config) *Store {
	cfg.ClusterID = or(cfg.ClusterID, "Kubernetes")
	cfg.DefaultTrustDomain = or(cfg.DefaultTrustDomain, "cluster.local")
	if cfg.HBONEPort == 0 {
		cfg.HBONEPort = 15008
	}
	s := &Store{
		cfg:          cfg,
		trustDomains: cfg.trustDomains(),
		notAllowed:   &Denied{},
		idle:         newTables(),
		edit:         newEditor(cfg.NodeName),
	}
	s.active.Store(newTables())
	renew(&s.changed)
	renew(&s.policiesChanged)
	return s
}

// Update is the content of one response of a control plane. Its parts are
// carried out in the order of the fields. IPv4-mapped IPv6 addresses and ranges
// in it are stored as IPv4; a resource is rejected if an address has a zone, or a
// range reaches from the mapped addresses beyond them.
type Update struct {
	Workloads []WorkloadUpdate
	Services  []*Service
	// Stale are names, as in Removed, of what the control plane may have given up
	// (decision D15). What is stale stays usable, but loses an address or a hostname
	// to any other that claims it. It is as before when an update brings it again.
	Stale []string
	// Removed are the names of workloads (a UID) and services (namespace/hostname).
	Removed  []string
	Policies []*Policy
	// Tombstones stand for policies that the caller had to reject: their rules are
	// ignored. One that was not decodable at all is given as an Allow of scope
	// PolicySelector. A tombstone has no effect while a good policy of its key is
	// known (decision D7).
	Tombstones      []*Policy
	RemovedPolicies []string // keys, namespace/name
}

// ResourceKind tells resources apart whose names are alike.
type ResourceKind string

// The kinds.
const (
	WorkloadResource ResourceKind = "workload"
	ServiceResource  ResourceKind = "service"
	PolicyResource   ResourceKind = "policy"
)

// Rejected is a resource that was not applied.
type Rejected struct {
	Kind ResourceKind
	Name string // UID, namespace/hostname or namespace/name
	Err  error
}

// RejectedError tells which resources of an Update were not applied. Its text is
// that of a NACK: "name: reason", joined by "; ".
type RejectedError struct{ Resources []Rejected }

// Error lists every resource with its reason.
func (e *RejectedError) Error() string {
	var b strings.Builder
	for i, r := range e.Resources {
		if i > 0 {
			b.WriteString("; ")
		}
		b.WriteString(r.Name + ": " + r.Err.Error())
	}
	return b.String()
}

// Unwrap returns the reasons.
func (e *RejectedError) Unwrap() []error {
	errs := make([]error, len(e.Resources))
	for i, r := range e.Resources {
		errs[i] = r.Err
	}
	return errs
}

// prepared is an Update whose resources were checked and completed.
type prepared struct {
	workloads []*workload
	endpoints []map[NamespacedHostname][]Port // of workloads, by index
	services  []*service
	policies  []*policy
	rejected  []Rejected
}

func (s *Store) prepare(u *Update, pool *interner) *prepared {
	p := &prepared{workloads: make([]*workload, 0, len(u.Workloads))}
	reject := func(kind ResourceKind, name string, err error) {
		p.rejected = append(p.rejected, Rejected{kind, name, err})
	}
	for i := range u.Workloads {
		w, err := s.newWorkload(&u.Workloads[i], pool)
		if err != nil {
			name := ""
			if u.Workloads[i].Workload != nil {
				name = u.Workloads[i].Workload.UID
			}
			reject(WorkloadResource, name, err)
			continue
		}
		p.workloads = append(p.workloads, w)
		p.endpoints = append(p.endpoints, u.Workloads[i].Endpoints)
	}
	for _, in := range u.Services {
		svc, err := s.newService(in, pool)
		if err != nil {
			name := ""
			if in != nil {
				name = in.Key().String()
			}
			reject(ServiceResource, name, err)
			continue
		}
		p.services = append(p.services, svc)
	}
	tombstones := u.Tombstones
	for _, in := range u.Policies {
		pol, err := newPolicy(in)
		if err != nil {
			name := ""
			if in != nil {
				name = in.Key()
				tombstones = append(slices.Clip(tombstones), in)
			}
			reject(PolicyResource, name, err)
			continue
		}
		p.policies = append(p.policies, pol)
	}
	for _, in := range tombstones {
		if pol, err := newTombstone(in); err == nil {
			p.policies = append(p.policies, pol)
		}
	}
	return p
}

// Apply carries out one response. Readers see all of it or nothing. Resources
// that cannot be applied are left out and named in the *RejectedError that Apply
// then returns; of those, the version that was known before stays.
func (s *Store) Apply(u Update) error {
	s.writing.Lock()
	defer s.writing.Unlock()
	p := s.prepare(&u, s.edit.pool)
	s.idle.readers.Lock() // waits for readers that took it when it was still active
	s.edit.begin(s.idle)
	s.edit.insert(p)
	for _, name := range u.Stale {
		s.edit.markStale(name)
	}
	for _, name := range u.Removed {
		s.edit.remove(name)
	}
	s.edit.flush()
	s.edit.changePolicies(p.policies, u.RemovedPolicies)
	s.edit.touched.compact(s.idle)
	s.idle.readers.Unlock()
	if s.edit.touched.any() {
		s.publish()
	}
	s.edit.touched = touched{}
	return p.err()
}

// publish makes the edited copy the active one and brings the other up to date.
// The caller holds writing.
func (s *Store) publish() {
	former := s.active.Swap(s.idle)
	s.notify(s.edit.touched.policies.accepted)
	former.readers.Lock()
	s.edit.touched.repeat(s.idle, former)
	former.readers.Unlock()
	s.idle = former
}

// Check returns the error that Apply would return for u, and changes nothing.
func (s *Store) Check(u Update) error { return s.prepare(&u, newInterner()).err() }

// Replace puts u in the place of all that the store knows; the fields that
// remove have no meaning. If any resource is rejected nothing changes.
func (s *Store) Replace(u Update) error {
	s.writing.Lock()
	defer s.writing.Unlock()
	edit := newEditor(s.cfg.NodeName)
	p := s.prepare(&u, edit.pool)
	if err := p.err(); err != nil {
		return err
	}
	t := newTables()
	edit.begin(t)
	edit.insert(p)
	edit.flush()
	edit.changePolicies(p.policies, nil)
	edit.touched.compact(t)
	edit.touched = touched{}
	s.active.Store(t)
	s.notify(true)
	s.idle, s.edit = t.clone(), edit
	return nil
}

func (p *prepared) err() error {
	if len(p.rejected) == 0 {
		return nil
	}
	return &RejectedError{Resources: p.rejected}
}

// notify wakes those who wait for a change.
func (s *Store) notify(policies bool) {
	close(*renew(&s.changed))
	if policies {
		close(*renew(&s.policiesChanged))
	}
}

// renew puts a new channel in the place of the one that it returns.
func renew(p *atomic.Pointer[chan struct{}]) *chan struct{} {
	ch := make(chan struct{})
	return p.Swap(&ch)
}

// Changed returns a channel that is closed at the next change of anything. Take
// the channel, look, then wait for it: no change is lost then.
func (s *Store) Changed() <-chan struct{} {
	return *s.changed.Load()
}

// PoliciesChanged is Changed for policies: when its channel is closed, the
// connections that were allowed must be judged again (spec/datapath.md §12.2).
func (s *Store) PoliciesChanged() <-chan struct{} {
	return *s.policiesChanged.Load()
}

// Local returns the workload on our node for which a proxy stands in.
func (s *Store) Local(ref Ref) (*Workload, bool) {
	t := s.read()
	defer s.release(t)
	return exported(t.localWorkload(ref))
}

// Workload returns the workload that has an address, pods first.
func (s *Store) Workload(network string, addr netip.Addr) (*Workload, bool) {
	t := s.read()
	defer s.release(t)
	return exported(t.workloadAt(network, addr.Unmap()))
}

// WorkloadByUID returns the workload of a UID.
func (s *Store) WorkloadByUID(uid string) (*Workload, bool) {
	t := s.read()
	defer s.release(t)
	return exported(t.workloadByUID(uid))
}

func exported(w *workload) (*Workload, bool) {
	if w == nil {
		return nil, false
	}
	return &w.Workload, true
}

// ours tells whether td is our trust domain or an alias of it.
func (s *Store) ours(td string) bool { return slices.Contains(s.trustDomains, td) }

var errNoSource = errors.New("no source workload")
