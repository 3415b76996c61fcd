package proxy

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/proxy/netns/memnet"
	"github.com/ztunnel-go/ztunnel/state"
)

var (
	socksListener = netip.MustParseAddrPort("127.0.0.1:15080")
	socksHello    = []byte{5, 1, 0}
	socksWell     = []byte{5, 0, 5, 0, 0, 1, 0, 0, 0, 0, 0, 0} // both answers
)

// answers is a nameResolver with a fixed table. What is not in it is an error.
type answers map[string][]netip.Addr

func (a answers) LookupIP(_ context.Context, name string, v6 bool) ([]netip.Addr, error) {
	addrs, ok := a[fmt.Sprintf("%s/%v", name, v6)]
	if !ok {
		return nil, fmt.Errorf("resolve %q: NXDOMAIN", name)
	}
	return addrs, nil
}

// socksRequest asks for an address.
func socksRequest(dst netip.AddrPort) []byte {
	kind := byte(4)
	if dst.Addr().Is4() {
		kind = 1
	}
	b := append([]byte{5, 1, 0, kind}, dst.Addr().AsSlice()...)
	return binary.BigEndian.AppendUint16(b, dst.Port())
}

// socksNamed asks for a host name.
func socksNamed(host string, port uint16) []byte {
	b := append([]byte{5, 1, 0, 3, byte(len(host))}, host...)
	return binary.BigEndian.AppendUint16(b, port)
}

// dialSOCKS connects a process of n, at the address from, to n's SOCKS5 listener.
func (n *node) dialSOCKS(from string) netns.Conn {
	n.m.t.Helper()
	c, accepted := memnet.Pipe(netip.MustParseAddrPort(from), socksListener)
	n.m.parts.Go(func() {
		if k := n.proxy.serveSOCKS(n.m.ctx, accepted); k != nil {
			k.run()
		}
	})
	return c
}

// requestSOCKS is one connection with one round trip, all of it sent at once.
func (n *node) requestSOCKS(from string, request []byte) error {
	n.m.t.Helper()
	c := n.dialSOCKS(from)
	defer c.Close()
	if _, err := c.Write(append(append(bytes.Clone(socksHello), request...), "hello"...)); err != nil {
		return err
	}
	got := make([]byte, len(socksWell)+len("hello"))
	if n, err := io.ReadFull(c, got); err != nil {
		return fmt.Errorf("got % x: %w", got[:n], err)
	}
	if want := append(bytes.Clone(socksWell), "hello"...); !bytes.Equal(got, want) {
		return fmt.Errorf("got % x, want % x", got, want)
	}
	return nil
}

