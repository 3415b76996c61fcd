package proxy

import (
	"bytes"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// §6.6 of spec/datapath.md, byte by byte.
func TestProxyHeader(t *testing.T) {
	const signature = "0d0a0d0a000d0a515549540a"
	id := spiffeid.RequireFromString("spiffe://td/ns/a/sa/b")
	tlv := "d00015" + hex.EncodeToString([]byte("spiffe://td/ns/a/sa/b"))
	for _, tt := range []struct {
		name, src, dst string
		id             spiffeid.ID
		want           string
	}{
		{"v4", "10.0.0.1:4660", "10.0.0.2:8080", spiffeid.ID{}, "2111000c" + "0a000001" + "0a000002" + "1234" + "1f90"},
		{"v4 with identity", "10.0.0.1:4660", "10.0.0.2:8080", id, "21110024" + "0a000001" + "0a000002" + "1234" + "1f90" + tlv},
		{"v6 with identity", "[2001:db8::1]:1", "[2001:db8::2]:65535", id,
			"2121003c" + "20010db8000000000000000000000001" + "20010db8000000000000000000000002" + "0001" + "ffff" + tlv},
		{"v4-mapped", "[::ffff:10.0.0.1]:4660", "10.0.0.2:8080", spiffeid.ID{}, "2111000c" + "0a000001" + "0a000002" + "1234" + "1f90"},
		{"mixed families", "10.0.0.1:4660", "[2001:db8::2]:8080", id, "21000018" + tlv},
		{"mixed families without identity", "[2001:db8::2]:8080", "10.0.0.1:4660", spiffeid.ID{}, "21000000"},
		{"no destination", "10.0.0.1:4660", "", id, "21000018" + tlv},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dst, _ := netip.ParseAddrPort(tt.dst)
			if got := hex.EncodeToString(proxyHeader(netip.MustParseAddrPort(tt.src), dst, tt.id)); got != signature+tt.want {
				t.Errorf("got  %s\nwant %s", got, signature+tt.want)
			}
		})
	}
	// The longest SPIFFE ID still has its length told truly.
	long := spiffeid.RequireFromString("spiffe://td/" + strings.Repeat("a", 2000))
	h := proxyHeader(netip.MustParseAddrPort("10.0.0.1:1"), netip.MustParseAddrPort("10.0.0.2:2"), long)
	if want := []byte{0x07, 0xeb}; !bytes.Equal(h[14:16], want) || len(h) != 16+0x07eb {
		t.Errorf("length %x of %d bytes, want %x", h[14:16], len(h), want)
	}
}

// An application that does not read ends its connection in time, and one that does
// has no limit afterwards.
func TestProxyHeaderDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, app := net.Pipe()
		defer app.Close()
		defer c.Close()
		start := time.Now()
		var refused *proxyHeaderError
		if err := sendProxyHeader(c, []byte("header")); !errors.As(err, &refused) || !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) != proxyWait {
			t.Errorf("got %v after %v, want a refusal after %v", err, time.Since(start), proxyWait)
		}
		go func() {
			_, _ = io.ReadFull(app, make([]byte, 6))
			time.Sleep(2 * proxyWait)
			_, _ = app.Read(make([]byte, 1))
		}()
		if err := sendProxyHeader(c, []byte("header")); err != nil {
			t.Error(err)
		}
		if _, err := c.Write([]byte("x")); err != nil {
			t.Errorf("after the header: %v", err)
		}
	})
}

func FuzzProxyHeader(f *testing.F) {
	f.Add([]byte{10, 0, 0, 1}, uint16(1), []byte{10, 0, 0, 2}, uint16(2), "ns/a")
	f.Add(make([]byte, 16), uint16(1), []byte{}, uint16(2), "")
	f.Fuzz(func(t *testing.T, src []byte, srcPort uint16, dst []byte, dstPort uint16, path string) {
		s, _ := netip.AddrFromSlice(src)
		d, _ := netip.AddrFromSlice(dst)
		id, err := spiffeid.FromString("spiffe://td/" + path)
		if err != nil {
			id = spiffeid.ID{}
		}
		h := proxyHeader(netip.AddrPortFrom(s, srcPort), netip.AddrPortFrom(d, dstPort), id)
		if len(h) < 16 || len(h) != 16+int(h[14])<<8+int(h[15]) {
			t.Errorf("a header of %d bytes tells another length: %x", len(h), h)
		}
	})
}
