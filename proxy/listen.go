package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ztunnel-go/ztunnel/internal/backoff"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// entry is one of the places where connections come in.
type entry struct {
	component string // in the log
	addr      netip.AddrPort
	serve     server

	transparent bool          // set by Listen
	accepted    atomic.Uint64 // connections, and failures to take one

	// Guarded by Proxy.mu. At most one is set, neither before Bind.
	bound netns.Bound
	ln    netns.Listener
}

// setEntries makes the configured entries, in the order in which they are bound
// (the in-pod spec §7.5), and sees to it that nobody is led to their ports.
func (p *Proxy) setEntries() {
	cfg := &p.cfg
	cfg.IllegalPorts = slices.Clone(cfg.IllegalPorts)
	add := func(component string, addr netip.AddrPort, serve server) *entry {
		if !addr.IsValid() {
			return nil
		}
		if !slices.Contains(cfg.IllegalPorts, addr.Port()) {
			cfg.IllegalPorts = append(cfg.IllegalPorts, addr.Port())
		}
		e := &entry{component: component, addr: addr, serve: serve}
		p.entries = append(p.entries, e)
		return e
	}
	p.inbound = add("inbound", cfg.InboundAddr, p.serveInbound)
	p.passthrough = add("inbound plaintext", cfg.PassthroughAddr, p.servePassthrough)
	add("outbound", cfg.OutboundAddr, p.serveOutbound)
	add("socks5", cfg.SOCKSAddr, p.serveSOCKS)
}

// Bind takes the TCP ports, all or none, and does not listen on them: a
// connection to them is refused, so that another process may serve them until
// Listen (decision D13). Without Bind, Listen binds. After an error nothing is
// held, and a Proxy with a DNS server is of no more use; after Drain it is
// ErrDraining.
func (p *Proxy) Bind(ctx context.Context) error {
	bounds, err := p.bind(ctx)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.drained {
		err = ErrDraining
	}
	if err != nil {
		for _, b := range bounds {
			b.Close()
		}
		p.drainDNS()
		return err
	}
	for i, e := range p.entries {
		e.bound = bounds[i]
	}
	return nil
}

// bind returns what it has bound also with an error.
func (p *Proxy) bind(ctx context.Context) (bounds []netns.Bound, _ error) {
	if p.dns != nil {
		if err := p.dns.Bind(ctx); err != nil {
			return nil, err
		}
	}
	for _, e := range p.entries {
		b, err := p.cfg.Network.Bind(ctx, e.addr)
		if err != nil {
			return bounds, fmt.Errorf("%s listener: %w", e.component, err)
		}
		bounds = append(bounds, b)
	}
	return bounds, nil
}

// Listen listens on what Bind took, or binds and listens, and binds the UDP
// sockets of the DNS server, all or none. What comes waits in the kernel's queues
// until Run serves it. Its errors are those of Bind. Whoever does not go on to Run
// calls Drain.
func (p *Proxy) Listen(ctx context.Context) error {
	p.mu.Lock()
	bounds := make([]netns.Bound, len(p.entries))
	for i, e := range p.entries {
		bounds[i], e.bound = e.bound, nil // ours, whatever Drain does meanwhile
	}
	drained := p.drained
	p.mu.Unlock()
	var listeners []netns.Listener
	err := ErrDraining
	if !drained {
		listeners, err = p.listen(ctx, bounds)
	}
	if err = p.take(err, listeners); err != nil {
		for _, b := range bounds {
			if b != nil {
				b.Close()
			}
		}
		for _, ln := range listeners {
			ln.Close()
		}
		p.drainDNS()
		return err
	}
	for i, e := range p.entries {
		p.log.InfoContext(ctx, "listener established",
			"address", listeners[i].Addr(), "component", e.component, "transparent", listeners[i].Transparent())
	}
	return nil
}

// take makes the listeners those of the entries, unless opening them has failed or
// Drain was called meanwhile.
func (p *Proxy) take(err error, listeners []netns.Listener) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.drained:
		return ErrDraining
	case err != nil:
		return err
	}
	p.opened = true
	for i, e := range p.entries {
		e.ln, e.transparent = listeners[i], listeners[i].Transparent()
	}
	return nil
}

