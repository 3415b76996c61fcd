package spireagent

import (
	"crypto/x509"
	"slices"
	"time"

	"github.com/ztunnel-go/ztunnel/ca/catest"
)

// authority is what the agent issues from. It is guarded by Agent.mu.
type authority struct {
	root      *catest.CA        // that signs
	roots     []*catest.CA      // the bundle
	federated map[string][]byte // trust domain → certificates, DER
}

// entry is an Entry with its SVID.
type entry struct {
	Entry
	current *issued
}

// issued is one SVID.
type issued struct {
	Leaf  *x509.Certificate
	Chain [][]byte // DER, leaf first
	Key   []byte   // PKCS #8 DER
	renew time.Time
}

// SetEntries replaces all entries. One that is the same as before keeps its SVID.
func (a *Agent) SetEntries(entries ...Entry) {
	a.set(func() {
		before := a.entries
		a.entries = nil
		for _, e := range entries {
			next := &entry{Entry: e}
			for _, old := range before {
				if old.ID == e.ID && slices.Equal(old.Selectors, e.Selectors) && old.Life == e.Life {
					next.current = old.current
				}
			}
			a.entries = append(a.entries, next)
		}
	})
}

// AddEntry adds an entry.
func (a *Agent) AddEntry(e Entry) {
	a.set(func() { a.entries = append(a.entries, &entry{Entry: e}) })
}

// RemoveEntries removes the entries of an identity.
func (a *Agent) RemoveEntries(id string) {
	a.set(func() {
		a.entries = slices.DeleteFunc(a.entries, func(e *entry) bool { return e.ID == id })
	})
}

// SetLife sets the life of SVIDs that are issued from now on.
func (a *Agent) SetLife(d time.Duration) { a.set(func() { a.cfg.Life = d }) }

// Renew issues all SVIDs anew.
func (a *Agent) Renew() { a.set(a.forget) }

// forget is called with the lock held.
func (a *Agent) forget() {
	for _, e := range a.entries {
		e.current = nil
	}
}

// Rotate makes a new root, from which all SVIDs are issued anew. With keep, the
// old ones stay in the bundle.
func (a *Agent) Rotate(keep bool) {
	root := catest.NewCA(a.tb, a.cfg.TrustDomain)
	a.set(func() {
		if !keep {
			a.roots = nil
		}
		a.root, a.roots = root, append(slices.Clip(a.roots), root)
		a.forget()
	})
}

// PrepareRoot puts a new root into the bundle, from which nothing is issued yet:
// [Agent.ActivateRoot] begins to.
func (a *Agent) PrepareRoot() {
	root := catest.NewCA(a.tb, a.cfg.TrustDomain)
	a.set(func() { a.roots = append(slices.Clip(a.roots), root) })
}

// ActivateRoot issues all SVIDs anew, from the newest root of the bundle.
func (a *Agent) ActivateRoot() {
	a.set(func() {
		a.root = a.roots[len(a.roots)-1]
		a.forget()
	})
}

// EmptyBundle empties the bundle of the agent's own trust domain.
func (a *Agent) EmptyBundle() { a.set(func() { a.roots = nil }) }

// CA is the root that issues now.
func (a *Agent) CA() *catest.CA {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.root
}

// Federate sets the bundle of a foreign trust domain; without roots it is empty,
// which says that nobody in it is to be trusted.
func (a *Agent) Federate(td string, roots ...*catest.CA) {
	var der []byte
	for _, r := range roots {
		der = append(der, r.Root.Raw...)
	}
	a.set(func() { a.federated[td] = der })
}

// Defederate removes the bundle of a foreign trust domain.
func (a *Agent) Defederate(td string) { a.set(func() { delete(a.federated, td) }) }

// bundle is that of the agent's own trust domain, DER. It is called with the
// lock held, as all below.
func (a *Agent) bundle() []byte {
	der := []byte{}
	for _, r := range a.roots {
		der = append(der, r.Root.Raw...)
	}
	return der
}

// match are the entries of a workload.
func (a *Agent) match(selectors []string) []*entry {
	var found []*entry
	for _, e := range a.entries {
		if !slices.ContainsFunc(e.Selectors, func(s string) bool { return !slices.Contains(selectors, s) }) {
			found = append(found, e)
		}
	}
	return found
}

// federates are the foreign trust domains of entries, sorted, each once.
func federates(entries []*entry) []string {
	var tds []string
	for _, e := range entries {
		tds = append(tds, e.FederatesWith...)
	}
	slices.Sort(tds)
	return slices.Compact(tds)
}

// svid is the SVID of e, which is renewed at half of its life.
func (a *Agent) svid(e *entry) *issued {
	now := time.Now()
	if e.current != nil && now.Before(e.current.renew) {
		return e.current
	}
	life := a.cfg.Life
	if e.Life != 0 {
		life = e.Life
	}
	chain, signer := a.root.Leaf(a.tb, e.ID, catest.Life(life))
	key, err := x509.MarshalPKCS8PrivateKey(signer)
	if err != nil {
		a.tb.Errorf("fake agent: %v", err)
	}
	e.current = &issued{Leaf: chain[0], Key: key, renew: now.Add(life / 2)}
	for _, c := range chain {
		e.current.Chain = append(e.current.Chain, c.Raw)
	}
	return e.current
}
