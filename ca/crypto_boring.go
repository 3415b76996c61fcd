//go:build boringcrypto

package ca

import (
	"crypto/boring"
	// Limits the TLS of the whole process to what BoringCrypto does: without it
	// Go's own code would serve the rest, X25519 and ChaCha20 among it.
	_ "crypto/tls/fipsonly"
)

// boringActive tells whether BoringCrypto does the cryptography. The toolchain
// has it for Linux on amd64 and arm64.
func boringActive() bool { return boring.Enabled() }

// postQuantum tells whether X25519MLKEM768 can be negotiated.
const postQuantum = false

// What BoringCrypto may use, as crypto/tls has it.
const approvedEd25519 = false

func approvedRSA(bits int) bool { return bits == 2048 || bits == 3072 || bits == 4096 }
