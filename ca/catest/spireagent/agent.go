// Package spireagent is a SPIRE agent in the hands of a test. It speaks the
// agent's APIs over gRPC, in memory or on a unix socket, and issues real
// certificates; what it knows, and what it does wrong, is set by the test.
//
// As the real agent does, it sends full states: at the start of a stream, and
// whenever what is in them changes. It renews SVIDs by itself at half of their
// life (SPIRE adds a jitter of ±10 %; the fake is exact).
package spireagent

import (
	"context"
	"errors"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"github.com/ztunnel-go/ztunnel/ca/catest"
)

// Config configures an [Agent]. The zero value of a field means its default.
type Config struct {
	// TrustDomain is the agent's. Default cluster.local.
	TrustDomain string
	// Life is that of SVIDs. Default 1 h.
	Life time.Duration
	// AdminSocket is the path where the Delegated Identity API is served, beside
	// the connections of [Agent.Dial]. Default: nowhere.
	AdminSocket string
	// WorkloadSocket is that of the Workload API, beside [Agent.DialWorkload], and
	// BrokerSocket that of the broker endpoint, beside [Agent.DialBroker]. Default:
	// nowhere.
	WorkloadSocket, BrokerSocket string
}

// Entry is a registration entry.
type Entry struct {
	ID string // written into the certificate as it is
	// Selectors, as type:value, must all be among those of a workload.
	Selectors []string
	// FederatesWith names the trust domains whose bundles the workload gets.
	FederatesWith []string
	Hint          string
	// Life overrides that of the agent.
	Life time.Duration
}

// Request is one stream that a client opened.
type Request struct {
	At        time.Time
	Method    string // the last part of its full name
	Selectors []string
	PID       int32
	// Of the Broker API: who asked, with which type of reference, and the pod.
	Caller, Reference, Pod, UID string
}

// Agent is the fake. It serves after [New], until its test ends. The setters may
// be called at any time, and take effect at once.
type Agent struct {
	tb  testing.TB
	cfg Config

	lifecycle sync.Mutex  // serializes Start and Stop
	endpoints []*endpoint // immutable

	mu      sync.Mutex    // guards what follows
	changed chan struct{} // closed and replaced when anything changes
	authority
	faults
	proxy    proxy
	broker   brokering
	entries  []*entry
	requests []Request
	messages int
	streams  int
	dials    int
}

// faults are what the agent does wrong.
type faults struct {
	delegate Delegate
	attest   func(pid int32) ([]string, error)
	hang     bool
	redacts  bool
	repeats  int
	cuts     int
	cutErr   error
	tamper   Tamper
	conns    []*lossy
}

// New makes an agent that serves.
func New(tb testing.TB, cfg Config) *Agent {
	tb.Helper()
	if cfg.TrustDomain == "" {
		cfg.TrustDomain = "cluster.local"
	}
	if cfg.Life == 0 {
		cfg.Life = time.Hour
	}
	a := &Agent{tb: tb, cfg: cfg, changed: make(chan struct{})}
	a.root = catest.NewCA(tb, cfg.TrustDomain)
	a.roots = []*catest.CA{a.root}
	a.federated = make(map[string][]byte)
	a.endpoints = []*endpoint{
		{name: admin, path: cfg.AdminSocket, register: a.registerDelegated},
		{name: workloadName, path: cfg.WorkloadSocket, register: a.registerWorkload},
		{name: brokerName, path: cfg.BrokerSocket, register: a.registerBroker, options: a.brokerOptions},
	}
	a.Start()
	tb.Cleanup(a.Stop)
	return a
}

// set changes something, and tells the streams.
func (a *Agent) set(change func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	change()
	close(a.changed)
	a.changed = make(chan struct{})
}

// endpoint is one socket of the agent.
type endpoint struct {
	name     string
	path     string // of a unix socket; "" for none
	register func(*grpc.Server)
	options  func() []grpc.ServerOption // nil: none

	server  *grpc.Server // nil while the agent is stopped
	serving sync.WaitGroup
	memory  *bufconn.Listener // guarded by Agent.mu; nil while the agent is stopped
}

// admin is the name of the admin socket.
const admin = "admin"

