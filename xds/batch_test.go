package xds

import (
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ztunnel-go/ztunnel/state"
	"github.com/ztunnel-go/ztunnel/xds/discoverypb"
	"github.com/ztunnel-go/ztunnel/xds/securitypb"
	"github.com/ztunnel-go/ztunnel/xds/workloadpb"
)

// keys lists what a store holds.
func keys(s *state.Store) []string {
	d := s.Dump()
	var list []string
	for _, w := range d.Workloads {
		list = append(list, w.UID)
	}
	for _, svc := range d.Services {
		list = append(list, svc.Namespace+"/"+svc.Hostname)
	}
	for _, p := range d.Policies {
		list = append(list, "policy "+p.Namespace+"/"+p.Name)
	}
	slices.Sort(list)
	return list
}

func TestST_XDS10OneBadAddressRejectsNothingElse(t *testing.T) {
	s := newStore()
	a := newAddresses(s)
	member := func(uid, ip string) *discoverypb.Resource {
		w := pod(uid, ip)
		w.Services = map[string]*workloadpb.PortList{"ns/svc": {Ports: []*workloadpb.Port{{ServicePort: 80, TargetPort: 8080}}}}
		return workloadResource(t, w)
	}
	got := text(a.apply([]*discoverypb.Resource{
		member("u1", "10.0.0.1"),
		resource(t, "bad", &workloadpb.Address{}),
		serviceResource(t, &workloadpb.Service{Namespace: "ns", Hostname: "svc", Name: "svc"}),
		member("u2", "10.0.0.2"),
	}, nil, nil))
	if want := "bad: unknown address type"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if svc := s.Dump().Services; len(svc) != 1 || len(svc[0].Endpoints) != 2 {
		t.Errorf("got %d services (%v), want one with 2 endpoints", len(svc), svc)
	}
}

// The text of a NACK: what the conversion and the store refuse, then what cannot
// be decoded (spec/state-xds-dns.md §3.4).
func TestST_XDS12TextOfANACK(t *testing.T) {
	s := newStore()
	a := newAddresses(s)
	w := pod("u", "10.0.0.1")
	w.Addresses = [][]byte{make([]byte, 9)}
	noNamespace := pod("nowhere", "10.0.0.2")
	noNamespace.Namespace = ""
	got := text(a.apply([]*discoverypb.Resource{
		garbage("junk"),
		{Name: "heartbeat"},
		resource(t, "other", workloadOf(noNamespace)),
		workloadResource(t, w),
		workloadResource(t, pod("good", "10.0.0.3")),
	}, nil, nil))
	parts := strings.Split(got, "; ")
	want := []string{
		"u: failed to parse address, had 9 bytes",
		`other: namespace "" in a SPIFFE ID: path cannot contain empty segments`,
		"junk: decode error: ",
		"heartbeat: XDS payload without resource",
	}
	if len(parts) != len(want) {
		t.Fatalf("got %q, want %d parts", got, len(want))
	}
	for i := range want {
		if !strings.HasPrefix(parts[i], want[i]) {
			t.Errorf("part %d: got %q, want %q", i, parts[i], want[i])
		}
	}
	if got := keys(s); !slices.Equal(got, []string{"good"}) {
		t.Errorf("got %v, want good alone", got)
	}
}

func TestAddressesRejectedKeepsTheLastGoodOne(t *testing.T) {
	s := newStore()
	a := newAddresses(s)
	a.apply([]*discoverypb.Resource{workloadResource(t, pod("u", "10.0.0.1"))}, nil, nil)
	bad := pod("u", "10.0.0.2")
	bad.TunnelProtocol = workloadpb.TunnelProtocol_LEGACY_ISTIO_MTLS
	if got := text(a.apply([]*discoverypb.Resource{workloadResource(t, bad)}, nil, nil)); got != "u: unknown enum: tunnel_protocol 2" {
		t.Errorf("got %q", got)
	}
	if _, ok := s.Workload("", netip.MustParseAddr("10.0.0.1")); !ok {
		t.Error("the last good workload is gone")
	}
}

// Cilium names a resource by the UID of its pod, and sends one without either for
// an endpoint that is no pod (spec/cilium-spire.md §1.5).
func TestAddressesWithoutNameAndUIDAreSkipped(t *testing.T) {
	s := newStore()
	a := newAddresses(s)
	rejected := a.apply([]*discoverypb.Resource{
		resource(t, "", workloadOf(pod("", "10.0.0.1"))),
		workloadResource(t, pod("good", "10.0.0.2")),
	}, nil, nil)
	if rejected != nil {
		t.Errorf("got %v, want nothing rejected", rejected)
	}
	if got := keys(s); !slices.Equal(got, []string{"good"}) {
		t.Errorf("got %v, want good alone", got)
	}
	rejected = a.apply([]*discoverypb.Resource{
		resource(t, "", workloadOf(pod("u", "10.0.0.1"))),
		resource(t, "", serviceOf(&workloadpb.Service{Namespace: "ns", Hostname: "h"})),
	}, nil, nil)
	want := ": resource without a name: it could never be removed"
	if got := text(rejected); got != want+"; "+want {
		t.Errorf("got %q, want %q twice", got, want)
	}
}

