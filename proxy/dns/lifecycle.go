package dns

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"time"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// ErrDrained is what Bind, Listen and Run return after Drain.
var ErrDrained = errors.New("the DNS proxy has been drained")

// Bind takes the TCP ports, all or none, without listening on them, so that a
// conflict is found at once and no query comes that can't be answered yet (decision
// D13). It does not block.
func (s *Server) Bind(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bind(ctx)
}

// bind does nothing if the ports are taken. The caller holds s.mu.
func (s *Server) bind(ctx context.Context) error {
	if s.drained {
		return ErrDrained
	}
	if len(s.bound) > 0 {
		return nil
	}
	var lacking error
	for _, addr := range s.cfg.Addrs {
		b, err := s.cfg.Network.Bind(ctx, addr)
		if addr.Addr().Unmap().Is6() && hasNoIPv6(err) {
			lacking = err
			continue
		}
		if err != nil {
			s.close()
			return fmt.Errorf("DNS listener: %w", err)
		}
		s.bound = append(s.bound, b)
	}
	if len(s.bound) == 0 {
		return fmt.Errorf("DNS listener: %w", lacking)
	}
	if lacking != nil {
		s.log.InfoContext(ctx, "no DNS by IPv6: its loopback address is not there", "error", lacking.Error())
	}
	return nil
}

// hasNoIPv6 tells whether an address can't be had because the namespace has no IPv6,
// be it altogether or on its loopback interface.
func hasNoIPv6(err error) bool {
	return errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EAFNOSUPPORT)
}

// Listen listens on the ports that Bind has taken, or takes them, too, and binds
// UDP: all or nothing, and after an error nothing is held any more. What comes waits
// in the kernel until Run. It does not block. Whoever does not go on to Run calls
// Drain.
func (s *Server) Listen(ctx context.Context) (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.bind(ctx); err != nil {
		return err
	}
	if len(s.sockets) > 0 {
		return errors.New("DNS listener: Listen was called before")
	}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	for _, b := range s.bound {
		pc, err := s.cfg.Network.ListenPacket(ctx, b.Addr())
		if err != nil {
			return fmt.Errorf("DNS listener: %w", err)
		}
		k, err := newSocket(pc, b.Addr())
		if err != nil {
			return errors.Join(fmt.Errorf("DNS listener %v: %w", b.Addr(), err), pc.Close())
		}
		s.sockets = append(s.sockets, k)
		ln, err := b.Listen(ctx)
		if err != nil {
			return fmt.Errorf("DNS listener: %w", err)
		}
		s.listeners = append(s.listeners, &listener{Listener: ln})
	}
	for _, ln := range s.listeners {
		s.log.InfoContext(ctx, "listener established", "address", ln.Addr(), "component", "dns")
	}
	return nil
}

// close closes everything that is open. The caller holds s.mu.
func (s *Server) close() {
	for _, b := range s.bound {
		b.Close() // of one that listens it does nothing
	}
	for _, k := range s.sockets {
		k.close()
	}
	for _, ln := range s.listeners {
		ln.Close()
	}
	s.bound, s.sockets, s.listeners = nil, nil, nil
}

// Run serves what Listen has opened. It returns nil when what came before Drain has
// been answered, or when ctx ends, which ends everything at once. It may be called
// once.
func (s *Server) Run(ctx context.Context) error {
	sockets, listeners, err := s.start()
	if err != nil {
		return err
	}
	ended, end := context.WithCancel(ctx)
	end()
	defer atEnd(ctx, func() {
		for _, k := range sockets {
			k.close()
		}
		for _, ln := range listeners {
			ln.Close()
		}
	})()
	var loops sync.WaitGroup
	for _, ln := range listeners {
		loops.Go(func() { s.serveTCP(ctx, ended, ln) })
	}
	for _, k := range sockets[1:] {
		loops.Go(func() { s.serveUDP(ctx, ended, k) })
	}
	s.serveUDP(ctx, ended, sockets[0])
	loops.Wait()
	return nil
}

func (s *Server) start() ([]*socket, []*listener, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.running:
		return nil, nil, errors.New("DNS server: Run was called before")
	case s.drained:
		return nil, nil, ErrDrained
	case len(s.sockets) == 0:
		return nil, nil, errors.New("DNS server: Run without Listen")
	}
	s.running = true
	return s.sockets, s.listeners, nil
}

// Drain takes no more queries: new ones go to another proxy that shares the ports,
// if there is one. What has come is answered, and then Run returns. Without Run it
// closes everything. Idempotent, does not block.
func (s *Server) Drain() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.drained {
		return
	}
	s.drained = true
	if !s.running {
		s.close()
		return
	}
	for _, k := range s.sockets {
		k.drain()
	}
	for _, ln := range s.listeners {
		ln.drain()
	}
}

// Check returns an error if one of the listeners does not listen any more, which
// somebody else in the namespace may have caused. It is nil before Listen and after
// Drain, and does not block.
func (s *Server) Check() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.drained {
		return nil
	}
	for _, k := range s.sockets {
		if err := k.check(); err != nil {
			return fmt.Errorf("DNS listener %v (udp): %w", k.addr, err)
		}
	}
	for _, ln := range s.listeners {
		if c, ok := ln.Listener.(netns.Checker); ok && !c.Listening() {
			return fmt.Errorf("DNS listener %v (tcp): it does not listen any more", ln.Addr())
		}
	}
	return nil
}

// atEnd calls f when ctx ends, unless stop is called before. If f was called, stop
// waits for it.
func atEnd(ctx context.Context, f func()) (stop func()) {
	done := make(chan struct{})
	cancel := context.AfterFunc(ctx, func() {
		defer close(done)
		f()
	})
	return func() {
		if !cancel() {
			<-done
		}
	}
}

// pastDeadline lets whoever waits for a socket return.
var pastDeadline = time.Unix(1, 0)
