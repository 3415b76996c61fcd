package main

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/admin"
	"github.com/ztunnel-go/ztunnel/proxy"
	"github.com/ztunnel-go/ztunnel/proxy/inpod"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/state"
)

// testPods are the pods of a node: one that is served, one that starts, one that
// has failed, one that goes.
func testPods() []inpod.PodStatus {
	now := time.Date(2026, 8, 21, 11, 0, 0, 7, time.FixedZone("CET", 3600))
	ap := netip.MustParseAddrPort
	pod := func(uid, namespace, name string, s inpod.State, reason string) inpod.PodStatus {
		return inpod.PodStatus{UID: uid, Namespace: namespace, Name: name, ServiceAccount: "sa-" + name, State: s, Reason: reason, Since: now, NetNS: netns.NamespaceID{Dev: 4, Inode: 4026531840}}
	}
	served := pod("c0ffee00-0000-4000-8000-000000000001", "default", "echo-1", inpod.Active, "")
	served.Connections = proxy.Connections{
		Inbound:  []proxy.InboundConnection{{Src: ap("10.244.0.7:41000"), ActualDst: ap("10.244.0.9:15008"), Host: "echo.default.svc.cluster.local", Protocol: state.HBONE}},
		Outbound: []proxy.OutboundConnection{{Src: ap("10.244.0.9:52000"), OriginalDst: ap("10.96.1.1:80"), ActualDst: ap("10.244.1.4:15008"), Protocol: state.HBONE}},
	}
	failed := pod("c0ffee00-0000-4000-8000-000000000003", "shop", "web", inpod.Failed, "inbound listener: failed to bind to address [::]:15008: address already in use, held by pid 17 (nginx\x1b)")
	failed.Retries = 3
	return []inpod.PodStatus{
		served, pod("c0ffee00-0000-4000-8000-000000000002", "default", "new", inpod.Starting, ""), failed,
		pod("c0ffee00-0000-4000-8000-000000000004", "shop", "old", inpod.Draining, ""),
	}
}

// testPodsDump is the dump of a node with them, as far as it speaks of pods.
func testPodsDump(t *testing.T, zds inpod.Status, pods []inpod.PodStatus) string {
	t.Helper()
	text, err := admin.EncodeDump(map[string]any{
		"config": map[string]any{"proxyMode": "Shared"}, "workloadState": dumpWorkloadState(pods),
		"ztunnelGo": map[string]any{"pods": dumpPods(pods), "zds": dumpZDS(zds)},
	})
	if err != nil {
		t.Fatal(err)
	}
	return string(text) + "\n"
}

var testZDS = inpod.Status{
	Path: "/var/run/ztunnel/ztunnel.sock", Connected: true,
	Since: time.Date(2026, 8, 21, 10, 0, 0, 0, time.UTC), Snapshot: time.Date(2026, 8, 21, 10, 0, 1, 0, time.UTC),
}

// AD-04: the shape of workloadState, and of what stands beside it.
func TestID_AD04_WorkloadState(t *testing.T) {
	golden(t, "dump_pods", testPodsDump(t, testZDS, testPods()))
}

