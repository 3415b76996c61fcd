package xds_test

import (
	"strings"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	"github.com/ztunnel-go/ztunnel/state"
	"github.com/ztunnel-go/ztunnel/xds"
	"github.com/ztunnel-go/ztunnel/xds/xdstest"
)

// TestST_XDS06_XDS14_Node: the id, the precedence of metadata, and JSON as it is.
func TestST_XDS06_XDS14_Node(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{}, func(c *xds.Config) {
			c.Node = xds.Node{
				PodName: "ztunnel-1", PodNamespace: "istio-system", NodeName: "node-1",
				Metadata: map[string]string{"NODE_NAME": "from metadata", "CLUSTER_ID": "c1", "DNS_CAPTURE": "true"},
				MetadataJSON: map[string]string{
					"CLUSTER_ID": `"c2"`, "OBJECT": `{"a":[1,true,null,"x",2.5]}`, "NULL": "null", "NUMBER": "9007199254740993",
					"BAD": "{secret", "EMPTY": "",
				},
			}
		})
		w.settle()
		node := w.initial(xdstest.AddressType).GetNode()
		if got, want := node.GetId(), "ztunnel~1.1.1.1~ztunnel-1.istio-system~istio-system.svc.cluster.local"; got != want {
			t.Errorf("id %q, want %q", got, want)
		}
		want := map[string]any{
			"NAME": "ztunnel-1", "NAMESPACE": "istio-system", "INSTANCE_IPS": "1.1.1.1", "NODE_NAME": "from metadata",
			"CLUSTER_ID": "c2", "DNS_CAPTURE": "true", "NULL": nil, "NUMBER": 9007199254740992.0,
			"OBJECT": map[string]any{"a": []any{1.0, true, nil, "x", 2.5}},
		}
		if diff := cmp.Diff(want, node.GetMetadata().AsMap()); diff != "" {
			t.Errorf("metadata (-want +got):\n%s", diff)
		}
		if log := w.log.String(); !strings.Contains(log, "ISTIO_METAJSON_BAD") || !strings.Contains(log, "ISTIO_METAJSON_EMPTY") || strings.Contains(log, "secret") {
			t.Errorf("log:\n%s", log)
		}
		if node.GetCluster() != "" {
			t.Errorf("node %v", node)
		}
	})
}

// TestNew: what is wrong is named, and nothing is touched.
func TestNew(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*xds.Config)
		want   []string // in the error; none: no error
	}{
		{name: "good"},
		{name: "unix", change: func(c *xds.Config) { c.Address = "unix:///run/x.sock" }},
		{name: "files that are not there", change: func(c *xds.Config) { c.RootFile, c.TokenFile = "/no/root", "/no/token" }},
		{name: "address", change: func(c *xds.Config) { c.Address = "" }, want: []string{"Address"}},
		{name: "plaintext", change: func(c *xds.Config) { c.Address = "http://istiod:15010" }, want: []string{"Address", "http is refused"}},
		{name: "two roots", change: func(c *xds.Config) { c.RootFile, c.RootPEM = "/x", "y" }, want: []string{"RootFile", "RootPEM"}},
		{name: "root", change: func(c *xds.Config) { c.RootPEM = "garbage" }, want: []string{"RootPEM", "no root certificate"}},
		{name: "two tokens", change: func(c *xds.Config) { c.TokenFile, c.Token = "/x", "y" }, want: []string{"TokenFile", "Token"}},
		{name: "token", change: func(c *xds.Config) { c.Token = "a\nb" }, want: []string{"Token", "byte 1"}},
		{name: "alternative name", change: func(c *xds.Config) { c.AltHostname = "a b" }, want: []string{"AltHostname", `"a b"`}},
		{name: "header", change: func(c *xds.Config) { c.Headers = []xds.Header{{Name: "grpc-x", Value: "v"}} }, want: []string{"Headers", "grpc-x"}},
		{name: "cluster", change: func(c *xds.Config) { c.ClusterID = "\x00" }, want: []string{"ClusterID"}},
		{name: "full set", change: func(c *xds.Config) { c.FullSet = 2 }, want: []string{"FullSet"}},
		{name: "store", change: func(c *xds.Config) { c.Store = nil }, want: []string{"Store"}},
		{name: "node", change: func(c *xds.Config) { c.Node.Metadata = map[string]string{"X": "\xff"} }, want: []string{"Node", "X"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := xds.Config{Address: "https://istiod.istio-system.svc:15012", Store: state.New(state.Config{})}
			if tt.change != nil {
				tt.change(&cfg)
			}
			c, err := xds.New(cfg)
			if len(tt.want) == 0 {
				if err != nil || c == nil {
					t.Errorf("got %v", err)
				}
				return
			}
			if err == nil {
				t.Fatal("no error")
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q does not name %q", err, want)
				}
			}
		})
	}
}
