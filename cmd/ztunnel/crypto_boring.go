//go:build boringcrypto

package main

import "crypto/boring"

// boringEnabled tells whether BoringCrypto does the cryptography.
func boringEnabled() bool { return boring.Enabled() }
