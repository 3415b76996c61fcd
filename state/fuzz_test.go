package state

import (
	"errors"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"
)

// choices makes a small world and questions from bytes, so that a fuzzer sees
// what a byte changes. Names, addresses and networks are few: they meet again.
type choices struct{ data []byte }

func (c *choices) n(k int) int {
	if len(c.data) == 0 {
		return 0
	}
	b := c.data[0]
	c.data = c.data[1:]
	return int(b) % k
}

func (c *choices) maybe() bool { return c.n(3) == 1 }

func (c *choices) network() string { return [...]string{"", "", "far"}[c.n(3)] }

func (c *choices) ns() string { return [...]string{"ns", "ns", "other"}[c.n(3)] }

func (c *choices) ip() netip.Addr {
	if i := c.n(6); i < 5 {
		return netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})
	}
	return netip.AddrFrom16([16]byte{0x20, 1, 15: byte(c.n(2))})
}

func (c *choices) host() NamespacedHostname {
	return NamespacedHostname{Namespace: c.ns(), Hostname: [...]string{"a", "b", "way"}[c.n(3)]}
}

func (c *choices) port() uint16 { return [...]uint16{80, 80, 80, 80, 15008, 15008, 0}[c.n(7)] }

func (c *choices) uid() string { return [...]string{"u0", "u1", "c//Pod/ns/u2", "u3", "u4"}[c.n(5)] }

func (c *choices) gateway() *GatewayAddress {
	switch c.n(3) {
	case 0:
		return nil
	case 1:
		return &GatewayAddress{Address: NetworkAddress{c.network(), c.ip()}, Port: c.port()}
	}
	return &GatewayAddress{Hostname: c.host(), Port: c.port()}
}

func (c *choices) ports() (ports []Port) {
	for range max(c.n(4), 1) {
		ports = append(ports, Port{c.port(), c.port()})
	}
	return ports
}

func (c *choices) workload() WorkloadUpdate {
	w := &Workload{
		UID: c.uid(), Namespace: c.ns(), ServiceAccount: [...]string{"x", "y"}[c.n(2)], Network: c.network(), Capacity: uint32(c.n(3)),
		Protocol: Protocol(c.n(2)), NetworkMode: NetworkMode(max(c.n(5)-3, 0)), Health: Health(max(c.n(5)-3, 0)),
		Waypoint: c.gateway(), NetworkGateway: c.gateway(), Locality: Locality{Region: [...]string{"r", "s"}[c.n(2)]},
	}
	for range (1 + c.n(5)) / 2 {
		w.IPs = append(w.IPs, c.ip())
	}
	if c.maybe() {
		w.Hostname = c.host().Hostname
	}
	if c.maybe() {
		w.ApplicationTunnel = &ApplicationTunnel{Proxy: c.maybe(), Port: c.port()}
	}
	u := WorkloadUpdate{Workload: w, Endpoints: map[NamespacedHostname][]Port{}}
	for range 1 + c.n(2) {
		u.Endpoints[c.host()] = c.ports()
	}
	return u
}

func (c *choices) service() *Service {
	key := c.host()
	s := &Service{
		Name: key.Hostname, Namespace: key.Namespace, Hostname: key.Hostname, Ports: c.ports(), Waypoint: c.gateway(),
		IPFamilies: IPFamilies(c.n(4)), Canonical: c.maybe(), Visibility: Visibility(max(c.n(5)-3, 0)),
	}
	for range 1 + c.n(2) {
		s.VIPs = append(s.VIPs, NetworkAddress{c.network(), c.ip()})
	}
	if c.maybe() {
		s.CIDRVIPs = []CIDRAddress{{c.network(), netip.PrefixFrom(c.ip(), 24+c.n(9))}}
	}
	for range max(c.n(4)-1, 0) {
		if g := c.gateway(); g != nil {
			s.WeightedWaypoints = append(s.WeightedWaypoints, WeightedWaypoint{*g, uint32(c.n(3))})
		}
	}
	if c.maybe() {
		s.LoadBalancer = &LoadBalancer{Mode: LoadBalancerMode(c.n(4)), HealthPolicy: HealthPolicy(c.n(2)), Preferences: []Scope{Scope(1 + c.n(6)), Scope(1 + c.n(6))}}
	}
	if !c.maybe() {
		s.SubjectAltNames = []string{"spiffe://cluster.local/ns/ns/sa/san", "bad"}[c.n(5)/4:]
	}
	if c.maybe() {
		s.Endpoints = []Endpoint{{WorkloadUID: c.uid(), Ports: c.ports()}}
	}
	return s
}

// fuzzWorld is a store and what one needs to ask it.
func (c *choices) store() *Store {
	s := New(Config{Network: c.network(), OnDemand: c.maybe()})
	for range 1 + c.n(2) {
		var u Update
		for range 1 + c.n(6) {
			u.Workloads = append(u.Workloads, c.workload())
		}
		for range 1 + c.n(5) {
			u.Services = append(u.Services, c.service())
		}
		if c.maybe() {
			u.Removed = []string{c.uid(), c.host().String()}
		}
		if c.maybe() {
			u.Stale = []string{c.uid(), c.host().String()}
		}
		// What is rejected is not there, which is a world as well.
		_ = s.Apply(u)
	}
	return s
}

