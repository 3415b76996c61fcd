package hbone

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"time"
)

// PoolConfig configures a Pool.
type PoolConfig[K comparable] struct {
	Config
	// Dial connects to the peer of a key and says how to do the handshake. Its
	// errors reach Open unwrapped. It may be called concurrently, and its ctx
	// ends when nobody waits any more.
	Dial func(ctx context.Context, key K) (net.Conn, Handshake, error)
	// MaxStreams is how many streams share a tunnel, if the peer allows as many.
	// Default 100.
	MaxStreams int
	// IdleTimeout is how long a tunnel without streams is kept. Default 5 min,
	// negative: it is closed at once.
	IdleTimeout time.Duration
	// ConnsPerKey is how many tunnels are opened for a key before they share
	// streams. Default 1.
	ConnsPerKey int
	// MaxAge is how long a tunnel takes new streams after it was dialled. Default
	// 0: as long as its certificates are valid.
	MaxAge time.Duration
}

// Pool keeps the tunnels of a client, by key. All methods are safe for
// concurrent use. It starts nothing until Open is called; Close ends all it
// started.
type Pool[K comparable] struct {
	cfg  PoolConfig[K]
	conn *Config

	mu     sync.Mutex // guards the rest
	keys   map[K]*poolKey[K]
	all    map[*tunnel[K]]struct{} // tunnels that are not closed, also those that take no new streams
	closed error                   // no new streams
	wg     sync.WaitGroup          // dials and the lives of tunnels
	stats  PoolStats
}

// poolKey is the state of one key. It exists while it holds something.
type poolKey[K comparable] struct {
	tunnels []*tunnel[K] // usable ones
	dials   []*dialCall[K]
}

// tunnel is an established connection of the pool.
type tunnel[K comparable] struct {
	p       *Pool[K]
	key     K
	c       *conn
	streams int  // open or reserved
	out     bool // takes no new streams
	idle    *time.Timer
	ended   func() // of Handshake.Established
}

// dialCall is a dial in progress, shared by up to MaxStreams callers of Open.
type dialCall[K comparable] struct {
	cancel  context.CancelCauseFunc
	waiters int
	done    chan struct{} // closed when the rest is set
	t       *tunnel[K]
	spare   int // streams reserved for waiters on t
	err     error
	retires []retirement[K] // asked for while dialling
}

type retirement[K comparable] struct {
	match func(K, *ConnInfo) bool
	cause error
	abort bool
}

// NewPool returns an empty pool.
func NewPool[K comparable](cfg PoolConfig[K]) *Pool[K] {
	orDefault(&cfg.MaxStreams, 100)
	orDefault(&cfg.IdleTimeout, 5*time.Minute)
	orDefault(&cfg.ConnsPerKey, 1)
	cfg.MaxStreams = max(cfg.MaxStreams, 1)
	return &Pool[K]{
		cfg: cfg, conn: cfg.Config.withDefaults(),
		keys: make(map[K]*poolKey[K]), all: make(map[*tunnel[K]]struct{}),
	}
}

// maxUseless is how many fresh tunnels in a row may turn out to take no streams
// before Open gives up.
const maxUseless = 3

// Open opens a stream to authority on a tunnel of key, dialling one if need be,
// and waits for the answer. fields are sent with CONNECT. An answer other than
// 200 is a *StatusError. A stream that the peer refused unprocessed is tried
// once more on another tunnel.
func (p *Pool[K]) Open(ctx context.Context, key K, authority string, fields ...Field) (Stream, error) {
	if authority == "" {
		return nil, errors.New("empty authority")
	}
	if err := checkFields(append([]Field{{"authority", authority}}, fields...)); err != nil {
		return nil, err
	}
	var avoid *tunnel[K]
	useless := 0 // tunnels that took no streams from the start: the peer is going away
	for {
		t, err := p.reserve(ctx, key, avoid)
		var st *stream
		if err == nil {
			if st, err = t.c.open(ctx, authority, fields, t.streamEnded); err == nil {
				return st, nil
			}
			if errors.Is(err, errNoStreams) { // it ended in between: nothing was sent
				t.streamEnded()
				t.retire(nil)
			}
		}
		if errors.Is(err, errNoStreams) {
			if useless++; useless < maxUseless {
				continue
			}
			return nil, &ConnError{Err: errNoStreams}
		}
		if t == nil {
			return nil, err
		}
		var se *StreamError
		if avoid == nil && errors.As(err, &se) && se.Remote && se.Code == ErrRefusedStream {
			avoid = t
			continue
		}
		return nil, err
	}
}

// reserve returns a tunnel with a stream reserved on it.
func (p *Pool[K]) reserve(ctx context.Context, key K, avoid *tunnel[K]) (*tunnel[K], error) {
	for {
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		p.mu.Lock()
		if p.closed != nil {
			p.mu.Unlock()
			return nil, p.closed
		}
		k := p.keys[key]
		if k == nil {
			k = new(poolKey[K])
			p.keys[key] = k
		}
		if t := p.pick(k, avoid); t != nil {
			t.streams++
			t.stopIdle()
			p.mu.Unlock()
			return t, nil
		}
		p.keys[key] = k // dropping an expired tunnel may have removed it
		d := p.join(ctx, key, k)
		p.mu.Unlock()
		t, err := p.await(ctx, d)
		if t != nil || err != nil {
			return t, err
		}
	}
}

