package ca

import (
	"bytes"
	"cmp"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"slices"
)

const (
	pemBegin = "-----BEGIN"
	pemCRL   = "X509 CRL"
)

// parseCRLs reads a file: PEM, of which the blocks of other types are skipped,
// or one CRL in DER. No block, and an empty file, are no lists. One bad list
// spoils them all: half of what should be revoked is nothing to go on with.
func parseCRLs(content []byte) (*crlSet, error) {
	set := &crlSet{issuers: make(map[string]*crlIssuer)}
	text := bytes.TrimSpace(content)
	if len(text) == 0 {
		return set, nil
	}
	if !bytes.HasPrefix(text, []byte(pemBegin)) {
		if err := set.add(content); err != nil {
			return nil, fmt.Errorf("%w (it does not begin as PEM, so it should be DER)", err)
		}
		return set, nil
	}
	for rest := text; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != pemCRL {
			continue
		}
		if err := set.add(block.Bytes); err != nil {
			return nil, fmt.Errorf("block %d: %w", set.lists+1, err)
		}
	}
	// The decoder skips what it cannot read, such as a file that was cut short.
	if n := bytes.Count(text, []byte(pemBegin+" "+pemCRL+"-----")); n != set.lists {
		return nil, fmt.Errorf("%d blocks begin and %d can be read: the PEM is damaged or cut short", n, set.lists)
	}
	return set, nil
}

// add parses one list and files it under its issuer, the newest first.
func (s *crlSet) add(der []byte) error {
	l, err := parseCRL(der)
	if err != nil {
		return err
	}
	name := string(l.list.RawIssuer)
	issuer := s.issuers[name]
	if issuer == nil {
		issuer = new(crlIssuer)
		s.issuers[name] = issuer
	}
	at, _ := slices.BinarySearchFunc(issuer.lists, l, compareCRLs)
	issuer.lists = slices.Insert(issuer.lists, at, l)
	s.lists++
	s.entries += len(l.serials)
	return nil
}

// compareCRLs puts the newest first; of equals the one that was inserted last.
func compareCRLs(have, l *crlList) int {
	number := func(l *crlList) *big.Int { return cmp.Or(l.list.Number, new(big.Int)) }
	return cmp.Or(number(l).Cmp(number(have)), l.list.ThisUpdate.Compare(have.list.ThisUpdate))
}

// The extensions of lists and of their entries, RFC 5280 §5.2 and §5.3.
var (
	oidCRLNumber         = asn1.ObjectIdentifier{2, 5, 29, 20}
	oidReasonCode        = asn1.ObjectIdentifier{2, 5, 29, 21}
	oidInvalidityDate    = asn1.ObjectIdentifier{2, 5, 29, 24}
	oidDeltaCRL          = asn1.ObjectIdentifier{2, 5, 29, 27}
	oidDistributionPoint = asn1.ObjectIdentifier{2, 5, 29, 28}
	oidCertificateIssuer = asn1.ObjectIdentifier{2, 5, 29, 29}
	oidAuthorityKeyID    = asn1.ObjectIdentifier{2, 5, 29, 35}
)

// maxCRLNumber is in bytes, RFC 5280 §5.2.3.
const maxCRLNumber = 20

