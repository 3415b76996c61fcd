package ca

import (
	"bytes"
	"crypto/x509"
	"slices"
	"time"
)

// VerifyForm is [VerifySVID] as far as it goes without a bundle: it judges the
// form of the leaf and of the signing certificates that are presented, their
// validity and their signatures, but not whether anybody trusts them. A chain
// that it accepts can still be refused by [VerifySVID]. Without an override of the mode (opts.Validation) it is strict. Of the result
// Anchor is the zero value, and Path may be the leaf alone. opts.Revoked is not
// asked: it needs an anchor.
func VerifyForm(chain []*x509.Certificate, opts VerifyOptions) (Verified, error) {
	id, err := checkLeaf(chain, opts.Usage)
	if err != nil {
		return Verified{}, err
	}
	if opts.Now.IsZero() {
		opts.Now = time.Now()
	}
	paths, err := verifyPaths(chain, presentedTops(chain), opts)
	if err != nil {
		return Verified{}, err
	}
	mode := opts.Validation.mode(Strict)
	for _, path := range paths {
		signers := path[1:]
		if n := len(signers); n > 0 && bytes.Equal(signers[n-1].RawIssuer, signers[n-1].RawSubject) {
			signers = signers[:n-1] // a root: no bundle would ask more of it
		}
		var tolerated []string
		if tolerated, err = judge(chain[0], signers, id, id.TrustDomain(), mode); err == nil {
			err = checkKeys(path)
		}
		if err == nil {
			opts.tolerate(tolerated)
			return Verified{ID: id, Path: path, Mode: mode, At: opts.Now}, nil
		}
	}
	return Verified{}, err
}

// presentedTops stands in for a bundle: the presented certificates where a path
// must end because none of the others signed them. If none signed the leaf, all
// others are superfluous, or its issuer is missing: no bundle is here to tell.
func presentedTops(chain []*x509.Certificate) *x509.CertPool {
	tops := x509.NewCertPool()
	leaf, others := chain[0], chain[1:]
	signed := func(c *x509.Certificate) bool {
		return slices.ContainsFunc(others, func(o *x509.Certificate) bool {
			return !o.Equal(c) && bytes.Equal(o.RawSubject, c.RawIssuer) &&
				o.CheckSignature(c.SignatureAlgorithm, c.RawTBSCertificate, c.Signature) == nil
		})
	}
	if !signed(leaf) {
		tops.AddCert(leaf)
	}
	some := false
	for _, c := range others {
		if !signed(c) {
			tops.AddCert(c)
			some = true
		}
	}
	if !some { // each signed another
		for _, c := range others {
			tops.AddCert(c)
		}
	}
	return tops
}
