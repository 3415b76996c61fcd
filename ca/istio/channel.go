package istio

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc"

	"github.com/ztunnel-go/ztunnel/internal/istiod"
)

// idleTimeout is when an idle connection is closed, before something on the way
// forgets it (identity spec §2.6).
const idleTimeout = 5 * time.Minute

// channel is a connection to the CA under one set of roots. Its fields are
// guarded by the fetcher's lock.
type channel struct {
	conn    *grpc.ClientConn
	roots   *rootSet
	users   int
	retired bool // closed by its last user
}

// channel returns the current channel, a new one when the roots have changed.
// Every call needs a release.
func (f *fetcher) channel(ctx context.Context) (*channel, error) {
	set, err := f.server.look(ctx, 0)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	old := f.current
	if old != nil && old.roots == set {
		old.users++
		f.mu.Unlock()
		return old, nil
	}
	conn, err := f.connect(set)
	if err != nil {
		f.mu.Unlock()
		return nil, err
	}
	ch := &channel{conn: conn, roots: set, users: 1}
	f.current = ch
	unused := old != nil && old.users == 0
	if old != nil {
		old.retired = true
	}
	f.mu.Unlock()
	if unused {
		old.close()
	}
	return ch, nil
}

func (f *fetcher) release(ch *channel) {
	f.mu.Lock()
	ch.users--
	last := ch.retired && ch.users == 0
	f.mu.Unlock()
	if last {
		ch.close()
	}
}

// Disconnect closes the connection. It is called when no Fetch runs; the next
// one connects anew.
func (f *fetcher) Disconnect() {
	f.mu.Lock()
	ch := f.current
	f.current = nil
	f.mu.Unlock()
	if ch != nil {
		ch.close()
	}
}

func (ch *channel) close() {
	_ = ch.conn.Close() // the only error is that it was closed before
}

// connect makes a channel; it connects with the first request.
func (f *fetcher) connect(set *rootSet) (*grpc.ClientConn, error) {
	conn, err := istiod.Channel{
		Endpoint:    f.endpoint,
		Dial:        f.dial,
		Pool:        set.Pool,
		AltHostname: f.cfg.AltHostname,
		TLS12:       f.cfg.TLS12,
		PQC:         f.cfg.PQC,
	}.Connect(grpc.WithIdleTimeout(idleTimeout))
	if err != nil {
		return nil, fmt.Errorf("make a channel to %s: %w", f.cfg.Address, err)
	}
	return conn, nil
}
