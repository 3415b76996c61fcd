package inpod

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"syscall"
	"time"

	"github.com/ztunnel-go/ztunnel/internal/backoff"
)

// agentConn is a connection to the agent. receive and send are each for one
// goroutine at a time; Close ends both.
type agentConn interface {
	// receive blocks until there is a packet. The files in it are the caller's, in
	// case of an error, too. io.EOF means that the agent has gone.
	receive() (packet, error)
	send([]byte) error
	Close() error
}

// The times of spec/identity-admin-inpod.md §7.8, and ours.
const (
	connectFirst = 20 * time.Millisecond
	retryMax     = 15 * time.Second
	// snapshotPatience is how long the agent may take for the next message before
	// its snapshot is complete.
	snapshotPatience = 30 * time.Second
	// lasting is how long a connection has to live to count as a good one.
	lasting = 10 * time.Second
	// hintAfter is the number of connections that the agent has to close without a
	// snapshot for a hint, which comes no oftener than hintEvery.
	hintAfter = 5
	hintEvery = time.Minute
)

var (
	errNoSnapshot = fmt.Errorf("nothing came for %s although the snapshot is not complete", snapshotPatience)
	errClosed     = errors.New("the node agent has closed the connection")
)

// retries paces the connections of one Manager.
type retries struct {
	greeting *backoff.Sequence // after a hello that could not be sent
	lost     *backoff.Sequence // after connections that were lost early
	yielding *backoff.Sequence // the same for one that can wait
	losses   int               // in a row
	empty    int               // in a row without a snapshot
	hinted   time.Time         // the last time
	warned   time.Time         // the last time
}

func newRetries() *retries {
	policy := func(first, most time.Duration) *backoff.Sequence {
		// Jitter comes on top of Max.
		return backoff.Policy{First: first, Max: most * 2 / 3, Jitter: 0.5, Budget: -1}.New()
	}
	return &retries{
		greeting: backoff.Policy{First: 500 * time.Millisecond, Max: retryMax}.New(),
		lost:     policy(10*time.Millisecond, time.Second),
		yielding: policy(time.Second, 5*time.Second),
	}
}

// end is how a connection ended.
type end struct {
	err      error
	greeted  bool // the hello was sent
	snapshot bool // the snapshot was complete
	lived    time.Duration
}

// after is how long to wait after a connection that ended in e.
func (r *retries) after(e end, handOver bool) time.Duration {
	if e.snapshot {
		r.greeting = backoff.Policy{First: 5 * time.Millisecond, Max: retryMax}.New()
		r.empty = 0
	} else if e.theirs() {
		r.empty++
	}
	if !e.greeted {
		return r.greeting.Next(time.Now())
	}
	if e.snapshot && e.lived >= lasting {
		r.lost.Reset()
		r.yielding.Reset()
		r.losses = 0
	}
	r.losses++
	switch {
	case r.losses == 1:
		return 0
	case handOver && e.snapshot && r.losses > 3:
		return r.yielding.Next(time.Now())
	}
	return r.lost.Next(time.Now())
}

// theirs tells whether the agent ended the connection.
func (e *end) theirs() bool {
	return errors.Is(e.err, errClosed) || errors.Is(e.err, syscall.ECONNRESET) || errors.Is(e.err, syscall.EPIPE)
}

// hint tells whether it is time for one.
func (r *retries) hint(now time.Time) bool {
	if r.empty < hintAfter || !r.hinted.IsZero() && now.Sub(r.hinted) < hintEvery {
		return false
	}
	r.hinted = now
	return true
}

// level is that of the line about a lost connection: the first ones of a row, and
// then one a minute, are worth a warning.
func (r *retries) level(now time.Time) slog.Level {
	if r.losses > 3 && now.Sub(r.warned) < hintEvery {
		return slog.LevelDebug
	}
	r.warned = now
	return slog.LevelWarn
}

// follow keeps a connection to the agent until ctx ends or the agent breaks the
// protocol. pods is the context of the pods.
func (m *Manager) follow(ctx, pods context.Context) error {
	r := newRetries()
	for ctx.Err() == nil {
		c := m.connect(ctx)
		if c == nil {
			break
		}
		e := m.session(ctx, pods, c)
		m.disconnected(e.err)
		if wrong, ok := errors.AsType[*ProtocolError](e.err); ok {
			m.log.ErrorContext(ctx, "the node agent breaks the ZDS protocol: its version and ours do not fit together",
				"path", m.cfg.Path, "error", wrong.Err.Error())
			return wrong
		}
		if ctx.Err() == nil {
			m.pause(ctx, r, e)
		}
	}
	return nil
}