func (c *choices) query(s *Store) Query {
	src, ok := s.WorkloadByUID(c.uid())
	if !ok {
		src = &Workload{Namespace: c.ns(), Network: c.network()}
	}
	q := Query{Source: src, SourceIP: c.ip(), Dst: netip.AddrPortFrom(c.ip(), [...]uint16{80, 81, 15008}[c.n(3)])}
	if c.maybe() {
		q.Avoid = []string{c.uid()}
	}
	return q
}

// drawn returns the same draws each time.
func drawn(seed uint64) func(uint64) uint64 {
	r := rand.New(rand.NewPCG(seed, 1))
	return r.Uint64N
}

// FuzzRoute: no state and no question make Route or Inbound panic, lead past a
// waypoint or believe anybody; and explanations are of the same decisions.
func FuzzRoute(f *testing.F) {
	for seed := range uint64(20) {
		f.Add(randomBytes(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) { checkDecisions(t, data) })
}

func randomBytes(seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, 7))
	data := make([]byte, 300+r.IntN(300))
	for i := range data {
		data[i] = byte(r.Uint32())
	}
	return data
}

// The same worlds in an ordinary test, many enough that every rule is met.
func TestRandomDecisions(t *testing.T) {
	met := map[string]int{}
	for seed := range uint64(4000) {
		for _, rule := range checkDecisions(t, randomBytes(seed)) {
			met[rule]++
		}
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
	for _, rule := range []string{"A1", "A2", "B", "C", "D", "E", "F", "G", "inbound", "sandwich", "inbound refused", "miss"} {
		if met[rule] == 0 {
			t.Errorf("%s is never met: %v", rule, met)
		}
	}
}

// checkDecisions returns what was met.
func checkDecisions(t *testing.T, data []byte) (met []string) {
	c := &choices{data}
	s := c.store()
	for i := range 4 {
		q := c.query(s)
		r, err := demandAll(t, q, uint64(i), s)
		met = append(met, outcome(r, err))
		checkRoute(t, s, q, r, err)
		if local, ok := s.WorkloadByUID(c.uid()); ok {
			in := InboundQuery{Local: local, ConnDst: netip.AddrPortFrom(c.ip(), 15008), Port: c.port()}
			if len(local.IPs) > 0 {
				in.ConnDst = netip.AddrPortFrom(local.IPs[0], 15008)
			}
			if c.maybe() {
				in.Host = c.host().Hostname
			} else {
				in.Addr = netip.AddrPortFrom(c.ip(), 80)
			}
			met = append(met, checkInbound(t, s, in))
		}
	}
	return met
}

func outcome(r Route, err error) string {
	switch {
	case errors.As(err, new(*Miss)):
		return "miss"
	case errors.Is(err, ErrNoHealthyUpstream):
		return "B"
	}
	return r.Rule
}

// demandAll asks until no key is missing; the control plane has nothing to send.
func demandAll(t *testing.T, q Query, seed uint64, s *Store) (r Route, err error) {
	for range 50 {
		q.Draw = drawn(seed)
		r, err = s.Route(q)
		q.Draw = drawn(seed)
		e := s.Explain(q)
		if !reflect.DeepEqual(e.Route, r) || !reflect.DeepEqual(e.Err, err) {
			t.Errorf("Explain: %+v, %v\nRoute: %+v, %v", e.Route, e.Err, r, err)
		}
		var miss *Miss
		if !errors.As(err, &miss) {
			return r, err
		}
		for _, key := range miss.Keys {
			if slices.Contains(q.Asked, key) {
				t.Fatalf("%s is demanded twice", key)
			}
		}
		if q.Asked = append(q.Asked, miss.Keys...); seed == 3 {
			return r, err
		}
	}
	t.Errorf("no decision after %d keys", len(q.Asked))
	return r, err
}

func checkRoute(t *testing.T, s *Store, q Query, r Route, err error) {
	t.Helper()
	if err != nil {
		if !reflect.DeepEqual(r, Route{}) {
			t.Errorf("an error with a route: %+v, %v", r, err)
		}
		return
	}
	tb := s.read()
	defer s.release(tb)
	complain := func(what string) { t.Errorf("%s: %+v\nof %s to %s", what, r, q.Source, q.Dst) }
	if r.NextHop.Port() == 0 || r.NextHop.Addr().IsValid() == (r.Resolve != "") {
		complain("no next hop")
	}
	if (r.Protocol != TCP) != (len(r.ExpectedIDs) > 0) || (r.Protocol == DoubleHBONE) != (len(r.FinalIDs) > 0) {
		complain("wrong expectations")
	}
	if (r.Protocol == DoubleHBONE) != (r.Gateway != nil) || (r.Protocol == TCP) != (r.Authority == Authority{}) {
		complain("not a route of its protocol")
	}
	for _, w := range []*Workload{r.Workload, r.Gateway} {
		if w != nil && slices.Contains(q.Avoid, w.UID) {
			complain("goes where it has just failed")
		}
	}
	if r.Workload != nil && (r.Workload.Network != q.Source.Network) != (r.Gateway != nil) {
		complain("a gateway is for other networks, and only for them")
	}
	w, svc := tb.at(s.cfg.Network, q.Dst.Addr(), q.Source.Namespace)
	through := r.Rule == "A1" || r.Rule == "A2" || r.Rule == "E"
	if svc != nil && (svc.Waypoint != nil || weighs(svc)) && !through {
		complain("past the waypoint of the service")
	}
	direct := r.Workload
	if r.Rule == "C" && w != nil {
		direct = &w.Workload
	}
	if !through && direct != nil && direct.Waypoint != nil && (svc == nil || r.Service == nil) && !callerIsWaypoint(tb, q, direct) {
		complain("past the waypoint of the workload")
	}
}

func weighs(svc *service) bool {
	return slices.ContainsFunc(svc.WeightedWaypoints, func(m WeightedWaypoint) bool { return m.Weight > 0 })
}

// callerIsWaypoint is what Route must find out, said plainly: there is a workload
// with the identity and address of the caller that the waypoint may mean.
func callerIsWaypoint(tb *tables, q Query, dst *Workload) bool {
	for _, w := range tb.workloads {
		if w.Identity != q.Source.Identity || !w.owns(q.SourceIP) {
			continue
		}
		if g := dst.Waypoint; meansWorkload(tb, g, w) {
			return true
		}
	}
	return false
}

// meansWorkload tells whether g can mean w, alone or among others.
func meansWorkload(tb *tables, g *GatewayAddress, w *workload) bool {
	for _, svc := range tb.services {
		named := svc.Key() == g.Hostname || slices.Contains(svc.VIPs, g.Address)
		for _, c := range svc.CIDRVIPs {
			named = named || c.Network == g.Address.Network && c.Prefix.Contains(g.Address.Addr)
		}
		if named && svc.endpoint(w.UID) != nil {
			return true
		}
	}
	if g.Address.Addr.IsValid() {
		return w.Network == g.Address.Network && w.owns(g.Address.Addr)
	}
	return w.Namespace == g.Hostname.Namespace && w.Hostname == g.Hostname.Hostname
}

func checkInbound(t *testing.T, s *Store, q InboundQuery) string {
	t.Helper()
	var r InboundRoute
	var err error
	for range 50 {
		r, err = s.Inbound(q)
		if e := s.ExplainInbound(q); e.InboundRoute != r || !reflect.DeepEqual(e.Err, err) {
			t.Errorf("ExplainInbound: %+v, %v\nInbound: %+v, %v", e.InboundRoute, e.Err, r, err)
		}
		var miss *Miss
		if !errors.As(err, &miss) {
			break
		}
		q.Asked = append(q.Asked, miss.Keys...)
	}
	if err != nil {
		if r != (InboundRoute{}) {
			t.Errorf("an error with a route: %+v, %v", r, err)
		}
		return "inbound refused"
	}
	tunnel := q.Local.ApplicationTunnel
	if r.Upstream.Addr() != q.ConnDst.Addr() || r.Upstream.Port() == 0 || r.Proxy != (tunnel != nil && tunnel.Proxy) || r.Proxy != r.Target.IsValid() {
		t.Errorf("%+v of %+v", r, q)
	}
	if q.Host != "" || q.Addr.Addr() == q.ConnDst.Addr() || tunnel != nil {
		return "inbound"
	}
	tb := s.read()
	defer s.release(tb)
	if !attached(tb, q, NetworkAddress{s.cfg.Network, q.Addr.Addr()}) {
		t.Errorf("%s is served for %s without being its waypoint", q.Local, q.Addr)
	}
	return "sandwich"
}

// attached tells whether anything that has the address may have the local workload
// as its waypoint.
func attached(tb *tables, q InboundQuery, a NetworkAddress) bool {
	ours := func(g *GatewayAddress) bool {
		if g == nil {
			return false
		}
		for _, w := range tb.workloads {
			if (w.UID == q.Local.UID || w.owns(q.ConnDst.Addr())) && meansWorkload(tb, g, w) {
				return true
			}
		}
		return false
	}
	for _, w := range tb.workloads {
		if w.Network == a.Network && w.owns(a.Addr) && ours(w.Waypoint) {
			return true
		}
	}
	for _, svc := range tb.services {
		has := slices.Contains(svc.VIPs, a)
		for _, c := range svc.CIDRVIPs {
			has = has || c.Network == a.Network && c.Prefix.Contains(a.Addr)
		}
		if has && (ours(svc.Waypoint) || slices.ContainsFunc(svc.WeightedWaypoints, func(m WeightedWaypoint) bool { return m.Weight > 0 && ours(&m.Destination) })) {
			return true
		}
	}
	return false
}
