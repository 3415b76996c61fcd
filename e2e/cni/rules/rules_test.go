//go:build linux

package rules

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files")

var cases = []struct {
	name string
	cfg  Config
	v6   bool
}{
	{"istio", Config{}, false},
	{"istio-dns", Config{DNS: true}, false},
	{"istio-dns-ipv6", Config{DNS: true}, true},
	{"istio-ingress-interfaces", Config{Ingress: true, Interfaces: []string{"vm0", "vm1"}}, false},
	{"cilium", Config{Set: Cilium}, false},
	{"cilium-ipv6", Config{Set: Cilium}, true},
}

// The rules of identity-admin-inpod §7.11 and cilium-spire §1.8, word for word.
func TestText(t *testing.T) {
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			got := tc.cfg.Text(tc.v6)
			golden := filepath.Join("testdata", tc.name+".golden")
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(want), got); d != "" {
				t.Errorf("rules (-want +got):\n%s", d)
			}
		})
	}
}

func TestValidate(t *testing.T) {
	for _, tc := range []struct {
		cfg  Config
		want string // part of the error
	}{
		{Config{}, ""},
		{Config{Set: Istio, DNS: true, Ingress: true}, ""},
		{Config{Set: Cilium}, ""},
		{Config{Set: Cilium, DNS: true}, "rule set cilium has no DNS"},
		{Config{Set: Cilium, Ingress: true}, "rule set cilium has no DNS, ingress"},
		{Config{Set: Cilium, Interfaces: []string{"vm0"}}, "rule set cilium has no DNS, ingress or virtual interfaces"},
		{Config{Set: "calico"}, `rule set "calico": want istio or cilium`},
	} {
		err := tc.cfg.Validate()
		if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%+v: got %v, want %q", tc.cfg, err, tc.want)
		}
	}
}

// What is there is replaced in one transaction per table, and nobody else's rule
// is touched.
func TestTransaction(t *testing.T) {
	saved := "# Generated\n*nat\n:PREROUTING ACCEPT [0:0]\n:CILIUM_OUTPUT - [0:0]\n:ISTIO_OUTPUT - [0:0]\n" +
		"-A OUTPUT -j ISTIO_OUTPUT\n-A OUTPUT -j CILIUM_OUTPUT\n-A PREROUTING -j OTHER\nCOMMIT\n*raw\n:ISTIO_PRERT - [0:0]\n-A PREROUTING -j ISTIO_PRERT\nCOMMIT\n"
	there := savedLines(saved)
	set := transaction(Config{}.tables(ipv4), there)
	nat := set[strings.Index(set, "*nat"):]
	for text, want := range map[string]bool{
		":ISTIO_OUTPUT - [0:0]\n": true, "-A OUTPUT -j ISTIO_OUTPUT\n": false, "-A PREROUTING -j ISTIO_PRERT\n": true,
		"-D OUTPUT -j CILIUM_OUTPUT\n-F CILIUM_OUTPUT\n-X CILIUM_OUTPUT\n": true, "OTHER": false,
	} {
		if got := strings.Contains(nat, text); got != want {
			t.Errorf("%q in the table nat: got %t, want %t:\n%s", text, got, want, nat)
		}
	}
	const gone = "*raw\n-D PREROUTING -j ISTIO_PRERT\n-F ISTIO_PRERT\n-X ISTIO_PRERT\nCOMMIT\n" +
		"*nat\n-D OUTPUT -j ISTIO_OUTPUT\n-F ISTIO_OUTPUT\n-X ISTIO_OUTPUT\n-D OUTPUT -j CILIUM_OUTPUT\n-F CILIUM_OUTPUT\n-X CILIUM_OUTPUT\nCOMMIT\n"
	if d := cmp.Diff(gone, transaction(nil, there)); d != "" {
		t.Errorf("removal (-want +got):\n%s", d)
	}
	if got := transaction(nil, nil); got != "" {
		t.Errorf("removal of nothing: got %q, want nothing", got)
	}
}
