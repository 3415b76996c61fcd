package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/internal/stack"
	"github.com/ztunnel-go/ztunnel/internal/zlog"
	"github.com/ztunnel-go/ztunnel/proxy/hbone"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/state"
)

// inboundTunnel serves the requests of one accepted HBONE connection.
type inboundTunnel struct {
	p        *Proxy
	src, dst netip.AddrPort
	peer     func(tls.ConnectionState) (spiffeid.ID, error) // ca.PeerID, once
}

// serveInbound runs one HBONE connection (spec/datapath.md §6.1).
func (p *Proxy) serveInbound(ctx context.Context, conn netns.Conn) *copying {
	open := p.cfg.Metrics.sockets.WithLabelValues(reporterDestination)
	open.Inc()
	defer open.Dec()
	t := &inboundTunnel{p: p, src: conn.Remote(), dst: conn.Local(), peer: peerOnce()}

	handshake := p.newHandshake(t.src.Addr())
	defer handshake.done()
	err := p.server.ServeConn(ctx, conn, handshake.config, t.serve)

	var (
		tlsErr   *hbone.HandshakeError
		preface  *hbone.PrefaceError
		identity *identityError
		foreign  *unverifiedError
	)
	switch {
	case errors.As(err, &foreign):
		p.earlyDeny(ctx, reporterDestination, rejectUnverified, t.src, t.dst, foreign)
	case errors.As(err, &identity):
		p.earlyDeny(ctx, reporterDestination, rejectCertificate, t.src, t.dst, fmt.Errorf("signing error: %w", identity.err))
	case errors.As(err, &tlsErr):
		p.earlyDeny(ctx, reporterDestination, rejectTLS, t.src, t.dst, fmt.Errorf("tls handshake error: %w", tlsErr.Err))
	case errors.As(err, &preface):
		p.earlyDeny(ctx, reporterDestination, rejectPreface, t.src, t.dst, fmt.Errorf("http2 handshake failed: %w", preface.Err))
	case err != nil:
		p.log.DebugContext(ctx, "tunnel ended", "src.addr", t.src, "error", err.Error())
	}
	return nil
}

// peerOnce caches the peer's identity: it is a fact of the tunnel.
func peerOnce() func(tls.ConnectionState) (spiffeid.ID, error) {
	var (
		once sync.Once
		id   spiffeid.ID
		err  error
	)
	return func(cs tls.ConnectionState) (spiffeid.ID, error) {
		once.Do(func() { id, err = ca.PeerID(cs) })
		return id, err
	}
}

// refusal is a request that ends before it is opened: a status and one log line.
type refusal struct {
	status int
	why    string
	err    error
}

// inboundRequest is a request that has passed the checks.
type inboundRequest struct {
	identity  spiffeid.ID
	local     *state.Workload
	authority string
	route     state.InboundRoute
	host      string // of the forwarded header
	rbac      state.Conn
}

// serve runs one CONNECT request through the checks of spec/datapath.md §6.2, in
// their order.
func (t *inboundTunnel) serve(ctx context.Context, r *hbone.Request) {
	stack.Reserve()
	start := time.Now()
	p := t.p
	in, refused := t.check(ctx, r)
	if refused != nil {
		p.earlyDeny(ctx, reporterDestination, refused.why, t.src, t.dst, refused.err)
		body := ""
		if r.Method != http.MethodConnect {
			body = "CONNECT only\n" // design D20
		}
		_ = r.Reject(refused.status, body)
		return
	}
	c := t.connection(ctx, r, in)
	c.open(ctx, p.cfg.Metrics, p.access, start)
	release := p.tracker.trackInbound(r.Cancel, in.rbac, in.host)
	connected := false
	defer func() {
		if !connected {
			c.abandon(ctx)
			release()
		}
	}()
	stream, conn, err := t.connect(ctx, r, in)
	if err != nil {
		c.end(ctx, dialFailed(ctx, err))
		return
	}
	connected = true
	k := &copying{
		p: p, ctx: ctx, conn: conn, stream: stream, c: c, done: release,
		meter: hbone.Meter{FromSocket: c.sentBytes(), ToSocket: c.receivedBytes()},
	}
	r.Continue(func(context.Context) { k.run() })
}