// A name that another one has succeeded gives nothing up.
func TestAddressesStaleUnderAFormerName(t *testing.T) {
	s := newStore()
	a := newAddresses(s)
	a.apply([]*discoverypb.Resource{
		resource(t, "former", workloadOf(pod("u", "10.0.0.1"))),
		resource(t, "later", workloadOf(pod("u", "10.0.0.1"))),
		workloadResource(t, pod("another", "10.0.0.1")),
	}, nil, nil)
	a.apply([]*discoverypb.Resource{resource(t, "later", workloadOf(pod("u", "10.0.0.1")))}, nil, nil)
	before, _ := s.Workload("", netip.MustParseAddr("10.0.0.1"))
	a.apply(nil, nil, []string{"former"})
	if w, ok := s.Workload("", netip.MustParseAddr("10.0.0.1")); !ok || w.UID != before.UID || w.UID != "u" {
		t.Errorf("got %v, before %v, want u", w, before)
	}
}

// A service that is refused says nothing of a workload with the same key.
func TestAddressesOfOneKeyAndTwoKinds(t *testing.T) {
	s := newStore()
	a := newAddresses(s)
	rejected := a.apply([]*discoverypb.Resource{
		resource(t, "other", workloadOf(pod("ns/", "10.0.0.1"))),
		resource(t, "ns/", serviceOf(&workloadpb.Service{Namespace: "ns"})),
	}, nil, nil)
	if got := keys(s); text(rejected) == "" || !slices.Equal(got, []string{"ns/"}) {
		t.Fatalf("got %v, rejected %v", got, rejected)
	}
	a.apply(nil, []string{"other"}, nil)
	if got := keys(s); len(got) != 0 {
		t.Errorf("got %v, want nothing", got)
	}
}

// namesStep is a response, and what the store holds after it.
type namesStep struct {
	add     map[string]string // xDS name → UID
	bad     map[string]string // the same, of workloads that the store refuses
	removed []string
	want    []string
	reject  string
}

// An object belongs to the name that brought it last, a name has one object: the
// rule of addresses, by which nothing leaks when a name is no key.
func TestAddressesUnderOtherNames(t *testing.T) {
	for name, steps := range map[string][]namesStep{
		"removal by the name": {
			{add: map[string]string{"foo": "u"}, want: []string{"u"}},
			{removed: []string{"u"}, want: []string{"u"}},
			{removed: []string{"foo"}},
			{add: map[string]string{"u": "u"}, want: []string{"u"}},
			{removed: []string{"foo"}, want: []string{"u"}},
			{removed: []string{"u"}},
		},
		"the object of a name changes": {
			{add: map[string]string{"foo": "u1"}, want: []string{"u1"}},
			{add: map[string]string{"foo": "u2"}, want: []string{"u2"}},
			{add: map[string]string{"foo": "foo"}, want: []string{"foo"}},
			{add: map[string]string{"foo": "u3"}, want: []string{"u3"}},
			{removed: []string{"foo"}},
		},
		"another name takes over": {
			{add: map[string]string{"a": "u"}, want: []string{"u"}},
			{add: map[string]string{"b": "u"}, want: []string{"u"}},
			{removed: []string{"a"}, want: []string{"u"}},
			{add: map[string]string{"u": "u"}, want: []string{"u"}},
			{removed: []string{"b"}, want: []string{"u"}},
			{removed: []string{"u"}},
		},
		"a resource is renamed in one response": {
			{add: map[string]string{"u": "u"}, want: []string{"u"}},
			{add: map[string]string{"b": "u"}, removed: []string{"u"}, want: []string{"u"}},
			{add: map[string]string{"u": "u"}, removed: []string{"b"}, want: []string{"u"}},
			{removed: []string{"u"}},
		},
		"a refused one changes nothing": {
			{add: map[string]string{"foo": "u1"}, want: []string{"u1"}},
			{bad: map[string]string{"foo": "u2"}, want: []string{"u1"}, reject: "foo"},
			{bad: map[string]string{"bar": "u1"}, removed: []string{"foo"}, reject: "bar"},
		},
		"two names swap": {
			{add: map[string]string{"a": "u1", "b": "u2"}, want: []string{"u1", "u2"}},
			{add: map[string]string{"a": "u2", "b": "u1"}, want: []string{"u1", "u2"}},
			{removed: []string{"a"}, want: []string{"u1"}},
			{removed: []string{"b"}},
		},
		"added and removed at once": {
			{add: map[string]string{"a": "u1"}, removed: []string{"a"}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore()
			a := newAddresses(s)
			for i, step := range steps {
				var list []*discoverypb.Resource
				for _, n := range []string{"a", "b", "foo", "bar", "u"} {
					if uid, ok := step.add[n]; ok {
						list = append(list, resource(t, n, workloadOf(pod(uid, "10.0.0.1"))))
					}
					if uid, ok := step.bad[n]; ok {
						w := pod(uid, "10.0.0.1")
						w.Namespace = ""
						list = append(list, resource(t, n, workloadOf(w)))
					}
				}
				rejected := a.apply(list, step.removed, nil)
				if got, _, _ := strings.Cut(text(rejected), ":"); got != step.reject {
					t.Errorf("step %d: rejected %q, want %q", i, text(rejected), step.reject)
				}
				if diff := cmp.Diff(step.want, keys(s)); diff != "" {
					t.Errorf("step %d: the store holds (-want +got):\n%s", i, diff)
				}
			}
			if len(a.keys)+len(a.owners) > 0 {
				t.Errorf("still remembered: %v, %v", a.keys, a.owners)
			}
		})
	}
}

