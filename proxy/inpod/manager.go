package inpod

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"runtime/debug"
	"sync"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// ProtocolError says that the agent does not keep to ZDS as we know it: the two
// do not fit together, and the process has to end so that somebody notices.
type ProtocolError struct{ Err error }

// Error says what the agent did.
func (e *ProtocolError) Error() string { return "zds protocol: " + e.Err.Error() }

// Unwrap returns what the agent did.
func (e *ProtocolError) Unwrap() error { return e.Err }

// The causes with which the connections of a pod end at once.
var (
	errDeleted  = errors.New("connection closed: the pod was deleted")
	errReplaced = errors.New("connection closed: the pod has another network namespace now")
	errMissing  = errors.New("connection closed: the node agent does not know the pod any more")
	errDead     = errors.New("connection closed: the network namespace of the pod is dead")
)

var errDraining = errors.New("draining")

// Manager keeps the proxies of the pods of this node. Its methods are safe for
// concurrent use.
type Manager struct {
	cfg  Config
	log  *slog.Logger
	dial func(context.Context) (agentConn, error)

	opened   chan struct{} // closed by Open
	draining chan struct{} // closed by Drain
	settled  chan struct{} // closed when Config.Ready was first told that it is ready
	look     chan struct{} // one slot: the audit is to look now
	starts   *starts
	running  sync.WaitGroup // a goroutine for each pod

	reporting  sync.Mutex // serialises the calls of Config.Ready; guards the next two
	reported   *string
	hasSettled bool // settled is closed

	mu      sync.Mutex // guards what follows, and what pod says
	open    bool
	drained bool
	pods    map[string]*pod            // by UID: those that there are
	ending  map[*pod]struct{}          // those whose proxy has not ended yet
	claims  map[netns.NamespaceID]*pod // whose proxy is in a namespace, or about to be
	zds     connection
}

// New checks cfg. It opens and starts nothing.
func New(cfg Config) (*Manager, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	m := &Manager{
		cfg:      cfg,
		log:      cfg.Logger.With("component", "inpod"),
		opened:   make(chan struct{}),
		draining: make(chan struct{}),
		settled:  make(chan struct{}),
		look:     make(chan struct{}, 1),
		starts:   newStarts(min(max(2, runtime.GOMAXPROCS(0)), 8)),
		pods:     map[string]*pod{},
		ending:   map[*pod]struct{}{},
		claims:   map[netns.NamespaceID]*pod{},
		zds:      connection{err: errNotTried},
	}
	m.dial = m.dialAgent
	cfg.Metrics.pods.manager.Store(m)
	return m, nil
}

// Run connects to the agent and serves its pods. It returns nil when, after
// Drain, the last connection of the last pod has ended, or when ctx ends: every
// connection is cut then, with the cause of ctx. A *ProtocolError cuts them, too:
// the process should exit. Run may be called once.
func (m *Manager) Run(ctx context.Context) error {
	pods, cut := context.WithCancelCause(ctx)
	defer cut(nil)
	zds, leave := context.WithCancelCause(ctx)
	defer leave(nil)
	m.evaluate()
	var parts sync.WaitGroup
	parts.Go(func() {
		select {
		case <-m.draining:
			leave(errDraining)
		case <-zds.Done():
		}
	})
	parts.Go(func() { m.audit(zds) })
	err := m.follow(zds, pods) // the connection is closed when it returns
	leave(nil)
	if err != nil {
		cut(err)
	} else if ctx.Err() == nil {
		m.drainPods() // whatever the audit is waiting for
	}
	parts.Wait()
	m.running.Wait()
	if err != nil {
		return err
	}
	return nil
}

// Open says that the state is complete: every pod listens and is served, and
// those that come later are at once. It is idempotent and does not block.
func (m *Manager) Open() {
	m.mu.Lock()
	if !m.open {
		m.open = true
		close(m.opened)
		m.zds.hold()
	}
	m.mu.Unlock()
	m.wake()
	m.evaluate()
}

// Drain ends the connection to the agent, and then drains every pod. Run returns
// when the last connection has ended. It is idempotent and does not block.
func (m *Manager) Drain() {
	m.mu.Lock()
	if !m.drained {
		m.drained = true
		close(m.draining)
	}
	m.mu.Unlock()
	m.evaluate()
}

// drainPods asks every proxy to drain. No pod comes any more.
func (m *Manager) drainPods() {
	m.mu.Lock()
	var proxies []Proxy
	for _, p := range m.pods {
		if p.proxy != nil {
			proxies = append(proxies, p.proxy)
			p.set(Draining, "")
		}
	}
	m.mu.Unlock()
	var all sync.WaitGroup
	for _, proxy := range proxies {
		all.Go(proxy.Drain)
	}
	all.Wait()
}

// wake makes the audit look at once.
func (m *Manager) wake() {
	select {
	case m.look <- struct{}{}:
	default: // it will
	}
}

// recovered is do, with a panic as its error.
func (m *Manager) recovered(ctx context.Context, what string, do func(context.Context) error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = m.panicked(ctx, what, r)
		}
	}()
	return do(ctx)
}

// panicked keeps a panic within what it has happened in (design D21).
func (m *Manager) panicked(ctx context.Context, where string, value any) error {
	m.cfg.Metrics.panics.Inc()
	m.log.ErrorContext(ctx, "panic in shared mode; what it happened in is tried again",
		"in", where, "panic", fmt.Sprint(value), "stack", string(debug.Stack()))
	return fmt.Errorf("%s: panic: %v", where, value)
}
