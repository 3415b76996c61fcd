//go:build race

package hbone

// raceEnabled: the race detector makes pools forget at random.
const raceEnabled = true