// parseCRL reads one list in DER, and refuses the forms that say more than we
// understand (the identity spec §3.8).
func parseCRL(der []byte) (*crlList, error) {
	parts, err := splitCRL(der)
	if err != nil {
		return nil, err
	}
	l := &crlList{serials: make(map[crlSerial]struct{}, len(parts.entries)/minEntry)}
	var list *x509.RevocationList
	for more := true; more; more = len(parts.entries) > 0 {
		if list, err = parts.next(); err != nil {
			return nil, err
		}
		for _, e := range list.RevokedCertificateEntries {
			if err := checkEntry(e); err != nil {
				return nil, err
			}
			l.serials[serialKey(e.SerialNumber)] = struct{}{}
		}
	}
	switch n := list.Number; {
	case list.SignatureAlgorithm == x509.UnknownSignatureAlgorithm:
		return nil, errors.New("the signature algorithm is not supported")
	case list.NextUpdate.IsZero():
		return nil, errors.New("there is no nextUpdate")
	case n != nil && (n.Sign() < 0 || n.BitLen() > 8*maxCRLNumber):
		return nil, fmt.Errorf("the CRL number is negative or has more than %d bytes", maxCRLNumber)
	}
	if l.scope, err = readExtensions(list); err != nil {
		return nil, err
	}
	l.list = &x509.RevocationList{
		RawTBSRevocationList: parts.tbs, Signature: list.Signature, SignatureAlgorithm: list.SignatureAlgorithm,
		RawIssuer: list.RawIssuer, AuthorityKeyId: list.AuthorityKeyId, Number: list.Number,
		ThisUpdate: list.ThisUpdate, NextUpdate: list.NextUpdate,
	}
	return l, nil
}

// crlParts is a list of which the entries are read bit by bit: crypto/x509 makes
// hundreds of bytes of each, which for a million would be more memory than
// proxies have.
type crlParts struct {
	tbs        []byte // what is signed
	head, tail []byte // of that, what stands around the entries
	entries    []byte // not read yet
	signature  []byte // with its algorithm, as they follow tbs
}

const (
	crlChunk = 64 << 10 // bytes of entries at a time
	minEntry = 34       // bytes of an entry with a serial number of 15
)

// splitCRL finds the entries (RFC 5280 §5.1): the sequence that follows a time.
// What it does not understand is left to crypto/x509.
func splitCRL(der []byte) (*crlParts, error) {
	var list, tbs asn1.RawValue
	rest, err := asn1.Unmarshal(der, &list)
	switch {
	case err != nil:
		return nil, err
	case len(rest) > 0:
		return nil, fmt.Errorf("%d bytes after the list", len(rest))
	}
	p := new(crlParts)
	if p.signature, err = asn1.Unmarshal(list.Bytes, &tbs); err != nil {
		return nil, err
	}
	p.tbs, p.head = tbs.FullBytes, tbs.Bytes
	time := false
	for rest = tbs.Bytes; len(rest) > 0; {
		var e asn1.RawValue
		before := len(tbs.Bytes) - len(rest)
		if rest, err = asn1.Unmarshal(rest, &e); err != nil {
			return nil, err
		}
		if time && e.Class == asn1.ClassUniversal && e.Tag == asn1.TagSequence {
			p.head, p.entries, p.tail = tbs.Bytes[:before], e.Bytes, rest
			break
		}
		time = e.Class == asn1.ClassUniversal && (e.Tag == asn1.TagUTCTime || e.Tag == asn1.TagGeneralizedTime)
	}
	return p, nil
}

// next is the list with some of the entries that were not read yet.
func (p *crlParts) next() (*x509.RevocationList, error) {
	n := 0
	for n < len(p.entries) && n < crlChunk {
		var e asn1.RawValue
		if _, err := asn1.Unmarshal(p.entries[n:], &e); err != nil {
			return nil, err
		}
		n += len(e.FullBytes)
	}
	var entries []byte
	var err error
	if n > 0 {
		if entries, err = sequence(p.entries[:n]); err != nil {
			return nil, err
		}
	}
	p.entries = p.entries[n:]
	tbs, err := sequence(p.head, entries, p.tail)
	if err != nil {
		return nil, err
	}
	der, err := sequence(tbs, p.signature)
	if err != nil {
		return nil, err
	}
	return x509.ParseRevocationList(der)
}

// sequence is a DER SEQUENCE of the elements.
func sequence(elements ...[]byte) ([]byte, error) {
	return asn1.Marshal(asn1.RawValue{Tag: asn1.TagSequence, IsCompound: true, Bytes: slices.Concat(elements...)})
}

