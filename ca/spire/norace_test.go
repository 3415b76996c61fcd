//go:build !race

package spire

const raceEnabled = false
