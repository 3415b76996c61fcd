package state_test

import (
	"testing"

	"github.com/ztunnel-go/ztunnel/state"
)

// The xDS name is the key of a policy (spec/state-xds-dns.md §1.3, §4.1), also
// when it is not the namespace/name that logs and errors show.
func TestPolicyIsKeyedByItsResourceName(t *testing.T) {
	s := state.New(state.Config{})
	deny := func() *state.Policy {
		return &state.Policy{
			Name: "p", Namespace: "ns", ResourceName: "other",
			Scope: state.PolicySelector, Action: state.Deny, Rules: []state.Rule{{}},
		}
	}
	verdict := func(named ...string) string {
		t.Helper()
		v := s.Authorize(state.Conn{Destination: &state.Workload{Namespace: "ns", AuthorizationPolicies: named}})
		if v.Denied == nil {
			return "allowed"
		}
		return v.Denied.Policy
	}
	if err := s.Apply(state.Update{Policies: []*state.Policy{deny()}}); err != nil {
		t.Fatal(err)
	}
	if got := verdict("other"); got != "ns/p" {
		t.Errorf("named by its key: got %s, want a denial by ns/p", got)
	}
	if got := verdict("ns/p"); got != "allowed" {
		t.Errorf("named by its content: got %s, want allowed", got)
	}
	if err := s.Apply(state.Update{RemovedPolicies: []string{"ns/p"}}); err != nil || verdict("other") != "ns/p" {
		t.Errorf("removal of another key took the policy away (%v)", err)
	}
	if err := s.Apply(state.Update{RemovedPolicies: []string{"other"}}); err != nil || verdict("other") != "allowed" {
		t.Errorf("removal of the key left the policy (%v)", err)
	}
	if err := s.Apply(state.Update{Tombstones: []*state.Policy{deny()}}); err != nil || verdict("other") != "ns/p" {
		t.Errorf("a tombstone has another key than the policy (%v)", err)
	}
}
