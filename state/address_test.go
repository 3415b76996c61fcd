package state

import (
	"net/netip"
	"reflect"
	"strings"
	"testing"
)

// mappable are the fields that hold an address, each with an update that has it
// there and a reader of what the store made of it.
var mappable = map[string]struct {
	update func(netip.Addr) Update
	stored func(*Store) netip.Addr
}{
	"workload IP": {
		func(a netip.Addr) Update { return oneWorkload(Workload{IPs: []netip.Addr{addr("fd00::1"), a}}) },
		func(s *Store) netip.Addr { return s.now().workloads["w"].IPs[1] },
	},
	"workload waypoint": {
		func(a netip.Addr) Update { return oneWorkload(Workload{Waypoint: gateway(a)}) },
		func(s *Store) netip.Addr { return s.now().workloads["w"].Waypoint.Address.Addr },
	},
	"network gateway": {
		func(a netip.Addr) Update { return oneWorkload(Workload{NetworkGateway: gateway(a)}) },
		func(s *Store) netip.Addr { return s.now().workloads["w"].NetworkGateway.Address.Addr },
	},
	"VIP": {
		func(a netip.Addr) Update {
			return oneService(Service{VIPs: []NetworkAddress{{"", addr("fd00::1")}, {"", a}}})
		},
		func(s *Store) netip.Addr { return s.now().services[exampleKey].VIPs[1].Addr },
	},
	"service waypoint": {
		func(a netip.Addr) Update { return oneService(Service{Waypoint: gateway(a)}) },
		func(s *Store) netip.Addr { return s.now().services[exampleKey].Waypoint.Address.Addr },
	},
	"weighted waypoint": {
		func(a netip.Addr) Update {
			return oneService(Service{WeightedWaypoints: []WeightedWaypoint{{*gateway(a), 1}}})
		},
		func(s *Store) netip.Addr {
			return s.now().services[exampleKey].WeightedWaypoints[0].Destination.Address.Addr
		},
	},
}

// ranges are the fields that hold a range of addresses.
var ranges = map[string]struct {
	update func(netip.Prefix) Update
	stored func(*Store) netip.Prefix
}{
	"CIDR VIP": {
		func(p netip.Prefix) Update { return oneService(Service{CIDRVIPs: []CIDRAddress{{"", p}}}) },
		func(s *Store) netip.Prefix { return s.now().services[exampleKey].CIDRVIPs[0].Prefix },
	},
	"source": {
		func(p netip.Prefix) Update { return onePolicy(Match{SourceIPs: []netip.Prefix{p}}) },
		func(s *Store) netip.Prefix { return s.match().SourceIPs[0] },
	},
	"not source": {
		func(p netip.Prefix) Update { return onePolicy(Match{NotSourceIPs: []netip.Prefix{p}}) },
		func(s *Store) netip.Prefix { return s.match().NotSourceIPs[0] },
	},
	"destination": {
		func(p netip.Prefix) Update { return onePolicy(Match{DestinationIPs: []netip.Prefix{p}}) },
		func(s *Store) netip.Prefix { return s.match().DestinationIPs[0] },
	},
	"not destination": {
		func(p netip.Prefix) Update { return onePolicy(Match{NotDestinationIPs: []netip.Prefix{p}}) },
		func(s *Store) netip.Prefix { return s.match().NotDestinationIPs[0] },
	},
}

func gateway(a netip.Addr) *GatewayAddress {
	return &GatewayAddress{Address: NetworkAddress{Addr: a}, Port: 15008}
}

func oneWorkload(w Workload) Update {
	w.UID = "w"
	return Update{Workloads: []WorkloadUpdate{member(w, nil)}}
}

func oneService(s Service) Update {
	s.Namespace, s.Hostname = exampleKey.Namespace, exampleKey.Hostname
	return Update{Services: []*Service{&s}}
}

func onePolicy(m Match) Update {
	return Update{Policies: []*Policy{{Name: "p", Namespace: "ns", Action: Deny, Rules: []Rule{{{m}}}}}}
}

func (s *Store) match() *Match { return &s.now().policies["ns/p"].Rules[0][0][0] }

func TestMappedAddresses(t *testing.T) {
	for name, field := range mappable {
		t.Run(name, func(t *testing.T) {
			for in, want := range map[string]string{
				"::ffff:10.0.0.5": "10.0.0.5", "10.0.0.5": "10.0.0.5", "fd00::5": "fd00::5", "::": "::", "::10.0.0.5": "::a00:5",
			} {
				s := New(Config{})
				u := field.update(addr(in))
				apply(t, s, u)
				if got := field.stored(s); got != addr(want) {
					t.Errorf("%s: stored as %v, want %s", in, got, want)
				}
				if !reflect.DeepEqual(u, field.update(addr(in))) {
					t.Errorf("%s: the update was modified: %+v", in, u)
				}
				s.consistent(t)
			}
			for _, in := range []string{"fe80::1%eth0", "::ffff:10.0.0.5%eth0"} {
				err := New(Config{}).Apply(field.update(addr(in)))
				if err == nil || !strings.Contains(err.Error(), "without a zone") || !strings.Contains(err.Error(), "%eth0") {
					t.Errorf("%s: got error %v", in, err)
				}
			}
		})
	}
}

