package xds

import (
	"net/netip"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/ztunnel-go/ztunnel/state"
	"github.com/ztunnel-go/ztunnel/xds/discoverypb"
	"github.com/ztunnel-go/ztunnel/xds/securitypb"
	"github.com/ztunnel-go/ztunnel/xds/workloadpb"
)

// resource packs m under a name, as a control plane does.
func resource(t testing.TB, name string, m proto.Message) *discoverypb.Resource {
	t.Helper()
	payload, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return &discoverypb.Resource{Name: name, Resource: payload}
}

// garbage is a resource whose payload is no message.
func garbage(name string) *discoverypb.Resource {
	return &discoverypb.Resource{Name: name, Resource: &anypb.Any{Value: []byte{0xff}}}
}

func workloadOf(w *workloadpb.Workload) *workloadpb.Address {
	return &workloadpb.Address{Type: &workloadpb.Address_Workload{Workload: w}}
}

func serviceOf(s *workloadpb.Service) *workloadpb.Address {
	return &workloadpb.Address{Type: &workloadpb.Address_Service{Service: s}}
}

// pod is a workload with no more than it needs.
func pod(uid, ip string) *workloadpb.Workload {
	return &workloadpb.Workload{Uid: uid, Name: "pod", Namespace: "ns", Addresses: [][]byte{netip.MustParseAddr(ip).AsSlice()}}
}

func workloadResource(t testing.TB, w *workloadpb.Workload) *discoverypb.Resource {
	t.Helper()
	return resource(t, w.GetUid(), workloadOf(w))
}

func serviceResource(t testing.TB, s *workloadpb.Service) *discoverypb.Resource {
	t.Helper()
	return resource(t, s.GetNamespace()+"/"+s.GetHostname(), serviceOf(s))
}

func policyResource(t testing.TB, p *securitypb.Authorization) *discoverypb.Resource {
	t.Helper()
	return resource(t, p.GetNamespace()+"/"+p.GetName(), p)
}

func newStore() *state.Store { return state.New(state.Config{}) }

// text is what a NACK would say, "" for an ACK.
func text(rejected *state.RejectedError) string {
	if rejected == nil {
		return ""
	}
	return rejected.Error()
}
