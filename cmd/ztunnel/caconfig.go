package main

import (
	"context"
	"fmt"
	"log/slog"
	"reflect"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/router"
	"github.com/ztunnel-go/ztunnel/internal/filewatch"
)

// caConfigWatch reads CA_CONFIG again when it changes, and moves the leases to
// what it says. A file that does not do changes nothing.
type caConfigWatch struct {
	cfg      *Config
	readFile func(string) ([]byte, error)
	set      *providerSet
	replace  func(ca.Router)
	interval time.Duration // between looks; 0 = the default of filewatch
	log      *slog.Logger
	loads    *prometheus.CounterVec

	checking  sync.Mutex // held while the file is read; guards what follows
	watch     *filewatch.Watcher
	pending   bool // a change was seen and not loaded, or the file could not be read
	providers []ProviderConfig
	routes    []router.Rule

	mu  sync.Mutex // guards err
	err error
}

// newCAConfigWatch follows the file from the state that cfg has loaded. It
// returns nil where there is no file.
func newCAConfigWatch(cfg *Config, readFile func(string) ([]byte, error), registry prometheus.Registerer) *caConfigWatch {
	if cfg.CA.ConfigFile == "" {
		return nil
	}
	w := &caConfigWatch{
		cfg: cfg, readFile: readFile, watch: filewatch.New(cfg.CA.ConfigFile),
		providers: cfg.CA.Providers, routes: cfg.CA.Routes,
		loads: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "istio_ca_config_loads_total", Help: "The number of attempts to load the configuration of the certificate providers, by outcome (unstable)",
		}, []string{"outcome"}),
	}
	registry.MustRegister(w.loads)
	w.loads.WithLabelValues("ok")
	w.loads.WithLabelValues("error")
	return w
}

// run looks at the file until ctx ends, whose cause it returns. The first looks
// read it in any case: it may have changed since Load.
func (w *caConfigWatch) run(ctx context.Context) error {
	w.check(ctx)
	return filewatch.Run(ctx, w.interval, func() { w.check(ctx) })
}

// check loads the file if it has changed, at the first look that finds it as the
// one before did: half of a file that is being written may be a list of fewer
// providers, and those that it lacks would lose their trust.
func (w *caConfigWatch) check(ctx context.Context) {
	w.checking.Lock()
	defer w.checking.Unlock()
	changed, err := w.watch.Check()
	switch {
	case err != nil:
		w.pending = true
	case changed:
		w.pending = true
		return
	case !w.pending:
		return
	default:
		err = w.load()
	}
	outcome := "ok"
	if err != nil {
		outcome = "error"
	}
	if last := w.lastError(); err == nil || last == nil || last.Error() != err.Error() { // said before, otherwise
		w.loads.WithLabelValues(outcome).Inc()
		if err != nil {
			w.log.WarnContext(ctx, "CA_CONFIG not loaded, the last good one stays; ztunnel ca validate checks a file", "path", w.cfg.CA.ConfigFile, "error", err)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.err = err
}

// load reads the file and replaces what has changed.
func (w *caConfigWatch) load() error {
	text, err := w.readFile(w.cfg.CA.ConfigFile)
	w.pending = err != nil
	if err != nil {
		return fmt.Errorf("read %s: %w", w.cfg.CA.ConfigFile, err)
	}
	file, err := parseCAFile(w.cfg, text, w.readFile)
	if err != nil {
		return err
	}
	configs := file.configs()
	if reflect.DeepEqual(configs, w.providers) && reflect.DeepEqual(file.routes, w.routes) {
		return nil
	}
	r, fresh, err := w.set.router(configs, file.routes)
	if err != nil {
		return fmt.Errorf("%s: %w", w.cfg.CA.ConfigFile, err)
	}
	w.providers, w.routes = configs, file.routes
	announce(w.log, "CA_CONFIG has changed: certificates move to the providers that it lists", configs, file.routes)
	w.log.Info("certificate providers made anew", "number", fresh)
	w.replace(r)
	return nil
}

// lastError is why the file was not loaded the last time, nil if it was.
func (w *caConfigWatch) lastError() error {
	if w == nil {
		return nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}
