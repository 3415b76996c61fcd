package proxy

import (
	"context"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/proxy/hbone"
	"github.com/ztunnel-go/ztunnel/proxy/netns/memnet"
	"github.com/ztunnel-go/ztunnel/state"
)

// peer is an HBONE server that is none of our proxies: a waypoint or a gateway.
// It forwards the bytes of every stream to where next says.
type peer struct {
	m    *mesh
	host *memnet.Host
	at   netip.AddrPort
	next func(authority string) netip.AddrPort
	told string // the baggage of its answers, "" for none

	mu       sync.Mutex         // guards requests
	requests []*hbone.Request   // all that it got
	tunnels  atomic.Int64       // that are open
	cut      context.CancelFunc // ends it at once
	done     chan struct{}
}

// peer starts one with a certificate of svid.
func (m *mesh) peer(at string, svid *ca.SVID, next func(authority string) netip.AddrPort) *peer {
	m.t.Helper()
	p := &peer{m: m, at: netip.MustParseAddrPort(at), next: next}
	p.host = m.net.Host(p.at.Addr())
	p.start(svid)
	return p
}

// start is also for one that was cut.
func (p *peer) start(svid *ca.SVID) {
	p.m.t.Helper()
	ctx, cut := context.WithCancel(p.m.ctx)
	p.cut, p.done = cut, make(chan struct{})
	ln, err := p.host.Listen(ctx, p.at)
	if err != nil {
		p.m.t.Fatal(err)
	}
	context.AfterFunc(ctx, func() { ln.Close() })
	server := hbone.NewServer(hbone.Config{PingInterval: -1})
	handshake := func(context.Context) (hbone.Handshake, error) {
		return hbone.Handshake{TLS: ca.ServerTLS(svid, ca.TLSOptions{})}, nil
	}
	done := p.done
	p.m.parts.Go(func() {
		var conns sync.WaitGroup
		defer close(done)
		defer conns.Wait()
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			conns.Go(func() {
				p.tunnels.Add(1)
				defer p.tunnels.Add(-1)
				_ = server.ServeConn(ctx, c, handshake, p.serve) // how it ended is what the tests look at on our side
			})
		}
	})
}

// stop cuts it off and waits for its end.
func (p *peer) stop() {
	p.cut()
	<-p.done
}

func (p *peer) serve(ctx context.Context, r *hbone.Request) {
	p.mu.Lock()
	p.requests = append(p.requests, r)
	p.mu.Unlock()
	up, err := p.host.Dial(ctx, netip.Addr{}, p.next(r.Authority))
	if err != nil {
		_ = r.Reject(503, "")
		return
	}
	var fields []hbone.Field
	if p.told != "" {
		fields = []hbone.Field{{Name: fieldBaggage, Value: p.told}}
	}
	stream, err := r.Accept(fields...)
	if err != nil {
		_ = up.Abort()
		return
	}
	stream.Pipe(ctx, up, &hbone.Meter{})
}

// got are the requests that it has had.
func (p *peer) got() []*hbone.Request {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.requests
}

// to always forwards to one address.
func to(at netip.AddrPort) func(string) netip.AddrPort {
	return func(string) netip.AddrPort { return at }
}

// byAddress refers to a waypoint or gateway.
func byAddress(network string, at netip.AddrPort) *state.GatewayAddress {
	return &state.GatewayAddress{Address: state.NetworkAddress{Network: network, Addr: at.Addr()}, Port: at.Port()}
}
