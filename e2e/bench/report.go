//go:build linux

package main

import (
	"debug/buildinfo"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"runtime"
	"strings"
	"unicode/utf8"
)

// report is everything that a reader gets to see.
type report struct {
	bench       *bench
	environment [][2]string
	verdicts    []verdict
}

func (b *bench) report() *report {
	return &report{bench: b, environment: environment(b.options), verdicts: b.verdicts()}
}

// environment names what the figures depend on.
func environment(o options) [][2]string {
	facts := [][2]string{
		{"command", o.command},
		{"kernel", kernel()},
		{"CPU", fmt.Sprintf("%s, %d cores", cpuModel(), runtime.NumCPU())},
		{"Go", runtime.Version() + " " + runtime.GOARCH},
		{"repetitions", fmt.Sprint(o.reps)},
	}
	if info, err := buildinfo.ReadFile(o.ztunnel); err == nil {
		text := "built with " + info.GoVersion
		for _, setting := range info.Settings {
			switch setting.Key {
			case "vcs.revision":
				text += ", revision " + setting.Value
			case "vcs.modified":
				if setting.Value == "true" {
					text += " with changes"
				}
			case "-tags":
				text += ", tags " + setting.Value
			}
		}
		facts = append(facts, [2]string{"ztunnel", text})
	}
	return facts
}

func cpuModel() string {
	text, err := os.ReadFile("/proc/cpuinfo")
	if err == nil {
		for line := range strings.Lines(string(text)) {
			if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
				return strings.TrimSpace(value)
			}
		}
	}
	return "unknown CPU"
}

// number writes a figure with three significant digits.
func number(x float64) string {
	switch {
	case math.IsNaN(x):
		return "–"
	case math.Abs(x) >= 100:
		return fmt.Sprintf("%.0f", x)
	case math.Abs(x) >= 10:
		return fmt.Sprintf("%.1f", x)
	}
	return fmt.Sprintf("%.2f", x)
}

// spread writes a median with its inter-quartile range.
func spread(s summary) string {
	if s.N == 0 {
		return "–"
	}
	return fmt.Sprintf("%s [%s–%s]", number(s.Median), number(s.Q1), number(s.Q3))
}

// judgement returns the rows of the table of targets, its heading first.
func (r *report) judgement() [][]string {
	rows := [][]string{{"target", "against", "median [IQR]", "n", "bound", "result"}}
	for _, v := range r.verdicts {
		against, limit := v.against, v.limit()
		if against == "" {
			against = "–"
		}
		if v.later {
			limit = "stage 2: " + limit
		}
		rows = append(rows, []string{v.title, against, spread(v.measured), fmt.Sprint(v.measured.N), limit, v.outcome()})
	}
	return rows
}

// figuresOf returns the rows of the table of measurement m, its heading first.
func (r *report) figuresOf(m measurement) [][]string {
	rows := [][]string{append([]string{m.id}, m.show...)}
	for _, mode := range m.modes {
		row := []string{mode}
		for _, figure := range m.show {
			values := r.bench.series(m.id, mode, figure)
			series := make([]float64, 0, len(values))
			for _, value := range values {
				series = append(series, value)
			}
			row = append(row, spread(summarize(series)))
		}
		rows = append(rows, row)
	}
	return rows
}

// table returns the report for a terminal.
func (r *report) table() string {
	var out strings.Builder
	for _, fact := range r.environment {
		fmt.Fprintf(&out, "%-12s %s\n", fact[0], fact[1])
	}
	for _, m := range r.bench.plan {
		out.WriteString("\n" + aligned(r.figuresOf(m)))
	}
	if len(r.verdicts) > 0 {
		out.WriteString("\n" + aligned(r.judgement()))
	}
	return out.String()
}

func aligned(rows [][]string) string {
	width := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, cell := range row {
			width[i] = max(width[i], utf8.RuneCountInString(cell))
		}
	}
	var out strings.Builder
	for _, row := range rows {
		var line strings.Builder
		for i, cell := range row {
			line.WriteString(cell + strings.Repeat(" ", width[i]-utf8.RuneCountInString(cell)+2))
		}
		out.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
	return out.String()
}

func markdownTable(rows [][]string) string {
	var out strings.Builder
	for i, row := range rows {
		out.WriteString("| " + strings.Join(row, " | ") + " |\n")
		if i == 0 {
			out.WriteString(strings.Repeat("|---", len(row)) + "|\n")
		}
	}
	return out.String()
}

// writeJSON stores every sample and every verdict.
func (r *report) writeJSON(path string) error {
	type row struct {
		Title       string  `json:"title"`
		Measurement string  `json:"measurement"`
		Figure      string  `json:"figure"`
		Mode        string  `json:"mode"`
		Against     string  `json:"against,omitempty"`
		Bound       string  `json:"bound"`
		Measured    summary `json:"measured"`
		Outcome     string  `json:"outcome"`
	}
	var document struct {
		Environment map[string]string `json:"environment"`
		Samples     []sample          `json:"samples"`
		Targets     []row             `json:"targets"`
	}
	document.Environment = map[string]string{}
	for _, fact := range r.environment {
		document.Environment[fact[0]] = fact[1]
	}
	document.Samples = r.bench.samples
	for _, v := range r.verdicts {
		if v.measured.N == 0 {
			v.measured = summary{} // JSON has no NaN
		}
		document.Targets = append(document.Targets, row{v.title, v.measurement, v.figure, v.mode, v.against, v.limit(), v.measured, v.outcome()})
	}
	text, err := json.MarshalIndent(document, "", "  ")
	if err != nil {
		return fmt.Errorf("encode the samples: %w", err)
	}
	if err := os.WriteFile(path, append(text, '\n'), 0o644); err != nil {
		return fmt.Errorf("write the samples: %w", err)
	}
	return nil
}
