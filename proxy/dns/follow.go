package dns

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ztunnel-go/ztunnel/internal/filewatch"
)

// maxFile bounds what is read of a file of the system.
const maxFile = 1 << 20

// followed is the content of a file, read anew when it is asked for and the file
// has changed, at most once in filewatch.DefaultInterval. A file that is gone or
// says nothing usable does not take back what it said before. It is safe for
// concurrent use; only one caller looks at the file, the others do not wait.
type followed[T any] struct {
	path  string
	parse func(text string) (T, error)
	log   *slog.Logger
	value atomic.Pointer[T] // nil until the file was read

	mu      sync.Mutex // guards the rest
	watch   *filewatch.Watcher
	next    time.Time
	unread  bool   // the file has changed since it was understood
	failing string // the error that was logged last, "" if there is none
}

func follow[T any](path string, log *slog.Logger, parse func(string) (T, error)) *followed[T] {
	return &followed[T]{path: path, parse: parse, log: log, watch: filewatch.New(path)}
}

// get returns what the file said last, the zero value if it never did.
func (f *followed[T]) get() (v T) {
	if f.mu.TryLock() {
		if now := time.Now(); !now.Before(f.next) {
			f.next = now.Add(filewatch.DefaultInterval)
			f.note(f.look())
		}
		f.mu.Unlock()
	}
	if p := f.value.Load(); p != nil {
		return *p
	}
	return v
}

// look reads the file if it has changed. The caller holds f.mu.
func (f *followed[T]) look() error {
	changed, err := f.watch.Check()
	if err != nil {
		return err
	}
	if f.unread = f.unread || changed; !f.unread {
		return nil
	}
	text, err := readFile(f.path)
	if err != nil {
		return err
	}
	v, err := f.parse(text)
	if err != nil {
		return fmt.Errorf("read %s: %w", f.path, err)
	}
	f.value.Store(&v)
	f.unread = false
	return nil
}

// readFile returns the text of a file of the system.
func readFile(path string) (string, error) {
	file, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, maxFile+1))
	switch {
	case err != nil:
		return "", fmt.Errorf("read %s: %w", path, err)
	case len(text) > maxFile:
		return "", fmt.Errorf("read %s: it is longer than %d bytes", path, maxFile)
	}
	return string(text), nil
}

// note logs an error when it begins. The caller holds f.mu.
func (f *followed[T]) note(err error) {
	if err == nil {
		f.failing = ""
		return
	}
	if err.Error() != f.failing {
		f.failing = err.Error()
		f.log.Warn("file of the system not read: what it said before still holds; correct or restore it",
			"path", f.path, "error", f.failing)
	}
}