// pause waits before the connection that follows one which ended in e.
func (m *Manager) pause(ctx context.Context, r *retries, e end) {
	delay := r.after(e, m.cfg.HandOver)
	m.log.Log(ctx, r.level(time.Now()), "lost the connection to the node agent",
		"path", m.cfg.Path, "error", e.err.Error(), "snapshot", e.snapshot, "in_a_row", r.losses, "retry_in", delay.String())
	if r.hint(time.Now()) {
		m.log.WarnContext(ctx, "the node agent keeps closing the connection before its snapshot is complete, so that no new pod can be served; "+
			`its own log says why: look for "failed to open netns file" or "failed to handle connection" (Cilium), or "ztunnel" (Istio CNI)`,
			"path", m.cfg.Path, "connections", r.empty)
	}
	backoff.Sleep(ctx, delay)
}

// connect tries until it has a connection, nil when ctx has ended.
func (m *Manager) connect(ctx context.Context) agentConn {
	retry := backoff.Policy{First: connectFirst, Max: retryMax, Jitter: -1, Budget: -1}.New()
	for {
		c, err := m.dial(ctx)
		switch {
		case err == nil && ctx.Err() == nil:
			return c
		case err == nil:
			_ = c.Close()
			return nil
		case ctx.Err() != nil:
			return nil
		}
		m.disconnected(err)
		delay := retry.Next(time.Now())
		m.log.WarnContext(ctx, "failed to connect to the Istio CNI node agent, is the node agent healthy?",
			"path", m.cfg.Path, "details", err.Error(), "retry_in", delay.String())
		if !backoff.Sleep(ctx, delay) {
			return nil
		}
	}
}

// session says hello on c and serves it to its end.
func (m *Manager) session(ctx, pods context.Context, c agentConn) (e end) {
	began := time.Now()
	defer func() { e.lived = time.Since(began) }()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	closed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() { defer close(closed); _ = c.Close() })
	defer func() {
		if stop() {
			_ = c.Close()
		} else {
			<-closed
		}
	}()
	b, err := hello()
	if err == nil {
		err = c.send(b)
	}
	if err != nil {
		return end{err: fmt.Errorf("send hello: %w", err)}
	}
	m.connected()
	e.greeted = true
	patience := time.AfterFunc(snapshotPatience, func() { cancel(errNoSnapshot) })
	defer patience.Stop()
	for e.err == nil {
		e.err = m.exchange(pods, c)
		if e.snapshot = m.hasSnapshot(); e.snapshot {
			patience.Stop()
		} else if e.err == nil {
			patience.Reset(snapshotPatience)
		}
	}
	if ctx.Err() != nil {
		e.err = context.Cause(ctx) // it has closed the connection
	}
	return e
}

// exchange reads one message and answers it. After an error the connection is of
// no use.
func (m *Manager) exchange(pods context.Context, c agentConn) error {
	p, err := c.receive()
	began := time.Now()
	switch {
	case errors.Is(err, io.EOF):
		closeAll(p.files)
		return errClosed
	case err != nil:
		closeAll(p.files)
		return fmt.Errorf("receive: %w", err)
	case m.isDrained():
		closeAll(p.files)
		return errDraining
	}
	refusal, failure := m.take(pods, p)
	m.evaluate()
	b, err := answer(refusal)
	if err == nil {
		err = c.send(b)
	}
	m.cfg.Metrics.answers.Observe(time.Since(began).Seconds())
	if failure != nil {
		return failure
	}
	if err != nil {
		return fmt.Errorf("send answer: %w", err)
	}
	return nil
}

func (m *Manager) connected() {
	m.mu.Lock()
	now := time.Now()
	m.zds = connection{up: true, since: now, patience: m.zds.patience}
	for _, p := range m.pods {
		p.listed, p.initial = false, false
	}
	m.mu.Unlock()
	m.cfg.Metrics.connected.Set(1)
	m.log.Info("connected to the node agent", "path", m.cfg.Path)
	m.evaluate()
}

func (m *Manager) disconnected(err error) {
	m.mu.Lock()
	if m.zds.up || m.zds.since.IsZero() {
		m.zds.since = time.Now()
	}
	m.zds.up, m.zds.snapshot, m.zds.err = false, time.Time{}, err
	m.mu.Unlock()
	m.cfg.Metrics.connected.Set(0)
	m.evaluate()
}

func (m *Manager) hasSnapshot() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return !m.zds.snapshot.IsZero()
}

// phase tells whether pods are to listen, and whether the snapshot is complete.
func (m *Manager) phase() (open, complete bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.open, !m.zds.snapshot.IsZero()
}

func (m *Manager) isDrained() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.drained
}
