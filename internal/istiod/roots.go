package istiod

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/ztunnel-go/ztunnel/internal/filewatch"
)

// maxRoots bounds a file of root certificates, in bytes: what a ConfigMap holds.
const maxRoots = 1 << 20

// RootSet is one content of Roots. It is immutable.
type RootSet struct {
	Pool  *x509.CertPool      // nil: the system's
	Certs []*x509.Certificate // in it; none when it is the system's
}

// Roots are root certificates: a text, or a file that is read again when it
// changes, whose last good content stays. All methods are safe for concurrent
// use.
type Roots struct {
	path string // "" for a text
	log  *slog.Logger

	mu      sync.Mutex // guards what follows
	watcher *filewatch.Watcher
	looked  time.Time
	failed  bool     // the file is to be read, even if it looks as before
	said    string   // the error that was logged last
	set     *RootSet // last good
	err     error    // of the latest look, when there is no set
}

// FileRoots are those of a file. It touches nothing: the file may come later.
func FileRoots(path string, log *slog.Logger) *Roots {
	return &Roots{path: path, log: log, watcher: filewatch.New(path)}
}

// TextRoots are those of a PEM text; "" means the system's.
func TextRoots(text string, log *slog.Logger) (*Roots, error) {
	if text == "" {
		return &Roots{set: &RootSet{}}, nil
	}
	set, skipped, err := parseRoots(text)
	if err != nil {
		return nil, err
	}
	for _, s := range skipped {
		log.Warn(skippedRoot, "error", s)
	}
	return &Roots{set: set}, nil
}

const skippedRoot = "a root certificate was skipped: remove or replace it"

// Look is the newest good content. The file is looked at unless that was done
// within maxAge. An error means that there was no good content so far.
func (r *Roots) Look(ctx context.Context, maxAge time.Duration) (*RootSet, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	if r.path == "" || maxAge > 0 && now.Sub(r.looked) < maxAge {
		return r.set, r.err
	}
	r.looked = now
	next, err := r.read(ctx)
	switch {
	case err != nil:
		r.failed = true
		r.complain(ctx, err)
		if r.set == nil {
			r.err = fmt.Errorf("invalid root certificate: %w", err)
		}
	case next != nil:
		r.failed, r.said, r.err = false, "", nil
		if r.set == nil || !slices.EqualFunc(next.Certs, r.set.Certs, sameCert) {
			r.set = next
		}
	}
	return r.set, r.err
}

// read returns nil when the file has not changed. It is called with the lock
// held.
func (r *Roots) read(ctx context.Context) (*RootSet, error) {
	changed, err := r.watcher.Check()
	if err != nil {
		return nil, err
	}
	if !changed && !r.failed {
		return nil, nil
	}
	text, err := readFile(r.path, maxRoots)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", r.path, err)
	}
	set, skipped, err := parseRoots(text)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", r.path, err)
	}
	for _, s := range skipped {
		r.log.WarnContext(ctx, skippedRoot, "path", r.path, "error", s)
	}
	return set, nil
}

// complain logs an error once, until there is another one.
func (r *Roots) complain(ctx context.Context, err error) {
	if r.said == err.Error() {
		return
	}
	r.said = err.Error()
	if r.set == nil {
		r.log.WarnContext(ctx, "the root certificates cannot be read, nothing can be asked of the server before: mount the file, or correct its path", "path", r.path, "error", err)
		return
	}
	r.log.WarnContext(ctx, "the root certificates have changed and cannot be read, those read before stay in use: correct the file", "path", r.path, "error", err)
}

func sameCert(a, b *x509.Certificate) bool { return bytes.Equal(a.Raw, b.Raw) }

// parseRoots needs at least one certificate.
func parseRoots(text string) (*RootSet, []error, error) {
	certs, skipped, err := ParseCertificates(text)
	if err != nil {
		return nil, nil, err
	}
	if len(certs) == 0 {
		return nil, nil, errors.Join(append([]error{ErrNoRoot}, skipped...)...)
	}
	set := &RootSet{Pool: x509.NewCertPool(), Certs: certs}
	for _, c := range certs {
		set.Pool.AddCert(c)
	}
	return set, skipped, nil
}

// ErrNoRoot says that there is no certificate where roots should be.
var ErrNoRoot = errors.New("no root certificate present")

// ParseCertificates reads all PEM blocks of text. Certificates that cannot be parsed
// are skipped; a block of another kind is an error: it is no list of roots.
func ParseCertificates(text string) (certs []*x509.Certificate, skipped []error, err error) {
	blocks := 0
	for rest := []byte(text); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		blocks++
		if block.Type != pemCertificate {
			return nil, nil, fmt.Errorf("PEM block %d is a %q, want %s", blocks, block.Type, pemCertificate)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			skipped = append(skipped, fmt.Errorf("PEM block %d: %w", blocks, err))
			continue
		}
		certs = append(certs, cert)
	}
	// What is no block at all is passed over by pem.Decode without a word.
	if lost := strings.Count(text, "-----BEGIN ") - blocks; lost > 0 {
		skipped = append(skipped, fmt.Errorf("%d PEM blocks are damaged", lost))
	}
	return certs, skipped, nil
}

const pemCertificate = "CERTIFICATE"
