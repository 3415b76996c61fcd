package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net/netip"
	"testing"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

var directSOCKS = netip.MustParseAddrPort("127.0.0.1:15080")

// openSOCKS is a connection of the client's application to where kind and to say,
// with one round trip.
func (d *direct) openSOCKS(kind byte, to []byte, port uint16) netns.Conn {
	d.t.Helper()
	c, err := d.dial(directSOCKS)
	if err != nil {
		d.t.Fatal(err)
	}
	request := append([]byte{5, 1, 0, 5, 1, 0, kind}, to...)
	if _, err := c.Write(binary.BigEndian.AppendUint16(request, port)); err != nil {
		d.t.Fatal(err)
	}
	want := []byte{5, 0, 5, 0, 0, 1, 0, 0, 0, 0, 0, 0}
	got := make([]byte, len(want))
	if n, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
		d.t.Fatalf("the answer is % x, %v, want % x; log:\n%s", got[:n], err, want, d.client.logs)
	}
	if err := helloWorld(c); err != nil {
		d.t.Fatalf("%v; log:\n%s", err, d.client.logs)
	}
	return c
}

// ended waits until n connections that labels choose have ended well.
func (d *direct) ended(n float64, labels ...string) {
	d.t.Helper()
	labels = append(labels, `reporter="source"`, `response_flags="-"`)
	d.eventually(func() error {
		if got := d.client.sample(d.t, "istio_tcp_connections_closed_total", labels...); got != n {
			return fmt.Errorf("%v connections have ended, want %v; log:\n%s", got, n, d.client.logs)
		}
		return nil
	})
}

// INT-01, D-09…D-11 and D-13…D-15 as their clients are there: by SOCKS5.
func TestST_INT01_SOCKSRequests(t *testing.T) {
	for name, node := range map[string]string{"NODE_NAME unset": "", "NODE_NAME=local": "local"} {
		t.Run(name, func(t *testing.T) {
			d := startDirect(t, node, "UNSTABLE_ENABLE_SOCKS5=true")
			for i, dst := range []netip.AddrPort{directVIP, directHBONE, directTCP} {
				d.openSOCKS(1, dst.Addr().AsSlice(), dst.Port()).Close()
				d.ended(float64(i + 1))
			}
			if n := d.server.sample(t, "istio_tcp_connections_opened_total", `connection_security_policy="mutual_tls"`); n != 2 {
				t.Errorf("%v connections came by HBONE, want 2", n)
			}
		})
	}
}

// INT-02, D-16: the name is resolved by our own DNS.
func TestST_INT02_SOCKSByName(t *testing.T) {
	const host = "local-vip.default.svc.cluster.local"
	for _, name := range []string{host, "local-vip", "local-vip.default"} {
		t.Run(name, func(t *testing.T) {
			d := startDirect(t, "local", "UNSTABLE_ENABLE_SOCKS5=true")
			d.openSOCKS(3, append([]byte{byte(len(name))}, name...), 80).Close()
			d.ended(1, `destination_service="`+host+`"`)
		})
	}
}

// SOCKS5 is off unless it is asked for (faults 93).
func TestFault_093_SOCKSIsOff(t *testing.T) {
	d := startDirect(t, "local")
	if c, err := d.dial(directSOCKS); err == nil {
		t.Errorf("%v is open", c.RemoteAddr())
	}
}
