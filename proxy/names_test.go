package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	mdns "github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/ztunnel-go/ztunnel/proxy/dns"
	"github.com/ztunnel-go/ztunnel/proxy/netns/memnet"
	"github.com/ztunnel-go/ztunnel/state"
)

var dnsListener = netip.MustParseAddrPort("127.0.0.1:15053")

// withDNS gives a proxy a DNS server without nameservers behind it.
func withDNS(t *testing.T) func(*Config) {
	conf := filepath.Join(t.TempDir(), "resolv.conf")
	return func(c *Config) {
		c.DNS = &dns.ServerConfig{
			Addrs: []netip.AddrPort{dnsListener}, Metrics: dns.NewMetrics(prometheus.NewRegistry()), Files: dns.NewFiles(conf, conf, nil),
		}
	}
}

// askPod is a query by UDP of a process in the pod of host: the address of the
// answer, or the response code.
func askPod(t *testing.T, host *memnet.Host, name string) string {
	t.Helper()
	pc, err := host.ListenPacket(t.Context(), netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	query, err := new(mdns.Msg).SetQuestion(name, mdns.TypeA).Pack()
	if err != nil {
		t.Fatal(err)
	}
	_ = pc.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := pc.WriteTo(query, net.UDPAddrFromAddrPort(dnsListener)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1500)
	n, _, err := pc.ReadFrom(buf)
	if err != nil {
		return err.Error()
	}
	var answer mdns.Msg
	if err := answer.Unpack(buf[:n]); err != nil {
		t.Fatal(err)
	}
	for _, rr := range answer.Answer {
		if a, ok := rr.(*mdns.A); ok {
			return a.A.String()
		}
	}
	return mdns.RcodeToString[answer.Rcode]
}

// The DNS server belongs to the proxy: its names are the store's, its SOCKS5
// clients may say a name, and it answers a pod whose identity is not to be used
// (decision D13), and one that the store does not know, after a second (D22).
func TestNames(t *testing.T) {
	inMesh(t, func(t *testing.T, m *mesh) {
		var check inspector
		client, arrive := m.late("client", "10.0.1.2", withConfig(withDNS(t)), withConfig(func(c *Config) {
			c.Verify, c.SOCKSAddr = check.verify, socksListener
		}))
		server := m.add("server", "10.0.2.2")
		const name = "echo.default.svc.cluster.local"
		server.services = map[state.NamespacedHostname][]state.Port{
			{Namespace: "default", Hostname: name}: {{Service: 80, Target: echoPort}},
		}
		m.push()
		check.set(errForeign)
		begin := time.Now()
		for _, want := range []time.Duration{time.Second, time.Second} {
			if got := askPod(t, client.host, name+"."); got != "10.96.0.1" || time.Since(begin) != want {
				t.Errorf("unknown to the store: got %s after %v, want the service's after %v", got, time.Since(begin), want)
			}
		}
		arrive()
		if got := askPod(t, client.host, name+"."); got != "10.96.0.1" {
			t.Errorf("not verified: got %s, want the service's", got)
		}
		check.wantAsked(t, 0)

		check.set(nil)
		c, err := client.host.Dial(t.Context(), netip.Addr{}, socksListener)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Write(append(append(bytes.Clone(socksHello), socksNamed(name, 80)...), "hello"...)); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(socksWell)+len("hello"))
		if _, err := io.ReadFull(c, got); err != nil || string(got[len(socksWell):]) != "hello" {
			t.Errorf("by SOCKS5 and name: %q, %v", got, err)
		}
	})
}

// onlyDNS is a proxy that captures nothing (ENABLE_PROXY=false).
func onlyDNS(t *testing.T) func(*Config) {
	return func(c *Config) {
		*c = inboundOnly(*c)
		c.InboundAddr = netip.AddrPort{}
		withDNS(t)(c)
	}
}

// wantNoDNS asserts that nobody holds the ports of the DNS server.
func (l *lone) wantNoDNS() {
	l.t.Helper()
	if b, err := l.network.Host.Bind(l.t.Context(), dnsListener); err != nil {
		l.t.Errorf("TCP: %v", err)
	} else {
		b.Close()
	}
	if pc, err := l.network.Host.ListenPacket(l.t.Context(), dnsListener); err != nil {
		l.t.Errorf("UDP: %v", err)
	} else {
		pc.Close()
	}
}

func TestOnlyDNS(t *testing.T) {
	for _, end := range []string{"drained", "deleted", "drained and deleted"} {
		t.Run(end, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newLone(t, onlyDNS(t))
				if err := errors.Join(l.proxy.Bind(t.Context()), l.proxy.Listen(t.Context())); err != nil {
					t.Fatal(err)
				}
				stop := l.run()
				l.wantFree()
				if got := askPod(t, l.network.Host, "unknown.default.svc.cluster.local."); got != "SERVFAIL" && got != "NXDOMAIN" {
					t.Errorf("it answers %s", got)
				}
				if err := l.proxy.Check(); err != nil {
					t.Error(err)
				}
				l.network.listeners[15053].Close()
				if err := l.proxy.Check(); err == nil || !strings.Contains(err.Error(), "127.0.0.1:15053") {
					t.Errorf("Check without its TCP socket: %v", err)
				}
				begin := time.Now()
				if end != "deleted" {
					l.proxy.Drain()
				}
				if end != "drained" {
					stop()
					if d := time.Since(begin); d != 0 {
						t.Errorf("ended after %v, want at once", d)
					}
				}
				time.Sleep(5 * time.Second)
				l.wantNoDNS()
				stop()
			})
		})
	}
}

// The DNS server's ports come first, and are held as the others: all or none.
func TestBindWithDNS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLone(t, withDNS(t))
		if err := l.proxy.Bind(t.Context()); err != nil {
			t.Fatal(err)
		}
		if want := "[127.0.0.1:15053 [::]:15008 [::]:15006 [::]:15001 127.0.0.1:15080]"; fmt.Sprint(l.network.bound) != want {
			t.Errorf("bound %v, want %v", l.network.bound, want)
		}
		if pc, err := l.network.Host.ListenPacket(t.Context(), dnsListener); err != nil {
			t.Errorf("the UDP port is taken before Listen: %v", err)
		} else {
			pc.Close()
		}
		l.proxy.Drain()
		l.wantFree()
		l.wantNoDNS()

		for _, taken := range []string{"127.0.0.1:15053", "[::]:15001"} {
			for _, open := range []func(*Proxy, context.Context) error{(*Proxy).Bind, (*Proxy).Listen} {
				l := newLone(t, withDNS(t))
				other, err := l.network.Host.Bind(t.Context(), netip.MustParseAddrPort(taken))
				if err != nil {
					t.Fatal(err)
				}
				if err := open(l.proxy, t.Context()); !errors.Is(err, syscall.EADDRINUSE) || !strings.Contains(err.Error(), taken) {
					t.Errorf("%s: got %v, want that it is in use", taken, err)
				}
				other.Close()
				l.wantFree()
				l.wantNoDNS()
			}
		}
	})
}

// A drain may come before the DNS server has begun to run: that is no failure.
func TestDrainOfDNSAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLone(t, withDNS(t))
		if err := l.proxy.Listen(t.Context()); err != nil {
			t.Fatal(err)
		}
		l.proxy.dns.Drain()
		stop := l.run()
		synctest.Wait()
		if err := l.dial(15008); err != nil {
			t.Errorf("the others: %v", err)
		}
		stop()
		l.wantFree()
		l.wantNoDNS()
	})
}
