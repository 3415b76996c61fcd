package main

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/miekg/dns"
)

// reflectNames serves directDNS: <ip>.reflect.internal. is that IP, TTL 5, and no
// other name exists. It returns how many questions came.
func (d *direct) reflectNames() *atomic.Int64 {
	d.t.Helper()
	pc, err := d.fabric.Host(directDNS.Addr()).App().ListenPacket(d.ctx, directDNS)
	if err != nil {
		d.t.Fatal(err)
	}
	var questions atomic.Int64
	var serving sync.WaitGroup
	serving.Go(func() {
		for buf := make([]byte, 4096); ; {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			questions.Add(1)
			m := new(dns.Msg)
			if err := m.Unpack(buf[:n]); err != nil || len(m.Question) != 1 {
				d.t.Errorf("bad query %x: %v", buf[:n], err)
				continue
			}
			q, code, answer := m.Question[0], dns.RcodeNameError, []dns.RR(nil)
			if text, ok := strings.CutSuffix(q.Name, ".reflect.internal."); ok {
				code = dns.RcodeSuccess
				if ip, err := netip.ParseAddr(text); err == nil && q.Qtype == dns.TypeA {
					answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Name, Rrtype: q.Qtype, Class: q.Qclass, Ttl: 5}, A: ip.AsSlice()}}
				}
			}
			m.SetRcode(m, code).Answer = answer
			if len(answer) == 0 { // an absence, for 5 s
				m.Ns = []dns.RR{&dns.SOA{Hdr: dns.RR_Header{Name: "internal.", Rrtype: dns.TypeSOA, Class: q.Qclass, Ttl: 5}, Ns: ".", Mbox: ".", Minttl: 5}}
			}
			reply, err := m.Pack()
			if err != nil {
				d.t.Error(err)
				continue
			}
			_, _ = pc.WriteTo(reply, from)
		}
	})
	d.t.Cleanup(func() { pc.Close(); serving.Wait() })
	return &questions
}

// TestST_INT03_OnDemandDNS: the endpoint of a VIP has a host name and no address.
// Each of two requests counts, also the one that asks no nameserver any more.
func TestST_INT03_OnDemandDNS(t *testing.T) {
	world := filepath.Join(t.TempDir(), "world.yaml")
	text := strings.Replace(fmt.Sprintf(directWorld, "local"), "services:\n- {name: local-vip", `- uid: u/tcp-via-dns
  name: tcp-via-dns
  namespace: default
  serviceAccount: default
  workloadIps: []
  hostname: 10.1.0.4.reflect.internal.
  protocol: TCP
  node: remote
  services: {default/dns-vip.default.svc.cluster.local: {80: 8080}}
services:
- {name: dns-vip, namespace: default, hostname: dns-vip.default.svc.cluster.local, vips: [/10.96.0.2], ports: {80: 8080}}
- {name: local-vip`, 1)
	if err := os.WriteFile(world, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	d := startDirect(t, "local", "LOCAL_XDS_PATH="+world)
	questions := d.reflectNames()
	for range 2 {
		if err := d.open(netip.MustParseAddrPort("10.96.0.2:80")).Close(); err != nil {
			t.Error(err)
		}
	}
	if n := questions.Load(); n != 2 {
		t.Errorf("%d questions, want one for each family", n)
	}
	if n := d.client.sample(t, "istio_on_demand_dns_total", `hostname="10.1.0.4.reflect.internal."`); n != 2 {
		t.Errorf("istio_on_demand_dns_total = %v, want 2", n)
	}
	if _, body := get(t, "http://"+d.client.statsAddr()+"/metrics"); strings.Count(body, "istio_on_demand_dns_total{") != 1 {
		t.Errorf("want one series; got:\n%s", body)
	}
}
