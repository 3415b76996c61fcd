package netns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Defaults of HostConfig (spec/datapath.md §3).
const (
	DefaultBacklog        = 128
	DefaultConnectTimeout = 10 * time.Second
)

// OriginalSource says whether inbound connections may be made with the address
// of the real client (ENABLE_ORIG_SRC, spec/datapath.md §3.3).
type OriginalSource uint8

// The three settings of ENABLE_ORIG_SRC.
const (
	OriginalSourceAuto     OriginalSource = iota // unset: used where the kernel grants it
	OriginalSourceRequired                       // true: Listen fails where it does not
	OriginalSourceOff                            // false: not even tried
)

// Keepalive is the TCP keepalive of every connection, dialled and accepted.
type Keepalive struct {
	Enabled        bool
	Time, Interval time.Duration // whole seconds: idle time before the first probe, time between probes
	Retries        int           // lost probes that end the connection
}

// DefaultKeepalive is 180 s / 180 s / 9.
func DefaultKeepalive() Keepalive {
	return Keepalive{Enabled: true, Time: 180 * time.Second, Interval: 180 * time.Second, Retries: 9}
}

// HostConfig describes the sockets of a Host. The zero value is usable.
type HostConfig struct {
	Keepalive Keepalive
	// UserTimeout is TCP_USER_TIMEOUT: how long sent data may stay
	// unacknowledged. 0 = the kernel's default.
	UserTimeout time.Duration
	// Mark is SO_MARK of outgoing sockets, 0 = none. Listening sockets, and so
	// accepted ones, are not marked: the network namespace is our own.
	Mark           uint32
	OriginalSource OriginalSource
	// IPv6Enabled lets Listen on [::] be dual stack. Otherwise it is 0.0.0.0.
	IPv6Enabled bool
	// Backlog is the length of the accept queue, 0 = DefaultBacklog.
	Backlog int
	// ConnectTimeout bounds Dial, 0 = DefaultConnectTimeout.
	ConnectTimeout time.Duration
	// Logger may be nil.
	Logger *slog.Logger
}

// Host is the network namespace that the process runs in: the whole data path
// in dedicated mode, and the listener of the proxy itself in shared mode.
type Host struct{ sockets }

var _ Network = (*Host)(nil)

// NewHost opens nothing.
func NewHost(cfg HostConfig) *Host {
	return &Host{newSockets(options{
		keepalive:      cfg.Keepalive,
		userTimeout:    cfg.UserTimeout,
		dialMark:       cfg.Mark,
		originalSource: cfg.OriginalSource,
		ipv6:           cfg.IPv6Enabled,
		backlog:        cfg.Backlog,
		connectTimeout: cfg.ConnectTimeout,
	}, cfg.Logger)}
}

// options are what distinguishes the sockets of one namespace from those of
// another. They never change.
type options struct {
	keepalive      Keepalive
	userTimeout    time.Duration
	dialMark       uint32 // outgoing sockets
	listenMark     uint32 // listening sockets; accepted ones inherit it
	reusePort      bool
	originalSource OriginalSource
	ipv6           bool
	backlog        int
	connectTimeout time.Duration
	holder         func(inode uint64) string  // names the process that has a socket of the namespace
	enter          func(func() error) error   // runs a function inside the namespace; nil = we live in it
	visited        func(context.Context) bool // tells whether the calling thread is inside already
	// inUse adds to an error of binding who has the port; nil = nobody asks.
	inUse func(protocol uint8, addr netip.AddrPort, err error) error
}

// sockets is the Network over real sockets that Host and Pod share.
type sockets struct {
	opt   options
	guard *loopGuard
	log   *slog.Logger
}

