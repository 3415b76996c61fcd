//go:build e2e

package world

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net/netip"
	"sync"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// Forward runs an application in the pod that connects whatever comes to a port
// of it to where next says, until the test ends: a waypoint behind the pod's own
// proxy. Its connections leave the pod as those of any application.
func (p *Pod) Forward(port uint16, next func(netns.Conn) (netip.AddrPort, error)) {
	t := p.W.T
	t.Helper()
	ln, err := p.Net.Listen(p.W.Ctx, netip.AddrPortFrom(netip.IPv6Unspecified(), port))
	if err != nil {
		t.Fatal(err)
	}
	var conns sync.WaitGroup
	conns.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			conns.Go(func() {
				defer c.Close()
				dst, err := next(c)
				if err != nil {
					t.Errorf("application of %s: %v", p.Name, err)
					return
				}
				up, err := p.Net.Dial(p.W.Ctx, netip.Addr{}, dst)
				if err != nil {
					t.Errorf("application of %s: %v", p.Name, err)
					return
				}
				defer up.Close()
				relay(c, up)
			})
		}
	})
	t.Cleanup(func() {
		_ = ln.Close()
		conns.Wait()
	})
}

// ProxyHeader is a PROXY protocol header of version 2.
type ProxyHeader struct {
	Src, Dst netip.AddrPort
	TLVs     map[byte]string
}

// ReadProxyHeader reads one from the front of a connection.
func ReadProxyHeader(r io.Reader) (ProxyHeader, error) {
	h := ProxyHeader{TLVs: map[byte]string{}}
	head := make([]byte, 16)
	if _, err := io.ReadFull(r, head); err != nil {
		return h, fmt.Errorf("read PROXY header: %w", err)
	}
	if !bytes.Equal(head[:12], []byte("\r\n\r\n\x00\r\nQUIT\n")) || head[12] != 0x21 {
		return h, fmt.Errorf("no PROXY header of version 2: %x", head)
	}
	body := make([]byte, binary.BigEndian.Uint16(head[14:]))
	if _, err := io.ReadFull(r, body); err != nil {
		return h, fmt.Errorf("read PROXY header: %w", err)
	}
	size := map[byte]int{0x11: 4, 0x21: 16}[head[13]]
	if size == 0 || len(body) < 2*size+4 {
		return h, fmt.Errorf("PROXY header of family %#x with %d bytes", head[13], len(body))
	}
	src, _ := netip.AddrFromSlice(body[:size])
	dst, _ := netip.AddrFromSlice(body[size : 2*size])
	body = body[2*size:]
	h.Src = netip.AddrPortFrom(src, binary.BigEndian.Uint16(body))
	h.Dst = netip.AddrPortFrom(dst, binary.BigEndian.Uint16(body[2:]))
	for body = body[4:]; len(body) >= 3; {
		n := int(binary.BigEndian.Uint16(body[1:]))
		if len(body) < 3+n {
			return h, fmt.Errorf("PROXY header with a TLV of %d bytes in %d", n, len(body)-3)
		}
		h.TLVs[body[0]] = string(body[3 : 3+n])
		body = body[3+n:]
	}
	return h, nil
}
