package proxy

import (
	"context"
	"log/slog"
	"net/netip"
	"time"

	"github.com/ztunnel-go/ztunnel/internal/stack"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/state"
)

// servePassthrough carries one captured plaintext connection to the local
// workload (spec/datapath.md §7): no identity, but the same policies.
func (p *Proxy) servePassthrough(ctx context.Context, conn netns.Conn) (k *copying) {
	stack.Reserve()
	start := time.Now()
	open := p.cfg.Metrics.sockets.WithLabelValues(reporterDestination)
	open.Inc()
	defer func() {
		if k == nil {
			open.Dec()
		}
	}()
	src, dst := conn.Remote(), p.originalDst(ctx, conn)
	deny := func(why string, err error) {
		p.earlyDeny(ctx, reporterDestination, why, src, dst, err)
		conn.Close()
	}
	if p.illegalPort(dst.Port()) {
		deny(rejectSelfCall, errSelfCall)
		return nil
	}
	local, err := p.localWorkload(ctx)
	if err != nil {
		deny(rejectLocal(err), err)
		return nil
	}
	c := p.passthroughConnection(ctx, src, dst, local)
	c.open(ctx, p.cfg.Metrics, p.access, start)
	rbac := state.Conn{Src: src, Dst: dst, Destination: local}
	tracked, cut := context.WithCancelCause(ctx)
	untrack := p.tracker.trackInbound(cut, rbac, "")
	release := func() { untrack(); cut(nil) }
	defer func() {
		if k == nil {
			c.abandon(ctx)
			release()
		}
	}()
	up, err := p.connectPlain(tracked, rbac)
	if err != nil {
		conn.Close()
		c.end(ctx, dialFailed(tracked, err))
		return nil
	}
	return &copying{
		p: p, ctx: tracked, conn: conn, peer: up, c: c,
		done: func() { release(); open.Dec() },
	}
}

// connectPlain checks the policies and connects to the application.
func (p *Proxy) connectPlain(ctx context.Context, rbac state.Conn) (netns.Conn, error) {
	if denied := p.authorize(ctx, rbac, func() *slog.Logger { return p.rbac }); denied != nil {
		return nil, denied
	}
	src := netip.Addr{}
	if p.passthrough.transparent {
		src = rbac.Src.Addr()
	}
	conn, err := p.cfg.Network.Dial(ctx, src, rbac.Dst)
	if err != nil {
		return nil, &upstreamError{err}
	}
	return conn, nil
}

// passthroughConnection is the telemetry of a plaintext connection.
func (p *Proxy) passthroughConnection(ctx context.Context, src, dst netip.AddrPort, local *state.Workload) *connection {
	c := &connection{
		reporter: reporterDestination, src: src, dst: dst,
		destination: local, service: p.cfg.Store.GuessService(local, dst.Port(), ""),
		destinationPrincipal: local.Identity.String(),
	}
	known := false
	if c.source, known = p.cfg.Store.Workload(p.cfg.NetworkID, src.Addr()); !known {
		c.source, _ = p.demandSource(ctx, src.Addr())
	}
	return c
}