func TestMappedRanges(t *testing.T) {
	for name, field := range ranges {
		t.Run(name, func(t *testing.T) {
			for in, want := range map[string]string{
				"::ffff:10.0.0.5/128": "10.0.0.5/32", "::ffff:10.0.0.5/104": "10.0.0.5/8", "::ffff:0.0.0.0/96": "0.0.0.0/0",
				"10.0.0.0/8": "10.0.0.0/8", "fd00::/8": "fd00::/8", "::/0": "::/0",
			} {
				s := New(Config{})
				u := field.update(netip.MustParsePrefix(in))
				apply(t, s, u)
				if got := field.stored(s); got != netip.MustParsePrefix(want) {
					t.Errorf("%s: stored as %v, want %s", in, got, want)
				}
				if !reflect.DeepEqual(u, field.update(netip.MustParsePrefix(in))) {
					t.Errorf("%s: the update was modified: %+v", in, u)
				}
				s.consistent(t)
			}
			for in, want := range map[netip.Prefix]string{
				netip.MustParsePrefix("::ffff:10.0.0.0/95"):    "::ffff:10.0.0.0/95: want a length of at least 96",
				netip.MustParsePrefix("::ffff:0.0.0.0/0"):      "want a length of at least 96",
				netip.PrefixFrom(addr("10.0.0.0"), 33):         "too long",
				netip.PrefixFrom(addr("::ffff:10.0.0.0"), 129): "too long",
				{}: "invalid cidr",
			} {
				if err := New(Config{}).Apply(field.update(in)); err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("%v: got error %v, want %q", in, err, want)
				}
			}
		})
	}
}

// Both forms of an address meet, whichever of them the store was told and asked.
func TestMappedQueries(t *testing.T) {
	for _, stored := range []string{"10.0.0.", "::ffff:10.0.0."} {
		s := New(Config{})
		apply(t, s, Update{
			Workloads: []WorkloadUpdate{
				member(Workload{UID: "a", Name: "a", Protocol: HBONE, IPs: ips(stored + "5")}, map[NamespacedHostname][]Port{exampleKey: nil}),
				source(),
			},
			Services: []*Service{example(func(sv *Service) { sv.VIPs = []NetworkAddress{{"", addr(stored + "80")}} })},
			Policies: onePolicy(Match{SourceIPs: []netip.Prefix{netip.PrefixFrom(addr(stored+"6"), addr(stored+"6").BitLen())}}).Policies,
		})
		for _, asked := range []string{"10.0.0.", "::ffff:10.0.0."} {
			name := stored + "x, asked " + asked + "x"
			at := func(host string, port uint16) netip.AddrPort { return netip.AddrPortFrom(addr(asked+host), port) }
			if uid := s.uidAt("", asked+"5"); uid != "a" {
				t.Errorf("%s: Workload: %q", name, uid)
			}
			w, _ := s.WorkloadByUID("a")
			for _, host := range []string{"5", "80"} {
				r, err := s.Route(Query{Source: w, Dst: at(host, 80)})
				if err != nil || r.Rule != "F" || r.NextHop != addrPort("10.0.0.5:15008") || !strings.HasPrefix(r.Authority.String(), "10.0.0.5:") {
					t.Errorf("%s: Route to .%s: %+v, %v", name, host, r, err)
				}
			}
			in, err := s.Inbound(InboundQuery{Local: w, ConnDst: addrPort("10.0.0.5:15008"), Addr: at("5", 80)})
			if err != nil || in.Upstream != addrPort("10.0.0.5:80") {
				t.Errorf("%s: Inbound: %+v, %v", name, in, err)
			}
			in, err = s.Inbound(InboundQuery{Local: w, ConnDst: at("5", 15008), Addr: addrPort("10.0.0.5:80")})
			if err != nil || in.Upstream != addrPort("10.0.0.5:80") {
				t.Errorf("%s: Inbound at a mapped address: %+v, %v", name, in, err)
			}
			if v := s.Authorize(Conn{Src: at("6", 1), Dst: at("5", 80), Destination: w}); v.Denied == nil {
				t.Errorf("%s: the DENY policy did not match", name)
			}
			if v := s.Authorize(Conn{Src: at("7", 1), Dst: at("5", 80), Destination: w}); v.Denied != nil {
				t.Errorf("%s: denied: %v", name, v.Denied)
			}
		}
	}
}
