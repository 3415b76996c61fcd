package router

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
)

var old = spiffeid.RequireTrustDomainFromString("old.example")

func TestParse(t *testing.T) {
	for text, want := range map[string][]Rule{
		"ns=payments:spire-delegated,td=old.example:istio,*:istio": {
			{Namespace: "payments", Provider: "spire-delegated"}, {TrustDomain: old, Provider: "istio"}, {Provider: "istio"},
		},
		" ns=a : b ,\t*:c": {{Namespace: "a", Provider: "b"}, {Provider: "c"}},
	} {
		got, err := Parse(text)
		if d := cmp.Diff(want, got, cmp.AllowUnexported(spiffeid.TrustDomain{})); err != nil || d != "" {
			t.Errorf("Parse(%q): %v\n%s", text, err, d)
		}
	}
	for text, want := range map[string][]string{
		"":                    {"an empty rule: want ns=NAMESPACE:PROVIDER"},
		"*:a,":                {"an empty rule"},
		"payments:a":          {`rule "payments:a": match "payments": must be ns=NAMESPACE, td=TRUST-DOMAIN or *`},
		"ns=a":                {`rule "ns=a": names no provider: want MATCH:PROVIDER`},
		"*:":                  {`rule "*:": names no provider`},
		"ns=:a":               {`rule "ns=:a": namespace "": must not be empty`},
		"ns=pay*:a":           {`rule "ns=pay*:a": namespace "pay*": must be of letters`, "no patterns"},
		"ns=..:a":             {`namespace "..": must be`},
		"td=:a":               {`rule "td=:a": trust domain "": must be the name of a trust domain`},
		"td=Old.Example:a":    {`trust domain "Old.Example": must be the name of a trust domain`},
		"td=spiffe://x:a":     {`rule "td=spiffe://x:a": trust domain "spiffe://x": `},
		"sa=x:a,ns=b c:d,*:x": {`match "sa=x": must be`, `namespace "b c": must be`},
		"td=x/ns/y:a":         {`trust domain "x/ns/y"`},
	} {
		got, err := Parse(text)
		for _, w := range want {
			if err == nil || !strings.Contains(err.Error(), w) {
				t.Errorf("Parse(%q) = %v, %v; want an error with %q", text, got, err, w)
			}
		}
	}
	if _, err := NewRule("a", "b", "c"); err == nil || !strings.Contains(err.Error(), `namespace "a" and trust domain "b": a rule has one of them or neither`) {
		t.Errorf("both: %v", err)
	}
}

func TestCheck(t *testing.T) {
	listed := []string{"istio", "spire-delegated"}
	for rules, want := range map[string]string{
		"*:istio": "",
		"ns=a:istio,ns=b:istio,td=a:spire-delegated,*:istio": "",
		"ns=a:vault":                      `rule "ns=a:vault": unknown provider "vault": must be one of those that are listed: istio, spire-delegated`,
		"*:istio,*:istio":                 `rule "*:istio": duplicate: *:istio stands there before`,
		"ns=a:istio,ns=a:spire-delegated": `rule "ns=a:spire-delegated": ns=a:spire-delegated can never be reached: ns=a:istio stands before it`,
		"td=x:istio,td=x:istio":           `rule "td=x:istio": duplicate`,
	} {
		parsed, err := Parse(rules)
		if err != nil {
			t.Fatal(err)
		}
		err = Check(listed, parsed, nil)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("Check(%q) = %v, want %q", rules, err, want)
		}
		a, b := catest.NewProvider("istio"), catest.NewProvider("spire-delegated")
		if _, made := New([]ca.Provider{a, b}, parsed); (made == nil) != (want == "") {
			t.Errorf("New(%q) = %v, want what Check says", rules, made)
		}
	}
	err := Check(listed, []Rule{{Provider: "x"}, {Provider: "y"}}, func(i int) string { return []string{"line 1", "line 2"}[i] })
	for _, want := range []string{`line 1: unknown provider "x"`, `line 2: unknown provider "y"`, "line 2: *:y can never be reached"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q in it", err, want)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	a := catest.NewProvider("a")
	if _, err := New(nil, nil); err == nil || !strings.Contains(err.Error(), "no certificate provider is listed") {
		t.Errorf("no provider: %v", err)
	}
	if _, err := New([]ca.Provider{a, catest.NewProvider("a")}, nil); err == nil || !strings.Contains(err.Error(), `certificate provider "a" is listed twice`) {
		t.Errorf("one name twice: %v", err)
	}
}

// TestFor: the most specific rule wins whatever the order, and without a rule
// it is the first provider.
func TestFor(t *testing.T) {
	providers := []ca.Provider{catest.NewProvider("first"), catest.NewProvider("second"), catest.NewProvider("third")}
	workload := func(id, namespace string) ca.WorkloadRef {
		return ca.WorkloadRef{ID: spiffeid.RequireFromString(id), Namespace: namespace}
	}
	for _, tt := range []struct {
		rules string
		ref   ca.WorkloadRef
		want  string
	}{
		{"", workload("spiffe://td.test/ns/a/sa/b", "a"), "first"},
		{"*:second", workload("spiffe://td.test/ns/a/sa/b", "a"), "second"},
		{"*:second,td=td.test:third", workload("spiffe://td.test/ns/a/sa/b", "a"), "third"},
		{"*:second,td=td.test:third", workload("spiffe://other.test/ns/a/sa/b", "a"), "second"},
		{"*:second,td=td.test:third,ns=a:first", workload("spiffe://td.test/ns/a/sa/b", "a"), "first"},
		{"ns=a:third,td=td.test:second", workload("spiffe://td.test/ns/a/sa/b", "a"), "third"},
		{"ns=a:third", workload("spiffe://td.test/ns/b/sa/b", "b"), "first"},
		// The workload's namespace counts, not what an identity spells.
		{"ns=a:third", workload("spiffe://td.test/ns/a/sa/b", "b"), "first"},
	} {
		var rules []Rule
		if tt.rules != "" {
			var err error
			if rules, err = Parse(tt.rules); err != nil {
				t.Fatal(err)
			}
		}
		r, err := New(providers, rules)
		if err != nil {
			t.Fatal(err)
		}
		if got := r.For(tt.ref).Name(); got != tt.want {
			t.Errorf("%q: %s in %s is served by %s, want %s", tt.rules, tt.ref.ID, tt.ref.Namespace, got, tt.want)
		}
		if d := cmp.Diff(len(providers), len(r.All())); d != "" {
			t.Error(d)
		}
	}
}

func TestEffective(t *testing.T) {
	parsed, err := Parse("td=old.example:a,ns=z:b,ns=a:b")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, r := range Effective([]string{"b", "a"}, parsed) {
		got = append(got, r.String())
	}
	if d := cmp.Diff([]string{"ns=a:b", "ns=z:b", "td=old.example:a", "*:b"}, got); d != "" {
		t.Error(d)
	}
	got = nil
	for _, r := range Effective([]string{"b", "a"}, []Rule{{Provider: "a"}}) {
		got = append(got, r.String())
	}
	if d := cmp.Diff([]string{"*:a"}, got); d != "" {
		t.Error(d)
	}
}
