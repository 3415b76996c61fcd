//go:build linux

// Package agent stands in for the CNI agent of a node: it serves ZDS, the
// protocol by which the node proxy learns of its pods, and lets the rules of
// package rules be set in them. It has two personalities, whose differences the
// proxy meets in real clusters: Istio's agent (spec/identity-admin-inpod.md §7.3)
// and Cilium's (spec/cilium-spire.md §1.7).
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/cni/rules"
	"github.com/ztunnel-go/ztunnel/proxy/inpod/zdspb"
)

// Personality is whose agent is meant.
type Personality string

// The personalities.
//
// Istio: several connections, of which the newest hears of new pods and all hear
// of deletions; a message that is not answered within the deadline fails, and the
// connection stays; a pod without a namespace is kept by name in a snapshot; what
// the proxy says unasked ends the connection.
//
// Cilium: one connection, which a new one replaces once the old one's handler has
// come to an end; nothing has a deadline; an error in an answer ends the
// connection, and so does a pod in the snapshot whose namespace is gone; changes
// wait until a proxy is connected.
const (
	Istio  Personality = "istio"
	Cilium Personality = "cilium"
)

// Defaults of Config.
const (
	DefaultDeadline = 5 * time.Second
	DefaultIdle     = 5 * time.Second
)

// acceptPause lets Istio's agent accept five connections a second.
const acceptPause = 200 * time.Millisecond

// ErrNoProxy: nobody is connected. A pod that was added is in the next snapshot.
var ErrNoProxy = errors.New("no proxy is connected, the next one will hear of it")

// RefusedError is a proxy's word why it does not take a pod.
type RefusedError struct{ Text string }

// Error is that word.
func (e *RefusedError) Error() string { return "refused by the proxy: " + e.Text }

// Config of an agent. Only Path is required.
type Config struct {
	Path        string      // of the socket; what is there is removed
	Personality Personality // empty: Istio
	// Deadline of each message and its answer, 0 = DefaultDeadline. Istio only.
	Deadline time.Duration
	// Idle is how long a connection is quiet before it is looked at, 0 = DefaultIdle.
	// Istio only.
	Idle   time.Duration
	Logger *slog.Logger // nil: none
}

// Pod is what an agent tells of a pod.
type Pod struct {
	UID, Name, Namespace, ServiceAccount string
	// NetNS is the network namespace. The caller lends it until the pod is deleted.
	// Istio's agent may have none: then the proxy shall keep what it has.
	NetNS *os.File
	// Rules are set before the proxy hears of the pod; nil sets none.
	Rules *rules.Config
}

// Agent serves one socket. All methods are safe for concurrent use.
type Agent struct {
	cfg Config
	ln  *net.UnixListener
	log *slog.Logger
	ops chan *change // Cilium: what waits for a connection

	mu      sync.Mutex // guards the fields below
	order   []string   // of pods
	pods    map[string]Pod
	conns   []*conn // open, oldest first
	status  Status
	changed chan struct{} // closed and replaced with each change of status
}

// Status is what happened until now.
type Status struct {
	Connected  int      // connections that are open
	Accepted   int      // connections that ever were
	Snapshots  int      // that were sent to their end
	Refusals   []string // what proxies answered instead of an ack
	Violations []string // what a proxy did against the protocol
}

// change is one message with its answer.
type change struct {
	pod  Pod
	req  *zdspb.WorkloadRequest
	done chan error // buffered
}

// New binds the socket. Run serves it.
func New(cfg Config) (*Agent, error) {
	switch cfg.Personality {
	case "":
		cfg.Personality = Istio
	case Istio, Cilium:
	default:
		return nil, fmt.Errorf("personality %q: want %s or %s", cfg.Personality, Istio, Cilium)
	}
	if cfg.Deadline == 0 {
		cfg.Deadline = DefaultDeadline
	}
	if cfg.Idle == 0 {
		cfg.Idle = DefaultIdle
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if err := os.Remove(cfg.Path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove old socket: %w", err)
	}
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: cfg.Path, Net: "unixpacket"})
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	return &Agent{
		cfg: cfg, ln: ln, log: cfg.Logger.With("component", string(cfg.Personality)+" agent"),
		ops: make(chan *change, 100), pods: map[string]Pod{}, changed: make(chan struct{}),
	}, nil
}

