//go:build e2e

package netns

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// flowPatience is how long one connection of a flow may take.
const flowPatience = 10 * time.Second

// flow is an application that connects again and again, at a fixed rate: each
// connection sends a line, and wants it back.
type flow struct {
	from   *netns.Pod
	to     netip.AddrPort
	rate   int    // connections per second
	marker string // begins every line

	ctx    context.Context
	stop   context.CancelFunc
	paced  chan struct{} // closed when no connection begins any more
	parts  sync.WaitGroup
	begun  time.Time
	mu     sync.Mutex // guards the fields below
	trials []trial
}

// trial is one connection of a flow.
type trial struct {
	began time.Time
	took  time.Duration
	step  string // that failed: connect, send, first byte, rest, answer
	err   error
}

// startFlow begins at once. The flow ends with stopped, or the test.
func startFlow(tb testing.TB, from *netns.Pod, to netip.AddrPort, rate int, marker string) *flow {
	f := &flow{from: from, to: to, rate: rate, marker: marker, paced: make(chan struct{}), begun: time.Now()}
	f.ctx, f.stop = context.WithCancel(context.Background())
	f.parts.Go(f.pace)
	tb.Cleanup(func() { f.stopped() })
	return f
}

// stopped ends the flow, waits for what is under way, and returns all trials.
func (f *flow) stopped() []trial {
	f.stop()
	f.parts.Wait()
	return f.until()
}

// until are the trials that have ended.
func (f *flow) until() []trial {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.trials)
}

func (f *flow) pace() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for n := 1; ; n++ {
		select {
		case <-timer.C:
		case <-f.ctx.Done():
			return
		}
		f.parts.Go(func() { f.try(n) })
		timer.Reset(time.Until(f.begun.Add(time.Duration(n) * time.Second / time.Duration(f.rate))))
	}
}

func (f *flow) try(n int) {
	began := time.Now()
	step, err := connectOnce(f.from, f.to, fmt.Sprintf("%s %d\n", f.marker, n))
	t := trial{began, time.Since(began), step, err}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.trials = append(f.trials, t)
}

// connectOnce is one connection. The error comes with the step that failed.
func connectOnce(from *netns.Pod, to netip.AddrPort, line string) (step string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), flowPatience)
	defer cancel()
	c, err := from.Dial(ctx, netip.Addr{}, to)
	if err != nil {
		return "connect", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(flowPatience)); err != nil {
		return "connect", err
	}
	if _, err := io.WriteString(c, line); err != nil {
		return "send", err
	}
	got := make([]byte, len(line))
	if _, err := io.ReadFull(c, got[:1]); err != nil {
		return "first byte", err
	}
	if _, err := io.ReadFull(c, got[1:]); err != nil {
		return "rest", err
	}
	if string(got) != line {
		return "answer", fmt.Errorf("got %q, want %q", got, line)
	}
	return "", nil
}

// failures are those of the trials that did.
func failures(trials []trial) (failed []trial) {
	return slices.DeleteFunc(slices.Clone(trials), func(t trial) bool { return t.err == nil })
}

// describe tells of a few failures, by the time since the flow began.
func (f *flow) describe(failed []trial) string {
	var b strings.Builder
	for _, t := range failed[:min(len(failed), 12)] {
		fmt.Fprintf(&b, "\n  at %7.3f s, %s after %v: %v", t.began.Sub(f.begun).Seconds(), t.step, t.took.Round(time.Microsecond), t.err)
	}
	if n := len(failed) - 12; n > 0 {
		fmt.Fprintf(&b, "\n  and %d more", n)
	}
	return b.String()
}

// quantile is that of the trials' times. It sorts them.
func quantile(times []time.Duration, q float64) time.Duration {
	if len(times) == 0 {
		return 0
	}
	slices.Sort(times)
	return times[min(len(times)-1, int(q*float64(len(times))))]
}

// times are those of trials that succeeded.
func times(trials []trial) []time.Duration {
	out := make([]time.Duration, 0, len(trials))
	for _, t := range trials {
		if t.err == nil {
			out = append(out, t.took)
		}
	}
	return out
}
