package proxy

import (
	"context"
	"crypto/tls"
	"fmt"
	"net/netip"
	"sync"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/proxy/hbone"
)

// handshakes are the places for concurrent TLS handshakes: without a cap, a
// flood of them would take the processors from the tunnels that are up. One
// source address can take a quarter of the places.
type handshakes struct {
	places    chan struct{}
	perSource int

	mu      sync.Mutex // guards sources
	sources map[netip.Addr]*sourcePlaces
}

// sourcePlaces are those of one source address, while it uses or wants any.
type sourcePlaces struct {
	places chan struct{}
	users  int
}

func newHandshakes(limit int) *handshakes {
	return &handshakes{
		places: make(chan struct{}, limit), perSource: max(1, limit/4),
		sources: map[netip.Addr]*sourcePlaces{},
	}
}

// enter waits for a place. The caller leaves it by the returned function, once.
func (h *handshakes) enter(ctx context.Context, src netip.Addr) (leave func(), err error) {
	h.mu.Lock()
	s := h.sources[src]
	if s == nil {
		s = &sourcePlaces{places: make(chan struct{}, h.perSource)}
		h.sources[src] = s
	}
	s.users++
	h.mu.Unlock()
	forget := func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if s.users--; s.users == 0 {
			delete(h.sources, src)
		}
	}
	select {
	case s.places <- struct{}{}:
	case <-ctx.Done():
		forget()
		return nil, fmt.Errorf("waiting for one of the %d concurrent handshakes of %s: %w", h.perSource, src, context.Cause(ctx))
	}
	select {
	case h.places <- struct{}{}:
	case <-ctx.Done():
		<-s.places
		forget()
		return nil, fmt.Errorf("waiting for one of %d concurrent handshakes: %w", cap(h.places), context.Cause(ctx))
	}
	return func() {
		<-h.places
		<-s.places
		forget()
	}, nil
}

// handshake is the one of an accepted HBONE connection.
type handshake struct {
	p     *Proxy
	src   netip.Addr
	leave func()
}

func (p *Proxy) newHandshake(src netip.Addr) *handshake {
	return &handshake{p: p, src: src, leave: func() {}}
}

// config is the configuration of the handshake. A place is taken when the
// ClientHello is there, so that a connection that says nothing takes none, and
// is free again when the peer was verified, which ends the costly part, or when
// the connection ends.
func (h *handshake) config(ctx context.Context) (hbone.Handshake, error) {
	local, err := h.p.localWorkload(ctx)
	if err != nil {
		return hbone.Handshake{}, err
	}
	svid, err := h.p.svid(ctx, local)
	if err != nil {
		return hbone.Handshake{}, err
	}
	t := h.p.newTunnel(reporterDestination, svid)
	config := ca.ServerTLS(svid, t.options()).Clone()
	config.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		leave, err := h.p.handshakes.enter(hello.Context(), h.src)
		if err == nil {
			h.leave = sync.OnceFunc(leave)
		}
		return nil, err // go on with this configuration
	}
	verify := config.VerifyConnection
	config.VerifyConnection = func(cs tls.ConnectionState) error {
		defer h.leave()
		return verify(cs)
	}
	return hbone.Handshake{TLS: config, Established: t.established}, nil
}

// done gives the place back, if the handshake did not.
func (h *handshake) done() { h.leave() }
