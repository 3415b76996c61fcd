package state

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestExplainAuthorize(t *testing.T) {
	s := New(Config{DefaultTrustDomain: "td"})
	good := Match{Principals: []StringMatch{{Exact, "td/ns/good/sa/good"}}}
	bad := Match{Principals: []StringMatch{{Exact, "td/ns/bad/sa/bad"}}}
	port := Match{DestinationPorts: []uint16{80}}
	apply(t, s, Update{Policies: []*Policy{
		{Name: "global", Namespace: "root", Action: Deny, Rules: []Rule{{{bad}}, {{good}, {bad}}}},
		{Name: "never", Namespace: "root", Action: Deny, Rules: []Rule{{{{}}}}},
		{Name: "dry", Namespace: "ns", Scope: PolicyNamespace, Action: Deny, DryRun: true, Rules: []Rule{{}}},
		{Name: "allow", Namespace: "ns", Scope: PolicyNamespace, Rules: []Rule{{{bad}}, {{bad, good}, {}, {port}}, {{good}}}},
		{Name: "named", Namespace: "x", Scope: PolicySelector, Action: Deny, Rules: []Rule{{{port}, {bad}}}},
		{Name: "elsewhere", Namespace: "elsewhere", Scope: PolicyNamespace, Action: Deny, Rules: []Rule{{}}},
	}})
	_ = s.Apply(Update{Policies: []*Policy{{Name: "rejected", Namespace: "ns", ResourceName: "key", Scope: PolicySelector, Rules: []Rule{badRule()}}}})
	c := benchConn(t)
	c.Destination = destination("ns", "x/named", "key", "gone")
	want := AuthorizeExplanation{
		Verdict: Verdict{
			Policy: "ns/allow", Rule: 1, Missing: []string{"gone"},
			Events: []PolicyEvent{{"dry-run: deny policy match", "ns/dry"}, {"allow policy match", "ns/allow"}},
		},
		Policies: []ExplainedPolicy{
			{Key: "ns/dry", Policy: "ns/dry", Reason: reasonNamespace, Scope: PolicyNamespace, Action: Deny, DryRun: true,
				Rules: []ExplainedRule{{Rule: 0, Matched: true}}},
			{Key: "root/global", Policy: "root/global", Reason: reasonGlobal, Action: Deny,
				Rules: []ExplainedRule{{Rule: 1, Matches: []int{0}}}},
			{Key: "root/never", Policy: "root/never", Reason: reasonGlobal, Action: Deny},
			{Key: "x/named", Policy: "x/named", Reason: reasonNamed, Scope: PolicySelector, Action: Deny,
				Rules: []ExplainedRule{{Rule: 0, Matches: []int{0}}}},
			{Key: "ns/allow", Policy: "ns/allow", Reason: reasonNamespace, Scope: PolicyNamespace,
				Rules: []ExplainedRule{{Rule: 1, Matched: true, Matches: []int{1, -1, 0}}}},
			{Key: "key", Policy: "ns/rejected", Reason: reasonNamed, Scope: PolicySelector, Tombstone: true},
		},
	}
	if diff := cmp.Diff(want, s.ExplainAuthorize(c)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(want.Verdict, s.Authorize(c)); diff != "" {
		t.Errorf("Authorize (-want +got):\n%s", diff)
	}
	if e := s.ExplainAuthorize(Conn{}); e.Verdict.Denied == nil || e.Policies != nil {
		t.Errorf("without a destination: %+v", e)
	}
}
