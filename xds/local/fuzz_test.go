package local

import (
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ztunnel-go/ztunnel/state"
)

// A file either loads as a whole or changes nothing, and what was loaded loads
// again from its own dump.
func FuzzLocalFile(f *testing.F) {
	example, err := os.ReadFile("../../examples/localhost.yaml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(example))
	f.Add(full)
	f.Add(workload("protocol: X"))
	f.Add("a: &a [*a]")
	f.Add("policies: &a\n- *a")
	f.Fuzz(func(t *testing.T, data string) {
		if data == "" {
			return
		}
		store := state.New(state.Config{})
		if err := newSource(t, Config{Inline: workload("uid: before"), Store: store}).Load(); err != nil {
			t.Fatal(err)
		}
		before := encode(t, store.Dump())
		src := newSource(t, Config{Inline: data, Store: store})
		if err := src.Load(); err != nil {
			if diff := cmp.Diff(before, encode(t, store.Dump())); diff != "" {
				t.Fatalf("%v, but (-before +after):\n%s", err, diff)
			}
			return
		}
		static := encode(t, src.StaticConfig())
		again := newSource(t, Config{Inline: static, Store: store})
		if err := again.Load(); err != nil {
			t.Fatalf("the dump of a good file does not load: %v\n%s", err, static)
		}
		if diff := cmp.Diff(static, encode(t, again.StaticConfig())); diff != "" {
			t.Fatalf("dump of the dump (-want +got):\n%s", diff)
		}
	})
}
