//go:build linux

package main

import (
	"encoding/json"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// testBench is a bench with two measured repetitions of two modes.
func testBench() *bench {
	b := &bench{options: options{command: "go run ./e2e/bench", reps: 2}, plan: []measurement{{
		id: "upload-1", modes: []string{modeTLS, modeZtunnel}, show: []string{gbps, cpuPerGB},
	}}}
	for rep, f := range []figures{{gbps: 4, cpuPerGB: 2}, {gbps: 8, cpuPerGB: 1}} {
		b.samples = append(b.samples,
			sample{Measurement: "upload-1", Mode: modeTLS, Repetition: rep, Figures: f},
			sample{Measurement: "upload-1", Mode: modeZtunnel, Repetition: rep, Figures: figures{gbps: 0.75 * f[gbps], cpuPerGB: 1.5 * f[cpuPerGB]}})
	}
	return b
}

func TestVerdicts(t *testing.T) {
	var got []string
	for _, v := range testBench().verdicts() {
		got = append(got, strings.Join([]string{v.title, v.against, v.limit(), spread(v.measured), v.outcome()}, " | "))
	}
	want := []string{
		"throughput, upload-1 | tlsB | ≥ 0.65 | 0.75 [0.75–0.75] | PASS",
		"CPU per GB, upload-1 | tlsB | ≤ 1.45 | 1.50 [1.50–1.50] | MISS",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("verdicts (-want +got):\n%s", diff)
	}
}

func TestOutcome(t *testing.T) {
	tests := []struct {
		name    string
		atLeast bool
		later   bool
		n       int
		median  float64
		want    string
	}{
		{"lower bound met exactly", true, false, 5, 1, outcomePass},
		{"lower bound missed", true, false, 5, 0.99, outcomeMiss},
		{"upper bound met exactly", false, false, 5, 1, outcomePass},
		{"upper bound missed", false, false, 5, 1.01, outcomeMiss},
		{"second stage", false, true, 5, 2, outcomeLater},
		{"every run failed", true, false, 0, 0, outcomeNoData},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			v := verdict{target{atLeast: tt.atLeast, later: tt.later, bound: 1}, summary{Median: tt.median, N: tt.n}}
			if got := v.outcome(); got != tt.want {
				t.Errorf("outcome: got %s, want %s", got, tt.want)
			}
		})
	}
}

func TestTable_IsAligned(t *testing.T) {
	text := testBench().report().table()
	for _, want := range []string{
		"upload-1  Gbit/s            CPU s/GB\n",
		"tlsB      6.00 [5.00–7.00]  1.50 [1.25–1.75]\n",
		"ztunnel   4.50 [3.75–5.25]  2.25 [1.88–2.62]\n",
		"CPU per GB, upload-1  tlsB     1.50 [1.50–1.50]  2  ≤ 1.45  MISS\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("table lacks %q:\n%s", want, text)
		}
	}
}

func TestMarkdown_HidesNothing(t *testing.T) {
	b := testBench()
	b.samples = append(b.samples, sample{Measurement: "upload-1", Mode: modeZtunnel, Repetition: 2, Error: "it broke"})
	text := b.report().markdown()
	for _, want := range []string{
		"| CPU per GB, upload-1 | tlsB | 1.50 [1.50–1.50] | 2 | ≤ 1.45 | MISS |\n",
		"* command: `go run ./e2e/bench`\n",
		"* upload-1, ztunnel, repetition 3: it broke\n",
		"| upload-N, download-N | 512 MiB over N streams",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("report lacks %q:\n%s", want, text)
		}
	}
	if strings.Contains(text, "%!") {
		t.Errorf("report has a formatting error:\n%s", text)
	}
}

