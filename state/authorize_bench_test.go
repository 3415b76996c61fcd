package state

import (
	"fmt"
	"maps"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"
)

// crowdOfDenies are policies of ten rules each, none of which matches benchConn:
// exact principals, namespaces and source ranges, by turns.
func crowdOfDenies(n int) []*Policy {
	policies := make([]*Policy, n)
	for i := range policies {
		p := &Policy{Name: fmt.Sprintf("deny-%05d", i), Namespace: "root", Scope: PolicyGlobal, Action: Deny}
		for r := range 10 {
			m := Match{DestinationPorts: []uint16{80, 443}}
			switch r % 3 {
			case 0:
				m.Principals = []StringMatch{{Exact, fmt.Sprintf("td/ns/bad-%d/sa/bad-%d", i, r)}}
			case 1:
				m.Namespaces = []StringMatch{{Exact, fmt.Sprintf("bad-%d-%d", i, r)}}
			case 2:
				m.SourceIPs = []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{172, byte(i >> 8), byte(i), byte(r << 4)}), 28)}
			}
			p.Rules = append(p.Rules, Rule{{m}})
		}
		policies[i] = p
	}
	return policies
}

func benchConn(tb testing.TB) Conn {
	return Conn{
		Src: addrPort("10.0.0.1:1"), Dst: addrPort("10.0.0.2:80"),
		Destination: destination("ns"), Identity: spiffe(tb, "spiffe://td/ns/good/sa/good"),
	}
}

// The bound of the issue: an Authorize that no policy matches is at least that many
// times faster than a scan.
const scanRatio = 20

func BenchmarkAuthorizeAgainstScan(b *testing.B) {
	s := New(Config{DefaultTrustDomain: "td"})
	apply(b, s, Update{Policies: crowdOfDenies(10_000)})
	t := s.read()
	sc := newScanner(s, slices.Collect(maps.Values(t.policies)))
	s.release(t)
	c := benchConn(b)
	const rounds, perRound = 15, 1000
	var ratios []float64
	var scan, indexed time.Duration
	for b.Loop() {
		for range rounds {
			begin := time.Now()
			if sc.authorize(c).Denied != nil {
				b.Fatal("denied by the scan")
			}
			oneScan := time.Since(begin)
			begin = time.Now()
			for range perRound {
				if s.Authorize(c).Denied != nil {
					b.Fatal("denied")
				}
			}
			one := time.Since(begin) / perRound
			scan, indexed = scan+oneScan, indexed+one
			ratios = append(ratios, float64(oneScan)/float64(max(one, 1)))
		}
	}
	slices.Sort(ratios)
	ratio := ratios[len(ratios)/2]
	n := float64(len(ratios))
	b.ReportMetric(float64(scan)/n, "scan-ns")
	b.ReportMetric(float64(indexed)/n, "authorize-ns")
	b.ReportMetric(ratio, "times-faster")
	if ratio < scanRatio {
		b.Fatalf("%.1f times faster than the scan, want %d", ratio, scanRatio)
	}
}

// What one changed policy of 10 000 costs, and how long readers may wait for it.
func BenchmarkApplyOnePolicy(b *testing.B) {
	s := New(Config{DefaultTrustDomain: "td"})
	policies := crowdOfDenies(10_000)
	apply(b, s, Update{Policies: policies})
	b.ReportAllocs()
	n := 0
	for b.Loop() {
		p := *policies[n*7919%len(policies)]
		p.Rules = slices.Clone(p.Rules)
		p.Rules[0] = Rule{{{Principals: []StringMatch{{Exact, fmt.Sprintf("td/ns/other-%d/sa/x", n)}}}}}
		apply(b, s, Update{Policies: []*Policy{&p}})
		n++
	}
}

func BenchmarkApplyAllPolicies(b *testing.B) {
	policies := crowdOfDenies(10_000)
	for name, known := range map[string]bool{"first": false, "unchanged": true} {
		b.Run(name, func(b *testing.B) {
			s := New(Config{DefaultTrustDomain: "td"})
			b.ReportAllocs()
			for b.Loop() {
				if !known {
					s = New(Config{DefaultTrustDomain: "td"})
				}
				apply(b, s, Update{Policies: policies})
			}
		})
	}
}

// BenchmarkRuleMemory reports what the index adds to a policy, by rule.
func BenchmarkRuleMemory(b *testing.B) {
	heap := func() float64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return float64(m.HeapAlloc)
	}
	const rules = 10 * 10_000
	for b.Loop() {
		in := crowdOfDenies(rules / 10)
		empty := heap()
		list := make([]*policy, len(in))
		for i := range in {
			list[i], _ = newPolicy(in[i])
		}
		stored := heap()
		index := (*ruleIndex)(nil).with(nil, list)
		indexed := heap()
		b.ReportMetric((stored-empty)/rules, "policy-B/rule")
		b.ReportMetric((indexed-stored)/rules, "index-B/rule")
		runtime.KeepAlive(in)
		runtime.KeepAlive(index)
	}
}

// An ordinary verdict costs no allocation, whatever decides it.
func TestAuthorizeDoesNotAllocate(t *testing.T) {
	exact := func(name string, action Action, ns string) *Policy {
		return &Policy{Name: name, Namespace: "root", Action: action, Rules: []Rule{{{{Principals: []StringMatch{{Exact, "td/ns/" + ns + "/sa/good"}}}}}}}
	}
	selector := exact("named", Deny, "good")
	selector.Scope = PolicySelector
	dry := exact("dry", Deny, "good")
	dry.DryRun = true
	for name, tt := range map[string]struct {
		policies []*Policy
		named    []string
		denied   bool
	}{
		"no policies":    {nil, nil, false},
		"denied":         {[]*Policy{exact("p", Deny, "good")}, nil, true},
		"allowed":        {[]*Policy{exact("p", Allow, "good")}, nil, false},
		"dry run":        {[]*Policy{dry, exact("p", Deny, "bad"), exact("q", Allow, "bad")}, nil, true},
		"denied by name": {[]*Policy{selector}, []string{"root/named"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			s := New(Config{DefaultTrustDomain: "td", TrustDomainAliases: []string{"old"}})
			apply(t, s, Update{Policies: append(crowdOfDenies(100), tt.policies...)})
			c := benchConn(t)
			c.Destination.AuthorizationPolicies = tt.named
			if name == "dry run" {
				// What follows the match in the log needs a list of its own.
				apply(t, s, Update{RemovedPolicies: []string{"root/q", "root/p"}, Policies: []*Policy{exact("r", Deny, "good")}})
			}
			if got := s.Authorize(c).Denied != nil; got != tt.denied {
				t.Fatalf("denied %v, want %v", got, tt.denied)
			}
			want := 0.0
			if name == "dry run" {
				want = 1
			}
			if n := testing.AllocsPerRun(100, func() { s.Authorize(c) }); n > want {
				t.Errorf("%v allocations, want at most %v", n, want)
			}
		})
	}
}
