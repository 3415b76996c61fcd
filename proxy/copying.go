package proxy

import (
	"context"

	"github.com/ztunnel-go/ztunnel/internal/stack"
	"github.com/ztunnel-go/ztunnel/proxy/hbone"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// copying is the lasting part of a connection: both ends are there, bytes flow or
// do not. It runs in a goroutine of its own, for what deciding and connecting
// have grown the stack to would stay with it; and everything that it needs is in
// here and not in frames, because a stack shrinks only when little of it is used.
type copying struct {
	p      *Proxy
	ctx    context.Context // the connection's own
	conn   netns.Conn      // the application: client of an outbound, server of an inbound connection
	stream hbone.Stream    // the tunnel, nil where the other side is plain TCP
	peer   netns.Conn      // the other side then
	c      *connection
	meter  hbone.Meter
	done   func() // gives back what the connection holds

	outbound bool
	result   hbone.Result
}

// run copies until both directions have ended. It owns both sides.
func (k *copying) run() {
	defer k.finish()
	if k.stream != nil {
		k.result = k.stream.Pipe(k.ctx, k.conn, &k.meter)
		k.endStream()
		return
	}
	k.copyPlain()
}

func (k *copying) endStream() {
	stack.Reserve() // for the log line; the goroutine is about to end
	k.c.end(k.ctx, outcomeOf(k.result, k.outbound))
}

// copyPlain joins the client and the server of a connection without a tunnel.
func (k *copying) copyPlain() {
	k.c.end(k.ctx, pipeTCP(k.ctx, k.conn, k.peer, k.c.receivedBytes(), k.c.sentBytes()))
}

// finish is deferred: a panic ends this connection and nothing else (design D21).
func (k *copying) finish() {
	if r := recover(); r != nil {
		k.p.panicked(k.ctx, direction(k.c.reporter), r)
		_ = k.conn.Abort()
		if k.stream != nil {
			k.stream.Reset(hbone.ErrInternal)
		} else {
			_ = k.peer.Abort()
		}
	}
	k.c.abandon(k.ctx)
	k.done()
}
