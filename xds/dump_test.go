package xds

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	"github.com/ztunnel-go/ztunnel/state"
	"github.com/ztunnel-go/ztunnel/xds/discoverypb"
	"github.com/ztunnel-go/ztunnel/xds/workloadpb"
)

var update = flag.Bool("update", false, "rewrite the files in testdata")

// The dump of a mesh in which every field of every type is set, by the way that
// it comes from a control plane (spec/state-xds-dns.md §7, row INT-11).
func TestST_INT11DumpOfEverything(t *testing.T) {
	workload, service, policy := fullWorkload(), fullService(), fullPolicy()
	match := policy.GetRules()[0].GetClauses()[0].GetMatches()[0]
	for _, m := range []proto.Message{workload, service, policy, match} {
		fields := m.ProtoReflect().Descriptor().Fields()
		for i := range fields.Len() {
			if f := fields.Get(i); !m.ProtoReflect().Has(f) {
				t.Errorf("%s is not set", f.FullName())
			}
		}
	}
	waypoint := pod("c1//Pod/ns/waypoint", "10.0.0.9")
	waypoint.ApplicationTunnel = &workloadpb.ApplicationTunnel{}
	s := newStore()
	for _, rejected := range []*state.RejectedError{
		newAddresses(s).apply([]*discoverypb.Resource{
			workloadResource(t, workload), serviceResource(t, service), workloadResource(t, waypoint),
		}, nil, nil),
		applyAuthorizations(s, []*discoverypb.Resource{policyResource(t, policy), garbage("ns/rejected")}, nil),
	} {
		if got := text(rejected); got != "" && !strings.HasPrefix(got, "ns/rejected: ") {
			t.Error(got)
		}
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(s.Dump()); err != nil {
		t.Fatal(err)
	}
	const golden = "testdata/dump.golden"
	if *update {
		if err := os.WriteFile(golden, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), b.String()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
