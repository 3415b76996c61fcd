package proxy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/proxy/dns"
	"github.com/ztunnel-go/ztunnel/proxy/hbone"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/state"
)

// Config is what a Proxy needs. Network, Store, Certs, Local and Metrics are
// required, and something to serve; the rest has defaults.
type Config struct {
	Network netns.Network // where all its sockets are
	Store   *state.Store
	Certs   *ca.Manager
	TLS     ca.TLSOptions
	CRLs    *ca.CRLs  // asked about every peer, and followed; nil: nothing is revoked
	Local   state.Ref // the pod for which it stands in
	PodUID  string    // of that pod, "" when there is none but the one of Local
	PIDFD   *os.File  // of a process of that pod, for providers that name workloads so; nil: none. It stays the caller's

	// The listeners' addresses: captured outbound, HBONE, captured inbound
	// plaintext. An invalid address, here and below, means that there is no such
	// listener.
	OutboundAddr, InboundAddr, PassthroughAddr netip.AddrPort
	// SOCKSAddr is the address of the SOCKS5 listener (spec/datapath.md §8): a
	// loopback one, for it takes no other clients.
	SOCKSAddr netip.AddrPort
	// IllegalPorts are never dialled on behalf of anyone, as are those of the
	// listeners (spec/datapath.md §3.5).
	IllegalPorts []uint16
	NetworkID    string // the network of this node
	// NodeName and ClusterID are those of this node, for a Local that the store
	// does not know (decision D22). An empty ClusterID means Kubernetes.
	NodeName, ClusterID string

	HBONE           hbone.Config  // of tunnels, both roles
	PoolMaxStreams  int           // per outbound tunnel
	PoolIdle        time.Duration // an outbound tunnel without streams lives so long; negative: not at all
	PoolMaxAge      time.Duration // an outbound tunnel takes new streams so long; 0: while its certificates are valid
	PoolConnsPerKey int           // outbound tunnels per key below the cap
	MaxHandshakes   int           // concurrent inbound handshakes; 0: 64 per processor

	ResponseBaggage   bool          // send baggage with the 200, and believe that of requests
	PolicyInfoLogging bool          // log policy decisions at INFO instead of DEBUG
	WorkloadWait      time.Duration // for the store to learn Local; 0: 5 s. Outbound connections wait 1 s at most (decision D22)
	CertificateWait   time.Duration // for the first certificate; 0: 10 s

	// LocalhostAppTunnel connects to an application that wants PROXY headers by
	// the loopback address, from the loopback address (spec/datapath.md §6.5).
	LocalhostAppTunnel bool

	// Demand asks the control plane for a resource by the name that a
	// [state.Miss] gives it, and blocks until the store has what there is of it,
	// or ctx ends. It is called concurrently. Nil: the control plane sends
	// everything unasked.
	Demand func(ctx context.Context, key string) error
	// Resolve looks a workload's host name up. No addresses without an error mean
	// that the name has none. It is called concurrently. Nil: workloads without
	// address are not reached.
	Resolve        func(ctx context.Context, host string) ([]netip.Addr, error)
	ResolveTimeout time.Duration // 0: 10 s

	// DNS is that of the pod's DNS server, as far as it is not the proxy's to say: New
	// sets Store, Local, Network and Panicked, and Logger if it is nil. Nil: there is
	// no such server.
	DNS *dns.ServerConfig

	// Verify is asked before anything is done in the name of the local workload,
	// except naming it to the pod's own DNS queries (decision D13): an error
	// refuses the connection. A nil answer holds for that object of the store, an
	// error for a second. It is not asked about a workload without addresses, nor
	// twice at a time. Nil: every workload is believed.
	Verify func(context.Context, *state.Workload) error
	// Prefetch acquires the certificate when Run begins, if need be before the
	// store knows the local workload.
	Prefetch bool
	// PrefetchAfter, until it is closed, leaves it to connections to acquire the
	// certificate, whatever Prefetch says: signing must not keep the other pods of a
	// node from being served. Nil: it is closed.
	PrefetchAfter <-chan struct{}
	// HandOver is how long Drain waits, accepting, for another process to listen
	// on the port of InboundAddr (decision D14: there the next proxy starts only
	// when this one has been told to stop). 0: it does not wait.
	HandOver time.Duration

	Metrics *Metrics
	Log     *slog.Logger // nil: discard
}

// Proxy serves one pod. Bind, Listen and Run are called one after the other, the
// rest at any time.
type Proxy struct {
	cfg    Config
	log    *slog.Logger // lifecycle
	access *slog.Logger
	rbac   *slog.Logger

	server     *hbone.Server
	pool       *hbone.Pool[poolKey]
	tracker    *conntrack
	inner      *hbone.Pool[innerKey] // sessions of double HBONE, each over a stream of pool
	tunnels    tunnels
	handshakes *handshakes
	lookUps    *lookUps
	standIn    standIn
	dns        *dns.Server  // nil: none
	names      nameResolver // of SOCKS5 requests: dns; nil: none
	verifier   verifier

	identity leaseHolder
	epoch    atomic.Pointer[ca.Epoch] // of the SVID that outbound tunnels use
	facts    atomic.Pointer[localFacts]
	missing  sync.Map // policy names that were reported as missing, since the local workload last changed

	entries     []*entry      // those that are configured, in the order in which they are bound
	inbound     *entry        // one of them, nil if there is none
	passthrough *entry        // likewise
	draining    chan struct{} // closed by Drain

	mu      sync.Mutex // guards what follows, and what an entry holds
	drained bool
	opened  bool // by Listen
	running bool
}

