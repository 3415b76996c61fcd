package state

import (
	"cmp"
	"slices"
	"strings"
)

// ruleIndex are policies of one scope and kind with an index of their rules, so
// that a connection is compared only with those that have something in common
// with it. It is immutable: with returns a new one, which shares with the old one
// what is the same, so that the change of one policy among thousands is cheap.
//
// A rule stands under each entry of the lists, one of which must hold for the rule
// to match (see keys), or in always if it has no such lists. The entries are
// hashes: what is found under one is a candidate only, whose rule is evaluated in
// full, so that a collision costs time and never changes an answer.
type ruleIndex struct {
	policies []*policy // sorted by key
	always   []posting // sorted by policy and rule, hash is 0
	// postings by their hash: pieces are what a sorted list gives when it is cut
	// by the topmost bits.
	pieces [][]posting
	bits   uint8
	size   int
	uses   []use
}

// posting says that the rule of a policy is a candidate under a hash.
type posting struct {
	hash   uint64
	policy *policy
	rule   int32
}

// before orders candidates as a scan of all policies meets them.
func (p posting) before(o posting) bool { return comparePlaces(p, o) < 0 }

func comparePlaces(a, b posting) int {
	if a.policy == b.policy {
		return cmp.Compare(a.rule, b.rule)
	}
	return strings.Compare(a.policy.key, b.policy.key)
}

func comparePostings(a, b posting) int {
	if a.hash != b.hash {
		return cmp.Compare(a.hash, b.hash)
	}
	if c := strings.Compare(a.policy.key, b.policy.key); c != 0 {
		return c
	}
	return cmp.Compare(a.rule, b.rule)
}

// use counts the entries of a form, so that a lookup looks for no others.
type use struct {
	form keyForm
	n    int
}

// visit gives f each list in which there are candidates for sub. A list is sorted
// by policy and rule as far as its hash is the given one, and ends there.
func (ix *ruleIndex) visit(sub *subject, f func(list []posting, hash uint64)) {
	f(ix.always, 0)
	for _, u := range ix.uses {
		hash, ok := u.form.of(sub)
		if !ok {
			continue
		}
		piece := ix.pieces[hash>>(64-ix.bits)]
		i, _ := slices.BinarySearchFunc(piece, hash, func(p posting, hash uint64) int { return cmp.Compare(p.hash, hash) })
		f(piece[i:], hash)
	}
}

// first returns the first rule that matches, without a policy if none does.
func (ix *ruleIndex) first(sub *subject, e *AuthorizeExplanation) (best posting) {
	ix.visit(sub, func(list []posting, hash uint64) {
		for _, p := range list {
			if p.hash != hash || best.policy != nil && !p.before(best) {
				return
			}
			if p.matches(sub, e) {
				best = p
				return
			}
		}
	})
	return best
}

// all appends the first matching rule of each policy that has one to buf, by the
// order of the policies.
func (ix *ruleIndex) all(sub *subject, e *AuthorizeExplanation, buf []posting) []posting {
	ix.visit(sub, func(list []posting, hash uint64) {
		for _, p := range list {
			if p.hash != hash {
				return
			}
			if p.matches(sub, e) {
				buf = append(buf, p)
			}
		}
	})
	slices.SortFunc(buf, comparePlaces)
	return slices.CompactFunc(buf, func(a, b posting) bool { return a.policy == b.policy })
}

func (p posting) matches(sub *subject, e *AuthorizeExplanation) bool {
	matched := p.policy.rule(p.policy.Rules[p.rule], sub)
	e.evaluated(p.policy, int(p.rule), matched, sub)
	return matched
}

