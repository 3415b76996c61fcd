package ca

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ztunnel-go/ztunnel/internal/filewatch"
)

// CRLConfig configures [CRLs]. The zero value of a field means its default.
type CRLConfig struct {
	Path string // of the file; it need not exist
	// Interval is the pause between two looks at the file. A change is loaded
	// when the next look finds no other, so that a file that is still being
	// written is not taken for a short one. Default 400 ms.
	Interval time.Duration
	// MaxBytes bounds the file. Default 64 MiB.
	MaxBytes int64
	// Loaded, if not nil, is told of every attempt to load a changed file: nil,
	// or why the lists from before stay in force. It must not block.
	Loaded func(error)
	Logger *slog.Logger // nil: discard
}

// CRLs are the certificate revocation lists (RFC 5280 §5) of one file, which is
// followed while Run runs. Until a file was loaded, nothing is revoked; a file
// that vanishes or cannot be read changes nothing (the identity spec §3.8). All
// methods are safe for concurrent use, and those without an error result may be
// called on nil, which revokes nothing.
type CRLs struct {
	cfg CRLConfig
	log *slog.Logger
	set atomic.Pointer[crlSet] // never nil; written under mu

	mu      sync.Mutex // guards changed
	changed chan struct{}

	loading sync.Mutex // guards what follows
	watcher *filewatch.Watcher
	pending bool   // a change was seen and not loaded
	gone    bool   // there was no file at the last look
	content digest // of the file that was loaded
	warned  string // the error that was logged last
}

// maxCRLBytes is more than a million revoked certificates in PEM. The volumes
// that Kubernetes makes of a ConfigMap hold 1 MiB.
const maxCRLBytes = 64 << 20

// NewCRLs makes a set without lists. It reads and starts nothing.
func NewCRLs(cfg CRLConfig) *CRLs {
	if cfg.Interval <= 0 {
		cfg.Interval = 400 * time.Millisecond
	}
	if cfg.MaxBytes <= 0 {
		cfg.MaxBytes = maxCRLBytes
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	c := &CRLs{
		cfg: cfg, log: cfg.Logger.With("component", "ca", "path", cfg.Path),
		changed: make(chan struct{}), watcher: filewatch.New(cfg.Path),
	}
	c.set.Store(new(crlSet))
	return c
}

// Load reads the file now, without waiting until it stands still. After an
// error, which wraps [fs.ErrNotExist] when there is no file, the lists from
// before stay in force, and Run goes on trying.
func (c *CRLs) Load() error {
	c.loading.Lock()
	defer c.loading.Unlock()
	if _, err := c.watcher.Check(); err != nil {
		c.gone = true
		return fmt.Errorf("load the certificate revocation list: %w", err)
	}
	err := c.load()
	if err != nil {
		c.warned = err.Error()
	}
	return err
}

// Run follows the file until ctx ends, whose cause it returns.
func (c *CRLs) Run(ctx context.Context) error {
	return filewatch.Run(ctx, c.cfg.Interval, func() { c.look(ctx) })
}

// Check refuses a verified path, leaf first and anchor last, of which a
// certificate is revoked. The anchor itself is not asked about. A revoked
// certificate is a *[RevokedError]; any other error says that a list that
// claims to be of the path's issuer cannot be believed. It is the function for
// [TLSOptions].
func (c *CRLs) Check(path []*x509.Certificate) error {
	if c == nil {
		return nil
	}
	return c.set.Load().check(path)
}

// Generation grows with every change of the lists.
func (c *CRLs) Generation() uint64 {
	if c == nil {
		return 0
	}
	return c.set.Load().generation
}

// Changed is closed when the lists have changed. Call it before looking at
// Generation or Check. On nil it is nil.
func (c *CRLs) Changed() <-chan struct{} {
	if c == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.changed
}

// look is one look at the file.
func (c *CRLs) look(ctx context.Context) {
	c.loading.Lock()
	defer c.loading.Unlock()
	changed, err := c.watcher.Check()
	switch {
	case err != nil:
		if !c.gone && errors.Is(err, fs.ErrNotExist) {
			c.log.WarnContext(ctx, "the certificate revocation list is gone, what it revoked stays revoked: restore the file", "error", err)
		}
		c.gone = true
		return
	case changed:
		c.gone, c.pending = false, true
		return
	case !c.pending:
		c.gone = false
		return
	}
	c.gone = false
	switch err := c.load(); {
	case err == nil:
		c.warned = ""
	case err.Error() != c.warned:
		c.warned = err.Error()
		c.log.WarnContext(ctx, "the certificate revocation list was not loaded, what was revoked before stays revoked: repair the file", "error", err)
	}
}

// load takes the file over. The caller holds c.loading.
func (c *CRLs) load() (err error) {
	if c.cfg.Loaded != nil {
		defer func() { c.cfg.Loaded(err) }()
	}
	content, err := c.read()
	if err != nil {
		c.pending = true // reading may work the next time without a change
		return fmt.Errorf("read the certificate revocation list: %w", err)
	}
	c.pending = false
	sum := digest(sha256.Sum256(content))
	old := c.set.Load()
	if old.generation > 0 && sum == c.content {
		return nil
	}
	set, err := parseCRLs(content)
	if err != nil {
		return fmt.Errorf("parse the certificate revocation list: %w", err)
	}
	c.content = sum
	set.generation = old.generation + 1
	c.mu.Lock()
	c.set.Store(set)
	close(c.changed)
	c.changed = make(chan struct{})
	c.mu.Unlock()
	c.log.Info("certificate revocation lists loaded", "lists", set.lists, "revoked", set.entries, "generation", set.generation)
	if expired := set.expired(time.Now()); expired > 0 {
		c.log.Warn("certificate revocation lists have expired and are used all the same: publish newer ones", "lists", expired)
	}
	return nil
}

func (c *CRLs) read() ([]byte, error) {
	f, err := os.Open(c.cfg.Path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var b bytes.Buffer
	if info, err := f.Stat(); err == nil {
		b.Grow(int(min(info.Size(), c.cfg.MaxBytes)) + bytes.MinRead)
	}
	n, err := b.ReadFrom(io.LimitReader(f, c.cfg.MaxBytes+1))
	if err == nil && n > c.cfg.MaxBytes {
		return nil, fmt.Errorf("%s: more than %d bytes, which is the most that is read", c.cfg.Path, c.cfg.MaxBytes)
	}
	return b.Bytes(), err
}