// Run serves until ctx ends. It may be called once.
func (a *Agent) Run(ctx context.Context) error {
	var conns sync.WaitGroup
	defer conns.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = a.ln.Close() })
	defer stop()
	var previous *conn
	for {
		if a.cfg.Personality == Istio && previous != nil {
			pause(ctx, acceptPause)
		}
		u, err := a.ln.AcceptUnix()
		if ctx.Err() != nil {
			if err == nil {
				_ = u.Close()
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		c := newConn(ctx, a, u)
		if a.cfg.Personality == Cilium && previous != nil {
			previous.cancel(errReplaced)
			c.previous = previous.done
		}
		previous = c
		conns.Go(func() { a.handle(c) })
	}
}

// pause waits for d, or for the end of ctx.
func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// Close ends an agent that never ran.
func (a *Agent) Close() error { return a.ln.Close() }

func (a *Agent) handle(c *conn) {
	defer close(c.done)
	a.opened(c)
	serve := c.serveIstio
	if a.cfg.Personality == Cilium {
		serve = c.serveCilium
	}
	err := serve()
	_ = c.u.Close()
	c.cancel(nil)
	a.closed(c, err)
}

// Add sets the pod's rules and tells the proxy of it, and returns when that has
// answered: a *RefusedError if it did not take the pod. A pod that is known by
// its UID is told again. Istio's agent returns ErrNoProxy if nobody is there to
// be told; Cilium's waits for somebody.
func (a *Agent) Add(ctx context.Context, pod Pod) error {
	if pod.Rules != nil {
		if err := rules.Apply(ctx, pod.NetNS, *pod.Rules); err != nil {
			return fmt.Errorf("capture %s/%s: %w", pod.Namespace, pod.Name, err)
		}
	}
	req := addRequest(pod)
	if a.cfg.Personality == Istio {
		a.remember(pod)
		return a.tell(ctx, a.newest(), &change{pod: pod, req: req})
	}
	if err := a.queue(ctx, &change{pod: pod, req: req}); err != nil {
		return err
	}
	a.remember(pod) // one that is refused is not tried again
	return nil
}

// Delete tells of the end of a pod that is gone, with its rules.
func (a *Agent) Delete(ctx context.Context, uid string) error {
	a.forget(uid)
	req := &zdspb.WorkloadRequest{Payload: &zdspb.WorkloadRequest_Del{Del: &zdspb.DelWorkload{Uid: uid}}}
	if a.cfg.Personality == Istio {
		return a.tell(ctx, a.open(), &change{req: req})
	}
	return a.queue(ctx, &change{req: req})
}

// Leave takes a pod that lives on out of the mesh: first its rules, then the
// proxy's part.
func (a *Agent) Leave(ctx context.Context, uid string) error {
	a.mu.Lock()
	pod, ok := a.pods[uid]
	a.mu.Unlock()
	if ok && pod.NetNS != nil {
		if err := rules.Remove(ctx, pod.NetNS); err != nil {
			return fmt.Errorf("release %s/%s: %w", pod.Namespace, pod.Name, err)
		}
	}
	return a.Delete(ctx, uid)
}

// Put changes what the next snapshot says of a pod, and tells nobody now: as an
// agent that was started anew, or that lost a namespace, would have it.
func (a *Agent) Put(pod Pod) { a.remember(pod) }

// Drop takes a pod out of the next snapshot, and tells nobody now.
func (a *Agent) Drop(uid string) { a.forget(uid) }

// Disconnect ends all connections, as an agent does that is restarted.
func (a *Agent) Disconnect() {
	for _, c := range a.open() {
		c.cancel(errDisconnected)
		_ = c.u.Close()
	}
}

// Status tells what happened until now.
func (a *Agent) Status() Status {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.status
	s.Refusals, s.Violations = slices.Clone(s.Refusals), slices.Clone(s.Violations)
	return s
}

// Wait returns when ok is content with the status, or with the error of ctx.
func (a *Agent) Wait(ctx context.Context, ok func(Status) bool) error {
	for {
		a.mu.Lock()
		changed := a.changed
		a.mu.Unlock()
		s := a.Status()
		if ok(s) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("agent at %+v: %w", s, ctx.Err())
		}
	}
}

// update changes the status.
func (a *Agent) update(f func(*Status)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f(&a.status)
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *Agent) opened(c *conn) {
	a.update(func(s *Status) {
		a.conns = append(a.conns, c)
		s.Connected, s.Accepted = len(a.conns), s.Accepted+1
	})
	a.log.Info("proxy connected")
}

func (a *Agent) closed(c *conn, err error) {
	a.update(func(s *Status) {
		a.conns = slices.DeleteFunc(a.conns, func(o *conn) bool { return o == c })
		s.Connected = len(a.conns)
	})
	a.log.Info("proxy disconnected", "error", err)
}

func (a *Agent) violation(text string) {
	a.log.Error("proxy breaks the protocol", "error", text)
	a.update(func(s *Status) { s.Violations = append(s.Violations, text) })
}

func (a *Agent) remember(pod Pod) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, ok := a.pods[pod.UID]; !ok {
		a.order = append(a.order, pod.UID)
	}
	a.pods[pod.UID] = pod
}

func (a *Agent) forget(uid string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.pods, uid)
	a.order = slices.DeleteFunc(a.order, func(o string) bool { return o == uid })
}

// snapshot are the pods that are known, in the order in which they came.
func (a *Agent) snapshot() []Pod {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := make([]Pod, len(a.order))
	for i, uid := range a.order {
		out[i] = a.pods[uid]
	}
	return out
}

func (a *Agent) open() []*conn {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.conns)
}

// newest is the last connection, or none.
func (a *Agent) newest() []*conn {
	conns := a.open()
	return conns[max(0, len(conns)-1):]
}
