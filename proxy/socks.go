package proxy

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"time"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// The parts of SOCKS5 that we speak (RFC 1928 §3 to §6): no authentication,
// CONNECT, the three kinds of addresses.
const (
	socksVersion = 5
	socksNoAuth  = 0
	socksConnect = 1

	socksIPv4   = 1
	socksDomain = 3
	socksIPv6   = 4
)

// The replies that we give (RFC 1928 §6). The choice is the reference
// implementation's (spec/datapath.md §8): also what has a code of its own in the
// RFC, or no reply at all, is answered by the one for commands that are not
// supported.
const (
	socksSucceeded    = 0
	socksIOFailed     = 1 // general failure
	socksUnresolved   = 4 // host unreachable
	socksNotSupported = 7
)

// socksWait bounds a negotiation from the first byte to the last, as it does the
// other handshakes.
const socksWait = 10 * time.Second

// nameResolver finds the addresses of the host names in SOCKS5 requests, IPv6 or
// IPv4 ones. Its errors say the name.
type nameResolver interface {
	LookupIP(ctx context.Context, name string, v6 bool) ([]netip.Addr, error)
}

// serveSOCKS carries one connection to where its client asks for by SOCKS5
// (spec/datapath.md §8). From there on it is an outbound connection as any other;
// it has no tunnel in common with captured ones, for those come from another
// address (poolKey).
func (p *Proxy) serveSOCKS(ctx context.Context, conn netns.Conn) *copying {
	return p.serveSource(ctx, conn, (*Proxy).requestedDst)
}

// requestedDst is where the client of a SOCKS5 connection wants to go. The client
// has the reply then, and what it sends next is for its destination, if it has not
// sent it already: no byte more was read than the negotiation has. With an error
// comes the reason for the counter, and the address of the listener.
func (p *Proxy) requestedDst(ctx context.Context, conn netns.Conn) (netip.AddrPort, string, error) {
	if !conn.Remote().Addr().IsLoopback() {
		return conn.Local(), rejectSOCKS, errors.New("SOCKS5 is for processes of the pod, by its loopback address, alone")
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Abort() })
	dst, err := p.negotiate(ctx, conn)
	switch {
	case !stop():
		return conn.Local(), rejectSOCKS, context.Cause(ctx)
	case err == nil:
		return dst, "", nil
	}
	reply, why := byte(socksIOFailed), rejectSOCKS
	var refused *socksError
	if errors.As(err, &refused) {
		reply = refused.reply
	}
	if reply == socksUnresolved {
		why = rejectName
	}
	_ = sendReply(conn, reply) // err says what is wrong
	return conn.Local(), why, err
}

// negotiate speaks SOCKS5 up to the reply that all is well.
func (p *Proxy) negotiate(ctx context.Context, conn netns.Conn) (netip.AddrPort, error) {
	wait := cmp.Or(p.cfg.HBONE.HandshakeTimeout, socksWait)
	ctx, cancel := context.WithTimeoutCause(ctx, wait, fmt.Errorf("no answer within %v: %w", wait, context.DeadlineExceeded))
	defer cancel()
	if err := conn.SetReadDeadline(time.Now().Add(wait)); err != nil {
		return netip.AddrPort{}, fmt.Errorf("SOCKS5: %w", err)
	}
	if err := readGreeting(conn); err != nil {
		return netip.AddrPort{}, err
	}
	if err := writeSOCKS(conn, []byte{socksVersion, socksNoAuth}); err != nil {
		return netip.AddrPort{}, err
	}
	host, addr, err := readRequest(conn)
	if err == nil && host != "" {
		addr, err = p.lookUpName(ctx, host, addr.Port(), conn.Remote().Addr().Is6())
	}
	switch {
	case err != nil:
		return netip.AddrPort{}, err
	case !connectable(addr.Addr()) || addr.Port() == 0:
		return netip.AddrPort{}, notSupported("request for %v: nobody can be connected to there", addr)
	}
	if err := conn.SetReadDeadline(time.Time{}); err != nil {
		return netip.AddrPort{}, fmt.Errorf("SOCKS5: %w", err)
	}
	return addr, sendReply(conn, socksSucceeded)
}

// readGreeting reads the methods of authentication that the client offers
// (RFC 1928 §3).
func readGreeting(r io.Reader) error {
	buf := make([]byte, 255)
	if err := readSOCKS(r, "greeting", buf[:2]); err != nil {
		return err
	}
	version, methods := buf[0], buf[:buf[1]]
	switch {
	case version != socksVersion:
		return notSupported("greeting has version %d, want %d", version, socksVersion)
	case len(methods) == 0:
		return notSupported("greeting offers no method of authentication, want %d (none)", socksNoAuth)
	}
	if err := readSOCKS(r, "greeting", methods); err != nil {
		return err
	}
	if !slices.Contains(methods, socksNoAuth) {
		return notSupported("greeting offers the methods of authentication %v, want %d (none) among them", methods, socksNoAuth)
	}
	return nil
}