// SOCKS5 leads wherever a captured connection does, with the same telemetry, by
// address and by name; and has tunnels of its own (spec/datapath.md §8, §9.1).
func TestSOCKSDestinations(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		client := m.add("client", "10.0.1.2")
		server := m.add("server", "10.0.2.2")
		stranger, stranger6 := netip.MustParseAddrPort("192.0.2.1:80"), netip.MustParseAddrPort("[2001:db8::1]:80")
		m.echo(m.net.Host(stranger.Addr(), stranger6.Addr()), netip.MustParseAddrPort("[::]:80"))
		const host = "echo.default.svc.cluster.local"
		server.services = map[state.NamespacedHostname][]state.Port{{Namespace: "default", Hostname: host}: {{Service: 80, Target: echoPort}}}
		m.push()
		client.proxy.names = answers{
			host + "/false":      {netip.MustParseAddr("10.96.0.1")},
			"out.example/false":  {netip.IPv4Unspecified(), netip.MustParseAddr("::ffff:192.0.2.1"), netip.MustParseAddr("192.0.2.77")},
			"out.example/true":   {netip.MustParseAddr("2001:db8::1")},
			"only6.example/true": {netip.MustParseAddr("2001:db8::1")},
		}
		if err := client.request(server.echoAddr(), "captured"); err != nil {
			t.Fatal(err)
		}
		before := client.proxy.pool.Stats().Dialed
		const v4, v6 = "127.0.0.1:40000", "[::1]:40000"
		for _, tt := range []struct {
			name, from string
			request    []byte
			dst        string // dst.addr of the access log
			service    string
		}{
			{"HBONE", v4, socksRequest(server.echoAddr()), "10.0.2.2:15008", ""},
			{"a VIP", v4, socksRequest(netip.MustParseAddrPort("10.96.0.1:80")), "10.0.2.2:15008", host},
			{"plain", v4, socksRequest(stranger), "192.0.2.1:80", ""},
			{"IPv6", v4, socksRequest(stranger6), "[2001:db8::1]:80", ""},
			{"IPv4 in IPv6", v4, socksRequest(netip.MustParseAddrPort("[::ffff:192.0.2.1]:80")), "192.0.2.1:80", ""},
			{"another loopback address", "127.3.2.1:40000", socksRequest(stranger), "192.0.2.1:80", ""},
			{"a service by name", v4, socksNamed(host, 80), "10.0.2.2:15008", host},
			{"the first usable answer", v4, socksNamed("out.example", 80), "192.0.2.1:80", ""},
			{"a client with IPv6", v6, socksNamed("out.example", 80), "[2001:db8::1]:80", ""},
			{"the reserved byte is ignored", v4, append([]byte{5, 1, 0xff}, socksRequest(stranger)[3:]...), "192.0.2.1:80", ""},
		} {
			want := map[string]string{
				"message": "connection complete", "direction": "outbound", "src.addr": tt.from, "dst.addr": tt.dst, "dst.service": tt.service,
				"src.workload": "client", "bytes_sent": "5", "bytes_recv": "5", "error": "",
			}
			synctest.Wait()
			had := len(client.logs.find(want))
			if err := client.requestSOCKS(tt.from, tt.request); err != nil {
				t.Fatalf("%s: %v", tt.name, err)
			}
			synctest.Wait()
			if now := len(client.logs.find(want)); now != had+1 {
				t.Errorf("%s: %d new lines, want 1:\n%s", tt.name, now-had, client.logs.text("access"))
			}
		}
		client.wantMetric(11, "istio_tcp_connections_opened", map[string]string{"reporter": "source"})
		client.wantMetric(0, "istio_tcp_sockets_open", nil)
		client.wantMetric(0, "istio_tcp_connections_rejected", nil)
		if now := client.proxy.pool.Stats().Dialed; now != before+1 {
			t.Errorf("%d tunnels beside that of the captured connection, want 1", now-before)
		}
		if err := client.requestSOCKS(v4, socksNamed("only6.example", 80)); err == nil {
			t.Error("a client with IPv4 got to a name that has IPv6 addresses alone")
		}
	})
}

