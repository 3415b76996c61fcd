package ca

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"crypto/x509"
	"slices"
	"sync/atomic"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// generations numbers the contents of bundles. It carries no state: only the
// order in which the numbers are given out.
var generations atomic.Uint64

// digest identifies a content.
type digest [sha256.Size]byte

// NewBundles takes a snapshot of anchors by trust domain. A trust domain
// without anchors stays in the snapshot: it says that every certificate of that
// trust domain is refused. Duplicates (same certificate, provider, mode and alias)
// are kept once, anchors without a certificate not at all. The maps and slices
// are copied, the certificates must not be changed afterwards.
func NewBundles(anchors map[spiffeid.TrustDomain][]Anchor) *Bundles {
	b := &Bundles{
		domains: make(map[spiffeid.TrustDomain][]Anchor, len(anchors)),
		pools:   make(map[spiffeid.TrustDomain]*x509.CertPool, len(anchors)),
	}
	for td, as := range anchors {
		list := make([]Anchor, 0, len(as))
		for _, a := range as {
			if a.Cert != nil {
				list = append(list, a)
			}
		}
		slices.SortStableFunc(list, compareAnchors)
		list = slices.CompactFunc(list, func(x, y Anchor) bool { return compareAnchors(x, y) == 0 })
		pool := x509.NewCertPool()
		for _, a := range list {
			pool.AddCert(a.Cert)
		}
		b.domains[td] = slices.Clip(list)
		b.pools[td] = pool
	}
	b.digest = b.sum()
	b.Generation = generations.Add(1)
	return b
}

func compareAnchors(a, b Anchor) int {
	return cmp.Or(bytes.Compare(a.Cert.Raw, b.Cert.Raw), cmp.Compare(a.Provider, b.Provider), cmp.Compare(a.Mode, b.Mode), a.origin.Compare(b.origin))
}

// sum is independent of the order in which anchors were given.
func (b *Bundles) sum() (d digest) {
	h := sha256.New()
	for _, td := range b.Domains() {
		h.Write([]byte(td.Name()))
		h.Write([]byte{0})
		for _, a := range b.domains[td] {
			der := sha256.Sum256(a.Cert.Raw)
			h.Write(der[:])
			h.Write([]byte(a.Provider))
			h.Write([]byte{0, byte(a.Mode)})
			h.Write([]byte(a.origin.Name()))
			h.Write([]byte{0})
		}
		h.Write([]byte{0xff}) // in no trust domain name: the end of the list
	}
	h.Sum(d[:0])
	return d
}

// Anchors are the anchors of td, sorted by certificate. The caller must not
// change the slice. A nil Bundles has none.
func (b *Bundles) Anchors(td spiffeid.TrustDomain) []Anchor {
	if b == nil {
		return nil
	}
	return b.domains[td]
}

// Has reports whether there is a bundle for td, be it empty.
func (b *Bundles) Has(td spiffeid.TrustDomain) bool {
	if b == nil {
		return false
	}
	_, ok := b.domains[td]
	return ok
}

// Domains are the trust domains that have a bundle, sorted by name.
func (b *Bundles) Domains() []spiffeid.TrustDomain {
	if b == nil {
		return nil
	}
	tds := make([]spiffeid.TrustDomain, 0, len(b.domains))
	for td := range b.domains {
		tds = append(tds, td)
	}
	slices.SortFunc(tds, func(x, y spiffeid.TrustDomain) int { return x.Compare(y) })
	return tds
}

// Equal reports whether both have the same content, whatever their generation.
func (b *Bundles) Equal(o *Bundles) bool {
	if b == nil || o == nil {
		return b == o
	}
	return b == o || b.digest == o.digest
}

// Keep returns old if it has the content of b, otherwise b: an unchanged
// bundle keeps its generation.
func (b *Bundles) Keep(old *Bundles) *Bundles {
	if b.Equal(old) {
		return old
	}
	return b
}

// WithAliases registers the bundle of own for every alias that has none. It is
// for providers with one CA and no trust domains in their protocol (design D2);
// never for a backend that delivers bundles by trust domain. An intermediate that
// names own may sign for the alias (R26): it is the same mesh under another name.
func (b *Bundles) WithAliases(own spiffeid.TrustDomain, aliases ...spiffeid.TrustDomain) *Bundles {
	if !b.Has(own) || !slices.ContainsFunc(aliases, func(a spiffeid.TrustDomain) bool { return !b.Has(a) }) {
		return b
	}
	m := make(map[spiffeid.TrustDomain][]Anchor, len(b.domains)+len(aliases))
	for td, as := range b.domains {
		m[td] = as
	}
	for _, a := range aliases {
		if b.Has(a) {
			continue
		}
		m[a] = slices.Clone(b.domains[own])
		for i := range m[a] {
			m[a][i].origin = own
		}
	}
	return NewBundles(m)
}

// only are the anchors of td, and of the aliases for which they are registered.
func (b *Bundles) only(td spiffeid.TrustDomain) *Bundles {
	m := make(map[spiffeid.TrustDomain][]Anchor)
	for domain, as := range b.domains {
		if domain == td || len(as) > 0 && as[0].origin == td {
			m[domain] = as
		}
	}
	return NewBundles(m)
}

// Union joins bundles per trust domain: an anchor of one trust domain never
// counts for another (R30). Nil entries are skipped. When all others add
// nothing, the first one is returned as it is, with its generation.
func Union(bundles ...*Bundles) *Bundles {
	m := make(map[spiffeid.TrustDomain][]Anchor)
	var first *Bundles
	n := 0
	for _, b := range bundles {
		if b == nil {
			continue
		}
		if first == nil {
			first = b
		}
		n++
		for td, as := range b.domains {
			m[td] = slices.Concat(m[td], as)
		}
	}
	if n == 1 {
		return first
	}
	return NewBundles(m).Keep(first)
}