// New checks cfg. It opens and starts nothing: Bind and Listen open the sockets,
// Run serves them.
func New(cfg Config) (*Proxy, error) {
	switch {
	case cfg.Network == nil, cfg.Store == nil, cfg.Certs == nil, cfg.Metrics == nil:
		return nil, errors.New("proxy: Network, Store, Certs and Metrics are required")
	case cfg.Local.Name == "" || cfg.Local.Namespace == "" || cfg.Local.ServiceAccount == "":
		return nil, fmt.Errorf("proxy: the local workload %+v needs a name, a namespace and a service account", cfg.Local)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.CRLs != nil {
		cfg.TLS.Revoked = cfg.CRLs.Check
	}
	cfg.WorkloadWait = cmp.Or(cfg.WorkloadWait, 5*time.Second)
	cfg.CertificateWait = cmp.Or(cfg.CertificateWait, 10*time.Second)
	cfg.MaxHandshakes = cmp.Or(cfg.MaxHandshakes, 64*runtime.GOMAXPROCS(0))
	local, err := newStandIn(&cfg)
	if err != nil {
		return nil, err
	}
	p := &Proxy{
		cfg:        cfg,
		log:        cfg.Log.With("component", "proxy"),
		access:     cfg.Log.With("component", "access"),
		rbac:       cfg.Log.With("component", "rbac"),
		server:     hbone.NewServer(cfg.HBONE),
		tracker:    newConntrack(),
		handshakes: newHandshakes(cfg.MaxHandshakes),
		lookUps:    newLookUps(),
		verifier:   verifier{ask: cfg.Verify, turn: make(chan struct{}, 1)},
		draining:   make(chan struct{}),
	}
	p.standIn.workload = local
	if err := p.setDNS(); err != nil {
		return nil, err
	}
	if p.setEntries(); len(p.entries) == 0 && p.dns == nil {
		return nil, errors.New("proxy: there is nothing to serve: no listener has an address")
	}
	p.identity.cfg, p.identity.standIn = &p.cfg, local
	p.pool = hbone.NewPool(hbone.PoolConfig[poolKey]{
		Config:      cfg.HBONE,
		Dial:        p.dialTunnel,
		MaxStreams:  cfg.PoolMaxStreams,
		IdleTimeout: cfg.PoolIdle,
		ConnsPerKey: cfg.PoolConnsPerKey,
		MaxAge:      cfg.PoolMaxAge,
	})
	p.inner = hbone.NewPool(innerPool(&cfg, p.dialInner))
	return p, nil
}

// setDNS makes the DNS server.
func (p *Proxy) setDNS() (err error) {
	if p.cfg.DNS == nil {
		return nil
	}
	cfg := *p.cfg.DNS
	// What the pod is told of names needs no proof of who it is (decision D13).
	cfg.Store, cfg.Local, cfg.Network = p.cfg.Store, p.knownOrStandIn, p.cfg.Network
	cfg.Panicked = p.cfg.Metrics.panics.Inc
	if cfg.Logger == nil {
		cfg.Logger = p.cfg.Log
	}
	if p.dns, err = dns.NewServer(cfg); err != nil {
		return fmt.Errorf("proxy: %w", err)
	}
	p.names = p.dns
	return nil
}

// Connections is a snapshot for the dump.
func (p *Proxy) Connections() Connections { return p.tracker.snapshot() }

// Run serves what Listen opened. It returns when the last connection has ended
// after Drain, or, with every connection cut, when ctx ends: their log lines
// then carry the cause of ctx. Whatever it returns, nothing is open any more. It
// may be called once.
func (p *Proxy) Run(ctx context.Context) error {
	listening, drained, err := p.begin()
	if err != nil || drained {
		return err
	}
	ctx, cut := context.WithCancelCause(ctx)
	defer cut(nil)
	defer context.AfterFunc(ctx, p.closeListeners)()
	live, over := context.WithCancel(ctx) // until the last part has ended
	defer over()
	var parts sync.WaitGroup
	var left atomic.Int64
	left.Store(int64(len(listening)) + 1)
	part := func(run func()) {
		parts.Go(func() {
			run()
			if left.Add(-1) == 0 {
				over()
			}
		})
	}
	for _, l := range listening {
		part(func() { p.acceptLoop(ctx, l) })
	}
	part(func() {
		if failed := p.runDNS(ctx); failed != nil {
			err = failed
			cut(failed)
		}
	})
	p.watch(live, parts.Go)
	parts.Wait()
	p.closeListeners() // that is done; here it ends, too

	p.inner.Close() // its sessions are streams of the other
	p.pool.Close()
	p.identity.release()
	p.log.Info("shutdown complete")
	return err
}

// begin takes over the listeners, unless Drain has closed them.
func (p *Proxy) begin() (listening []opened, drained bool, _ error) {
	listening = p.listening()
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.running:
		return nil, false, errors.New("proxy: Run was called before")
	case p.drained:
		return nil, true, nil
	case !p.opened:
		p.close()
		return nil, false, errors.New("proxy: Run without Listen")
	}
	p.running = true
	return listening, false, nil
}

// runDNS serves the pod's DNS queries, if we are to.
func (p *Proxy) runDNS(ctx context.Context) error {
	if p.dns == nil {
		return nil
	}
	err := p.dns.Run(ctx)
	if errors.Is(err, dns.ErrDrained) { // before it could begin
		return nil
	}
	return err
}
