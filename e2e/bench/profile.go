//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// note is what a profile says about one of the two proxies in a measurement that missed its target.
type note struct {
	measurement string
	half        string
	text        string
}

const (
	profileTime  = 5 * time.Second
	profileLines = 20
)

// explain profiles the real binary in the measurements whose targets were missed, and in all of them when a directory
// was named. These runs yield no figures.
func (b *bench) explain(ctx context.Context) error {
	missed := map[string]bool{}
	for _, v := range b.verdicts() {
		if v.mode == modeZtunnel && v.outcome() == outcomeMiss {
			missed[v.measurement] = true
		}
	}
	for _, m := range b.plan {
		measured := len(b.series(m.id, modeZtunnel, m.show[0])) > 0
		if !measured || !missed[m.id] && b.options.profile == "" {
			continue
		}
		fmt.Fprintf(b.log, "        profile of %s\n", m.id)
		notes, err := b.profileRow(ctx, m)
		if err != nil {
			return fmt.Errorf("profile %s: %w", m.id, err)
		}
		if missed[m.id] {
			b.notes = append(b.notes, notes...)
		}
	}
	return nil
}

// profileRow repeats a measurement with a longer load while both proxies are sampled.
func (b *bench) profileRow(ctx context.Context, m measurement) ([]note, error) {
	s, err := b.world.startSubject(ctx, modeZtunnel, b.options.ztunnel, m.env)
	if err != nil {
		return nil, err
	}
	defer s.stop()
	dir := b.options.profile
	if dir == "" {
		dir = b.world.dir
	}
	file := func(half string) string { return filepath.Join(dir, m.id+"-"+half+".pprof") }
	halves := []struct {
		ns   *namespace
		name string
	}{{b.world.client, "outbound"}, {b.world.server, "inbound"}}
	var notes []note
	if m.inUse {
		_, _, err := b.timed(ctx, s, m.load, func() error {
			err := wait(ctx, settle)
			for _, half := range halves {
				err = errors.Join(err, half.ns.fetch(ctx, adminPort, "/debug/pprof/heap", file(half.name)))
				text, statsErr := half.ns.memory(ctx, filepath.Join(b.world.dir, "stats"), m.load.Count)
				notes = append(notes, note{m.id, half.name, text})
				err = errors.Join(err, statsErr)
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	} else {
		spec := m.load
		spec.Bytes, spec.Limit, spec.Duration, spec.Count = 20*spec.Bytes, profileTime, profileTime, 8*spec.Count
		errs := make(chan error, len(halves))
		for _, half := range halves {
			notes = append(notes, note{m.id, half.name, ""})
			go func() {
				page := fmt.Sprintf("/debug/pprof/profile?seconds=%.0f", (profileTime - time.Second).Seconds())
				errs <- half.ns.fetch(ctx, adminPort, page, file(half.name))
			}()
		}
		_, err := m.run(ctx, b, s, spec)
		for range halves {
			err = errors.Join(err, <-errs)
		}
		if err != nil {
			return nil, err
		}
	}
	for i := range notes {
		top, err := profileTop(ctx, b.options.ztunnel, file(notes[i].half))
		if err != nil {
			return nil, err
		}
		notes[i].text += top
	}
	return notes, nil
}

// profileTop lists where a profile was spent, as the Go tool that lies beside every Go installation says it.
func profileTop(ctx context.Context, binary, file string) (string, error) {
	text, err := exec.CommandContext(ctx, "go", "tool", "pprof", "-top", fmt.Sprintf("-nodecount=%d", profileLines), binary, file).Output()
	if err != nil {
		return "", fmt.Errorf("go tool pprof: %w", err)
	}
	// The heading tells file, build and time; what follows is the table.
	if i := strings.Index(string(text), "Showing nodes"); i >= 0 {
		text = text[i:]
	}
	return string(text), nil
}

const (
	adminPort = 15000
	statsPort = 15020
)

// fetch stores a page of a proxy in ns.
func (ns *namespace) fetch(ctx context.Context, port int, page, file string) error {
	dial := func(ctx context.Context, network, addr string) (net.Conn, error) {
		var conn net.Conn
		err := ns.do(func() error {
			var err error
			conn, err = (&net.Dialer{}).DialContext(ctx, network, addr)
			return err
		})
		return conn, err
	}
	transport := &http.Transport{DialContext: dial, DisableKeepAlives: true}
	url := fmt.Sprintf("http://127.0.0.1:%d%s", port, page)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return fmt.Errorf("fetch %s: %w", url, err)
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return fmt.Errorf("fetch %s: %w", url, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("fetch %s: %s", url, resp.Status)
	}
	out, err := os.Create(file)
	if err != nil {
		return fmt.Errorf("fetch %s: %w", url, err)
	}
	_, err = io.Copy(out, resp.Body)
	return errors.Join(err, out.Close())
}

// memory says in one line per kind how much memory the runtime of a proxy in ns holds for each of n connections.
func (ns *namespace) memory(ctx context.Context, file string, n int) (string, error) {
	if err := ns.fetch(ctx, statsPort, "/stats/prometheus", file); err != nil {
		return "", err
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("read metrics: %w", err)
	}
	var out strings.Builder
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		var bytes float64
		switch name {
		case "go_memstats_stack_inuse_bytes", "go_memstats_heap_inuse_bytes", "go_memstats_heap_alloc_bytes":
			if _, err := fmt.Sscan(value, &bytes); err != nil {
				return "", fmt.Errorf("metric %s: %w", name, err)
			}
			fmt.Fprintf(&out, "%-32s %6.1f KiB per connection\n", name, bytes/1024/float64(n))
		}
	}
	return out.String(), nil
}
