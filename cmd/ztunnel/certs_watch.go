package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// watchInterval is the time between two looks at the dump. Each is bounded by
// the patience of fetchDump.
const watchInterval = 2 * time.Second

// certWatch shows what becomes of the certificates until its context ends.
type certWatch struct {
	cmd      *certsCommand
	read     func(context.Context) ([]certEntry, error)
	out      io.Writer
	notes    io.Writer
	terminal bool // redraw, rather than append

	layout table
	shown  []string          // terminal: the rows on it
	before map[string]string // else: what was last written of each row or entry
}

func (c *certsCommand) newWatch(cmd *cobra.Command) *certWatch {
	out := cmd.OutOrStdout()
	return &certWatch{
		cmd: c, read: c.read, out: out, notes: cmd.ErrOrStderr(), terminal: isTerminal(out) && c.output != "json",
	}
}

// run looks until ctx ends, and returns its cause. Only the first look may fail;
// after that the proxy may restart, which is told once for each reason.
func (w *certWatch) run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var failure string
	for first := true; ; first = false {
		select {
		case <-timer.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		entries, err := w.read(ctx)
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil && first:
			return err
		case err != nil && err.Error() != failure:
			failure = err.Error()
			fmt.Fprintln(w.notes, "still watching:", failure)
		case err == nil:
			failure = ""
			if err := w.show(entries, time.Now()); err != nil {
				return err
			}
		}
		timer.Reset(watchInterval)
	}
}

func (w *certWatch) show(entries []certEntry, now time.Time) error {
	chosen, _ := w.cmd.choose(entries)
	rows := w.cmd.rows(chosen, now)
	switch {
	case w.terminal:
		return w.redraw(rows, now)
	case w.cmd.output == "json":
		return w.appendJSON(rows)
	}
	return w.appendLines(rows, now)
}

// redraw writes the whole table anew if it changed.
func (w *certWatch) redraw(rows []certRow, now time.Time) error {
	lines := w.cmd.lines(rows, now)
	keys := make([]string, len(lines))
	for i, l := range lines {
		keys[i] = strings.Join(l, "\x00")
	}
	if w.shown != nil && slices.Equal(keys, w.shown) {
		return nil
	}
	w.shown = keys
	if _, err := io.WriteString(w.out, "\x1b[H\x1b[2J"); err != nil { // home, clear
		return err
	}
	var t table
	return t.write(w.out, slices.Concat(w.cmd.header(), lines), w.cmd.painter(rows, now))
}

// appendLines writes the lines that are new or that changed; an entry that left
// the list has a last line with the status Gone.
func (w *certWatch) appendLines(rows []certRow, now time.Time) error {
	var lines [][]string
	if w.before == nil {
		lines = w.cmd.header()
	}
	current := map[string]string{}
	texts := w.cmd.lines(rows, now)
	for i, key := range rowKeys(rows) {
		current[key] = strings.Join(texts[i], "\x00")
		if w.before[key] != current[key] {
			lines = append(lines, texts[i])
		}
	}
	gone := certRows(w.gone(rows))
	lines = append(lines, w.cmd.lines(gone, now)...)
	w.before = current
	return w.layout.write(w.out, lines, nil)
}

// appendJSON writes each entry that is new or that changed as one line.
func (w *certWatch) appendJSON(rows []certRow) error {
	current := map[string]string{}
	gone := w.gone(rows)
	all := entriesOf(rows)
	enc := json.NewEncoder(w.out)
	enc.SetEscapeHTML(false)
	for i, key := range rowKeys(firstRows(all)) {
		b, err := json.Marshal(all[i])
		if err != nil {
			return err
		}
		current[key] = string(b)
		if w.before[key] != current[key] {
			if err := enc.Encode(all[i]); err != nil {
				return err
			}
		}
	}
	for _, e := range gone {
		if err := enc.Encode(e); err != nil {
			return err
		}
	}
	w.before = current
	return nil
}

func firstRows(entries []*certEntry) []certRow {
	rows := make([]certRow, len(entries))
	for i, e := range entries {
		rows[i] = certRow{entry: e, first: true}
	}
	return rows
}

// rowKeys names each row by its identity and its place among the rows of that.
func rowKeys(rows []certRow) []string {
	count := map[string]int{}
	keys := make([]string, len(rows))
	for i, r := range rows {
		keys[i] = fmt.Sprintf("%s\x00%d", r.entry.Identity, count[r.entry.Identity])
		count[r.entry.Identity]++
	}
	return keys
}

// gone are entries in place of the identities that were written before and are
// not in rows.
func (w *certWatch) gone(rows []certRow) (entries []certEntry) {
	present := map[string]bool{}
	for _, r := range rows {
		present[r.entry.Identity] = true
	}
	for key := range w.before {
		id, _, _ := strings.Cut(key, "\x00")
		if !present[id] {
			present[id] = true
			entries = append(entries, certEntry{Identity: id, State: certGone, CertChain: []certInfo{}, RootCerts: []certInfo{}})
		}
	}
	slices.SortFunc(entries, func(a, b certEntry) int { return strings.Compare(a.Identity, b.Identity) })
	return entries
}
