package ca

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/fips140"
	"crypto/rsa"
	"crypto/x509"
)

// The names of [CryptoProvider], that of the FIPS module without its version.
const (
	CryptoGo     = "go-crypto"
	CryptoFIPS   = "go-fips140-3"
	CryptoBoring = "go-boringcrypto"
)

// CryptoProvider names the cryptographic module of this process (design D4), as
// `ztunnel version` and the dump show it: that of the Go standard library, the Go
// FIPS 140-3 module with its version ("latest" where it is not a frozen one), or
// BoringCrypto.
func CryptoProvider() string {
	switch {
	case boringActive():
		return CryptoBoring
	case fips140.Enabled():
		return CryptoFIPS + " " + fips140.Version()
	}
	return CryptoGo
}

// FIPS reports whether a module made for FIPS 140 does the cryptography of this
// process, which then also limits TLS to what FIPS approves: TLS 1.2 and 1.3, the
// AES-GCM suites, no X25519 by itself. It claims no more than that.
func FIPS() bool { return boringActive() || fips140.Enabled() }

// HasPostQuantum reports whether this build can negotiate X25519MLKEM768, and so
// whether [TLSOptions].PQC lets any handshake succeed.
func HasPostQuantum() bool { return postQuantum }

// checkKeys refuses a path with a key that the FIPS module of this build may not
// use. crypto/tls asks the same of the chains that it verifies itself, and it
// verifies none of ours.
func checkKeys(path []*x509.Certificate) error {
	if !FIPS() {
		return nil
	}
	for _, c := range path {
		approved := false
		switch k := c.PublicKey.(type) {
		case *rsa.PublicKey:
			approved = approvedRSA(k.N.BitLen())
		case *ecdsa.PublicKey:
			approved = k.Curve == elliptic.P256() || k.Curve == elliptic.P384() || k.Curve == elliptic.P521()
		case ed25519.PublicKey:
			approved = approvedEd25519
		}
		if !approved {
			return refuse("FIPS", "%s has no use for the %v key of %q", CryptoProvider(), c.PublicKeyAlgorithm, c.Subject)
		}
	}
	return nil
}
