//go:build !boringcrypto

package ca

func boringActive() bool { return false }

const postQuantum = true

// What the Go FIPS 140-3 module may use, as crypto/tls has it.
const approvedEd25519 = true

func approvedRSA(bits int) bool { return bits >= 2048 }
