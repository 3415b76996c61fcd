package main

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ztunnel-go/ztunnel/admin"
)

// The names of the HTTP servers' listeners.
const (
	listenAdmin     = "admin"
	listenStats     = "stats"
	listenReadiness = "readiness"
)

// httpPort is one address of one of the HTTP servers.
type httpPort struct {
	*hostPort
	server *admin.Server

	mu sync.Mutex   // guards ln
	ln net.Listener // nil until the port is open
}

// open is the try of its hostPort.
func (p *httpPort) open(ctx context.Context) error {
	ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", p.addr.String())
	if err != nil {
		return bindError(p.listener, p.addr, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ln = ln
	return nil
}

func (p *httpPort) listening() net.Listener {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ln
}

// serve answers until ctx ends. It waits for the port no longer than waiting
// lasts.
func (p *httpPort) serve(ctx, waiting context.Context) error {
	if !p.await(waiting) {
		return nil
	}
	return p.server.Serve(ctx, p.listening())
}

// newServers makes the three HTTP servers and their ports.
func (n *node) newServers(registry *prometheus.Registry) error {
	const drain = time.Second
	adminServer, err := admin.New(admin.Config{
		Dump: n.dump, Levels: n.log, Drain: drain, Log: n.slog, Pages: n.pages(),
		Quit: func() {
			select {
			case n.quit <- struct{}{}:
			default: // asked already
			}
		},
	})
	if err != nil {
		return err
	}
	servers := n.cfg.serverConfig()
	for _, s := range []struct {
		name   string
		addr   BindAddr
		server *admin.Server
	}{
		{listenReadiness, servers.readiness, admin.NewReadiness(n.ready, drain, n.slog)},
		{listenAdmin, servers.admin, adminServer},
		{listenStats, servers.stats, admin.NewStats(registry, drain, n.slog)},
	} {
		s.server.HeaderTimeout = servers.headerTimeout
		for _, addr := range s.addr.Addrs() {
			n.addHTTP(s.name, addr, s.server)
		}
	}
	return nil
}

func (n *node) addHTTP(name string, addr netip.AddrPort, server *admin.Server) {
	p := &httpPort{server: server}
	p.hostPort = n.ports.add(name, addr, p.open)
	n.http = append(n.http, p)
}

// closeListeners closes what listen opened and nobody serves.
func (n *node) closeListeners() {
	for _, p := range n.http {
		if ln := p.listening(); ln != nil {
			ln.Close()
		}
	}
}

// httpPorts are those of one server.
func (n *node) httpPorts(name string) (ports []*httpPort) {
	for _, p := range n.http {
		if p.listener == name {
			ports = append(ports, p)
		}
	}
	return ports
}

// httpAddr is where a server listens, "" if it does not yet.
func (n *node) httpAddr(name string) string {
	for _, p := range n.httpPorts(name) {
		if ln := p.listening(); ln != nil {
			return ln.Addr().String()
		}
	}
	return ""
}

func (n *node) adminAddr() string { return n.httpAddr(listenAdmin) }
func (n *node) statsAddr() string { return n.httpAddr(listenStats) }