func newSockets(opt options, log *slog.Logger) sockets {
	if opt.backlog <= 0 {
		opt.backlog = DefaultBacklog
	}
	if opt.connectTimeout <= 0 {
		opt.connectTimeout = DefaultConnectTimeout
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return sockets{opt: opt, guard: newLoopGuard(), log: log}
}

// inside runs f in the namespace of the sockets. f must open sockets and no
// more: it holds an operating system thread.
func (s *sockets) inside(ctx context.Context, f func() error) error {
	if s.opt.enter == nil || s.opt.visited != nil && s.opt.visited(ctx) {
		return f()
	}
	return s.opt.enter(f)
}

// Listen implements Network. Its errors read
// "failed to bind to address <addr>: <io error>". It does not block.
func (s *sockets) Listen(ctx context.Context, addr netip.AddrPort) (Listener, error) {
	b, err := s.Bind(ctx, addr)
	if err != nil {
		return nil, err
	}
	return b.Listen(ctx)
}

// keepalive is the setting of accepted connections, which package net has given
// its own: nine probes, among others.
func (s *sockets) keepalive() net.KeepAliveConfig {
	k := s.opt.keepalive
	cfg := net.KeepAliveConfig{Enable: k.Enabled, Idle: k.Time, Interval: k.Interval, Count: k.Retries}
	if !k.Enabled || k.Retries == 9 {
		cfg.Count = -1
	}
	if !k.Enabled {
		cfg.Idle, cfg.Interval = -1, -1
	}
	return cfg
}

// bindAddr is the address that a Listen on addr binds.
func (s *sockets) bindAddr(addr netip.AddrPort) netip.AddrPort {
	ip := addr.Addr().Unmap()
	if ip == netip.IPv6Unspecified() && !s.opt.ipv6 {
		ip = netip.IPv4Unspecified()
	}
	return netip.AddrPortFrom(ip, addr.Port())
}

// withoutIPv6 tells whether addr can't be had for the only reason that the kernel
// was booted without IPv6: its wildcard is that of IPv4 then. Where IPv6 is merely
// switched off (net.ipv6.conf.all.disable_ipv6), [::] takes IPv4 connections.
func withoutIPv6(addr netip.AddrPort, err error) bool {
	return addr.Addr() == netip.IPv6Unspecified() && errors.Is(err, syscall.EAFNOSUPPORT)
}

// packetNetwork keeps package net from taking 0.0.0.0 for [::].
func packetNetwork(addr netip.AddrPort) string {
	if addr.Addr().Is4() {
		return "udp4"
	}
	return "udp"
}

func wildcard4(port uint16) netip.AddrPort { return netip.AddrPortFrom(netip.IPv4Unspecified(), port) }

// ListenPacket implements Network. A socket without a port of its own is an
// outgoing one and gets the mark of those.
func (s *sockets) ListenPacket(ctx context.Context, addr netip.AddrPort) (net.PacketConn, error) {
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	if !addr.Addr().IsValid() {
		return nil, bindError(addr, errors.New("no address"))
	}
	addr = s.bindAddr(addr)
	var pc net.PacketConn
	err := s.inside(ctx, func() error {
		lc := net.ListenConfig{Control: s.packetControl(addr)}
		var err error
		pc, err = lc.ListenPacket(ctx, packetNetwork(addr), addr.String())
		if withoutIPv6(addr, err) {
			addr = wildcard4(addr.Port())
			pc, err = lc.ListenPacket(ctx, packetNetwork(addr), addr.String())
		}
		return err
	})
	if err != nil {
		return nil, s.bindFailed(unix.IPPROTO_UDP, addr, err)
	}
	return pc, nil
}

// Dial implements Network: the "freebind connect" of spec/datapath.md §3.4. It
// blocks until the connection is there, at most for the connect timeout
// (ErrConnectTimeout). The end of ctx gives its cause; ErrSelfCapture means
// that the connection came back to us.
func (s *sockets) Dial(ctx context.Context, src netip.Addr, dst netip.AddrPort) (Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	dst = unmap(dst)
	src = src.Unmap()
	if !dst.IsValid() {
		return nil, fmt.Errorf("connect to %v: no address", dst)
	}
	if src == dst.Addr() {
		src = netip.Addr{}
	}
	network := "tcp4"
	if dst.Addr().Is6() {
		network = "tcp6"
	}
	if src.IsValid() && src.Is4() != dst.Addr().Is4() {
		return nil, fmt.Errorf("connect to %v from %v: not the same address family", dst, src)
	}
	d := net.Dialer{
		KeepAlive:      -1, // set in dialControl, with every other option
		ControlContext: s.dialControl(src),
	}
	d.SetMultipathTCP(false)
	ctx, cancel := context.WithTimeoutCause(ctx, s.opt.connectTimeout, ErrConnectTimeout)
	defer cancel()
	c, err := d.DialContext(ctx, network, dst.String())
	if err != nil {
		return nil, dialError(ctx, err)
	}
	tc, err := newTCPConn(c.(*net.TCPConn), nil)
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	tc.guard = s.guard
	if !src.IsValid() { // a foreign source may have the client's own port, and is no loop
		if err := s.guard.dial(&tc.track, flow{tc.local, dst}); err != nil {
			_ = tc.Abort()
			return nil, err
		}
	}
	return tc, nil
}

// dialError tells our timeout and the end of ctx from what the kernel says,
// which may be a timeout too.
func dialError(ctx context.Context, err error) error {
	var ne net.Error
	if errors.As(err, &ne) && ne.Timeout() && !errors.Is(err, syscall.ETIMEDOUT) {
		<-ctx.Done() // net watches the deadline itself and may be first
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// ErrConnectTimeout is what Dial returns when the peer did not answer in time:
// errors.Is(ErrConnectTimeout, os.ErrDeadlineExceeded), and a net.Error.
var ErrConnectTimeout error = connectTimeout{}

type connectTimeout struct{}

var _ net.Error = connectTimeout{}

func (connectTimeout) Error() string        { return "deadline has elapsed" }
func (connectTimeout) Timeout() bool        { return true }
func (connectTimeout) Temporary() bool      { return true }
func (connectTimeout) Is(target error) bool { return target == os.ErrDeadlineExceeded }

// bindFailed is bindError with what can be found out about it.
func (s *sockets) bindFailed(protocol uint8, addr netip.AddrPort, err error) error {
	if s.opt.inUse != nil {
		err = s.opt.inUse(protocol, addr, err)
	}
	return bindError(addr, err)
}

// bindError drops what net says about the address: the text has it already.
func bindError(addr netip.AddrPort, err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		err = op.Err
	}
	return fmt.Errorf("failed to bind to address %v: %w", addr, err)
}

func unmap(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}
