package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/internal/stack"
	"github.com/ztunnel-go/ztunnel/proxy/hbone"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/state"
)

// poolKey says which connections may share an outbound tunnel: the same client
// address and identity, the same destination, the same expectation of who that
// is, and the same trust (spec/datapath.md §9.1, design D9).
type poolKey struct {
	source   spiffeid.ID
	sourceIP netip.Addr
	dst      netip.AddrPort
	expected string // the accepted identities, comma-joined, in the route's order
	uid      string // of the destination workload
	epoch    ca.Epoch
}

// localFacts are what every request of one local workload carries.
type localFacts struct {
	workload *state.Workload
	baggage  string
}

// upstream is a connected next hop: one of stream and conn is set, or none if
// connecting failed. The authority is that of the request, "" for plain TCP.
type upstream struct {
	stream    hbone.Stream
	conn      netns.Conn
	authority string
}

// serveOutbound carries one captured connection (spec/datapath.md §4).
func (p *Proxy) serveOutbound(ctx context.Context, conn netns.Conn) *copying {
	return p.serveSource(ctx, conn, (*Proxy).capturedDst)
}

// destination finds out where the client of an accepted connection wants to go.
// With an error comes the reason for the counter, and the address that the log
// names in its place.
type destination func(*Proxy, context.Context, netns.Conn) (dst netip.AddrPort, why string, err error)

// serveSource carries one connection of the pod to where wanted says.
func (p *Proxy) serveSource(ctx context.Context, conn netns.Conn, wanted destination) (k *copying) {
	stack.Reserve()
	start := time.Now()
	open := p.cfg.Metrics.sockets.WithLabelValues(reporterSource)
	open.Inc()
	defer func() {
		if k == nil {
			open.Dec()
		}
	}()
	src := conn.Remote()
	connecting, connected := watchReset(ctx, conn)
	var local *state.Workload
	var route state.Route
	dst, why, err := wanted(p, connecting, conn)
	if err == nil {
		local, route, why, err = p.routeOutbound(connecting, conn, dst)
	}
	if err != nil {
		connected()
		p.earlyDeny(ctx, reporterSource, why, src, dst, err)
		conn.Close()
		return nil
	}
	query := state.Query{Source: local, SourceIP: src.Addr(), Dst: dst}
	route, up, untrack, err := p.connectRetried(connecting, src, query, route)
	connected()
	c := outboundConnection(src, local, route, up.authority)
	if up.stream != nil && route.Protocol == state.DoubleHBONE {
		c.behindGateway(up.stream)
	}
	c.open(ctx, p.cfg.Metrics, p.access, start)
	if err != nil {
		untrack()
		conn.Close()
		c.end(ctx, connectFailed(err))
		return nil
	}
	return &copying{
		p: p, ctx: ctx, conn: conn, stream: up.stream, peer: up.conn, c: c, outbound: true,
		meter: hbone.Meter{FromSocket: c.receivedBytes(), ToSocket: c.sentBytes()},
		done:  func() { untrack(); open.Dec() },
	}
}

// capturedDst is where the client of a captured connection wanted to go.
func (p *Proxy) capturedDst(ctx context.Context, conn netns.Conn) (netip.AddrPort, string, error) {
	return p.originalDst(ctx, conn), "", nil
}

// originalDst is where the client wanted to go.
func (p *Proxy) originalDst(ctx context.Context, conn netns.Conn) netip.AddrPort {
	dst, err := conn.OriginalDst()
	if err != nil {
		p.log.DebugContext(ctx, "no original destination", "src.addr", conn.Remote(), "error", err.Error())
		return conn.Local()
	}
	return dst
}

// routeOutbound decides. With an error comes the reason for the counter.
func (p *Proxy) routeOutbound(ctx context.Context, conn netns.Conn, dst netip.AddrPort) (_ *state.Workload, _ state.Route, why string, _ error) {
	// A connection that nothing redirected was dialled to our listener itself.
	if p.illegalPort(dst.Port()) && (dst.Addr().IsLoopback() || dst == conn.Local()) {
		return nil, state.Route{}, rejectSelfCall, errSelfCall
	}
	local, err := p.outboundWorkload(ctx)
	if err != nil {
		return nil, state.Route{}, rejectLocal(err), err
	}
	// The stand-in of a workload has no addresses, but its connections come from one.
	if p.illegalPort(dst.Port()) && (dst.Addr() == conn.Remote().Addr() || slices.Contains(local.IPs, dst.Addr())) {
		return nil, state.Route{}, rejectSelfCall, errSelfCall
	}
	route, err := p.route(ctx, state.Query{Source: local, SourceIP: conn.Remote().Addr(), Dst: dst})
	return local, route, rejectRoute, err
}

// resetInterval is how often a connection that we are still connecting for is
// asked whether its application has gone.
const resetInterval = 250 * time.Millisecond

// errClientReset ends the attempts on behalf of an application that gave up.
var errClientReset = errors.New("the client has reset the connection")

