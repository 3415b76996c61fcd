package proxy

import (
	"bytes"
	"encoding/binary"
	"io"
	"net/netip"
	"strings"
	"testing"

	"github.com/ztunnel-go/ztunnel/proxy/netns/memnet"
)

// No bytes make the negotiation panic, read beyond its end, or come to another
// result than a second reading of RFC 1928.
func FuzzSOCKS(f *testing.F) {
	good := socksRequest(netip.MustParseAddrPort("192.0.2.1:80"))
	for _, seed := range [][]byte{
		{}, {5}, {4, 1, 0}, {5, 0}, {5, 1, 2}, {5, 255}, socksHello, good,
		append(bytes.Clone(socksHello), good...),
		append(append(bytes.Clone(socksHello), good...), "early"...),
		append(bytes.Clone(socksHello), socksNamed("a.example", 443)...),
		append(bytes.Clone(socksHello), socksNamed("none", 443)...),
		append(bytes.Clone(socksHello), socksNamed("a b", 443)...),
		append(bytes.Clone(socksHello), socksRequest(netip.MustParseAddrPort("[2001:db8::1]:80"))...),
		append(bytes.Clone(socksHello), 5, 2, 0, 1, 192, 0, 2, 1, 0, 80),
		append(bytes.Clone(socksHello), 5, 1, 0, 1, 0, 0, 0, 0, 0, 80),
		append(bytes.Clone(socksHello), 5, 1, 0, 9, 0, 0, 0, 0, 0, 80),
	} {
		f.Add(seed)
	}
	p := &Proxy{names: answers{"a.example/false": {netip.MustParseAddr("192.0.2.9")}}}
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) > 4<<10 {
			return // the other end's buffer must hold it
		}
		client, server := memnet.Pipe(netip.MustParseAddrPort("127.0.0.1:40000"), socksListener)
		defer client.Close()
		defer server.Close()
		_, _ = client.Write(in)
		_ = client.CloseWrite()
		dst, why, err := p.requestedDst(t.Context(), server)
		_ = server.CloseWrite()
		said, _ := io.ReadAll(client)
		rest, _ := io.ReadAll(server)

		want := readSecond(in)
		if (err == nil) != want.well || want.well && dst != want.dst || (why == "") != want.well {
			t.Errorf("got %v, %q, %v, want %+v", dst, why, err, want)
		}
		if want.well && !bytes.Equal(rest, in[want.used:]) {
			t.Errorf("%d bytes are left for the destination, want %d", len(rest), len(in)-want.used)
		}
		if !bytes.Equal(said, want.said) {
			t.Errorf("answered % x, want % x", said, want.said)
		}
	})
}

// second is what a negotiation should come to.
type second struct {
	well bool
	dst  netip.AddrPort
	used int
	said []byte
}

// readSecond reads a whole input at once, for FuzzSOCKS.
func readSecond(in []byte) second {
	end := func(said []byte, code byte) second {
		return second{said: append(said, 5, code, 0, 1, 0, 0, 0, 0, 0, 0)}
	}
	if len(in) < 2 {
		return end(nil, 1)
	}
	if in[0] != 5 || in[1] == 0 {
		return end(nil, 7)
	}
	n := 2 + int(in[1])
	if len(in) < n {
		return end(nil, 1)
	}
	if bytes.IndexByte(in[2:n], 0) < 0 {
		return end(nil, 7)
	}
	selected := []byte{5, 0}
	r := in[n:]
	if len(r) < 4 {
		return end(selected, 1)
	}
	sizes := map[byte]int{1: 4, 4: 16, 3: -1}
	size, known := sizes[r[3]]
	if r[0] != 5 || r[1] != 1 || !known {
		return end(selected, 7)
	}
	at := 4
	if size < 0 {
		if len(r) < 5 {
			return end(selected, 1)
		}
		if at, size = 5, int(r[4]); size == 0 {
			return end(selected, 7)
		}
	}
	if len(r) < at+size+2 {
		return end(selected, 1)
	}
	port := binary.BigEndian.Uint16(r[at+size:])
	ip, _ := netip.AddrFromSlice(r[at : at+size])
	if r[3] == 3 {
		name := string(r[at : at+size])
		if strings.ContainsFunc(name, func(c rune) bool { return c <= ' ' || c > '~' || c == '\\' }) {
			return end(selected, 7)
		}
		if name != "a.example" {
			return end(selected, 4)
		}
		ip = netip.MustParseAddr("192.0.2.9")
	}
	ip = ip.Unmap()
	if ip.IsUnspecified() || ip.IsMulticast() || port == 0 {
		return end(selected, 7)
	}
	return second{true, netip.AddrPortFrom(ip, port), n + at + size + 2, end(selected, 0).said}
}
