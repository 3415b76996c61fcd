//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// The addresses of the two pods and the ports of the redirection contract.
var (
	clientAddr  = netip.MustParseAddr("10.77.1.1")
	serverAddr  = netip.MustParseAddr("10.77.2.1")
	appAddr     = netip.AddrPortFrom(serverAddr, 9000)
	sourceRange = netip.MustParsePrefix("10.77.64.0/18") // further addresses of the client pod, without configuring each
	sourceFirst = netip.MustParseAddr("10.77.64.1")
	bareAddr    = netip.AddrPortFrom(serverAddr, inboundPort) // server of the bare handshake loop
)

const (
	outboundPort      = 15001
	inboundPort       = 15008
	proxyMark         = 1337
	congestionControl = "cubic"
	podDevice         = "pod0" // the veth end of either pod
)

// world is the stage of all measurements: two pods joined by a veth pair, and the application in one of them.
type world struct {
	dir         string // scratch files, removed at the end
	credentials string // of the reference modes
	files       int
	client      *namespace
	server      *namespace
	app         *process
	redirected  bool
}

// newWorld builds the stage. The caller closes it, also after an error of a later step.
func newWorld(ctx context.Context) (*world, error) {
	dir, err := os.MkdirTemp("", "ztunnel-bench-")
	if err != nil {
		return nil, fmt.Errorf("make a scratch directory: %w", err)
	}
	w := &world{dir: dir, credentials: filepath.Join(dir, "reference.pem")}
	if err := w.build(ctx); err != nil {
		return nil, errors.Join(err, w.close())
	}
	return w, nil
}

func (w *world) build(ctx context.Context) error {
	text, err := newCredentials()
	if err != nil {
		return err
	}
	if err := os.WriteFile(w.credentials, text, 0o600); err != nil {
		return fmt.Errorf("store the reference credentials: %w", err)
	}
	if w.client, err = newNamespace(); err != nil {
		return err
	}
	if w.server, err = newNamespace(); err != nil {
		return err
	}
	for _, ns := range []*namespace{w.client, w.server} {
		if err := ns.setCongestionControl(congestionControl); err != nil {
			return err
		}
		if err := ns.sysctl("ipv4/ip_local_port_range", "20000 65000"); err != nil {
			return err
		}
		if err := ns.sysctl("ipv4/tcp_tw_reuse", "1"); err != nil {
			return err
		}
	}
	if err := w.client.run("ip", "link", "add", podDevice, "type", "veth", "peer", "name", podDevice, "netns", w.server.path()); err != nil {
		return err
	}
	for _, pod := range []struct {
		ns   *namespace
		addr netip.Addr
	}{{w.client, clientAddr}, {w.server, serverAddr}} {
		if err := pod.ns.run("ip", "addr", "add", netip.PrefixFrom(pod.addr, 16).String(), "dev", podDevice); err != nil {
			return err
		}
		if err := pod.ns.run("ip", "link", "set", podDevice, "up"); err != nil {
			return err
		}
	}
	if err := w.client.run("ip", "route", "add", "local", sourceRange.String(), "dev", "lo"); err != nil {
		return err
	}
	w.app, err = w.startChild(ctx, w.server, childSpec{Role: roleApp, Listen: appAddr})
	return err
}

// redirect installs the capture rule of the client pod or takes it away.
func (w *world) redirect(on bool) error {
	if on == w.redirected {
		return nil
	}
	action := "-D"
	if on {
		action = "-A"
	}
	err := w.client.run("iptables", "-w", "-t", "nat", action, "OUTPUT", "-p", "tcp", "-d", serverAddr.String(),
		"-m", "mark", "!", "--mark", strconv.Itoa(proxyMark), "-j", "REDIRECT", "--to-ports", strconv.Itoa(outboundPort))
	if err == nil {
		w.redirected = on
	}
	return err
}

// checkCongestion makes sure that every established socket of both pods, whoever opened it, uses the algorithm that
// all subjects are to share.
func (w *world) checkCongestion() error {
	for _, ns := range []*namespace{w.client, w.server} {
		text, err := ns.output("ss", "-tinHO", "state", "established")
		if err != nil {
			return err
		}
		for line := range strings.Lines(text) {
			if strings.TrimSpace(line) != "" && !strings.Contains(line, " "+congestionControl+" ") {
				return fmt.Errorf("a socket does not use %s: %s", congestionControl, strings.TrimSpace(line))
			}
		}
	}
	return nil
}

// tunnels returns how many connections to the inbound proxy are established.
func (w *world) tunnels() (int, error) {
	text, err := w.server.output("ss", "-tnHO", "state", "established", "sport", "=", ":"+strconv.Itoa(inboundPort))
	if err != nil {
		return 0, err
	}
	n := 0
	for line := range strings.Lines(text) {
		if strings.TrimSpace(line) != "" {
			n++
		}
	}
	return n, nil
}

// close ends everything that the stage consists of.
func (w *world) close() error {
	w.app.stop()
	var errs []error
	for _, ns := range []*namespace{w.client, w.server} {
		if ns != nil {
			errs = append(errs, ns.close())
		}
	}
	return errors.Join(append(errs, os.RemoveAll(w.dir))...)
}
