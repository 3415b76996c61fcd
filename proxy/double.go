package proxy

import (
	"cmp"
	"context"
	"errors"
	"net"
	"net/netip"
	"time"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/proxy/hbone"
	"github.com/ztunnel-go/ztunnel/state"
)

// Double HBONE (spec/datapath.md §4.7) reaches a workload in another network: an
// outer CONNECT stream leads to the network's gateway and through it, and within
// the stream there is a whole tunnel to the workload's own proxy. The gateway
// sees bytes; who is behind it we judge by the certificate of the inner tunnel.
//
// We pool the inner tunnels, unlike the reference, which makes one for each
// connection: two handshakes over the distance between two networks are dear.
// The price is that connections stick. The gateway picks a backend for each
// outer stream, so all that shares an inner tunnel goes to one backend. The
// bounds below keep that small: an inner tunnel takes new connections for
// innerMaxAge, which is also how long the gateway's choices of a moment ago can
// shape the load of today, it is kept without any for innerIdle, and no backend
// gets more than innerMaxStreams at once by one choice. Where even that is too
// much, POOL_CONNECTIONS_PER_KEY spreads over several.
const (
	innerIdle       = 10 * time.Second
	innerMaxAge     = 30 * time.Second
	innerMaxStreams = 32
)

// innerKey says which connections may share an inner tunnel: those that may
// share the outer one, want the same authority, which is by what the gateway
// picks, and expect the same of who answers.
type innerKey struct {
	outer     poolKey
	authority string
	final     string // the accepted identities, as poolKey.expected
}

// innerPool is the configuration of the pool of inner tunnels: that of the outer
// ones, within the bounds of stickiness.
func innerPool(cfg *Config, dial func(context.Context, innerKey) (net.Conn, hbone.Handshake, error)) hbone.PoolConfig[innerKey] {
	c := hbone.PoolConfig[innerKey]{
		Config:      cfg.HBONE,
		Dial:        dial,
		MaxStreams:  min(cmp.Or(cfg.PoolMaxStreams, innerMaxStreams), innerMaxStreams),
		IdleTimeout: min(cmp.Or(cfg.PoolIdle, innerIdle), innerIdle),
		ConnsPerKey: cfg.PoolConnsPerKey,
		MaxAge:      innerMaxAge,
	}
	if cfg.PoolMaxAge > 0 {
		c.MaxAge = min(cfg.PoolMaxAge, innerMaxAge)
	}
	return c
}

// errNoFinalIdentity refuses double HBONE to where nobody could be believed.
var errNoFinalIdentity = errors.New("the service names no identity (subject alternative name) that the workload behind the gateway could present")

// openInner opens a CONNECT stream to a workload behind a network gateway.
func (p *Proxy) openInner(ctx context.Context, src netip.AddrPort, local *state.Workload, route state.Route, authority string) (hbone.Stream, error) {
	if len(route.FinalIDs) == 0 {
		return nil, &tlsConfigError{errNoFinalIdentity}
	}
	outer, err := p.tunnelKey(ctx, src, local, &route)
	if err != nil {
		return nil, err
	}
	key := innerKey{outer: outer, authority: authority, final: joinIDs(route.FinalIDs)}
	stream, err := p.inner.Open(ctx, key, authority,
		hbone.Field{Name: fieldBaggage, Value: p.factsOf(local).baggage},
		hbone.Field{Name: fieldForwarded, Value: forwardedHeader(src, hostOf(&route))},
		hbone.Field{Name: fieldTraceparent, Value: newTraceID().traceparent()},
		hbone.Field{Name: fieldNetwork, Value: p.cfg.NetworkID})
	if err != nil {
		return nil, openFailed(ctx, err, true)
	}
	return stream, nil
}

// dialInner makes the outer stream of an inner tunnel. Its request names no
// client (forwarded), for the tunnel is not one client's.
func (p *Proxy) dialInner(ctx context.Context, k innerKey) (net.Conn, hbone.Handshake, error) {
	local, err := p.outboundWorkload(ctx)
	if err != nil {
		return nil, hbone.Handshake{}, err
	}
	outer, err := p.pool.Open(ctx, k.outer, k.authority,
		hbone.Field{Name: fieldBaggage, Value: p.factsOf(local).baggage},
		hbone.Field{Name: fieldTraceparent, Value: newTraceID().traceparent()})
	if err != nil {
		return nil, hbone.Handshake{}, openFailed(ctx, err, false)
	}
	handshake, err := p.clientHandshake(ctx, k.outer.source, k.final)
	if err != nil {
		outer.Reset(hbone.ErrCancel)
		return nil, hbone.Handshake{}, err
	}
	return outer, handshake, nil
}

// behindGateway describes the destination as it describes itself: the workload
// that the route names is one of those behind the gateway, and the gateway may
// have picked another. Who it is, is known by its certificate.
func (c *connection) behindGateway(s hbone.Stream) {
	id, err := ca.PeerID(s.Conn().TLS)
	if err == nil { // the handshake has seen to it
		c.destinationPrincipal = id.String()
	}
	if told, ok := parseBaggage(s.Fields()); ok {
		c.destination, c.told = nil, told.of(id)
	}
}
