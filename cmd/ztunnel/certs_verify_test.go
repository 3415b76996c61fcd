package main

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
)

func pemOf(certs ...*x509.Certificate) string {
	var b bytes.Buffer
	for _, c := range certs {
		b.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
	}
	return b.String()
}

// jwksOf is a SPIFFE bundle.
func jwksOf(t *testing.T, certs ...*x509.Certificate) string {
	t.Helper()
	b, err := spiffebundle.FromX509Authorities(catest.TrustDomain("td.test"), certs).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestCertsVerifyMatrix: with the bundle of the certificate's trust domain the
// command names the rule of each case of the matrix, for both modes and roles.
func TestCertsVerifyMatrix(t *testing.T) {
	w := catest.NewWorld(t)
	bundles := w.Bundles(ca.Strict)
	for _, c := range w.Cases(t) {
		t.Run(c.Name, func(t *testing.T) {
			m := map[string]string{"chain.pem": pemOf(c.Chain...), "bundle.pem": pemOf(w.Own.Root)}
			args := []string{"certs", "verify", "chain.pem", "--bundle", "bundle.pem", "--trust-domain", "td.test", "-o", "json"}
			if v, err := ca.VerifyForm(c.Chain, ca.VerifyOptions{Validation: ca.AlwaysCompatible}); err == nil {
				if anchors := bundles.Anchors(v.ID.TrustDomain()); len(anchors) > 0 {
					m["bundle.pem"], args[6] = pemOf(anchors[0].Cert), v.ID.TrustDomain().Name()
				}
			}
			code, stdout, stderr := command(t, nil, m, args...)
			var got certVerdict
			if err := json.Unmarshal([]byte(stdout), &got); err != nil {
				t.Fatalf("exit code %d, %q, %v", code, stderr, err)
			}
			want := []string{c.Strict, c.Strict, c.Client, c.Server}
			var rules []string
			for _, j := range got.Judgements {
				rules = append(rules, j.Rule)
				if (j.Rule == "") != j.Accepted || (j.Reason == "") != j.Accepted {
					t.Errorf("judgement %+v", j)
				}
			}
			if !slices.Equal(rules, want) {
				t.Errorf("got the rules %q, want %q", rules, want)
			}
			if wantCode := map[bool]int{true: 0, false: exitCondition}[c.Strict == ""]; code != wantCode || got.Accepted != (code == 0) {
				t.Errorf("got exit code %d (%q), want %d", code, stderr, wantCode)
			}
		})
	}
}

// TestCertsVerify is every flag and outcome in words.
func TestCertsVerify(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // the same time in each run
		td, other := catest.NewCA(t, "td.test"), catest.NewCA(t, "other.test")
		good, _ := td.Intermediate(t).Leaf(t, catest.GoodID)
		cilium, _ := td.Leaf(t, catest.GoodID, func(c *x509.Certificate) { c.ExtKeyUsage = nil; c.KeyUsage = 0 })
		server, _ := td.Leaf(t, catest.GoodID, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} })
		two, _ := td.Leaf(t, catest.GoodID, catest.URIs(catest.GoodID, "spiffe://td.test/ns/a/sa/victim"))
		const key = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"
		files := map[string]string{
			"good.pem": "# text before\n" + pemOf(good...), "cilium.pem": pemOf(cilium...), "server.pem": pemOf(server...), "two.pem": pemOf(two...),
			"withkey.pem": key + pemOf(good...), "superfluous.pem": pemOf(append(slices.Clone(cilium), other.Root)...),
			"bundle.pem": pemOf(other.Root, td.Root), "bundle.json": jwksOf(t, td.Root), "revoked.json": `{"keys":[]}`, "other.pem": pemOf(other.Root),
			"text.pem": "hello", "broken.pem": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "broken.json": `{"keys":[{"use":1}]}`,
		}
		for name, args := range map[string]string{
			"verify_form":                "good.pem",
			"verify_bundle":              "good.pem --bundle bundle.pem",
			"verify_jwks":                "good.pem --bundle bundle.json --trust-domain td.test",
			"verify_all_revoked":         "good.pem --bundle revoked.json",
			"verify_other_authority":     "good.pem --bundle other.pem",
			"verify_other_trust_domain":  "good.pem --bundle bundle.pem --trust-domain other.test",
			"verify_strict_refuses":      "cilium.pem",
			"verify_compatible_decides":  "cilium.pem --validation compatible --bundle bundle.pem",
			"verify_role":                "server.pem --validation compatible",
			"verify_two_identities":      "two.pem",
			"verify_two_and_bundle":      "two.pem --bundle bundle.pem",
			"verify_private_key_skipped": "withkey.pem",
			"verify_superfluous":         "superfluous.pem --validation compatible",
			"verify_json":                "cilium.pem --bundle bundle.pem -o json",
			"verify_no_pem":              "text.pem",
			"verify_broken":              "broken.pem",
			"verify_broken_bundle":       "good.pem --bundle broken.json",
			"verify_empty_bundle":        "good.pem --bundle text.pem",
			"verify_bad_trust_domain":    "good.pem --bundle bundle.pem --trust-domain TD",
		} {
			words := append([]string{"certs", "verify"}, strings.Fields(args)...)
			code, stdout, stderr := command(t, nil, files, words...)
			golden(t, "certs/"+name, script(code, stdout, stderr, words...))
		}
	})
}

// TestCertsVerifyStdin reads what certs --pem writes.
func TestCertsVerifyStdin(t *testing.T) {
	td := catest.NewCA(t, "td.test")
	chain, _ := td.Leaf(t, catest.GoodID)
	for _, args := range []string{"certs verify -", "certs verify - --bundle bundle.pem", "certs verify leaf.pem --bundle -"} {
		var out, errs bytes.Buffer
		text := "# " + catest.GoodID + " Leaf\n" + pemOf(chain[0]) + "# " + catest.GoodID + " Root\n" + pemOf(td.Root)
		if strings.HasSuffix(args, "--bundle -") {
			text = jwksOf(t, td.Root)
		}
		a := &app{stdin: strings.NewReader(text), stdout: &out, stderr: &errs, readFile: files(map[string]string{"bundle.pem": pemOf(td.Root), "leaf.pem": pemOf(chain...)})}
		if code := a.run(t.Context(), strings.Fields(args)); code != 0 || !strings.Contains(out.String(), catest.GoodID) {
			t.Errorf("%s: got exit code %d, %q, %q", args, code, errs.String(), out.String())
		}
	}
}
