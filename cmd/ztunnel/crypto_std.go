//go:build !boringcrypto

package main

// boringEnabled tells whether BoringCrypto does the cryptography.
func boringEnabled() bool { return false }
