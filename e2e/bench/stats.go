//go:build linux

package main

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// summary is the median of a series with its inter-quartile range.
type summary struct {
	Median float64 `json:"median"`
	Q1     float64 `json:"q1"`
	Q3     float64 `json:"q3"`
	N      int     `json:"n"`
}

// summarize returns the summary of xs. An empty series has N 0 and NaN in every other field.
func summarize(xs []float64) summary {
	return summary{
		Median: quantile(xs, 0.5),
		Q1:     quantile(xs, 0.25),
		Q3:     quantile(xs, 0.75),
		N:      len(xs),
	}
}

// quantile returns the q-quantile of xs, 0 ≤ q ≤ 1, interpolated linearly between the two nearest ranks.
// xs need not be sorted and is left alone.
func quantile(xs []float64, q float64) float64 {
	if len(xs) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(xs))
	rank := q * float64(len(sorted)-1)
	low := int(math.Floor(rank))
	high := int(math.Ceil(rank))
	return sorted[low] + (rank-float64(low))*(sorted[high]-sorted[low])
}

// pairedRatios divides numerator by denominator repetition by repetition: a disturbance of the machine that lasts
// longer than one repetition then hits both sides of a ratio. Repetitions that only one side has, or whose
// denominator is zero, are left out.
func pairedRatios(numerator, denominator map[int]float64) []float64 {
	var ratios []float64
	for rep, n := range numerator {
		if d, ok := denominator[rep]; ok && d != 0 {
			ratios = append(ratios, n/d)
		}
	}
	slices.Sort(ratios)
	return ratios
}

// clockTick is the unit of the times in /proc/PID/stat: USER_HZ, which is 100 on every Linux architecture of Go.
const clockTick = 10 * time.Millisecond

// parseStat returns user plus system CPU time from the content of /proc/PID/stat (proc(5), fields 14 and 15).
func parseStat(stat string) (time.Duration, error) {
	// The command name stands in parentheses and may hold spaces and parentheses itself.
	end := strings.LastIndexByte(stat, ')')
	if end < 0 {
		return 0, fmt.Errorf("parse process stat %q: no command name", stat)
	}
	fields := strings.Fields(stat[end+1:])
	const user, system = 14 - 3, 15 - 3 // fields starts with field 3
	if len(fields) <= system {
		return 0, fmt.Errorf("parse process stat %q: %d fields after the name, want at least %d", stat, len(fields), system+1)
	}
	var ticks uint64
	for _, field := range []string{fields[user], fields[system]} {
		n, err := strconv.ParseUint(field, 10, 63)
		if err != nil {
			return 0, fmt.Errorf("parse process stat: CPU ticks: %w", err)
		}
		ticks += n
	}
	return time.Duration(ticks) * clockTick, nil
}

// parseResident returns the resident set size in bytes from the content of /proc/PID/status.
func parseResident(status string) (int64, error) {
	for line := range strings.Lines(status) {
		value, ok := strings.CutPrefix(line, "VmRSS:")
		if !ok {
			continue
		}
		kib, ok := strings.CutSuffix(strings.TrimSpace(value), " kB")
		if !ok {
			return 0, fmt.Errorf("parse process status: VmRSS %q is not in kB", strings.TrimSpace(value))
		}
		n, err := strconv.ParseInt(kib, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("parse process status: VmRSS: %w", err)
		}
		return n << 10, nil
	}
	return 0, fmt.Errorf("parse process status: no VmRSS line")
}

// parseSent returns the bytes that a device has sent from the content of /proc/net/dev.
func parseSent(text, device string) (int64, error) {
	for line := range strings.Lines(text) {
		name, counters, ok := strings.Cut(line, ":")
		if !ok || strings.TrimSpace(name) != device {
			continue
		}
		const sent = 8 // eight counters of receiving stand before
		fields := strings.Fields(counters)
		if len(fields) <= sent {
			return 0, fmt.Errorf("parse counters of device %s: %d fields, want at least %d", device, len(fields), sent+1)
		}
		n, err := strconv.ParseInt(fields[sent], 10, 64)
		if err != nil {
			return 0, fmt.Errorf("parse counters of device %s: %w", device, err)
		}
		return n, nil
	}
	return 0, fmt.Errorf("parse counters of device %s: no such device", device)
}