// check makes checks 1 to 5: nothing is counted before they have passed.
func (t *inboundTunnel) check(ctx context.Context, r *hbone.Request) (inboundRequest, *refusal) {
	p := t.p
	if r.Method != http.MethodConnect {
		return inboundRequest{}, &refusal{http.StatusBadRequest, rejectMethod, fmt.Errorf("expected method CONNECT, got %s", clip(r.Method, 20))}
	}
	a, err := parseAuthority(r.Authority)
	if err != nil {
		return inboundRequest{}, &refusal{http.StatusBadRequest, rejectAuthority, err}
	}
	identity, err := t.peer(r.Conn.TLS)
	if err != nil {
		// The handshake has verified it; without an identity nothing is served.
		return inboundRequest{}, &refusal{http.StatusUnauthorized, rejectIdentity, fmt.Errorf("peer identity: %w", err)}
	}
	local, err := p.localWorkload(ctx)
	if err != nil {
		return inboundRequest{}, &refusal{http.StatusServiceUnavailable, rejectLocal(err), err}
	}
	host := forwardedHost(r.Fields)
	route, err := p.inboundRoute(ctx, state.InboundQuery{
		Local: local, ConnDst: t.dst, Addr: a.Addr, Host: a.Host, Port: a.Port, ForwardedHost: host,
	})
	switch {
	case errors.Is(err, state.ErrIPMismatch):
		return inboundRequest{}, &refusal{http.StatusBadRequest, rejectDestination, err}
	case err != nil:
		return inboundRequest{}, &refusal{http.StatusServiceUnavailable, rejectRoute, err}
	case p.illegalPort(route.Upstream.Port()):
		return inboundRequest{}, &refusal{http.StatusServiceUnavailable, rejectSelfCall, errSelfCall}
	}
	rbac := state.Conn{
		Src: t.src, Dst: netip.AddrPortFrom(t.dst.Addr(), route.Upstream.Port()),
		Identity: identity, Destination: local,
	}
	return inboundRequest{identity, local, r.Authority, route, host, rbac}, nil
}

// connect makes checks 6 and 7 and answers. Its errors are those of dialFailed.
func (t *inboundTunnel) connect(ctx context.Context, r *hbone.Request, in inboundRequest) (hbone.Stream, netns.Conn, error) {
	p := t.p
	if denied := p.authorize(ctx, in.rbac, func() *slog.Logger { return t.span(r) }); denied != nil {
		_ = r.Reject(http.StatusUnauthorized, "")
		return nil, nil, denied
	}
	src, dst := t.bind(in.route)
	conn, err := p.cfg.Network.Dial(ctx, src, dst)
	if err != nil {
		_ = r.Reject(http.StatusServiceUnavailable, "")
		return nil, nil, &upstreamError{err}
	}
	var fields []hbone.Field
	if p.cfg.ResponseBaggage {
		fields = []hbone.Field{{Name: fieldBaggage, Value: p.factsOf(in.local).baggage}}
	}
	stream, err := r.Accept(fields...)
	if err != nil {
		_ = conn.Abort() // the client has given up; the application must not take it for a clean end
		return nil, nil, &upstreamError{directionError{"receive", err}}
	}
	if in.route.Proxy {
		// After the 200, so that a client that has gone costs the application no
		// connection with a header and nothing behind it.
		if err := sendProxyHeader(conn, proxyHeader(t.src, in.route.Target, in.identity)); err != nil {
			stream.Reset(hbone.ErrConnect)
			_ = conn.Abort()
			return nil, nil, err
		}
	}
	return stream, conn, nil
}

// bind is from which address we connect to which, by spec/datapath.md §6.5. The
// zero source leaves it to the kernel.
func (t *inboundTunnel) bind(route state.InboundRoute) (src netip.Addr, dst netip.AddrPort) {
	switch {
	case route.Proxy && t.p.cfg.LocalhostAppTunnel:
		local := loopbackOf(route.Upstream.Addr())
		return local, netip.AddrPortFrom(local, route.Upstream.Port())
	case t.p.inbound.transparent:
		return t.src.Addr(), route.Upstream
	}
	return netip.Addr{}, route.Upstream
}