func readExtensions(list *x509.RevocationList) (scope crlScope, err error) {
	seen := make(map[string]bool)
	for _, e := range list.Extensions {
		id := e.Id.String()
		if seen[id] {
			return scope, fmt.Errorf("extension %s appears twice", id)
		}
		seen[id] = true
		switch {
		case e.Id.Equal(oidDeltaCRL):
			return scope, errors.New("delta CRLs are not supported")
		case e.Id.Equal(oidDistributionPoint):
			if scope, err = parseScope(e.Value); err != nil {
				return scope, err
			}
		case e.Id.Equal(oidCRLNumber), e.Id.Equal(oidAuthorityKeyID):
		case e.Critical:
			return scope, fmt.Errorf("critical extension %s is not supported", id)
		}
	}
	return scope, nil
}

func checkEntry(e x509.RevocationListEntry) error {
	for _, x := range e.Extensions {
		switch {
		case x.Id.Equal(oidCertificateIssuer):
			return errors.New("indirect CRLs are not supported")
		case x.Id.Equal(oidReasonCode), x.Id.Equal(oidInvalidityDate):
		case x.Critical:
			return fmt.Errorf("critical extension %s of an entry is not supported", x.Id)
		}
	}
	return nil
}

// crlScope says for which certificates of its issuer a list speaks. The zero
// value is all of them.
type crlScope struct {
	der      string // tells scopes apart
	uris     []string
	onlyUser bool
	onlyCA   bool
}

// issuingDistributionPoint is the extension of RFC 5280 §5.2.5.
type issuingDistributionPoint struct {
	DistributionPoint distributionPointName `asn1:"optional,tag:0"`
	OnlyUserCerts     bool                  `asn1:"optional,tag:1"`
	OnlyCACerts       bool                  `asn1:"optional,tag:2"`
	OnlySomeReasons   asn1.BitString        `asn1:"optional,tag:3"`
	Indirect          bool                  `asn1:"optional,tag:4"`
	OnlyAttributes    bool                  `asn1:"optional,tag:5"`
}

type distributionPointName struct {
	FullName     []asn1.RawValue  `asn1:"optional,tag:0"`
	RelativeName pkix.RDNSequence `asn1:"optional,tag:1"`
}

func parseScope(der []byte) (crlScope, error) {
	const tagURI = 6 // GeneralName.uniformResourceIdentifier, RFC 5280 §4.2.1.6
	var p issuingDistributionPoint
	rest, err := asn1.Unmarshal(der, &p)
	switch {
	case err != nil:
		return crlScope{}, fmt.Errorf("issuing distribution point: %w", err)
	case len(rest) > 0:
		return crlScope{}, errors.New("issuing distribution point: trailing bytes")
	case p.Indirect:
		return crlScope{}, errors.New("indirect CRLs are not supported")
	case p.OnlyAttributes:
		return crlScope{}, errors.New("CRLs of attribute certificates are not supported")
	case p.OnlySomeReasons.BitLength > 0:
		return crlScope{}, errors.New("CRLs for some reasons only are not supported")
	case p.OnlyUserCerts && p.OnlyCACerts:
		return crlScope{}, errors.New("issuing distribution point: only user and only CA certificates")
	case len(p.DistributionPoint.RelativeName) > 0:
		return crlScope{}, errors.New("issuing distribution point: a relative name is not supported")
	}
	scope := crlScope{der: string(der), onlyUser: p.OnlyUserCerts, onlyCA: p.OnlyCACerts}
	for _, n := range p.DistributionPoint.FullName {
		if n.Class == asn1.ClassContextSpecific && n.Tag == tagURI {
			scope.uris = append(scope.uris, string(n.Bytes))
		}
	}
	return scope, nil
}

// covers tells whether the list speaks for cert.
func (s crlScope) covers(cert *x509.Certificate, isCA bool) bool {
	if s.onlyUser && isCA || s.onlyCA && !isCA {
		return false
	}
	return len(s.uris) == 0 || len(cert.CRLDistributionPoints) == 0 ||
		slices.ContainsFunc(s.uris, func(u string) bool { return slices.Contains(cert.CRLDistributionPoints, u) })
}
