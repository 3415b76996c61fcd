package main

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestMetadataOrder: the metadata do not depend on the order of a map.
func TestMetadataOrder(t *testing.T) {
	for range 50 {
		c := mustParse(t, with(`PROXY_CONFIG={"proxyMetadata":{"ISTIO_META_ISTIO_META_X":"v", "ISTIO_META_Y": "w", "ISTIO_META_": "nobody"}}`), nil)
		if d := cmp.Diff(map[string]string{"X": "v", "Y": "w"}, c.Proxy.Metadata); d != "" {
			t.Fatal(d)
		}
	}
}

// TestUserinfo: no address takes credentials, and none is shown.
func TestUserinfo(t *testing.T) {
	names := []string{"PROXY_CONFIG"}
	for _, g := range configTable {
		for _, v := range g.vars {
			if strings.Contains(v.typ, "URI") {
				names = append(names, v.name)
			}
		}
	}
	if len(names) < 6 {
		t.Fatalf("only %v", names)
	}
	for _, name := range names {
		for _, text := range []string{"https://user:sesame@host:1", "https://user:ses%zzame@host", "https://user:sesame/x@host:1"} {
			if name == "PROXY_CONFIG" {
				text = `{"discoveryAddress": "` + text + `"}`
			}
			c, _, err := Load(with("-XDS_ADDRESS", name+"="+text), files(nil))
			if err == nil || !strings.Contains(err.Error(), "user information") {
				t.Errorf("%s=%s: got %v, want a refusal", name, text, err)
				continue
			}
			if shown := fmt.Sprint(err, c.Settings(), dumped(t, c)); strings.Contains(shown, "ses") && strings.Contains(shown, "ame@") || strings.Contains(shown, "sesame") {
				t.Errorf("%s: the secret is shown: %s", name, shown)
			}
		}
	}
	if _, _, err := Load(with("CA_ADDRESS=unix:///run/a@b"), files(nil)); err != nil {
		t.Errorf("a path with @: %v", err)
	}
}
