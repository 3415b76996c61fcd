package main

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/local"
	"github.com/ztunnel-go/ztunnel/internal/zlog"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/proxy/netns/loopback"
)

//go:embed demo.yaml
var demoWorld []byte

// What demo.yaml says, as the demo uses it.
const (
	demoClientID = "spiffe://cluster.local/ns/demo/sa/client"
	demoServerID = "spiffe://cluster.local/ns/demo/sa/server"
	demoPolicy   = "demo/no-admin"
	demoRequests = 20
	demoPayload  = 1024
	demoTTL      = "6s" // of certificates: half of it later the rotation is seen
	demoBound    = 30 * time.Second
)

var (
	demoClient = netip.MustParseAddr("10.0.1.2")
	demoServer = netip.MustParseAddr("10.0.2.2")
	demoVIP    = netip.MustParseAddrPort("10.96.0.10:80")
	demoDenied = netip.MustParseAddrPort("10.0.2.2:9090")
)

// demoReport is what the demo found, in the form of -o json.
type demoReport struct {
	Requests            int        `json:"requests"`
	OK                  int        `json:"ok"`
	Bytes               int64      `json:"bytes"`
	SourceIdentity      string     `json:"sourceIdentity"`
	DestinationIdentity string     `json:"destinationIdentity"`
	Protocol            string     `json:"protocol"`
	Denied              demoDenial `json:"denied"`
	Rotation            demoOK     `json:"rotation"`
	Admin               string     `json:"admin"`
	Passed              bool       `json:"passed"`

	reason  string // of the denial
	serials [2]string
	stats   string
}

type demoDenial struct {
	Policy string `json:"policy"`
	OK     bool   `json:"ok"`
}

type demoOK struct {
	OK bool `json:"ok"`
}

