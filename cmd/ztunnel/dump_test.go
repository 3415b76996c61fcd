package main

import (
	"encoding/json"
	"errors"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/admin"
	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/proxy"
	"github.com/ztunnel-go/ztunnel/xds"
)

// TestD23_DumpCertificates: the states in istioctl's words, and the facts beside
// them in the same order.
func TestD23_DumpCertificates(t *testing.T) {
	now := time.Date(2026, 8, 21, 11, 0, 0, 7, time.FixedZone("CET", 3600))
	id := catest.ID("spiffe://td.test/ns/a/sa/b")
	down := errors.New("agent unavailable")
	withdrawn := errors.New("no identity issued")
	got := map[string]any{}
	statuses := []ca.Status{
		{ID: id, Provider: "istio", State: ca.Pending, Text: "Initializing", Err: down, Renewal: now, Leases: 2, Pods: []string{"a/x", "a/y"},
			Moves: []ca.Move{{Provider: "spire-delegated", Leases: 1, Since: now, Err: withdrawn}}},
		{ID: id, Provider: "spire-delegated", State: ca.Withdrawn, Text: "Unavailable: no identity issued", Err: withdrawn, Leases: 1, Arriving: 1},
		{ID: id, UID: "u", Provider: "spire-delegated", State: ca.Unavailable, Text: "Unavailable: expired", Err: down},
	}
	ours := []ourCertificate{}
	for _, s := range statuses {
		ours = append(ours, dumpOurCertificate(s))
	}
	got["certificates"], got["ztunnelGo"] = dumpCertificates(statuses), map[string]any{"certificates": ours}
	text, err := admin.EncodeDump(got)
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "dump_certificates", string(text)+"\n")

	entries, err := parseCerts(text, "the dump")
	if err != nil {
		t.Fatal(err)
	}
	for i, e := range entries {
		want, err := json.Marshal(ours[i])
		if err != nil {
			t.Fatal(err)
		}
		have, err := json.Marshal(e.Facts)
		if err != nil || string(have) != string(want) || e.State != statuses[i].Text {
			t.Errorf("entry %d: state %q, facts %s, %v; want %q, %s", i, e.State, have, err, statuses[i].Text, want)
		}
	}
}

// TestDump_XDS: what stands under ztunnelGo of the control plane, and of the tasks
// that wait for it.
func TestDump_XDS(t *testing.T) {
	now := time.Date(2026, 8, 21, 11, 0, 0, 0, time.UTC)
	d := ourDump{
		Certificates: []ourCertificate{}, Connections: dumpConnections(proxy.Connections{}), Ports: []portDump{},
		Pending: []string{"proxy", "state manager"}, Reasons: map[string]string{"state manager": "connection refused"}, Origins: map[string]string{},
		XDS: &xds.Status{
			Address: "https://istiod:15012", Since: now, LastError: "connection refused", OnDemand: true,
			Types: []xds.TypeStatus{
				{TypeURL: "type.googleapis.com/istio.workload.Address", Rejected: []xds.RejectedResource{}},
				{
					TypeURL: "type.googleapis.com/istio.security.Authorization", LastResponse: now, Resources: 7, Stale: 1, RejectedCount: 1,
					Rejected: []xds.RejectedResource{{Name: "ns/policy", Reason: "invalid cidr"}},
				},
			},
		},
	}
	text, err := admin.EncodeDump(map[string]any{"ztunnelGo": d})
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "dump_xds", string(text)+"\n")
}
