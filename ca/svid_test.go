package ca_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
)

// TestID_ID01_ParseIdentity is ID-01, with empty parts and foreign characters
// refused (design D19).
func TestID_ID01_ParseIdentity(t *testing.T) {
	tests := []struct {
		in, ns, sa string
		ok         bool
	}{
		{"spiffe://cluster.local/ns/default/sa/web", "default", "web", true},
		{"spiffe://td/ns/a.b/sa/c-d_e", "a.b", "c-d_e", true},
		{"spiffe://a.b.c/ns/ns/sa/sa", "ns", "sa", true},
		{"spiffe://td/ns//sa/", "", "", false},
		{"spiffe://td/ns/a/sa/", "", "", false},
		{"spiffe:///ns/a/sa/b", "", "", false},
		{"cluster.local/ns/a/sa/b", "", "", false},
		{"https://td/ns/a/sa/b", "", "", false},
		{"SPIFFE://td/ns/a/sa/b", "", "", false},
		{"spiffe://TD/ns/a/sa/b", "", "", false},
		{"spiffe://td/ns/a/sa", "", "", false},
		{"spiffe://td/ns/a/sa/b/c", "", "", false},
		{"spiffe://td/ns/a/sb/b", "", "", false},
		{"spiffe://td/xx/a/sa/b", "", "", false},
		{"spiffe://td/ns/a/b/sa/c", "", "", false},
		{"spiffe://td/ns/a/sa/b/", "", "", false},
		{"spiffe://td/ns/a%20b/sa/c", "", "", false},
		{"spiffe://td/ns/a/sa/b?x", "", "", false},
		{"spiffe://td", "", "", false},
		{"", "", "", false},
	}
	for _, tt := range tests {
		id, err := ca.ParseIdentity(tt.in)
		if (err == nil) != tt.ok {
			t.Errorf("%q: %v, %v, want accepted %v", tt.in, id, err, tt.ok)
			continue
		}
		if !tt.ok {
			if !strings.HasPrefix(err.Error(), "invalid spiffe identity: ") {
				t.Errorf("%q: error %q", tt.in, err)
			}
			continue
		}
		ns, sa, ok := ca.SplitIdentity(id)
		if !ok || ns != tt.ns || sa != tt.sa {
			t.Errorf("%q: split into %q, %q, %v", tt.in, ns, sa, ok)
		}
		if made, err := ca.NewIdentity(id.TrustDomain(), ns, sa); err != nil || made != id {
			t.Errorf("%q: made again %v, %v", tt.in, made, err)
		}
	}
	td := catest.TrustDomain("td")
	for _, parts := range [][2]string{{"", "a"}, {"a", ""}, {"a/b", "c"}, {"a", "ü"}, {"..", "a"}} {
		if id, err := ca.NewIdentity(td, parts[0], parts[1]); err == nil {
			t.Errorf("NewIdentity(%q, %q) = %v, want an error", parts[0], parts[1], id)
		}
	}
	if id, err := ca.NewIdentity(spiffeid.TrustDomain{}, "a", "b"); err == nil {
		t.Errorf("without a trust domain: %v, want an error", id)
	}
}

func TestNewSVIDErrors(t *testing.T) {
	td := catest.NewCA(t, "td.test")
	chain, key := td.Leaf(t, web.String())
	_, foreign := td.Leaf(t, web.String())
	bad, badKey := td.Leaf(t, web.String(), catest.URIs("spiffe://td.test"))
	if _, err := ca.NewSVID("p", nil, key, nil); err == nil {
		t.Error("empty chain: no error")
	}
	if _, err := ca.NewSVID("p", chain, nil, nil); err == nil {
		t.Error("no key: no error")
	}
	if _, err := ca.NewSVID("p", chain, foreign, nil); err == nil {
		t.Error("foreign key: no error")
	}
	var v *ca.VerifyError
	if _, err := ca.NewSVID("p", bad, badKey, nil); !errors.As(err, &v) || v.Rule != "R19" {
		t.Errorf("no path: %v, want R19", err)
	}
}