func TestWriteJSON(t *testing.T) {
	b := testBench()
	b.plan[0].modes = append(b.plan[0].modes, modeH2) // never measured: its ratios are no data, not NaN
	path := filepath.Join(t.TempDir(), "bench.json")
	if err := b.report().writeJSON(path); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		Samples []sample
		Targets []struct{ Outcome string }
	}
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(b.samples, got.Samples); diff != "" {
		t.Errorf("samples (-want +got):\n%s", diff)
	}
	if len(got.Targets) != 4 || got.Targets[2].Outcome != outcomeNoData {
		t.Errorf("targets: got %+v, want four, the third without data", got.Targets)
	}
}

// Every target must find its measurement, its figure and both of its modes in the plan, or it could never be judged.
func TestTargets_AreMeasured(t *testing.T) {
	rows := plan()
	for _, want := range targets() {
		i := slices.IndexFunc(rows, func(m measurement) bool { return m.id == want.measurement })
		if i < 0 {
			t.Errorf("%s: no measurement %s", want.title, want.measurement)
			continue
		}
		m := rows[i]
		if !slices.Contains(m.show, want.figure) {
			t.Errorf("%s: %s has no figure %s", want.title, m.id, want.figure)
		}
		for _, mode := range []string{want.mode, want.against} {
			if mode != "" && !slices.Contains(m.modes, mode) {
				t.Errorf("%s: %s does not run %s", want.title, m.id, mode)
			}
		}
	}
}

func TestSelected(t *testing.T) {
	ids := func(o options) []string {
		t.Helper()
		rows, err := o.selected(plan())
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, m := range rows {
			got = append(got, m.id+":"+strings.Join(m.modes, "+"))
		}
		return got
	}
	if diff := cmp.Diff([]string{"ping-1:relay2+tlsB"}, ids(options{only: []string{"ping-1"}, modes: []string{modeTLS, modeRelay}})); diff != "" {
		t.Errorf("one measurement, two modes (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"handshake:bare"}, ids(options{only: []string{"handshake", "idle-streams"}})); diff != "" {
		t.Errorf("without the binary (-want +got):\n%s", diff)
	}
	for _, bad := range []options{{only: []string{"bulky"}}, {only: []string{"idle-streams"}}} {
		if rows, err := bad.selected(plan()); err == nil {
			t.Errorf("selected(%+v) = %d measurements, want an error", bad, len(rows))
		}
	}
}

func TestParseOptions(t *testing.T) {
	got, err := parseOptions([]string{"-reps", "7", "-only", "bulk,connect", "-modes", "tlsB"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	want := options{
		reps: 7, only: []string{"bulk", "connect"}, modes: []string{modeTLS},
		command: "go run ./e2e/bench -reps 7 -only bulk,connect -modes tlsB",
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(options{})); diff != "" {
		t.Errorf("options (-want +got):\n%s", diff)
	}
	for _, bad := range [][]string{{"-reps", "0"}, {"-modes", "quic"}, {"-ztunnel", "/nonexistent/ztunnel"}, {"extra"}} {
		if _, err := parseOptions(bad, io.Discard); err == nil {
			t.Errorf("parseOptions(%q) succeeded, want an error", bad)
		}
	}
}

func TestLocalFile(t *testing.T) {
	full, plain := localFile(true), localFile(false)
	if len(plain.Policies) != 0 || plain.Policies == nil {
		t.Errorf("policies without features: got %v, want an empty list", plain.Policies)
	}
	rules := 0
	for _, p := range full.Policies {
		rules += len(p.Rules)
	}
	if rules != denyPolicies*denyRules+1 {
		t.Errorf("got %d rules, want %d", rules, denyPolicies*denyRules+1)
	}
	if diff := cmp.Diff(full.Workloads, plain.Workloads, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("the two files differ in more than policies:\n%s", diff)
	}
}

func TestRunChild_RefusesBadOrders(t *testing.T) {
	for _, bad := range []string{"", `{"Role":"load"}`, `{"Role":"juggler","Credentials":"/nonexistent"}`} {
		if err := runChild(t.Context(), bad, strings.NewReader(""), io.Discard); err == nil {
			t.Errorf("runChild(%q) succeeded, want an error", bad)
		}
	}
}
