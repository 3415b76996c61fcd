//go:build linux

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// The reference modes: what a proxy pair would cost if it were built in another way.
const (
	modeDirect   = "direct"    // no proxy and no REDIRECT rule
	modeRelay    = "relay2"    // two TCP relays with io.Copy, which splices
	modeRelayBuf = "relay2buf" // two TCP relays with 64 KiB Read and Write
	modeTLS      = "tlsB"      // one tuned crypto/tls connection for each application connection
	modeH2       = "h2tun"     // golang.org/x/net/http2 with large windows and frames, pooled
)

const (
	tlsCopy   = 128 << 10
	relayCopy = 64 << 10
)

// duplex is one end of a relayed connection.
type duplex interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// reference is one half of a reference proxy pair. Its fields are set before use and not changed afterwards.
type reference struct {
	mode     string
	peerPort uint16                                     // outbound: port of the inbound half at the original destination
	dest     func(*net.TCPConn) (netip.AddrPort, error) // outbound: original destination
	target   netip.AddrPort                             // inbound: the application
	mark     int                                        // SO_MARK of outgoing sockets, 0 for none
	client   *tls.Config                                // outbound, modes with TLS
	server   *tls.Config                                // inbound, modes with TLS
	tunnels  *h2client                                  // outbound, mode h2tun
}

// newReference returns one half of mode. The caller sets the remaining fields.
func newReference(mode string, creds *credentials, mark int) (*reference, error) {
	r := &reference{mode: mode, mark: mark}
	switch mode {
	case modeRelay, modeRelayBuf:
	case modeTLS, modeH2:
		r.client, r.server = creds.client(), creds.server()
		if mode == modeH2 {
			var err error
			if r.tunnels, err = newH2Client(r); err != nil {
				return nil, err
			}
		}
	default:
		return nil, fmt.Errorf("reference mode %q: want one of %s, %s, %s, %s", mode, modeRelay, modeRelayBuf, modeTLS, modeH2)
	}
	return r, nil
}

// outbound carries one captured application connection to the inbound half and closes it.
func (r *reference) outbound(ctx context.Context, app *net.TCPConn) {
	defer app.Close()
	stop := context.AfterFunc(ctx, func() { app.Close() })
	defer stop()
	dst, err := r.dest(app)
	if err != nil {
		return
	}
	if r.mode == modeH2 {
		r.tunnels.carry(ctx, app, dst)
		return
	}
	conn, err := r.dial(ctx, netip.AddrPortFrom(dst.Addr(), r.peerPort))
	if err != nil {
		return
	}
	defer conn.Close()
	if r.mode == modeTLS {
		r.carryTLS(ctx, app, conn, func(c net.Conn) *tls.Conn { return tls.Client(c, r.client) })
		return
	}
	relay(app, conn, r.copyBytes())
}

// inbound carries one connection of the outbound half to the application and closes it.
func (r *reference) inbound(ctx context.Context, conn *net.TCPConn) {
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if r.mode == modeH2 {
		r.serveH2(ctx, conn)
		return
	}
	app, err := r.dial(ctx, r.target)
	if err != nil {
		return
	}
	defer app.Close()
	if r.mode == modeTLS {
		r.carryTLS(ctx, app, conn, func(c net.Conn) *tls.Conn { return tls.Server(c, r.server) })
		return
	}
	relay(app, conn, r.copyBytes())
}

func (r *reference) dial(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error) {
	d := net.Dialer{Control: markSocket(r.mark)}
	d.SetMultipathTCP(false)
	conn, err := d.DialContext(ctx, "tcp", to.String())
	if err != nil {
		return nil, err
	}
	return conn.(*net.TCPConn), nil
}

func (r *reference) copyBytes() func(io.Writer, io.Reader) error {
	if r.mode == modeRelay {
		return func(dst io.Writer, src io.Reader) error {
			_, err := io.Copy(dst, src)
			return err
		}
	}
	return copyWith(relayCopy)
}

// copyWith copies through one user-space buffer; hiding ReadFrom and WriteTo keeps the kernel from splicing.
func copyWith(size int) func(io.Writer, io.Reader) error {
	return func(dst io.Writer, src io.Reader) error {
		_, err := io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, make([]byte, size))
		return err
	}
}

// relay copies both directions, passes each end on as a half-close, and returns when both are done.
func relay(left, right duplex, copyBytes func(io.Writer, io.Reader) error) {
	var directions sync.WaitGroup
	direction := func(dst, src duplex) {
		err := copyBytes(dst, src)
		if err == nil {
			err = dst.CloseWrite()
		}
		if err != nil {
			left.Close()
			right.Close()
		}
	}
	directions.Go(func() { direction(left, right) })
	direction(right, left)
	directions.Wait()
}

// tlsDuplex is a TLS connection over a batchConn: one Read returns every record that has arrived, one Write sends
// all its records by one system call.
type tlsDuplex struct {
	*tls.Conn
	raw *batchConn
}

func (c *tlsDuplex) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	for err == nil && len(p)-n >= recordPlain && c.raw.buffered() {
		var more int
		more, err = c.Conn.Read(p[n:])
		n += more
	}
	return n, err
}

func (c *tlsDuplex) Write(p []byte) (int, error) {
	c.raw.cork()
	n, err := c.Conn.Write(p)
	return n, errors.Join(err, c.raw.uncork())
}

func (r *reference) carryTLS(ctx context.Context, app, conn *net.TCPConn, wrap func(net.Conn) *tls.Conn) {
	raw := &batchConn{Conn: conn}
	secure := wrap(raw)
	if err := secure.HandshakeContext(ctx); err != nil {
		return
	}
	relay(app, &tlsDuplex{Conn: secure, raw: raw}, copyWith(tlsCopy))
}

// markSocket returns a control function that sets SO_MARK; 0 sets nothing.
func markSocket(mark int) func(network, address string, c syscall.RawConn) error {
	if mark == 0 {
		return nil
	}
	return func(_, _ string, c syscall.RawConn) error {
		var failed error
		err := c.Control(func(fd uintptr) {
			failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, mark)
		})
		if err = errors.Join(err, failed); err != nil {
			return fmt.Errorf("set SO_MARK %d: %w", mark, err)
		}
		return nil
	}
}

// originalDst returns the IPv4 destination that the REDIRECT rule replaced.
func originalDst(conn *net.TCPConn) (netip.AddrPort, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("original destination: %w", err)
	}
	var addr *unix.IPv6Mreq
	var failed error
	err = raw.Control(func(fd uintptr) {
		// The answer is a 16-byte sockaddr_in; IPv6Mreq is the structure of x/sys that has room for it.
		addr, failed = unix.GetsockoptIPv6Mreq(int(fd), unix.IPPROTO_IP, unix.SO_ORIGINAL_DST)
	})
	if err = errors.Join(err, failed); err != nil {
		return netip.AddrPort{}, fmt.Errorf("original destination: %w", err)
	}
	b := addr.Multiaddr
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), uint16(b[2])<<8|uint16(b[3])), nil
}

// congestion returns the congestion control algorithm of a socket.
func congestion(conn syscall.Conn) (string, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return "", fmt.Errorf("read TCP_CONGESTION: %w", err)
	}
	var name string
	var failed error
	err = raw.Control(func(fd uintptr) {
		name, failed = unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION)
	})
	if err = errors.Join(err, failed); err != nil {
		return "", fmt.Errorf("read TCP_CONGESTION: %w", err)
	}
	return name, nil
}
