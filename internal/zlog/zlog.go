// Package zlog renders log/slog records in the two formats that ztunnel's users
// parse, filters them by target as RUST_LOG does, and writes them to one output
// in order.
//
// An output that is slow loses no lines: their producers wait. One that has
// taken nothing for a second, such as a pipe that nobody reads, no longer holds
// them up: lines that find the queue full are dropped and counted, until it takes
// something again. Lines are written in batches of up to 64 by one call each, so
// an output counts as slow while it finishes one batch a second.
//
// A logger's target comes from the attribute "component" that is attached with
// [slog.Logger.With]: With("component", "proxy::inbound") logs for the target
// ztunnel::proxy::inbound. The one target outside of that tree is "access". The
// text format leaves the ztunnel:: prefix out, JSON keeps it. In JSON, attributes
// and spans named level, time, scope or message get the prefix "attr.": those keys
// are the line's own.
package zlog

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
)

// LevelTrace is the level below [slog.LevelDebug].
const LevelTrace = slog.Level(-8)

// levelOff is above every level a record can have.
const levelOff = slog.Level(1 << 20)

// QueueLines is how many lines wait for the output before producers wait too.
const QueueLines = 10_000

// Config says where the lines go and which.
type Config struct {
	// Out receives the lines. An Out with a file descriptor (*os.File) is written
	// with vectored writes. Required.
	Out io.Writer
	// JSON selects one JSON object per line instead of the tab separated text.
	JSON bool
	// Filter is a filter in RUST_LOG syntax; "" means "info".
	Filter string
	// Lossy drops lines that find the queue full, and counts them, at once. By
	// default producers wait for room, but together no longer than a second since
	// the output last moved.
	Lossy bool
	// Sync writes each line before the log call returns, without a queue or a
	// goroutine. For commands and tests.
	Sync bool
}

// Log is the process's log. All methods are safe for concurrent use.
type Log struct {
	json    bool
	initial string
	out     sink

	mu      sync.Mutex // guards filter and targets
	filter  filter
	targets map[string]*target
}

// sink takes over finished lines.
type sink interface {
	put(*buffer)
	dropped() uint64
	close(context.Context) error
}

// target is the origin of log lines. Its threshold follows the filter.
type target struct {
	scope string // in full, e.g. ztunnel::proxy::inbound
	short string // without ztunnel::
	level atomic.Int64
}

// New returns a log that accepts lines at once. Unless Config.Sync is set it
// owns one goroutine, which Close ends. The error names the offending clause of
// Config.Filter.
func New(cfg Config) (*Log, error) {
	if cfg.Out == nil {
		return nil, errors.New("zlog: Config.Out is nil")
	}
	levels := cfg.Filter
	if strings.TrimSpace(levels) == "" {
		levels = "info"
	}
	f, err := parseFilter(startupPrefix + levels)
	if err != nil {
		return nil, err
	}
	l := &Log{json: cfg.JSON, initial: startupPrefix + levels, filter: f, targets: make(map[string]*target)}
	if cfg.Sync {
		l.out = newSyncSink(cfg.Out)
	} else {
		l.out = newWriter(vectored(cfg.Out), cfg.Lossy)
	}
	return l, nil
}

// Logger returns a logger without a component. Its target is "ztunnel".
func (l *Log) Logger() *slog.Logger {
	return slog.New(&handler{log: l, target: l.target("")})
}

// Filter renders the filter in force, most specific clause first.
func (l *Log) Filter() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.filter.String()
}

// SetFilter replaces the filter of the whole process by one in RUST_LOG syntax.
// After an error the old one stays.
func (l *Log) SetFilter(s string) error {
	f, err := parseFilter(s)
	if err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.apply(f)
	return nil
}

// Reset brings back the filter of start-up.
func (l *Log) Reset() {
	// The text was parsed by New already.
	_ = l.SetFilter(l.initial)
}

// Extend adds the clauses of levels to the filter in force, or to that of
// start-up if reset is set. It takes the stricter syntax of the /logging
// endpoint: a clause is a lower case level, target=level or target:level. After
// an error, which names the clause, the old filter stays.
func (l *Log) Extend(levels string, reset bool) error {
	if err := checkLevels(levels); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	base := l.filter.String()
	if reset {
		base = l.initial
	}
	f, err := parseFilter(base + "," + levels)
	if err != nil {
		return err
	}
	l.apply(f)
	return nil
}

// Dropped is how many lines were lost: to a full queue of a lossy log or of one
// whose output stands still, to a failed write, or because they came after Close.
func (l *Log) Dropped() uint64 { return l.out.dropped() }

// Close writes what is queued and ends the writer. It waits until ctx ends; if
// the output is still stuck then, it returns the context's error and leaves the
// writer to the end of the process. Lines logged after Close are dropped.
func (l *Log) Close(ctx context.Context) error { return l.out.close(ctx) }

// apply puts f in force. The caller holds l.mu.
func (l *Log) apply(f filter) {
	l.filter = f
	for _, t := range l.targets {
		t.level.Store(int64(f.level(t)))
	}
}

// target returns the target of a component. Components are constants of the
// program, so the set stays small.
func (l *Log) target(component string) *target {
	t := newTarget(component)
	l.mu.Lock()
	defer l.mu.Unlock()
	if known, ok := l.targets[t.scope]; ok {
		return known
	}
	t.level.Store(int64(l.filter.level(t)))
	l.targets[t.scope] = t
	return t
}

func newTarget(component string) *target {
	short := strings.TrimPrefix(component, scopePrefix)
	switch short {
	case "", crate:
		return &target{scope: crate, short: crate}
	case "access":
		return &target{scope: short, short: short}
	}
	return &target{scope: scopePrefix + short, short: short}
}
