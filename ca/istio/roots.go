package istio

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/internal/filewatch"
)

// maxRoots bounds a file of root certificates, in bytes: what a ConfigMap holds.
const maxRoots = 1 << 20

// trust makes bundles of anchors: for the trust domain and its aliases, judged
// as the Istio CAs of the field need it (design D1, D2).
type trust struct {
	provider string
	domain   spiffeid.TrustDomain
	aliases  []spiffeid.TrustDomain
}

func (t trust) bundles(certs []*x509.Certificate) *ca.Bundles {
	anchors := make([]ca.Anchor, len(certs))
	for i, c := range certs {
		anchors[i] = ca.Anchor{Cert: c, Provider: t.provider, Mode: ca.Compatible}
	}
	return ca.NewBundles(map[spiffeid.TrustDomain][]ca.Anchor{t.domain: anchors}).WithAliases(t.domain, t.aliases...)
}

// rootSet is one content of a file of roots. It is immutable.
type rootSet struct {
	pool    *x509.CertPool // nil: the system's
	bundles *ca.Bundles    // nil: none to contribute
}

// roots are root certificates: a text, or a file that is read again when it
// changes, whose last good content stays. All methods are safe for concurrent
// use.
type roots struct {
	path  string // "" for a text
	trust trust
	log   *slog.Logger

	mu      sync.Mutex // guards what follows
	watcher *filewatch.Watcher
	looked  time.Time
	failed  bool     // the file is to be read, even if it looks as before
	said    string   // the error that was logged last
	set     *rootSet // last good
	err     error    // of the latest look, when there is no set
}

// fileRoots touches nothing: the file may come later.
func fileRoots(path string, t trust, log *slog.Logger) *roots {
	return &roots{path: path, trust: t, log: log, watcher: filewatch.New(path)}
}

func textRoots(text string, t trust, log *slog.Logger) (*roots, error) {
	if text == "" {
		return &roots{set: &rootSet{}}, nil
	}
	set, skipped, err := t.parse(text)
	if err != nil {
		return nil, err
	}
	for _, s := range skipped {
		log.Warn(skippedRoot, "error", s)
	}
	return &roots{set: set}, nil
}

const skippedRoot = "a root certificate was skipped: remove or replace it"

// look is the newest good content. The file is looked at unless that was done
// within maxAge. An error means that there was no good content so far.
func (r *roots) look(ctx context.Context, maxAge time.Duration) (*rootSet, error) {
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
		if r.set == nil || !next.bundles.Equal(r.set.bundles) {
			r.set = next
		}
	}
	return r.set, r.err
}

// read returns nil when the file has not changed. It is called with the lock
// held.
func (r *roots) read(ctx context.Context) (*rootSet, error) {
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
	set, skipped, err := r.trust.parse(text)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", r.path, err)
	}
	for _, s := range skipped {
		r.log.WarnContext(ctx, skippedRoot, "path", r.path, "error", s)
	}
	return set, nil
}

// complain logs an error once, until there is another one.
func (r *roots) complain(ctx context.Context, err error) {
	if r.said == err.Error() {
		return
	}
	r.said = err.Error()
	if r.set == nil {
		r.log.WarnContext(ctx, "the root certificates cannot be read, no certificate can be requested before: mount the file, or correct its path", "path", r.path, "error", err)
		return
	}
	r.log.WarnContext(ctx, "the root certificates have changed and cannot be read, those read before stay in use: correct the file", "path", r.path, "error", err)
}

// parse needs at least one certificate.
func (t trust) parse(text string) (*rootSet, []error, error) {
	certs, skipped, err := parseAnchors(text)
	if err != nil {
		return nil, nil, err
	}
	if len(certs) == 0 {
		return nil, nil, errors.Join(append([]error{errNoRoot}, skipped...)...)
	}
	set := &rootSet{pool: x509.NewCertPool(), bundles: t.bundles(certs)}
	for _, c := range certs {
		set.pool.AddCert(c)
	}
	return set, skipped, nil
}

var errNoRoot = errors.New("no root certificate present")

// parseAnchors reads all PEM blocks of text. Certificates that cannot be parsed
// are skipped; a block of another kind is an error: it is no list of anchors.
func parseAnchors(text string) (certs []*x509.Certificate, skipped []error, err error) {
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
