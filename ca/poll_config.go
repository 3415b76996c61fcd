package ca

import (
	"context"
	"log/slog"
	"time"

	"github.com/ztunnel-go/ztunnel/internal/backoff"
)

// PollConfig says how [Poll] asks. The zero value of a field means its default.
type PollConfig struct {
	// Concurrency is the number of requests at one time. Default 8.
	Concurrency int
	// Timeout bounds one request. Default 10 s.
	Timeout time.Duration
	// RenewSpread is the share of a certificate's life over which renewals are
	// spread, from its half on: the default 0.1 renews between 50 % and 60 %.
	// No renewal comes before half-life, but for Ceiling, and nodes that started
	// together drift apart. Negative means exactly at half-life; at most 0.4.
	RenewSpread float64
	// Ceiling is the most time between a success and its renewal, however long the
	// certificate lives: anchors are seen to change by renewals only. RenewSpread
	// applies to it, downwards. Default 7 days; negative means none.
	Ceiling time.Duration
	// Floor is the least time between a success and the next request for the
	// same identity, for certificates that arrive past their half-life.
	// Default 10 ms; a tenth of the remaining life if that is more.
	Floor time.Duration
	// Backoff spaces out the retries of one identity. Default: 1, 2, 4 … 150 s,
	// ±20 %, and exactly 150 s after 15 minutes.
	Backoff backoff.Policy
	// Denied spaces out the retries of an identity that the backend denied
	// ([ErrDenied]): an answer that mostly only somebody's action changes, though a CA
	// that has not heard of a new pod yet denies it, too. Default: 2, 8, 32, 128,
	// 150 s, ±20 %, and exactly 150 s after 15 minutes. The two series of one
	// identity grow apart from each other, and both end with a success.
	Denied backoff.Policy
	// Skew is how far the backend's clock may be ahead of ours: a certificate that
	// becomes valid within this time is held back until it is. One that does later
	// is rejected. Default 10 s; negative means none.
	Skew time.Duration
	// AnyID accepts a certificate of another identity than the requested one:
	// in dedicated mode the Istio CA alone decides who we are. The [Manager] then
	// does so too, for this provider and no other.
	AnyID bool
	// Validation overrides the mode in which issued certificates are judged.
	Validation Validation
	// Observe, if not nil, is told of each finished request; err is nil for a
	// success. It must not block.
	Observe func(err error, took time.Duration)
	// Logger; nil discards.
	Logger *slog.Logger
}

func (cfg *PollConfig) setDefaults() {
	if cfg.Concurrency <= 0 {
		cfg.Concurrency = 8
	}
	if cfg.Timeout <= 0 {
		cfg.Timeout = 10 * time.Second
	}
	if cfg.RenewSpread == 0 {
		cfg.RenewSpread = 0.1
	}
	cfg.RenewSpread = min(max(cfg.RenewSpread, 0), 0.4)
	if cfg.Ceiling == 0 {
		cfg.Ceiling = 7 * 24 * time.Hour
	}
	if cfg.Floor <= 0 {
		cfg.Floor = 10 * time.Millisecond
	}
	if cfg.Denied.First <= 0 {
		cfg.Denied.First = 2 * time.Second
	}
	if cfg.Denied.Factor <= 1 {
		cfg.Denied.Factor = 4
	}
	if cfg.Skew == 0 {
		cfg.Skew = 10 * time.Second
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
}

// RootWatcher is an optional interface of a [Fetcher] that knows anchors
// before its first answer. WatchRoots reports them, and every change, from one
// goroutine, until ctx ends, which it does with the first answer at the latest,
// but for [FixedRoots].
type RootWatcher interface {
	WatchRoots(ctx context.Context, update func(*Bundles)) error
}

// FixedRoots is an optional interface of a [RootWatcher]. FixedRoots reports
// whether its anchors count whatever the answers say: then WatchRoots goes on after
// the first answer, as long as somebody watches the bundles.
type FixedRoots interface {
	FixedRoots() bool
}

// Disconnecter is an optional interface of a [Fetcher] that keeps something open
// between requests, such as a connection. Disconnect closes it. It is called at
// the end of each Run, when no Fetch runs; the next Run may fetch again.
type Disconnecter interface {
	Disconnect()
}