// Start serves, after a Stop. The agent's memory is as it was: a real one would
// have lost its SVIDs, for which see [Agent.Renew].
func (a *Agent) Start() {
	a.lifecycle.Lock()
	defer a.lifecycle.Unlock()
	for _, e := range a.endpoints {
		if e.server != nil {
			continue
		}
		options := []grpc.ServerOption{grpc.WaitForHandlers(true)}
		if e.options != nil {
			options = append(options, e.options()...)
		}
		e.server = grpc.NewServer(options...)
		e.register(e.server)
		memory := bufconn.Listen(64 << 10)
		listeners := []net.Listener{memory}
		if e.path != "" {
			l, err := net.Listen("unix", e.path)
			if err != nil {
				a.tb.Fatalf("fake agent: %v", err)
			}
			listeners = append(listeners, l)
		}
		for _, l := range listeners {
			server := e.server
			e.serving.Go(func() {
				if err := server.Serve(l); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
					a.tb.Errorf("fake agent: serve the %s socket: %v", e.name, err)
				}
			})
		}
		a.set(func() { e.memory = memory })
	}
}

// Stop ends all connections and listens no longer.
func (a *Agent) Stop() {
	a.lifecycle.Lock()
	defer a.lifecycle.Unlock()
	for _, e := range a.endpoints {
		if e.server == nil {
			continue
		}
		a.set(func() { e.memory = nil })
		e.server.Stop()
		e.serving.Wait()
		e.server = nil
	}
}

// Dial connects to the admin socket, in memory.
func (a *Agent) Dial(ctx context.Context) (net.Conn, error) { return a.dial(ctx, admin) }

func (a *Agent) dial(ctx context.Context, name string) (net.Conn, error) {
	i := slices.IndexFunc(a.endpoints, func(e *endpoint) bool { return e.name == name })
	a.mu.Lock()
	a.dials++
	memory := a.endpoints[i].memory
	a.mu.Unlock()
	if memory == nil {
		return nil, &net.OpError{Op: "dial", Net: "unix", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	}
	conn, err := memory.DialContext(ctx)
	if err != nil {
		return nil, err
	}
	c := &lossy{Conn: conn}
	a.mu.Lock()
	a.conns = append(a.conns, c)
	a.mu.Unlock()
	return c, nil
}

// Requests are the streams that were opened so far.
func (a *Agent) Requests() []Request {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.requests)
}

// Opened counts those of one method.
func (a *Agent) Opened(method string) int {
	n := 0
	for _, r := range a.Requests() {
		if r.Method == method {
			n++
		}
	}
	return n
}

// Messages counts the messages sent so far.
func (a *Agent) Messages() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.messages
}

// Streams counts the streams that are open now.
func (a *Agent) Streams() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.streams
}

// Dials counts the connections so far, those that failed among them.
func (a *Agent) Dials() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.dials
}

// push serves one stream: it sends what build returns, at first and whenever it
// has changed, until the client leaves or build has an error, which ends the
// stream. build is called with the lock held; when it returns a time, then also
// at that time.
func push[M proto.Message](ctx context.Context, a *Agent, r Request, build func() (M, time.Time, error), send func(M) error) error {
	a.mu.Lock()
	r.At = time.Now()
	a.requests = append(a.requests, r)
	a.streams++
	cuts, repeats := a.cuts, a.repeats
	a.mu.Unlock()
	defer func() {
		a.mu.Lock()
		a.streams--
		a.mu.Unlock()
	}()

	timer := time.NewTimer(0)
	defer timer.Stop()
	var last M
	for first := true; ; {
		a.mu.Lock()
		changed := a.changed
		if a.cuts != cuts {
			err := a.cutErr
			a.mu.Unlock()
			return err
		}
		due := first || a.repeats != repeats
		repeats = a.repeats
		m, next, err := build()
		if a.hang && first && err == nil {
			next, due = time.Time{}, false
		} else if err == nil && (due || !proto.Equal(m, last)) {
			first, last, due = false, m, true
			a.messages++
		}
		a.mu.Unlock()
		if err != nil {
			return err
		}
		if due {
			if err := send(m); err != nil {
				return err
			}
		}
		var later <-chan time.Time
		if !next.IsZero() {
			timer.Reset(time.Until(next))
			later = timer.C
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		case <-later:
		}
	}
}
