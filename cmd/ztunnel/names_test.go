package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// ask sends one query for the address of a name to the DNS proxy of the pod with
// address of.
func (d *direct) ask(of netip.Addr, name string) (*dns.Msg, error) {
	pc, err := d.fabric.Host(of).App().ListenPacket(d.ctx, netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		return nil, err
	}
	defer pc.Close()
	if err := pc.SetDeadline(time.Now().Add(directPatience)); err != nil {
		return nil, err
	}
	q := new(dns.Msg).SetQuestion(name, dns.TypeA)
	b, err := q.Pack()
	if err != nil {
		return nil, err
	}
	if _, err := pc.WriteTo(b, net.UDPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:15053"))); err != nil {
		return nil, err
	}
	buf := make([]byte, 4096)
	n, _, err := pc.ReadFrom(buf)
	if err != nil {
		return nil, err
	}
	m := new(dns.Msg)
	if err := m.Unpack(buf[:n]); err != nil {
		return nil, err
	}
	if m.Id != q.Id {
		return nil, errors.New("the answer to another query")
	}
	return m, nil
}

// wantAddress checks that m is one address.
func wantAddress(t *testing.T, m *dns.Msg, err error, want string) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Answer) == 0 {
		t.Fatalf("no answer in %v", m)
	}
	a, ok := m.Answer[len(m.Answer)-1].(*dns.A)
	if !ok || a.A.String() != want {
		t.Errorf("got %v, want %s", m.Answer, want)
	}
}

// TestST_INT04_DNSMetrics: one query that is passed on counts once.
func TestST_INT04_DNSMetrics(t *testing.T) {
	d := startDirect(t, "local")
	d.reflectNames()
	m, err := d.ask(directClient, "10.1.0.4.reflect.internal.")
	wantAddress(t, m, err, "10.1.0.4")
	d.eventually(func() error {
		for _, name := range []string{"istio_dns_requests_total", "istio_dns_upstream_requests_total"} {
			if n := d.client.sample(t, name, `request_query_type="a"`, `request_protocol="udp"`); n != 1 {
				return fmt.Errorf("%s = %v, want 1", name, n)
			}
		}
		return nil
	})
}

// Each pod has a DNS proxy of its own, which knows the mesh's names as that pod
// says them, and SOCKS5 that uses it. Both end with the pod.
func TestShared_Names(t *testing.T) {
	s, agent := startShared(t, "UNSTABLE_ENABLE_SOCKS5=true")
	s.reflectNames()
	for _, name := range []string{"local-vip.default.svc.cluster.local.", "local-vip.default."} {
		m, err := s.ask(directClient, name)
		wantAddress(t, m, err, directVIP.Addr().String())
	}
	// Its search domains are those of a pod of its namespace, whatever ours are.
	m, err := s.ask(directClient, "ext.example.default.svc.cluster.local.")
	wantAddress(t, m, err, "10.96.0.3")
	m, err = s.ask(directHBONE.Addr(), "10.1.0.4.reflect.internal.")
	wantAddress(t, m, err, "10.1.0.4")
	c := s.openSOCKS(3, append([]byte{9}, "local-vip"...), directVIP.Port())
	agent.tell(delPod("local"), nil)
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("a connection outlived its pod")
	}
	s.eventually(func() error {
		if _, err := s.dial(directSOCKS); err == nil {
			return errors.New("SOCKS5 outlives its pod")
		}
		return nil
	})
}

// ENABLE_PROXY=false: the DNS proxy alone, in both modes.
func TestDNSAlone(t *testing.T) {
	t.Run("dedicated", func(t *testing.T) {
		d := startDirect(t, "local", "ENABLE_PROXY=false")
		m, err := d.ask(directClient, "local-vip.default.")
		wantAddress(t, m, err, directVIP.Addr().String())
		if _, err := d.dial(directTCP); err == nil {
			t.Error("connections are taken")
		}
	})
	t.Run("shared", func(t *testing.T) {
		s, _ := startShared(t, "ENABLE_PROXY=false", "POD_NAME=ztunnel-x", "POD_NAMESPACE=istio-system", "SERVICE_ACCOUNT=ztunnel")
		m, err := s.ask(directClient, "local-vip.default.")
		wantAddress(t, m, err, directVIP.Addr().String())
		if _, err := s.dial(directTCP); err == nil {
			t.Error("connections are taken")
		}
		if logs := s.node.logs.String(); strings.Contains(logs, "Task 'proxy'") || !strings.Contains(logs, "Task 'dns proxy' complete") {
			t.Error("readiness waits for a proxy")
		}
	})
}
