package ca

import "crypto/fips140"

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
