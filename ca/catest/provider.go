package catest

import (
	"context"
	"maps"
	"sync"

	"github.com/ztunnel-go/ztunnel/ca"
)

// Provider is a ca.Provider whose answers a test sets. All methods are safe for
// concurrent use.
type Provider struct {
	name   string
	perUID bool

	mu      sync.Mutex // guards what follows
	events  map[ca.Key]ca.Event
	bundles *ca.Bundles
	changed chan struct{} // closed and replaced with each setting
	watches map[ca.Key]int
	hurried map[ca.Key]int
	running int
	runErr  error
}

var _ ca.Provider = (*Provider)(nil)

// NewProvider makes a provider that shares certificates by identity.
func NewProvider(name string) *Provider {
	return &Provider{
		name:    name,
		events:  make(map[ca.Key]ca.Event),
		changed: make(chan struct{}),
		watches: make(map[ca.Key]int),
		hurried: make(map[ca.Key]int),
	}
}

// NewPerWorkload makes a provider that issues one certificate per workload.
func NewPerWorkload(name string) *Provider {
	p := NewProvider(name)
	p.perUID = true
	return p
}

// Name implements ca.Provider.
func (p *Provider) Name() string { return p.name }

// Key implements ca.Provider.
func (p *Provider) Key(w ca.WorkloadRef) ca.Key {
	k := ca.Key{Provider: p.name, ID: w.ID}
	if p.perUID {
		k.UID = w.UID
	}
	return k
}

// Set is the answer for k from now on.
func (p *Provider) Set(k ca.Key, ev ca.Event) { p.update(func() { p.events[k] = ev }) }

// SetBundles is what the provider contributes to all workloads from now on.
func (p *Provider) SetBundles(b *ca.Bundles) { p.update(func() { p.bundles = b }) }

// Fail makes Run return err.
func (p *Provider) Fail(err error) { p.update(func() { p.runErr = err }) }

func (p *Provider) update(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f()
	close(p.changed)
	p.changed = make(chan struct{})
}

// Watches counts the running watches by key.
func (p *Provider) Watches() map[ca.Key]int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.watches)
}

// Hurried counts the calls of Hurry for k.
func (p *Provider) Hurried(k ca.Key) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.hurried[k]
}

// Running reports whether Run runs.
func (p *Provider) Running() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.running > 0
}

// Hurry implements the optional interface.
func (p *Provider) Hurry(k ca.Key) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hurried[k]++
}

// Run implements ca.Provider.
func (p *Provider) Run(ctx context.Context) error {
	p.mu.Lock()
	p.running++
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		p.running--
		p.mu.Unlock()
	}()
	for {
		p.mu.Lock()
		err, changed := p.runErr, p.changed
		p.mu.Unlock()
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// Watch implements ca.Provider.
func (p *Provider) Watch(ctx context.Context, w ca.WorkloadRef, update func(ca.Event)) error {
	k := p.Key(w)
	p.mu.Lock()
	p.watches[k]++
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.watches[k]--; p.watches[k] == 0 {
			delete(p.watches, k)
		}
	}()
	for {
		p.mu.Lock()
		ev, changed := p.events[k], p.changed
		p.mu.Unlock()
		update(ev)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}

// WatchBundles implements ca.Provider.
func (p *Provider) WatchBundles(ctx context.Context, _ ca.WorkloadRef, update func(*ca.Bundles)) error {
	for {
		p.mu.Lock()
		b, changed := p.bundles, p.changed
		p.mu.Unlock()
		if b != nil {
			update(b)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}

// Fixed is a ca.Router that sends everything to its first provider.
type Fixed []ca.Provider

// For implements ca.Router.
func (f Fixed) For(ca.WorkloadRef) ca.Provider {
	if len(f) == 0 {
		return nil
	}
	return f[0]
}

// All implements ca.Router.
func (f Fixed) All() []ca.Provider { return f }
