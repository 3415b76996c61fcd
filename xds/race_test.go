//go:build race

package xds_test

// raceEnabled: everything takes several times as long.
const raceEnabled = true
