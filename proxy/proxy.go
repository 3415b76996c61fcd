package proxy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/internal/backoff"
	"github.com/ztunnel-go/ztunnel/proxy/hbone"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/state"
)

// Config is what a Proxy needs. Network, Store, Certs, Local and Metrics are
// required; the listeners need their addresses; the rest has defaults.
type Config struct {
	Network netns.Network // where all its sockets are
	Store   *state.Store
	Certs   *ca.Manager
	TLS     ca.TLSOptions
	CRLs    *ca.CRLs  // asked about every peer, and followed; nil: nothing is revoked
	Local   state.Ref // the pod for which it stands in
	PodUID  string    // of that pod, "" when there is none but the one of Local
	PIDFD   *os.File  // of a process of that pod, for providers that name workloads so; nil: none. It stays the caller's

	// The listeners' addresses: captured outbound, HBONE, captured inbound plaintext.
	OutboundAddr, InboundAddr, PassthroughAddr netip.AddrPort
	// IllegalPorts are never dialled on behalf of anyone, as are those of the
	// three listeners (spec/datapath.md §3.5).
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

	Metrics *Metrics
	Log     *slog.Logger // nil: discard
}

// Proxy serves one pod. Its methods are safe for concurrent use.
type Proxy struct {
	cfg    Config
	log    *slog.Logger // lifecycle
	access *slog.Logger
	rbac   *slog.Logger

	outbound, inbound, passthrough netns.Listener

	server     *hbone.Server
	pool       *hbone.Pool[poolKey]
	tracker    *conntrack
	inner      *hbone.Pool[innerKey] // sessions of double HBONE, each over a stream of pool
	tunnels    tunnels
	handshakes *handshakes
	lookUps    *lookUps
	standIn    standIn
	names      nameResolver // of SOCKS5 requests; nil: without DNS

	identity leaseHolder
	epoch    atomic.Pointer[ca.Epoch] // of the SVID that outbound tunnels use
	facts    atomic.Pointer[localFacts]
	missing  sync.Map // policy names that were reported as missing, since the local workload last changed

	mu      sync.Mutex // guards drained, and the listeners against Listen during Drain
	drained bool
}

// New checks cfg. It opens and starts nothing: Listen binds, Run serves.
func New(cfg Config) (*Proxy, error) {
	switch {
	case cfg.Network == nil, cfg.Store == nil, cfg.Certs == nil, cfg.Metrics == nil:
		return nil, errors.New("proxy: Network, Store, Certs and Metrics are required")
	case !cfg.OutboundAddr.IsValid() || !cfg.InboundAddr.IsValid() || !cfg.PassthroughAddr.IsValid():
		return nil, errors.New("proxy: the addresses of the three listeners are required")
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
	cfg.IllegalPorts = slices.Clone(cfg.IllegalPorts)
	for _, addr := range []netip.AddrPort{cfg.OutboundAddr, cfg.InboundAddr, cfg.PassthroughAddr} {
		if !slices.Contains(cfg.IllegalPorts, addr.Port()) {
			cfg.IllegalPorts = append(cfg.IllegalPorts, addr.Port())
		}
	}

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
	}
	p.standIn.workload = local
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

// Listen binds the three listeners, all or none (spec/datapath.md §2.1). They
// accept into the kernel's queue until Run serves them. After Drain it is an
// error.
func (p *Proxy) Listen(ctx context.Context) (err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.drained {
		return ErrDraining
	}
	defer func() {
		if err != nil {
			p.closeListeners()
		}
	}()
	for _, l := range []struct {
		component string
		addr      netip.AddrPort
		to        *netns.Listener
	}{
		{"inbound", p.cfg.InboundAddr, &p.inbound},
		{"inbound plaintext", p.cfg.PassthroughAddr, &p.passthrough},
		{"outbound", p.cfg.OutboundAddr, &p.outbound},
	} {
		if *l.to, err = p.cfg.Network.Listen(ctx, l.addr); err != nil {
			return fmt.Errorf("%s listener: %w", l.component, err)
		}
		p.log.InfoContext(ctx, "listener established", "address", (*l.to).Addr(),
			"component", l.component, "transparent", (*l.to).Transparent())
	}
	return nil
}

// closeListeners closes what is open. The caller holds p.mu.
func (p *Proxy) closeListeners() {
	for _, l := range []netns.Listener{p.inbound, p.passthrough, p.outbound} {
		if l != nil {
			l.Close()
		}
	}
}

// InboundAddr is where the HBONE listener is bound. Call it after Listen.
func (p *Proxy) InboundAddr() netip.AddrPort { return p.inbound.Addr() }

// Connections is a snapshot for the dump.
func (p *Proxy) Connections() Connections { return p.tracker.snapshot() }

// Run serves what Listen bound. It returns when the last connection has ended
// after Drain, or, with every connection cut, when ctx ends: their log lines
// then carry the cause of ctx. It may be called once, after Listen.
func (p *Proxy) Run(ctx context.Context) error {
	if p.outbound == nil || p.inbound == nil || p.passthrough == nil {
		return errors.New("proxy: Run without Listen")
	}
	watchCtx, stopWatch := context.WithCancel(ctx)
	var watchers sync.WaitGroup
	watchers.Go(func() { p.watchState(watchCtx) })
	watchers.Go(func() { p.watchTrust(watchCtx) })

	var loops sync.WaitGroup
	loops.Go(func() { p.acceptLoop(ctx, p.outbound, "outbound", p.serveOutbound) })
	loops.Go(func() { p.acceptLoop(ctx, p.inbound, "inbound", p.serveInbound) })
	loops.Go(func() { p.acceptLoop(ctx, p.passthrough, "inbound plaintext", p.servePassthrough) })
	loops.Wait()

	stopWatch()
	watchers.Wait()
	p.inner.Close() // its sessions are streams of the other
	p.pool.Close()
	p.identity.release()
	p.log.Info("shutdown complete")
	return nil
}

// Drain stops accepting and tells the peers by GOAWAY; connections that are
// open go on. Run returns when the last has ended. Idempotent, does not block.
func (p *Proxy) Drain() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.drained {
		return
	}
	p.drained = true
	p.closeListeners()
	p.server.Drain()
}