// watchReset returns a context that ends when conn's peer resets it. Until we
// read, nothing else would tell, and a connect that nobody waits for any more
// would go on. The caller calls stop when it has connected.
func watchReset(ctx context.Context, conn netns.Conn) (_ context.Context, stop func()) {
	socket, ok := conn.(interface{ PeerReset() bool })
	if !ok {
		return ctx, func() {}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	var mu sync.Mutex // guards timer, which its own function starts again
	var timer *time.Timer
	mu.Lock()
	defer mu.Unlock()
	timer = time.AfterFunc(resetInterval, func() {
		mu.Lock()
		defer mu.Unlock()
		switch {
		case ctx.Err() != nil:
		case socket.PeerReset():
			cancel(errClientReset)
		default:
			timer.Reset(resetInterval)
		}
	})
	return ctx, func() {
		cancel(nil)
		timer.Stop()
	}
}

// connectFailed is the end of a connection that did not come about. That the
// client gave up is its own act, as any reset (design D6).
func connectFailed(err error) outcome {
	if errors.Is(err, errClientReset) {
		return outcome{reset: resetDownstream}
	}
	return outcome{err: err}
}

// connectRetried connects to the route's next hop. When that fails before any
// byte of the application was taken, a service gets a second chance with another
// next hop, once (design D8). It returns the route that was taken, which is
// tracked until untrack is called.
func (p *Proxy) connectRetried(ctx context.Context, src netip.AddrPort, query state.Query, route state.Route) (_ state.Route, up upstream, untrack func(), err error) {
	track := func(r state.Route) func() {
		return p.tracker.trackOutbound(OutboundConnection{src, query.Dst, r.NextHop, r.Protocol})
	}
	untrack = track(route)
	up, err = p.connect(ctx, src, query.Source, route)
	var dial *dialError
	if err == nil || route.Service == nil || route.Workload == nil || !errors.As(err, &dial) || ctx.Err() != nil {
		return route, up, untrack, err
	}
	other, ok := p.another(ctx, query, route)
	if !ok {
		return route, up, untrack, err
	}
	p.log.DebugContext(ctx, "endpoint failed, trying another", "failed", route.NextHop, "next", other.NextHop, "error", err.Error())
	untrack()
	untrack = track(other)
	up, err = p.connect(ctx, src, query.Source, other)
	return other, up, untrack, err
}

// another is a route to the same destination by another next hop. Where that was
// a gateway, another gateway is as good as an endpoint that needs none.
func (p *Proxy) another(ctx context.Context, query state.Query, failed state.Route) (state.Route, bool) {
	for _, w := range []*state.Workload{failed.Gateway, failed.Workload} {
		if w == nil {
			continue
		}
		query.Avoid = []string{w.UID}
		if other, err := p.route(ctx, query); err == nil && other.NextHop != failed.NextHop {
			return other, true
		}
	}
	return state.Route{}, false
}

func (p *Proxy) connect(ctx context.Context, src netip.AddrPort, local *state.Workload, route state.Route) (_ upstream, err error) {
	switch route.Protocol {
	case state.HBONE:
		up := upstream{authority: route.Authority.String()}
		up.stream, err = p.openStream(ctx, src, local, route, up.authority)
		return up, err
	case state.DoubleHBONE:
		up := upstream{authority: route.Authority.String()}
		up.stream, err = p.openInner(ctx, src, local, route, up.authority)
		return up, err
	case state.TCP:
		conn, err := p.cfg.Network.Dial(ctx, netip.Addr{}, route.NextHop)
		switch {
		case ctx.Err() != nil && err != nil:
			return upstream{}, context.Cause(ctx)
		case err != nil:
			return upstream{}, &dialError{err: err}
		}
		return upstream{conn: conn}, nil
	}
	return upstream{}, fmt.Errorf("rule %s: no way to speak %v", route.Rule, route.Protocol)
}

// openStream opens a CONNECT stream over a pooled tunnel (spec/datapath.md §4.9, §5.2).
func (p *Proxy) openStream(ctx context.Context, src netip.AddrPort, local *state.Workload, route state.Route, authority string) (hbone.Stream, error) {
	key, err := p.tunnelKey(ctx, src, local, &route)
	if err != nil {
		return nil, err
	}
	stream, err := p.pool.Open(ctx, key, authority,
		hbone.Field{Name: fieldBaggage, Value: p.factsOf(local).baggage},
		hbone.Field{Name: fieldForwarded, Value: forwardedHeader(src, hostOf(&route))},
		hbone.Field{Name: fieldTraceparent, Value: newTraceID().traceparent()})
	if err != nil {
		return nil, openFailed(ctx, err, false)
	}
	return stream, nil
}

// tunnelKey is that of the tunnel to the route's next hop, for connections of
// today.
func (p *Proxy) tunnelKey(ctx context.Context, src netip.AddrPort, local *state.Workload, route *state.Route) (poolKey, error) {
	svid, err := p.svid(ctx, local)
	if err != nil {
		return poolKey{}, err
	}
	key := poolKey{
		source: svid.ID, sourceIP: src.Addr(), dst: route.NextHop,
		expected: joinIDs(route.ExpectedIDs), epoch: svid.Epoch(),
	}
	if hop := route.Hop(); hop != nil {
		key.uid = hop.UID
	}
	p.retireEpoch(key.epoch)
	return key, nil
}

// hostOf is the host name of the service that the client intended, "" if none.
func hostOf(route *state.Route) string {
	if route.Service == nil {
		return ""
	}
	return route.Service.Hostname
}

// openFailed says what kind of failure a pool's error is. What dialling for the
// pool has classified already stays as it is.
func openFailed(ctx context.Context, err error, inner bool) error {
	var (
		workload *unknownWorkloadError
		foreign  *unverifiedError
		identity *identityError
		dial     *dialError
		config   *tlsConfigError
		open     *openError
	)
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.As(err, &workload), errors.As(err, &foreign), errors.As(err, &identity), errors.As(err, &dial), errors.As(err, &config), errors.As(err, &open):
		return err
	}
	return &openError{inner: inner, err: err}
}

