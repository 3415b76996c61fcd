package dns

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// No bytes that a nameserver sends make the resolver panic, or give an address
// that is none.
func FuzzReply(f *testing.F) {
	q := question{"a.example.", dns.TypeA}
	query, err := q.pack(true)
	if err != nil {
		f.Fatal(err)
	}
	m := new(dns.Msg)
	if err := m.Unpack(query); err != nil {
		f.Fatal(err)
	}
	r := &request{Msg: m}
	for _, records := range [][]string{
		{"a.example. 60 IN A 192.0.2.1"},
		{"a.example. 60 IN CNAME b.example.", "b.example. 60 IN A 192.0.2.1"},
		{"a.example. 60 IN CNAME a.example."},
		{"example. 60 IN SOA a. b. 1 2 3 4 5"},
		{},
	} {
		f.Add(packed(f, r.reply(f, dns.RcodeSuccess, records...)), true)
	}
	loop := append(slices.Clone(query[:headerLen]), query[headerLen:]...)
	loop[2], loop[7] = 0x80, 1
	f.Add(append(loop, 0xc0, byte(len(loop)), 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 1, 2, 3, 4), true)
	f.Add([]byte{}, false)
	f.Fuzz(func(t *testing.T, reply []byte, asked bool) {
		if asked && len(reply) >= len(query) {
			copy(reply[headerLen:], query[headerLen:]) // so that it gets further
			copy(reply, query[:2])
		}
		if checkReply(query, reply) != nil {
			return
		}
		_, _ = rcode(reply), truncated(reply)
		a, err := decode(q, reply)
		if err != nil {
			return
		}
		if len(a.addrs) > maxAddrs || a.links > maxLinks || a.ttl < 0 || a.ttl > maxTTL {
			t.Errorf("beyond the limits: %d addresses, %d links, ttl %v", len(a.addrs), a.links, a.ttl)
		}
		for _, ip := range a.addrs {
			if !ip.Is4() || ip.IsUnspecified() || ip.IsMulticast() {
				t.Errorf("address %v", ip)
			}
		}
	})
}

// Neither file makes the parsers panic or grow beyond their limits.
func FuzzFiles(f *testing.F) {
	f.Add("nameserver 10.0.0.1 # x\nnameserver ::1\nsearch a b. c..d\ndomain e\noptions ndots:99 timeout:0 attempts:-1 rotate use-vc edns0\n127.0.0.1 a b\n")
	f.Fuzz(func(t *testing.T, text string) {
		c := parseResolvConf(text)
		if len(c.nameservers) > maxNameservers || len(c.search) > maxSearch || c.ndots < 0 || c.ndots > maxNdots ||
			c.timeout < time.Second || c.timeout > maxTimeout || c.attempts < 1 || c.attempts > maxAttempts {
			t.Errorf("beyond the limits: %+v", c)
		}
		for _, name := range c.candidates("a.b.", false) {
			if len(name) > maxName+1 || !strings.HasSuffix(name, ".") {
				t.Errorf("candidate %q", name)
			}
		}
		for name, addrs := range parseHosts(text) {
			if got, err := canonical(name); err != nil || got != name || len(addrs) > maxAddrs {
				t.Errorf("%q: %v, %d addresses", name, err, len(addrs))
			}
		}
	})
}
