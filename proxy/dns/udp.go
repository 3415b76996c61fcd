package dns

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"

	"github.com/ztunnel-go/ztunnel/internal/backoff"
	"github.com/ztunnel-go/ztunnel/state"
)

const (
	// quiet is how long a socket that is drained gets nothing before it is closed:
	// what was on its way to it may take a moment.
	quiet = 100 * time.Millisecond
	// maxDrain bounds that, for sockets that cannot be taken out of a group.
	maxDrain = time.Second
)

// socket is a UDP socket for clients.
type socket struct {
	addr     netip.AddrPort
	pc       net.PacketConn
	udp      *net.UDPConn   // pc, if it is one of the kernel: reading does not allocate
	readable func() error   // waits for a datagram without taking it; nil if that's not possible
	answers  sync.WaitGroup // of queries that wait
	fault    atomic.Pointer[fault]
}

// fault is the last error of a socket.
type fault struct {
	err error
	at  time.Time
}

// stillFaulty is longer than between two tries to receive.
const stillFaulty = 3 * time.Second

func newSocket(pc net.PacketConn, addr netip.AddrPort) (*socket, error) {
	k := &socket{addr: addr, pc: pc}
	var err error
	if udp, ok := pc.(*net.UDPConn); ok {
		k.udp = udp
		k.readable, err = readability(udp)
	}
	return k, err
}

func (k *socket) close() { _ = k.pc.Close() }

func (k *socket) check() error {
	if f := k.fault.Load(); f != nil && time.Since(f.at) < stillFaulty {
		return f.err
	}
	return nil
}

// drain makes serveUDP answer what has come, and end.
func (k *socket) drain() { _ = k.pc.SetReadDeadline(pastDeadline) }

// receive waits for a datagram, and takes memory for it when it is there. The
// caller puts w back.
func (k *socket) receive() (w *work, n int, peer netip.AddrPort, err error) {
	if k.readable != nil {
		if err := k.readable(); err != nil {
			return nil, 0, peer, err
		}
	}
	w = takeWork()
	if k.udp != nil {
		n, peer, err = k.udp.ReadFromUDPAddrPort(w.in[:])
	} else {
		var from net.Addr
		if n, from, err = k.pc.ReadFrom(w.in[:]); err == nil {
			if ua, ok := from.(*net.UDPAddr); ok {
				peer = ua.AddrPort()
			}
		}
	}
	if err != nil {
		w.putBack()
		return nil, 0, peer, err
	}
	return w, n, peer, nil
}

func (k *socket) send(reply []byte, peer netip.AddrPort) {
	// A datagram that can't be sent is lost, as any may be: the client asks again.
	if k.udp != nil {
		_, _ = k.udp.WriteToUDPAddrPort(reply, peer)
	} else {
		_, _ = k.pc.WriteTo(reply, net.UDPAddrFromAddrPort(peer))
	}
}

// serveUDP answers the queries of a socket until it is closed, or drained, and
// closes it. It answers itself what takes no time; ended has ended.
func (s *Server) serveUDP(ctx, ended context.Context, k *socket) {
	defer k.close()
	defer k.answers.Wait()
	retry := backoff.Policy{First: 5 * time.Millisecond, Max: time.Second, Budget: -1}.New()
	var until time.Time // of draining
	for {
		w, n, peer, err := k.receive()
		switch {
		case err == nil:
			s.datagram(ctx, ended, k, w, n, peer)
			w.putBack()
			if k.fault.Load() != nil {
				k.fault.Store(nil)
				retry.Reset()
			}
		case errors.Is(err, net.ErrClosed):
			return
		case errors.Is(err, os.ErrDeadlineExceeded) && until.IsZero():
			until = time.Now().Add(maxDrain)
			s.leave(ctx, k)
		case errors.Is(err, os.ErrDeadlineExceeded):
			return
		default:
			if k.check() == nil {
				s.log.ErrorContext(ctx, "DNS queries can't be received", "address", k.addr, "error", err.Error())
			}
			k.fault.Store(&fault{err, time.Now()})
			if !backoff.Sleep(ctx, retry.Next(time.Now())) {
				return
			}
		}
		if !until.IsZero() {
			next := time.Now().Add(quiet)
			if next.After(until) {
				next = until
			}
			_ = k.pc.SetReadDeadline(next)
		}
	}
}

// leave lets another socket of the port have what comes from now on.
func (s *Server) leave(ctx context.Context, k *socket) {
	if k.udp == nil {
		return
	}
	if err := leaveGroup(k.udp); err != nil {
		s.log.WarnContext(ctx, "DNS queries may get lost while another proxy takes over", "address", k.addr, "error", err.Error())
	}
}

// datagram answers one query, or has it answered.
func (s *Server) datagram(ctx, ended context.Context, k *socket, w *work, n int, peer netip.AddrPort) {
	defer s.recovered(ctx)
	if !s.admits(ctx, peer) {
		return
	}
	raw := w.in[:n]
	reply, source, v := s.now(ended, w, raw, overUDP)
	if v == awaited && !s.await(ctx, k, raw, source, peer) {
		s.refused(ctx, &w.query, source)
		reply, v = w.query.refuse(w.out[2:], dns.RcodeServerFailure), answered
	}
	if v == answered {
		k.send(reply, peer)
	}
}

// await answers a query when there is an answer. It is false if too many wait.
func (s *Server) await(ctx context.Context, k *socket, raw []byte, source *state.Workload, peer netip.AddrPort) bool {
	if !s.reserve() {
		return false
	}
	raw = slices.Clone(raw)
	k.answers.Go(func() {
		defer s.release()
		if reply := s.later(ctx, raw, overUDP, peer.Port(), source); reply != nil {
			k.send(reply, peer)
		}
	})
	return true
}

// reserve takes room for a query that waits, until release.
func (s *Server) reserve() bool {
	if !s.pending.take() {
		return false
	}
	if !s.cfg.Limits.pending.take() {
		s.pending.release()
		return false
	}
	return true
}

func (s *Server) release() {
	s.cfg.Limits.pending.release()
	s.pending.release()
}
