package metric

import "time"

// Opts describes a set of one family.
type Opts struct {
	// Name is the name, for counters without the suffix _total.
	Name string
	// Help is the help text.
	Help string
	// Labels are the label names, in the order of With's values.
	Labels []string
	// Idle and Max are as in SetOpts.
	Idle time.Duration
	Max  int
}

func (o Opts) set(gauge bool) *Set {
	return newSet(SetOpts{Labels: o.Labels, Idle: o.Idle, Max: o.Max}, gauge, []Family{{Name: o.Name, Help: o.Help}})
}

// Counters is one family of counters. All methods are safe for concurrent use.
type Counters struct{ set *Set }

// NewCounters returns an empty family. It panics as NewSet does.
func NewCounters(o Opts) *Counters { return &Counters{set: o.set(false)} }

// With resolves and holds one series until its Release. See Set.With.
func (c *Counters) With(values []string) *Series { return c.set.With(values).Series(0) }

// Add adds n to the series of values, without holding it.
func (c *Counters) Add(n uint64, values ...string) {
	s := c.With(values)
	s.Add(n)
	s.Release()
}

// Inc adds 1 to the series of values, without holding it.
func (c *Counters) Inc(values ...string) { c.Add(1, values...) }

// Dropped is as Set.Dropped.
func (c *Counters) Dropped() uint64 { return c.set.Dropped() }

// Gauges is one family of gauges with whole values. Its series do not expire
// unless Opts.Idle is positive. All methods are safe for concurrent use.
type Gauges struct{ set *Set }

// NewGauges returns an empty family. It panics as NewSet does.
func NewGauges(o Opts) *Gauges {
	if o.Idle == 0 {
		o.Idle = -1
	}
	return &Gauges{set: o.set(true)}
}

// With resolves and holds one gauge until its Release, which leaves the value as
// it is. See Set.With.
func (g *Gauges) With(values ...string) *Gauge { return (*Gauge)(g.set.With(values).Series(0)) }

// Gauge is one value that goes up and down.
type Gauge Series

// Add adds n, which may be negative.
func (g *Gauge) Add(n int64) { (*Series)(g).Add(uint64(n)) } // two's complement

// Set replaces the value.
func (g *Gauge) Set(n int64) { (*Series)(g).Value().Store(uint64(n)) }

// Release ends the holding: see Row.Release.
func (g *Gauge) Release() { (*Series)(g).Release() }
