//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"time"
)

// options are the command line of the benchmark.
type options struct {
	ztunnel string // path of the real binary; empty leaves its modes out
	reps    int
	only    []string // groups or measurements; empty for all
	modes   []string // empty for all
	out     string   // file for the Markdown report
	json    string   // file for every sample
	profile string   // directory for the profiles of every measurement
	command string   // as it was typed
}

// sample is what one run yielded.
type sample struct {
	Measurement string  `json:"measurement"`
	Mode        string  `json:"mode"`
	Repetition  int     `json:"repetition"`
	Figures     figures `json:"figures,omitempty"`
	Error       string  `json:"error,omitempty"`
}

// bench is one execution of the plan.
type bench struct {
	options options
	world   *world
	log     io.Writer
	plan    []measurement
	samples []sample
	notes   []note // profiles of the rows that miss
}

// selected leaves out of the plan what the options did not ask for.
func (o options) selected(rows []measurement) ([]measurement, error) {
	known := map[string]bool{}
	var chosen []measurement
	for _, m := range rows {
		known[m.id], known[m.group] = true, true
		if len(o.only) > 0 && !slices.Contains(o.only, m.group) && !slices.Contains(o.only, m.id) {
			continue
		}
		m.modes = slices.DeleteFunc(slices.Clone(m.modes), func(mode string) bool {
			real := mode == modeZtunnel || mode == modeZtunnelPlain
			return real && o.ztunnel == "" || len(o.modes) > 0 && !slices.Contains(o.modes, mode)
		})
		if len(m.modes) > 0 {
			chosen = append(chosen, m)
		}
	}
	for _, name := range o.only {
		if !known[name] {
			return nil, fmt.Errorf("-only %s: no such measurement or group", name)
		}
	}
	if len(chosen) == 0 {
		return nil, errors.New("nothing to measure: -only, -modes and -ztunnel together leave no run")
	}
	return chosen, nil
}

// run executes the plan. In each repetition every measurement goes through its modes in a random order, with fresh
// processes, so that what disturbs the machine for a while hits all modes alike. A run that fails is recorded and the
// rest goes on.
func (b *bench) run(ctx context.Context) error {
	start := time.Now()
	for rep := range b.options.reps {
		for _, m := range b.plan {
			for _, i := range rand.Perm(len(m.modes)) {
				s := sample{Measurement: m.id, Mode: m.modes[i], Repetition: rep}
				var err error
				s.Figures, err = b.one(ctx, m, s.Mode)
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				if err != nil {
					s.Figures, s.Error = nil, err.Error()
				}
				b.samples = append(b.samples, s)
				fmt.Fprintf(b.log, "%5.0fs  %d/%d  %-14s %-14s %s\n",
					time.Since(start).Seconds(), rep+1, b.options.reps, m.id, s.Mode, s.text(m.show))
			}
		}
	}
	return nil
}

func (s sample) text(show []string) string {
	if s.Error != "" {
		return "FAILED: " + strings.ReplaceAll(s.Error, "\n", "; ")
	}
	var parts []string
	for _, name := range show {
		if value, ok := s.Figures[name]; ok {
			parts = append(parts, fmt.Sprintf("%s %s", number(value), name))
		}
	}
	return strings.Join(parts, "  ")
}

// one starts the proxies of mode, runs m once and stops them.
func (b *bench) one(ctx context.Context, m measurement, mode string) (figures, error) {
	s, err := b.world.startSubject(ctx, mode, b.options.ztunnel, m.env)
	if err != nil {
		return nil, err
	}
	defer s.stop()
	f, err := m.run(ctx, b, s, m.load)
	for name, value := range f {
		if math.IsNaN(value) || math.IsInf(value, 0) {
			return nil, fmt.Errorf("%s is %v: nothing was done", name, value)
		}
	}
	return f, err
}

// series returns one figure by repetition.
func (b *bench) series(measurement, mode, figure string) map[int]float64 {
	values := map[int]float64{}
	for _, s := range b.samples {
		if value, ok := s.Figures[figure]; ok && s.Measurement == measurement && s.Mode == mode {
			values[s.Repetition] = value
		}
	}
	return values
}

// verdicts judges the targets whose measurements were part of the plan.
func (b *bench) verdicts() []verdict {
	var judged []verdict
	for _, t := range targets() {
		i := slices.IndexFunc(b.plan, func(m measurement) bool { return m.id == t.measurement })
		if i < 0 || !slices.Contains(b.plan[i].modes, t.mode) || t.against != "" && !slices.Contains(b.plan[i].modes, t.against) {
			continue
		}
		ours := b.series(t.measurement, t.mode, t.figure)
		var values []float64
		if t.against != "" {
			values = pairedRatios(ours, b.series(t.measurement, t.against, t.figure))
		} else {
			for _, value := range ours {
				values = append(values, value)
			}
		}
		judged = append(judged, verdict{target: t, measured: summarize(values)})
	}
	return judged
}

// failures lists the runs that yielded nothing.
func (b *bench) failures() []string {
	var lines []string
	for _, s := range b.samples {
		if s.Error != "" {
			lines = append(lines, fmt.Sprintf("%s, %s, repetition %d: %s", s.Measurement, s.Mode, s.Repetition+1, s.Error))
		}
	}
	return lines
}

// execute builds the stage, runs the plan and writes the reports. It needs root.
func execute(ctx context.Context, o options, stdout, stderr io.Writer) (err error) {
	rows, err := o.selected(plan())
	if err != nil {
		return err
	}
	if o.profile != "" {
		if err := os.MkdirAll(o.profile, 0o755); err != nil {
			return fmt.Errorf("make the directory for profiles: %w", err)
		}
	}
	w, err := newWorld(ctx)
	if err != nil {
		return fmt.Errorf("build the stage: %w", err)
	}
	defer func() { err = errors.Join(err, w.close()) }()
	b := &bench{options: o, world: w, log: stderr, plan: rows}
	runErr := b.run(ctx)
	if runErr == nil {
		runErr = b.explain(ctx)
	}
	r := b.report()
	if _, err := io.WriteString(stdout, r.table()); err != nil {
		return fmt.Errorf("print the table: %w", err)
	}
	if runErr != nil {
		return fmt.Errorf("the run was cut short, no files were written: %w", runErr)
	}
	if o.json != "" {
		if err := r.writeJSON(o.json); err != nil {
			return err
		}
	}
	if o.out != "" {
		if err := os.WriteFile(o.out, []byte(r.markdown()), 0o644); err != nil {
			return fmt.Errorf("write the report: %w", err)
		}
	}
	if failed := b.failures(); len(failed) > 0 {
		return fmt.Errorf("%d runs failed:\n%s", len(failed), strings.Join(failed, "\n"))
	}
	return nil
}
