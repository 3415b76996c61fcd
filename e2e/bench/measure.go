//go:build linux

package main

import (
	"context"
	"fmt"
	"slices"
	"time"
)

// The figures that a measurement may yield.
const (
	gbps      = "Gbit/s"
	cpuPerGB  = "CPU s/GB"
	rate      = "rate/s"
	p50       = "p50 µs"
	p99       = "p99 µs"
	cpuPerOp  = "CPU µs/op"
	rssStream = "RSS KiB/stream"
	rssTunnel = "RSS KiB/tunnel"
	kept      = "rate kept"
	inflight  = "MiB taken by stalled"
	rssIn     = "RSS MiB inbound"
)

// figures is what one run of a measurement yields.
type figures map[string]float64

// measurement is one row of the plan.
type measurement struct {
	id    string
	group string   // what -only selects, beside the id
	modes []string // in the order of the report
	show  []string // figures in the order of the report
	env   []string // further environment of the real binary
	inUse bool     // it measures memory: what explains it is the heap, not the CPU
	load  loadSpec
	run   func(context.Context, *bench, *subject, loadSpec) (figures, error)
}

const (
	bulkBytes   = 512 << 20
	bulkLimit   = 3 * time.Second
	pingTime    = time.Second
	pingSize    = 1 << 10
	shortConns  = 2000
	parallel    = 10
	idleStreams = 5000
	idleTunnels = 1000
	handshakes  = 500
	tunnelPace  = 4 * time.Millisecond // between the connections of the handshake rows, slow enough for each to stand alone
	settle      = 2 * time.Second      // before a resident size is read
)

// plan returns all measurements, those of one group side by side.
func plan() []measurement {
	all := []string{modeDirect, modeRelay, modeRelayBuf, modeTLS, modeH2, modeZtunnel}
	withPlain := append(slices.Clone(all), modeZtunnelPlain)
	var rows []measurement
	for _, kind := range []string{loadUpload, loadDownload} {
		for _, n := range []int{1, 10, 100} {
			m := measurement{
				id: fmt.Sprintf("%s-%d", kind, n), group: "bulk", modes: all, show: []string{gbps, cpuPerGB}, run: runBulk,
				load: loadSpec{Kind: kind, Streams: n, Bytes: bulkBytes, Limit: bulkLimit},
			}
			if kind == loadUpload && n == 10 {
				m.modes = withPlain
			}
			rows = append(rows, m)
		}
	}
	for _, n := range []int{1, 10, 100} {
		m := measurement{
			id: fmt.Sprintf("ping-%d", n), group: "latency", modes: all, show: []string{p50, p99, rate, cpuPerOp}, run: runPing,
			load: loadSpec{Kind: loadPing, Streams: n, MessageSize: pingSize, Duration: pingTime},
		}
		if n == 10 {
			m.modes = withPlain
		}
		rows = append(rows, m)
	}
	rows = append(rows, measurement{
		id: "connect", group: "connect", modes: withPlain, show: []string{rate, cpuPerOp}, run: runConnect,
		load: loadSpec{Kind: loadConnect, Streams: parallel, Count: shortConns},
	})
	for _, k := range []int{8, 100} {
		rows = append(rows, measurement{
			id: fmt.Sprintf("stalled-%d", k), group: "stalled", modes: []string{modeZtunnel},
			show: []string{kept, inflight, rssIn}, run: runStall,
			env:  []string{"POOL_MAX_STREAMS_PER_CONNECTION=150"}, // all streams on one tunnel
			load: loadSpec{Kind: loadStall, Streams: k, MessageSize: pingSize, Duration: pingTime, Device: podDevice},
		})
	}
	return append(rows,
		measurement{
			id: "idle-streams", group: "idle-streams", modes: []string{modeZtunnel}, show: []string{rssStream}, run: runIdleStreams, inUse: true,
			load: loadSpec{Kind: loadIdle, Streams: parallel, Count: idleStreams},
		},
		measurement{
			id: "idle-tunnels", group: "idle-tunnels", modes: []string{modeZtunnel}, show: []string{rssTunnel}, run: runIdleTunnels, inUse: true,
			load: loadSpec{Kind: loadIdle, Streams: parallel, Count: idleTunnels, Sources: sourceFirst},
		},
		measurement{
			id: "handshake", group: "handshake", modes: []string{modeBare, modeZtunnel}, show: []string{cpuPerOp}, run: runHandshake,
			load: loadSpec{Kind: loadConnect, Streams: parallel, Count: handshakes, Every: tunnelPace},
		})
}

// timed runs one load and returns its result with the CPU time that the proxies spent on it. look, when it is not
// nil, is called while the load still holds its connections.
func (b *bench) timed(ctx context.Context, s *subject, spec loadSpec, look func() error) (loadResult, time.Duration, error) {
	load, err := b.world.startLoad(ctx, spec)
	if err != nil {
		return loadResult{}, 0, err
	}
	defer load.stop()
	before, err := s.cpu()
	if err != nil {
		return loadResult{}, 0, err
	}
	result, err := load.measure(ctx)
	if err != nil {
		return loadResult{}, 0, err
	}
	after, err := s.cpu()
	if err != nil {
		return loadResult{}, 0, err
	}
	if look != nil {
		err = look()
	}
	return result, after - before, err
}

func runBulk(ctx context.Context, b *bench, s *subject, spec loadSpec) (figures, error) {
	warm := spec
	warm.Bytes /= 16 // fresh processes: buffers, windows and heap find their size first
	if _, _, err := b.timed(ctx, s, warm, nil); err != nil {
		return nil, err
	}
	result, cpu, err := b.timed(ctx, s, spec, nil)
	if err != nil {
		return nil, err
	}
	gigabytes := float64(result.Bytes) / 1e9
	return figures{gbps: 8 * gigabytes / result.Seconds, cpuPerGB: cpu.Seconds() / gigabytes}, nil
}