func newDemoCommand() *cobra.Command {
	var output string
	var keep bool
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show the main job: two nodes, the embedded CA, no root, no cluster",
		Long: `Run two node proxies, an application on each, and the embedded CA in this process, on
loopback and free ports. Redirection is played in process; everything else is the real data
path. Shown are requests through the tunnel, the identity that the server's side saw, a request
that a policy denies and why, a certificate rotation, the certificates, and where metrics are.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "text" && output != "json" {
				return usageError{fmt.Errorf("--output %q: want text or json", output)}
			}
			return runDemo(cmd.Context(), cmd.OutOrStdout(), cmd.ErrOrStderr(), output == "json", keep)
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	cmd.Flags().BoolVar(&keep, "keep", false, "stay up until interrupted")
	return cmd
}

// demo is the two nodes and their applications.
type demo struct {
	fabric         *loopback.Fabric
	client, server *node
	serverLog      *demoLog
	clientApp      netns.Network
}

// runDemo plays the demo and writes what it found to out, and what is no part of
// it to errOut. An error means that something
// was not as it should be.
func runDemo(ctx context.Context, out, errOut io.Writer, asJSON, keep bool) (err error) {
	dir, err := os.MkdirTemp("", "ztunnel-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	world := filepath.Join(dir, "demo.yaml")
	if err := os.WriteFile(world, demoWorld, 0o600); err != nil {
		return err
	}
	d, err := newDemo(world)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	var parts sync.WaitGroup
	failed := make(chan error, 2) // of the nodes
	defer func() {
		stop()
		parts.Wait()
		close(failed)
		for failure := range failed {
			err = errors.Join(err, failure)
		}
	}()
	for _, n := range []*node{d.client, d.server} {
		if err := n.listen(ctx); err != nil {
			return err
		}
		parts.Go(func() {
			if err := n.run(ctx); err != nil {
				failed <- fmt.Errorf("%s: %w", n.cfg.Proxy.Node, err)
				stop()
			}
		})
	}
	if err := d.serveEcho(ctx, &parts); err != nil {
		return err
	}
	report, err := d.play(ctx)
	if err != nil {
		return err
	}
	if asJSON {
		err = json.NewEncoder(out).Encode(report)
	} else {
		err = d.describe(ctx, out, report)
	}
	if err != nil {
		return err
	}
	if keep {
		fmt.Fprintln(errOut, "The demo stays up until it is interrupted.")
		<-ctx.Done()
	}
	if !report.Passed {
		return errors.New("the demo did not go as it should")
	}
	return nil
}

// newDemo wires the two nodes. Only their addresses and their network differ
// from what `ztunnel proxy` runs.
func newDemo(world string) (*demo, error) {
	d := &demo{fabric: loopback.New(), serverLog: newDemoLog()}
	root, err := local.Open(local.Config{TTL: mustDuration(demoTTL)})
	if err != nil {
		return nil, err
	}
	wire := func(name, nodeName string, addr netip.Addr, out io.Writer) (*node, error) {
		cfg, _, err := Load([]string{
			"PROXY_MODE=dedicated", "PROXY_WORKLOAD_INFO=demo/" + name + "/" + name, "NODE_NAME=" + nodeName,
			"XDS_ADDRESS=", "LOCAL_XDS_PATH=" + world, "CA_PROVIDER=local", "SECRET_TTL=" + demoTTL, "ISTIO_META_DNS_CAPTURE=false",
			"LOG_FORMAT=json", "RUST_LOG=info", "CONNECTION_TERMINATION_DEADLINE=2s",
		}, os.ReadFile)
		if err != nil {
			return nil, err
		}
		free := BindAddr{Addr: netip.MustParseAddrPort("127.0.0.1:0")}
		cfg.Listeners.Admin, cfg.Listeners.Stats, cfg.Listeners.Readiness = free, free, free
		log, err := zlog.New(zlog.Config{Out: out, JSON: true, Filter: cfg.Log.Filter, Sync: true})
		if err != nil {
			return nil, err
		}
		host := d.fabric.Host(addr)
		host.Capture(true)
		return newNode(cfg, nodeParts{network: host.Proxy(), backends: embedded(root), log: log})
	}
	if d.client, err = wire("client", "node-1", demoClient, io.Discard); err != nil {
		return nil, err
	}
	d.clientApp = d.fabric.Host(demoClient).App()
	d.server, err = wire("server", "node-2", demoServer, d.serverLog)
	return d, err
}

// embedded makes every provider one of the same CA.
func embedded(root *local.CA) map[string]backend {
	return map[string]backend{
		providerLocal: func(providerParts, ProviderConfig) (ca.Provider, error) { return root.Provider(), nil },
	}
}

func mustDuration(s string) time.Duration {
	d, err := time.ParseDuration(s)
	if err != nil {
		panic(err) // a constant of this file
	}
	return d
}

// serveEcho is the server's application: it sends back what it gets, on the
// service's port and on the port that the policy protects.
func (d *demo) serveEcho(ctx context.Context, parts *sync.WaitGroup) error {
	app := d.fabric.Host(demoServer).App()
	for _, port := range []uint16{8080, demoDenied.Port()} {
		ln, err := app.Listen(ctx, netip.AddrPortFrom(demoServer, port))
		if err != nil {
			return err
		}
		context.AfterFunc(ctx, func() { ln.Close() })
		parts.Go(func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				stop := context.AfterFunc(ctx, func() { _ = c.Abort() })
				parts.Go(func() {
					defer stop()
					defer c.Close()
					_, _ = io.Copy(c, c) // the client judges what comes back
				})
			}
		})
	}
	return nil
}

// play does what the demo shows.
func (d *demo) play(ctx context.Context) (*demoReport, error) {
	ctx, cancel := context.WithTimeout(ctx, demoBound)
	defer cancel()
	r := &demoReport{Denied: demoDenial{Policy: demoPolicy}, Admin: d.server.adminAddr(), stats: d.server.statsAddr()}
	before, err := d.serial(ctx)
	if err != nil {
		return nil, err
	}
	for range demoRequests {
		d.request(ctx, demoVIP, r)
	}
	seen, err := d.serverLog.wait(ctx, func(l accessLine) bool { return l.Error == "" && l.Message == "connection complete" })
	if err != nil {
		return nil, fmt.Errorf("the server's proxy logged no request: %w", err)
	}
	r.SourceIdentity, r.DestinationIdentity = seen.SourceIdentity, seen.DestinationIdentity
	if seen.Authority != "" {
		r.Protocol = "HBONE"
	}

	refused := &demoReport{}
	d.request(ctx, demoDenied, refused)
	denied, err := d.serverLog.wait(ctx, func(l accessLine) bool { return l.Error != "" })
	if err != nil {
		return nil, fmt.Errorf("the server's proxy logged no refusal: %w", err)
	}
	r.reason = denied.Error
	r.Denied.OK = refused.OK == 0 && denied.Error == "connection closed due to policy rejection: explicitly denied by: "+demoPolicy

	after, err := d.rotate(ctx, before, r)
	if err != nil {
		return nil, err
	}
	r.serials = [2]string{before, after}
	r.Rotation.OK = before != after && r.OK == r.Requests
	r.Passed = r.OK == r.Requests && r.SourceIdentity == demoClientID && r.DestinationIdentity == demoServerID &&
		r.Protocol == "HBONE" && r.Denied.OK && r.Rotation.OK
	return r, nil
}

// request is one connection of the client's application with one echo.
func (d *demo) request(ctx context.Context, dst netip.AddrPort, r *demoReport) {
	r.Requests++
	if err := d.echo(ctx, dst); err == nil {
		r.OK++
		r.Bytes += demoPayload
	}
}

func (d *demo) echo(ctx context.Context, dst netip.AddrPort) error {
	c, err := d.clientApp.Dial(ctx, netip.Addr{}, dst)
	if err != nil {
		return err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.Abort() })()
	want := bytes.Repeat([]byte("ambient "), demoPayload/8)
	if _, err := c.Write(want); err != nil {
		return err
	}
	if err := c.CloseWrite(); err != nil {
		return err
	}
	got, err := io.ReadAll(c)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("%d bytes came back, not the %d that were sent", len(got), len(want))
	}
	return nil
}

// rotate waits until the client acts with another certificate than before,
// while requests go on.
func (d *demo) rotate(ctx context.Context, before string, r *demoReport) (after string, err error) {
	var stop atomic.Bool
	var traffic sync.WaitGroup
	during := &demoReport{}
	pause := time.NewTicker(100 * time.Millisecond)
	defer pause.Stop()
	traffic.Go(func() {
		for !stop.Load() {
			d.request(ctx, demoVIP, during)
			select {
			case <-pause.C:
			case <-ctx.Done():
				return
			}
		}
	})
	defer func() {
		stop.Store(true)
		traffic.Wait()
		d.request(ctx, demoVIP, during) // with the new certificate
		r.Requests, r.OK, r.Bytes = r.Requests+during.Requests, r.OK+during.OK, r.Bytes+during.Bytes
	}()
	lease := d.client.certs.Acquire(demoRef())
	defer lease.Release()
	for {
		changed := lease.Changed()
		if after, err = d.serial(ctx); err != nil || after != before {
			return after, err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return "", fmt.Errorf("the certificate was not renewed: %w", context.Cause(ctx))
		}
	}
}

// serial is that of the certificate with which the client acts now.
func (d *demo) serial(ctx context.Context) (string, error) {
	lease := d.client.certs.Acquire(demoRef())
	defer lease.Release()
	svid, err := lease.SVID(ctx)
	if err != nil {
		return "", err
	}
	return svid.Cert.Leaf.SerialNumber.String(), nil
}

func demoRef() ca.WorkloadRef {
	id, err := ca.ParseIdentity(demoClientID)
	if err != nil {
		panic(err) // a constant of this file
	}
	return ca.WorkloadRef{ID: id, Namespace: "demo", ServiceAccount: "client", Pod: "client"}
}

// describe writes the report for people.
func (d *demo) describe(ctx context.Context, out io.Writer, r *demoReport) error {
	verdict := func(ok bool) string {
		if ok {
			return "ok"
		}
		return "NOT AS IT SHOULD BE"
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, `client %s on node-1  ══ HBONE, mTLS ══▶  server %s on node-2 (service echo.demo.svc.cluster.local, %s)

requests   %d of %d answered, %d bytes each way
identity   the server's side saw %s
           the client's side saw %s
denied     a request to %s: %s (%s)
           %s
rotation   the client's certificate was renewed while requests went on: %s
           serial %s → %s

`, demoClient, demoServer, demoVIP, r.OK, r.Requests, r.Bytes, r.SourceIdentity, r.DestinationIdentity,
		demoDenied, demoPolicy, verdict(r.Denied.OK), r.reason, verdict(r.Rotation.OK), r.serials[0], r.serials[1])
	for _, n := range []*node{d.client, d.server} {
		if err := describeCerts(ctx, &b, n.adminAddr()); err != nil {
			return err
		}
	}
	fmt.Fprintf(&b, `
metrics    http://%s/metrics
admin      http://%s/config_dump
`, r.stats, r.Admin)
	_, err := out.Write(b.Bytes())
	return err
}

// describeCerts writes the certificates of one node, as `ztunnel certs` does.
func describeCerts(ctx context.Context, out io.Writer, addr string) error {
	dump, err := fetchDump(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	var certs struct {
		Certificates []certEntry `json:"certificates"`
	}
	if err := json.Unmarshal(dump, &certs); err != nil {
		return err
	}
	return writeCerts(out, certs.Certificates, time.Now())
}

// accessLine is what the demo reads of an access log line.
type accessLine struct {
	Scope               string `json:"scope"`
	Message             string `json:"message"`
	SourceIdentity      string `json:"src.identity"`
	DestinationIdentity string `json:"dst.identity"`
	Authority           string `json:"dst.hbone_addr"`
	Error               string `json:"error"`
}

// demoLog keeps the access log lines of a node.
type demoLog struct {
	mu    sync.Mutex // guards the fields below
	lines []accessLine
	more  chan struct{} // closed and replaced when lines grew
}

func newDemoLog() *demoLog { return &demoLog{more: make(chan struct{})} }

// Write takes whole lines, as zlog writes them.
func (l *demoLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range bytes.Lines(p) {
		var a accessLine
		if err := json.Unmarshal(line, &a); err == nil && a.Scope == "access" {
			l.lines = append(l.lines, a)
		}
	}
	close(l.more)
	l.more = make(chan struct{})
	return len(p), nil
}

// wait returns the first line that matches, when there is one.
func (l *demoLog) wait(ctx context.Context, match func(accessLine) bool) (accessLine, error) {
	for {
		l.mu.Lock()
		for _, a := range l.lines {
			if match(a) {
				l.mu.Unlock()
				return a, nil
			}
		}
		more := l.more
		l.mu.Unlock()
		select {
		case <-more:
		case <-ctx.Done():
			return accessLine{}, context.Cause(ctx)
		}
	}
}
