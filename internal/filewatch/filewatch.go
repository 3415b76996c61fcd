// Package filewatch notices that a file has changed, by polling the path that
// its name resolves to. This works where notifications of the kernel do not: the
// files of a Kubernetes volume are replaced by swapping the symbolic link ..data
// above them.
package filewatch

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// DefaultInterval is how often Run looks when it is not told otherwise.
const DefaultInterval = time.Second

// Watcher remembers how a file looked. It is not safe for concurrent use.
type Watcher struct {
	path     string
	resolved string
	info     os.FileInfo // nil before the first successful Check
}

// New returns a watcher for path, which need not exist. It touches nothing.
func New(path string) *Watcher { return &Watcher{path: path} }

// Check reports whether the file differs from what the last Check saw: another
// file behind the name, another size or another time of modification. The first
// Check of a file reports true. Call it before the file is read: a change that
// happens during the reading is then seen by the next Check.
//
// An error says that there is no such file now. It is not a change, and a file
// that comes back as it was is none either.
func (w *Watcher) Check() (bool, error) {
	resolved, err := filepath.EvalSymlinks(w.path)
	if err != nil {
		return false, fmt.Errorf("watch %s: %w", w.path, err)
	}
	info, err := os.Stat(resolved)
	if err != nil {
		return false, fmt.Errorf("watch %s: %w", w.path, err)
	}
	same := w.info != nil && w.resolved == resolved && os.SameFile(w.info, info) &&
		w.info.Size() == info.Size() && w.info.ModTime().Equal(info.ModTime())
	w.resolved, w.info = resolved, info
	return !same, nil
}

// Run calls look every interval (DefaultInterval if it is not positive) from this
// goroutine until ctx ends, whose cause it returns. look would call Check.
func Run(ctx context.Context, interval time.Duration, look func()) error {
	if interval <= 0 {
		interval = DefaultInterval
	}
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-ticker.C:
			look()
		}
	}
}
