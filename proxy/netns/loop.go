package netns

import (
	"errors"
	"net/netip"
	"sync"
)

// ErrSelfCapture says that the redirection rules have led a connection of the
// proxy back to the proxy: they do not exempt its packets, by the mark. Dial
// or OriginalDst return it, whichever comes last, so that such a connection
// makes one turn and not as many as there are file descriptors.
var ErrSelfCapture = errors.New("attempted recursive call to ourselves")

// flow is a connection as its client sees it. Within one namespace two
// connections never have the same one, though they may share a local port.
type flow struct{ from, to netip.AddrPort }

// loopGuard knows which connections of a Network are dialled and which are
// captured. One that is both is a loop. Neither side can count on being first:
// the acceptor may run before Dial returns.
type loopGuard struct {
	mu                sync.Mutex // guards the fields below and tracked of all conns
	dialled, captured map[flow]struct{}
}

// tracked is a connection's entry in a loopGuard.
type tracked struct {
	flow   flow
	in     map[flow]struct{} // nil = in none
	closed bool
}

func newLoopGuard() *loopGuard {
	return &loopGuard{dialled: make(map[flow]struct{}), captured: make(map[flow]struct{})}
}

// dial enters a connection that was dialled.
func (g *loopGuard) dial(c *tracked, f flow) error { return g.add(c, f, g.dialled, g.captured) }

// capture enters a connection that was redirected to one of our listeners.
func (g *loopGuard) capture(c *tracked, f flow) error { return g.add(c, f, g.captured, g.dialled) }

func (g *loopGuard) add(c *tracked, f flow, in, other map[flow]struct{}) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if _, loop := other[f]; loop {
		return ErrSelfCapture
	}
	if !c.closed && c.in == nil {
		c.flow, c.in = f, in
		in[f] = struct{}{}
	}
	return nil
}

// remove must come before the socket is closed: afterwards the kernel may give
// its address to another.
func (g *loopGuard) remove(c *tracked) {
	g.mu.Lock()
	defer g.mu.Unlock()
	c.closed = true
	if c.in != nil {
		delete(c.in, c.flow)
		c.in = nil
	}
}
