// Package local fills a state.Store from a file instead of a control plane: for
// development, tests and nodes that stand alone. The file is YAML, and so may be
// JSON; examples/localhost.yaml shows its shape. Everything that is
// wrong with a file is reported at once, with file, line and key, and a bad file
// changes nothing.
package local

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/ztunnel-go/ztunnel/internal/filewatch"
	"github.com/ztunnel-go/ztunnel/state"
)

// Config of a Source.
type Config struct {
	Path   string // LOCAL_XDS_PATH: the file; or else
	Inline string // LOCAL_XDS: its content
	// Store is filled; what it holds is replaced as a whole.
	Store *state.Store
	// ClusterID stands in the UIDs of workloads that have neither uid nor
	// clusterId; "" means Kubernetes.
	ClusterID string
	// Once says that something else adds to the store after Load, which a second
	// Load would take away: Run then only warns of a file that changes.
	Once bool
	// Interval between looks at the file; 0 means one second.
	Interval time.Duration
	Logger   *slog.Logger // nil: discard
	// Loaded, if set, is called after each attempt to load, with its error; for
	// counters. It must not block.
	Loaded func(error)
}

// Source is a local file and what was last read from it. Its methods are safe
// for concurrent use.
type Source struct {
	cfg   Config
	log   *slog.Logger
	name  string // of the source, in errors
	watch *filewatch.Watcher

	loading sync.Mutex // held while the file is read; guards watch, missing, unread
	missing bool       // the last Check found no file
	unread  bool       // the last attempt could not read the file, whose state watch knows already

	mu     sync.Mutex // guards what follows
	static state.StaticConfig
	err    error
}

// New checks cfg and touches nothing.
func New(cfg Config) (*Source, error) {
	switch {
	case cfg.Path != "" && cfg.Inline != "":
		return nil, errors.New("only one of LOCAL_XDS_PATH and LOCAL_XDS may be set")
	case cfg.Path == "" && cfg.Inline == "":
		return nil, errors.New("one of LOCAL_XDS_PATH and LOCAL_XDS must be set")
	case cfg.Store == nil:
		return nil, errors.New("local configuration without a store")
	}
	if cfg.ClusterID == "" {
		cfg.ClusterID = "Kubernetes"
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Source{cfg: cfg, log: cfg.Logger.With("component", "xds::local"), name: "LOCAL_XDS"}
	if cfg.Path != "" {
		s.name = cfg.Path
		s.watch = filewatch.New(cfg.Path)
	}
	s.static = state.NewStaticConfig(&state.Update{})
	return s, nil
}

// Load reads the file and replaces the content of the store. On an error the
// store keeps what it has.
func (s *Source) Load() error {
	s.loading.Lock()
	defer s.loading.Unlock()
	if s.watch != nil {
		// Only to remember how the file looks; that it is missing, reading will tell.
		_, _ = s.watch.Check()
	}
	return s.load()
}

// Check loads the file if it has changed since the last Load or Check and
// reports whether it did. A file that could not be read, for want of a
// descriptor for example, counts as changed until it could; one whose content is
// bad is left alone until it changes.
func (s *Source) Check() (loaded bool, err error) {
	if s.watch == nil {
		return false, nil
	}
	s.loading.Lock()
	defer s.loading.Unlock()
	changed, err := s.watch.Check()
	if err != nil {
		if !s.missing {
			s.missing = true
			_ = s.record(err)
		}
		return false, err
	}
	if !changed && !s.missing && !s.unread {
		return false, nil
	}
	s.missing = false
	err = s.load()
	return err == nil, err
}

// Run loads the file again whenever it changes, until ctx ends, whose cause it
// returns. A file that cannot be loaded is logged once and leaves the store as it
// is. With Config.Once it loads nothing. Call Load first.
func (s *Source) Run(ctx context.Context) error {
	if s.watch == nil {
		<-ctx.Done()
		return context.Cause(ctx)
	}
	if s.cfg.Once {
		return filewatch.Run(ctx, s.cfg.Interval, func() { s.warnChanged(ctx) })
	}
	last := s.LastError()
	return filewatch.Run(ctx, s.cfg.Interval, func() {
		loaded, err := s.Check()
		switch {
		case loaded:
			last = nil
		case err != nil && (last == nil || last.Error() != err.Error()):
			last = err
			s.log.ErrorContext(ctx, "local config not loaded, the last good one stays", "path", s.cfg.Path, "error", err)
		}
	})
}

// warnChanged tells the operator why a change has no effect.
func (s *Source) warnChanged(ctx context.Context) {
	s.loading.Lock()
	defer s.loading.Unlock()
	if changed, err := s.watch.Check(); err == nil && changed {
		s.log.WarnContext(ctx, "local config has changed, but is read at the start only while xDS is on: restart to apply it", "path", s.cfg.Path)
	}
}

// LastError is the error of the last attempt to load, nil if that went well.
func (s *Source) LastError() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// StaticConfig is the last good file, for config_dump.
func (s *Source) StaticConfig() state.StaticConfig {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.static
}

// record keeps the outcome of an attempt and tells it to the hook.
func (s *Source) record(err error) error {
	s.mu.Lock()
	s.err = err
	s.mu.Unlock()
	if s.cfg.Loaded != nil {
		s.cfg.Loaded(err)
	}
	return err
}

func (s *Source) load() error {
	data := s.cfg.Inline
	if s.cfg.Path != "" {
		content, err := os.ReadFile(s.cfg.Path)
		s.unread = err != nil
		if err != nil {
			return s.record(fmt.Errorf("local config: %w", err))
		}
		data = string(content)
	}
	p := parse(s.name, data, s.cfg.ClusterID)
	static := state.NewStaticConfig(&p.update)
	if p.refuse(s.cfg.Store.Check(p.update)); p.err() != nil {
		return s.record(p.err())
	}
	if err := s.cfg.Store.Replace(p.update); err != nil {
		return s.record(fmt.Errorf("%s: %w", s.name, err))
	}
	s.mu.Lock()
	s.static = static
	s.mu.Unlock()
	s.log.Info("local config initialized", "num_workloads", len(p.update.Workloads), "num_policies", len(p.update.Policies))
	return s.record(nil)
}

// refuse adds what the store would reject to the errors of the file.
func (p *parser) refuse(err error) {
	var rejected *state.RejectedError
	if !errors.As(err, &rejected) {
		return
	}
	places := map[state.ResourceKind]map[string]place{
		state.WorkloadResource: p.workloads, state.ServiceResource: p.services, state.PolicyResource: p.policies,
	}
	for _, r := range rejected.Resources {
		if at, ok := places[r.Kind][r.Name]; ok {
			p.fail(at.node, at.path, "%v", r.Err)
		}
	}
}
