package ca

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"math/big"
	"sync"
	"time"
)

// RevokedError is the refusal of a certificate that a CRL lists.
type RevokedError struct {
	Serial *big.Int
	Issuer string // its name
	CA     bool   // an intermediate, not the leaf
}

// Error begins with "certificate revoked".
func (e *RevokedError) Error() string {
	what := "certificate"
	if e.CA {
		what = "intermediate certificate"
	}
	return fmt.Sprintf("%s revoked: serial number %x is on the revocation list of %q", what, e.Serial, e.Issuer)
}

// crlSet is the content of one file. It is immutable, but for what was learned of
// its signatures.
type crlSet struct {
	generation uint64
	issuers    map[string]*crlIssuer // by the DER of their names
	lists      int
	entries    int
}

// crlIssuer are the lists under one issuer's name. Several CAs may have that
// name, with a key each: before and after the rotation of a root, for one.
type crlIssuer struct {
	lists []*crlList // highest number first

	mu    sync.RWMutex         // guards byKey
	byKey map[string]crlChoice // by the DER of the public key
}

// crlChoice is what counts for one of the CAs of a name.
type crlChoice struct {
	signed  []*crlList // by its key: the newest of each scope
	foreign []*crlList // not by its key
}

// maxCRLKeys bounds what is remembered of one name.
const maxCRLKeys = 64

// crlList is one list.
type crlList struct {
	list    *x509.RevocationList // only what is needed of it, without entries
	scope   crlScope
	serials map[crlSerial]struct{}
}

// crlSerial is a serial number: what it is made of, and up to 20 bytes (RFC 5280
// §4.1.2.2). It has no pointers, of which lists have a million.
type crlSerial [1 + maxSerial]byte

const maxSerial = 20

// serialKey is the number, or, of longer ones, a digest. A CRL may hold negative
// ones, which no certificate has that crypto/x509 reads.
func serialKey(n *big.Int) (key crlSerial) {
	key[0] = byte(n.Sign() + 1)
	if n.BitLen() <= 8*maxSerial {
		n.FillBytes(key[1:])
		return key
	}
	key[0] |= 0x80
	sum := sha256.Sum256(n.Bytes())
	copy(key[1:], sum[:])
	return key
}

// expired counts the lists that should have been replaced.
func (s *crlSet) expired(now time.Time) (n int) {
	for _, i := range s.issuers {
		for _, l := range i.lists {
			if now.After(l.list.NextUpdate) {
				n++
			}
		}
	}
	return n
}

// check judges a path, leaf first and anchor last.
func (s *crlSet) check(path []*x509.Certificate) error {
	if len(s.issuers) == 0 || len(path) < 2 {
		return nil
	}
	for i, cert := range path[:len(path)-1] {
		lists := s.issuers[string(cert.RawIssuer)]
		if lists == nil {
			continue
		}
		if err := lists.check(cert, path[i+1], i > 0, i+2 < len(path)); err != nil {
			return err
		}
	}
	return nil
}

// check judges cert by the lists of issuer, whose signature on cert was
// verified. isCA says that cert is an intermediate, limited that issuer is one,
// whose key usage counts.
//
// A list that issuer has not signed is of no account if its key identifier says
// that another CA of the same name has, or if issuer has signed one for the same
// certificates. Otherwise it is a damaged or forged list of issuer, and nobody
// below it is believed: the file says that there is something to know, and we
// cannot know it.
func (i *crlIssuer) check(cert, issuer *x509.Certificate, isCA, limited bool) error {
	choice := i.choose(issuer)
	known := false
	for _, l := range choice.signed {
		if !l.scope.covers(cert, isCA) {
			continue
		}
		if limited && hasExtension(issuer, oidKeyUsage) && issuer.KeyUsage&x509.KeyUsageCRLSign == 0 {
			return fmt.Errorf("check revocation: the key usage of intermediate %q does not allow to sign its revocation list", issuer.Subject)
		}
		known = true
		if _, revoked := l.serials[serialKey(cert.SerialNumber)]; revoked {
			return &RevokedError{Serial: cert.SerialNumber, Issuer: issuer.Subject.String(), CA: isCA}
		}
	}
	if known {
		return nil
	}
	for _, l := range choice.foreign {
		if l.scope.covers(cert, isCA) && l.claims(issuer) {
			return fmt.Errorf("check revocation: the revocation list of %q does not bear the signature of that CA", issuer.Subject)
		}
	}
	return nil
}

// claims tells whether l may be meant as a list of issuer.
func (l *crlList) claims(issuer *x509.Certificate) bool {
	own, named := issuer.SubjectKeyId, l.list.AuthorityKeyId
	return len(own) == 0 || len(named) == 0 || bytes.Equal(own, named)
}

// choose finds the lists of one CA. Verifying a signature means hashing the whole
// list, so it is done once for each key.
func (i *crlIssuer) choose(issuer *x509.Certificate) crlChoice {
	i.mu.RLock()
	choice, ok := i.byKey[string(issuer.RawSubjectPublicKeyInfo)]
	i.mu.RUnlock()
	if ok {
		return choice
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if choice, ok = i.byKey[string(issuer.RawSubjectPublicKeyInfo)]; ok {
		return choice // somebody was faster
	}
	seen := make(map[string]bool)
	for _, l := range i.lists {
		if err := issuer.CheckSignature(l.list.SignatureAlgorithm, l.list.RawTBSRevocationList, l.list.Signature); err != nil {
			choice.foreign = append(choice.foreign, l)
		} else if !seen[l.scope.der] {
			seen[l.scope.der] = true
			choice.signed = append(choice.signed, l)
		}
	}
	if i.byKey == nil || len(i.byKey) >= maxCRLKeys {
		i.byKey = make(map[string]crlChoice)
	}
	i.byKey[string(issuer.RawSubjectPublicKeyInfo)] = choice
	return choice
}
