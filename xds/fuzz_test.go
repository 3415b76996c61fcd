package xds

import (
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/ztunnel-go/ztunnel/state"
	"github.com/ztunnel-go/ztunnel/xds/discoverypb"
	"github.com/ztunnel-go/ztunnel/xds/securitypb"
	"github.com/ztunnel-go/ztunnel/xds/workloadpb"
)

func marshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	data, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func raw(name string, payload []byte) *discoverypb.Resource {
	return &discoverypb.Resource{Name: name, Resource: &anypb.Any{Value: payload}}
}

// member wraps the bytes of a workload (1) or service (2) into an Address.
func member(field protowire.Number, data []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, field, protowire.BytesType), data)
}

// applyAny applies a resource under a name that may or may not be its key, twice,
// and removes it: nothing may be left then, and nothing that was there be lost.
func applyAny(t *testing.T, name string, payload []byte) {
	s := newStore()
	a := newAddresses(s)
	a.apply([]*discoverypb.Resource{workloadResource(t, pod("other", "10.0.0.1"))}, nil, nil)
	for range 2 {
		a.apply([]*discoverypb.Resource{raw(name, payload)}, nil, nil)
		s.Dump()
	}
	a.apply(nil, []string{name}, nil)
	for _, key := range keys(s) {
		if key != "other" {
			t.Fatalf("%q is left after the removal of %q", key, name)
		}
	}
	if len(a.keys)+len(a.owners) > 0 {
		t.Fatalf("left of the name %q: %v, %v", name, a.keys, a.owners)
	}
}

func FuzzST_FZ01_Workload(f *testing.F) {
	f.Add("u", marshal(f, pod("u", "10.0.0.1")))
	f.Add("name", marshal(f, fullWorkload()))
	f.Add("", marshal(f, pod("", "10.0.0.1")))
	f.Fuzz(func(t *testing.T, name string, data []byte) { applyAny(t, name, member(1, data)) })
}

func FuzzST_FZ03_Service(f *testing.F) {
	f.Add("ns/h", marshal(f, &workloadpb.Service{Namespace: "ns", Hostname: "h", Addresses: []*workloadpb.NetworkAddress{networkAddress("", "10.0.0.1", 8)}}))
	f.Add("name", marshal(f, &workloadpb.Service{Namespace: "ns", Hostname: "*.h", Waypoint: gatewayByName("ns", "w", 15008)}))
	f.Fuzz(func(t *testing.T, name string, data []byte) { applyAny(t, name, member(2, data)) })
}

func FuzzST_FZ03_Address(f *testing.F) {
	f.Add("u", marshal(f, workloadOf(pod("u", "10.0.0.1"))))
	f.Add("other", marshal(f, workloadOf(pod("u", "10.0.0.1"))))
	f.Add("ns/h", marshal(f, serviceOf(&workloadpb.Service{Namespace: "ns", Hostname: "h"})))
	f.Fuzz(func(t *testing.T, name string, data []byte) { applyAny(t, name, data) })
}

// Whatever a policy is made of: refused, it opens nothing to those who name it and
// takes no good one away; applied, it opens no more than it would without the
// fields that we do not know.
func FuzzST_FZ01_Authorization(f *testing.F) {
	known := policyOf(securitypb.Action_DENY, &securitypb.Match{DestinationPorts: []uint32{80}, Namespaces: []*securitypb.StringMatch{exact("client")}})
	f.Add(marshal(f, known))
	for _, action := range []securitypb.Action{securitypb.Action_ALLOW, securitypb.Action_DENY} {
		p := policyOf(action, &securitypb.Match{SourceIps: []*securitypb.Address{{Address: bytesOf("10.0.0.0"), Length: 8}}})
		p.Scope = securitypb.Scope_WORKLOAD_SELECTOR
		f.Add(marshal(f, p))
		p.Rules[0].Clauses[0].ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 9, protowire.VarintType), 1))
		f.Add(marshal(f, p))
		p.Rules[0].Clauses[0].Matches[0].DestinationPorts = []uint32{65616}
		f.Add(marshal(f, p))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var a securitypb.Authorization
		decoded := proto.Unmarshal(data, &a) == nil
		s := newStore()
		rejected := applyAuthorizations(s, []*discoverypb.Resource{raw("ns/p", data)}, nil)
		identified, anonymous := verdicts(t, s, "ns/p")
		if rejected != nil && !(decoded && a.GetDryRun()) && applies(&a) && (identified || anonymous) {
			t.Fatalf("%v: a rejected policy opens (%v, %v)", rejected, identified, anonymous)
		}
		if rejected == nil {
			notWider(t, &a, identified, anonymous)
		}

		closed := newStore()
		deny := &securitypb.Authorization{Name: "p", Namespace: "ns", Action: securitypb.Action_DENY, Rules: []*securitypb.Rule{{}}}
		applyAuthorizations(closed, []*discoverypb.Resource{policyResource(t, deny)}, nil)
		if applyAuthorizations(closed, []*discoverypb.Resource{raw("ns/p", data)}, nil) != nil {
			if identified, anonymous := verdicts(t, closed, "ns/p"); identified || anonymous {
				t.Fatal("a rejected policy has taken a good one away")
			}
		}
	})
}

// applies tells whether a policy holds for a workload of namespace ns that names
// it: all do but those of another namespace.
func applies(a *securitypb.Authorization) bool {
	return a.GetScope() != securitypb.Scope_NAMESPACE || a.GetNamespace() == "ns"
}

// notWider compares with the same policy as a reader has it who drops what it does
// not know.
func notWider(t *testing.T, a *securitypb.Authorization, identified, anonymous bool) {
	var reduced securitypb.Authorization
	if err := ignoreUnknown.Unmarshal(marshal(t, a), &reduced); err != nil {
		t.Fatal(err)
	}
	s := state.New(state.Config{})
	if rejected := applyAuthorizations(s, []*discoverypb.Resource{resource(t, "ns/p", &reduced)}, nil); rejected != nil {
		t.Fatalf("accepted only with unknown fields: %v", rejected)
	}
	if i, n := verdicts(t, s, "ns/p"); identified && !i || anonymous && !n {
		t.Fatalf("wider with unknown fields (%v, %v) than without (%v, %v)", identified, anonymous, i, n)
	}
}
