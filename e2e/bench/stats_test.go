//go:build linux

package main

import (
	"math"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestSummarize(t *testing.T) {
	tests := []struct {
		name string
		in   []float64
		want summary
	}{
		{"one", []float64{3}, summary{3, 3, 3, 1}},
		{"two", []float64{4, 2}, summary{3, 2.5, 3.5, 2}},
		{"odd, unsorted", []float64{5, 1, 4, 2, 3}, summary{3, 2, 4, 5}},
		{"even, interpolated", []float64{1, 2, 3, 10}, summary{2.5, 1.75, 4.75, 4}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			before := append([]float64(nil), tt.in...)
			if diff := cmp.Diff(tt.want, summarize(tt.in)); diff != "" {
				t.Errorf("summarize(%v) (-want +got):\n%s", tt.in, diff)
			}
			if diff := cmp.Diff(before, tt.in); diff != "" {
				t.Errorf("summarize changed its input (-before +after):\n%s", diff)
			}
		})
	}
	if got := summarize(nil); got.N != 0 || !math.IsNaN(got.Median) {
		t.Errorf("summarize(nil) = %+v, want N 0 and NaN", got)
	}
}

func TestPairedRatios(t *testing.T) {
	ours := map[int]float64{0: 2, 1: 9, 2: 4, 3: 1}
	theirs := map[int]float64{0: 4, 1: 3, 3: 0, 4: 7}
	if diff := cmp.Diff([]float64{0.5, 3}, pairedRatios(ours, theirs)); diff != "" {
		t.Errorf("pairedRatios (-want +got):\n%s", diff)
	}
	// A disturbance that doubles both sides of one repetition does not move the median of the ratios.
	ours = map[int]float64{0: 2, 1: 2, 2: 4}
	theirs = map[int]float64{0: 4, 1: 4, 2: 8}
	if got := summarize(pairedRatios(ours, theirs)); got != (summary{0.5, 0.5, 0.5, 3}) {
		t.Errorf("paired ratios of a disturbed series: got %+v, want 0.5 throughout", got)
	}
}

func TestParseStat(t *testing.T) {
	const tail = " S 1 2 3 0 -1 4194304 100 0 0 0 250 50 7 9 20 0 5 0 1234 0 0"
	for _, name := range []string{"(ztunnel)", "(a b)", "(odd) name)"} {
		got, err := parseStat("4711 " + name + tail)
		if err != nil || got != 3*time.Second {
			t.Errorf("parseStat with name %s: got %v, %v, want 3s", name, got, err)
		}
	}
	for _, bad := range []string{"", "12 (x", "12 (x) S 1 2", strings.Replace("1 (x)"+tail, " 250 ", " -1 ", 1)} {
		if got, err := parseStat(bad); err == nil {
			t.Errorf("parseStat(%q) = %v, want an error", bad, got)
		}
	}
}

func TestParseResident(t *testing.T) {
	got, err := parseResident("Name:\tx\nVmHWM:\t  9999 kB\nVmRSS:\t   1536 kB\nThreads:\t3\n")
	if err != nil || got != 1536<<10 {
		t.Errorf("parseResident: got %d, %v, want %d", got, err, 1536<<10)
	}
	for _, bad := range []string{"", "VmRSS: 12\n", "VmRSS: x kB\n"} {
		if got, err := parseResident(bad); err == nil {
			t.Errorf("parseResident(%q) = %d, want an error", bad, got)
		}
	}
}

func TestParseSent(t *testing.T) {
	const text = "Inter-|   Receive                                                |  Transmit\n" +
		" face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets\n" +
		"    lo:     100       1    0    0    0     0          0         0      100       1\n" +
		"  pod0:  1234567    10    0    0    0     0          0         0  7654321      20    0    0    0     0       0          0\n"
	if got, err := parseSent(text, "pod0"); err != nil || got != 7654321 {
		t.Errorf("parseSent of pod0: got %d, %v, want 7654321", got, err)
	}
	for _, device := range []string{"pod", "eth0", " face |bytes"} {
		if got, err := parseSent(text, device); err == nil {
			t.Errorf("parseSent of %q = %d, want an error", device, got)
		}
	}
}

// The parsers read what this kernel writes.
func TestParseOwnProcess(t *testing.T) {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	if rss, err := parseResident(string(status)); err != nil || rss < 1<<20 {
		t.Errorf("resident size of this process: got %d, %v, want at least 1 MiB", rss, err)
	}
	stat, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := parseStat(string(stat)); err != nil {
		t.Errorf("CPU time of this process: %v", err)
	}
	devices, err := os.ReadFile("/proc/self/net/dev")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := parseSent(string(devices), "lo"); err != nil {
		t.Errorf("counters of the loopback: %v", err)
	}
}
