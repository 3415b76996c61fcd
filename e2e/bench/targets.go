//go:build linux

package main

import "fmt"

// target is one promise: a figure of mode, absolute or as a paired ratio to another mode, and its bound.
type target struct {
	title       string
	measurement string
	figure      string
	mode        string
	against     string // mode that the figure is divided by; empty for an absolute bound
	atLeast     bool   // the bound is a lower one
	bound       float64
	later       bool // a bound of the second stage: printed, not judged
}

// verdict is a target with what was measured.
type verdict struct {
	target
	measured summary
}

// The outcomes of a verdict.
const (
	outcomePass   = "PASS"
	outcomeMiss   = "MISS"
	outcomeNoData = "NO DATA"
	outcomeLater  = "info"
)

// outcome compares the median with the bound.
func (v verdict) outcome() string {
	switch {
	case v.measured.N == 0:
		return outcomeNoData
	case v.later:
		return outcomeLater
	case v.atLeast && v.measured.Median >= v.bound, !v.atLeast && v.measured.Median <= v.bound:
		return outcomePass
	}
	return outcomeMiss
}

// limit writes the bound with its direction.
func (v verdict) limit() string {
	sign := "≤"
	if v.atLeast {
		sign = "≥"
	}
	return fmt.Sprintf("%s %g", sign, v.bound)
}

// targets returns the promises of the first stage, and those of the second that the same runs yield.
func targets() []target {
	var all []target
	ours := func(title, measurement, figure, against string, atLeast bool, bound float64) {
		all = append(all, target{
			title: title, measurement: measurement, figure: figure, mode: modeZtunnel, against: against, atLeast: atLeast, bound: bound,
		})
	}
	for _, kind := range []string{loadUpload, loadDownload} {
		for _, n := range []int{1, 10, 100} {
			id := fmt.Sprintf("%s-%d", kind, n)
			ours("throughput, "+id, id, gbps, modeTLS, true, 0.65)
			ours("CPU per GB, "+id, id, cpuPerGB, modeTLS, false, 1.45)
			ours("throughput, "+id, id, gbps, modeH2, true, 1.3)
			ours("CPU per GB, "+id, id, cpuPerGB, modeH2, false, 0.7)
		}
	}
	for _, n := range []int{1, 10, 100} {
		id := fmt.Sprintf("ping-%d", n)
		ours("CPU per message, "+id, id, cpuPerOp, modeTLS, false, 1.05)
	}
	ours("new connections", "connect", rate, modeRelay, true, 0.9)
	ours("idle stream, KiB per proxy", "idle-streams", rssStream, "", false, 10)
	ours("idle tunnel, KiB per proxy", "idle-tunnels", rssTunnel, "", false, 50)
	ours("ping rate kept beside 8 stalled streams", "stalled-8", kept, "", true, 0.7)
	ours("ping rate kept beside 100 stalled streams", "stalled-100", kept, "", true, 0.7)
	ours("features, throughput", "upload-10", gbps, modeZtunnelPlain, true, 0.95)
	ours("features, CPU per GB", "upload-10", cpuPerGB, modeZtunnelPlain, false, 1.05)
	ours("features, CPU per message", "ping-10", cpuPerOp, modeZtunnelPlain, false, 1.05)
	ours("features, new connections", "connect", rate, modeZtunnelPlain, true, 0.95)
	ours("CPU per new tunnel", "handshake", cpuPerOp, modeBare, false, 1.15)

	first := len(all)
	for _, n := range []int{1, 10, 100} {
		id := fmt.Sprintf("ping-%d", n)
		ours("p50, "+id, id, p50, modeRelay, false, 1.0)
		ours("p99, "+id, id, p99, modeRelay, false, 1.2)
		up := fmt.Sprintf("upload-%d", n)
		ours("throughput, "+up, up, gbps, modeRelayBuf, true, 0.5)
	}
	ours("p50, ping-1", "ping-1", p50, modeDirect, false, 7)
	ours("p50, ping-1", "ping-1", p50, modeH2, false, 0.6)
	ours("throughput, upload-1", "upload-1", gbps, modeDirect, true, 0.12)
	for i := range all[first:] {
		all[first+i].later = true
	}
	return all
}
