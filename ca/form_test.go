package ca_test

import (
	"crypto/x509"
	"slices"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
)

// TestFormMatrix: of the matrix of cases, VerifyForm refuses exactly those whose
// defect does not lie in what a bundle says, by the same rule.
func TestFormMatrix(t *testing.T) {
	w := catest.NewWorld(t)
	trust := []string{ // the presented certificates alone are faultless
		"R24 expired root", "R29 foreign identity by our CA", "R29 our identity by the federated CA", "R29 trust domain without a bundle",
		"R29 unknown CA of the same name", "R29 missing intermediate",
	}
	for _, c := range w.Cases(t) {
		t.Run(c.Name, func(t *testing.T) {
			for _, run := range []struct {
				name       string
				validation ca.Validation
				usage      ca.Usage
				want       string
			}{
				{"default", ca.PerAnchor, ca.Client, c.Strict}, {"strict", ca.AlwaysStrict, ca.Server, c.Strict},
				{"compatible client", ca.AlwaysCompatible, ca.Client, c.Client}, {"compatible server", ca.AlwaysCompatible, ca.Server, c.Server},
			} {
				want := run.want
				if slices.Contains(trust, c.Name) {
					want = ""
				}
				v, err := ca.VerifyForm(c.Chain, ca.VerifyOptions{Validation: run.validation, Usage: run.usage})
				if got := rule(t, err); got != want {
					t.Errorf("%s: refused by %q (%v), want %q", run.name, got, err, want)
				}
				if err == nil && (v.ID.IsZero() || len(v.Path) == 0 || !v.Path[0].Equal(c.Chain[0])) {
					t.Errorf("%s: got %+v", run.name, v)
				}
			}
		})
	}
}

// TestFormOfPresented: what is presented above the leaf is judged, a root among
// it only as the bundle's would be.
func TestFormOfPresented(t *testing.T) {
	td := catest.NewCA(t, "td.test")
	plain := td.Intermediate(t, func(c *x509.Certificate) { c.KeyUsage = 0 })
	below, _ := plain.Leaf(t, catest.GoodID)
	ordinary, _ := td.Leaf(t, catest.GoodID)
	deep, _ := td.Intermediate(t).Intermediate(t).Leaf(t, catest.GoodID)
	twin, _ := td.Renewed(t).Leaf(t, catest.GoodID) // the same issuer's name, another key
	tests := []struct {
		name   string
		chain  []*x509.Certificate
		strict string
		path   int // of what compatible mode accepts
	}{
		{"leaf", ordinary, "", 1},
		{"leaf and root", append(slices.Clone(ordinary), td.Root), "", 2},
		{"leaf and foreign root", append(slices.Clone(ordinary), catest.NewCA(t, "other.test").Root), "", 1},
		{"two intermediates", deep, "", 3},
		{"two intermediates and root", append(slices.Clone(deep), td.Root), "", 4},
		{"the upper intermediate is missing", deep[:2], "", 2},
		{"the lower intermediate is missing", []*x509.Certificate{deep[0], deep[2]}, "", 1},
		{"intermediate without key usage at the top", below, "R25", 2},
		{"a root of the issuer's name with another key", append(slices.Clone(twin), td.Root), "", 1},
		{"nothing", nil, "R24", 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := ca.VerifyForm(tt.chain, ca.VerifyOptions{}); rule(t, err) != tt.strict {
				t.Errorf("strict: got %v, want refusal by %q", err, tt.strict)
			}
			var tolerated []string
			v, err := ca.VerifyForm(tt.chain, ca.VerifyOptions{
				Validation: ca.AlwaysCompatible, Usage: ca.Own, Tolerated: func(rule string) { tolerated = append(tolerated, rule) },
			})
			if (err == nil) != (tt.path > 0) || len(v.Path) != tt.path {
				t.Errorf("compatible: got a path of %d certificates, %v, want %d", len(v.Path), err, tt.path)
			}
			if err == nil && (tt.strict != "") != (len(tolerated) > 0) {
				t.Errorf("tolerated %v where strict mode says %q", tolerated, tt.strict)
			}
		})
	}
}

// TestFormAtATime: validity is of the form.
func TestFormAtATime(t *testing.T) {
	chain, _ := catest.NewCA(t, "td.test").Leaf(t, catest.GoodID, catest.Life(time.Hour))
	for d, want := range map[time.Duration]string{time.Minute: "", 2 * time.Hour: "R24", -time.Hour: "R24"} {
		if _, err := ca.VerifyForm(chain, ca.VerifyOptions{Now: time.Now().Add(d)}); rule(t, err) != want {
			t.Errorf("after %v: got %v, want %q", d, err, want)
		}
	}
}