// readRequest reads where the client wants to go: an address, or a host name and
// the port alone (RFC 1928 §4, §5).
func readRequest(r io.Reader) (host string, addr netip.AddrPort, err error) {
	buf := make([]byte, 255+2)
	if err := readSOCKS(r, "request", buf[:4]); err != nil {
		return "", addr, err
	}
	version, command, kind := buf[0], buf[1], buf[3]
	switch {
	case version != socksVersion:
		return "", addr, notSupported("request has version %d, want %d", version, socksVersion)
	case command != socksConnect:
		return "", addr, notSupported("request for command %d, want %d (CONNECT)", command, socksConnect)
	}
	var size int
	switch kind {
	case socksIPv4:
		size = 4
	case socksIPv6:
		size = 16
	case socksDomain:
		if err := readSOCKS(r, "request", buf[:1]); err != nil {
			return "", addr, err
		}
		if size = int(buf[0]); size == 0 {
			return "", addr, notSupported("request for an empty host name")
		}
	default:
		return "", addr, notSupported("request for an address of type %d, want %d, %d or %d", kind, socksIPv4, socksDomain, socksIPv6)
	}
	if err := readSOCKS(r, "request", buf[:size+2]); err != nil {
		return "", addr, err
	}
	port := binary.BigEndian.Uint16(buf[size:])
	if kind == socksDomain {
		return string(buf[:size]), netip.AddrPortFrom(addr.Addr(), port), nil
	}
	ip, _ := netip.AddrFromSlice(buf[:size])
	return "", netip.AddrPortFrom(ip.Unmap(), port), nil
}

// lookUpName is the address of a host name, by our own DNS, of the family that the
// client itself has.
func (p *Proxy) lookUpName(ctx context.Context, host string, port uint16, v6 bool) (netip.AddrPort, error) {
	switch {
	case p.names == nil:
		return netip.AddrPort{}, notSupported("request for the host name %q, but the DNS proxy is off", host)
	case slices.ContainsFunc([]byte(host), func(c byte) bool { return c <= ' ' || c >= 0x7f || c == '\\' }):
		// DNS libraries give the backslash a meaning of its own, and a name is no place
		// for the others.
		return netip.AddrPort{}, notSupported("request for the host name %q, want letters, digits, '-', '_' and '.'", host)
	}
	addrs, err := p.names.LookupIP(ctx, host, v6)
	if err != nil {
		return netip.AddrPort{}, &socksError{socksUnresolved, err}
	}
	i := slices.IndexFunc(addrs, connectable)
	if i < 0 {
		return netip.AddrPort{}, &socksError{socksUnresolved, fmt.Errorf("resolve %q: dns response had no valid IP addresses", host)}
	}
	return netip.AddrPortFrom(addrs[i].Unmap(), port), nil
}

// readSOCKS reads all of p, and nothing beyond it.
func readSOCKS(r io.Reader, what string, p []byte) error {
	if _, err := io.ReadFull(r, p); err != nil {
		return fmt.Errorf("read SOCKS5 %s: %w", what, err)
	}
	return nil
}

// sendReply answers the request (RFC 1928 §6). The address that we bind is nobody's
// business, and not known yet.
func sendReply(conn netns.Conn, code byte) error {
	return writeSOCKS(conn, []byte{socksVersion, code, 0, socksIPv4, 0, 0, 0, 0, 0, 0})
}

// writeSOCKS never waits: the kernel has room for the few bytes that a negotiation says.
func writeSOCKS(conn netns.Conn, p []byte) error {
	n, err := conn.TryWrite(p)
	switch {
	case err != nil:
		return fmt.Errorf("write SOCKS5 answer: %w", err)
	case n < len(p):
		return fmt.Errorf("write SOCKS5 answer: %w", io.ErrShortWrite)
	}
	return nil
}

// socksError is a request that is answered by another reply than an I/O failure.
type socksError struct {
	reply byte
	err   error
}

func (e *socksError) Error() string { return "SOCKS5: " + e.err.Error() }
func (e *socksError) Unwrap() error { return e.err }

func notSupported(format string, args ...any) error {
	return &socksError{socksNotSupported, fmt.Errorf(format, args...)}
}