// retireEpoch lets tunnels end whose trust is no longer ours: another issuer,
// provider or bundle (design §3, tunnels and certificates).
func (p *Proxy) retireEpoch(now ca.Epoch) {
	old := p.epoch.Load()
	if old != nil && *old == now {
		return
	}
	if p.epoch.CompareAndSwap(old, &now) && old != nil {
		p.inner.Retire(func(k innerKey, _ *hbone.ConnInfo) bool { return k.outer.epoch != now }, errTrustChanged)
		p.pool.Retire(func(k poolKey, _ *hbone.ConnInfo) bool { return k.epoch != now }, errTrustChanged)
	}
}

var errTrustChanged = errors.New("the certificate's issuer or bundle has changed")

// dialTunnel connects for the pool. It runs once per key, whoever waits.
func (p *Proxy) dialTunnel(ctx context.Context, k poolKey) (net.Conn, hbone.Handshake, error) {
	handshake, err := p.clientHandshake(ctx, k.source, k.expected)
	if err != nil {
		return nil, hbone.Handshake{}, err
	}
	conn, err := p.cfg.Network.Dial(ctx, netip.Addr{}, k.dst)
	if err != nil {
		return nil, hbone.Handshake{}, &dialError{hbone: true, err: err}
	}
	return conn, handshake, nil
}

// clientHandshake is the one of a tunnel from source, our identity, to a peer
// that must be one of expected.
func (p *Proxy) clientHandshake(ctx context.Context, source spiffeid.ID, expected string) (hbone.Handshake, error) {
	local, err := p.outboundWorkload(ctx)
	if err != nil {
		return hbone.Handshake{}, err
	}
	svid, err := p.svid(ctx, local)
	if err != nil {
		return hbone.Handshake{}, err
	}
	if svid.ID != source {
		return hbone.Handshake{}, &identityError{fmt.Errorf("the local workload is now %s, the connection was accepted for %s", svid.ID, source)}
	}
	ids, err := splitIDs(expected)
	if err != nil {
		return hbone.Handshake{}, &tlsConfigError{err}
	}
	t := p.newTunnel(reporterSource, svid)
	config, err := ca.ClientTLS(svid, ids, t.options())
	if err != nil {
		return hbone.Handshake{}, &tlsConfigError{err}
	}
	return hbone.Handshake{TLS: config, Established: t.established}, nil
}

// factsOf renders the baggage of the local workload once per version of it.
func (p *Proxy) factsOf(local *state.Workload) *localFacts {
	if f := p.facts.Load(); f != nil && f.workload == local {
		return f
	}
	f := &localFacts{workload: local, baggage: baggageOf(local).String()}
	p.facts.Store(f)
	return f
}

// outboundConnection is the telemetry of an outbound connection.
func outboundConnection(src netip.AddrPort, local *state.Workload, route state.Route, authority string) *connection {
	c := &connection{
		reporter: reporterSource, src: src, dst: route.NextHop, hboneAuthority: authority,
		source: local, destination: route.Workload, service: route.Service,
		mutualTLS: route.Protocol != state.TCP,
	}
	if c.mutualTLS {
		c.sourcePrincipal = local.Identity.String()
	}
	if route.Workload != nil {
		c.destinationPrincipal = route.Workload.Identity.String()
	}
	return c
}

func (p *Proxy) illegalPort(port uint16) bool { return slices.Contains(p.cfg.IllegalPorts, port) }

// joinIDs makes a comparable value of an ordered list. One ID, the usual case,
// costs nothing.
func joinIDs(ids []spiffeid.ID) string {
	if len(ids) == 1 {
		return ids[0].String()
	}
	texts := make([]string, len(ids))
	for i, id := range ids {
		texts[i] = id.String()
	}
	return strings.Join(texts, ",")
}

// splitIDs undoes joinIDs. An empty list is an error: nobody could be believed.
func splitIDs(s string) ([]spiffeid.ID, error) {
	if s == "" {
		return nil, errors.New("the route names no identity that the destination could present")
	}
	var ids []spiffeid.ID
	for text := range strings.SplitSeq(s, ",") {
		id, err := spiffeid.FromString(text)
		if err != nil {
			return nil, err
		}
		ids = append(ids, id)
	}
	return ids, nil
}