// with returns an index without the policies that are gone and with those that
// are added, nil if none is left; both are sorted by key.
func (ix *ruleIndex) with(gone, added []*policy) *ruleIndex {
	if len(gone)+len(added) == 0 {
		return ix
	}
	if ix == nil {
		ix = &ruleIndex{}
	}
	out, in := collect(gone), collect(added)
	next := &ruleIndex{
		policies: splice(ix.policies, gone, added, comparePolicies),
		always:   splice(ix.always, out.always, in.always, comparePostings),
		uses:     mergeUses(ix.uses, out.uses, in.uses),
		size:     ix.size - len(out.keyed) + len(in.keyed),
	}
	if len(next.policies) == 0 {
		return nil
	}
	next.bits, next.pieces = ix.bits, slices.Clone(ix.pieces)
	if next.pieces == nil {
		next.pieces = [][]posting{nil}
	}
	next.replace(out.keyed, in.keyed)
	next.recut()
	return next
}

// replace takes postings out and puts others in. Pieces that change are copied.
func (ix *ruleIndex) replace(out, in []posting) {
	if len(out) == 0 && ix.bits == 0 && len(ix.pieces[0]) == 0 {
		ix.pieces[0] = in
		return
	}
	shift := 64 - ix.bits
	take := func(list *[]posting, piece uint64) []posting {
		n := 0
		for n < len(*list) && (*list)[n].hash>>shift == piece {
			n++
		}
		head := (*list)[:n]
		*list = (*list)[n:]
		return head
	}
	for len(out)+len(in) > 0 {
		hash := ^uint64(0)
		if len(out) > 0 {
			hash = out[0].hash
		}
		if len(in) > 0 {
			hash = min(hash, in[0].hash)
		}
		piece := hash >> shift
		ix.pieces[piece] = splice(ix.pieces[piece], take(&out, piece), take(&in, piece), comparePostings)
	}
}

// The number of postings that a piece has on average: cut so that it is wanted
// and again when it leaves the bounds.
const (
	pieceMin    = 8
	pieceWanted = 32
	pieceMax    = 64
)

// recut makes pieces of a suitable size.
func (ix *ruleIndex) recut() {
	if average := ix.size >> ix.bits; average <= pieceMax && (average >= pieceMin || ix.bits == 0) {
		return
	}
	whole := slices.Concat(ix.pieces...)
	ix.bits = 0
	for ix.size>>ix.bits > pieceWanted {
		ix.bits++
	}
	ix.pieces = make([][]posting, 1<<ix.bits)
	for i := range ix.pieces {
		n, _ := slices.BinarySearchFunc(whole, uint64(i), func(p posting, i uint64) int {
			if p.hash>>(64-ix.bits) <= i {
				return -1
			}
			return 1
		})
		// A copy, so that a piece which is replaced later does not stay in memory.
		ix.pieces[i] = slices.Clone(whole[:n])
		whole = whole[n:]
	}
}

// collected is what policies have in an index.
type collected struct {
	keyed, always []posting // sorted
	uses          map[keyForm]int
}

func collect(policies []*policy) *collected {
	c := &collected{uses: map[keyForm]int{}}
	var buf []ruleKey
	for _, p := range policies {
		for i, rule := range p.Rules {
			keys, ok := p.keys(rule, buf[:0])
			buf = keys
			if !ok {
				c.always = append(c.always, posting{policy: p, rule: int32(i)})
			}
			for _, k := range keys {
				c.keyed = append(c.keyed, posting{k.hash, p, int32(i)})
				c.uses[k.form]++
			}
		}
	}
	slices.SortFunc(c.keyed, comparePostings)
	c.keyed = slices.Compact(c.keyed)
	return c
}

func mergeUses(old []use, out, in map[keyForm]int) []use {
	n := map[keyForm]int{}
	for _, u := range old {
		n[u.form] = u.n
	}
	for form, count := range in {
		n[form] += count
	}
	for form, count := range out {
		n[form] -= count
	}
	var uses []use
	for form, count := range n {
		if count > 0 {
			uses = append(uses, use{form, count})
		}
	}
	slices.SortFunc(uses, func(a, b use) int {
		return cmp.Or(cmp.Compare(a.form.kind, b.form.kind), cmp.Compare(a.form.bits, b.form.bits))
	})
	return uses
}
