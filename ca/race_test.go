//go:build race

package ca_test

// raceEnabled: cryptography takes several times as long.
const raceEnabled = true
