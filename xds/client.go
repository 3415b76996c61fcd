// Package xds takes the state of the mesh from a control plane, istiod or Cilium's
// agent, by the delta variant of the aggregated discovery service, and writes it
// to a state.Store (spec/state-xds-dns.md §3).
package xds

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ztunnel-go/ztunnel/internal/backoff"
	"github.com/ztunnel-go/ztunnel/internal/istiod"
	"github.com/ztunnel-go/ztunnel/state"
	"github.com/ztunnel-go/ztunnel/xds/discoverypb"
)

// maxResponse bounds a response, in bytes: Cilium sends everything in one.
const maxResponse = 200 << 20

// Client keeps a store as the control plane wants it. What was received stays when
// the connection is lost, until the control plane takes it back.
type Client struct {
	cfg      Config
	log      *slog.Logger
	endpoint istiod.Endpoint
	creds    *istiod.Credentials
	roots    *istiod.Roots
	node     *discoverypb.Node
	demands  *demands
	synced   chan struct{}

	// Owned by the goroutine of Run, but for the subscriptions' content.
	subscriptions []*subscription // in the order of the first requests
	expected      int             // subscriptions that must be processed before synced
	echo          echo

	mu        sync.Mutex // guards what follows, and the content of the subscriptions
	started   bool
	connected bool
	since     time.Time // of connected
	lastErr   error
}

// echo says whether streams tell the versions that we hold.
type echo struct {
	bare  bool // the next stream does not
	trial int  // so many names may have been too many for the server: it is bare for that
	limit int  // so many were; 0: none known
}

// subscribe makes the subscriptions. Policies are always wanted whole.
func (c *Client) subscribe() {
	addresses := newAddresses(c.cfg.Store)
	address := newSubscription(addressURL, !c.cfg.OnDemand)
	address.apply = addresses.apply
	authorization := newSubscription(authorizationURL, true)
	authorization.apply = func(resources []*discoverypb.Resource, removed, _ []string) *state.RejectedError {
		return applyAuthorizations(c.cfg.Store, resources, removed) // a stale policy stays enforced
	}
	c.subscriptions = []*subscription{address, authorization}
	for _, s := range c.subscriptions {
		if s.wildcard {
			c.expected++
		}
	}
	c.demands = newDemands(c.cfg.Metrics)
}

// Synced returns a channel that is closed once the first response of every type
// that is not fetched on demand was processed, whether or not all its resources
// were accepted (decision D15). It stays closed when the connection is lost.
func (c *Client) Synced() <-chan struct{} { return c.synced }

// Demand asks for what the store does not know: network/IP, namespace/hostname or
// a UID. It returns nil when the control plane has answered, now or within the last
// seconds, and the store has the answer, which may be that there is no such thing. It waits
// for ctx, 5 s at most, and fails at once with ErrTooManyDemands when thousands of
// others are being asked for. Without Config.OnDemand there is nothing to ask for,
// and it returns nil.
func (c *Client) Demand(ctx context.Context, key string) error {
	if !c.cfg.OnDemand {
		return nil
	}
	if key == "" || key == "*" {
		return fmt.Errorf("ask for %q: no name of one resource", key)
	}
	return c.demands.wait(ctx, key)
}

// Run connects, and connects again whenever the connection is lost, until ctx
// ends, whose cause it returns. It may be called once.
func (c *Client) Run(ctx context.Context) error {
	c.mu.Lock()
	again := c.started
	c.started, c.since = true, time.Now()
	c.mu.Unlock()
	if again {
		return errors.New("the xDS client was started twice")
	}
	pace := newPacer()
	for id := 1; ; id++ {
		log := c.log.With("id", id)
		end := c.attempt(ctx, log)
		c.disconnected(end.err)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		delay := pace.next(end)
		c.cfg.Metrics.terminated(end.reason)
		logEnd(ctx, log, end, delay)
		if !backoff.Sleep(ctx, delay) {
			return context.Cause(ctx)
		}
	}
}

// noticeable is a delay after which the loss of a connection is more than an event of
// every day.
const noticeable = time.Second

