package state

import (
	"errors"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// onDemandWorld is a control plane that sends what it is asked for, and no more.
type onDemandWorld struct {
	t         *testing.T
	s         *Store
	workloads []WorkloadUpdate
	services  []*Service
	rounds    [][]string
}

func newOnDemandWorld(t *testing.T, services []*Service, workloads ...WorkloadUpdate) *onDemandWorld {
	w := &onDemandWorld{t: t, s: New(Config{OnDemand: true}), workloads: workloads, services: services}
	apply(t, w.s, Update{Workloads: []WorkloadUpdate{source()}})
	return w
}

// send applies what a key stands for.
func (w *onDemandWorld) send(key string) {
	var u Update
	for _, wl := range w.workloads {
		match := wl.Workload.UID == key || host(wl.Workload.Namespace, wl.Workload.Hostname).String() == key
		for _, ip := range wl.Workload.IPs {
			match = match || wl.Workload.NetworkMode != HostNetwork && NetworkAddress{wl.Workload.Network, ip}.String() == key
		}
		if match {
			u.Workloads = append(u.Workloads, wl)
		}
	}
	for _, svc := range w.services {
		match := svc.Key().String() == key
		for _, vip := range svc.VIPs {
			match = match || vip.String() == key
		}
		if match {
			u.Services = append(u.Services, svc)
		}
	}
	apply(w.t, w.s, u)
}

// ask runs a decision, and demands what it lacks, until it is taken.
func (w *onDemandWorld) ask(decide func(asked []string) error) error {
	w.t.Helper()
	var asked []string
	w.rounds = nil
	for range 10 {
		err := decide(asked)
		var miss *Miss
		if !errors.As(err, &miss) {
			return err
		}
		if len(miss.Keys) == 0 {
			w.t.Fatal("a miss of nothing")
		}
		w.rounds = append(w.rounds, miss.Keys)
		for _, key := range miss.Keys {
			if slices.Contains(asked, key) {
				w.t.Fatalf("%s is demanded twice", key)
			}
			w.send(key)
		}
		asked = append(asked, miss.Keys...)
	}
	w.t.Fatalf("no decision after %v", w.rounds)
	return nil
}

func (w *onDemandWorld) route(dst string) (r Route, err error) {
	src, _ := w.s.WorkloadByUID("c//Pod/ns/source-workload")
	err = w.ask(func(asked []string) (err error) {
		q := Query{Source: src, SourceIP: addr("127.0.0.1"), Dst: addrPort(dst), Asked: asked, Draw: func(uint64) uint64 { return 0 }}
		r, err = w.s.Route(q)
		agrees(w.t, w.s.Explain(q), r, err)
		if e := w.s.Explain(q); (len(e.Missing) > 0) != errors.As(err, new(*Miss)) {
			w.t.Errorf("missing keys %q of error %v", e.Missing, err)
		}
		return err
	})
	return r, err
}

func (w *onDemandWorld) asked(want ...[]string) {
	w.t.Helper()
	if diff := cmp.Diff(want, w.rounds); diff != "" {
		w.t.Errorf("demanded (-want +got):\n%s", diff)
	}
}

// A connection needs what its decision needs, in as few rounds as can be.
func TestOnDemandRoute(t *testing.T) {
	inWay := map[NamespacedHostname][]Port{host("ns", "way.example"): nil}
	wayService := func() *Service {
		return &Service{Name: "way", Namespace: "ns", Hostname: "way.example", Ports: []Port{{15008, 15008}},
			SubjectAltNames: []string{"spiffe://cluster.local/ns/ns/sa/way-san"}, Endpoints: []Endpoint{{WorkloadUID: obWaypoint.UID}}}
	}
	withEndpoint := func(uid string, mods ...func(*Service)) *Service {
		svc := example(mods...)
		svc.Endpoints = []Endpoint{{WorkloadUID: uid}}
		return svc
	}
	t.Run("unknown address", func(t *testing.T) {
		w := newOnDemandWorld(t, nil)
		if r, err := w.route("1.2.3.4:80"); err != nil || r.Rule != "C" {
			t.Errorf("got %+v, %v", r, err)
		}
		w.asked([]string{"/1.2.3.4"})
	})
	t.Run("workload", func(t *testing.T) {
		w := newOnDemandWorld(t, nil, member(obLocal, nil))
		if r, err := w.route("127.0.0.2:80"); err != nil || r.Rule != "F" {
			t.Errorf("got %+v, %v", r, err)
		}
		w.asked([]string{"/127.0.0.2"})
		if _, err := w.route("127.0.0.2:80"); err != nil || len(w.rounds) != 0 {
			t.Errorf("the second time: %v, %v", w.rounds, err)
		}
	})
	t.Run("service", func(t *testing.T) {
		w := newOnDemandWorld(t, []*Service{withEndpoint(obLocal.UID)}, inExample(obLocal))
		if r, err := w.route("127.0.0.3:80"); err != nil || r.Rule != "F" {
			t.Errorf("got %+v, %v", r, err)
		}
		w.asked([]string{"/127.0.0.3"}, []string{obLocal.UID})
	})
	t.Run("service whose endpoint is gone", func(t *testing.T) {
		w := newOnDemandWorld(t, []*Service{withEndpoint("gone")})
		if _, err := w.route("127.0.0.3:80"); !errors.Is(err, ErrNoHealthyUpstream) {
			t.Errorf("got %v", err)
		}
		w.asked([]string{"/127.0.0.3"}, []string{"gone"})
	})
	t.Run("waypoint in another network, behind a gateway", func(t *testing.T) {
		far := but(obWaypoint, behind(inRemote(gw("10.22.1.1", 15009))), func(w *Workload) { w.Network = "remote" })
		w := newOnDemandWorld(t, []*Service{example(via(byHost("way.example", 15008))), wayService()}, member(far, inWay), member(obGateway, nil))
		if r, err := w.route("127.0.0.3:80"); err != nil || r.Rule != "A1" {
			t.Errorf("got %+v, %v", r, err)
		}
		w.asked([]string{"/127.0.0.3"}, []string{"ns/way.example"}, []string{obWaypoint.UID}, []string{"remote/10.22.1.1"})
	})
	t.Run("weighted waypoints", func(t *testing.T) {
		set := weights(WeightedWaypoint{*byHost("way.example", 15008), 1}, WeightedWaypoint{*gw("127.0.0.11", 15008), 1}, WeightedWaypoint{*gw("127.0.0.12", 15008), 0})
		w := newOnDemandWorld(t, []*Service{example(set), wayService()}, member(obWaypoint, inWay), member(obDualWay, nil))
		if r, err := w.route("127.0.0.3:80"); err != nil || r.Rule != "A2" {
			t.Errorf("got %+v, %v", r, err)
		}
		if diff := cmp.Diff([]string{"ns/way.example", "/127.0.0.11"}, w.rounds[1]); diff != "" {
			t.Errorf("second round (-want +got):\n%s", diff)
		}
	})
	t.Run("workload with a waypoint that there is not", func(t *testing.T) {
		w := newOnDemandWorld(t, nil, member(but(obLocal, waypointed(byHost("way.example", 15008))), nil))
		if _, err := w.route("127.0.0.2:80"); !errors.Is(err, ErrUnknownWaypoint) {
			t.Errorf("got %v", err)
		}
		w.asked([]string{"/127.0.0.2"}, []string{"ns/way.example"})
	})
	t.Run("hostname of a workload as waypoint", func(t *testing.T) {
		w := newOnDemandWorld(t, []*Service{example(via(byHost("way.host", 15008)))}, member(but(obWaypoint, func(w *Workload) { w.Hostname = "way.host" }), nil))
		if r, err := w.route("127.0.0.3:80"); err != nil || r.Rule != "A2" {
			t.Errorf("got %+v, %v", r, err)
		}
		w.asked([]string{"/127.0.0.3"}, []string{"ns/way.host"})
	})
	// A range that is known must not hide the service of the address itself, and its waypoint.
	t.Run("address in a known range", func(t *testing.T) {
		near := example(via(gw("127.0.0.10", 15008)))
		wide := &Service{Name: "wide", Namespace: "ns", Hostname: "wide.example", Ports: []Port{{80, 80}}}
		cidrs("127.0.0.0/29")(wide)
		w := newOnDemandWorld(t, []*Service{near}, member(obWaypoint, nil))
		apply(t, w.s, Update{Services: []*Service{wide}})
		if r, err := w.route("127.0.0.3:80"); err != nil || r.Rule != "A2" {
			t.Errorf("got %+v, %v", r, err)
		}
		w.asked([]string{"/127.0.0.3"}, []string{"/127.0.0.10"})
	})
	t.Run("our network and that of the source", func(t *testing.T) {
		s := New(Config{OnDemand: true, Network: "ours"})
		_, err := s.Route(Query{Source: &Workload{Network: "theirs"}, Dst: addrPort("10.0.0.1:80")})
		var miss *Miss
		if !errors.As(err, &miss) || !slices.Equal(miss.Keys, []string{"ours/10.0.0.1", "theirs/10.0.0.1"}) {
			t.Errorf("got %v", err)
		}
		if err == nil || err.Error() != "not known yet: ours/10.0.0.1, theirs/10.0.0.1" {
			t.Errorf("text %v", err)
		}
	})
	t.Run("a service of many endpoints", func(t *testing.T) {
		svc := example()
		for i := range 3 * maxDemand {
			svc.Endpoints = append(svc.Endpoints, Endpoint{WorkloadUID: string(rune('a' + i))})
		}
		w := newOnDemandWorld(t, []*Service{svc})
		if _, err := w.route("127.0.0.3:80"); !errors.Is(err, ErrNoHealthyUpstream) {
			t.Errorf("got %v", err)
		}
		for _, keys := range w.rounds {
			if len(keys) > maxDemand {
				t.Errorf("%d keys at once", len(keys))
			}
		}
	})
}

func TestOnDemandInbound(t *testing.T) {
	waypoint := member(obWaypoint, map[NamespacedHostname][]Port{host("ns", "way.example"): nil})
	wayService := &Service{Name: "way", Namespace: "ns", Hostname: "way.example", Ports: []Port{{15008, 15008}}}
	inbound := func(w *onDemandWorld, q InboundQuery) (r InboundRoute, err error) {
		apply(w.t, w.s, Update{Workloads: []WorkloadUpdate{waypoint}})
		q.Local, _ = w.s.WorkloadByUID(obWaypoint.UID)
		q.ConnDst = addrPort("127.0.0.10:15008")
		err = w.ask(func(asked []string) (err error) {
			q.Asked = asked
			r, err = w.s.Inbound(q)
			return err
		})
		return r, err
	}
	t.Run("sandwich", func(t *testing.T) {
		set := weights(WeightedWaypoint{*byHost("other", 15008), 1}, WeightedWaypoint{*byHost("way.example", 15008), 1})
		w := newOnDemandWorld(t, []*Service{example(set, via(gw("127.0.0.99", 1))), wayService})
		if r, err := inbound(w, InboundQuery{Addr: addrPort("127.0.0.3:80")}); err != nil || r.Upstream != addrPort("127.0.0.10:80") {
			t.Errorf("got %+v, %v", r, err)
		}
		w.asked([]string{"/127.0.0.3"}, []string{"/127.0.0.99", "ns/other", "ns/way.example"})
	})
	t.Run("workload", func(t *testing.T) {
		w := newOnDemandWorld(t, []*Service{wayService}, member(but(obLocal, waypointed(byHost("way.example", 15008))), nil))
		if _, err := inbound(w, InboundQuery{Addr: addrPort("127.0.0.2:80")}); err != nil {
			t.Error(err)
		}
		w.asked([]string{"/127.0.0.2"}, []string{"ns/way.example"})
	})
	t.Run("stranger", func(t *testing.T) {
		w := newOnDemandWorld(t, nil)
		if _, err := inbound(w, InboundQuery{Addr: addrPort("127.0.0.2:80")}); !errors.Is(err, ErrIPMismatch) {
			t.Errorf("got %v", err)
		}
		w.asked([]string{"/127.0.0.2"})
	})
	t.Run("our own address", func(t *testing.T) {
		w := newOnDemandWorld(t, nil)
		if _, err := inbound(w, InboundQuery{Addr: addrPort("127.0.0.10:80")}); err != nil || w.rounds != nil {
			t.Errorf("got %v, %v", err, w.rounds)
		}
	})
	t.Run("hostname", func(t *testing.T) {
		w := newOnDemandWorld(t, []*Service{example()})
		if r, err := inbound(w, InboundQuery{Host: "example.com", Port: 80}); err != nil || r.Upstream != addrPort("127.0.0.10:8080") {
			t.Errorf("got %+v, %v", r, err)
		}
		w.asked([]string{"ns/example.com"})
		if _, err := inbound(w, InboundQuery{Host: "nobody", Port: 80}); err == nil || err.Error() != "no service or workload for hostname: nobody" {
			t.Errorf("got %v", err)
		}
	})
}
