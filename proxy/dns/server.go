package dns

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/state"
)

// DefaultWorkloadWait is how long a query waits for the workload that asks.
const DefaultWorkloadWait = 5 * time.Second

// ServerConfig is what a Server needs. Store, Local, Network, Addrs and Metrics
// are required. It may be shared by the servers of many pods, but for Local and
// Network.
type ServerConfig struct {
	Store *state.Store
	// Local returns the workload that asks: the pod in whose network namespace the
	// server is, never one that was found by the address of a client. It blocks until
	// it is known, at the most until ctx ends, and returns at once what it knows if
	// ctx has ended already: that is how the server asks first. It is called
	// concurrently, and should cost little.
	Local func(ctx context.Context) (*state.Workload, error)
	// Network is where all sockets are, those to nameservers too. If it has a method
	// Addresses() ([]netip.Addr, error), queries from these addresses are answered
	// besides those from loopback addresses: what is redirected to us comes from
	// there.
	Network netns.Network
	// Addrs are where the server listens, by UDP and TCP. They must be loopback
	// addresses. Those of IPv6 are left out where the namespace has none of them, but
	// not if there are no others.
	Addrs []netip.AddrPort
	// ClusterDomain is the DNS domain of the cluster; "" means cluster.local.
	ClusterDomain string
	// Search are the domains that the resolvers of clients append to names (see
	// SearchDomains). Nil: those that Kubernetes gives to a pod in the namespace of
	// Local.
	Search []string
	// PreferredNamespace is a namespace whose services come first where several have
	// a hostname, unless one is in the client's namespace or canonical. It may be
	// empty.
	PreferredNamespace string
	// IPv6 gives AAAA records of local names.
	IPv6 bool
	// Files name the nameservers and hosts, and should be shared by all servers of the
	// process. Nil: those of the system, read for this one.
	Files *Files
	// WorkloadWait bounds the wait for Local; 0 = DefaultWorkloadWait.
	WorkloadWait time.Duration
	// Limits is shared by all servers of the process. Nil: this one has its own.
	Limits  *Limits
	Metrics *Metrics
	// Panicked is called when a query has panicked, which ends that query alone. It
	// may be nil.
	Panicked func()
	Logger   *slog.Logger // nil: discard
}

// Server is the DNS proxy of one pod (spec/state-xds-dns.md §5). Its methods are
// safe for concurrent use.
//
// Names of services are answered from the store. All other messages go to the
// nameservers of the proxy as the bytes that came, from a new socket and with a new
// ID, and what comes back goes to the client as it is, but for the ID (decision
// D24): every opcode and type, all sections, EDNS options, the response code and
// the flags are the nameserver's. So nothing is cached, and nothing changed except
// where an answer is longer than the client takes by UDP: then records are cut off
// its end, and TC is set.
//
// An idle server holds its sockets and a goroutine for each, and no buffers.
type Server struct {
	cfg      ServerConfig
	log      *slog.Logger
	upstream upstream
	peers    peers
	outgoing outgoing
	pending  slots         // queries that wait
	conns    chan struct{} // one for each TCP connection
	search   atomic.Pointer[searchList]

	floods, loops, strangers, lonely seldom // of warnings

	mu        sync.Mutex // guards the rest
	bound     []netns.Bound
	sockets   []*socket
	listeners []*listener
	running   bool // Run was called
	drained   bool
}

// NewServer checks cfg. It opens and starts nothing.
func NewServer(cfg ServerConfig) (*Server, error) {
	if cfg.Store == nil || cfg.Local == nil || cfg.Network == nil || cfg.Metrics == nil {
		return nil, errors.New("dns: Store, Local, Network and Metrics are required")
	}
	if err := checkAddrs(cfg.Addrs); err != nil {
		return nil, err
	}
	domain, err := canonical(cmp.Or(cfg.ClusterDomain, "cluster.local"))
	if err != nil {
		return nil, fmt.Errorf("dns: cluster domain: %w", err)
	}
	cfg.ClusterDomain = strings.TrimSuffix(domain, ".")
	cfg.Addrs, cfg.Search = slices.Clone(cfg.Addrs), slices.Clone(cfg.Search)
	for i, d := range cfg.Search {
		if d, err = canonical(d); err != nil {
			return nil, fmt.Errorf("dns: search domain: %w", err)
		}
		cfg.Search[i] = strings.TrimSuffix(d, ".")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Limits == nil {
		cfg.Limits = NewLimits(0, 0)
	}
	if cfg.Files == nil {
		cfg.Files = NewFiles("", "", cfg.Logger)
	}
	cfg.WorkloadWait = cmp.Or(cfg.WorkloadWait, DefaultWorkloadWait)
	s := &Server{cfg: cfg, log: cfg.Logger.With("component", "dns"), conns: make(chan struct{}, maxConns)}
	s.pending.max = maxPending
	s.peers.network = cfg.Network
	s.upstream.Files = cfg.Files
	s.upstream.exchanger.dial, s.upstream.exchanger.outgoing = Over(cfg.Network), &s.outgoing
	return s, nil
}

// checkAddrs refuses what others could reach: the proxy answers its pod only.
func checkAddrs(addrs []netip.AddrPort) error {
	if len(addrs) == 0 {
		return errors.New("dns: an address to listen on is required")
	}
	for i, a := range addrs {
		if !a.IsValid() || !a.Addr().Unmap().IsLoopback() {
			return fmt.Errorf("dns: address %v: only loopback addresses are allowed, such as 127.0.0.1:15053, so that no other host can ask", a)
		}
		if slices.Contains(addrs[:i], a) {
			return fmt.Errorf("dns: address %v: it is there twice", a)
		}
	}
	return nil
}

// searchList are the search domains of a namespace.
type searchList struct {
	namespace string
	domains   []string
}

// searchFor returns the search domains of clients in a namespace
// (spec/state-xds-dns.md §5.4).
func (s *Server) searchFor(namespace string) []string {
	if s.cfg.Search != nil {
		return s.cfg.Search
	}
	if l := s.search.Load(); l != nil && l.namespace == namespace {
		return l.domains
	}
	domain := s.cfg.ClusterDomain
	l := &searchList{namespace, []string{namespace + ".svc." + domain, "svc." + domain, domain}}
	s.search.Store(l)
	return l.domains
}

// SearchDomains returns the search list of a file like resolv.conf(5), which is
// what ServerConfig.Search is where clients share the proxy's own (dedicated mode).
// It is not nil, but it may be empty.
func SearchDomains(file string) ([]string, error) {
	text, err := readFile(file)
	if err != nil {
		return nil, err
	}
	domains := []string{}
	for _, d := range parseResolvConf(text).search {
		domains = append(domains, strings.TrimSuffix(d, "."))
	}
	return domains, nil
}
