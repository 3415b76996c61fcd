// Package backoff spaces out retries: exponential, jittered, and with a time
// budget after which the delay stays at its maximum.
package backoff

import (
	"context"
	"math/rand/v2"
	"time"
)

// Policy says how delays grow. The zero value of a field means the default
// that its comment names.
type Policy struct {
	// First is the base of the first delay. Default 1 s.
	First time.Duration
	// Max caps the base delay. Default 150 s.
	Max time.Duration
	// Factor multiplies the base after each delay. Default 2.
	Factor float64
	// Jitter spreads each delay uniformly over base × [1−Jitter, 1+Jitter].
	// Default 0.2; negative means none. It applies to Max too, so that a delay
	// may reach Max × (1+Jitter).
	Jitter float64
	// Budget is the time after the first failure from which every delay is
	// exactly Max; so is a delay that would end after it. Default 15 min;
	// negative means no budget.
	Budget time.Duration
	// Rand returns a value in [0,1). Default math/rand/v2. It must be safe for
	// concurrent use when several sequences share the policy.
	Rand func() float64
}

// Sequence is one run of failures. The zero value is ready to use with the
// default policy. It is not safe for concurrent use.
type Sequence struct {
	policy Policy
	base   time.Duration // of the next delay; 0 before the first
	start  time.Time     // of the first failure
}

// New starts a sequence under p.
func (p Policy) New() *Sequence { return &Sequence{policy: p} }

// Next is the delay to wait after a failure at now.
func (s *Sequence) Next(now time.Time) time.Duration {
	p := s.policy.withDefaults()
	if s.base == 0 {
		s.base = min(p.First, p.Max)
		s.start = now
	}
	delay := s.base
	if p.Jitter > 0 {
		delay = time.Duration(float64(s.base) * (1 - p.Jitter + 2*p.Jitter*p.Rand()))
	}
	if float64(s.base)*p.Factor < float64(p.Max) {
		s.base = time.Duration(float64(s.base) * p.Factor)
	} else {
		s.base = p.Max
	}
	if p.Budget > 0 && now.Sub(s.start)+delay > p.Budget {
		return p.Max
	}
	return delay
}

// Reset makes the next failure the first one of a new sequence.
func (s *Sequence) Reset() { s.base, s.start = 0, time.Time{} }

// Started is the time of the first failure, zero when there was none.
func (s *Sequence) Started() time.Time { return s.start }

func (p Policy) withDefaults() Policy {
	if p.First <= 0 {
		p.First = time.Second
	}
	if p.Max <= 0 {
		p.Max = 150 * time.Second
	}
	if p.Factor <= 1 {
		p.Factor = 2
	}
	switch {
	case p.Jitter == 0:
		p.Jitter = 0.2
	case p.Jitter < 0:
		p.Jitter = 0
	case p.Jitter > 1:
		p.Jitter = 1
	}
	if p.Budget == 0 {
		p.Budget = 15 * time.Minute
	}
	if p.Rand == nil {
		p.Rand = rand.Float64
	}
	return p
}

// Sleep waits for d, and is false when ctx ended first.
func Sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
