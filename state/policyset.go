package state

import (
	"slices"
	"strings"
)

// policyTable are the policies of a Store as its readers see them.
type policyTable struct {
	policies map[string]*policy    // by key
	sets     map[string]*policySet // of those that apply by scope: by namespace, "" = global
}

func newPolicyTable() policyTable {
	return policyTable{policies: map[string]*policy{}, sets: map[string]*policySet{}}
}

// policyChange is what one update makes of a policyTable: new values by key, nil
// for what goes. It is made once and may be carried out on any number of tables
// that are equal to the one for which it was made.
type policyChange struct {
	policies map[string]*policy
	sets     map[string]*policySet
	// accepted tells whether the update has said anything of policies that counts,
	// be it what was known before (spec/state-xds-dns.md §4.11).
	accepted bool
}

// change says what becomes of t when policies are inserted in their order and then
// the keys are removed. It does not change t. Sets are made anew where their
// policies change; what readers hold is never edited.
func (t *policyTable) change(insert []*policy, remove []string) *policyChange {
	c := &policyChange{policies: map[string]*policy{}, sets: map[string]*policySet{}}
	current := func(key string) *policy {
		if p, ok := c.policies[key]; ok {
			return p
		}
		return t.policies[key]
	}
	for _, p := range insert {
		old := current(p.key)
		switch {
		case p.tombstone && old != nil && !old.tombstone:
			// The last good one stays (decision D7).
		case old != nil && old.equal(p):
			c.accepted = c.accepted || !p.tombstone
		default:
			c.policies[p.key], c.accepted = p, true
		}
	}
	for _, key := range remove {
		if current(key) != nil {
			c.policies[key], c.accepted = nil, true
		}
	}
	scopes := map[string][]string{} // the keys that change, by scope
	for key, p := range c.policies {
		old := t.policies[key]
		if old != nil && old.Scope != PolicySelector {
			scopes[old.scopeNamespace()] = append(scopes[old.scopeNamespace()], key)
		}
		if p != nil && p.Scope != PolicySelector && (old == nil || old.Scope == PolicySelector || old.scopeNamespace() != p.scopeNamespace()) {
			scopes[p.scopeNamespace()] = append(scopes[p.scopeNamespace()], key)
		}
	}
	for ns, keys := range scopes {
		slices.Sort(keys)
		c.sets[ns] = t.set(ns, keys, c.policies)
	}
	return c
}

// set is the set of a namespace after the policies of the keys have changed.
func (t *policyTable) set(ns string, keys []string, next map[string]*policy) *policySet {
	var gone, added [policyKinds][]*policy
	for _, key := range keys {
		if old := t.policies[key]; old != nil && old.in(ns) {
			gone[old.kind()] = append(gone[old.kind()], old)
		}
		if p := next[key]; p != nil && p.in(ns) {
			added[p.kind()] = append(added[p.kind()], p)
		}
	}
	return t.sets[ns].with(gone, added)
}

// apply carries out c.
func (t *policyTable) apply(c *policyChange) {
	assign(t.policies, c.policies)
	assign(t.sets, c.sets)
}

// assign copies what is not nil and deletes the rest.
func assign[V any](m, values map[string]*V) {
	for key, v := range values {
		if v == nil {
			delete(m, key)
		} else {
			m[key] = v
		}
	}
}

// in tells whether p stands in the set of ns.
func (p *policy) in(ns string) bool { return p.Scope != PolicySelector && p.scopeNamespace() == ns }

// scopeNamespace is where a policy is indexed: "" for global ones.
func (p *policy) scopeNamespace() string {
	if p.Scope == PolicyGlobal {
		return ""
	}
	return p.Namespace
}

// policyKind tells policies apart by what they do.
type policyKind uint8

const policyKinds = 4

func kindOf(action Action, dryRun bool) policyKind {
	k := policyKind(action) << 1
	if dryRun {
		k++
	}
	return k
}

func (p *policy) kind() policyKind { return kindOf(p.Action, p.DryRun) }

// policySet are the policies of one scope, by kind. It is immutable.
type policySet struct{ kinds [policyKinds]*ruleIndex }

// index returns the policies of one kind, nil if there are none.
func (set *policySet) index(kind policyKind) *ruleIndex {
	if set == nil {
		return nil
	}
	return set.kinds[kind]
}

// with returns set without gone and with added, nil if nothing is left; both are
// sorted by key.
func (set *policySet) with(gone, added [policyKinds][]*policy) *policySet {
	next := &policySet{}
	empty := true
	for k := range next.kinds {
		next.kinds[k] = set.index(policyKind(k)).with(gone[k], added[k])
		empty = empty && next.kinds[k] == nil
	}
	if empty {
		return nil
	}
	return next
}

func comparePolicies(a, b *policy) int { return strings.Compare(a.key, b.key) }

// splice returns old without gone and with added. All are sorted, gone is a part
// of old, and none is modified.
func splice[T any](old, gone, added []T, compare func(a, b T) int) []T {
	out := make([]T, 0, len(old)-len(gone)+len(added))
	for len(gone)+len(added) > 0 {
		leave := len(added) == 0 || len(gone) > 0 && compare(gone[0], added[0]) <= 0
		head := added
		if leave {
			head = gone
		}
		i, _ := slices.BinarySearchFunc(old, head[0], compare)
		out = append(out, old[:i]...)
		if leave {
			old, gone = old[i+1:], gone[1:]
		} else {
			out = append(out, added[0])
			old, added = old[i:], added[1:]
		}
	}
	return append(out, old...)
}
