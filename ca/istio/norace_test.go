//go:build !race

package istio_test

const raceEnabled = false
