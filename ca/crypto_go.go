//go:build !boringcrypto

package ca

func boringActive() bool { return false }

const postQuantum = true