// server serves one accepted connection. What it returns, if anything, is the
// lasting part of it.
type server func(context.Context, netns.Conn) *copying

// acceptLoop owns the connections that it accepts: it returns when the listener
// is closed and all of them have ended.
func (p *Proxy) acceptLoop(ctx context.Context, ln netns.Listener, name string, serve server) {
	var conns sync.WaitGroup
	defer conns.Wait()
	defer context.AfterFunc(ctx, func() { ln.Close() })()
	// An accept error is nearly always a lack of file descriptors: without a
	// pause the loop would burn the processor that could free some.
	retry := backoff.Policy{First: 5 * time.Millisecond, Max: time.Second, Budget: -1}.New()
	for {
		conn, err := ln.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			p.log.ErrorContext(ctx, "accept failed", "listener", name, "error", err.Error())
			if !backoff.Sleep(ctx, retry.Next(time.Now())) {
				return
			}
			continue
		}
		retry.Reset()
		conns.Go(func() {
			if k := p.serveRecovered(ctx, conn, name, serve); k != nil {
				conns.Go(k.run)
			}
		})
	}
}

// serveRecovered keeps a panic within its connection (design D21).
func (p *Proxy) serveRecovered(ctx context.Context, conn netns.Conn, name string, serve server) *copying {
	defer func() {
		if r := recover(); r != nil {
			p.panicked(ctx, name, r)
			_ = conn.Abort()
		}
	}()
	return serve(ctx, conn)
}

func (p *Proxy) panicked(ctx context.Context, where string, value any) {
	p.cfg.Metrics.panics.Inc()
	p.log.ErrorContext(ctx, "connection handler panicked", "listener", where,
		"panic", fmt.Sprint(value), "stack", string(debug.Stack()))
}

// watchState follows the store: it re-checks the open connections against the
// policies, and lets tunnels end whose workload has moved.
func (p *Proxy) watchState(ctx context.Context) {
	var local *state.Workload
	var policies <-chan struct{} // nil: they have changed since the last look
	for {
		// The channels before the look, so that no change is lost.
		changed, policiesChanged := p.cfg.Store.Changed(), p.cfg.Store.PoliciesChanged()
		if w, ok := p.cfg.Store.Local(p.cfg.Local); ok && w != local {
			local, policies = w, nil // its policy list may be another one
			p.missing.Clear()
		}
		if policies == nil || isClosed(policies) {
			policies = policiesChanged
			p.recheckPolicies(ctx)
		}
		p.retireMoved()
		select {
		case <-changed:
		case <-policiesChanged:
		case <-ctx.Done():
			return
		}
	}
}

// never is not closed by anyone.
var never <-chan struct{}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// releaseWait bounds the wait for connections that a policy change has ended: a
// stuck one must not keep later changes from being enforced.
const releaseWait = 5 * time.Second

// recheckPolicies ends the inbound connections that the policies deny now
// (spec/datapath.md §12.2). It judges them with the workload as the store has
// it now, so that a new policy list counts too.
func (p *Proxy) recheckPolicies(ctx context.Context) {
	ended, wait := p.tracker.recheck(func(c state.Conn) bool {
		if w, ok := p.cfg.Store.Local(p.cfg.Local); ok {
			c.Destination = w
		}
		return p.cfg.Store.Authorize(c).Denied != nil
	})
	bounded, cancel := context.WithTimeout(ctx, releaseWait)
	defer cancel()
	wait(bounded)
	for _, c := range ended {
		p.log.InfoContext(ctx, "connection closed by a policy change",
			"connection", fmt.Sprintf("%s(%s)->%s (%s)", c.Src, c.Identity, c.Dst, c.Destination.UID))
	}
}

// retireMoved lets tunnels end whose workload is no longer at their address:
// its IP may belong to another pod now (design D9).
func (p *Proxy) retireMoved() {
	moved := func(k poolKey) bool {
		if k.uid == "" {
			return false
		}
		w, ok := p.cfg.Store.WorkloadByUID(k.uid)
		// One without address was found by its host name, whose addresses change as they like.
		return !ok || len(w.IPs) > 0 && !slices.Contains(w.IPs, k.dst.Addr())
	}
	p.inner.Retire(func(k innerKey, _ *hbone.ConnInfo) bool { return moved(k.outer) }, errMoved)
	p.pool.Retire(func(k poolKey, _ *hbone.ConnInfo) bool { return moved(k) }, errMoved)
}

var errMoved = errors.New("the workload has moved")