// pick returns the least loaded tunnel of k that has room. The caller holds p.mu.
func (p *Pool[K]) pick(k *poolKey[K], avoid *tunnel[K]) (best *tunnel[K]) {
	for _, t := range append([]*tunnel[K](nil), k.tunnels...) {
		if t.c.expired() {
			p.drop(t)
			p.wg.Go(func() { t.retire(ErrExpired) })
			continue
		}
		if t == avoid || !t.c.usable() || t.streams >= t.c.limit(p.cfg.MaxStreams) {
			continue
		}
		if best == nil || t.streams < best.streams {
			best = t
		}
	}
	if best != nil && best.streams > 0 && len(k.tunnels)+len(k.dials) < p.cfg.ConnsPerKey {
		return nil
	}
	return best
}

// join adds the caller to a dial of k that has room, or begins one. The caller
// holds p.mu.
func (p *Pool[K]) join(ctx context.Context, key K, k *poolKey[K]) *dialCall[K] {
	for _, d := range k.dials {
		if d.waiters > 0 && d.waiters < p.cfg.MaxStreams && len(k.tunnels)+len(k.dials) >= p.cfg.ConnsPerKey {
			d.waiters++
			return d
		}
	}
	// The dial belongs to all its waiters, so the end of the first one's context
	// must not end it; the values (tracing) it may have.
	dctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	d := &dialCall[K]{cancel: cancel, waiters: 1, done: make(chan struct{})}
	k.dials = append(k.dials, d)
	p.wg.Go(func() { p.dial(dctx, key, d) })
	return d
}