// Case 93: whatever is wrong has its reply, one line and one count, and the client
// is not kept waiting.
func TestFault_093_SOCKSReplies(t *testing.T) {
	long := strings.Repeat("a", 255)
	good := socksRequest(netip.MustParseAddrPort("192.0.2.1:80"))
	for _, tt := range []struct {
		name, from string
		greeting   []byte // nil: socksHello
		request    []byte
		selected   bool // the method was selected before
		reply      byte // 0xff: closed without one
		reason     string
		text       string // of the log line, its end
		after      time.Duration
	}{
		{name: "version 4", greeting: []byte{4, 1, 0, 80}, reply: 7, text: "SOCKS5: greeting has version 4, want 5"},
		{name: "HTTP", greeting: []byte("GET / HTTP/1.1\r\n\r\n"), reply: 7, text: "SOCKS5: greeting has version 71, want 5"},
		{name: "TLS", greeting: []byte{22, 3, 1, 2, 0, 1, 0}, reply: 7, text: "SOCKS5: greeting has version 22, want 5"},
		{name: "no methods", greeting: []byte{5, 0}, reply: 7, text: "greeting offers no method of authentication, want 0 (none)"},
		{name: "other methods", greeting: []byte{5, 2, 1, 2}, reply: 7, text: "greeting offers the methods of authentication [1 2], want 0 (none) among them"},
		{name: "254 other methods", greeting: append([]byte{5, 255}, bytes.Repeat([]byte{2}, 255)...), reply: 7, text: "among them"},
		{name: "bad version of the request", request: []byte{4, 1, 0, 1}, selected: true, reply: 7, text: "request has version 4, want 5"},
		{name: "BIND", request: append([]byte{5, 2}, good[2:]...), selected: true, reply: 7, text: "request for command 2, want 1 (CONNECT)"},
		{name: "UDP ASSOCIATE", request: append([]byte{5, 3}, good[2:]...), selected: true, reply: 7, text: "request for command 3, want 1 (CONNECT)"},
		{name: "command 0", request: append([]byte{5, 0}, good[2:]...), selected: true, reply: 7, text: "request for command 0, want 1 (CONNECT)"},
		{name: "address of type 0", request: []byte{5, 1, 0, 0}, selected: true, reply: 7, text: "address of type 0, want 1, 3 or 4"},
		{name: "address of type 2", request: []byte{5, 1, 0, 2}, selected: true, reply: 7, text: "address of type 2, want 1, 3 or 4"},
		{name: "empty name", request: socksNamed("", 80), selected: true, reply: 7, text: "request for an empty host name"},
		{name: "255 bytes of name", request: socksNamed(long, 80), selected: true, reply: 4, reason: rejectName, text: `SOCKS5: resolve "` + long + `": NXDOMAIN`},
		{name: "no such name", request: socksNamed("none.example", 80), selected: true, reply: 4, reason: rejectName, text: `resolve "none.example": NXDOMAIN`},
		{name: "name without addresses", request: socksNamed("empty.example", 80), selected: true, reply: 4, reason: rejectName, text: "dns response had no valid IP addresses"},
		{name: "name with useless addresses", request: socksNamed("useless.example", 80), selected: true, reply: 4, reason: rejectName, text: "dns response had no valid IP addresses"},
		{name: "name that is none", request: socksNamed("a\nb", 80), selected: true, reply: 7, text: `request for the host name "a\nb", want letters, digits, '-', '_' and '.'`},
		{name: "name in DNS notation", request: socksNamed(`a\.b`, 80), selected: true, reply: 7, text: "want letters, digits, '-', '_' and '.'"},
		{name: "the unspecified address", request: socksRequest(netip.MustParseAddrPort("0.0.0.0:80")), selected: true, reply: 7, text: "request for 0.0.0.0:80: nobody can be connected to there"},
		{name: "the unspecified address in IPv6", request: socksRequest(netip.MustParseAddrPort("[::ffff:0.0.0.0]:80")), selected: true, reply: 7, text: "nobody can be connected to there"},
		{name: "a group", request: socksRequest(netip.MustParseAddrPort("[ff02::1]:80")), selected: true, reply: 7, text: "nobody can be connected to there"},
		{name: "port 0", request: socksRequest(netip.MustParseAddrPort("192.0.2.1:0")), selected: true, reply: 7, text: "nobody can be connected to there"},
		{name: "silence", greeting: []byte{}, reply: 1, text: "read SOCKS5 greeting: read tcp 127.0.0.1:15080->127.0.0.1:40000: i/o timeout", after: 10 * time.Second},
		{name: "half a greeting", greeting: []byte{5, 2, 0}, reply: 1, text: "i/o timeout", after: 10 * time.Second},
		{name: "half a request", request: good[:9], selected: true, reply: 1, text: "i/o timeout", after: 10 * time.Second},
		{name: "not of the pod", from: "10.0.1.2:40000", reply: 0xff, text: "SOCKS5 is for processes of the pod, by its loopback address, alone"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inMesh(t, func(t *testing.T, m *mesh) {
				client := m.add("client", "10.0.1.2")
				client.proxy.names = answers{
					"empty.example/false":   {},
					"useless.example/false": {{}, netip.IPv4Unspecified(), netip.IPv6LinkLocalAllNodes(), netip.MustParseAddr("fe80::1%eth0")},
				}
				if tt.from == "" {
					tt.from = "127.0.0.1:40000"
				}
				if tt.greeting == nil {
					tt.greeting = socksHello
				}
				c := client.dialSOCKS(tt.from)
				defer c.Close()
				start := time.Now()
				if _, err := c.Write(append(bytes.Clone(tt.greeting), tt.request...)); err != nil {
					t.Fatal(err)
				}
				got, err := io.ReadAll(c)
				if err != nil && !errors.Is(err, syscall.ECONNRESET) { // what we did not read makes it a reset
					t.Error(err)
				}
				var want []byte
				if tt.selected {
					want = append(want, 5, 0)
				}
				if tt.reply != 0xff {
					want = append(want, 5, tt.reply, 0, 1, 0, 0, 0, 0, 0, 0)
				}
				if !bytes.Equal(got, want) {
					t.Errorf("got % x, want % x", got, want)
				}
				if d := time.Since(start); d != tt.after {
					t.Errorf("answered after %v, want %v", d, tt.after)
				}
				line := client.wantLog(map[string]string{
					"scope": "access", "level": "warn", "message": "connection failed", "src.addr": tt.from, "dst.addr": "127.0.0.1:15080", "direction": "outbound",
				})
				if line != nil && !strings.HasSuffix(line["error"].(string), tt.text) {
					t.Errorf("error = %q, want %q at its end", line["error"], tt.text)
				}
				reason := tt.reason
				if reason == "" {
					reason = rejectSOCKS
				}
				client.wantMetric(1, "istio_tcp_connections_rejected", map[string]string{"reporter": "source", "reason": reason})
				client.wantMetric(0, "istio_tcp_connections_opened", nil)
				client.wantMetric(0, "istio_tcp_sockets_open", nil)
			})
		})
	}
}

