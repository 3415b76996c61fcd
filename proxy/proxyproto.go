package proxy

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// The PROXY protocol, version 2 (haproxy.org/download/3.0/doc/proxy-protocol.txt
// §2.2). We only write it, one shape of it: a parser's library would be longer
// than this file.
const (
	proxySignature = "\r\n\r\n\x00\r\nQUIT\n"
	proxyVersion   = 0x21 // version 2, command PROXY
	proxyUnspec    = 0x00
	proxyTCP4      = 0x11
	proxyTCP6      = 0x21
	// proxyIdentity is the type of the TLV that carries the peer's SPIFFE ID, as
	// the waypoints of Istio read it (spec/datapath.md §6.6).
	proxyIdentity = 0xd0
)

// proxyHeader tells the application behind an application tunnel who connected
// and where to. Addresses of different families, or none, cannot stand in it:
// it is then of no family and only carries the identity. A zero identity is left
// out.
func proxyHeader(src, dst netip.AddrPort, identity spiffeid.ID) []byte {
	src = netip.AddrPortFrom(src.Addr().Unmap(), src.Port())
	dst = netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port())
	b := make([]byte, 0, 160)
	b = append(b, proxySignature...)
	b = append(b, proxyVersion, proxyUnspec, 0, 0)
	family := len(b) - 3
	if src.IsValid() && dst.IsValid() && src.Addr().Is4() == dst.Addr().Is4() {
		b[family] = proxyTCP6
		if src.Addr().Is4() {
			b[family] = proxyTCP4
		}
		b = append(b, src.Addr().AsSlice()...)
		b = append(b, dst.Addr().AsSlice()...)
		b = binary.BigEndian.AppendUint16(b, src.Port())
		b = binary.BigEndian.AppendUint16(b, dst.Port())
	}
	if !identity.IsZero() {
		id := identity.String() // at most 2048 bytes (SPIFFE-ID §2.3)
		b = append(b, proxyIdentity)
		b = binary.BigEndian.AppendUint16(b, uint16(len(id)))
		b = append(b, id...)
	}
	binary.BigEndian.PutUint16(b[family+1:], uint16(len(b)-family-3))
	return b
}

// proxyWait bounds the write of a header. It fits into the buffer of a socket
// that was connected a moment ago.
const proxyWait = 5 * time.Second

// sendProxyHeader writes h to an application that was just connected to.
func sendProxyHeader(conn net.Conn, h []byte) error {
	if err := conn.SetWriteDeadline(time.Now().Add(proxyWait)); err != nil {
		return &proxyHeaderError{err}
	}
	if _, err := conn.Write(h); err != nil {
		return &proxyHeaderError{err}
	}
	if err := conn.SetWriteDeadline(time.Time{}); err != nil {
		return &proxyHeaderError{err}
	}
	return nil
}

// loopbackOf is the loopback address of ip's family.
func loopbackOf(ip netip.Addr) netip.Addr {
	if ip.Unmap().Is4() {
		return netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	return netip.IPv6Loopback()
}

// proxyHeaderError says that the application did not take the PROXY header.
type proxyHeaderError struct{ err error }

func (e *proxyHeaderError) Error() string { return fmt.Sprintf("io error: %v", e.err) }
func (e *proxyHeaderError) Unwrap() error { return e.err }
