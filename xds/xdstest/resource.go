package xdstest

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/ztunnel-go/ztunnel/xds/securitypb"
	"github.com/ztunnel-go/ztunnel/xds/workloadpb"
)

// The type URLs (spec/state-xds-dns.md §1.7).
const (
	AddressType       = "type.googleapis.com/istio.workload.Address"
	AuthorizationType = "type.googleapis.com/istio.security.Authorization"
)

// Resource is one resource of the world.
type Resource struct {
	TypeURL string
	Name    string
	Aliases []string
	Value   []byte // of the payload; nil sends none, as in a heartbeat
	Version string // "" leaves it to the personality
	// Node and Services (namespace/hostname) are those of a workload: on demand,
	// istiod sends unasked what is on the client's node, and the endpoints of the
	// services that it has asked for.
	Node     string
	Services []string
}

// Workload makes the resource of a workload, named and with aliases as istiod
// does. It panics if w cannot be encoded.
func Workload(w *workloadpb.Workload) Resource {
	r := Resource{TypeURL: AddressType, Name: w.GetUid(), Node: w.GetNode(), Services: slices.Sorted(maps.Keys(w.GetServices()))}
	for _, a := range w.GetAddresses() {
		r.Aliases = append(r.Aliases, alias(w.GetNetwork(), a))
	}
	r.Value = Marshal(&workloadpb.Address{Type: &workloadpb.Address_Workload{Workload: w}})
	return r
}

// Service makes the resource of a service, named and with aliases as istiod does.
// It panics if svc cannot be encoded.
func Service(svc *workloadpb.Service) Resource {
	r := Resource{TypeURL: AddressType, Name: svc.GetNamespace() + "/" + svc.GetHostname()}
	for _, a := range svc.GetAddresses() {
		name := alias(a.GetNetwork(), a.GetAddress())
		if a.Length != nil {
			name = fmt.Sprintf("%s/%d", name, a.GetLength())
		}
		r.Aliases = append(r.Aliases, name)
	}
	r.Value = Marshal(&workloadpb.Address{Type: &workloadpb.Address_Service{Service: svc}})
	return r
}

// Authorization makes the resource of a policy. It panics if a cannot be encoded.
func Authorization(a *securitypb.Authorization) Resource {
	return Resource{TypeURL: AuthorizationType, Name: a.GetNamespace() + "/" + a.GetName(), Value: Marshal(a)}
}

// Bad makes a resource whose payload is no message.
func Bad(typeURL, name string) Resource {
	return Resource{TypeURL: typeURL, Name: name, Value: []byte{0xff}}
}

func alias(network string, address []byte) string {
	ip, _ := netip.AddrFromSlice(address)
	return network + "/" + ip.String()
}

// Marshal encodes m. It panics if it cannot.
func Marshal(m proto.Message) []byte {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		panic(fmt.Sprintf("xdstest: %v", err))
	}
	return b
}