func TestPodsCommand(t *testing.T) {
	away := inpod.Status{Path: testZDS.Path, Error: "connect: no such file or directory"}
	dumps := map[string]string{
		"ours": testPodsDump(t, testZDS, testPods()), "empty": testPodsDump(t, testZDS, nil), "away": testPodsDump(t, away, nil),
		"dedicated": `{"config": {"proxyMode": "Dedicated"}, "ztunnelGo": {}}`,
		"reference": `{"config": {}, "workloadState": {"u1": {"state": "Up", "info": {"name": "b", "namespace": "n", "serviceAccount": "s"},
			"connections": {"inbound": [{}], "outbound": []}}, "u2": {"state": "Pending", "info": {"name": "a", "namespace": "n", "serviceAccount": "s"}}}}`,
		"certs": `{"certificates": []}`, "text": "x",
	}
	tests := []struct {
		args         string
		code         int
		golden, want string // file with standard output; part of standard error
	}{
		{"pods -f ours", exitOK, "pods_short", ""},
		{"pod -f ours -o wide", exitOK, "pods_wide", ""},
		{"pods -f ours -o json", exitOK, "pods_json", ""},
		{"pods -f ours -o yaml --workload-namespace shop", exitOK, "pods_yaml", ""},
		{"pods -f ours web default/new", exitOK, "pods_named", ""},
		{"pods -f ours c0ffee00-0000-4000-8000-000000000004 shop/nobody default/web", exitCondition, "pods_missing", "Error: no pod shop/nobody, default/web\n"},
		{"pods -f ours --workload-namespace shop echo-1", exitCondition, "", "Error: no pod echo-1\n"},
		{"pods -f reference -o wide", exitOK, "pods_reference", ""},
		{"pods -f empty", exitOK, "", "there is no pod to list\n"},
		{"pods -f empty -o json", exitOK, "pods_none", "there is no pod to list\n"},
		{"pods -f away", exitOK, "", "not connected to the CNI agent at /var/run/ztunnel/ztunnel.sock: connect: no such file or directory\n"},
		{"pods -f dedicated", exitOK, "", "dedicated serves one workload and no pods of a node (mode Dedicated)\n"},
		{"pods -f certs", exitRuntime, "", "certs is no configuration dump: it has no config"},
		{"pods -f text", exitRuntime, "", "text is no configuration dump: "},
		{"pods -f nowhere", exitRuntime, "", "nowhere"},
		{"pods -f ours -o name", exitUsage, "", "must be one of short, wide, json, yaml"},
		{"pods -f ours --admin x", exitUsage, "", "--admin and --file exclude each other"},
	}
	for _, tt := range tests {
		t.Run(tt.args, func(t *testing.T) {
			code, stdout, stderr := command(t, nil, dumps, strings.Fields(tt.args)...)
			if code != tt.code || !strings.Contains(stderr, tt.want) || tt.want == "" && stderr != "" {
				t.Errorf("got exit code %d and %q, want %d and %q", code, stderr, tt.code, tt.want)
			}
			if tt.golden != "" {
				golden(t, tt.golden, stdout)
			}
		})
	}
}

// What istioctl reads of workloadState, with its own types.
func TestIstioctlReadsWorkloadState(t *testing.T) {
	var dump struct {
		WorkloadState map[string]struct {
			State       string `json:"state"`
			Connections struct {
				Inbound []struct {
					Src         string `json:"src"`
					OriginalDst string `json:"originalDst"`
					ActualDst   string `json:"actualDst"`
				} `json:"inbound"`
				Outbound []struct {
					Src         string `json:"src"`
					OriginalDst string `json:"originalDst"`
					ActualDst   string `json:"actualDst"`
					Protocol    string `json:"protocol"`
				} `json:"outbound"`
			} `json:"connections"`
			Info struct {
				Name           string `json:"name"`
				Namespace      string `json:"namespace"`
				TrustDomain    string `json:"trustDomain"`
				ServiceAccount string `json:"serviceAccount"`
			} `json:"info"`
		} `json:"workloadState"`
	}
	if err := json.Unmarshal([]byte(testPodsDump(t, testZDS, testPods())), &dump); err != nil {
		t.Fatal(err)
	}
	w := dump.WorkloadState["c0ffee00-0000-4000-8000-000000000001"]
	if len(dump.WorkloadState) != 4 || w.State != "Up" || w.Info.Name != "echo-1" || len(w.Connections.Inbound) != 1 || len(w.Connections.Outbound) != 1 ||
		w.Connections.Outbound[0].Protocol != "HBONE" || w.Connections.Inbound[0].OriginalDst == "" {
		t.Errorf("got %+v", dump.WorkloadState)
	}
}