func runPing(ctx context.Context, b *bench, s *subject, spec loadSpec) (figures, error) {
	result, cpu, err := b.timed(ctx, s, spec, nil)
	if err != nil {
		return nil, err
	}
	f := perOp(result, cpu)
	f[p50], f[p99] = result.P50, result.P99
	return f, nil
}

func runConnect(ctx context.Context, b *bench, s *subject, spec loadSpec) (figures, error) {
	warm := spec
	warm.Count /= 10
	if _, _, err := b.timed(ctx, s, warm, nil); err != nil {
		return nil, err
	}
	result, cpu, err := b.timed(ctx, s, spec, nil)
	if err != nil {
		return nil, err
	}
	return perOp(result, cpu), nil
}

func perOp(result loadResult, cpu time.Duration) figures {
	return figures{
		rate:     float64(result.Ops) / result.Seconds,
		cpuPerOp: float64(cpu.Microseconds()) / float64(result.Ops),
	}
}

// runStall fails when the stalled streams and the ping did not share one tunnel: then the figure would say nothing.
func runStall(ctx context.Context, b *bench, s *subject, spec loadSpec) (figures, error) {
	before, err := b.world.tunnels()
	if err != nil {
		return nil, err
	}
	f := figures{}
	result, _, err := b.timed(ctx, s, spec, func() error {
		after, err := b.world.tunnels()
		if err == nil && (before != 1 || after != 1) {
			err = fmt.Errorf("%d tunnels before and %d after the stalled streams were opened, want 1", before, after)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	sizes, err := s.resident()
	if err != nil {
		return nil, err
	}
	f[kept] = result.BesideRate / result.AloneRate
	f[inflight] = float64(result.Stuck) / (1 << 20)
	f[rssIn] = float64(sizes[1]) / (1 << 20)
	return f, nil
}

func runIdleStreams(ctx context.Context, b *bench, s *subject, spec loadSpec) (figures, error) {
	kib, err := b.idle(ctx, s, spec, nil)
	return figures{rssStream: kib}, err
}

func runIdleTunnels(ctx context.Context, b *bench, s *subject, spec loadSpec) (figures, error) {
	kib, err := b.idle(ctx, s, spec, func() error {
		n, err := b.world.tunnels()
		if err == nil && n < spec.Count {
			err = fmt.Errorf("%d tunnels are open, want at least %d", n, spec.Count)
		}
		return err
	})
	return figures{rssTunnel: kib}, err
}

// idle returns how much the resident size of the larger proxy grew per connection, in KiB.
func (b *bench) idle(ctx context.Context, s *subject, spec loadSpec, check func() error) (float64, error) {
	// One batch of ordinary connections first: start-up costs are not those of an idle stream.
	if _, _, err := b.timed(ctx, s, loadSpec{Kind: loadConnect, Streams: parallel, Count: 200}, nil); err != nil {
		return 0, err
	}
	before, err := s.resident()
	if err != nil {
		return 0, err
	}
	var after []int64
	_, _, err = b.timed(ctx, s, spec, func() error {
		if err := wait(ctx, settle); err != nil {
			return err
		}
		if check != nil {
			if err := check(); err != nil {
				return err
			}
		}
		var err error
		after, err = s.resident()
		return err
	})
	if err != nil {
		return 0, err
	}
	var grown int64
	for i := range after {
		grown = max(grown, after[i]-before[i])
	}
	return float64(grown) / 1024 / float64(spec.Count), nil
}

// runHandshake measures what a new tunnel costs: connections from addresses that have no tunnel yet, less the same
// connections from the same addresses over the tunnels that stand then. The bare loop needs no subtraction; its client
// is the load generator. All come at one pace, since a connection is cheaper where many come at once.
func runHandshake(ctx context.Context, b *bench, s *subject, spec loadSpec) (figures, error) {
	if s.mode == modeBare {
		return b.bareHandshakes(ctx, s, spec)
	}
	spec.Sources = sourceFirst
	_, fresh, err := b.timed(ctx, s, spec, nil)
	if err != nil {
		return nil, err
	}
	n, err := b.world.tunnels()
	if err != nil {
		return nil, err
	}
	if n < spec.Count {
		return nil, fmt.Errorf("%d tunnels are open, want at least %d", n, spec.Count)
	}
	_, pooled, err := b.timed(ctx, s, spec, nil)
	if err != nil {
		return nil, err
	}
	return figures{cpuPerOp: float64((fresh - pooled).Microseconds()) / float64(spec.Count)}, nil
}

func (b *bench) bareHandshakes(ctx context.Context, s *subject, spec loadSpec) (figures, error) {
	spec.Kind, spec.Target, spec.Credentials = loadHandshake, bareAddr, b.world.credentials
	load, err := b.world.startLoad(ctx, spec)
	if err != nil {
		return nil, err
	}
	defer load.stop()
	both := &subject{mode: s.mode, outbound: load, inbound: s.inbound}
	before, err := both.cpu()
	if err != nil {
		return nil, err
	}
	result, err := load.measure(ctx)
	if err != nil {
		return nil, err
	}
	after, err := both.cpu()
	if err != nil {
		return nil, err
	}
	return figures{cpuPerOp: float64((after - before).Microseconds()) / float64(result.Ops)}, nil
}

// wait returns after d, or with an error as soon as ctx ends.
func wait(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
