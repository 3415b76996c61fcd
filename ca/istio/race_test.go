//go:build race

package istio_test

// raceEnabled: cryptography takes several times as long.
const raceEnabled = true
