package state

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"testing"
)

// randomUpdate changes things of a small world, so that names meet again.
func randomUpdate(r *rand.Rand) Update {
	var u Update
	uid := func() string { return fmt.Sprintf("uid-%d", r.IntN(6)) }
	key := func() NamespacedHostname { return host(fmt.Sprintf("ns%d", r.IntN(2)), fmt.Sprintf("h%d", r.IntN(3))) }
	ip := func() netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, byte(r.IntN(4))}) }
	for range r.IntN(4) {
		services := map[NamespacedHostname][]Port{}
		for range r.IntN(3) {
			services[key()] = []Port{{80, uint16(r.IntN(3))}}
		}
		w := Workload{
			UID: uid(), Namespace: "ns0", Protocol: Protocol(r.IntN(2)), NetworkMode: NetworkMode(r.IntN(2)), Health: Health(r.IntN(2)),
			IPs: []netip.Addr{ip(), ip()},
		}
		if r.IntN(3) == 0 {
			w.Hostname = "host"
		}
		u.Workloads = append(u.Workloads, member(w, services))
	}
	for range r.IntN(3) {
		k := key()
		sv := &Service{Namespace: k.Namespace, Hostname: k.Hostname, Ports: []Port{{80, 8080}}, VIPs: []NetworkAddress{{"", ip()}, {"", ip()}}}
		if r.IntN(2) == 0 {
			sv.CIDRVIPs = []CIDRAddress{{"", netip.PrefixFrom(ip(), 24+r.IntN(8))}}
		}
		if r.IntN(2) == 0 {
			sv.LoadBalancer = &LoadBalancer{HealthPolicy: HealthPolicy(r.IntN(2))}
		}
		sv.Visibility, sv.Canonical = Visibility(r.IntN(2)), r.IntN(2) == 0
		u.Services = append(u.Services, sv)
	}
	if r.IntN(3) == 0 {
		u.Stale = append(u.Stale, uid(), key().String())
	}
	if r.IntN(2) == 0 {
		u.Removed = append(u.Removed, uid(), key().String())
	}
	for range r.IntN(2) {
		u.Policies = append(u.Policies, &Policy{Name: fmt.Sprintf("p%d", r.IntN(4)), Namespace: "ns0", Scope: PolicyScope(r.IntN(3)), Action: Action(r.IntN(2))})
	}
	if r.IntN(4) == 0 {
		u.RemovedPolicies = append(u.RemovedPolicies, fmt.Sprintf("ns0/p%d", r.IntN(4)))
	}
	return u
}

// membership checks that services have endpoints exactly of workloads that are
// known, list them and pass the health policy, or lost them for their health.
func (s *Store) membership(t *testing.T) {
	t.Helper()
	for key, sv := range s.now().services {
		for _, ep := range sv.Endpoints {
			w := s.now().workloads[ep.WorkloadUID]
			if w == nil || !sv.keeps(ep.Health) || w.Health != ep.Health {
				t.Fatalf("%s has the endpoint %+v of %+v", key, ep, w)
			}
		}
	}
	for key, eps := range s.now().staged {
		for _, ep := range eps {
			if s.now().workloads[ep.WorkloadUID] == nil {
				t.Fatalf("an endpoint of the unknown workload %s is staged for %s", ep.WorkloadUID, key)
			}
		}
	}
}

func TestRandomUpdatesKeepIndexesConsistent(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 2))
		s := New(Config{})
		for range 30 {
			apply(t, s, randomUpdate(r))
			s.consistent(t)
			s.membership(t)
			if t.Failed() {
				t.Fatalf("seed %d", seed)
			}
		}
	}
}

// Readers and writers at once; the race detector is the judge, and what readers
// hold must not change under them.
func TestConcurrentUse(t *testing.T) {
	s := New(Config{})
	apply(t, s, randomUpdate(rand.New(rand.NewPCG(0, 0))))
	var wg sync.WaitGroup
	for i := range uint64(2) {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(i, 3))
			for n := range 200 {
				u := randomUpdate(r)
				err := s.Apply(u)
				if n%50 == 49 {
					err = s.Replace(randomUpdate(r))
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for i := range uint64(2) {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(i, 4))
			src := &Workload{Namespace: "ns0", Name: "source"}
			for range 500 {
				changed := s.Changed()
				dst := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(r.IntN(4))}), 80)
				route, err := s.Route(Query{Source: src, Dst: dst})
				if err == nil && !route.NextHop.IsValid() {
					t.Errorf("a route to nowhere: %+v", route)
				}
				if route.Workload != nil {
					conn := Conn{Src: dst, Dst: dst, Destination: route.Workload, Identity: route.Workload.Identity}
					if v := s.Authorize(conn); v.Events == nil {
						t.Errorf("a verdict without outcome: %+v", v)
					}
					if _, err := s.Inbound(InboundQuery{Local: route.Workload, ConnDst: dst, Addr: dst}); err != nil {
						t.Error(err)
					}
				}
				if r.IntN(50) == 0 {
					_ = encode(t, s.Dump())
				}
				_ = isClosed(changed)
			}
		})
	}
	wg.Wait()
	s.consistent(t)
}

// Whoever is told of a change finds it.
func TestChangedComesAfterTheChange(t *testing.T) {
	s := New(Config{})
	version := uint32(0)
	var announces sync.Map // the channel of Changed → the version of which it tells
	next := func() Update {
		version++
		announces.Store(s.Changed(), version)
		return Update{Workloads: []WorkloadUpdate{member(Workload{UID: "w", Capacity: version}, nil)}}
	}
	apply(t, s, next())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 300 {
			changed := s.Changed()
			for !isClosed(changed) { // sees it sooner than one who sleeps
			}
			want, ok := announces.Load(changed)
			if after, _ := s.WorkloadByUID("w"); !ok || after.Capacity < want.(uint32) {
				t.Errorf("told of version %v, found %d", want, after.Capacity)
				return
			}
		}
	}()
	for !isClosed(done) {
		if version%2 == 0 {
			apply(t, s, next())
		} else if err := s.Replace(next()); err != nil {
			t.Error(err)
		}
	}
}