// dialFailed is the end of a connection that was opened and did not get as far
// as the copying. That the client gave up meanwhile is its own act (design D6).
func dialFailed(ctx context.Context, err error) outcome {
	cause := context.Cause(ctx)
	var (
		reset  *hbone.StreamError
		denied *state.Denied
	)
	switch {
	case errors.As(err, &denied):
		return outcome{err: denied}
	case errors.As(cause, &reset) && reset.Remote:
		return outcome{reset: resetDownstream}
	case cause != nil:
		return outcome{err: &upstreamError{cause}}
	}
	return outcome{err: err}
}

// span makes the logger of one request: its lines carry the client's trace.
func (t *inboundTunnel) span(r *hbone.Request) *slog.Logger {
	header, _ := fieldValue(r.Fields, fieldTraceparent)
	id, ok := parseTraceparent(header)
	if !ok {
		id = newTraceID()
	}
	return zlog.Span(t.p.rbac, "inbound", slog.String("id", id.String()), slog.Any("peer", t.src))
}

// authorize asks the policies and logs what they said, to the logger that span
// makes if there is anything to log.
func (p *Proxy) authorize(ctx context.Context, c state.Conn, span func() *slog.Logger) error {
	verdict := p.cfg.Store.Authorize(c)
	level := slog.LevelDebug
	if p.cfg.PolicyInfoLogging {
		level = slog.LevelInfo
	}
	if p.rbac.Enabled(ctx, level) && len(verdict.Events) > 0 {
		log := span()
		for _, e := range verdict.Events {
			log.LogAttrs(ctx, level, e.Message, slog.String("policy", e.Policy))
		}
	}
	for _, policy := range verdict.Missing {
		p.missingPolicy(ctx, policy)
	}
	if verdict.Denied == nil {
		return nil
	}
	return verdict.Denied
}

// connection is the telemetry of one inbound request (spec/datapath.md §6.3).
func (t *inboundTunnel) connection(ctx context.Context, r *hbone.Request, in inboundRequest) *connection {
	c := &connection{
		reporter: reporterDestination, src: t.src, dst: t.dst, hboneAuthority: in.authority,
		destination: in.local, service: in.route.Service, mutualTLS: true,
		sourcePrincipal: in.identity.String(), destinationPrincipal: in.local.Identity.String(),
	}
	if c.source = t.source(ctx, r, in.identity); c.source == nil && t.p.cfg.ResponseBaggage {
		if told, ok := parseBaggage(r.Fields); ok {
			c.told = told.of(in.identity)
		}
	}
	return c
}

// source is the workload that sent a request, nil if that is not known.
//
// A peer does not choose its labels. The store's workload at the peer's address
// is the source if it has the identity that the peer has proved: this holds for
// a client and for the waypoint that stands before us, which is then the source
// (row N-08). It does not hold for who connects through a gateway or a NAT, nor
// for an address that has just changed hands: there the peer is described by its
// identity and, as far as that goes, by its own words. What the peer says in
// x-forwarded-network can therefore not hide a workload that we know by both, nor
// take another's place; it only spares the look-up at the control plane.
func (t *inboundTunnel) source(ctx context.Context, r *hbone.Request, identity spiffeid.ID) *state.Workload {
	p := t.p
	w, known := p.cfg.Store.Workload(p.cfg.NetworkID, t.src.Addr())
	if !known && !p.fromGateway(r.Fields) {
		w, known = p.demandSource(ctx, t.src.Addr())
	}
	if !known || !p.cfg.TLS.SameIdentity(p.cfg.TLS.DefaultTrustDomain, w.Identity, identity) {
		return nil
	}
	return w
}

// fromGateway tells whether a request says that it comes from another network.
func (p *Proxy) fromGateway(fields []hbone.Field) bool {
	network, ok := fieldValue(fields, fieldNetwork)
	return ok && !strings.EqualFold(network, p.cfg.NetworkID)
}

// missingPolicy reports a policy that the workload names and nobody has sent:
// every time as a count, once per name in the log (design D7).
func (p *Proxy) missingPolicy(ctx context.Context, policy string) {
	p.cfg.Metrics.missing.WithLabelValues().Inc()
	if _, seen := p.missing.LoadOrStore(policy, struct{}{}); !seen {
		p.rbac.WarnContext(ctx, "skipping unknown policy", "policy", policy)
	}
}
