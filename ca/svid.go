package ca

import (
	"crypto/tls"
	"crypto/x509"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// SVID is a certificate with its key, and the bundles by which its holder
// judges peers. It is immutable.
type SVID struct {
	ID        spiffeid.ID
	Cert      *tls.Certificate // leaf (parsed, in Leaf) and intermediates, never roots
	Bundles   *Bundles
	NotBefore time.Time
	NotAfter  time.Time
	Provider  string
}

// Mode is how strictly a chain is judged (design D1).
type Mode uint8

// Compatible tolerates what Istio CAs in the field leave out; Strict is SPIFFE
// to the letter.
const (
	Strict Mode = iota
	Compatible
)

// Anchor is one certificate that may end a peer's chain.
type Anchor struct {
	Cert     *x509.Certificate
	Provider string
	Mode     Mode
}

// Bundles is a snapshot: trust domain → anchors. It is immutable. Bundles of
// different trust domains are never merged (SPIFFE Federation §4.2).
type Bundles struct {
	Generation uint64 // grows with every change of the content, within one process
	domains    map[spiffeid.TrustDomain][]Anchor
}
