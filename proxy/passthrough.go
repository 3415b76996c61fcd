package proxy

import (
	"context"
	"log/slog"
	"net/netip"
	"time"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/state"
)

// servePassthrough carries one captured plaintext connection to the local
// workload (spec/datapath.md §7): no identity, but the same policies.
func (p *Proxy) servePassthrough(ctx context.Context, conn netns.Conn) {
	start := time.Now()
	defer p.cfg.Metrics.socket(reporterDestination)()
	src := conn.Remote()
	dst, err := conn.OriginalDst()
	if err != nil {
		p.log.DebugContext(ctx, "no original destination", "src.addr", src, "error", err.Error())
		dst = conn.Local()
	}
	deny := func(why string, err error) {
		p.earlyDeny(ctx, reporterDestination, why, src, dst, err)
		conn.Close()
	}
	if p.illegalPort(dst.Port()) {
		deny(rejectSelfCall, errSelfCall)
		return
	}
	local, err := p.localWorkload(ctx)
	if err != nil {
		deny(rejectUnknownWorkload, err)
		return
	}
	c := p.passthroughConnection(src, dst, local)
	c.open(ctx, p.cfg.Metrics, p.access, start)
	defer c.abandon(ctx)
	c.end(ctx, p.carryPlain(ctx, conn, state.Conn{Src: src, Dst: dst, Destination: local}, c))
}

// carryPlain checks the policies, connects and copies. It has closed conn when
// it returns.
func (p *Proxy) carryPlain(ctx context.Context, conn netns.Conn, rbac state.Conn, c *connection) outcome {
	ctx, release := p.tracker.trackInbound(ctx, rbac, "")
	defer release()
	if denied := p.authorize(ctx, rbac, func() *slog.Logger { return p.rbac }); denied != nil {
		conn.Close()
		return outcome{err: denied}
	}
	src := netip.Addr{}
	if p.passthrough.Transparent() {
		src = rbac.Src.Addr()
	}
	up, err := p.cfg.Network.Dial(ctx, src, rbac.Dst)
	if err != nil {
		conn.Close()
		return dialFailed(ctx, err)
	}
	return pipeTCP(ctx, conn, up, c.receivedBytes(), c.sentBytes())
}

// passthroughConnection is the telemetry of a plaintext connection.
func (p *Proxy) passthroughConnection(src, dst netip.AddrPort, local *state.Workload) *connection {
	c := &connection{
		reporter: reporterDestination, src: src, dst: dst,
		destination: partyOf(local), service: p.cfg.Store.GuessService(local, dst.Port(), ""),
	}
	if w, ok := p.cfg.Store.Workload(p.cfg.NetworkID, src.Addr()); ok {
		c.source = partyOf(w)
	}
	c.destination.principal = local.Identity.String()
	return c
}
