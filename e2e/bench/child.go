//go:build linux

package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// childCommand is the first argument of the program when it runs one of its own parts.
const childCommand = "child"

// The parts that run as processes of their own.
const (
	roleApp       = "application"
	roleLoad      = "load"
	roleOutbound  = "outbound"
	roleInbound   = "inbound"
	roleHandshake = "handshake"
)

// childSpec tells a child process what it is. It travels as one JSON argument.
type childSpec struct {
	Role        string
	Mode        string         `json:",omitempty"` // outbound, inbound: the reference mode
	Listen      netip.AddrPort `json:",omitzero"`
	Target      netip.AddrPort `json:",omitzero"`  // inbound: the application
	PeerPort    uint16         `json:",omitempty"` // outbound: port of the inbound half
	Mark        int            `json:",omitempty"` // SO_MARK of outgoing sockets
	Credentials string         `json:",omitempty"`
	Congestion  string         `json:",omitempty"` // the algorithm that every socket must use
	Load        *loadSpec      `json:",omitempty"`
}

// A child says lineReady when it can be used; a load generator then waits for lineGo and answers with its result as
// one line of JSON. Every child ends when its standard input does, so that none outlives the benchmark.
const (
	lineReady = "ready"
	lineGo    = "go"
)

// runChild runs one part to its end.
func runChild(ctx context.Context, text string, in io.Reader, out io.Writer) error {
	var spec childSpec
	if err := json.Unmarshal([]byte(text), &spec); err != nil {
		return fmt.Errorf("parse child order: %w", err)
	}
	if spec.Role == roleLoad {
		if spec.Load == nil {
			return errors.New("child order of a load generator has no load")
		}
		return loadChild(ctx, spec, in, out)
	}
	handle, err := handler(spec)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	watching := make(chan struct{})
	go func() {
		defer close(watching)
		_, _ = io.Copy(io.Discard, in)
		cancel()
	}()
	listen := net.ListenConfig{}
	listen.SetMultipathTCP(false)
	ln, err := listen.Listen(ctx, "tcp", spec.Listen.String())
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	if name, err := congestion(ln.(*net.TCPListener)); err != nil || name != spec.Congestion {
		return errors.Join(err, ln.Close(), fmt.Errorf("congestion control of the listener is %q, want %q", name, spec.Congestion))
	}
	if _, err := fmt.Fprintln(out, lineReady); err != nil {
		return fmt.Errorf("report readiness: %w", err)
	}
	if err := serveConns(ctx, ln, handle); err != nil {
		return err // the process ends, and the watcher of its standard input with it
	}
	<-watching
	return nil
}

// handler returns what a serving child does with a connection.
func handler(spec childSpec) (func(context.Context, *net.TCPConn), error) {
	if spec.Role == roleApp {
		return new(application).handle, nil
	}
	creds, err := loadCredentials(spec.Credentials)
	if err != nil {
		return nil, err
	}
	if spec.Role == roleHandshake {
		config := creds.server()
		return func(ctx context.Context, conn *net.TCPConn) { serveHandshake(ctx, conn, config) }, nil
	}
	r, err := newReference(spec.Mode, creds, spec.Mark)
	if err != nil {
		return nil, err
	}
	switch spec.Role {
	case roleOutbound:
		r.peerPort, r.dest = spec.PeerPort, originalDst
		return r.outbound, nil
	case roleInbound:
		r.target = spec.Target
		return r.inbound, nil
	}
	return nil, fmt.Errorf("child role %q is unknown", spec.Role)
}

// serveHandshake is the server of the bare handshake loop.
func serveHandshake(ctx context.Context, conn *net.TCPConn, config *tls.Config) {
	secure := tls.Server(conn, config)
	defer secure.Close()
	if secure.HandshakeContext(ctx) != nil {
		return
	}
	if _, err := secure.Write([]byte{1}); err != nil {
		return
	}
	_, _ = io.Copy(io.Discard, secure)
}

func loadChild(ctx context.Context, spec childSpec, in io.Reader, out io.Writer) error {
	l := &loader{spec: *spec.Load}
	defer l.close()
	if err := l.prepare(ctx); err != nil {
		return err
	}
	if _, err := fmt.Fprintln(out, lineReady); err != nil {
		return fmt.Errorf("report readiness: %w", err)
	}
	orders := bufio.NewScanner(in)
	if !orders.Scan() {
		return nil // called off
	}
	if orders.Text() != lineGo {
		return fmt.Errorf("load generator was told %q, want %q", orders.Text(), lineGo)
	}
	result, err := l.run(ctx)
	if err != nil {
		return err
	}
	if result.Congestion != "" && result.Congestion != spec.Congestion {
		return fmt.Errorf("congestion control of the load's sockets is %q, want %q", result.Congestion, spec.Congestion)
	}
	if err := json.NewEncoder(out).Encode(result); err != nil {
		return fmt.Errorf("report the result: %w", err)
	}
	orders.Scan() // hold the connections until the benchmark has looked at the proxies
	return nil
}

// cpuOf returns the CPU time, user plus system, that process pid has used.
func cpuOf(pid int) (time.Duration, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("read CPU time: %w", err)
	}
	return parseStat(string(text))
}

// residentOf returns the resident set size of process pid in bytes.
func residentOf(pid int) (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, fmt.Errorf("read resident size: %w", err)
	}
	return parseResident(string(text))
}

// kernel returns the release of the running kernel.
func kernel() string {
	var name unix.Utsname
	if unix.Uname(&name) != nil {
		return runtime.GOOS
	}
	return unix.ByteSliceToString(name.Release[:])
}
