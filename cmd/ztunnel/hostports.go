package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// hostPortRetry is the time between two tries to get a port that another process
// has.
const hostPortRetry = 500 * time.Millisecond

// hostPorts are the ports of the process in its own network namespace. In shared
// mode that may be the host's, where two proxies stand side by side while one
// takes over from the other: a port that is taken is waited for (design D14). In
// dedicated mode it ends the start.
type hostPorts struct {
	wait    bool
	log     *slog.Logger
	waiting *prometheus.GaugeVec

	mu  sync.Mutex // guards all, and what the ports guard by it
	all []*hostPort
}

// hostPort is one of them.
type hostPort struct {
	ports    *hostPorts
	listener string // what listens there
	addr     netip.AddrPort
	try      func(context.Context) error // to open it

	// Guarded by hostPorts.mu.
	open  bool
	since time.Time // when that changed
	err   error     // of the last try
}

func newHostPorts(mode ProxyMode, registry prometheus.Registerer, log *slog.Logger) *hostPorts {
	h := &hostPorts{
		wait: mode == ModeShared, log: log,
		waiting: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "istio_host_ports_waiting", Help: "The number of own addresses whose port another process has, by listener (unstable)",
		}, []string{"listener"}),
	}
	registry.MustRegister(h.waiting)
	return h
}

// add enters a port, which try opens.
func (h *hostPorts) add(listener string, addr netip.AddrPort, try func(context.Context) error) *hostPort {
	p := &hostPort{ports: h, listener: listener, addr: addr, try: try, since: time.Now()}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.all = append(h.all, p)
	return p
}

// openNow tries once. That another process has the port is no error where it is
// waited for.
func (p *hostPort) openNow(ctx context.Context) error {
	err := p.try(ctx)
	if err == nil {
		p.opened()
		return nil
	}
	if !p.ports.wait || !errors.Is(err, syscall.EADDRINUSE) {
		return err
	}
	p.ports.mu.Lock()
	p.since, p.err = time.Now(), err
	p.ports.mu.Unlock()
	p.ports.waiting.WithLabelValues(p.listener).Inc()
	p.ports.log.WarnContext(ctx, "another process has a port of ours, which is waited for: what is asked there is not answered by this process",
		"listener", p.listener, "address", p.addr, "error", err.Error())
	return nil
}

// await tries until the port is open, and returns whether it is: not if ctx ends
// before.
func (p *hostPort) await(ctx context.Context) bool {
	if p.isOpen() {
		return true
	}
	tick := time.NewTicker(hostPortRetry)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return false
		}
		err := p.try(ctx)
		if err == nil {
			p.opened()
			p.ports.waiting.WithLabelValues(p.listener).Dec()
			p.ports.log.InfoContext(ctx, "the port that another process had is ours", "listener", p.listener, "address", p.addr)
			return true
		}
		p.ports.mu.Lock()
		p.err = err
		p.ports.mu.Unlock()
	}
}

func (p *hostPort) opened() {
	p.ports.mu.Lock()
	defer p.ports.mu.Unlock()
	p.open, p.since, p.err = true, time.Now(), nil
}

func (p *hostPort) isOpen() bool {
	p.ports.mu.Lock()
	defer p.ports.mu.Unlock()
	return p.open
}

// portDump is a port in the dump.
type portDump struct {
	Listener string    `json:"listener"`
	Address  string    `json:"address"`
	State    string    `json:"state"` // Listening, Waiting
	Since    time.Time `json:"since"`
	Error    string    `json:"error,omitempty"`
}

// dump tells of all ports.
func (h *hostPorts) dump() []portDump {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := make([]portDump, 0, len(h.all))
	for _, p := range h.all {
		d := portDump{Listener: p.listener, Address: p.addr.String(), State: "Waiting", Since: p.since.UTC().Truncate(time.Second)}
		if p.open {
			d.State = "Listening"
		}
		if p.err != nil {
			d.Error = p.err.Error()
		}
		out = append(out, d)
	}
	return out
}

// bindError is that of one of our listeners, as the reference words it.
func bindError(listener string, addr netip.AddrPort, err error) error {
	return fmt.Errorf("%s: failed to bind to address %s: %w", listener, addr, err)
}