// listen returns what it has opened also with an error.
func (p *Proxy) listen(ctx context.Context, bounds []netns.Bound) (listeners []netns.Listener, _ error) {
	if p.dns != nil {
		if err := p.dns.Listen(ctx); err != nil {
			return nil, err
		}
	}
	for i, e := range p.entries {
		var ln netns.Listener
		var err error
		if bounds[i] != nil {
			ln, err = bounds[i].Listen(ctx)
		} else {
			ln, err = p.cfg.Network.Listen(ctx, e.addr)
		}
		if err != nil {
			return listeners, fmt.Errorf("%s listener: %w", e.component, err)
		}
		listeners = append(listeners, ln)
	}
	return listeners, nil
}

// drainDNS lets the DNS server end. Before it runs, that closes it.
func (p *Proxy) drainDNS() {
	if p.dns != nil {
		p.dns.Drain()
	}
}

// opened is an entry with its listener.
type opened struct {
	*entry
	ln netns.Listener
}

// listening are the listeners that are open now.
func (p *Proxy) listening() []opened {
	p.mu.Lock()
	defer p.mu.Unlock()
	open := make([]opened, 0, len(p.entries))
	for _, e := range p.entries {
		if e.ln != nil {
			open = append(open, opened{e, e.ln})
		}
	}
	return open
}

// closeListeners closes everything that Bind and Listen opened and nobody has
// closed yet.
func (p *Proxy) closeListeners() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.close()
}

// close is closeListeners for who holds p.mu.
func (p *Proxy) close() {
	for _, e := range p.entries {
		if e.bound != nil {
			e.bound.Close()
		}
		if e.ln != nil {
			e.ln.Close()
		}
		e.bound, e.ln = nil, nil
	}
}

// Check tells whether every listener still listens, and alone but for other
// proxies: anyone with power over the pod's namespace can destroy its sockets, and
// a program of our user can share its ports, of which the error wraps
// [netns.ErrShared]. It is nil before Listen and after Drain.
func (p *Proxy) Check() error {
	var gone []error
	for _, o := range p.listening() {
		l, ok := o.ln.(netns.Checker)
		if !ok {
			continue
		}
		if !l.Listening() {
			gone = append(gone, fmt.Errorf("%s listener: the socket at %s listens no more", o.component, o.ln.Addr()))
			continue
		}
		switch who, err := l.Sharer(); {
		case err != nil: // seen the next time
			p.log.Debug("cannot look for others on a port", "component", o.component, "error", err.Error())
		case who != "":
			gone = append(gone, fmt.Errorf("%s listener: %w: %s at %s", o.component, netns.ErrShared, who, o.ln.Addr()))
		}
	}
	if p.dns != nil {
		gone = append(gone, p.dns.Check())
	}
	return errors.Join(gone...)
}

// InboundAddr is where the HBONE listener listens, the zero value if it does not.
func (p *Proxy) InboundAddr() netip.AddrPort {
	for _, o := range p.listening() {
		if o.entry == p.inbound {
			return o.ln.Addr()
		}
	}
	return netip.AddrPort{}
}

// server serves one accepted connection. What it returns, if anything, is the
// lasting part of it.
type server func(context.Context, netns.Conn) *copying

// acceptLoop owns the connections that it accepts, not the listener: it returns
// when that is closed and all of them have ended.
func (p *Proxy) acceptLoop(ctx context.Context, e opened) {
	var conns sync.WaitGroup
	defer conns.Wait()
	// An accept error is nearly always a lack of file descriptors: without a
	// pause the loop would burn the processor that could free some.
	retry := backoff.Policy{First: 5 * time.Millisecond, Max: time.Second, Budget: -1}.New()
	for {
		conn, err := e.ln.Accept()
		e.accepted.Add(1)
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			p.log.ErrorContext(ctx, "accept failed", "listener", e.component, "error", err.Error())
			if !backoff.Sleep(ctx, retry.Next(time.Now())) {
				return
			}
			continue
		}
		retry.Reset()
		conns.Go(func() {
			if k := p.serveRecovered(ctx, conn, e.entry); k != nil {
				conns.Go(k.run)
			}
		})
	}
}

// serveRecovered keeps a panic within its connection (design D21).
func (p *Proxy) serveRecovered(ctx context.Context, conn netns.Conn, e *entry) *copying {
	defer func() {
		if r := recover(); r != nil {
			p.panicked(ctx, e.component, r)
			_ = conn.Abort()
		}
	}()
	return e.serve(ctx, conn)
}

func (p *Proxy) panicked(ctx context.Context, where string, value any) {
	p.cfg.Metrics.panics.Inc()
	p.log.ErrorContext(ctx, "connection handler panicked", "listener", where,
		"panic", fmt.Sprint(value), "stack", string(debug.Stack()))
}