// The rule as its simplest model has it, against random responses.
func TestAddressesUnderRandomNames(t *testing.T) {
	const seed = 4
	rnd := rand.New(rand.NewPCG(seed, seed))
	names := []string{"a", "b", "c", "d"}
	pick := func() string { return names[rnd.IntN(len(names))] }
	s := newStore()
	a := newAddresses(s)
	owner := map[string]string{} // key → xDS name
	drop := func(name string) {
		maps.DeleteFunc(owner, func(_, n string) bool { return n == name })
	}
	for step := range 3000 {
		var list []*discoverypb.Resource
		for range rnd.IntN(4) {
			name, uid := pick(), pick()
			list = append(list, resource(t, name, workloadOf(pod(uid, "10.0.0.1"))))
			drop(name)
			owner[uid] = name
		}
		var removed []string
		for range rnd.IntN(2) {
			removed = append(removed, pick())
			drop(removed[0])
		}
		if got := a.apply(list, removed, nil); got != nil {
			t.Fatal(got)
		}
		if want := slices.Sorted(maps.Keys(owner)); !slices.Equal(keys(s), want) {
			t.Fatalf("seed %d, step %d: the store holds %v, want %v", seed, step, keys(s), want)
		}
	}
	a.apply(nil, names, nil)
	if len(a.keys)+len(a.owners)+len(keys(s)) > 0 {
		t.Errorf("left after all names were removed: %v, %v, %v", a.keys, a.owners, keys(s))
	}
}

// A service is removed by the name that it had, too, and marked stale by it.
func TestAddressesStaleAndServices(t *testing.T) {
	s := newStore()
	a := newAddresses(s)
	a.apply([]*discoverypb.Resource{
		resource(t, "other", serviceOf(&workloadpb.Service{Namespace: "ns", Hostname: "h"})),
		resource(t, "foo", workloadOf(pod("old", "10.0.0.1"))),
		workloadResource(t, pod("new", "10.0.0.1")),
	}, nil, nil)
	a.apply(nil, nil, []string{"foo"})
	if w, ok := s.Workload("", netip.MustParseAddr("10.0.0.1")); !ok || w.UID != "new" {
		t.Errorf("got %v, want the workload that is not stale", w)
	}
	a.apply(nil, []string{"ns/h"}, nil)
	if got, want := keys(s), []string{"new", "ns/h", "old"}; !slices.Equal(got, want) {
		t.Errorf("after the removal of another name: got %v, want %v", got, want)
	}
	a.apply(nil, []string{"other", "foo"}, nil)
	if got, want := keys(s), []string{"new"}; !slices.Equal(got, want) {
		t.Errorf("after the removal: got %v, want %v", got, want)
	}
}

func TestAuthorizationsAreKeyedByTheirNames(t *testing.T) {
	s := newStore()
	p := &securitypb.Authorization{Name: "p", Namespace: "ns", Scope: securitypb.Scope_GLOBAL}
	if got := text(applyAuthorizations(s, []*discoverypb.Resource{resource(t, "foo0", p), policyResource(t, p)}, nil)); got != "" {
		t.Fatal(got)
	}
	if got, want := keys(s), []string{"policy ns/p", "policy ns/p"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	for _, name := range []string{"foo0", "ns/p"} {
		before := len(keys(s))
		applyAuthorizations(s, nil, []string{name})
		if got := len(keys(s)); got != before-1 {
			t.Errorf("after the removal of %s: %d policies, want %d", name, got, before-1)
		}
	}
}