// await waits for d. It returns nothing at all when the peer allows fewer streams
// than were waiting and the caller must try again.
func (p *Pool[K]) await(ctx context.Context, d *dialCall[K]) (*tunnel[K], error) {
	select {
	case <-d.done:
	case <-ctx.Done():
		p.mu.Lock()
		defer p.mu.Unlock()
		d.waiters--
		switch {
		case !isClosed(d.done):
			if d.waiters == 0 {
				d.cancel(context.Cause(ctx))
			}
		case d.t != nil && d.spare > 0: // a stream was reserved for us
			d.spare--
			d.t.released()
		}
		return nil, context.Cause(ctx)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	d.waiters--
	if d.err != nil {
		return nil, d.err
	}
	if d.spare == 0 {
		return nil, nil
	}
	d.spare--
	if d.t.out {
		d.t.released()
		return nil, errNoStreams
	}
	return d.t, nil
}

// dial makes one tunnel for those who wait for d.
func (p *Pool[K]) dial(ctx context.Context, key K, d *dialCall[K]) {
	t := &tunnel[K]{p: p, key: key}
	err := p.establish(ctx, t)
	p.mu.Lock()
	k := p.keys[key]
	for i, other := range k.dials {
		if other == d {
			k.dials = append(k.dials[:i], k.dials[i+1:]...)
			break
		}
	}
	if err == nil && p.closed != nil {
		err = p.closed
	}
	d.err = err
	if err != nil {
		p.tidy(key)
		close(d.done)
		p.mu.Unlock()
		d.cancel(nil)
		if t.c != nil {
			t.c.fail(&ConnError{Err: err}, aborted)
			t.c.finish()
		}
		if t.ended != nil {
			t.ended()
		}
		return
	}
	p.stats.Dialed++
	p.all[t] = struct{}{}
	k.tunnels = append(k.tunnels, t)
	d.t = t
	d.spare = min(d.waiters, t.c.limit(p.cfg.MaxStreams))
	t.streams = d.spare
	for _, r := range d.retires {
		if r.match(key, t.c.info) {
			t.out = true
		}
	}
	if t.out || !t.c.usable() {
		p.drop(t)
	}
	if t.streams == 0 {
		t.armIdle()
	}
	close(d.done)
	p.mu.Unlock()
	d.cancel(nil)
	for _, r := range d.retires {
		if r.match(key, t.c.info) {
			t.end(r)
		}
	}
	p.wg.Go(func() { p.attend(t) }) // on a stack that no handshake has grown
}

// attend lives as long as t.
func (p *Pool[K]) attend(t *tunnel[K]) {
	<-t.c.ended
	t.c.finish()
	p.mu.Lock()
	p.drop(t)
	t.stopIdle()
	delete(p.all, t)
	p.stats.Closed++
	p.mu.Unlock()
	t.ended()
}

func (p *Pool[K]) establish(ctx context.Context, t *tunnel[K]) error {
	nc, h, err := p.cfg.Dial(ctx, t.key)
	if err != nil {
		return err
	}
	t.c, err = dialConn(ctx, p.conn, nc, h.TLS, func(c *conn) { c.onAway = t.away })
	if err != nil {
		return err
	}
	t.c.expireAfter(p.cfg.MaxAge)
	if t.c.limit(1) == 0 {
		return &PrefaceError{Err: errors.New("peer allows no streams")}
	}
	t.ended = h.established(t.c.info)
	return nil
}

// tidy removes a key that holds nothing. The caller holds p.mu.
func (p *Pool[K]) tidy(key K) {
	if k := p.keys[key]; k != nil && len(k.tunnels) == 0 && len(k.dials) == 0 {
		delete(p.keys, key)
	}
}

// drop takes t out of the choice. The caller holds p.mu.
func (p *Pool[K]) drop(t *tunnel[K]) {
	t.out = true
	if k := p.keys[t.key]; k != nil {
		for i, other := range k.tunnels {
			if other == t {
				k.tunnels = append(k.tunnels[:i], k.tunnels[i+1:]...)
				break
			}
		}
	}
	p.tidy(t.key)
}

// away is called by the tunnel when it takes no new streams.
func (t *tunnel[K]) away() {
	t.p.mu.Lock()
	t.p.drop(t)
	t.p.mu.Unlock()
}

// streamEnded is called once for each stream reserved.
func (t *tunnel[K]) streamEnded() {
	t.p.mu.Lock()
	t.released()
	t.p.mu.Unlock()
}

// released returns a reservation. The caller holds p.mu.
func (t *tunnel[K]) released() {
	if t.streams--; t.streams == 0 {
		t.armIdle()
	}
}

// armIdle is called with p.mu held.
func (t *tunnel[K]) armIdle() {
	after := t.p.cfg.IdleTimeout
	if t.out || after < 0 {
		after = 0
	}
	if t.idle == nil {
		t.idle = time.AfterFunc(after, t.idled)
		return
	}
	t.idle.Reset(after)
}

func (t *tunnel[K]) stopIdle() {
	if t.idle != nil {
		t.idle.Stop()
	}
}

// idled closes a tunnel that nobody has used for a while.
func (t *tunnel[K]) idled() {
	t.p.mu.Lock()
	used := t.streams > 0
	if !used {
		t.p.drop(t)
	}
	t.p.mu.Unlock()
	if !used {
		t.c.drain()
	}
}

// retire lets t end with its last stream.
func (t *tunnel[K]) retire(cause error) {
	if cause != nil {
		t.p.conn.Logger.LogAttrs(context.Background(), slog.LevelDebug, "tunnel retired",
			slog.String("peer", t.c.info.Remote.String()), slog.Any("cause", cause))
	}
	t.p.mu.Lock()
	t.p.drop(t)
	idle := t.streams == 0
	t.p.mu.Unlock()
	if idle {
		t.c.drain()
	}
}

func (t *tunnel[K]) end(r retirement[K]) {
	if r.abort {
		t.c.fail(&ConnError{Err: r.cause}, aborted)
		return
	}
	t.retire(r.cause)
}

// Retire makes the tunnels that match take no new streams; each closes with its
// last one. A dial in progress is judged when it is done. match is called with a
// lock held: it must be quick and must not call the pool.
func (p *Pool[K]) Retire(match func(K, *ConnInfo) bool, cause error) {
	p.forEach(retirement[K]{match: match, cause: cause})
}

// Abort ends the tunnels that match at once. Their streams end with cause.
func (p *Pool[K]) Abort(match func(K, *ConnInfo) bool, cause error) {
	p.forEach(retirement[K]{match: match, cause: cause, abort: true})
}

func (p *Pool[K]) forEach(r retirement[K]) {
	p.mu.Lock()
	if len(p.all)+len(p.keys) == 0 { // an idle pod's, at every change of the world
		p.mu.Unlock()
		return
	}
	var matched []*tunnel[K]
	for t := range p.all {
		if r.match(t.key, t.c.info) {
			p.drop(t)
			matched = append(matched, t)
		}
	}
	for _, k := range p.keys {
		for _, d := range k.dials {
			d.retires = append(d.retires, r)
		}
	}
	p.mu.Unlock()
	for _, t := range matched {
		t.end(r)
	}
}

// Drain makes Open fail with ErrPoolClosed and lets every tunnel end with its
// last stream. It does not block.
func (p *Pool[K]) Drain() {
	p.mu.Lock()
	p.closed = ErrPoolClosed
	for _, k := range p.keys {
		for _, d := range k.dials {
			d.cancel(ErrPoolClosed)
		}
	}
	p.mu.Unlock()
	p.Retire(func(K, *ConnInfo) bool { return true }, ErrPoolClosed)
}

// Close aborts every tunnel and dial and waits for all goroutines of the pool.
func (p *Pool[K]) Close() {
	p.mu.Lock()
	p.closed = ErrPoolClosed
	for _, k := range p.keys {
		for _, d := range k.dials {
			d.cancel(ErrPoolClosed)
		}
	}
	p.mu.Unlock()
	p.Abort(func(K, *ConnInfo) bool { return true }, ErrPoolClosed)
	p.wg.Wait()
}