// Case 93: without the DNS proxy a name is refused as what we do not support.
func TestFault_093_SOCKSNameWithoutDNS(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		client := m.add("client", "10.0.1.2")
		err := client.requestSOCKS("127.0.0.1:40000", socksNamed("server.default", 80))
		if err == nil || !strings.HasPrefix(err.Error(), "got 05 00 05 07 00 01 00 00 00 00 00 00:") {
			t.Errorf("got %v, want reply 7", err)
		}
		client.wantLog(map[string]string{"message": "connection failed", "error": `SOCKS5: request for the host name "server.default", but the DNS proxy is off`})
	})
}

// Case 93, slowloris: the deadline is that of the whole negotiation, however the
// bytes drip; and a client that gives up holds nothing.
func TestFault_093_SOCKSSlowClients(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		client := m.add("client", "10.0.1.2")
		c := client.dialSOCKS("127.0.0.1:40000")
		defer c.Close()
		start := time.Now()
		greeting := append([]byte{5, 200}, make([]byte, 200)...)
		sent := 0
		for ; sent < len(greeting); sent++ {
			if _, err := c.Write(greeting[sent : sent+1]); err != nil {
				break
			}
			time.Sleep(300 * time.Millisecond)
		}
		if d := time.Since(start); sent == len(greeting) || d > 11*time.Second {
			t.Errorf("held for %v, with %d bytes of greeting", d, sent)
		}
		client.wantMetric(0, "istio_tcp_sockets_open", nil)

		gone := client.dialSOCKS("127.0.0.1:40001")
		_ = gone.Abort()
		client.wantLog(map[string]string{"message": "connection failed", "src.addr": "127.0.0.1:40001",
			"error": "read SOCKS5 greeting: read tcp 127.0.0.1:15080->127.0.0.1:40001: read: connection reset by peer"})
		half := client.dialSOCKS("127.0.0.1:40002")
		if err := half.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(half)
		if want := []byte{5, 1, 0, 1, 0, 0, 0, 0, 0, 0}; err != nil || !bytes.Equal(got, want) {
			t.Errorf("a client that says nothing got % x, %v, want % x", got, err, want)
		}
		half.Close()
		client.wantMetric(0, "istio_tcp_sockets_open", nil)
	})
}

// stuck is a nameResolver that answers when ctx ends.
type stuck struct{ asked chan context.Context }

func (s stuck) LookupIP(ctx context.Context, _ string, _ bool) ([]netip.Addr, error) {
	s.asked <- ctx
	<-ctx.Done()
	return nil, fmt.Errorf("resolve %q: %w", "slow.example", context.Cause(ctx))
}

// leaver is a connection whose peer has reset it when the test says so.
type leaver struct {
	netns.Conn
	left atomic.Bool
}

func (l *leaver) PeerReset() bool { return l.left.Load() }

// A name that takes too long is one that does not resolve; nobody looks on for a
// client that has gone, or that the drain's deadline cuts off.
func TestSOCKSNameTakesLong(t *testing.T) {
	const text = `SOCKS5: resolve "slow.example": no answer within 10s: context deadline exceeded`
	inMesh(t, func(t *testing.T, m *mesh) {
		client := m.add("client", "10.0.1.2")
		names := stuck{make(chan context.Context, 1)}
		client.proxy.names = names
		start := time.Now()
		err := client.requestSOCKS("127.0.0.1:40000", socksNamed("slow.example", 80))
		if err == nil || !strings.HasPrefix(err.Error(), "got 05 00 05 04 ") || time.Since(start) != 10*time.Second {
			t.Errorf("got %v after %v, want reply 4 after 10s", err, time.Since(start))
		}
		<-names.asked
		client.wantLog(map[string]string{"message": "connection failed", "error": text})

		c, accepted := memnet.Pipe(netip.MustParseAddrPort("127.0.0.1:40001"), socksListener)
		gone := &leaver{Conn: accepted}
		m.parts.Go(func() {
			if k := client.proxy.serveSOCKS(m.ctx, gone); k != nil {
				t.Error("it goes on")
				k.run()
			}
		})
		if _, err := c.Write(append(bytes.Clone(socksHello), socksNamed("slow.example", 80)...)); err != nil {
			t.Fatal(err)
		}
		ctx := <-names.asked
		start = time.Now()
		gone.left.Store(true)
		<-ctx.Done()
		if d := time.Since(start); d > resetInterval {
			t.Errorf("looked up for %v for a client that was gone", d)
		}
		client.wantLog(map[string]string{"message": "connection failed", "src.addr": "127.0.0.1:40001", "error": errClientReset.Error()})
	})
	inMesh(t, func(t *testing.T, m *mesh) {
		client := m.add("client", "10.0.1.2")
		ctx, cut := context.WithCancelCause(m.ctx)
		c, accepted := memnet.Pipe(netip.MustParseAddrPort("127.0.0.1:40000"), socksListener)
		m.parts.Go(func() {
			if k := client.proxy.serveSOCKS(ctx, accepted); k != nil {
				t.Error("it goes on")
				k.run()
			}
		})
		synctest.Wait()
		cut(ErrDraining)
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read: %v, want a reset", err)
		}
		client.wantLog(map[string]string{"message": "connection failed", "error": ErrDraining.Error()})
	})
}

