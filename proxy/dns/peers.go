package dns

import (
	"context"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// peers tells who may ask: whoever is in our network namespace. Its sockets are
// bound to loopback addresses, which the kernel lets nobody else reach unless
// route_localnet is set. A query that is redirected to us comes from the address
// that the client would have used towards its nameserver: one of the pod's own.
type peers struct {
	network netns.Network
	own     atomic.Pointer[[]netip.Addr]

	mu   sync.Mutex // guards next
	next time.Time  // when the addresses may be read again
}

// refreshPeers is how often an unknown address makes us look for new ones.
const refreshPeers = time.Second

// admits tells whether a client may ask.
func (s *Server) admits(ctx context.Context, peer netip.AddrPort) bool {
	if s.peers.allowed(peer) {
		return true
	}
	s.strangers.warn(ctx, s.log, "DNS query refused: it comes from an address that is not of this network namespace", "src.addr", peer)
	return false
}

func (p *peers) allowed(peer netip.AddrPort) bool {
	ip := peer.Addr().Unmap().WithZone("")
	if peer.Port() == 0 {
		return false
	}
	if ip.IsLoopback() || p.knows(ip) {
		return true
	}
	p.refresh()
	return p.knows(ip) // somebody else may have read them
}

func (p *peers) knows(ip netip.Addr) bool {
	own := p.own.Load()
	return own != nil && slices.Contains(*own, ip)
}

// refresh reads the addresses of the namespace, unless that was done just now. Who
// is not known when they can't be read gets no answer.
func (p *peers) refresh() {
	a, ok := p.network.(interface {
		Addresses() ([]netip.Addr, error)
	})
	if !ok {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if now.Before(p.next) {
		return
	}
	p.next = now.Add(refreshPeers)
	addrs, err := a.Addresses()
	if err != nil {
		return
	}
	own := make([]netip.Addr, 0, len(addrs))
	for _, ip := range addrs {
		own = append(own, ip.Unmap().WithZone(""))
	}
	p.own.Store(&own)
}
