package spire

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
)

// board shows the bundles that one stream delivers for all workloads. Each
// workload sees its own trust domain and those that it federates with, and no
// others (design D2).
type board struct {
	again chan struct{} // one slot: the bundles should be asked for anew

	mu         sync.Mutex // guards what follows
	anchors    map[spiffeid.TrustDomain][]ca.Anchor
	all        *ca.Bundles // the same, to compare with
	err        error       // why there are none yet
	generation uint64
	readers    map[*reader]struct{}
	cut        map[string]*excerpt // by the names of its trust domains
}

// reader wants to know of changes.
type reader struct{ changed func() }

// excerpt is the part of the board that some workloads share.
type excerpt struct {
	bundles    *ca.Bundles
	generation uint64
}

func newBoard() *board {
	return &board{again: make(chan struct{}, 1), readers: make(map[*reader]struct{}), cut: make(map[string]*excerpt)}
}

// errNoBundles is the state before the first message.
var errNoBundles = errors.New("the agent has not sent its bundles yet")

// set replaces everything.
func (b *board) set(anchors map[spiffeid.TrustDomain][]ca.Anchor) {
	all := ca.NewBundles(anchors)
	b.mu.Lock()
	b.err = nil
	changed := b.all == nil || !b.all.Equal(all)
	if changed {
		maps.DeleteFunc(b.cut, func(_ string, e *excerpt) bool { return e.generation != b.generation }) // nobody looked at it since
		b.anchors, b.all = anchors, all
		b.generation++
	}
	b.mu.Unlock()
	if changed {
		b.tell()
	}
}

// fail notes why there are no bundles. What is shown stays.
func (b *board) fail(err error) {
	b.mu.Lock()
	changed := b.all == nil && text(b.err) != text(err)
	if changed {
		b.err = err
	}
	b.mu.Unlock()
	if changed {
		b.tell()
	}
}

// subscribe has changed called after each change, by the goroutine that makes
// it, until stop has been called, and perhaps once more.
func (b *board) subscribe(changed func()) (stop func()) {
	r := &reader{changed}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.readers[r] = struct{}{}
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.readers, r)
	}
}

// tell tells the readers that something has changed.
func (b *board) tell() {
	b.mu.Lock()
	readers := slices.Collect(maps.Keys(b.readers))
	b.mu.Unlock()
	for _, r := range readers {
		r.changed()
	}
}

// ask wants the bundles to be asked for anew: the agent does not take back one
// that is gone within a stream.
func (b *board) ask() {
	select {
	case b.again <- struct{}{}:
	default: // asked already
	}
}

// bundles are those of own and of federates, as far as they are there. The only
// error is that none have come yet.
func (b *board) bundles(own spiffeid.TrustDomain, federates []spiffeid.TrustDomain) (*ca.Bundles, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.all == nil {
		if b.err != nil {
			return nil, fmt.Errorf("%w: %w", errNoBundles, b.err)
		}
		return nil, errNoBundles
	}
	domains := slices.Clone(federates)
	domains = append(domains, own)
	slices.SortFunc(domains, byName)
	domains = slices.Compact(domains)
	names := make([]string, len(domains))
	for i, td := range domains {
		names[i] = td.Name()
	}
	key := strings.Join(names, ",")
	e := b.cut[key]
	if e == nil {
		e = new(excerpt)
		b.cut[key] = e
	}
	if e.bundles == nil || e.generation != b.generation {
		part := make(map[spiffeid.TrustDomain][]ca.Anchor, len(domains))
		for _, td := range domains {
			if anchors, ok := b.anchors[td]; ok {
				part[td] = anchors
			}
		}
		e.bundles, e.generation = ca.NewBundles(part).Keep(e.bundles), b.generation
	}
	return e.bundles, nil
}

// distrusts reports whether the agent says that nobody of td is to be trusted: its
// bundle is empty, or gone.
func (b *board) distrusts(td spiffeid.TrustDomain) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.all != nil && len(b.anchors[td]) == 0
}