func logEnd(ctx context.Context, log *slog.Logger, end ended, delay time.Duration) {
	switch {
	case end.local:
		log.WarnContext(ctx, "XDS client error: correct the file that the error names, nothing was asked of the control plane", "error", end.err, "retry_in", delay)
	case end.reason == connectionError:
		log.WarnContext(ctx, "XDS client connection error: check that the control plane runs and can be reached", "error", end.err, "retry_in", delay)
	case end.reason == streamError:
		log.WarnContext(ctx, "XDS client error: see the log of the control plane", "error", end.err, "retry_in", delay)
	case end.reason == reconnect && delay >= noticeable:
		log.WarnContext(ctx, "XDS client loses its connections soon after they are made: check the network and the control plane", "error", end.err, "retry_in", delay)
	case end.reason == reconnect:
		log.DebugContext(ctx, "XDS client reconnects", "error", end.err, "retry_in", delay)
	case end.reason == complete:
		log.WarnContext(ctx, "XDS client complete: the control plane ended the stream", "retry_in", delay)
	}
}

// attempt makes one connection and one stream, and serves it until it ends.
func (c *Client) attempt(ctx context.Context, log *slog.Logger) ended {
	set, err := c.roots.Look(ctx, 0)
	if err != nil {
		return ended{reason: streamError, local: true, err: fmt.Errorf("XDS_ROOT_CA: %w", err)}
	}
	sctx, err := c.creds.Attach(ctx)
	if err != nil {
		return ended{reason: connectionError, local: true, err: fmt.Errorf("AUTH_TOKEN: %w", err)}
	}
	sctx, cancel := context.WithCancel(sctx)
	defer cancel()
	var dialed dialError
	conn, err := istiod.Channel{
		Endpoint:    c.endpoint,
		Dial:        dialed.record(c.cfg.Dial),
		Pool:        set.Pool,
		AltHostname: c.cfg.AltHostname,
		TLS12:       c.cfg.TLS12,
		PQC:         c.cfg.PQC,
	}.Connect(grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxResponse)))
	if err != nil {
		return ended{reason: streamError, err: fmt.Errorf("connect to %s: %w", c.cfg.Address, err)}
	}
	defer conn.Close()
	stream, err := discoverypb.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(sctx)
	if err != nil {
		return ended{reason: connectionError, err: describe(c.cfg.Address, connectionError, err, dialed.get())}
	}
	s := newSession(c, log, stream)
	err = s.run(sctx, cancel)
	c.judgeEcho(s, err)
	end := ended{}
	end.reason, err = classify(err, s.established())
	if err != nil && !errors.Is(err, io.EOF) {
		end.err = describe(c.cfg.Address, end.reason, err, dialed.get())
	}
	if s.established() {
		end.lived = time.Since(s.since)
	}
	return end
}

// judgeEcho decides whether the next stream tells versions. A server that refuses
// the names that we tell is asked once without: that it takes is the proof.
func (c *Client) judgeEcho(s *session, err error) {
	refused := status.Code(err) == codes.ResourceExhausted && !s.answered()
	switch {
	case refused && s.echoes > 0:
		c.echo.bare, c.echo.trial = true, s.echoes
	case refused:
		c.echo.bare, c.echo.trial = false, 0
	case errors.Is(err, errResync):
		c.echo.bare = true
	}
}

// bare reports whether a new stream must not tell versions.
func (c *Client) bare() bool {
	if c.echo.bare {
		return true
	}
	n := 0
	for _, s := range c.subscriptions {
		n = max(n, len(s.known))
	}
	return c.echo.limit > 0 && n >= c.echo.limit
}

// dialError remembers the latest error of a dialer.
type dialError struct {
	mu  sync.Mutex // guards err
	err error
}

func (d *dialError) record(dial istiod.Dial) istiod.Dial {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := dial(ctx, network, address)
		d.mu.Lock()
		d.err = err
		d.mu.Unlock()
		return conn, err
	}
}

func (d *dialError) get() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err
}