// TestKeyHygiene is case 67: no rendering of an SVID, or of what holds it,
// shows the key.
func TestKeyHygiene(t *testing.T) {
	td := catest.NewCA(t, "td.test")
	svid := td.SVID(t, web)
	der, err := x509.MarshalPKCS8PrivateKey(svid.Cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	raw := der[36:68] // the private scalar in PKCS#8 of a P-256 key
	var out bytes.Buffer
	for _, h := range []slog.Handler{slog.NewTextHandler(&out, nil), slog.NewJSONHandler(&out, nil)} {
		slog.New(h).InfoContext(context.Background(), "x", "svid", svid, "list", []*ca.SVID{svid}, "event", ca.Event{SVID: svid})
	}
	fmt.Fprintf(&out, "%v %+v %#v %s %v", svid, svid, svid, svid, ca.Event{SVID: svid})
	if err := json.NewEncoder(&out).Encode(map[string]any{"svid": svid}); err != nil {
		t.Fatal(err)
	}
	text := out.String()
	for _, secret := range []string{string(raw), fmt.Sprintf("%x", raw), base64.StdEncoding.EncodeToString(raw)[:40], "PRIVATE", "PrivateKey"} {
		if strings.Contains(text, secret) {
			t.Errorf("the output has key material (%.8q…)", secret)
		}
	}
	if !strings.Contains(text, web.String()) || !strings.Contains(text, svid.Cert.Leaf.SerialNumber.String()) {
		t.Errorf("the output lacks identity or serial: %s", text)
	}
}

func TestBundles(t *testing.T) {
	a, b := catest.NewCA(t, "td.test"), catest.NewCA(t, "td.test")
	tdA, alias := a.TrustDomain, catest.TrustDomain("old.test")
	m := func(as ...ca.Anchor) map[spiffeid.TrustDomain][]ca.Anchor {
		return map[spiffeid.TrustDomain][]ca.Anchor{tdA: as}
	}
	one, two := a.Anchor(ca.Strict), b.Anchor(ca.Strict)
	first := ca.NewBundles(m(one, two))
	same := ca.NewBundles(m(two, one, one, ca.Anchor{}))
	if !first.Equal(same) || same.Keep(first) != first {
		t.Error("order and duplicates make a difference")
	}
	if same.Generation <= first.Generation {
		t.Errorf("generation %d after %d", same.Generation, first.Generation)
	}
	if n := len(same.Anchors(tdA)); n != 2 {
		t.Errorf("%d anchors, want 2", n)
	}
	for name, other := range map[string]*ca.Bundles{
		"nil":          nil,
		"fewer":        ca.NewBundles(m(one)),
		"mode":         ca.NewBundles(m(one, b.Anchor(ca.Compatible))),
		"provider":     ca.NewBundles(m(one, ca.Anchor{Cert: b.Root, Provider: "x"})),
		"domain":       ca.NewBundles(map[spiffeid.TrustDomain][]ca.Anchor{alias: {one, two}}),
		"extra, empty": ca.NewBundles(map[spiffeid.TrustDomain][]ca.Anchor{tdA: {one, two}, alias: nil}),
	} {
		if first.Equal(other) || other != nil && other.Keep(first) == first {
			t.Errorf("%s: equal", name)
		}
	}
	var none *ca.Bundles
	if none.Anchors(tdA) != nil || none.Domains() != nil || none.Has(tdA) {
		t.Error("a nil Bundles has something")
	}

	aliased := first.WithAliases(tdA, alias, tdA)
	if d := cmp.Diff([]string{"old.test", "td.test"}, names(aliased)); d != "" {
		t.Errorf("aliased domains (-want +got):\n%s", d)
	}
	if len(aliased.Anchors(alias)) != 2 || aliased.WithAliases(tdA, alias) != aliased {
		t.Error("the alias has not the bundle of its trust domain, or is registered twice")
	}
	if aliased.Equal(ca.NewBundles(map[spiffeid.TrustDomain][]ca.Anchor{tdA: {one, two}, alias: {one, two}})) {
		t.Error("an alias equals a trust domain of its own")
	}
	own := ca.NewBundles(map[spiffeid.TrustDomain][]ca.Anchor{tdA: {one}, alias: {two}}).WithAliases(tdA, alias)
	if got := own.Anchors(alias); len(got) != 1 || got[0] != two {
		t.Error("the alias lost the bundle that the provider delivers")
	}

	union := ca.Union(nil, ca.NewBundles(m(one)), ca.NewBundles(m(two)), ca.NewBundles(map[spiffeid.TrustDomain][]ca.Anchor{alias: {two}}))
	if len(union.Anchors(tdA)) != 2 || len(union.Anchors(alias)) != 1 {
		t.Errorf("union has %d and %d anchors, want 2 and 1", len(union.Anchors(tdA)), len(union.Anchors(alias)))
	}
	if ca.Union(first, ca.NewBundles(m(one))) != first || ca.Union(nil, first) != first {
		t.Error("a union that adds nothing is another bundle")
	}
	if len(ca.Union().Domains()) != 0 {
		t.Error("the union of nothing has something")
	}
}

func names(b *ca.Bundles) (list []string) {
	for _, td := range b.Domains() {
		list = append(list, td.Name())
	}
	return list
}
