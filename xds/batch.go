package xds

import (
	"errors"
	"maps"
	"slices"

	"github.com/ztunnel-go/ztunnel/state"
	"github.com/ztunnel-go/ztunnel/xds/discoverypb"
)

// batch is the content of one response on its way into a store. Resources are
// taken one by one; the good ones are applied together, atomically, and those
// that are not leave the version that was known before (spec/state-xds-dns.md
// §3.4).
type batch struct {
	store *state.Store
	// Converted, but not applied yet.
	update state.Update
	names  map[resourceKey]string // xDS names of what came under another name than its key
	moves  []move
	moved  map[string]bool // names and keys of moves
	// What a NACK will say, in its order: refused by the conversion or the store,
	// then what was not decodable.
	refused, undecodable []state.Rejected
}

type resourceKey struct {
	kind state.ResourceKind
	key  string
}

// move is a resource whose xDS name is not its key, or has not always been.
type move struct {
	name string
	resourceKey
}

func (b *batch) reject(kind state.ResourceKind, name string, err error) {
	r := state.Rejected{Kind: kind, Name: name, Err: err}
	if errors.Is(err, errDecode) || errors.Is(err, errNoPayload) {
		b.undecodable = append(b.undecodable, r)
		return
	}
	b.refused = append(b.refused, r)
}

// apply carries out u and returns the keys of what the store refuses; a NACK names
// it by its xDS name.
func (b *batch) apply(u state.Update) (refused map[resourceKey]bool) {
	var rejected *state.RejectedError
	if !errors.As(b.store.Apply(u), &rejected) {
		return nil
	}
	refused = map[resourceKey]bool{}
	for _, r := range rejected.Resources {
		k := resourceKey{r.Kind, r.Name}
		refused[k] = true
		if name, ok := b.names[k]; ok {
			r.Name = name
		}
		b.refused = append(b.refused, r)
	}
	return refused
}

// rejected is the outcome, nil if all went well.
func (b *batch) rejected() *state.RejectedError {
	if len(b.refused)+len(b.undecodable) == 0 {
		return nil
	}
	return &state.RejectedError{Resources: append(b.refused, b.undecodable...)}
}

// addresses applies responses of the Address type. It is for one goroutine.
//
// A resource is removed by its xDS name, and the store knows it by its key: the
// UID of a workload, namespace/hostname of a service. The two are the same by
// convention. Where they are not, the resource is applied all the same, and
// addresses remembers the key, by this rule: an object belongs to the name that
// has brought it last, and a name has one object at most. So a name that comes
// with another key takes its former object away, and the removal of a name that
// another one has succeeded takes nothing away. Nothing is remembered of names
// that are keys.
type addresses struct {
	store  *state.Store
	keys   map[string]string // xDS name → key, where they differ
	owners map[string]string // key → xDS name, where they differ
}

func newAddresses(s *state.Store) *addresses {
	return &addresses{store: s, keys: map[string]string{}, owners: map[string]string{}}
}

// apply brings one response into the store: resources, and the xDS names of what
// is removed and of what may have been given up. It returns the resources that
// were not applied, by their xDS names, or nil; a resource without a name and
// without content is neither. It takes the payloads out of resources, so that
// each can be freed when it has been converted.
func (a *addresses) apply(resources []*discoverypb.Resource, removed, stale []string) *state.RejectedError {
	b := &batch{store: a.store, names: map[resourceKey]string{}, moved: map[string]bool{}}
	for _, r := range resources {
		key, kind, err := convertAddress(r, &b.update)
		r.Resource = nil
		switch {
		case errors.Is(err, errSkipped):
		case err != nil:
			b.reject(kind, r.GetName(), err)
		default:
			a.note(b, r.GetName(), resourceKey{kind, key})
		}
	}
	for _, name := range stale {
		if key := a.key(name); a.owner(key) == name {
			b.update.Stale = append(b.update.Stale, key)
		}
	}
	if len(b.moves) > 0 {
		// Who owns what is known only once the store has accepted it.
		refused := b.apply(b.update)
		b.update = state.Update{Removed: a.settle(b.moves, refused)}
	}
	for _, name := range removed {
		if key, ok := a.remove(name); ok {
			b.update.Removed = append(b.update.Removed, key)
		}
	}
	b.apply(b.update)
	return b.rejected()
}

// note remembers for settle what does not follow the convention.
func (a *addresses) note(b *batch, name string, k resourceKey) {
	known := a.key(name) == name && a.owner(name) == name && !b.moved[name] && !b.moved[k.key]
	if name == k.key && known {
		return
	}
	b.names[k] = name
	b.moved[name], b.moved[k.key] = true, true
	b.moves = append(b.moves, move{name, k})
}

// settle notes the moves but those of refused keys, and returns the keys that they
// leave without a name.
func (a *addresses) settle(moves []move, refused map[resourceKey]bool) []string {
	orphans := map[string]bool{}
	for _, m := range moves {
		if refused[m.resourceKey] {
			continue
		}
		if former, ok := a.remove(m.name); ok {
			orphans[former] = true
		}
		delete(orphans, m.key)
		delete(a.owners, m.key)
		if m.name != m.key {
			a.keys[m.name] = m.key
			a.owners[m.key] = m.name
		}
	}
	return slices.Collect(maps.Keys(orphans))
}

// key returns the key of the object that came under an xDS name.
func (a *addresses) key(name string) string {
	if key, ok := a.keys[name]; ok {
		return key
	}
	return name
}

// owner returns the xDS name under which an object came last.
func (a *addresses) owner(key string) string {
	if name, ok := a.owners[key]; ok {
		return name
	}
	return key
}

// remove forgets a name and returns the key of its object, if it still has one.
func (a *addresses) remove(name string) (key string, ok bool) {
	key = a.key(name)
	ok = a.owner(key) == name
	delete(a.keys, name)
	if ok {
		delete(a.owners, key)
	}
	return key, ok
}

// applyAuthorizations brings one response of the Authorization type into the
// store and returns what was not applied, by xDS names, or nil. The xDS name of a
// policy is its key in the store, whatever its content says. Of the resources it
// takes the payloads.
func applyAuthorizations(store *state.Store, resources []*discoverypb.Resource, removed []string) *state.RejectedError {
	b := &batch{store: store}
	for _, r := range resources {
		if err := convertAuthorization(r, &b.update); err != nil {
			b.reject(state.PolicyResource, r.GetName(), err)
		}
		r.Resource = nil
	}
	b.update.RemovedPolicies = removed
	b.apply(b.update)
	return b.rejected()
}