// Every boundary between two bytes may be one between two packets, and what comes
// with the request belongs to the destination.
func TestSOCKSSplitAnywhere(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		client := m.add("client", "10.0.1.2")
		server := m.add("server", "10.0.2.2")
		client.proxy.names = answers{"server/false": {server.addr}}
		for _, request := range [][]byte{
			socksRequest(server.echoAddr()),
			socksRequest(netip.AddrPortFrom(netip.AddrFrom16(server.addr.As16()), echoPort)),
			socksNamed("server", echoPort),
		} {
			all := append(append([]byte{5, 3, 2, 0, 1}, request...), "early data"...)
			want := append(bytes.Clone(socksWell), "early data"...)
			for at := range len(all) + 1 {
				c := client.dialSOCKS("127.0.0.1:40000")
				for _, part := range [][]byte{all[:at], all[at:]} {
					if _, err := c.Write(part); err != nil {
						t.Fatal(err)
					}
					synctest.Wait()
				}
				got := make([]byte, len(want))
				if n, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
					t.Errorf("split at %d: got %q, %v", at, got[:n], err)
				}
				c.Close()
			}
		}
	})
}

// The reply comes before we connect (spec/datapath.md §8): that this fails shows
// as the end of the connection.
func TestSOCKSRepliesBeforeConnecting(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		client := m.add("client", "10.0.1.2")
		server := m.add("server", "10.0.2.2")
		m.net.Blackhole(server.addr, true)
		c := client.dialSOCKS("127.0.0.1:40000")
		defer c.Close()
		start := time.Now()
		if _, err := c.Write(append(bytes.Clone(socksHello), socksRequest(server.echoAddr())...)); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(socksWell))
		if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, socksWell) || time.Since(start) != 0 {
			t.Errorf("got % x, %v after %v, want % x at once", got, err, time.Since(start), socksWell)
		}
		if n, err := c.Read(got); n != 0 || !errors.Is(err, io.EOF) || time.Since(start) != 10*time.Second {
			t.Errorf("then %d bytes, %v after %v, want the end after 10s", n, err, time.Since(start))
		}
		client.wantMetric(1, "istio_tcp_connections_failed", map[string]string{"reporter": "source", "response_flags": "NETWORK_POLICY"})
	})
}

// Loop protection (spec/datapath.md §3.5): our own listeners are nobody's
// destination, by which address of the pod ever.
func TestFault_087_SOCKSSelfCall(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		client := m.add("client", "10.0.1.2", withConfig(func(c *Config) { c.SOCKSAddr = socksListener }))
		client.proxy.names = answers{"localhost/false": {netip.MustParseAddr("127.0.0.1")}}
		calls := 0
		for _, port := range []uint16{15001, 15006, 15008, 15080} {
			for _, request := range [][]byte{
				socksRequest(netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port)),
				socksRequest(netip.AddrPortFrom(netip.MustParseAddr("127.9.9.9"), port)),
				socksRequest(netip.AddrPortFrom(netip.IPv6Loopback(), port)),
				socksRequest(netip.AddrPortFrom(netip.MustParseAddr("::ffff:127.0.0.1"), port)),
				socksRequest(client.at(port)),
				socksNamed("localhost", port),
			} {
				calls++
				if err := client.requestSOCKS("127.0.0.1:40000", request); err == nil {
					t.Errorf("request % x reached our own port", request)
				}
			}
		}
		client.wantMetric(float64(calls), "istio_tcp_connections_rejected", map[string]string{"reporter": "source", "reason": rejectSelfCall})
	})
}
